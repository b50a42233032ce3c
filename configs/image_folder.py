"""A folder of your own images, at 64×64. Not run.

    python main.py --config=configs/image_folder.py --config.data.path=FOLDER

All images below FOLDER, of any size and format, are cropped to squares and scaled; 5 % are held
out. For a folder of a few hundred images, a higher model.dropout helps.
"""

from ddpm_jax.configs import default_config


def get_config():
    """CIFAR-10's network, one level deeper."""
    config = default_config()
    config.data.update(
        name="folder",
        split="train[5%:]",
        eval_split="train[:5%]",
        image_size=(64, 64),
        random_flip=True,
    )
    config.diffusion.variance = "fixed_small"
    config.model.channel_mults = (1, 2, 2, 2, 2)
    config.model.update(attention_down=(2,), attention_up=(2,))  # at 16 × 16
    return config
