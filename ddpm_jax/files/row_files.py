"""Rows that take long to compute, one for each image, in files from which a run resumes.

Rows may be features, images, distances, or terms of the bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax import parallel, progress, signals
from ddpm_jax.files.disk import atomic_write, lock, wait_for_files


class Rows(NamedTuple):
    """A matrix that is read by rows: images or features."""

    count: int
    read: Callable[[np.ndarray], np.ndarray]  # numbers [B] to rows [B, D], uint8 or float32


def in_memory(rows):
    """The Rows of an array [N, D]."""
    return Rows(len(rows), rows.__getitem__)


def collect(folder, count, size, rows_of, description, stop=signals.never):
    """Computes one row per image, in batches, and saves the rows in files.

    An interrupted run resumes after the last complete file.

    Args:
      folder: for the files, rows_<first>.npy.
      count: number of images.
      size: images at a time.
      rows_of: (first, last) to an array [last - first, …].
      description: for the progress bar.
      stop: from signals.catch.

    Raises:
      signals.Stopped: if a signal interrupts it.
    """

    def is_complete():
        return sum(_files(folder).values()) >= count

    if parallel.broadcast_from_first(is_complete()):
        wait_for_files(is_complete, folder)
        return
    with lock(folder, "rows", waits=True):  # another program may compute the same rows
        files = _files(folder)
        if parallel.is_first():
            for path in set(folder.glob("rows_*.npy")) - files.keys():
                path.unlink()  # files after a missing file
        done = parallel.broadcast_from_first(sum(files.values()))
        with progress.bar(count, description, "img", initial=min(done, count)) as bar:
            for first in range(done, count, size):
                last = min(first + size, count)
                rows, name = rows_of(first, last), f"rows_{first:07d}.npy"
                with atomic_write(folder / name) as path, open(path, "wb") as file:
                    np.save(file, rows)
                bar.update(last - first)
                if last < count:
                    signals.check(stop)
        parallel.barrier()  # all processes read the files afterwards
    wait_for_files(is_complete, folder)


def _files(folder):
    """The files of `collect` up to the first gap: {path: number of rows}.

    None stays open: there may be more than a process may open.
    """
    files, done = {}, 0
    for path in sorted(folder.glob("rows_*.npy")):
        if path.name != f"rows_{done:07d}.npy":
            break
        files[path] = len(np.load(path, mmap_mode="r"))
        done += files[path]
    return files


def chunks(folder, count, size=1000):
    """Yields the first `count` rows of `collect`, about `size` at a time."""
    block = []
    for path in _files(folder):
        block.append(np.load(path)[:count])
        count -= len(block[-1])
        if sum(map(len, block)) >= size or count == 0:
            yield np.concatenate(block)
            block = []
        if count == 0:
            break


def reader(folder, part=lambda rows: rows):
    """A part of the rows of `collect` as Rows: they are read from the files when asked for."""
    files = _files(folder)
    paths, ends = list(files), np.cumsum(list(files.values()))
    like = np.load(paths[0])[:0]

    def read(numbers):
        rows = np.empty((len(numbers), like.shape[1]), like.dtype)
        file_of = np.searchsorted(ends, numbers, side="right")
        for i in np.unique(file_of):
            here = file_of == i
            # Counted from the end of the file.
            rows[here] = np.load(paths[i], mmap_mode="r")[numbers[here] - ends[i]]
        return part(rows)

    return Rows(int(ends[-1]), read)


def rows(folder, count):
    """The first `count` rows of `collect` in one array."""
    return np.concatenate(list(chunks(folder, count)))
