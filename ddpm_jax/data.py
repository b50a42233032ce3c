"""Datasets: a name to batches of uint8 images and labels, each a function of (seed, step).

A `Source` is a split of a dataset whose images are already of the size and channels that the
config asks for. What fits in memory is read once; the rest is read at random as it is needed.
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

from ddpm_jax import image_files, parallel, progress
from ddpm_jax.errors import UserError, one_line, printable

log = logging.getLogger(__name__)

DOWNLOAD_ERRORS = (
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    extractor.ExtractError,
)
EMPTY = "holds no images: it is a part of {} that rounds to 0; take more, as in 'train[:1]'"
BLOCK = 1000  # images read at a time while a dataset is loaded


class Batch(NamedTuple):
    """Images, and what they show if the network is told."""

    images: np.ndarray  # uint8 [B, H, W, C]
    labels: np.ndarray | None  # int32 [B], in [0, K); None where data.num_classes is 0


class Source(NamedTuple):
    """Images of one split."""

    size: int
    read: Callable[[np.ndarray], Batch]  # indices [B] to new arrays
    label_names: tuple[str, ...]  # of each label; empty where data.num_classes is 0
    sha256: str = ""  # of what tells these images, in this order, from others


class BadSplit(Exception):
    """A split that TFDS does not understand, that the dataset does not have, or that is empty."""


def open_source(data, field="split"):
    """Opens a split of the dataset that a config describes.

    Args:
      data: the config's section.
      field: "split" or "eval_split", which says what to read as TFDS does: "train",
        "train[:90%]", "train+test".

    Returns:
      A Source, in memory if it takes at most `data.max_ram_gib`.

    Raises:
      UserError: for an unknown dataset or split, a dataset that cannot be prepared, a folder
        without images, unreadable images, or another number of classes than the config's.
    """
    opener = {"digits": _open_digits, "folder": _open_folder}.get(data.name, _open_tfds)
    try:
        source = opener(data, data[field])
    except BadSplit as error:
        raise UserError(f"data.{field}={data[field]!r}: {one_line(error)}") from None
    _check_classes(data, source)
    if source.size * np.prod(data.image_size) * data.channels > data.max_ram_gib * 2**30:
        return source
    return _load(source, f"{data.name} {data[field]}")


def batches(source, *, batch_size, seed, first_step, random_flip):
    """Endless shuffled batches, read ahead by threads; of each, this process's part.

    Every image comes once an epoch; the order is another one in each epoch.

    Args:
      source: a Source.
      batch_size: images a global batch.
      seed: decides the order and the flips.
      first_step: number of the first batch; batch s is the same wherever one starts.
      random_flip: whether to mirror each image with probability ½.

    Returns:
      An iterator over Batches.
    """

    def read(indices, rng):
        flip = parallel.part(rng.random(len(indices)) < 0.5)  # the same however many processes
        batch = source.read(parallel.part(indices))
        if random_flip:
            x = batch.images
            x[flip] = x[flip, :, ::-1]  # x is this batch's own copy
        return batch

    indices = grain.MapDataset.range(source.size).seed(seed).shuffle().repeat().batch(batch_size)
    ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(indices.random_map(read)[first_step:].to_iter_dataset(ahead))


def fit(image, data):
    """Brings one image to `data.image_size` and `data.channels`.

    Args:
      image: a PIL image.
      data: the config's section; resize = "crop" cuts the longer side to the wanted shape
        first, "squash" does not. Scaling is bicubic, antialiased.

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
    """The number of classes is the network's, too, so the config has to say it."""
    names = source.label_names
    if data.num_classes != len(names):
        has = f"{data.name} has {len(names)} classes" + (f": {', '.join(names)}" if names else "")
        raise UserError(f"data.num_classes={data.num_classes}: {has[:1000]}")


def _load(source, name):
    """Reads a whole source into memory."""
    blocks = np.array_split(np.arange(source.size), -(-source.size // BLOCK))
    whole = None
    with progress.bar(source.size, f"load {name}", "img") as bar:
        for block in blocks:
            batch = source.read(block)
            if whole is None:
                whole = jax.tree.map(
                    lambda a: np.empty((source.size, *a.shape[1:]), a.dtype), batch
                )
            for array, part in zip(*map(jax.tree.leaves, (whole, batch)), strict=True):
                array[block] = part
            bar.update(len(block))
    return source._replace(read=_reader(whole))


def _reader(whole):
    """read of a Source whose examples are one Batch in memory."""
    return lambda indices: jax.tree.map(lambda array: array[indices], whole)


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


def _open_folder(data, split):
    """Every image file below `data.path`; one split, "train". Its folders are the classes."""
    files = _readable_files(data)
    labels, names = None, ()
    if data.num_classes:
        below = [os.path.relpath(file.path, data.path).split(os.sep) for file in files]
        if alone := [f.path for f, parts in zip(files, below, strict=True) if len(parts) == 1]:
            text = f"data.path={data.path!r}: {alone[0]} is in no class's folder"
            raise UserError(f"{text} (data.num_classes={data.num_classes})")
        names = tuple(sorted({parts[0] for parts in below}))
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[parts[0]] for parts in below], np.int32)
    chosen = _select(split, len(files))
    files = [files[i] for i in chosen]
    labels = None if labels is None else labels[chosen]
    # The same files in another place are the same data.
    digest = _digest(f"{os.path.relpath(f.path, data.path)} {f.size}" for f in files)

    def examples(indices):
        paths = [files[i].path for i in indices]
        origins = (f"data.path={data.path!r}: {path}" for path in paths)
        return paths, origins, None if labels is None else labels[indices]

    return _decoding_source(data, len(files), examples, names, digest)


