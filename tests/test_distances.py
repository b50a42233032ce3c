"""FID, KID, precision, recall and Inception Score against brute force and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from ddpm_jax.metrics import distances

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((60, 12)) @ RNG.standard_normal((12, 12)) + 1
FAKE = RNG.standard_normal((45, 12)) @ RNG.standard_normal((12, 12))


def test_statistics_do_not_depend_on_the_chunks():
    for chunks in ([REAL], [REAL[:1], REAL[1:40], REAL[40:]]):
        found = distances.statistics(np.float32(chunk) for chunk in chunks)
        assert found.count == 60
        np.testing.assert_allclose(found.mean, np.float32(REAL).mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.covariance, np.cov(np.float32(REAL).T), rtol=1e-9)


def test_frechet_distance_by_the_definition():
    a, b = (distances.statistics([f]) for f in (REAL, FAKE))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2)
    expected += np.trace(a.covariance + b.covariance - 2 * root.real)
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))


def test_frechet_distance_of_independent_normals():
    """Σ (μ - ν)² + (σ - τ)², also where some deviations are 0."""
    a = distances.Statistics(9, np.full(3, 0.0), np.diag([1.0, 4.0, 0.0]))
    b = distances.Statistics(9, np.full(3, 2.0), np.diag([9.0, 0.0, 0.0]))
    assert distances.frechet_distance(a, b) == pytest.approx(12 + 4 + 4)


@pytest.mark.parametrize("count", [2, 50, 500])
def test_frechet_distance_of_few_samples_to_themselves(count):
    """0, where most eigenvalues are: the root of a rounding error of 1e-16 is 1e-8."""
    features = np.random.default_rng(0).standard_normal((count, 600))
    found = distances.statistics([features])
    assert abs(distances.frechet_distance(found, found)) < 1e-9 * np.trace(found.covariance)


def test_kernel_distance_by_the_definition():
    def kernel(x, y):
        return (np.dot(x, y) / 12 + 1) ** 3

    n, fake = len(FAKE), FAKE
    real = REAL[:n]
    xx = sum(kernel(real[i], real[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(kernel(fake[i], fake[j]) for i in range(n) for j in range(n) if i != j)
    xy = sum(kernel(x, y) for x in real for y in fake)
    expected = xx / (n * (n - 1)) + yy / (n * (n - 1)) - 2 * xy / n**2
    whole = distances.kernel_distance(real, fake, subsets=2, size=n)  # a subset is everything
    assert whole.value == pytest.approx(expected, rel=1e-6)
    assert whole.error is None  # nothing was drawn


def test_kernel_distance_and_its_error():
    """For two sets of the same distribution it is 0 within its error, in 30 repetitions."""
    rng, off = np.random.default_rng(1), []
    for _ in range(30):
        a, b = rng.standard_normal((2, 200, 4))
        found = distances.kernel_distance(a, b, subsets=40, size=20)
        off.append(found.value / found.error)
    assert abs(np.mean(off)) < 1  # their standard error is 0.18 if the error is right
    assert 0.4 < np.std(off) < 2.5


def test_kernel_distance_draws_from_all_of_both_sets():
    """D = 1: five 0s against five 0s and 45 1s, in this order.

    k(1, 1) = 8, else 1. Of two others a pair is both 1 in 45 · 44 of 50 · 49 cases, so the squared
    MMD is 1 + (1 + 7 · 45 · 44 / (50 · 49)) - 2.
    """
    few, many = np.zeros((5, 1)), np.repeat([[0.0], [1.0]], (5, 45), axis=0)
    for pair in ((few, many), (many, few)):
        found = distances.kernel_distance(*pair, subsets=400)
        assert found.value == pytest.approx(7 * 45 * 44 / (50 * 49), abs=0.5)


def test_precision_and_recall_by_the_definition():
    def covered(points, centres, k):
        found = 0
        for p in points:
            for c in centres:
                radius = sorted(np.linalg.norm(c - other) for other in centres)[k]
                if np.linalg.norm(p - c) <= radius:
                    found += 1
                    break
        return found / len(points)

    near = FAKE[:30] + 1
    for k in (1, 3):
        found = distances.precision_recall(REAL, near, neighbours=k, block=7)
        assert found == (covered(near, REAL, k), covered(REAL, near, k))
    assert distances.precision_recall(REAL, REAL) == (1, 1)
    assert distances.precision_recall(REAL, REAL + 1e3) == (0, 0)
    assert distances.precision_recall(REAL[:2], REAL[:2]) == (1, 1)  # fewer than k neighbours


def test_inception_score():
    """Certain and uniform predictions: the number of classes. Equal predictions: 1."""
    eye = np.log(np.eye(5).repeat(4, axis=0) * (1 - 1e-12) + 1e-13)
    eye = eye[np.arange(20).reshape(5, 4).T.ravel()]  # every split has each class
    for chunks in ([eye], [eye[:3], eye[3:]]):
        assert distances.inception_score(chunks, 20, 4).value == pytest.approx(5, rel=1e-6)
    same = np.log(np.tile([0.2, 0.3, 0.5], (12, 1)))
    assert distances.inception_score([same], 12) == pytest.approx((1, 0), abs=1e-9)
    by_hand = np.array([[0.9, 0.1], [0.4, 0.6]])
    kl = (by_hand * np.log(by_hand / by_hand.mean(0))).sum(1).mean()
    assert distances.inception_score([np.log(by_hand)], 2, 1).value == pytest.approx(np.exp(kl))


def test_more_subsets_of_the_same_features_know_no_more():
    """200 features have ten disjoint subsets of 20, however many are drawn."""
    a, b = np.random.default_rng(0).standard_normal((2, 200, 4))
    few, many = (distances.kernel_distance(a, b, subsets=n, size=20).error for n in (100, 400))
    assert many == pytest.approx(few, rel=0.2)
