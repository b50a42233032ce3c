"""MNIST with its classes, for classifier-free guidance.

    python main.py --config=configs/mnist_conditional.py

Not run.
"""

from ddpm_jax.configs import named_config


def get_config():
    """mnist.py, class-conditional; a column of samples for each class."""
    config = named_config("mnist")
    config.data.num_classes = 10
    config.sample.num_samples = 60
    return config
