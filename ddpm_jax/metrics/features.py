"""Inception features of many images, in files that survive a kill."""

import numpy as np

from ddpm_jax import parallel, progress, signals
from ddpm_jax.metrics import inception
from ddpm_jax.workdir import atomic_write, lock


def make_extractor(params, resize, batch_size):
    """Builds images → features over all devices; it compiles once.

    Args:
      params: of the Inception network.
      resize: "tf1" or "torch", see inception.preprocess.
      batch_size: images at a time, a multiple of the devices.

    Returns:
      extract(images), uint8 [N, H, W, C] to float32 [N, 2048].
    """
    network = inception.Inception()

    def features(params, images):
        return network.apply({"params": params}, inception.preprocess(images, resize))

    features = parallel.pmap(features, in_axes=(None, 0))
    params = parallel.replicate(params)

    def extract(images):
        parts = []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)
            padded = np.concatenate([batch, padding])
            out = parallel.merge(features(params, parallel.split(parallel.part(padded))))
            parts.append(out[: len(batch)])
        return np.concatenate(parts)

    return extract


def collect(folder, count, size, rows_of, description, stop=signals.never):
    """Computes a row for each of many images, some at a time, and keeps them in files.

    A killed run goes on after the last whole file.

    Args:
      folder: where the files go, rows_<first>.npy.
      count: images.
      size: images at a time.
      rows_of: (first, last) to an array [last - first, …].
      description: for the progress bar.
      stop: from signals.catch.

    Raises:
      signals.Stopped: if a signal came before the end.
    """
    if parallel.of_first(sum(map(len, _files(folder).values())) >= count):
        return
    with lock(folder, "rows", waits=True):  # it may be computing just this
        there = _files(folder)
        if parallel.is_first():
            for path in set(folder.glob("rows_*.npy")) - there.keys():
                path.unlink()  # what comes after a file that is missing
        done = parallel.of_first(sum(map(len, there.values())))
        with progress.bar(count, description, "img", initial=min(done, count)) as bar:
            for first in range(done, count, size):
                last = min(first + size, count)
                rows, name = rows_of(first, last), f"rows_{first:07d}.npy"
                with atomic_write(folder / name) as path, open(path, "wb") as file:
                    np.save(file, rows)
                bar.update(last - first)
                if last < count:
                    signals.check(stop)
        parallel.barrier()  # all of them will read the files


def _files(folder):
    """{path: rows} (mapped, not read) of what collect has written, up to the first gap."""
    found, done = {}, 0
    for path in sorted(folder.glob("rows_*.npy")):
        if path.name != f"rows_{done:07d}.npy":
            break
        found[path] = np.load(path, mmap_mode="r")
        done += len(found[path])
    return found


def chunks(folder, count, size=1000):
    """Yields the first `count` rows that collect has written, about `size` at a time."""
    block = []
    for rows in _files(folder).values():
        block.append(rows[:count])
        count -= len(block[-1])
        if sum(map(len, block)) >= size or count == 0:
            yield np.concatenate(block)
            block = []
        if count == 0:
            break


def rows(folder, count):
    """The first `count` rows in one array."""
    return np.concatenate(list(chunks(folder, count)))
