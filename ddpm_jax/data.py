"""Datasets: a name to batches of uint8 images, each a function of (seed, step).

A `Source` is a split of a dataset whose images are already of the size and channels that the
config asks for. What fits in memory is read once; the rest is read at random as it is needed.
"""

import functools
import io
import logging
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tensorflow_datasets.core.download import download_manager, downloader, extractor
from tqdm.auto import tqdm

from ddpm_jax.errors import UserError, one_line

log = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's, by number of channels
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DOWNLOAD_ERRORS = (
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    extractor.ExtractError,
)
BLOCK = 1000  # images read at a time while a dataset is loaded


class Source(NamedTuple):
    """Images of one split."""

    size: int
    read: Callable[[np.ndarray], np.ndarray]  # indices [B] to a new uint8 [B, H, W, C]


class BadSplit(Exception):
    """A split that TFDS does not understand, or that the dataset does not have."""


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
        without images, or unreadable images.
    """
    opener = {"digits": _open_digits, "folder": _open_folder}.get(data.name, _open_tfds)
    try:
        source = opener(data, data[field])
    except BadSplit as error:
        raise UserError(f"data.{field}={data[field]!r}: {one_line(error)}") from None
    if source.size == 0:
        raise UserError(f"data.{field}={data[field]!r}: holds no images")
    if source.size * np.prod(data.image_size) * data.channels > data.max_ram_gib * 2**30:
        return source
    return _load(source, f"{data.name} {data[field]}")


def batches(source, *, batch_size, seed, first_step, random_flip):
    """Endless shuffled batches, read ahead by threads.

    Every image comes once an epoch; the order is another one in each epoch.

    Args:
      source: a Source.
      batch_size: images a batch, B.
      seed: decides the order and the flips.
      first_step: number of the first batch; batch s is the same wherever one starts.
      random_flip: whether to mirror each image with probability ½.

    Returns:
      An iterator over uint8 [B, H, W, C].
    """

    def read(indices, rng):
        x = source.read(indices)
        if random_flip:
            flip = rng.random(len(x)) < 0.5
            x[flip] = x[flip, :, ::-1]  # x is this batch's own copy
        return x

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
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert(MODES[data.channels])
    if image.size != (width, height):
        if data.resize == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, data.channels)


def _load(source, name):
    """Reads a whole source into memory."""
    blocks = np.array_split(np.arange(source.size), -(-source.size // BLOCK))
    array = None
    with tqdm(total=source.size, desc=f"load {name}", unit="img", leave=False) as bar:
        for block in blocks:
            images = source.read(block)
            if array is None:
                array = np.empty((source.size, *images.shape[1:]), np.uint8)
            array[block] = images
            bar.update(len(block))
    return Source(source.size, array.__getitem__)


def _open_digits(data, split):
    """scikit-learn's 1,797 digits, 8×8 gray, of 17 levels."""
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    images = np.stack([fit(Image.fromarray(x), data) for x in images])
    images = images[_select(split, len(images))]
    return Source(len(images), images.__getitem__)


def _open_folder(data, split):
    """Every image file below `data.path`; one split, "train"."""
    paths = _readable(data.path, data.skip_unreadable)
    paths = [paths[i] for i in _select(split, len(paths))]
    return _decoding_source(data, len(paths), lambda indices: [paths[i] for i in indices])


@functools.lru_cache(maxsize=1)  # both splits of a run are of one folder
def _readable(folder, skip_unreadable):
    """The images below a folder, sorted; those that do not decode are named, or left out."""
    if not folder or not pathlib.Path(folder).is_dir():
        raise UserError(f"data.path={folder!r}: is not a folder")
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"data.path={folder!r}: holds no {', '.join(sorted(EXTENSIONS))}")

    def decodes(path):
        try:
            with Image.open(path) as image:
                image.draft("L", (1, 1))  # JPEGs are read whole, but at an eighth of the size
                image.load()
                return image.mode not in ("I", "F")  # of no known range
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return False

    with ThreadPoolExecutor() as pool:
        results = pool.map(decodes, paths)
        good = [*tqdm(results, "check images", len(paths), unit="img", leave=False)]
    broken = [str(path) for path, ok in zip(paths, good, strict=True) if not ok]
    if broken:
        names = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if broken[5:] else "")
        message = f"data.path={folder!r}: {len(broken)} of {len(paths)} unreadable: {names}"
        if len(broken) == len(paths):
            raise UserError(message)
        if not skip_unreadable:
            raise UserError(f"{message}; data.skip_unreadable=true trains without them")
        log.warning("%s (skipped)", message)
    return [path for path, ok in zip(paths, good, strict=True) if ok]


def _open_tfds(data, split):
    """A TFDS dataset in array_record format, prepared first if it is not there yet."""
    data_dir = data.data_dir or None
    try:
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
    if not builder.is_prepared():
        _prepare(builder, data.name)
    # The files' bytes: decoding is the same for every dataset, and then runs in threads.
    raw = {"image": tfds.decode.SkipDecoding()}
    try:
        examples = builder.as_data_source(split=split, decoders=raw)
    except ValueError as error:
        raise BadSplit(error) from None

    def files(indices):
        return [io.BytesIO(e["image"]) for e in examples.__getitems__(indices.tolist())]

    return _decoding_source(data, len(examples), files)


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


def _decoding_source(data, size, files):
    """A Source over encoded images; files(indices) gives paths or file objects."""

    def decode(file):
        with Image.open(file) as image:
            return fit(ImageOps.exif_transpose(image), data)

    pool = ThreadPoolExecutor()
    return Source(size, lambda indices: np.stack([*pool.map(decode, files(indices))]))


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
    return np.concatenate([order[part.from_ : part.to] for part in parts])
