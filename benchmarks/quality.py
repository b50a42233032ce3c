"""Quality of samples of labelled data, as the benchmarks measure it: metrics/classifier.py."""

import csv

import numpy as np

from ddpm_jax.files import data, disk
from ddpm_jax.metrics import classifier, distances

BATCH_SIZE = 500


def labelled_sources(config):
    """The training and the held-out images of a config's data, with their labels."""
    return [data.open_labelled(config.data, field) for field in ("split", "eval_split")]


def distance_to(source, trained):
    """images → their Fréchet distance from a source's."""
    layer = classifier.hidden_layer(trained)
    reference = classifier.statistics(layer, source)

    def distance(images):
        found = distances.statistics([classifier.features(layer, images)])
        return distances.frechet_distance(reference, found)

    return distance


def measured(path, columns):
    """What the rows of a CSV file have in these columns: a set of tuples of strings."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in columns) for row in csv.DictReader(file)}


def add_rows(path, columns, rows):
    """Adds rows to a CSV file; the header, too, if it is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(([columns] if is_new else []) + rows)


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
            with disk.atomic_write(path) as part, part.open("wb") as file:
                np.save(file, sample(np.arange(first, min(first + BATCH_SIZE, count))))
        parts.append(path)
    images = np.concatenate([np.load(part) for part in parts])
    for part in parts:
        part.unlink()
    return images
