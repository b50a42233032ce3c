"""Datasets: from a name to batches of uint8 images and labels, each a function of (seed, step).

A `Source` is a split of a dataset; its images have the config's size and channels. Small datasets
are read into memory once, large ones by random access.
"""

import contextlib
import functools
import hashlib
import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tensorflow_datasets.core.download import download_manager, downloader, extractor

from ddpm_jax import parallel, progress
from ddpm_jax.errors import UserError, listed, one_line, printable
from ddpm_jax.files import image_files

log = logging.getLogger(__name__)

DOWNLOAD_ERRORS = (
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    extractor.ExtractError,
)
EMPTY = "holds no images: this fraction of {} rounds to 0; use a larger one, as 'train[:1]'"
BLOCK = 1000  # images read at a time while a dataset is loaded


class Batch(NamedTuple):
    """Images, and their labels if the network is conditional."""

    images: np.ndarray  # uint8 [B, H, W, C]
    labels: np.ndarray | None  # int32 [B], in [0, K); None where data.num_classes is 0


class Source(NamedTuple):
    """Images of one split."""

    size: int
    read: Callable[[np.ndarray], Batch]  # indices [B] to new arrays
    label_names: tuple[str, ...]  # of each label; empty where data.num_classes is 0
    sha256: str = ""  # identifies these images, in this order


class BadSplit(Exception):
    """A split that TFDS cannot parse, that the dataset does not have, or that is empty."""


def open_source(data, field="split", arrays=None, in_memory=True):
    """Opens a split of the dataset that a config describes.

    Args:
      data: the config's section.
      field: "split" or "eval_split", a field of `data` in TFDS's notation: "train", "train[:90%]",
        "train+test".
      arrays: a Batch of all images, for data.name = "arrays"; its only split is "train".
      in_memory: whether to read the split into memory if it takes at most `data.max_ram_gib`.

    Returns:
      A Source.

    Raises:
      UserError: for an unknown dataset or split, a dataset that cannot be prepared, a folder
        without images, unreadable images, or a number of classes that is not the config's.
    """
    source = _open(data, field, arrays)
    _check_classes(data, source)
    num_bytes = source.size * np.prod(data.image_size) * data.channels
    if not in_memory or num_bytes > data.max_ram_gib * 2**30:
        return source
    return _load(source, f"{data.name} {data[field]}")


def open_labelled(data, field="split", arrays=None):
    """Opens a split with its labels, which an unconditional model does not need; see open_source.

    The Source has no label_names if there are no labels: a folder's are not taken for classes
    unless the config does.
    """
    section = data.copy_and_resolve_references()
    if data.name not in ("folder", "arrays"):
        section.num_classes = section.num_classes or 1  # any number: they are read
    return _open(section, field, arrays)


def _open(data, field, arrays):
    openers = {"digits": _open_digits, "folder": _open_folder}
    openers["arrays"] = functools.partial(_open_arrays, arrays)
    opener = openers.get(data.name, _open_tfds)
    try:
        return opener(data, data[field])
    except BadSplit as error:
        raise UserError(f"data.{field}={data[field]!r}: {one_line(error)}") from None


def batches(source, *, batch_size, seed, first_step, random_flip):
    """Endless shuffled batches, prefetched by threads; this process's shard of each global batch.

    Every image occurs once per epoch; each epoch has another order.

    Args:
      source: a Source.
      batch_size: images per global batch.
      seed: of the order and the flips.
      first_step: number of the first batch; batch s does not depend on it.
      random_flip: whether to mirror each image with probability ½.

    Returns:
      An iterator over Batches.
    """

    def read(indices, rng):
        batch = source.read(parallel.local_shard(indices))
        if random_flip:  # drawn for the global batch, whatever the number of processes
            flip = parallel.local_shard(rng.random(len(indices)) < 0.5)
            batch.images[flip] = batch.images[flip, :, ::-1]  # they are this batch's own copy
        return batch

    indices = grain.MapDataset.range(source.size).seed(seed).shuffle().repeat().batch(batch_size)
    ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(indices.random_map(read)[first_step:].to_iter_dataset(ahead))


def fit(image, data):
    """Converts one image to `data.image_size` and `data.channels`.

    Args:
      image: a PIL image.
      data: the config's section; resize = "crop" first crops the longer side to the aspect ratio,
        "squash" does not. Scaling is bicubic and antialiased.

    Returns:
      uint8 [H, W, C].
    """
    height, width = data.image_size
    image = image_files.to_channels(image, data.channels)
    if image.size != (width, height):
        if data.resize == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, data.channels)


def _check_classes(data, source):
    """Raises a UserError unless the config has the dataset's number of classes."""
    names = source.label_names
    if data.num_classes != len(names):
        has = f"{data.name} has {len(names)} classes" + (f": {', '.join(names)}" if names else "")
        raise UserError(f"data.num_classes={data.num_classes}: {has[:1000]}")


