"""Inception features of many images, in files from which an interrupted run resumes."""

import jax.numpy as jnp
import numpy as np

from ddpm_jax import cpu, parallel, progress, signals
from ddpm_jax.files.workdir import atomic_write, lock, wait_for_files
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


def reader(folder):
    """The rows of `collect` as neighbours.Rows: they are read from the files when asked for."""
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
        return rows

    return neighbours.Rows(int(ends[-1]), read)


def rows(folder, count):
    """The first `count` rows of `collect` in one array."""
    return np.concatenate(list(chunks(folder, count)))


def pooled(rows):
    """The features of FID in rows of make_extractor."""
    return rows[:, : inception.FEATURES]


def spatial(rows):
    """The features of sFID in rows of make_extractor."""
    return rows[:, inception.FEATURES :]


def statistics(folder, count):
    """Statistics of the first `count` rows, for FID and for sFID: two distances.Statistics."""
    return tuple(
        distances.statistics(map(part, chunks(folder, count))) for part in (pooled, spatial)
    )
