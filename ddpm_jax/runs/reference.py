"""What samples are compared with: features of datasets, and classifiers of them, cached.

The name of a folder in the cache is a digest of everything that its files depend on:

  <cache_dir>/<digest>/  features of a dataset, or a classifier of it
"""

import hashlib
import logging
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import configs, parallel, signals
from ddpm_jax.errors import UserError
from ddpm_jax.files import disk, row_files
from ddpm_jax.metrics import classifier, distances, features

log = logging.getLogger(__name__)

IMAGES_PER_FILE = 1000  # of a dataset, in a file of features
MAX_HASHED = 2**31  # bytes of images; of a larger split only some images are hashed
CACHE = "evaluate.cache_dir"
FORMAT = 2  # of the cache; increment it when features or terms are computed in another way


class Reference(NamedTuple):
    """Statistics and features of a dataset's split."""

    statistics: distances.Statistics  # of the features of FID
    spatial: distances.Statistics  # of those of sFID
    features: np.ndarray  # [max_features, 2048], of its first images
    folder: pathlib.Path  # with the features of all images


def describe(section, split, source):
    """Identifies a split's images: {field: value}; of a large split, 1,000 images are hashed."""
    num_bytes = source.size * int(np.prod(section.image_size)) * section.channels
    count = source.size if num_bytes <= MAX_HASHED else min(source.size, 1000)
    hashed, digest = np.linspace(0, source.size - 1, count).astype(int), hashlib.sha256()
    for indices in np.array_split(hashed, -(-count // IMAGES_PER_FILE)):
        digest.update(source.read(indices).images.tobytes())
    return {
        "dataset": section.name,
        "split": split,
        "images": source.size,
        "images_sha256": digest.hexdigest(),
        "image_size": list(section.image_size),
        "channels": section.channels,
    }


def features_of_split(config, field, source, extract, provenance, stop=signals.never):
    """Features of a split: from the cache, or computed and cached.

    Args:
      config: its data and evaluate sections are used.
      field: "split" or "eval_split".
      source: the split's images.
      extract: from features.make_extractor.
      provenance: everything that extract depends on.
      stop: from signals.catch.

    Returns:
      A Reference.
    """
    if source.size < 2:
        raise UserError(f"data.{field}={config.data[field]!r}: holds 1 image, FID needs 2 or more")
    provenance = {**describe(config.data, config.data[field], source), **provenance}
    folder = cache_folder(config, provenance)
    name = f"features of {config.data.name} {config.data[field]}"

    def features_of_images(first, last):
        return extract(source.read(np.arange(first, last)).images)

    row_files.collect(folder, source.size, IMAGES_PER_FILE, features_of_images, name, stop)
    paths = folder / "statistics.npz", folder / "statistics_spatial.npz"
    if all(path.exists() for path in paths):
        of_both = map(_read_statistics, paths)
    else:
        of_both = features.statistics(folder, source.size)
        for path, statistics in zip(paths, of_both, strict=True):
            disk.write_npz(path, **statistics._asdict())
    first_rows = row_files.rows(folder, min(config.evaluate.max_features, source.size))
    return Reference(*of_both, features.pooled(first_rows), folder)


def _read_statistics(path):
    with np.load(path) as arrays:
        return distances.Statistics(**arrays)


def cache_folder(config, provenance):
    """The folder of what is cached for several runs, in `evaluate.cache_dir`."""
    with disk.named_errors(CACHE, _cache(config)):
        return provenance_folder(_cache(config), provenance)


def check_cache(config):
    """Raises a UserError if no results are in `evaluate.cache_dir` and none can be written there.

    Call it before slow computations. Results in a folder that cannot be written can be read.
    """
    cache = _cache(config)
    if not any(cache.glob("*/provenance.json")):
        disk.check_writable(cache, CACHE)


def _cache(config):
    return pathlib.Path(configs.at_home(CACHE, config.evaluate.cache_dir or "~/.cache/ddpm_jax"))


def digest_of(params):
    """sha256 of parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def provenance_folder(parent, provenance):
    """The folder of results with this provenance, which is written to provenance.json in it."""
    provenance = {"format": FORMAT, **provenance}
    text = disk.to_json(provenance, indent=2, sort_keys=True) + "\n"
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "provenance.json").exists():
        with disk.atomic_write(folder / "provenance.json") as path:
            path.write_text(text)
    return folder


class Classifier(NamedTuple):
    """A small classifier of a dataset, and the statistics of the dataset's features."""

    layer: classifier.Layer
    statistics: distances.Statistics


def cached_classifier(config, source, labelled):
    """The classifier of a dataset: from the cache, or trained and cached.

    Args:
      config: its data and evaluate sections are used.
      source: the training images.
      labelled: the training and the held-out images, with labels.

    Returns:
      A Classifier.
    """
    of_train = first_images(labelled[0])
    described = describe(config.data, config.data.split, source)
    labels_sha256 = hashlib.sha256(of_train.labels.astype(np.int64).tobytes()).hexdigest()
    provenance = {**described, "labels_sha256": labels_sha256, **classifier.PROVENANCE}
    folder = cache_folder(config, provenance)
    paths = folder / "classifier.npz", folder / "statistics.npz"

    def is_cached():
        return all(path.exists() for path in paths)

    if parallel.broadcast_from_first(not is_cached()):
        with disk.lock(folder, "rows", waits=True):
            if parallel.is_first() and not is_cached():
                text = "training a small classifier of %s for the scores, once for this dataset"
                log.info(text, config.data.name)
                held_out = first_images(labelled[1])
                trained = classifier.train(*of_train)
                x = classifier.pixels(held_out.images)
                accuracy = trained.score(x, held_out.labels)
                log.info("it classifies %.1f %% of the held-out images correctly", 100 * accuracy)
                layer = classifier.hidden_layer(trained)
                statistics = classifier.statistics(layer, source)
                disk.write_npz(paths[0], **layer._asdict(), accuracy=accuracy)
                disk.write_npz(paths[1], **statistics._asdict())
        parallel.barrier()
    disk.wait_for_files(is_cached, folder)
    with np.load(paths[0]) as arrays:
        layer = classifier.Layer(arrays["kernel"], arrays["bias"])
    return Classifier(layer, _read_statistics(paths[1]))


def first_images(source):
    """The images of a source that a classifier is trained or tested on: a data.Batch."""
    return source.read(np.arange(min(source.size, classifier.MOST_IMAGES)))
