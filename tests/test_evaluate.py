"""Evaluation of a run, end to end, with random Inception weights."""

import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import threading

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ddpm_jax import checks, cli, configs, signals
from ddpm_jax.core import diffusion, likelihood, sampling, schedules, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, disk, row_files, run_files
from ddpm_jax.metrics import distances, features, inception, neighbours
from ddpm_jax.runs import bound, evaluate, memorisation, reference, samplers

NAMES = """
    fid fid_test kid precision recall inception_score bits_per_dim rate distortion num_samples
    split resize weights_sha256 ema sampler sampler_steps seed step
""".split()


@pytest.fixture
def random_inception(monkeypatch):
    """Weights that are not the published ones."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        inception.Inception().init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32),
    )["params"]
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32) * 1.4 / np.sqrt(np.prod(s.shape[:-1])),
        shapes,
    )
    head = rng.standard_normal((2048, 10), np.float32), np.zeros(10, np.float32)
    weights = inception.Weights(params, head, "random")
    monkeypatch.setattr(inception, "load", lambda path: weights)


def of_few_images(config, tmp_path):
    config.data.split, config.data.eval_split = "train[:12]", "train[1790:]"
    config.evaluate.update(num_samples=6, bits_per_dim_images=5, max_features=10, nearest_images=0)
    config.evaluate.cache_dir = str(tmp_path / "cache")


@pytest.fixture
def run(config, tmp_path):
    """A run that was not trained: (its folder, its config)."""
    of_few_images(config, tmp_path)
    model = configs.make_model(config)
    x = np.zeros((1, *configs.image_shape(config)), np.float32)
    params = model.init(jax.random.key(0), x, np.zeros(1, int))["params"]
    workdir = tmp_path / "run"
    checkpoint.save_imported(workdir, params)
    run_files.save_config(config, workdir)
    return workdir, config


@pytest.mark.parametrize("name, value", [("split", "nothing"), ("cache_dir", "file/cache")])
@pytest.mark.usefixtures("random_inception")
def test_what_cannot_be_used_is_found_first(run, tmp_path, monkeypatch, name, value):
    """Before any image is sampled."""
    workdir, config = run
    config.evaluate.nearest_images = 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    config.evaluate[name] = value
    with pytest.raises(UserError, match=f"evaluate.{name}='?{value}"):
        evaluate.evaluate(config, workdir)
    assert not (workdir / "evaluation").exists()


def rows(folder):
    return sorted(pathlib.Path(folder).glob("*/rows_*.npy"))


@pytest.mark.slow
def test_evaluate_end_to_end(run, random_inception, capsys, caplog, monkeypatch):
    workdir, config = run
    extractors, make = [], evaluate.features.make_extractor  # compiled once for both evaluations
    once = lambda *args: extractors or extractors.append(make(*args)) or extractors  # noqa: E731
    monkeypatch.setattr(evaluate.features, "make_extractor", lambda *args: once(*args)[0])
    cli.run(["main.py", "--mode=evaluate", f"--workdir={workdir}"])
    found = json.loads((workdir / "evaluation.json").read_text())
    assert set(NAMES) <= found.keys()
    assert "covariance is singular" in caplog.text
    printed = capsys.readouterr().out
    assert f"| fid | {found['fid']:.5g} |" in printed and "after 20 steps" in printed
    assert "published" not in printed
    assert found["fid"] > 0 and 1 <= found["inception_score"] <= 10
    assert (found["num_samples"], found["resize"], found["step"]) == (6, "tf1", 0)
    # L_T + Σ + L_0, and the table ends with all of them.
    assert found["bits_per_dim"] == pytest.approx(found["rate"] + found["distortion"])
    assert found["progressive"][-1]["rate"] == pytest.approx(found["rate"])
    assert [step["steps"] for step in found["progressive"]] == list(range(2, 21, 2))
    assert imageio.imread(workdir / "evaluation.png").shape[2] in (3, 4)
    assert imageio.imread(workdir / "evaluation_progressive.png").ndim == 2
    with np.load(workdir / "evaluation.npz") as arrays:
        assert arrays["terms_fixed_small"].shape == (20,)

    # The second time everything is there; what is missing, and what comes after a gap, is computed
    # again, to the same numbers.
    times = {path: path.stat().st_mtime_ns for path in rows(workdir / "evaluation")}
    assert len(times) == 4  # 6 samples and 5 images, 4 at a time
    first = [path for path in times if path.name.endswith("00.npy")]
    (lost,) = (path for path in first if width(path) == 2048 + 7 * 17 * 17)
    before = np.load(lost)
    lost.unlink()
    again = evaluate.evaluate(config, workdir)
    np.testing.assert_allclose(np.load(lost), before, rtol=1e-3, atol=1e-3)
    kept = {path for path in times if path.stat().st_mtime_ns == times[path]}
    assert kept == {path for path in times if path.parent != lost.parent}
    for name in ("fid", "kid", "precision", "bits_per_dim"):
        assert again[name] == pytest.approx(found[name], rel=1e-3, abs=1e-6)


def width(path):
    return np.load(path).shape[1]


def test_other_data_is_another_evaluation(run):
    """The same name and number of images, other pixels."""
    workdir, config = run
    config.evaluate.num_samples = 0
    first = evaluate.evaluate(config, workdir)
    config.data.eval_split = "train[100:107]"
    second = evaluate.evaluate(config, workdir)
    assert second["bits_per_dim"] != first["bits_per_dim"]
    config.data.update(eval_split="train[1790:]", resize="squash")
    assert evaluate.evaluate(config, workdir)["bits_per_dim"] == first["bits_per_dim"]


def test_only_bits_per_dim(run, capsys):
    """No samples: neither Inception nor its weights are needed."""
    workdir, config = run
    config.evaluate.num_samples = 0
    found = evaluate.evaluate(config, workdir)
    assert "fid" not in found and found["bits_per_dim_images"] == 5
    config.evaluate.update(bits_per_dim_images=3, split="train[:3]")
    other = evaluate.evaluate(config, workdir)
    assert (other["bits_per_dim_split"], other["bits_per_dim_images"]) == ("train[:3]", 3)
    with np.load(workdir / "evaluation.npz") as arrays:
        for name in ("bits_per_dim", "rate", "distortion"):
            of_images = arrays[f"of_images_{name}"]
            assert len(of_images) == 3 and of_images.mean() == pytest.approx(other[name], rel=1e-12)
    config.data.split = "train[:3]"
    three = data.open_source(config.data).read(np.arange(3)).images
    assert other["bits_per_dim_sha256"] == hashlib.sha256(three.tobytes()).hexdigest()


WEIGHTS = np.random.default_rng(3).standard_normal((64, 4 + 3))
DRAWN = np.random.default_rng(2).integers(0, 128, (3, 12, 8, 8, 1), np.uint8)


def linear(images):
    """Features that take no time: four of FID and three of sFID."""
    return np.float32(images.reshape(len(images), 64) / 255 @ WEIGHTS)


@pytest.fixture
def idle(config, tmp_path, monkeypatch):
    """A run whose network does nothing: (its folder, its config, {use_ema: parameters})."""
    of_few_images(config, tmp_path)
    trees = {ema: [np.zeros(2), np.full(2, float(ema))] for ema in (True, False)}

    def restore_params(config, workdir):
        return 0, trees[config.sample.use_ema]

    monkeypatch.setattr(checkpoint, "restore_params", restore_params)
    run_files.save_config(config, tmp_path / "run")
    return tmp_path / "run", config, trees


@pytest.fixture
def asked(monkeypatch):
    """Sample i of a seed is DRAWN[seed, i], and features are linear: a list of the options of each
    sampler."""
    asked = []

    def make_sampler(config, **options):
        asked.append(options)
        return lambda params, i, seed, **_: samplers.Generated(DRAWN[seed, i], None, None)

    monkeypatch.setattr(inception, "FEATURES", 4)
    monkeypatch.setattr(inception, "load", lambda path: inception.Weights({}, None, "linear"))
    monkeypatch.setattr(features, "make_extractor", lambda *_: linear)
    monkeypatch.setattr(samplers, "make_sampler", make_sampler)
    return asked


def brute_force(a, b):
    """The Fréchet distance; tr (C_a C_b)^½ is the nuclear norm of the product of the centred sets,
    divided by √((n - 1) (m - 1))."""
    a, b = np.float64(a), np.float64(b)
    product = (a - a.mean(0)) @ (b - b.mean(0)).T
    trace = np.linalg.norm(product, "nuc") / np.sqrt((len(a) - 1) * (len(b) - 1))
    variances = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + variances - 2 * trace


@pytest.mark.usefixtures("asked")
def test_scores_are_of_the_images_that_they_name(idle):
    """Ten samples in batches of 4, against both splits; the first 7 for what is not FID."""
    workdir, config, _ = idle
    config.evaluate.update(num_samples=10, bits_per_dim_images=0, max_features=7)
    found = evaluate.evaluate(config, workdir)
    sources = [data.open_source(config.data, field) for field in ("split", "eval_split")]
    splits = [source.read(np.arange(source.size)).images for source in sources]
    for name, images in zip(("split_sha256", "eval_split_sha256"), splits, strict=True):
        assert found[name] == hashlib.sha256(images.tobytes()).hexdigest()
    all_rows = [linear(images) for images in (*splits, DRAWN[0, :10])]
    for name, part in (("fid", slice(0, 4)), ("sfid", slice(4, 7))):
        train, test, fakes = (x[:, part] for x in all_rows)
        assert found[name] == pytest.approx(brute_force(train, fakes), rel=1e-6)
        assert found[f"{name}_test"] == pytest.approx(brute_force(test, fakes), rel=1e-6)
    train, test, fakes = (x[:, :4] for x in all_rows)
    assert found["kid"] == pytest.approx(distances.kernel_distance(train[:7], fakes[:7]).value)
    expected = distances.precision_recall(train[:7], fakes[:7])
    assert (found["precision"], found["recall"]) == expected and expected[0] != expected[1]
    assert found["scored_features"] == [7, 7]


@pytest.mark.usefixtures("asked")
def test_scores_of_several_seeds(idle, capsys):
    """Their mean and standard deviation, by hand from those of each seed alone."""
    workdir, config, _ = idle
    config.evaluate.update(num_samples=10, bits_per_dim_images=0)
    alone = []
    for seed in (0, 1, 2):
        config.sample.seed = seed
        alone.append(evaluate.evaluate(config, workdir))
    shutil.rmtree(workdir / "evaluation")
    config.sample.seed = 0
    config.evaluate.num_seeds = 3
    found = evaluate.evaluate(config, workdir)
    for name in ("fid", "fid_test", "sfid", "sfid_test", "kid", "precision", "recall"):
        a, b, c = (one[name] for one in alone)
        mean = (a + b + c) / 3
        spread = (((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) ** 0.5
        assert found[name] == pytest.approx(mean, rel=1e-9), name
        assert found[f"{name}_spread"] == pytest.approx(spread, rel=1e-6, abs=1e-12), name
        assert [one[name] for one in found["per_seed"]] == [a, b, c]
    assert len({one["fid"] for one in alone}) == 3
    assert (found["seed"], found["num_seeds"], found["num_samples"]) == (0, 3, 10)
    assert len(list((workdir / "evaluation").iterdir())) == 3
    shown = f"| fid | {found['fid']:.5g} ± {found['fid_spread']:.2g} (3 seeds) |"
    printed = capsys.readouterr().out
    assert shown in printed and "spread by 1 to 2 %" in printed and "per_seed" not in printed


def test_what_is_left_of_several_seeds_is_computed(idle, asked, monkeypatch):
    """The features of finished batches are read; bits/dim are computed once."""
    workdir, config, _ = idle
    vlbs = []
    monkeypatch.setattr(bound, "bits_per_dim", lambda *_: vlbs.append(1) or {})
    monkeypatch.setattr(evaluate, "draw_progressive", lambda *_: None)
    config.evaluate.update(num_samples=6, num_seeds=3)
    whole = evaluate.evaluate(config, workdir)
    assert vlbs == [1]
    lost = [path for path in rows(workdir / "evaluation") if path.name.endswith("4.npy")]
    lost[0].unlink()
    drawn, make = [], samplers.make_sampler

    def counting(config, **options):
        sample = make(config, **options)
        return lambda params, i, seed, **rest: drawn.append(i[0]) or sample(params, i, seed)

    monkeypatch.setattr(samplers, "make_sampler", counting)
    assert evaluate.evaluate(config, workdir) == whole
    assert drawn == [4] and len(lost) == 3


def empty_checkpoints(workdir, steps):
    """Complete ones, by the names of their files."""
    for step in steps:
        for item in ("params", "ema_params", "opt_state"):
            for name in ("_METADATA", "manifest.ocdbt", "d/array"):
                path = workdir / "checkpoints" / str(step) / item / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def test_scores_against_steps(idle, asked, monkeypatch, capsys):
    """Each as if it was evaluated alone; what is there is not computed again."""
    workdir, config, _ = idle
    empty_checkpoints(workdir, (2, 5, 7))

    def restore_params(config, workdir):
        step = checkpoint.chosen_step(config, workdir)
        return step, [np.full(2, step)]

    monkeypatch.setattr(checkpoint, "restore_params", restore_params)
    config.evaluate.update(num_samples=6, bits_per_dim_images=0)
    alone = []
    for step in ("2", "7"):
        config.sample.checkpoint = step
        alone.append(evaluate.evaluate(config, workdir))
    (workdir / "evaluation.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in rows(workdir / "evaluation")}
    config.evaluate.steps = (7, 2)
    capsys.readouterr()
    found = evaluate.evaluate(config, workdir)
    assert [one.pop("images_seen") for one in found] == [2 * 8, 7 * 8]
    assert found == alone
    assert {path: path.stat().st_mtime_ns for path in rows(workdir / "evaluation")} == times
    assert len(asked) == 3  # one for both steps
    assert not (workdir / "evaluation.json").exists()
    saved = json.loads((workdir / "evaluation_steps.json").read_text())
    assert [one["fid"] for one in saved] == [one["fid"] for one in alone]
    assert imageio.imread(workdir / "evaluation_steps.png").shape[2] in (3, 4)
    row = f"| 7 | 56 | {alone[1]['fid']:.5g} | {alone[1]['fid_test']:.5g} |"
    assert row in capsys.readouterr().out
    config.evaluate.steps = (2, 3)
    with pytest.raises(UserError, match=r"evaluate.steps=\(2, 3\): step 3 .*are 2, 5, 7$"):
        evaluate.evaluate(config, workdir)
    (workdir / "checkpoints" / "2" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"\(2, 3\): step 2 is damaged: params/_METADATA is m"):
        evaluate.evaluate(config, workdir)


@pytest.mark.usefixtures("asked")
def test_the_published_curve_stands_beside_the_paper_s_model(idle, monkeypatch, capsys):
    workdir, config, _ = idle
    empty_checkpoints(workdir, (46_800,))
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: (46_800, [np.zeros(2)]))
    config.evaluate.update(num_samples=6, steps=(46_800,))
    config.train.batch_size = 128
    (alone,) = evaluate.evaluate(config, workdir)
    assert "9.162" not in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "is_papers", lambda config: True)
    evaluate.evaluate(config, workdir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" | published FID |") and lines[2].endswith(" | 9.162 |")
    assert lines[2].startswith(f"| 46800 | 5990400 | {alone['fid']:.5g} |")
    assert lines[3].startswith("| 93600 |  |") and lines[6].endswith(" | 3.188 |")
    config.train.batch_size = 64  # other images at the same step
    evaluate.evaluate(config, workdir)
    assert "9.162" not in capsys.readouterr().out


@pytest.mark.parametrize("mirrored", [False, True])
def test_nearest_images_by_brute_force(idle, asked, monkeypatch, mirrored):
    """Seven of ten samples against seven images of each split, in pixels and in features."""
    workdir, config, _ = idle
    config.data.update(split="train[:7]", random_flip=mirrored)
    config.evaluate.update(num_samples=10, nearest_images=7, bits_per_dim_images=0)
    pictures = []
    as_rgb = memorisation.images.to_rgb
    recorded = lambda x: pictures.append(x) or as_rgb(x)  # noqa: E731
    monkeypatch.setattr(memorisation.images, "to_rgb", recorded)
    found = evaluate.evaluate(config, workdir)
    assert len(asked) == 1
    sources = [data.open_source(config.data, field) for field in ("split", "eval_split")]
    train, test = (np.float64(source.read(np.arange(7)).images) for source in sources)
    samples = np.float64(DRAWN[0, :7])
    for space in ("pixels", "features"):
        both = [
            np.concatenate([x, x[:, :, ::-1]]) if mirrored and space == "pixels" else x
            for x in (train, test)
        ]
        view = {
            "pixels": lambda x: x.reshape(len(x), 64) / 8,
            "features": lambda x: linear(x)[:, :4],
        }[space]
        to_train, to_test = (cdist(view(samples), view(x)) for x in both)
        of_test = cdist(view(test), view(both[0])).min(axis=1)
        nearest = to_train.min(axis=1)
        expected = {
            "closer_than_held_out": np.mean(nearest[:, None] < of_test),
            "closer_to_train": np.mean(nearest < to_test.min(axis=1)),
            "distance_ratio_deciles": np.quantile(
                nearest / to_test.min(axis=1), np.arange(1, 10) / 10, method="inverted_cdf"
            ).round(4),
        }
        for name, value in expected.items():
            assert found[f"{name}_{space}"] == pytest.approx(value), name
        suffix = {"pixels": "", "features": "_features"}[space]
        with np.load(workdir / f"evaluation_neighbours{suffix}.npz") as arrays:
            np.testing.assert_allclose(arrays["distances"], np.sort(to_train)[:, :5], rtol=1e-6)
            np.testing.assert_array_equal(arrays["numbers"], np.argsort(to_train)[:, :5])
        # In the picture: first that sample which is much nearer than a held-out image is to it.
        first = np.argmin(nearest / to_test.min(axis=1))
        row, pictures[:] = pictures[:6], pictures[42:]
        np.testing.assert_array_equal(
            row, [samples[first], *both[0][np.argsort(to_train[first])[:5]]]
        )
        assert imageio.imread(workdir / f"evaluation_neighbours{suffix}.png").shape[2] in (3, 4)
    assert not pictures
    assert found["nearest_images"] == found["nearest_of_images"] == 7
    config.evaluate.nearest_images = 0
    without = evaluate.evaluate(config, workdir.parent / "other")
    assert without["fid"] == found["fid"]  # of all ten samples


def test_nearest_images_resume(idle, asked, monkeypatch):
    """No sample is drawn twice, and no finished search is repeated."""
    workdir, config, _ = idle
    config.evaluate.update(num_samples=0, nearest_images=6, bits_per_dim_images=0)
    drawn, searched = [], []
    make, search = samplers.make_sampler, neighbours.nearest

    def make_sampler(*args, **options):
        sample = make(*args, **options)
        return lambda params, i, seed, **_: drawn.append(i[0]) or sample(params, i, seed)

    def nearest(queries, *args):
        searched.append(len(queries))
        if len(searched) == 3:
            raise KeyboardInterrupt
        return search(queries, *args)

    monkeypatch.setattr(samplers, "make_sampler", make_sampler)
    monkeypatch.setattr(neighbours, "nearest", nearest)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config, workdir)
    assert drawn == [0, 4] and searched == [6, 6, 6]
    found = evaluate.evaluate(config, workdir)
    assert drawn == [0, 4] and searched == [6, 6, 6, 6, 6]  # the third again, and the fourth
    assert evaluate.evaluate(config, workdir) == found and len(searched) == 5
    config.evaluate.num_samples = 9  # the first four samples are there; 4 to 7 are not all
    again = evaluate.evaluate(config, workdir)
    assert again["closer_to_train_pixels"] == found["closer_to_train_pixels"]
    assert drawn == [0, 4, 4, 8]
    config.data.split = "train[20:32]"  # other training images, the same samples
    config.evaluate.num_samples = 0
    other = evaluate.evaluate(config, workdir)["distance_ratio_deciles_pixels"]
    assert other != found["distance_ratio_deciles_pixels"] and drawn == [0, 4, 4, 8]


@pytest.mark.parametrize("mirrored", [False, True])
def test_ratios_are_of_equally_many_images_of_both_splits(tmp_path, mirrored):
    """Twelve training images, seven held-out ones."""
    rng = np.random.default_rng(0)
    samples, train, held_out = (rng.integers(0, 256, (n, 8, 8, 1), np.uint8) for n in (5, 12, 7))
    splits = []
    for x in (train, held_out):
        source = data.Source(len(x), lambda numbers, x=x: data.Batch(x[numbers], None), ())
        splits.append(memorisation.pixels(source, mirrored))
    found = memorisation.search(tmp_path, samples.reshape(5, 64), *splits, signals.never)
    rng = np.random.default_rng(memorisation.SEED)
    parts = [x[rng.permutation(len(x))[:7]] for x in (train, held_out)]
    for nearest, numbers, x in ((*found.pair[:2], parts[0]), (*found.pair[2:], parts[1])):
        x = np.concatenate([x, x[:, :, ::-1]]) if mirrored else x
        expected = cdist(np.float64(samples.reshape(5, 64)), np.float64(x.reshape(-1, 64)))
        np.testing.assert_allclose(nearest, expected.min(axis=1))
        np.testing.assert_array_equal(numbers, expected.argmin(axis=1) % 7)
    assert found.size == 7 and len(found.held_out) == 5


@pytest.mark.parametrize("field", ["split", "eval_split"])
def test_nearest_images_need_two_images(idle, field):
    workdir, config, _ = idle
    setattr(config.data, field, "train[:1]")
    config.evaluate.update(num_samples=0, nearest_images=4)
    with pytest.raises(
        UserError, match=rf"data\.{field}='train\[:1\]': holds 1 image, evaluate\.near"
    ):
        evaluate.evaluate(config, workdir)


def test_features_are_read_by_number(tmp_path):
    rows = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    row_files.collect(tmp_path, 10, 4, lambda first, last: rows[first:last], "rows")
    reader = row_files.reader(tmp_path)
    numbers = np.array([9, 0, 3, 4, 4, 8, 7])
    assert reader.count == 10
    np.testing.assert_array_equal(reader.read(numbers), rows[numbers])


def test_what_the_samples_depend_on_is_not_mixed(idle, asked):
    """Each change is another evaluation with a folder of its own, and the same one again is not."""
    workdir, config, trees = idle
    config.data.num_classes = 10
    config.evaluate.bits_per_dim_images = 0
    changes = {
        "evaluate.num_samples": 6,  # none yet
        "sample.seed": 1,
        "sample.sampler": "ddim",
        "sample.eta": 0.5,
        "sample.num_steps": 5,
        "sample.spacing": "quadratic",
        "sample.label": "3",
        "sample.guidance": 2.0,
        "sample.dynamic_threshold": 0.9,
        "sample.use_ema": False,
        "diffusion.variance": "fixed_large",
        "diffusion.clip_x0": False,
        "model.dtype": "bfloat16",
        "evaluate.resize": "torch",
        "sample.order": 3,
    }
    for count, (name, value) in enumerate(changes.items(), 1):
        config.update_from_flattened_dict({name: value})
        for _ in range(2):
            evaluate.evaluate(config, workdir)
        assert len(list((workdir / "evaluation").iterdir())) == count, name
    assert [options["label"] for options in asked[::12]] == [None, 3, 3]
    trees[False][1] += 1  # another network's last layer
    evaluate.evaluate(config, workdir)
    assert len(list((workdir / "evaluation").iterdir())) == len(changes) + 1
    cache = pathlib.Path(config.evaluate.cache_dir)
    assert len(list(cache.iterdir())) == 4  # two splits, resized in two ways


def test_evaluations_with_another_vlb_are_not_mixed(idle, monkeypatch):
    """Each of the first changes gives another VLB; the way of sampling does not."""
    workdir, config, _ = idle
    rows = np.ones((5, 1 + 3 * 20))
    monkeypatch.setattr(bound, "make_rows", lambda *_: lambda a, b: rows[a:b])
    for module, drawing in ((evaluate, "draw_progressive"), (bound, "draw")):
        monkeypatch.setattr(module, drawing, lambda *_: None)
    config.evaluate.num_samples = 0
    vlbs = {
        "evaluate.num_samples": 0,  # none yet
        "sample.seed": 1,
        "sample.use_ema": False,
        "diffusion.clip_x0": False,
        "model.dtype": "bfloat16",
        "data.eval_split": "train[1780:]",
    }
    sampling = {
        "diffusion.variance": "fixed_large",
        "sample.sampler": "ddim",
        "sample.num_steps": 5,
        "sample.eta": 0.5,
        "sample.spacing": "quadratic",
    }
    for count, (name, value) in enumerate((vlbs | sampling).items(), 1):
        config.update_from_flattened_dict({name: value})
        evaluate.evaluate(config, workdir)
        expected = min(count, len(vlbs))
        assert len(list((workdir / "evaluation").iterdir())) == expected, name


def test_bits_per_dim_by_hand(idle, monkeypatch):
    """Two images and T = 2: L_T, then L_0 and L_1 of both variances, then the errors of x0."""
    workdir, config, _ = idle
    rows = np.array([[0.5, 3, 1, 4, 2, 0.01, 0.04], [0.25, 5, 1, 7, 2, 0.03, 0.12]])
    monkeypatch.setattr(bound, "make_rows", lambda *_: lambda a, b: rows[a:b])
    monkeypatch.setattr(evaluate, "draw_progressive", lambda *_: None)
    config.diffusion.num_timesteps = 2
    config.evaluate.update(num_samples=0, bits_per_dim_images=2)
    found = evaluate.evaluate(config, workdir)
    expected = {
        "bits_per_dim_fixed_small": (5.375, 0.875),  # 4.5 and 6.25
        "rate_fixed_small": (1.375, 0.125),
        "distortion_fixed_small": (4, 1),
        "bits_per_dim_fixed_large": (7.875, 1.375),  # 6.5 and 9.25
        "bits_per_dim": (5.375, 0.875),  # for the config's variance
    }
    for name, (mean, error) in expected.items():
        assert (found[name], found[f"{name}_error"]) == pytest.approx((mean, error)), name
    steps = [(step["steps"], step["rate"], step["rmse"]) for step in found["progressive"]]
    by_hand = [(1, 0.375, 127.5 * 0.08**0.5), (2, 1.375, 127.5 * 0.02**0.5)]
    np.testing.assert_allclose(steps, by_hand)
    assert found["prior_bits_per_dim"] == 0.375


def test_the_vlb_is_of_the_clipped_network_with_labels(config, monkeypatch):
    """Five images, four at a time, against all at once."""
    config.data.num_classes = 10

    def net(x_t, t, labels=None):
        shift = 0 if labels is None else 1 + labels.reshape(-1, 1, 1, 1)
        return 0.5 * x_t + 0.1 * shift

    monkeypatch.setattr(unet, "net_fn", lambda *_: net)
    source = data.open_source(config.data, "eval_split")
    vlb_rows = bound.make_rows(config, {"w": np.zeros(1)}, source)
    found = np.concatenate([vlb_rows(0, 4), vlb_rows(4, 5)])

    images, labels = source.read(np.arange(5))
    keys = sampling.image_keys(config.sample.seed, jnp.arange(5))
    schedule = schedules.make_schedule("cosine", 20)
    predict_fn = diffusion.predictor(schedule, lambda x_t, t: net(x_t, t, labels))
    vlb = jax.jit(likelihood.vlb, static_argnums=(1, 3))(
        schedule,
        diffusion.clipped(predict_fn),
        np.float32(images) / 127.5 - 1,
        lambda t: sampling.noise(keys, t, (8, 8, 1)),
    )
    parts = [vlb.terms["fixed_small"], vlb.terms["fixed_large"], vlb.x0_mse]
    expected = np.concatenate([vlb.prior[None], *parts]).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_rows_that_another_program_computes_are_waited_for(tmp_path):
    computed = []

    def rows_of(first, last):
        computed.append((first, last))
        return np.zeros((last - first, 1))

    waiting = threading.Thread(target=row_files.collect, args=(tmp_path, 6, 4, rows_of, "wait"))
    with disk.lock(tmp_path, "rows"):
        waiting.start()
        waiting.join(0.3)
        assert not computed
        np.save(tmp_path / "rows_0000000.npy", np.ones((4, 1)))
    waiting.join()
    assert computed == [(4, 6)]
    np.testing.assert_array_equal(row_files.rows(tmp_path, 6)[:, 0], [1, 1, 1, 1, 0, 0])


def test_the_paper_s_numbers_stand_beside_its_model_only():
    assert evaluate.is_papers(configs.named_config("cifar10"))
    for name, value in (
        ("data.name", "mnist"),
        ("sample.num_steps", 100),
        ("sample.use_ema", False),
        ("evaluate.num_samples", 10_000),
        ("diffusion.schedule", "cosine"),
        ("diffusion.loss_weight", "p2"),
        ("train.timesteps", "low_discrepancy"),
        ("model.widths", (32, 64, 64, 64)),
        ("model.num_heads", 4),
        ("model.scale_shift", True),
        ("model.symmetric_padding", True),
    ):
        config = configs.named_config("cifar10")
        config.update_from_flattened_dict({name: value})
        assert not evaluate.is_papers(config), name


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_samples", 1),
        ("num_samples", -1),
        ("resize", "pil"),
        ("bits_per_dim_images", -1),
        ("nearest_images", -1),
        ("nearest_images", 1),
        ("max_features", 1),
        ("num_seeds", 0),
        ("num_seeds", 2**31),
        ("steps", (-1,)),
        ("steps", (3,)),
    ],
)
def test_bad_input(run, field, value):
    workdir, _ = run
    with pytest.raises(UserError, match=re.escape(f"evaluate.{field}={value!r}: ")):
        cli.run(
            ["main.py", "--mode=evaluate", f"--workdir={workdir}",
             f"--config.evaluate.{field}={value}"]
        )  # fmt: skip
    assert sorted(p.name for p in workdir.iterdir()) == ["checkpoints", "config.json"]


def test_seeds_and_steps_that_cannot_be(config):
    config.evaluate.update(num_samples=0, steps=(1,))
    with pytest.raises(UserError, match=r"evaluate\.steps=\(1,\): scores samples; evaluate.num_s"):
        checks.check(config, "evaluate")
    config.evaluate.update(num_samples=2, num_seeds=3)
    config.sample.seed = 2**32 - 2
    with pytest.raises(UserError, match=r"evaluate\.num_seeds=3: must be at most 2, with sample"):
        checks.check(config, "evaluate")


def test_four_channels_are_not_for_inception(config):
    config.data.channels = 4
    checks.check(config, "sample")
    with pytest.raises(UserError, match=r"data\.channels=4: .*evaluate\.num_samples=0"):
        checks.check(config, "evaluate")


def test_runs_that_are_older_than_some_fields(run):
    """They can be used and resumed, with the values that the fields had before they existed."""
    workdir, config = run
    fields = json.loads((workdir / "config.json").read_text())
    for section, name in (field.split(".") for field in configs.ADDED):
        del fields[section][name]
    del fields["evaluate"], fields["show"], fields["sample"]["sampler"]
    (workdir / "config.json").write_text(json.dumps(fields))
    command = cli.parse(["main.py", "--mode=evaluate", f"--workdir={workdir}"])
    assert command.config.evaluate.num_samples == 50_000
    assert command.config.sample.sampler == "ancestral"
    saved = run_files.load_config(workdir)
    for purpose in ("train", "use"):
        checks.check_same_run(saved, config, workdir, purpose)
    config.data.num_classes = 10
    with pytest.raises(UserError, match=r"data\.num_classes 0 -> 10"):
        checks.check_same_run(saved, config, workdir, "train")


def test_progressive_images_are_of_whole_steps(config, tmp_path, monkeypatch):
    """Heun calls the network at the steps 2, 1, 1, 0, 0: x0 is that of a step's last call."""
    config.sample.update(sampler="heun", num_steps=3)
    asked = []

    def make_sampler(config, **options):
        asked.append(options)
        raise UserError("enough")

    monkeypatch.setattr(samplers, "make_sampler", make_sampler)
    with pytest.raises(UserError, match="enough"):
        evaluate.draw_progressive(config, tmp_path, {}, {}, None)
    assert asked == [{"x0_at": {0, 2, 4}}]


