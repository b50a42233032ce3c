"""Evaluation of a run, end to end, with random Inception weights."""

import json
import pathlib

import imageio.v3 as imageio
import jax
import numpy as np
import pytest

from ddpm_jax import cli, configs
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint
from ddpm_jax.files import workdir as run_files
from ddpm_jax.metrics import inception
from ddpm_jax.runs import evaluate

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


@pytest.fixture
def run(config, tmp_path):
    """A run that was not trained: (its folder, its config)."""
    config.data.split, config.data.eval_split = "train[:12]", "train[1790:]"
    config.evaluate.update(num_samples=6, bits_per_dim_images=5, max_features=10)
    config.evaluate.cache_dir = str(tmp_path / "cache")
    model = configs.make_model(config)
    x = np.zeros((1, *configs.image_shape(config)), np.float32)
    params = model.init(jax.random.key(0), x, np.zeros(1, int))["params"]
    workdir = tmp_path / "run"
    checkpoint.save_imported(workdir, params)
    run_files.save_config(config, workdir)
    return workdir, config


def rows(folder):
    return sorted(pathlib.Path(folder).glob("*/rows_*.npy"))


def test_evaluate_end_to_end(run, random_inception, capsys, caplog):
    workdir, config = run
    cli.run(["main.py", "--mode=evaluate", f"--workdir={workdir}"])
    found = json.loads((workdir / "evaluation.json").read_text())
    assert set(NAMES) <= found.keys()
    assert "covariance is singular" in caplog.text
    printed = capsys.readouterr().out
    assert f"| fid | {found['fid']:.5g} |" in printed and "after 20 steps" in printed
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
    lost = next(path for path in times if path.name.endswith("00.npy") and width(path) == 2048)
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


def test_compare(tmp_path, capsys):
    found = {"fid": 3.5, "kid": 0.1, "kid_error": 0.01, "num_samples": 10, "resize": "tf1"}
    for name, changes in (("a", {}), ("b", {"fid": 4.5, "step": 7}), ("c", {"resize": "torch"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({**found, **changes}))
    cli.run(["main.py", "--mode=compare", f"--workdirs={tmp_path / 'a'},{tmp_path / 'b'}"])
    text = capsys.readouterr().out
    assert "| fid | 3.5 | 4.5 |" in text and "| kid | 0.1 ± 0.01 | 0.1 ± 0.01 |" in text
    with pytest.raises(UserError, match=r"fid cannot .* differs in resize tf1 / torch$"):
        evaluate.compare([tmp_path / "a", tmp_path / "c"])
    progressive = [{"steps": 2, "rate": 1.0, "rmse": 3.0}]
    for name, steps in (("a", 2), ("b", 4)):
        code = [{**progressive[0], "steps": steps}]
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"progressive": code}))
    evaluate.compare([tmp_path / "a", tmp_path / "b"])
    text = capsys.readouterr().out
    assert "after 2 steps | 1.00000, 3.00000 |  |" in text
    assert "after 4 steps |  | 1.00000, 3.00000 |" in text
    (tmp_path / "b" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        evaluate.compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match=r"--workdirs=.*: has no evaluation\.json"):
        evaluate.compare([tmp_path / "a", tmp_path / "d"])
    for workdirs in ([], ["--workdirs=a"], ["--workdirs=a,a"]):
        with pytest.raises(UserError, match="compare needs two or more"):
            cli.run(["main.py", "--mode=compare", *workdirs])


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_samples", 1),
        ("num_samples", -1),
        ("resize", "pil"),
        ("bits_per_dim_images", -1),
        ("max_features", 1),
    ],
)
def test_bad_input(run, field, value):
    workdir, _ = run
    with pytest.raises(UserError, match=rf"evaluate\.{field}={value!r}: "):
        cli.run(
            ["main.py", "--mode=evaluate", f"--workdir={workdir}",
             f"--config.evaluate.{field}={value}"]
        )  # fmt: skip
    assert sorted(p.name for p in workdir.iterdir()) == ["checkpoints", "config.json"]


def test_four_channels_are_not_for_inception(config):
    config.data.channels = 4
    configs.check(config, "sample")
    with pytest.raises(UserError, match=r"data\.channels=4: .*evaluate\.num_samples=0"):
        configs.check(config, "evaluate")


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
    configs.check_same_run(saved, config, workdir, "train")
    config.data.num_classes = 10
    with pytest.raises(UserError, match=r"data\.num_classes 0 -> 10"):
        configs.check_same_run(saved, config, workdir, "train")