class File(NamedTuple):
    """An image file, and what changes when its content does."""

    path: str
    size: int  # bytes
    changed: int  # when, in nanoseconds


def _readable_files(data):
    """The image files below `data.path`, sorted, but for those that cannot be read.

    Raises:
      UserError: if there are none, or if some cannot be read and `data.skip_unreadable` is False.
    """
    folder = data.path
    if not os.path.isdir(folder):  # no error for a long name
        raise UserError(f"data.path={folder!r}: is not a folder")
    found = image_files.find(folder)
    left_out = f" (there are others: {found.left_out})" if found.left_out else ""
    if not found.images:
        raise UserError(f"data.path={folder!r}: holds no images{left_out}")
    files = tuple(map(_file, found.images))
    checks = _check_all(folder, files, found.left_out, data.channels)
    unreadable = [
        f"{file.path} ({check.error})"
        for file, check in zip(files, checks, strict=True)
        if check.error
    ]
    if unreadable:
        more = f" and {len(unreadable) - 5} more" if unreadable[5:] else ""
        names = ", ".join(unreadable[:5]) + more
        message = f"data.path={folder!r}: {len(unreadable)} of {len(files)} unreadable: {names}"
        if len(unreadable) == len(files):
            raise UserError(message)
        if not data.skip_unreadable:
            raise UserError(f"{message}; data.skip_unreadable=true trains without them")
        log.warning("%s (skipped)", printable(message))
    return [file for file, check in zip(files, checks, strict=True) if not check.error]


def _file(path):
    try:
        status = path.stat()
    except OSError:  # a link that leads nowhere
        return File(str(path), 0, 0)
    return File(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # both splits of a run are of one folder
def _check_all(folder, files, left_out, channels):
    """Checks image files, and says what a user might not expect of them."""
    with ThreadPoolExecutor() as pool, progress.bar(len(files), "check images", "img") as bar:
        checks = []
        for check in pool.map(lambda file: image_files.check(file.path, channels), files):
            checks.append(check)
            bar.update()
    for remark in image_files.remarks(checks, left_out, channels):
        log.warning("%s", printable(f"data.path={folder!r}: {remark}"))
    return checks


def _digest(texts):
    """sha256 of texts, a line each."""
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()


def _open_tfds(data, split):
    """A TFDS dataset in array_record format, prepared first if it is not there yet."""
    with parallel.first_goes_first():
        builder = _builder(data)
        if not builder.is_prepared():
            _prepare(builder, data.name)
    features, names = builder.info.features, ()
    label = features["label"] if data.num_classes and "label" in features else None
    if isinstance(label, tfds.features.ClassLabel):
        names = tuple(label.names)
    # The files' bytes: decoding is the same for every dataset, and then runs in threads.
    raw = {"image": tfds.decode.SkipDecoding()}
    splits = builder.info.splits
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        if all((part.from_ or 0) == part.to for part in parts):
            raise BadSplit(EMPTY.format(sum(splits[part.splitname].num_examples for part in parts)))
        stored = builder.as_data_source(split=split, decoders=raw)
    except ValueError as error:
        raise BadSplit(error) from None

    def examples(indices):
        try:
            found = stored.__getitems__(indices.tolist())
        except (OSError, LookupError, RuntimeError, ValueError) as error:
            text = f"{builder.data_path} cannot be read ({one_line(error)[:200]})"
            raise UserError(f"data.name={data.name!r}: {text}") from None
        labels = np.array([e["label"] for e in found], np.int32) if names else None
        origins = (f"data.name={data.name!r}: image {i} of {split}" for i in indices)
        return [io.BytesIO(e["image"]) for e in found], origins, labels

    digest = _digest([builder.info.full_name, split])
    return _decoding_source(data, len(stored), examples, names, digest)


def _builder(data):
    """TFDS's builder of a dataset of images."""
    data_dir = data.data_dir or None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot import
            builder = tfds.builder(data.name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        known = "digits, folder, or a TFDS name such as mnist, cifar10, tf_flowers, celeb_a"
        raise UserError(f"data.name={data.name!r}: unknown dataset; use {known}") from None
    except (ValueError, AssertionError, ImportError) as error:
        text = f"data.name={data.name!r}: {one_line(error)[:200]}"
        if "already set to" in text:  # TFDS's own default is tfrecord, which needs TensorFlow
            text += "; set data.data_dir to a folder in which it can be array_record"
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
    # Ten by default: without a network, 204 seconds.
    downloader.MAX_RETRIES = 2
    try:
        builder.download_and_prepare()
    except (OSError, ImportError, AssertionError, *DOWNLOAD_ERRORS) as error:
        raise UserError(
            f"data.name={name!r}: is not in {builder.data_dir} and could not be prepared "
            f"({one_line(error)[:120]}); on a machine with network, run: {command}"
        ) from None


def _decoding_source(data, size, examples, label_names, digest):
    """A Source over encoded images.

    Args:
      data: the config's section.
      size: how many there are.
      examples: indices to (paths or binary files, how errors name each, labels).
      label_names: of each label.
      digest: of which images they are.
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
    """Indices that a split spec picks from a dataset whose only split is "train".

    The order is shuffled, always the same way, so that a slice is a fair sample.
    """
    info = tfds.core.SplitInfo(name="train", shard_lengths=[size], num_bytes=0)
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute({"train": info})
    except ValueError as error:
        raise BadSplit(error) from None
    order = np.random.default_rng(0).permutation(size)
    chosen = np.concatenate([order[part.from_ : part.to] for part in parts])
    if len(chosen) == 0:
        raise BadSplit(EMPTY.format(size))
    return chosen
