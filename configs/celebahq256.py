"""CelebA-HQ, 256×256, as in Ho et al. 2020, App. B: 113.7 M parameters, 500k steps. Not run.

    python main.py --config=configs/celebahq256.py --config.data.path=FOLDER

FOLDER holds the 30,000 images of CelebA-HQ (Karras et al. 2018). TFDS cannot download them: the
authors publish only differences from CelebA, but copies at 256×256 are common. Devices with less
memory need --config.model.remat=true and, for example, --config.optim.accumulate=8.
"""

from ddpm_jax.configs import default_config


def get_config():
    """The paper's settings for 256×256 images."""
    config = default_config()
    config.data.update(
        name="folder",
        split="train[1000:]",
        eval_split="train[:1000]",
        image_size=(256, 256),
        random_flip=True,
    )
    config.diffusion.variance = "fixed_small"
    config.model.update(channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.model.update(attention_down=(4,), attention_up=(4,))  # at 16 × 16
    config.optim.learning_rate = 2e-5
    config.train.update(batch_size=64, num_steps=500_000)
    config.sample.update(num_samples=16, batch_size=16)
    return config
