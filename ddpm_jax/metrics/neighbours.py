"""Exact nearest neighbours, and how near generated images are to training images.

Data-copying test   Meehan, Chaudhuri & Dasgupta 2020, "A Non-Parametric Test to Detect Data-Copying
                    in Generative Models"
its standard error  DeLong, DeLong & Clarke-Pearson 1988, "Comparing the Areas under Two or More
                    Correlated Receiver Operating Characteristic Curves"
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import parallel, progress
from ddpm_jax.metrics.distances import Estimate

BLOCK_BYTES = 2**27  # of a block of rows, as float32
MAX_ROWS = 4096  # of a block
MORE = 11  # candidates beside the k nearest
ROUNDING = 2.0**-24  # unit roundoff of float32


def nearest(queries, references, k, description="nearest neighbours"):
    """The k nearest references of each query, by the Euclidean distance; exact.

    Products of matrices in float32, on all devices, find k + MORE candidates, whose distances are
    computed again from differences in float64. If a bound of the rounding errors does not exclude
    all other references, the query is compared with every reference in float64.

    Memory does not depend on N and M, apart from the arguments and the result: it holds a block of
    queries and one of references (BLOCK_BYTES each), and their distances (4 MAX_ROWS² bytes, and
    what top-k needs); each device holds all of the references' block.

    Args:
      queries: [N, D] uint8 or float32.
      references: Rows, M of the same D.
      k: at most M.
      description: for the progress bar.

    Returns:
      (distances [N, k] float64, ascending; numbers [N, k] int64 of the references). Of equal
      distances, the lower number comes first.
    """
    assert k <= references.count
    devices = jax.device_count()
    most = block_rows(queries.shape[1])
    size = min(most, -(-len(queries) // devices) * devices)
    starts = range(0, len(queries), size)
    blocks = [
        np.arange(first, min(first + most, references.count))
        for first in range(0, references.count, most)
    ]
    squares, numbers = np.empty((len(queries), k)), np.empty((len(queries), k), int)
    with progress.bar(len(starts) * len(blocks), description, "block") as bar:
        for first in starts:
            chosen = slice(first, first + size)
            found = _nearest(queries[chosen], size, references, blocks, k, bar)
            squares[chosen], numbers[chosen] = found
    return np.sqrt(squares), numbers


def block_rows(dimension):
    """Rows in a block: a multiple of the number of devices."""
    devices = jax.device_count()
    rows = min(MAX_ROWS, BLOCK_BYTES // (4 * dimension))
    return max(rows // devices, 1) * devices


def _nearest(queries, size, references, blocks, k, bar):
    """Squared distances and numbers of the k nearest, for a block of queries, padded to `size`."""
    here = parallel.shard(parallel.local_shard(padded(queries, size)))
    found = _no_candidates(here.shape[:2], min(k + MORE, references.count))
    for block in blocks:
        rows = padded(references.read(block), len(blocks[0]))
        found = _merge(here, found, rows, block[0], block[-1])
        jax.block_until_ready(found)  # otherwise blocks wait in memory
        bar.update()
    found = parallel.gather(found)
    squares, numbers = np.empty((len(queries), k)), np.empty((len(queries), k), int)
    unsure = []
    for i, query in enumerate(queries):
        candidates = np.sort(found.numbers[i])
        squares[i], numbers[i] = _exact(query, references.read(candidates), candidates, k)
        least_of_others = found.squares[i, -1] - rounding_bound(query, found.norm.max())
        if len(candidates) < references.count and least_of_others <= squares[i, -1]:
            unsure.append(i)
    if unsure:
        squares[unsure], numbers[unsure] = _scan(queries[unsure], references, blocks, k)
    return squares, numbers


def rounding_bound(query, norm):
    """The largest error of _merge's squared distances, γ (|q| + |r|)².

    A sum of D products has an error of at most D u / (1 - D u) · Σ |products| in any order of
    summation (Higham, "Accuracy and Stability of Numerical Algorithms", Sec. 3.1); it has three
    such sums, and a few more operations. `norm` is such a sum, too, hence the second power.

    Args:
      query: [D].
      norm: the largest |r|² of the references, computed in float32.
    """
    terms = (len(query) + 8) * ROUNDING
    return terms / (1 - terms) ** 2 * (np.linalg.norm(np.float64(query)) + np.sqrt(norm)) ** 2


def padded(rows, size):
    """The rows [N, …] with zeros behind them: [size, …]."""
    padding = np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, padding]) if len(padding) else rows


class Candidates(NamedTuple):
    """The nearest references of each query so far, on each device."""

    squares: np.ndarray  # [B, C] float32, squared distances, ascending
    numbers: np.ndarray  # [B, C] int32
    norm: np.ndarray  # the largest |r|² of all references so far


def _no_candidates(shape, count):
    """Candidates before the first block; shape is (devices, B)."""
    squares = np.full((*shape, count), np.inf, np.float32)
    return Candidates(squares, np.zeros(squares.shape, np.int32), np.zeros(shape[0], np.float32))


def _merge(queries, found, references, first, last):
    """Candidates among the earlier ones and a block of references.

    Args:
      queries: [B, D].
      found: Candidates.
      references: [R, D].
      first: the number of the first reference.
      last: the number of the last one; padding follows.
    """
    x, y = queries.astype(jnp.float32), references.astype(jnp.float32)
    norms = jnp.square(y).sum(axis=1)
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(x).sum(axis=1)[:, None] + norms[None] - 2 * products
    numbers = first + jnp.arange(len(y), dtype=jnp.int32)
    squares = jnp.where((numbers <= last)[None], squares, jnp.inf)
    squares = jnp.concatenate([found.squares, squares], axis=1)
    numbers = jnp.concatenate([found.numbers, jnp.tile(numbers, (len(x), 1))], axis=1)
    least, positions = jax.lax.top_k(-squares, found.squares.shape[1])
    numbers = jnp.take_along_axis(numbers, positions, axis=1)
    return Candidates(-least, numbers, jnp.maximum(found.norm, norms.max()))


_merge = parallel.pmap(_merge, in_axes=(0, 0, None, None, None))


def _exact(query, rows, numbers, k):
    """Squared distances in float64, and numbers, of the k nearest among rows with these numbers."""
    differences = np.float64(rows) - np.float64(query)
    squares = np.einsum("ij,ij->i", differences, differences)
    order = np.lexsort((numbers, squares))[:k]
    return squares[order], numbers[order]


def _scan(queries, references, blocks, k):
    """Squared distances and numbers of the k nearest, all in float64."""
    found = []
    with progress.bar(len(blocks), "in float64", "block") as bar:
        for block in blocks:
            rows = references.read(block)
            nearest_in_block = [_exact(query, rows, block, k) for query in queries]
            found.append([np.stack(arrays) for arrays in zip(*nearest_in_block, strict=True)])
            bar.update()
    squares, numbers = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((numbers, squares))[:, :k]
    return np.take_along_axis(squares, order, 1), np.take_along_axis(numbers, order, 1)


def closer_than_held_out(samples, held_out):
    """The probability that a sample is nearer to the training images than a held-out image is.

        P(d_s < d_h) + P(d_s = d_h) / 2

    with the distances d to the nearest training image: the Mann-Whitney statistic of the
    data-copying test (Meehan et al. 2020, Sec. 3). 0.5 is expected if samples and held-out images
    have the same distribution; samples that are copies give 1. Samples that are smoother than real
    images are nearer to everything, bad ones farther, which no copying causes.

    Args:
      samples: [N] distances, N above 1.
      held_out: [H] distances, H above 1.

    Returns:
      An Estimate. DeLong's standard error is the root of var(v) / N + var(w) / H, where v is, for
      each sample, the share of held-out images that it beats; w, the reverse.
    """
    not_beaten, beaten_by = _share_below(held_out, samples), _share_below(samples, held_out)
    variance = not_beaten.var(ddof=1) / len(samples) + beaten_by.var(ddof=1) / len(held_out)
    return Estimate(float(beaten_by.mean()), float(np.sqrt(variance)))


def _share_below(values, limits):
    """For each limit, the share of values below it; equal ones count half."""
    values = np.sort(values)
    sides = (np.searchsorted(values, limits, side) for side in ("left", "right"))
    return sum(sides) / (2 * len(values))


class Pair(NamedTuple):
    """The nearest image of each sample in n training images, and in n held-out images."""

    train: np.ndarray  # [N] distances
    train_numbers: np.ndarray  # [N], below n
    held_out: np.ndarray  # [N] distances
    held_out_numbers: np.ndarray  # [N], below n


def closer_to_train(pair, size):
    """The share of samples whose nearest image, of n training and n held-out ones, is of training.

    Equal distances count half. Without copying, the 2n images are one random sample that was split
    at random; then 0.5 is expected whatever the samples are.

    The error is the standard deviation over all such splits. Let w_j be the share of samples whose
    nearest of the 2n images is j. The n images of training are drawn without replacement, so the
    variance of Σ w_j [j is of training] is

        (2n Σ w_j² - 1) / (4 (2n - 1))

    It is larger than that of N coins, 1 / (4 N), if many samples have the same nearest image.

    Args:
      pair: a Pair.
      size: n.

    Returns:
      An Estimate.
    """
    of_train = (pair.train < pair.held_out) + (pair.train == pair.held_out) / 2
    counts = np.bincount(pair.train_numbers, of_train, size)
    counts = np.append(counts, np.bincount(pair.held_out_numbers, 1 - of_train, size))
    weights = np.square(counts / counts.sum()).sum()
    variance = (2 * size * weights - 1) / (4 * (2 * size - 1))
    # Rounding may make it negative where all images are the nearest of equally many samples.
    return Estimate(float(of_train.mean()), float(np.sqrt(max(variance, 0))))


def ratio_deciles(pair):
    """The deciles of d(nearest training image) / d(nearest held-out image) over the samples.

    The median is near 1 without copying; copies are near 0. A ratio of two zeros counts as 1.

    Args:
      pair: a Pair.

    Returns:
      [9] float64, from 10 % to 90 %.
    """
    both_zero = (pair.train == 0) & (pair.held_out == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(both_zero, 1, pair.train / pair.held_out)
    # Without interpolation, which fails between infinities (samples that are held-out images).
    return np.quantile(ratios, np.arange(1, 10) / 10, method="inverted_cdf")