def _load(source, name):
    """Reads a whole source into memory."""
    blocks = np.array_split(np.arange(source.size), -(-source.size // BLOCK))
    examples = None
    with progress.bar(source.size, f"load {name}", "img") as bar:
        for block in blocks:
            batch = source.read(block)
            if examples is None:
                examples = jax.tree.map(
                    lambda a: np.empty((source.size, *a.shape[1:]), a.dtype), batch
                )
            for array, rows in zip(*map(jax.tree.leaves, (examples, batch)), strict=True):
                array[block] = rows
            bar.update(len(block))
    return source._replace(read=_reader(examples))


def _reader(examples):
    """`read` of a Source whose examples are a Batch in memory."""
    return lambda indices: jax.tree.map(lambda array: array[indices], examples)


def _open_digits(data, split):
    """scikit-learn's 1,797 digits, 8×8 gray, of 17 levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([fit(Image.fromarray(x), data) for x in images])
    chosen = _select(split, len(images))
    labels = digits.target[chosen].astype(np.int32) if data.num_classes else None
    names = tuple(map(str, digits.target_names)) if data.num_classes else ()
    return Source(len(chosen), _reader(Batch(images[chosen], labels)), names, _digest([split]))


def _open_arrays(arrays, data, split):
    """Arrays of a user's program, see ddpm_jax.train."""
    if arrays is None:
        text = "its images are arrays of a program, which must pass them to ddpm_jax.train again"
        raise UserError(f"data.name='arrays': {text}")
    chosen = _select(split, len(arrays.images))
    examples = jax.tree.map(lambda array: array[chosen], arrays)
    names = tuple(map(str, range(data.num_classes)))
    digest = hashlib.sha256()
    for array in jax.tree.leaves(examples):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Source(len(chosen), _reader(examples), names, digest.hexdigest())


def _open_folder(data, split):
    """All image files below `data.path`; one split, "train". The classes are its subfolders."""
    files = _readable_files(data)
    labels, names = None, ()
    if data.num_classes:
        below = [os.path.relpath(file.path, data.path).split(os.sep) for file in files]
        if loose := [f.path for f, parts in zip(files, below, strict=True) if len(parts) == 1]:
            text = f"data.path={data.path!r}: {loose[0]} is not in the folder of a class"
            raise UserError(f"{text} (data.num_classes={data.num_classes})")
        names = tuple(sorted({parts[0] for parts in below}))
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[parts[0]] for parts in below], np.int32)
    chosen = _select(split, len(files))
    files = [files[i] for i in chosen]
    labels = None if labels is None else labels[chosen]
    # The digest has relative paths: the folder may be moved.
    digest = _digest(f"{os.path.relpath(f.path, data.path)} {f.size}" for f in files)

    def examples(indices):
        paths = [files[i].path for i in indices]
        origins = (f"data.path={data.path!r}: {path}" for path in paths)
        return paths, origins, None if labels is None else labels[indices]

    return _decoding_source(data, len(files), examples, names, digest)


class File(NamedTuple):
    """An image file; its size and time tell whether it has changed."""

    path: str
    size: int  # bytes
    changed: int  # time of the last change, nanoseconds


def _readable_files(data):
    """The readable image files below `data.path`, sorted.

    Raises:
      UserError: if there are none, or if some are unreadable and `data.skip_unreadable` is False.
    """
    folder = data.path
    if not os.path.isdir(folder):  # no error for a long name
        raise UserError(f"data.path={folder!r}: is not a folder")
    paths, others = image_files.find(folder)
    if not paths:
        text = f" (other files: {others})" if others else ""
        raise UserError(f"data.path={folder!r}: holds no images{text}")
    files = tuple(map(_file, paths))
    checks = _check_all(folder, files, others, data.channels)
    unreadable = [
        f"{file.path} ({check.error})"
        for file, check in zip(files, checks, strict=True)
        if check.error
    ]
    if unreadable:
        counts = f"{len(unreadable)} of {len(files)} unreadable"
        message = f"data.path={folder!r}: {counts}: {listed(unreadable)}"
        if len(unreadable) == len(files):
            raise UserError(message)
        if not data.skip_unreadable:
            raise UserError(f"{message}; data.skip_unreadable=true trains without them")
        _warn_once(f"{message} (skipped)")
    return [file for file, check in zip(files, checks, strict=True) if not check.error]


