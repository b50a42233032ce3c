"""Nearest neighbours against brute force in float64, and the numbers against their definitions."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from programs import ROOT
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from ddpm_jax import configs, parallel
from ddpm_jax.files import row_files
from ddpm_jax.metrics import neighbours
from ddpm_jax.runs import evaluate, train

RNG = np.random.default_rng(0)
DIGITS = np.uint8(load_digits().data * 15).reshape(-1, 64)


def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (23, 30), np.uint8), rng.integers(0, 256, (45, 30), np.uint8)


def features():
    """Far from the origin, where float32 loses digits."""
    rng = np.random.default_rng(0)
    queries, references = rng.standard_normal((23, 30)), rng.standard_normal((45, 30))
    return np.float32(queries + 100), np.float32(references + 100)


def near_duplicates():
    """More than there are candidates, whose squared distances are far below the rounding errors of
    |q|² + |r|² - 2 q · r."""
    rng = np.random.default_rng(0)
    queries = np.float32(rng.standard_normal((3, 30)) + 100)
    copies = queries[rng.integers(0, 3, 90)]
    return queries, np.float32(copies + rng.standard_normal((90, 30)) * 1e-3)


def near_zero():
    """Zeros, with which blocks are filled, would be nearer than all references."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 2, (5, 30), np.uint8), rng.integers(9, 256, (45, 30), np.uint8)


def duplicates():
    """More equal references than there are candidates: the first ones count. They are far from the
    other queries, so that these have nearer ones."""
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 100, (7, 30), np.uint8)
    queries[0] += 150
    return queries, np.concatenate([np.tile(queries[:1], (40, 1)), queries, queries])


