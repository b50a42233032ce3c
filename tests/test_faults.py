"""Faults during a run: damaged files, full disks, non-finite numbers."""

import json
import logging
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import DIGITS, ROOT, TINY, finish, start

from ddpm_jax import cli
from ddpm_jax.core import diffusion
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, disk
from ddpm_jax.runs import generate, interop, train

pytestmark = pytest.mark.usefixtures("no_report")


def params_of(config, workdir):
    step, params = checkpoint.restore_params(config, workdir)
    return step, jax.tree.map(np.array, params)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Damaged files.


TRAINED = []  # once for all tests


@pytest.fixture
def run(config, tmp_path, tmp_path_factory):
    """A finished run of 4 steps with checkpoints of steps 2 and 4."""
    config.train.update(checkpoint_every=2, keep_checkpoints=5)
    if not TRAINED:
        TRAINED.append(tmp_path_factory.mktemp("trained") / "run")
        train.train(config, TRAINED[0])
    return pathlib.Path(shutil.copytree(TRAINED[0], tmp_path / "run"))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest_file(folder / "opt_state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder):
    largest_file(folder / "ema_params").unlink()


def flip(folder):
    """Flips bits in the middle of the parameters' values, which Orbax does not detect."""
    path = largest_file(folder / "params" / "ocdbt.process_0" / "d")
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3):
        content[place] ^= 1 << place % 8
    path.write_bytes(content)


def unlist(folder):
    """A file is missing that sha256.json does not name, as after a save that was not finished."""
    digests = json.loads((folder / "sha256.json").read_text())
    del digests["ema_params/manifest.ocdbt"]
    (folder / "sha256.json").write_text(json.dumps(digests))
    (folder / "ema_params" / "manifest.ocdbt").unlink()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "damage", [*(pytest.param(d, marks=slow) for d in (truncate, delete, unlist)), flip]
)
def test_a_damaged_checkpoint_is_passed_over(config, run, caplog, damage):
    """The steps after the previous checkpoint are repeated, with the same result, bit for bit."""
    _, before = params_of(config, run)
    damage(run / "checkpoints" / "4")
    files = {p: p.stat().st_size for p in (run / "checkpoints" / "4").rglob("*") if p.is_file()}
    assert params_of(config, run)[0] == 2
    assert "the checkpoint of step 4 is damaged" in caplog.text
    caplog.clear()
    config.sample.checkpoint = "2"
    assert params_of(config, run)[0] == 2 and "damaged" not in caplog.text
    config.train.num_steps = 6
    config.sample.checkpoint = "newest"
    assert train.train(config, run) == 0
    assert "the checkpoint of step 4 is damaged" in caplog.text
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"2", "4", "6"}
    (aside,) = (run / "checkpoints").glob("4.damaged.*")  # nothing was deleted
    kept = {p: (aside / p.relative_to(run / "checkpoints" / "4")).stat().st_size for p in files}
    assert kept == files
    shutil.rmtree(run / "checkpoints" / "6")
    step, after = params_of(config, run)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("needed", ["_METADATA", "manifest.ocdbt", "d"])
@pytest.mark.parametrize("item", ["params", "ema_params", "opt_state"])
def test_what_orbax_needs_counts_as_damage_where_no_digest_tells(run, caplog, item, needed):
    """Runs of older versions have no digests."""
    for step in (run / "checkpoints").iterdir():
        (step / "sha256.json").unlink()
    folder = run / "checkpoints"
    assert checkpoint._newest_undamaged(folder) == 4
    path = folder / "4" / item / needed
    path.rename(run / needed)
    assert checkpoint._newest_undamaged(folder) == 2
    assert f"the checkpoint of step 4 is damaged: {item}/{needed} is missing" in caplog.text


def test_only_damaged_checkpoints(config, run):
    for step in ("2", "4"):
        delete(run / "checkpoints" / step)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    for use in (lambda: train.train(config, run), lambda: checkpoint.restore_params(config, run)):
        with pytest.raises(UserError, match="all checkpoints are damaged"):
            use()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_random_damage_is_never_read(config, run):
    """For any damage of a file: it is detected, or the parameters are those that were saved."""
    whole = {step: params_of(config, run) for step in (4,)}
    (run / "checkpoints" / "2").rename(run / "2")
    _, two = params_of_step(config, run, "2")
    saved, rng, noticed = run.parent / "saved", random.Random(0), 0
    shutil.copytree(run / "checkpoints", saved)
    for _ in range(40):
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(saved, run / "checkpoints")
        shutil.copytree(run / "2", run / "checkpoints" / "2")
        files = sorted(p for p in (run / "checkpoints" / "4").rglob("*") if p.is_file())
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        step, found = params_of(config, run)
        noticed += step == 2
        jax.tree.map(np.testing.assert_array_equal, found, two if step == 2 else whole[4][1])
    assert noticed > 30


