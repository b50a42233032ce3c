"""Whether a run copies its training images: the nearest ones of its samples, and two numbers.

evaluation_neighbours.png            the samples that are relatively nearest, in pixels
evaluation_neighbours.npz            the nearest training images of all samples
evaluation_neighbours_features.png   the same in Inception's features, as the .npz
"""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ddpm_jax.errors import UserError
from ddpm_jax.files import disk, images, row_files
from ddpm_jax.metrics import neighbours

NEAREST = 5  # training images of a sample
DRAWN = 8  # samples in the picture
SEED = 0  # of the choice of held-out images, and of as many training images


class Split(NamedTuple):
    """The images of a split, in pixels or features."""

    size: int  # images
    rows: row_files.Rows  # of the images, then perhaps of their mirror images


class Nearest(NamedTuple):
    """The nearest images of N samples, and of some held-out images."""

    distances: np.ndarray  # [N, k] to the nearest training images
    numbers: np.ndarray  # [N, k], rows of the training images
    held_out: np.ndarray  # [H] distances of held-out images to the nearest training image
    pair: neighbours.Pair  # among equally many images of both splits
    size: int  # how many


def keep_samples(config, folder, draw, train, held_out, stop):
    """The samples whose nearest images are searched; from files, or sampled and kept there.

    Args:
      config: its evaluate section is used.
      folder: for the files, a folder of the run's evaluation.
      draw: (first, last) to the samples with these numbers, uint8 [last - first, H, W, C].
      train: the Source of the training images.
      held_out: the Source of the held-out images.
      stop: from signals.catch.

    Returns:
      uint8 [N, H, W, C], the first N samples of the run. N is evaluate.nearest_images, or
      evaluate.num_samples if that is smaller and not 0.

    Raises:
      UserError: for a split of one image.
    """
    for field, source in (("split", train), ("eval_split", held_out)):
        if source.size < 2:
            text = "holds 1 image, evaluate.nearest_images needs 2 or more (or 0)"
            raise UserError(f"data.{field}={config.data[field]!r}: {text}")
    most = config.evaluate.nearest_images
    count, size = min(config.evaluate.num_samples or most, most), config.sample.batch_size
    row_files.collect(folder, count, size, draw, "samples", stop)
    return row_files.rows(folder, count)


def in_pixels(config, workdir, folder, samples, train, held_out, stop):
    """Scores of the distances between images; also writes the .png and the .npz.

    Distances are the root of the mean squared difference of two images' values, from 0 to 255. If
    training mirrors images at random, mirror images count as images of their split.

    Args:
      config: its data section is used.
      workdir: the run's folder.
      folder: for intermediate results.
      samples: uint8 [N, H, W, C].
      train: the Source of the training images.
      held_out: the Source of the held-out images.
      stop: from signals.catch.

    Returns:
      {field of evaluation.json: value}.
    """
    splits = [pixels(source, config.data.random_flip) for source in (train, held_out)]
    flat = samples.reshape(len(samples), -1)
    nearest = search(folder, flat, *splits, stop)
    root = np.sqrt(flat.shape[1])
    write(workdir, "", samples, nearest, splits[0], root)
    return {
        "nearest_images": len(samples),
        "nearest_held_out_images": len(nearest.held_out),
        "nearest_of_images": nearest.size,
        "with_mirror_images": config.data.random_flip,
        "held_out_images_in_train": int((nearest.held_out == 0).sum()),
        **scores(nearest, "pixels"),
    }


def in_features(workdir, folder, samples, rows, train_rows, held_out_rows, train, stop):
    """Scores of the distances between features; also writes the .png and the .npz.

    Args:
      workdir: the run's folder.
      folder: for intermediate results.
      samples: uint8 [N, H, W, C].
      rows: [N, D], their features.
      train_rows: the training images' features, row_files.Rows.
      held_out_rows: the held-out images' features, row_files.Rows.
      train: the Source of the training images.
      stop: from signals.catch.

    Returns:
      {field of evaluation.json: value}.
    """
    splits = [Split(rows.count, rows) for rows in (train_rows, held_out_rows)]
    nearest = search(folder, rows, *splits, stop)
    write(workdir, "_features", samples, nearest, pixels(train, mirrored=False))
    return scores(nearest, "features")


