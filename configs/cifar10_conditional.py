"""CIFAR-10 with its classes, for classifier-free guidance (Ho & Salimans 2022).

    python main.py --config=configs/cifar10_conditional.py

Not run.
"""

from ddpm_jax.configs import named_config


def get_config():
    """cifar10.py, class-conditional; a column of samples for each class."""
    config = named_config("cifar10")
    config.data.num_classes = 10
    config.sample.num_samples = 60
    return config
