"""The Python interface: the same results, and the same errors, as the command line."""

import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import FIXTURES
from sklearn.datasets import load_digits

import ddpm_jax
from ddpm_jax import cli, configs
from ddpm_jax.core import diffusion, sampling
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.runs import generate


def arrays(count=40):
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:count, ..., None]
    return images, digits.target[:count]


TRAINED = []  # once for all tests


@pytest.fixture
def run(config, tmp_path_factory):
    """A conditional run of four steps on a user's own arrays."""
    config.train.checkpoint_every = 2
    if not TRAINED:
        folder = tmp_path_factory.mktemp("trained") / "run"
        TRAINED.append((folder, ddpm_jax.train(config, folder, *arrays())))
    return TRAINED[0][1]


@pytest.fixture
def workdir(run):
    """Its folder."""
    return TRAINED[0][0]


def test_train_load_and_sample(run, workdir):
    """The files are those of the command line, which samples the same images."""
    assert run.step == 4 and run.label_names == tuple("0123456789")
    options = dict(label=7, guidance=2.0, sampler="ddim", num_steps=5, seed=3)
    images = run.sample(6, **options)
    assert (images.shape, images.dtype) == ((6, 8, 8, 1), np.uint8)
    again = ddpm_jax.load(workdir)
    assert again.config.data.image_size == (8, 8) and again.config.data.num_classes == 10
    np.testing.assert_array_equal(again.sample(6, **options), images)
    np.testing.assert_array_equal(ddpm_jax.sample(workdir, 6, **options), images)
    assert (run.sample(6, **options | {"seed": 4}) != images).any()
    fields = options | {"num_samples": 6, "batch_size": 4}
    flags = [f"--config.sample.{name}={value}" for name, value in fields.items()]
    cli.run(["main.py", "--mode=sample", f"--workdir={workdir}", *flags])
    (path,) = (workdir / "samples").glob("sample_*.npz")
    difference = np.abs(np.load(path)["images"].astype(int) - images)
    assert difference.max() <= 1  # of rounding, in batches of another size


def test_the_allocator_knows_the_images(run, workdir, config, tmp_path, monkeypatch):
    """Those that are given, or the run's: how many arenas are best depends on a batch's pixels."""
    known = []
    monkeypatch.setattr(ddpm_jax.interface.cpu, "prepare", known.append)
    monkeypatch.setattr(ddpm_jax.interface.training, "train", lambda *_: 1)
    with pytest.raises(KeyboardInterrupt):
        ddpm_jax.train(config, tmp_path, np.zeros((9, 16, 24, 1), np.uint8))
    ddpm_jax.load(workdir)
    batch_size = config.train.batch_size
    assert known == [batch_size * 16 * 24, batch_size * 8 * 8]


def test_a_sampler_of_ones_own(run):
    """A sampler written with `predict` gives the same images as ours."""
    schedule = configs.make_schedule(run.config)
    keys = sampling.image_keys(0, jnp.arange(4))
    labels = jnp.full(4, 7)
    x = sampling.prior(keys, 20, (8, 8, 1))

    @jax.jit
    def step(x, t):
        x0, log_variance = run.predict(x, t, labels)
        mean, _ = diffusion.q_posterior(schedule, x0, x, jnp.full(4, t))
        eps = sampling.noise(keys, t, (8, 8, 1))
        return mean + jnp.where(t > 0, jnp.exp(0.5 * log_variance), 0) * eps

    for t in range(19, -1, -1):
        x = step(x, t)
    ours = run.sample(4, label=7)
    assert np.abs(np.round((np.clip(x, -1, 1) + 1) * 127.5) - ours.astype(int)).max() <= 1
    x0, _ = run.predict(x, 3)
    assert (x0 != run.predict(x, 3, labels)[0]).any()  # of no class, and of class 7
    np.testing.assert_array_equal(x0, run.predict(x, 3, jnp.full(4, 10))[0])


def test_arrays_are_data_like_any_other(run, config, tmp_path):
    """Resuming is exact bit for bit; with other arrays it is refused."""
    images, labels = arrays()
    half = config.copy_and_resolve_references()
    half.train.num_steps = 2
    ddpm_jax.train(half, tmp_path / "parts", images, labels)
    parts = ddpm_jax.train(config, tmp_path / "parts", images, labels)
    jax.tree.map(np.testing.assert_array_equal, run.params, parts.params)
    config.train.num_steps = 6
    images[3, 2, 2] ^= 1
    with pytest.raises(ddpm_jax.UserError, match="was trained on other data"):
        ddpm_jax.train(config, tmp_path / "parts", images, labels)
    with pytest.raises(ddpm_jax.UserError, match=r"data\.name='arrays': .*ddpm_jax\.train again"):
        cli.run(["main.py", f"--workdir={tmp_path / 'parts'}", "--config.train.num_steps=6"])


