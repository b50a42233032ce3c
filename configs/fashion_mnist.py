"""Fashion-MNIST, 28×28 gray: configs/mnist.py on another dataset. Not run.

python main.py --config=configs/fashion_mnist.py
"""

from configs import mnist


def get_config():
    """MNIST's settings."""
    config = mnist.get_config()
    config.data.name = "fashion_mnist"
    return config