def pixels(source, mirrored):
    """The Split of a source's images, [H W C] uint8; `mirrored` adds their mirror images."""

    def read(numbers):
        x = source.read(numbers % source.size).images
        right_to_left = numbers >= source.size
        x[right_to_left] = x[right_to_left, :, ::-1]
        return x.reshape(len(x), -1)

    count = source.size * (2 if mirrored else 1)
    return Split(source.size, row_files.Rows(count, read))


def part(split, images):
    """The Split of the images with these numbers."""
    copies = split.rows.count // split.size
    chosen = np.concatenate([images + split.size * copy for copy in range(copies)])
    read = split.rows.read
    return Split(len(images), row_files.Rows(len(chosen), lambda rows: read(chosen[rows])))


def search(folder, samples, train, held_out, stop):
    """Searches the nearest images; results are kept in files, from which it resumes.

    Args:
      folder: for the files.
      samples: [N, D].
      train: Split.
      held_out: Split.
      stop: from signals.catch.

    Returns:
      Nearest.
    """
    rng, size = np.random.default_rng(SEED), min(train.size, held_out.size)
    order, held_out_order = (rng.permutation(split.size) for split in (train, held_out))
    parts = part(train, order[:size]), part(held_out, held_out_order[:size])
    others = held_out.rows.read(held_out_order[: len(samples)])

    def cached_nearest(name, queries, split, k=1):
        def rows_of(first, last):
            rows = neighbours.nearest(queries[first:last], split.rows, k, f"neighbours, {name}")
            return np.concatenate(rows, axis=1)

        block = neighbours.block_rows(queries.shape[1])
        here = folder / name.replace(" ", "_")
        row_files.collect(here, len(queries), block, rows_of, f"{name}, all", stop)
        rows = row_files.rows(here, len(queries))
        return rows[:, :k], rows[:, k:].astype(int)

    k = min(NEAREST, train.rows.count)
    distances, numbers = cached_nearest("samples in train", samples, train, k)
    d_others, _ = cached_nearest("held-out in train", others, train)
    d_train, of_train = cached_nearest("samples in part of train", samples, parts[0])
    d_held_out, of_held_out = cached_nearest("samples in held-out", samples, parts[1])
    pair = neighbours.Pair(
        d_train[:, 0], of_train[:, 0] % size, d_held_out[:, 0], of_held_out[:, 0] % size
    )
    return Nearest(distances, numbers, d_others[:, 0], pair, size)


def scores(nearest, space):
    """{field of evaluation.json: value} of distances in a space, "pixels" or "features"."""
    closer = neighbours.closer_than_held_out(nearest.distances[:, 0], nearest.held_out)
    to_train = neighbours.closer_to_train(nearest.pair, nearest.size)
    return {
        f"closer_than_held_out_{space}": closer.value,
        f"closer_than_held_out_{space}_error": closer.error,
        f"closer_to_train_{space}": to_train.value,
        f"closer_to_train_{space}_error": to_train.error,
        f"distance_ratio_deciles_{space}": neighbours.ratio_deciles(nearest.pair).round(4).tolist(),
    }


def write(workdir, suffix, samples, nearest, train, unit=1.0):
    """Writes evaluation_neighbours<suffix>.npz and .png.

    Args:
      workdir: the run's folder.
      suffix: of the names.
      samples: uint8 [N, H, W, C].
      nearest: Nearest.
      train: Split, in pixels.
      unit: that distances are divided by.
    """
    distances, numbers = nearest.distances / unit, nearest.numbers
    path = workdir / f"evaluation_neighbours{suffix}.npz"
    disk.write_npz(path, distances=distances, numbers=numbers)
    # Those that are nearest to training images for what they show: simple images are always near.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = nearest.distances[:, 0] / nearest.pair.held_out
    first = np.argsort(ratio, kind="stable")[:DRAWN]
    rows, columns = len(first), 1 + numbers.shape[1]
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, i in zip(axes, first, strict=True):
        pictures = train.rows.read(numbers[i]).reshape(-1, *samples.shape[1:])
        labels = [f"sample {i}", *(f"{distance:#.3g}" for distance in distances[i])]
        for place, picture, label in zip(row, [samples[i], *pictures], labels, strict=True):
            place.imshow(images.to_rgb(picture), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.set_xlabel(label, fontsize=9)
    images.write_figure(path.with_suffix(".png"), figure)
