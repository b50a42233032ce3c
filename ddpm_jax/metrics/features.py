"""Inception features of many images."""

import jax.numpy as jnp
import numpy as np

from ddpm_jax import cpu, parallel
from ddpm_jax.files import row_files
from ddpm_jax.metrics import distances, inception, neighbours


def make_extractor(params, resize, batch_size):
    """Builds a function from images to features, over all devices; it compiles once.

    Args:
      params: of the Inception network.
      resize: "tf1" or "torch", see inception.preprocess.
      batch_size: images at a time, a multiple of the number of devices.

    Returns:
      extract(images), uint8 [N, H, W, C] to float32 [N, 2048 + 2023]: the features of FID, then
      the spatial ones of sFID.
    """
    network = inception.Inception(cpu.convolve_forward)

    def features(params, images):
        pool, spatial = network.apply({"params": params}, inception.preprocess(images, resize))
        return jnp.concatenate([pool, spatial.reshape(len(spatial), -1)], axis=1)

    features = parallel.pmap(features, in_axes=(None, 0))
    params = parallel.replicate(params)

    def extract(images):
        batches = []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            padded = neighbours.padded(batch, batch_size)
            out = parallel.gather(features(params, parallel.shard(parallel.local_shard(padded))))
            batches.append(out[: len(batch)])
        return np.concatenate(batches)

    return extract


def pooled(rows):
    """The features of FID in rows of make_extractor."""
    return rows[:, : inception.FEATURES]


def spatial(rows):
    """The features of sFID in rows of make_extractor."""
    return rows[:, inception.FEATURES :]


def statistics(folder, count):
    """Of the first `count` rows in a folder, for FID and for sFID: two distances.Statistics."""
    parts = pooled, spatial
    return tuple(distances.statistics(map(f, row_files.chunks(folder, count))) for f in parts)
