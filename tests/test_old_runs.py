"""A run that an earlier version wrote, of November 2026, when attention was given by heights.

Its images and losses are what that version computed: with --config=configs/digits.py, 4 channels in
groups of 2, attention at height 4, ten classes, T = 20 up to β = 0.4; 20 steps, and 2 more.
"""

import json
import tarfile

import numpy as np
import pytest
from references import FIXTURES

from ddpm_jax import cli
from ddpm_jax.errors import UserError
from ddpm_jax.files import run_files


@pytest.fixture
def old_run(tmp_path):
    """Its folder."""
    with tarfile.open(FIXTURES / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_its_levels(old_run):
    assert "attention_resolutions" in (old_run / "config.json").read_text()
    model = run_files.saved_config(old_run).model
    assert (model.attention_down, model.attention_up) == ((1,), (1,))
    assert model.null_class and not model.scale_shift


@pytest.mark.parametrize(
    "section, field, value", [("data", "image_size", []), ("model", "channel_mults", "x")]
)
def test_what_its_levels_depend_on(old_run, section, field, value):
    fields = json.loads((old_run / "config.json").read_text())
    fields[section][field] = value
    (old_run / "config.json").write_text(json.dumps(fields))
    if value:
        with pytest.raises(UserError, match=rf"{section}\.{field}='x': must be whole numbers"):
            run_files.saved_config(old_run)
    else:
        assert run_files.saved_config(old_run).model.attention_down == ()


def test_it_samples_the_same_images(old_run):
    arguments = ["--mode=sample", f"--workdir={old_run}", "--config.sample.num_samples=10"]
    assert cli.run(["main.py", *arguments]) == 0
    ours, theirs = (
        np.load(old_run / name)["images"].astype(int)
        for name in ("samples/sample_000020_n10_seed0.npz", "expected.npz")
    )
    assert np.abs(ours - theirs).max() <= 1 and theirs.std() > 40


@pytest.mark.usefixtures("no_report")
def test_its_training_goes_on(old_run):
    changes = ("train.num_steps=22", "train.log_every=1", "train.sample_every=1000")
    arguments = [f"--workdir={old_run}", *(f"--config.{change}" for change in changes)]
    assert cli.run(["main.py", *arguments]) == 0
    rows = map(json.loads, (old_run / "metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx({21: 0.756647527217865, 22: 0.7992488145828247}, rel=1e-5)
