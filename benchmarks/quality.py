"""Quality of samples of labelled data, as the benchmarks measure it.

The Fréchet distance between samples and the training split, on the 64 hidden units of a classifier
of its images (scikit-learn's MLPClassifier, on pixels in [0, 1], trained on at most 10,000 of
them).
"""

import numpy as np
from sklearn.neural_network import MLPClassifier

from ddpm_jax.files import data
from ddpm_jax.files import workdir as run_files
from ddpm_jax.metrics import distances

MOST_LABELLED = 10_000
BATCH_SIZE = 500


def train_classifier(batch):
    """A classifier of real images."""
    classifier = MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=0)
    return classifier.fit(pixels(batch.images), batch.labels)


def pixels(images):
    """uint8 [N, H, W, C] to [N, H W C] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def statistics(classifier, images):
    """Mean and covariance of the hidden units."""
    hidden = np.maximum(pixels(images) @ classifier.coefs_[0] + classifier.intercepts_[0], 0)
    return distances.statistics([hidden])


def labelled_sources(config):
    """The training and the held-out images of a config's data, with their labels."""
    section = config.data.copy_and_resolve_references()
    section.num_classes = section.num_classes or 10
    return [data.open_source(section, field) for field in ("split", "eval_split")]


def first_labelled(source):
    """The images that a classifier is trained on."""
    return source.read(np.arange(min(source.size, MOST_LABELLED)))


def distance_to(source, classifier):
    """images → their Fréchet distance from a source's."""
    reference = statistics(classifier, source.read(np.arange(source.size)).images)
    return lambda images: distances.frechet_distance(reference, statistics(classifier, images))


def generate_in_parts(sample, count, folder, name):
    """Generates images in batches, which are kept until all are there, to go on after a stop.

    Args:
      sample: indices → uint8 [N, H, W, C].
      count: number of images.
      folder: for the parts.
      name: of the parts; it names all that they depend on.

    Returns:
      uint8 [count, H, W, C].
    """
    parts = []
    for first in range(0, count, BATCH_SIZE):
        path = folder / f"{name}_{first}.npy"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            with run_files.atomic_write(path) as part, part.open("wb") as file:
                np.save(file, sample(np.arange(first, min(first + BATCH_SIZE, count))))
        parts.append(path)
    images = np.concatenate([np.load(part) for part in parts])
    for part in parts:
        part.unlink()
    return images
