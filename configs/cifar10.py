"""CIFAR-10, unconditional, as in Ho et al. 2020, Sec. 4 and App. B: 35.7 M parameters.

    python main.py --config=configs/cifar10.py

The paper reports FID 3.17 and IS 9.46 after 800k steps (10.6 hours on a TPU v3-8). Not run here.
"""

from ddpm_jax.configs import default_config


def get_config():
    """The defaults, with random flips."""
    config = default_config()
    config.data.random_flip = True
    return config
