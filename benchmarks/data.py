"""Images/s of the input pipeline.

    python -m benchmarks.data

Prints the rate of `data.batches` for images in memory, for PNG and JPEG files of a folder that are
decoded on demand, and, if CIFAR-10 is prepared, for TFDS from memory and from disk.
"""

import pathlib
import tempfile
import time

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax import configs
from ddpm_jax.files import data

SECONDS = 5  # per row
BATCH_SIZE = 128


def rate(section, seconds=SECONDS):
    """Images/s, after the first two batches."""
    source = data.open_source(section)
    options = {"batch_size": BATCH_SIZE, "seed": 0, "first_step": 0, "random_flip": True}
    batches = data.batches(source, **options)
    next(batches), next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(batches).images)
    return count / (time.perf_counter() - start)


def section(**changes):
    """The data section of the default config, with changes."""
    config = configs.default_config()
    config.data.update(**changes)
    return config.data


def write_images(folder, suffix, size):
    """Writes 256 images of smoothed noise, which compress about as well as photographs."""
    rng = np.random.default_rng(0)
    for i in range(256):
        small = rng.integers(0, 255, (size // 8, size // 8, 3), np.uint8)
        image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
        image.save(pathlib.Path(folder) / f"{i}.{suffix}", quality=90)


def images_from_memory(seconds):
    """The rate for a folder of 32×32 images in memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, "png", 32)
        return rate(section(name="folder", path=folder, image_size=(32, 32)), seconds)


def main():
    """Prints one row for each kind of dataset."""
    print(f"{'images':40} {'images/s':>9}")
    for size, suffix in ((32, "png"), (256, "jpg")):
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, suffix, size)
            for ram, place in ((1.0, "memory"), (0.0, "disk")):
                fields = {"name": "folder", "path": folder, "max_ram_gib": ram}
                speed = rate(section(**fields, image_size=(size, size)))
                print(f"{f'folder, {size}x{size} {suffix}, from {place}':40} {speed:9,.0f}")
    if tfds.builder("cifar10", file_format="array_record").is_prepared():
        for ram, place in ((1.0, "memory"), (0.0, "disk")):
            speed = rate(section(name="cifar10", max_ram_gib=ram))
            print(f"{f'TFDS cifar10, from {place}':40} {speed:9,.0f}")


if __name__ == "__main__":
    main()
