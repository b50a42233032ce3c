"""Distances between two sets of features, in float64 (numpy).

FID                Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule …"
sFID               Nash et al. 2021, "Generating Images with Sparse Representations"
KID                Bińkowski et al. 2018, "Demystifying MMD GANs"
precision, recall  Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric …"
Inception Score    Salimans et al. 2016, "Improved Techniques for Training GANs"
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

INCEPTION_SPLITS = 10


class Statistics(NamedTuple):
    """Statistics of a set of features, for FID."""

    count: int
    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D], divided by count - 1


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float | None  # None if it cannot be estimated


def statistics(chunks):
    """Mean and covariance of features in chunks; its memory does not depend on their number.

    Args:
      chunks: iterable of [N, D] arrays.

    Returns:
      Statistics of all chunks.
    """
    count, mean, scatter = 0, 0.0, 0.0
    for chunk in chunks:
        chunk = np.float64(chunk)
        new = count + len(chunk)
        delta = chunk.mean(axis=0) - mean
        centred = chunk - chunk.mean(axis=0)
        between = np.outer(delta, delta) * (count * len(chunk) / new)
        scatter = scatter + centred.T @ centred + between
        mean = mean + delta * (len(chunk) / new)
        count = new
    return Statistics(count, mean, scatter / (count - 1))


def frechet_distance(a, b):
    """The Fréchet distance of two Gaussians: |μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½).

    Args:
      a: Statistics.
      b: Statistics, of the same D.

    Returns:
      A float. The trace of the root is the sum of the roots of the eigenvalues of C_a^½ C_b C_a^½.
      They are real, also if a covariance is singular.
    """
    values, vectors = scipy.linalg.eigh(a.covariance)
    root = (vectors * _roots(values)) @ vectors.T
    product = root @ b.covariance @ root
    eigenvalues = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    trace -= 2 * _roots(eigenvalues).sum()
    return float(np.sum(np.square(a.mean - b.mean)) + trace)


def _roots(eigenvalues):
    """√ of eigenvalues; 0 for those that are a rounding error of 0, whose root is much larger."""
    noise = len(eigenvalues) * np.finfo(float).eps * eigenvalues.max()
    return np.sqrt(np.where(eigenvalues > noise, eigenvalues, 0))


def kernel_distance(a, b, subsets=100, size=1000):
    """KID: the unbiased squared MMD with the kernel (x·y / D + 1)³, a mean over random subsets.

    Args:
      a: [N, D] features.
      b: [M, D] features.
      subsets: number of subsets.
      size: features per subset, drawn without replacement; at most N and M.

    Returns:
      An Estimate. For the error, the number of independent subsets is that of disjoint subsets in
      the smaller set.
    """
    smaller = min(len(a), len(b))
    rng, size = np.random.default_rng(0), min(size, smaller)
    values = []
    for _ in range(subsets):
        x, y = (np.float64(f[rng.choice(len(f), size, replace=False)]) for f in (a, b))
        xx, yy, xy = (_kernel(*pair) for pair in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    independent = min(subsets, smaller // size)
    error = np.std(values, ddof=1) / np.sqrt(independent) if independent > 1 else None
    return Estimate(float(np.mean(values)), error and float(error))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real, fake, neighbours=3, block=1000):
    """The fraction of fakes in the manifold of the real features, and the reverse.

    The manifold of a set is the union of balls around its features; the radius of a ball is the
    distance to the k-th nearest neighbour in the set.

    Args:
      real: [N, D] features.
      fake: [M, D] features.
      neighbours: k.
      block: rows of the distance matrix at a time.

    Returns:
      (precision, recall), each in [0, 1].
    """
    real, fake = np.float64(real), np.float64(fake)
    return _covered(fake, real, neighbours, block), _covered(real, fake, neighbours, block)


def _covered(points, centres, neighbours, block):
    """The fraction of points in the manifold of the centres; all distances are squared."""
    neighbours = min(neighbours, len(centres) - 1)
    norms = np.square(centres).sum(axis=1)

    def distances(x):
        return np.square(x).sum(axis=1)[:, None] + norms - 2 * x @ centres.T

    radii = np.concatenate(
        [
            # Index 0 is the centre itself.
            np.partition(distances(centres[i : i + block]), neighbours, axis=1)[:, neighbours]
            for i in range(0, len(centres), block)
        ]
    )
    inside = [
        (distances(points[i : i + block]) <= radii).any(axis=1)
        for i in range(0, len(points), block)
    ]
    return float(np.concatenate(inside).mean())


def inception_score(chunks, count, splits=INCEPTION_SPLITS):
    """exp(E[KL(p(y | x) ‖ p(y))]), averaged over splits of the samples.

    Args:
      chunks: iterable of [N, classes] arrays, log p(y | x).
      count: samples in all chunks.
      splits: number of splits, each of consecutive samples.

    Returns:
      An Estimate; its error is the standard deviation over splits, as in published scores.
    """
    splits = min(splits, count)
    marginal, negative_entropy, size = [0.0] * splits, [0.0] * splits, [0] * splits
    done = 0
    for chunk in chunks:
        split_of = (done + np.arange(len(chunk))) * splits // count
        done += len(chunk)
        for i in np.unique(split_of):
            logs = np.float64(chunk[split_of == i])
            probabilities = np.exp(logs)
            marginal[i] = marginal[i] + probabilities.sum(axis=0)
            negative_entropy[i] += (probabilities * logs).sum()
            size[i] += len(logs)
    scores = []
    for total, entropy, n in zip(marginal, negative_entropy, size, strict=True):
        p = total / n
        scores.append(np.exp(entropy / n - (p * np.log(p)).sum()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))
