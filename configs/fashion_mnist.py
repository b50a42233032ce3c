"""Fashion-MNIST, 28×28 gray: configs/mnist.py on another dataset. Not run.

python main.py --config=configs/fashion_mnist.py
"""

from ddpm_jax.configs import named_config


def get_config():
    """MNIST's settings."""
    config = named_config("mnist")
    config.data.name = "fashion_mnist"
    return config
