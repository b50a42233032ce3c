"""LSUN (Yu et al. 2015), 256×256, as in Ho et al. 2020, App. B: 113.7 M parameters. Not run.

    python main.py --config=configs/lsun256.py --config.data.path=FOLDER

FOLDER holds the images of one category (bedroom, church or cat), exported from the database files
of LSUN's authors; TFDS cannot download them. Images of another size are cropped and scaled. The
paper trained bedroom for 2.4 M steps, cat for 1.8 M and church for 1.2 M, without random flips for
bedroom (--config.data.random_flip=false).
"""

from ddpm_jax.configs import named_config


def get_config():
    """CelebA-HQ's settings with more steps."""
    config = named_config("celebahq256")
    config.train.num_steps = 1_200_000
    return config
