"""Image files: which files of a folder are images, and the one way in which they are decoded.

Training data, the images that are edited, and masks all pass through `decode`.
"""

import collections
import contextlib
import os
import pathlib
import struct
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ddpm_jax.errors import one_line

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels
# Formats that Pillow only recognises, or reads with the help of other programs.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# An image of more pixels is refused when its header has been read, before they are decoded.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Pillow warns of metadata that it cannot read, which we do not need.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
# What it raises for a file that is damaged, too large, or no image.
ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
SMALL_RANGE = 32  # of 256 levels; images that use fewer are probably scaled wrongly


class Files(NamedTuple):
    """What `find` found below a folder."""

    images: list[pathlib.Path]  # sorted
    left_out: str  # how many other files there are, and of which kinds; empty if none


class Check(NamedTuple):
    """What `check` learnt of an image file."""

    error: str  # why it cannot be read; empty if it can
    transparent: bool  # whether pixels are not opaque
    low: int  # the smallest and the largest level, in [0, 255]
    high: int


def extensions():
    """The suffixes of the files that Pillow reads, in lower case."""
    Image.init()
    formats = {"MPO", *Image.OPEN} - NOT_READ
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def find(folder):
    """The image files below a folder, by their suffixes; links to files and folders are followed.

    Hidden files and folders (and __MACOSX) are never images. A pipe or a device is none either: it
    would be waited for. A link to a folder that it lies in is not followed.

    Args:
      folder: a path.

    Returns:
      Files.

    Raises:
      OSError: for a folder that cannot be listed.
    """
    known, images, left_out = extensions(), [], collections.Counter()

    def visit(folder, above):
        status = os.stat(folder)
        above = above | {(status.st_dev, status.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                sort(entry, above)

    def sort(entry, above):
        path = pathlib.Path(entry.path)
        suffix = path.suffix.lower()
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            left_out["hidden"] += 1
        elif entry.is_dir():
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                left_out["a link to a folder around it"] += 1
            else:
                visit(path, above)
        elif suffix in known and (entry.is_file() or not path.exists()):  # a link to nothing
            images.append(path)
        else:
            left_out[suffix or "without a suffix"] += 1

    visit(folder, frozenset())
    kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
    more = left_out.total() - sum(count for _, count in left_out.most_common(5))
    return Files(sorted(images), kinds + (f", {more} more" if more else ""))


def decode(file, channels):
    """Decodes the first frame of an image file.

    EXIF's orientation is applied. Of 16 bits the upper 8 are kept. Transparent pixels become white,
    unless there are 4 channels.

    Args:
      file: a path or a binary file.
      channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha).

    Returns:
      A Pillow image of 8 bits a channel.

    Raises:
      ERRORS: for what is no image, is damaged, or has values of no known range.
    """
    with _opened(file) as image:
        return to_channels(_upright(image), channels)


def to_channels(image, channels):
    """A Pillow image of any mode as one of 8 bits a channel; see `decode`."""
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = _upper_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its values ({image.mode}, 32 bits) have no known range")
    if image.mode == "LAB":  # which no matrix converts
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(MODES[channels])


def reason(error):
    """Why a file cannot be read: the text of one of ERRORS."""
    text = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return "not an image that Pillow knows" if "cannot identify" in text else text


def check(path, channels):
    """Decodes an image file, a JPEG at an eighth of its size, to see whether that works.

    Args:
      path: of the file.
      channels: 1, 3 or 4.

    Returns:
      Check.
    """
    try:
        with _opened(path) as image:
            image.draft("L", (1, 1))
            image, transparent = _upright(image), False
            low, high = to_channels(image, channels).convert("L").getextrema()
            if image.has_transparency_data:
                *_, (most_transparent, _) = to_channels(image, 4).getextrema()
                transparent = most_transparent < 255
            return Check("", transparent, low, high)
    except ERRORS as error:
        return Check(reason(error), False, 255, 0)


def remarks(checks, left_out, channels):
    """What a user might not expect of image files, a text each.

    Args:
      checks: the Check of each file.
      left_out: of the Files that they are of.
      channels: to which they are decoded.
    """
    if left_out:
        yield f"left out, as they are no images: {left_out}"
    transparent = sum(check.transparent for check in checks)
    if transparent and channels != 4:
        yield f"transparent pixels become white, in {transparent} images"
    low = min((check.low for check in checks), default=0)
    high = max((check.high for check in checks), default=255)
    if 0 <= high - low < SMALL_RANGE:
        yield (
            f"the images use only the levels {low} to {high} of 255; are they files of 16 bits of "
            "which fewer are used? Scale them first"
        )


@contextlib.contextmanager
def _opened(file):
    """Opens a path or a binary file as Pillow image, whose pixels are not decoded yet.

    Pillow 13 maps a TIFF that it opens by its path into memory, and then mixes up its rows where
    EXIF says that it lies on its side. So the file is opened here.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, str | os.PathLike):
            file = stack.enter_context(open(file, "rb"))
        yield stack.enter_context(Image.open(file))


def _upright(image):
    """An opened image as EXIF says it is to be seen."""
    if image.mode == "I" and image.format == "PPM":  # which are of 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    return ImageOps.exif_transpose(image)


def _upper_bits(image):
    """A gray image of 16 bits as one of 8; a level that stands for transparency stays so."""
    levels, transparent = np.asarray(image), image.info.get("transparency")
    gray = (levels >> 8).astype(np.uint8)
    if transparent is None:
        return Image.fromarray(gray)
    alpha = np.where(levels == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([gray, alpha], axis=-1))