def params_of_step(config, run, name):
    """Those of a checkpoint that has been moved out of the way."""
    other = run.parent / "other"
    (other / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / name, other / "checkpoints" / name)
    return params_of(config, other)


# Paths that libraries misread.


STRANGE = "lr[1e-4] *?#%20 {ö}"


def test_a_path_with_brackets_is_no_pattern(config, run, tmp_path):
    """One run that has stopped on the way, and one that was moved there: the same in the end."""
    path = tmp_path / "[2026] project" / STRANGE
    config.train.num_steps = 2
    train.train(config, path)
    (path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # of a process that was killed
    moved = run.rename(tmp_path / "moved [1]")
    config.train.num_steps = 5
    for workdir in (path, moved):
        train.train(config, workdir)
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"2", "4", "5"}
    for ema in (True, False):
        config.sample.use_ema = ema
        (step, there), (_, expected) = params_of(config, path), params_of(config, moved)
        assert step == 5
        jax.tree.map(np.testing.assert_array_equal, there, expected)
    generate.sample(config, path)
    assert len(list((path / "samples").glob("sample_000005*.npz"))) == 1


def test_a_save_that_orbax_does_not_finish_stops_the_run(config, tmp_path, monkeypatch):
    """As Orbax alone does in such a path; what it has written gets neither digests nor a name."""
    monkeypatch.delattr(checkpoint.LiteralPath, "glob")
    with pytest.raises(Exception, match=r"did not finish .*params/manifest\.ocdbt is missing"):
        train.train(config, tmp_path / "[1]")
    assert checkpoint.latest_step(tmp_path / "[1]") is None


@pytest.mark.parametrize("path", ["a\\b", "logs:/run", "/s3/run"])
def test_a_path_that_orbax_takes_for_another_is_refused(config, tmp_path, path):
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda workdir: train.train(config, workdir),
        lambda workdir: interop.import_run(config, "nowhere", workdir),
        lambda workdir: checkpoint.restore_params(config, workdir),
    ):
        with pytest.raises(UserError, match=r"^workdir=.*; allowed are paths without .*hf$"):
            use(tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


def test_half_a_line_of_metrics_is_mended(config, run):
    path = run / "metrics.jsonl"
    whole = path.read_text().splitlines()
    path.write_bytes(path.read_bytes()[:-9] + b"\xff\xfe\x00")
    config.train.num_steps = 5
    train.train(config, run)
    now = path.read_text().splitlines()
    assert now[: len(whole) - 1] == whole[:-1]
    assert [json.loads(line)["step"] for line in now][-2:] == [5, 5]


# Two programs in one folder.


def test_a_second_program_is_refused(tmp_path):
    """By a lock that is gone with its process, however that ends."""
    run, lock = tmp_path / "run", tmp_path / "run" / ".train.lock"
    arguments = [DIGITS, *TINY, f"--workdir={run}", "--config.train.num_steps=1000000"]
    process = start(*arguments, cwd=tmp_path)
    try:
        while not (lock.exists() and lock.read_text()):
            assert process.poll() is None
        with pytest.raises(
            UserError, match=rf"in use by another program \(train\); process {process.pid} on"
        ):
            cli.run(["main.py", *arguments, "--config.train.num_steps=1"])  # ends in any case
    finally:
        process.kill()
        process.communicate()
    with disk.lock(run, "train"):
        assert lock.read_text().split()[0] == str(os.getpid())
        with disk.lock(run, "rows"):
            pass


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk):
    """Seen before a checkpoint is written, which the others survive."""
    run = small_disk / "run"
    arguments = [DIGITS, *TINY, f"--workdir={run}", "--config.train.checkpoint_every=2"]
    keep = ["--config.train.keep_checkpoints=100", "--config.train.sample_every=1000"]
    code, text = finish(*arguments, *keep, "--config.train.num_steps=100", cwd=small_disk)
    assert code == 2 and "no space left on the disk; a checkpoint takes" in text, text
    assert "Traceback" not in text
    saved = checkpoint.latest_step(run)
    assert text.splitlines()[-1].endswith(f"step {saved} is saved")
    code, text = finish("--mode=sample", f"--workdir={run}", cwd=small_disk)
    assert code == 0 and f"of step {saved}" in text, text


# The command line on a disk that seems to have room.
BLIND = "from ddpm_jax import cli; from ddpm_jax.files import checkpoint; "
BLIND += "checkpoint.RESERVE = -(2**40); cli.main()"


@slow
def test_a_disk_that_fills_while_a_checkpoint_is_written(small_disk, tmp_path):
    """As if another program used the space; the previous checkpoints can be read."""
    run = small_disk / "run"
    arguments = [DIGITS, *TINY, f"--workdir={run}", "--config.train.checkpoint_every=2"]
    keep = ["--config.train.keep_checkpoints=100", "--config.train.sample_every=1000"]
    command = [sys.executable, "-c", BLIND, *arguments, *keep]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"error: workdir={run}: no space left on the disk" in done.stderr
    copy = shutil.copytree(run, tmp_path / "copy")  # where samples have room
    code, text = finish("--mode=sample", f"--workdir={copy}", cwd=tmp_path)
    assert code == 0 and f"of step {checkpoint.latest_step(run)}" in text, text