def _file(path):
    try:
        status = path.stat()
    except OSError:  # a broken link
        return File(str(path), 0, 0)
    return File(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # not again for the other split of the same folder
def _warn_once(text):
    log.warning("%s", printable(text))


@functools.lru_cache(maxsize=1)  # the two splits of a run have the same folder
def _check_all(folder, files, others, channels):
    """Checks image files, and logs warnings about them."""
    with ThreadPoolExecutor() as pool, progress.bar(len(files), "check images", "img") as bar:
        checks = []
        for check in pool.map(lambda file: image_files.check(file.path, channels), files):
            checks.append(check)
            bar.update()
    for warning in image_files.warnings_of(checks, others, channels):
        log.warning("%s", printable(f"data.path={folder!r}: {warning}"))
    return checks


def _digest(texts):
    """sha256 of texts, one per line."""
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()


def _open_tfds(data, split):
    """A TFDS dataset in array_record format, prepared first if necessary."""
    with parallel.first_process_first():
        builder = _builder(data)
        if not builder.is_prepared():
            _prepare(builder, data.name)
    features, names = builder.info.features, ()
    label = features["label"] if data.num_classes and "label" in features else None
    if isinstance(label, tfds.features.ClassLabel):
        names = tuple(label.names)
    # Read the encoded images: threads decode them, in the same way for all datasets.
    raw = {"image": tfds.decode.SkipDecoding()}
    splits = builder.info.splits
    try:
        slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        if all((s.from_ or 0) == s.to for s in slices):
            raise BadSplit(EMPTY.format(sum(splits[s.splitname].num_examples for s in slices)))
        stored = builder.as_data_source(split=split, decoders=raw)
    except ValueError as error:
        raise BadSplit(error) from None

    def examples(indices):
        try:
            rows = stored.__getitems__(indices.tolist())
        except (OSError, LookupError, RuntimeError, ValueError) as error:
            text = f"{builder.data_path} cannot be read ({one_line(error)[:200]})"
            raise UserError(f"data.name={data.name!r}: {text}") from None
        labels = np.array([row["label"] for row in rows], np.int32) if names else None
        origins = [f"data.name={data.name!r}: image {i} of {split}" for i in indices]
        if names and (labels < 0).any():  # TFDS's label of an image without one is -1
            i, allowed = np.argmax(labels < 0), "choose another split, or data.num_classes=0"
            raise UserError(f"{origins[i]}: has the label {labels[i]}, no class; {allowed}")
        return [io.BytesIO(row["image"]) for row in rows], origins, labels

    digest = _digest([builder.info.full_name, split])
    return _decoding_source(data, len(stored), examples, names, digest)


def _builder(data):
    """TFDS's builder of an image dataset."""
    data_dir = data.data_dir or None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its import errors
            builder = tfds.builder(data.name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        names = "digits, folder, or a TFDS name such as mnist, cifar10, tf_flowers, celeb_a"
        raise UserError(f"data.name={data.name!r}: unknown dataset; use {names}") from None
    except (ValueError, AssertionError, ImportError) as error:
        text = f"data.name={data.name!r}: {one_line(error)[:200]}"
        if "already set to" in text:  # TFDS's default is tfrecord, which needs TensorFlow
            text += "; set data.data_dir to another folder, for a copy in array_record format"
        raise UserError(text) from None
    features = builder.info.features
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"data.name={data.name!r}: its examples have no 'image'")
    return builder


def _prepare(builder, name):
    """Downloads and writes a TFDS dataset (this needs TensorFlow; reading does not)."""
    data_dir = builder.data_path.parent.parent
    command = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
    log.info("preparing %s in %s (once)", name, builder.data_dir)
    # The default, 10, takes 204 seconds without a network.
    downloader.MAX_RETRIES = 2
    try:
        builder.download_and_prepare()
    except (OSError, ImportError, AssertionError, *DOWNLOAD_ERRORS) as error:
        raise UserError(
            f"data.name={name!r}: is not in {builder.data_dir} and could not be prepared "
            f"({one_line(error)[:300]}); on a machine with network, run: {command}"
        ) from None


def _decoding_source(data, size, examples, label_names, digest):
    """A Source over encoded images.

    Args:
      data: the config's section.
      size: number of images.
      examples: indices to (paths or binary files, names for errors, labels).
      label_names: of each label.
      digest: Source.sha256.
    """

    def decode(file, origin):
        try:
            return fit(image_files.decode(file, data.channels), data)
        except image_files.ERRORS as error:
            text = f"{origin} cannot be read ({image_files.reason(error)})"
            raise UserError(text) from None

    pool = ThreadPoolExecutor()

    def read(indices):
        files, origins, labels = examples(indices)
        return Batch(np.stack([*pool.map(decode, files, origins)]), labels)

    return Source(size, read, label_names, digest)


def _select(spec, size):
    """The indices of a split in a dataset whose only split is "train".

    They are shuffled with a fixed seed, so that a slice is a random sample.
    """
    info = tfds.core.SplitInfo(name="train", shard_lengths=[size], num_bytes=0)
    try:
        slices = tfds.core.ReadInstruction.from_spec(spec).to_absolute({"train": info})
    except ValueError as error:
        raise BadSplit(error) from None
    order = np.random.default_rng(0).permutation(size)
    chosen = np.concatenate([order[s.from_ : s.to] for s in slices])
    if len(chosen) == 0:
        raise BadSplit(EMPTY.format(size))
    return chosen