def check(queries, references, k):
    expected = cdist(np.float64(queries), np.float64(references))
    order = np.argsort(expected, axis=1, kind="stable")[:, :k]
    found, numbers = neighbours.nearest(queries, row_files.in_memory(references), k)
    assert found.dtype == np.float64 and found.shape == numbers.shape == (len(queries), k)
    least = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_allclose(found, least, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(numbers, order)


@pytest.mark.parametrize("rows", [8, neighbours.MAX_ROWS])
@pytest.mark.parametrize("case", [pixels, features, near_duplicates, near_zero, duplicates])
def test_nearest_is_brute_force(case, rows, monkeypatch):
    """With numbers of queries and references that are no multiple of a block."""
    monkeypatch.setattr(neighbours, "MAX_ROWS", rows)
    queries, references = case()
    check(queries, references, 5)


@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_few_references(count):
    queries, references = pixels()
    check(queries[:3], references[:count], min(count, 3))


def test_nearest_on_one_device():
    code = "import test_neighbours as t, jax; assert jax.device_count() == 1;"
    code += "[t.check(*case(), 5) for case in (t.features, t.near_duplicates, t.duplicates)]"
    command = [sys.executable, "-c", code]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run(command, env=environment, check=True)


def test_only_what_rounding_leaves_open_is_searched_in_float64(monkeypatch):
    asked = []
    scan = neighbours._scan
    monkeypatch.setattr(
        neighbours, "_scan", lambda queries, *args: asked.append(queries) or scan(queries, *args)
    )
    check(*pixels(), 5)
    assert not asked
    queries, references = duplicates()
    check(queries, references, 5)
    np.testing.assert_array_equal(asked, [queries[:1]])


def test_errors_of_float32_are_within_their_bound():
    """Of rows as long as features, with all references as candidates."""
    for scale, shift in ((1, 0), (1, 3), (1e-3, 3)):
        x, y = (np.float32(RNG.standard_normal((4, n, 2048)) * scale + shift) for n in (2, 45))
        found = neighbours._no_candidates((4, 2), 45)
        found = parallel.gather(neighbours._merge(x, found, y[0], 0, 44))
        exact = cdist(np.float64(x.reshape(8, 2048)), np.float64(y[0]), "sqeuclidean")
        errors = np.abs(found.squares - np.take_along_axis(exact, found.numbers, axis=1)).max(
            axis=1
        )
        bounds = [neighbours.rounding_bound(q, found.norm.max()) for q in x.reshape(8, 2048)]
        assert (errors > 1e-5 * np.array(bounds)).all() and (errors <= bounds).all()


def test_memory_does_not_depend_on_the_references(monkeypatch):
    """Rows are asked for in blocks; candidates are a few more than k."""
    monkeypatch.setattr(neighbours, "MAX_ROWS", 64)
    asked = []

    def read(numbers):
        asked.append(len(numbers))
        return DIGITS[numbers]

    neighbours.nearest(DIGITS[:100] + 1, row_files.Rows(len(DIGITS), read), 5)
    assert max(asked) == 64


def test_closer_than_held_out_by_the_definition():
    """Pairs are counted; the error is that of the bootstrap."""
    samples, held_out = RNG.integers(0, 20, 60), RNG.integers(4, 30, 45)
    pairs = [(s < h) + (s == h) / 2 for s in samples for h in held_out]
    found = neighbours.closer_than_held_out(samples, held_out)
    assert found.value == pytest.approx(np.mean(pairs))
    repeated = [
        neighbours.closer_than_held_out(RNG.choice(samples, 60), RNG.choice(held_out, 45)).value
        for _ in range(2000)
    ]
    assert found.error == pytest.approx(np.std(repeated), rel=0.1)  # 2000 give 1.6 %
    assert neighbours.closer_than_held_out(np.zeros(5), np.ones(5)) == (1, 0)


def test_closer_to_train_by_all_splits_of_the_same_images():
    """Six images are split in all 20 ways; nine samples, four of which have the same neighbour."""
    images = RNG.standard_normal((6, 2))
    samples = np.concatenate([images[[0, 0, 0, 0]] + 0.01, RNG.standard_normal((5, 2))])
    values, errors = [], []
    for chosen in itertools.combinations(range(6), 3):
        others = [i for i in range(6) if i not in chosen]
        found = []
        for part in (list(chosen), others):
            d = cdist(samples, images[part])
            found += [d.min(axis=1), d.argmin(axis=1)]
        estimate = neighbours.closer_to_train(neighbours.Pair(*found), 3)
        values.append(estimate.value)
        errors.append(estimate.error)
        assert estimate.value == np.mean(found[0] < found[2])
    assert np.mean(values) == pytest.approx(0.5)
    np.testing.assert_allclose(errors, np.std(values))


def test_ratios_by_hand():
    train, held_out = np.array([0, 0.0, 1, 2, 3]), np.array([0, 1.0, 1, 1, 1])
    zeros = np.zeros(5, int)
    pair = neighbours.Pair(train, zeros, held_out, zeros)
    np.testing.assert_allclose(neighbours.ratio_deciles(pair), [0, 0, 1, 1, 1, 1, 2, 2, 3])
    assert neighbours.closer_to_train(pair, 1).value == 0.4  # one is closer, two are equal
    # Three of ten samples are held-out images.
    pair = neighbours.Pair(np.ones(10), np.zeros(10, int), np.repeat([1.0, 0], [7, 3]), zeros)
    np.testing.assert_array_equal(neighbours.ratio_deciles(pair), [1] * 7 + [np.inf] * 2)


def test_samples_that_are_all_images_once():
    """Each of 2n images is the nearest of one sample: 0.5 for every split, so the error is 0."""
    for n in range(2, 60):
        near, far, each = np.zeros(n), np.ones(n), np.arange(n)
        distances = np.append(near, far), np.append(far, near)
        pair = neighbours.Pair(distances[0], np.tile(each, 2), distances[1], np.tile(each, 2))
        assert neighbours.closer_to_train(pair, n) == (0.5, pytest.approx(0, abs=1e-7))


def scores_of(samples, train, held_out):
    """Both shares, for samples against training and held-out images."""
    size = min(len(train), len(held_out))
    sets = (samples, train), (held_out, train), (samples, train[:size]), (samples, held_out[:size])
    found = [neighbours.nearest(x, row_files.in_memory(y), 1) for x, y in sets]
    d_samples, d_held_out, *pair = [(d[:, 0], n[:, 0]) for d, n in found]
    return (
        neighbours.closer_than_held_out(d_samples[0], d_held_out[0]),
        neighbours.closer_to_train(neighbours.Pair(*pair[0], *pair[1]), size),
    )


def test_real_images_are_not_detected_and_copies_are():
    """The digits in three random parts; one is the samples of a perfect model. 24 seeds."""
    off = []
    for seed in range(24):
        order = np.random.default_rng(seed).permutation(len(DIGITS))
        samples, train, held_out = np.split(DIGITS[order], [300, 1400])
        off.append([(v.value - 0.5) / v.error for v in scores_of(samples, train, held_out)])
    off = np.array(off)
    assert np.abs(off).max() < 3
    assert (np.abs(off.mean(axis=0)) < 3 / np.sqrt(24)).all()
    assert ((off.std(axis=0) > 0.6) & (off.std(axis=0) < 1.5)).all()

    noise = np.random.default_rng(1).integers(-10, 11, samples.shape)
    copies = np.uint8(np.clip(train[:300] + noise, 0, 255))
    for share in scores_of(copies, train, held_out):
        assert share.value > 0.9 and share.value - 10 * share.error > 0.5
    for share in scores_of(np.concatenate([copies[:60], samples[60:]]), train, held_out):
        assert 0.5 + 2 * share.error < share.value < 0.7  # one sample in five is a copy


@pytest.mark.slow
def test_a_network_that_learns_its_images_by_heart_is_detected(tmp_path):
    """A run of 32 digits, after 30 steps and after 500."""
    config = configs.named_config("digits")
    config.data.split = "train[:32]"
    config.model.update(channels=16, norm_groups=4)
    config.diffusion.num_timesteps = 50
    config.optim.update(warmup_steps=10, decay="constant", ema_decay=0.95)
    config.train.update(batch_size=32, num_steps=30, eval_every=1000, sample_every=1000)
    config.sample.update(batch_size=100, num_samples=4)
    config.evaluate.update(num_samples=0, bits_per_dim_images=0, nearest_images=100)
    train.train(config, tmp_path)
    early = evaluate.evaluate(config, tmp_path)
    config.train.num_steps = 500
    train.train(config, tmp_path)
    late = evaluate.evaluate(config, tmp_path)
    assert early["closer_than_held_out_pixels"] < 0.5
    off = early["closer_to_train_pixels"] - 0.5
    assert abs(off) < 3 * early["closer_to_train_pixels_error"]
    assert late["closer_than_held_out_pixels"] > 0.9 and late["closer_to_train_pixels"] > 0.9
    assert (
        late["distance_ratio_deciles_pixels"][4] < 0.5 < early["distance_ratio_deciles_pixels"][4]
    )