def test_weights_of_diffusers_need_no_copy(tmp_path):
    before = {path for path in pathlib.Path(FIXTURES).rglob("*")}
    run = ddpm_jax.load(FIXTURES)
    assert run.step == 0 and run.label_names == ()
    images = run.sample(2, num_steps=3, batch_size=4)
    cli.run(["main.py", "--mode=import", f"--weights={FIXTURES}", f"--workdir={tmp_path / 'run'}"])
    imported = ddpm_jax.load(tmp_path / "run").sample(2, num_steps=3, batch_size=4)
    np.testing.assert_array_equal(images, imported)
    assert {path for path in pathlib.Path(FIXTURES).rglob("*")} == before


def test_a_classifier_that_is_trained_between_two_calls(run, workdir, monkeypatch):
    """Is read again; otherwise once. (In its place, another run.)"""
    read = []

    def guidance_for(config, names):
        read.append(config.sample.classifier)
        return {"label": 0, "classifier": None}

    monkeypatch.setattr(generate, "guidance_for", guidance_for)
    options = {"classifier": str(workdir), "label": "0", "num_steps": 3, "sampler": "ddim"}
    run.sample(2, **options)
    run.sample(2, **options)
    assert read == [str(workdir)]
    os.utime(workdir / "checkpoints" / "4", (1, 1))
    run.sample(2, **options)
    assert len(read) == 2


def test_raw_and_averaged_parameters(run, workdir):
    raw = ddpm_jax.load(workdir, use_ema=False)
    leaves = zip(jax.tree.leaves(raw.params), jax.tree.leaves(run.params), strict=True)
    assert any((a != b).any() for a, b in leaves)


def test_config():
    assert ddpm_jax.config().data.name == "cifar10"
    config = ddpm_jax.config("tutorials/mnist32_t200")
    assert config.diffusion.num_timesteps == 200
    with pytest.raises(AttributeError):
        config.train.num_step = 3


ERRORS = {
    "labl=7": lambda run: run.sample(2, labl=7),
    "sample.label='x': choose from 0, 1": lambda run: run.sample(2, label="x"),
    "sample.num_steps=2.5: must be a whole": lambda run: run.sample(2, num_steps=2.5),
    "sample.num_steps=21: must be from 1": lambda run: run.sample(2, num_steps=21),
    "sample.num_samples=0": lambda run: run.sample(0),
    "x_t: has shape": lambda run: run.predict(jnp.zeros((2, 8, 8, 3)), 1),
    "t: 20; must be from 0 to 19": lambda run: run.predict(jnp.zeros((2, 8, 8, 1)), [3, 20]),
    "t: -1; must be from 0 to 19": lambda run: run.predict(jnp.zeros((2, 8, 8, 1)), -1),
    "labels: 11; must be from 0 to 10": lambda run: run.predict(
        jnp.zeros((2, 8, 8, 1)), 1, jnp.array([10, 11])
    ),
    "x_t: is int32, not float32": lambda run: run.predict(jnp.zeros((2, 8, 8, 1), int), 1),
    "t: float64 [], not whole": lambda run: run.predict(jnp.zeros((2, 8, 8, 1)), 3.9),
    "t: int32 [3], not whole numbers [2]": lambda run: run.predict(
        jnp.zeros((2, 8, 8, 1)), jnp.arange(3)
    ),
    "labels: int32 [3], not whole numbers [2]": lambda run: run.predict(
        jnp.zeros((2, 8, 8, 1)), 1, jnp.arange(3)
    ),
    "holds no run": lambda run: ddpm_jax.load("nowhere"),
    "--config=nothing: no such file": lambda run: ddpm_jax.config("nothing"),
    "images: float64": lambda run: ddpm_jax.train(run.config, "x", np.zeros((2, 8, 8, 1))),
    "images: uint8 [2, 8, 8]": lambda run: ddpm_jax.train(run.config, "x", arrays(2)[0][..., 0]),
    "images: 0, not 2 or more": lambda run: ddpm_jax.train(run.config, "x", *arrays(0)),
    "labels: int64 [2], not 2 whole numbers from 0 to 999999": lambda run: ddpm_jax.train(
        run.config, "x", arrays(2)[0], np.array([2**32, 0])
    ),
    "labels: need images": lambda run: ddpm_jax.train(run.config, "x", labels=arrays(2)[1]),
    "labels: int64 [3], not 2": lambda run: ddpm_jax.train(
        run.config, "x", arrays(2)[0], arrays(3)[1]
    ),
}


def test_errors_are_one_line(run, tmp_path, monkeypatch):
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for text, call in ERRORS.items():
        with pytest.raises(ValueError) as error:
            call(run)
        assert text in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_signal_is_an_interruption(config, tmp_path, signal_at):
    """As in a notebook; what was trained is saved."""
    signal_at(3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ddpm_jax.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 3
    assert run_files.load_config(tmp_path).data.name == "digits"


def test_a_home_that_does_not_exist():
    """One line, not the error of pathlib."""
    for use in (
        lambda: ddpm_jax.load("~nosuchuser/run"),
        lambda: ddpm_jax.train(ddpm_jax.config("digits"), "~nosuchuser/run"),
    ):
        with pytest.raises(ddpm_jax.UserError, match=r"='~nosuchuser/run': there is no such home"):
            use()
