"""Features of a small classifier, for a Fréchet distance that costs next to nothing.

For small gray images, Inception's features are slow and say little. The features here are the 64
hidden units of a classifier of the dataset's own images: scikit-learn's MLPClassifier, on pixels in
[0, 1], trained on at most 10,000 of them.
"""

from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from ddpm_jax.metrics import distances

MOST_IMAGES = 10_000
FEATURES = 64
SETTINGS = dict(hidden_layer_sizes=(FEATURES,), alpha=1e-2, max_iter=1000, random_state=0)
# What the features depend on besides the images.
PROVENANCE = {
    "features": "classifier",
    "scikit-learn": version("scikit-learn"),
    "most": MOST_IMAGES,
}


class Layer(NamedTuple):
    """The hidden layer of a classifier."""

    kernel: np.ndarray  # [H · W · C, 64]
    bias: np.ndarray  # [64]


def train(images, labels):
    """Trains a classifier; returns scikit-learn's estimator.

    Args:
      images: uint8 [N, H, W, C].
      labels: [N] ints.
    """
    from sklearn.neural_network import MLPClassifier  # takes a second, and is seldom needed

    return MLPClassifier(**SETTINGS).fit(pixels(images), labels)


def hidden_layer(classifier):
    """The Layer of a trained classifier."""
    return Layer(classifier.coefs_[0], classifier.intercepts_[0])


def pixels(images):
    """uint8 [N, H, W, C] to [N, H · W · C] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def features(layer, images):
    """The hidden units: uint8 [N, H, W, C] to [N, 64]."""
    return np.maximum(pixels(images) @ layer.kernel + layer.bias, 0)


def statistics(layer, source):
    """distances.Statistics of the features of all images of a data.Source."""
    blocks = np.array_split(np.arange(source.size), -(-source.size // 1000))
    return distances.statistics(features(layer, source.read(block).images) for block in blocks)
