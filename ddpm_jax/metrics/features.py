"""Inception features of many images, in files that survive a kill."""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from ddpm_jax import parallel
from ddpm_jax.metrics import inception
from ddpm_jax.workdir import atomic_write

BATCH = 50  # images at a time on each device


def make_extractor(params, resize):
    """Builds images → features over all devices; it compiles once.

    Args:
      params: of the Inception network.
      resize: "tf1" or "torch", see inception.preprocess.

    Returns:
      extract(images), uint8 [N, H, W, C] to float32 [N, 2048].
    """
    network = inception.Inception()

    def features(params, images):
        return network.apply({"params": params}, inception.preprocess(images, resize))

    features = parallel.pmap(features, in_axes=(None, 0))
    params = parallel.replicate(params)
    size = BATCH * jax.local_device_count()

    def extract(images):
        parts = []
        for first in range(0, len(images), size):
            batch = images[first : first + size]
            padded = np.concatenate([batch, np.zeros_like(images[:1]).repeat(size - len(batch), 0)])
            out = parallel.merge(features(params, parallel.split(jnp.asarray(padded))))
            parts.append(np.asarray(out)[: len(batch)])
        return np.concatenate(parts)

    return extract


def collect(folder, count, size, rows_of, description):
    """Computes a row for each of many images, some at a time, and keeps them in files.

    A killed run goes on after the last whole file.

    Args:
      folder: where the files go, rows_<first>.npy.
      count: images.
      size: images at a time.
      rows_of: (first, last) to an array [last - first, …].
      description: for the progress bar.
    """
    done = sum(len(rows) for rows in chunks(folder))
    with tqdm(
        total=count, initial=min(done, count), desc=description, unit="img", leave=False
    ) as bar:
        for first in range(done, count, size):
            last = min(first + size, count)
            rows = rows_of(first, last)
            with atomic_write(folder / f"rows_{first:07d}.npy") as path, open(path, "wb") as file:
                np.save(file, rows)
            bar.update(last - first)


def chunks(folder, count=None):
    """Yields the arrays that collect has written, in order; the first `count` rows of them."""
    for path in sorted(folder.glob("rows_*.npy")):
        if count == 0:
            break
        rows = np.load(path, mmap_mode="r")[:count]
        count = count and count - len(rows)
        yield rows


def rows(folder, count):
    """The first `count` rows in one array."""
    return np.concatenate(list(chunks(folder, count)))