# Numbers that are not finite.


@pytest.fixture
def poisoned(config, tmp_path, monkeypatch):
    """A folder of 8 images, and a network to which a white one is poison."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        x = np.full((8, 8), 255) if i == 0 else rng.integers(0, 200, (8, 8))
        Image.fromarray(x.astype(np.uint8)).save(folder / f"{i}.png")
    config.data.update(name="folder", path=str(folder), split="train", eval_split="train[1:]")
    config.train.update(batch_size=4, num_steps=12)
    config.optim.max_skipped = 2
    simple_loss = diffusion.simple_loss

    def poison(schedule, net_fn, x0, *rest):
        white = (x0 > 0.999).all((1, 2, 3))
        return simple_loss(schedule, net_fn, x0, *rest) * jnp.where(white, jnp.nan, 1.0)

    monkeypatch.setattr(diffusion, "simple_loss", poison)
    return config


def white_steps(config):
    """The steps, from 1, whose batch holds the white image."""
    source = data.open_source(config.data)
    size = config.train.batch_size
    batches = data.batches(source, batch_size=size, seed=0, first_step=0, random_flip=False)
    steps = range(1, config.train.num_steps + 1)
    return [
        s for s, b in zip(steps, batches, strict=False) if (b.images == 255).all((1, 2, 3)).any()
    ]


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(poisoned, tmp_path):
    config = poisoned
    config.train.log_every = 3
    assert train.train(config, tmp_path / "run") == 0
    white = white_steps(config)
    assert len(white) == 6  # once an epoch of two batches
    found = [line for line in lines(tmp_path / "run") if "skipped" in line]
    assert sum(line["skipped"] for line in found) == len(white)
    losses = [line["loss"] for line in found if "loss" in line]
    assert len(losses) > 2 and np.isfinite(losses).all()
    for ema in (True, False):
        config.sample.use_ema = ema
        _, params = params_of(config, tmp_path / "run")
        assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


def test_too_many_in_a_row_stop_the_run(poisoned, tmp_path):
    """With no checkpoint from while they were skipped."""
    config = poisoned
    for i in range(1, 8):  # from now on there is nothing else
        shutil.copy(pathlib.Path(config.data.path) / "0.png", f"{config.data.path}/{i}.png")
    config.train.update(checkpoint_every=1, log_every=5)
    with pytest.raises(
        UserError, match=r"not finite at step 3, and at the optim\.max_skipped=2 steps"
    ):
        train.train(config, tmp_path / "run")
    assert checkpoint.latest_step(tmp_path / "run") is None


@pytest.mark.parametrize(
    "prediction, loss",
    [
        ("eps", "simple"),
        pytest.param("v", "simple", marks=slow),
        pytest.param("x0", "vlb", marks=slow),
    ],
)
def test_constant_images_poison_nothing(config, tmp_path, prediction, loss):
    """Black, gray and white ones; a group norm of them divides by nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(0, 256, 51):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{level}.png")
    config.data.update(name="folder", path=str(folder), split="train", eval_split="train")
    config.diffusion.update(prediction=prediction, loss=loss)
    config.train.num_steps = 6
    train.train(config, tmp_path / "run")
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in found] == [0] * 6
    assert all(np.isfinite(line["loss"]) for line in found)


def test_an_image_of_floats_is_named(config, tmp_path):
    """A TIFF may hold NaNs, and the range of its numbers is unknown."""
    x = np.full((8, 8), np.nan, np.float32)
    Image.fromarray(x).save(tmp_path / "bad.tiff")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    config.data.update(name="folder", path=str(tmp_path), split="train", eval_split="train")
    with pytest.raises(UserError, match=r"1 of 2 unreadable: .*bad\.tiff"):
        data.open_source(config.data)


def test_averages_that_have_hardly_moved(config, caplog):
    """After 100 steps 0.9999^100 = 0.99 of the start is left, after 50,000 0.007."""
    caplog.set_level(logging.WARNING)
    config.optim.ema_decay = 0.9999
    generate.warn_of_young_ema(config, 50_000)
    generate.warn_of_young_ema(config, 0)  # imported weights
    config.sample.use_ema = False
    generate.warn_of_young_ema(config, 100)
    assert not caplog.text
    config.sample.use_ema = True
    generate.warn_of_young_ema(config, 100)
    assert "still 99 % the initial parameters" in caplog.text


# What the table in docs/reliability.md says, a little of it.


@slow
@pytest.mark.nightly
@pytest.mark.parametrize("command", ["kill_sweep --kills=1", "leaks"])
def test_the_benchmarks_of_faults(command):
    """Their exit code says whether what is compared is the same, and whether memory grew."""
    command = [sys.executable, "-m", *f"benchmarks.{command}".split()]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}  # what they count by need not be shown
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
