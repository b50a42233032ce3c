"""Image files: finding them in a folder, checking and decoding them.

`decode` reads training data, inputs of the editing modes, and masks.
"""

import collections
import contextlib
import math
import os
import pathlib
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ddpm_jax.errors import one_line

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels
# Formats that Pillow cannot read, or reads only with other programs.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Larger images are refused after reading the header, before decoding.
MAX_PIXELS = 100_000_000
# Pillow's errors for a file that is damaged, too large, or not an image.
ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an error where the user makes warnings errors
)
SMALL_RANGE = 32  # of 256 levels; images with fewer are probably scaled wrongly


class Files(NamedTuple):
    """The result of `find`."""

    images: list[pathlib.Path]  # sorted
    others: str  # number and kinds of the other files; empty if there are none


class Check(NamedTuple):
    """The result of `check`."""

    error: str  # why the file cannot be read; empty if it can
    transparent: bool  # whether some pixels are not opaque
    low: int  # the smallest level, in [0, 255]
    high: int  # the largest level


def extensions():
    """The suffixes of the files that Pillow reads, in lower case."""
    Image.init()
    formats = {"MPO", *Image.OPEN} - NOT_READ
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def find(folder):
    """Finds image files below a folder by their suffixes; follows links to files and folders.

    Hidden files and folders, and __MACOSX, are skipped. So are pipes and devices, since reading
    them would block, and links to a parent folder.

    Args:
      folder: a path.

    Returns:
      Files.

    Raises:
      OSError: for a folder that cannot be listed.
    """
    suffixes, images, others = extensions(), [], collections.Counter()

    def visit(folder, parents):
        status = os.stat(folder)
        parents = parents | {(status.st_dev, status.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                add(entry, parents)

    def add(entry, parents):
        path = pathlib.Path(entry.path)
        suffix = path.suffix.lower()
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            others["hidden"] += 1
        elif entry.is_dir():
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in parents:
                others["link to a parent folder"] += 1
            else:
                visit(path, parents)
        elif suffix in suffixes and (entry.is_file() or not path.exists()):  # also broken links
            images.append(path)
        else:
            others[suffix or "without a suffix"] += 1

    visit(folder, frozenset())
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    more = others.total() - sum(count for _, count in others.most_common(5))
    return Files(sorted(images), kinds + (f", {more} more" if more else ""))


def decode(file, channels):
    """Decodes the first frame of an image file.

    The EXIF orientation is applied. Of 16 bits, the upper 8 are used. Transparent pixels become
    white, unless there are 4 channels.

    Args:
      file: a path or a binary file.
      channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha).

    Returns:
      A Pillow image with 8 bits per channel.

    Raises:
      ERRORS: if the file is not an image, is damaged, or has values of an unknown range.
    """
    with _opened(file) as image:
        return to_channels(_upright(image), channels)


def to_channels(image, channels):
    """Converts a Pillow image of any mode to 8 bits per channel; see `decode`."""
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = _upper_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its values ({image.mode}, 32 bits) have no known range")
    if image.mode == "LAB":  # needs a profile; `convert` cannot do it
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(MODES[channels])


def reason(error):
    """The text of one of ERRORS: why a file cannot be read."""
    text = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return "not an image format that Pillow reads" if "cannot identify" in text else text


def check(path, channels):
    """Checks that an image file can be decoded; of a JPEG, only at an eighth of its size.

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


def warnings_of(checks, others, channels):
    """Yields warnings about a folder's image files.

    Args:
      checks: the Check of each file.
      others: of Files.
      channels: of the decoded images.
    """
    if others:
        yield f"skipped files that are not images: {others}"
    transparent = sum(check.transparent for check in checks)
    if transparent and channels != 4:
        yield f"transparent pixels become white, in {transparent} images"
    low = min((check.low for check in checks), default=0)
    high = max((check.high for check in checks), default=255)
    if 0 <= high - low < SMALL_RANGE:
        yield (
            f"the images use only the levels {low} to {high} of 255. If they are files of 16 bits "
            "that use fewer bits, scale them first"
        )


@contextlib.contextmanager
def _opened(file):
    """Opens a path or a binary file as a Pillow image, without decoding its pixels.

    The file is opened here, not by Pillow: Pillow 13 memory-maps a TIFF that it opens by its path,
    and then reads rows in the wrong order if the EXIF orientation is a quarter turn.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, str | os.PathLike):
            file = stack.enter_context(open(file, "rb"))
        image = stack.enter_context(Image.open(file))
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS} pixels")
        yield image


def _upright(image):
    """An opened image with its EXIF orientation applied."""
    if image.mode == "I" and image.format == "PPM":  # these have 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    return ImageOps.exif_transpose(image)


def _upper_bits(image):
    """Converts a gray image of 16 bits to 8 bits; keeps a transparent level transparent."""
    levels, transparent = np.asarray(image), image.info.get("transparency")
    gray = (levels >> 8).astype(np.uint8)
    if transparent is None:
        return Image.fromarray(gray)
    alpha = np.where(levels == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([gray, alpha], axis=-1))