def test_more_files_of_features_than_a_process_may_open(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((120, 3)).astype(np.float32)
    row_files.collect(tmp_path, 120, 2, lambda first, last: rows[first:last], "rows")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, limits[1]))
    try:
        np.testing.assert_array_equal(row_files.rows(tmp_path, 119), rows[:119])
        some, read = rng.permutation(120), row_files.reader(tmp_path)
        np.testing.assert_array_equal(read.read(some), rows[some])
        assert read.count == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_home_to_keep_features_in(config, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without a home
    with pytest.raises(UserError, match=r"evaluate.cache_dir='~.*': there is no such home"):
        reference.cache_folder(config, {})


def test_the_inception_score_is_of_the_head_without_its_bias(config, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "FEATURES", 4)
    rng = np.random.default_rng(0)
    rows, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((20, 7), (4, 3)))
    row_files.collect(tmp_path, 20, 8, lambda first, last: rows[first:last], "rows")
    config.evaluate.num_samples = 20
    parts = [distances.statistics([x]) for x in (rows[:, :4], rows[:, 4:])]
    split = reference.Reference(*parts, rows[:, :4], tmp_path)
    found = evaluate.sample_scores(config, tmp_path, split, split, (kernel, np.arange(3.0)))
    p = np.exp(rows[:, :4] @ kernel)
    p = (p / p.sum(1, keepdims=True)).reshape(10, 2, 3)  # ten splits
    expected = np.exp((p * np.log(p / p.mean(1, keepdims=True))).sum(2).mean(1))
    assert found["inception_score"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["inception_score_error"] == pytest.approx(expected.std(), rel=1e-4)
