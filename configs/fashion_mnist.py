"""Fashion-MNIST, 28×28 gray: configs/mnist.py on another dataset. Not run.

python main.py --config=configs/fashion_mnist.py
"""

from configs import mnist


def get_config():
    """MNIST's settings; clothes may be mirrored."""
    config = mnist.get_config()
    config.data.update(name="fashion_mnist", random_flip=True)
    return config
