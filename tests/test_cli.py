"""The command line: training and sampling, resuming after a signal, and every invalid input."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from programs import DIGITS, ROOT, TINY, finish, start

from ddpm_jax import cli, configs, progress
from ddpm_jax.core import unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.runs import generate, samplers


@pytest.mark.parametrize(
    "arguments", [("--mode=img2img", "--images=a.png,"), ("--mode=compare", "--workdirs=a,,b")]
)
def test_a_list_with_an_empty_name(arguments):
    """Which would be the current folder."""
    with pytest.raises(UserError, match="has an empty name"):
        cli.parse(["main.py", "--workdir=run", *arguments])


def test_a_folder_whose_name_is_not_utf_8():
    with pytest.raises(UserError, match="not UTF-8"):
        checkpoint.check_path(os.fsdecode(b"runs/r\xff"))


def test_no_bar_without_a_terminal(monkeypatch):
    """A program that was started with stderr closed."""
    monkeypatch.setattr(sys, "stderr", None)
    with progress.bar(3, "test", "step") as bar:
        bar.update(3)


def test_train_finish_and_sample(tmp_path, monkeypatch, caplog):
    train = [DIGITS, *TINY, "--config.train.num_steps=4", "--config.sample.num_samples=5"]
    code, text = finish(*train, cwd=tmp_path)
    assert code == 0, text
    run = tmp_path / "runs" / "digits"
    for expected in ("\ndevices: 2 x cpu", "digits, 1500 images", "parameters", "prior KL"):
        assert expected in text
    assert "sample grids: dpmpp_sde, 10 steps, 10 network evaluations" in text
    assert json.loads((run / "config.json").read_text())["model"]["channels"] == 8
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]
    assert imageio.imread(run / "samples" / "step_000004.png").ndim == 2

    # In this process, of four devices, rather than the two that it was trained on.
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["main.py", *train, "--config.sample.batch_size=8"]) == 0
    assert "finished" in caplog.text
    more = ["--config.sample.num_samples=9", "--config.sample.seed=3"]
    assert cli.run(["main.py", "--mode=sample", "--workdir=runs/digits", *more]) == 0
    images = np.load(run / "samples" / "sample_000004_n9_seed3.npz")["images"]
    assert (images.shape, images.dtype) == ((9, 8, 8, 1), np.uint8)
    assert (run / "samples" / "sample_000004_n9_seed3.png").exists()


def test_distributed_without_a_cluster(tmp_path):
    """A mistake of the user, so exit code 2; the line names the flags that are needed here."""
    code, text = finish(DIGITS, "--distributed", cwd=tmp_path)
    assert code == 2, text
    assert text.splitlines()[-1].startswith("error: --distributed: ")
    assert "give --coordinator, --num_processes and --process_id" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, caplog, number):
    arguments = [DIGITS, "--workdir=run", *TINY]
    arguments += ["--config.train.num_steps=1000000", "--config.train.checkpoint_every=1000000"]
    arguments += ["--config.train.sample_every=1000000"]
    process = start(*arguments, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"\n{number.name}: finishing the current steps\n" in err  # at once: they may take long
    assert "to resume, run: python" in err and "--config.model.channels=8" in err
    (saved,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved > 0
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert last == saved
    arguments[-3] = f"--config.train.num_steps={saved + 2}"
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.show, "show", lambda *_: None)
    assert cli.run(["main.py", *arguments]) == 0
    assert f"resuming from the checkpoint of step {saved}" in caplog.text


def test_a_signal_or_an_error_while_the_report_is_drawn(tmp_path, monkeypatch, caplog):
    """The run is saved; an error is a warning, and the next start draws the report."""
    caught, drawn = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))

    def fail(config, workdir):
        drawn.append(workdir)
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("no luck")

    monkeypatch.setattr(cli.show, "show", fail)
    command = ["main.py", DIGITS, *TINY, f"--workdir={tmp_path}", "--config.train.num_steps=2"]
    command += ["--config.train.batch_size=64", "--config.sample.num_samples=4"]
    try:
        assert [cli.run(command), cli.run(command)] == [0, 0]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [True, True] and drawn == [tmp_path, tmp_path]
    assert caplog.text.count("the report failed, and was skipped: RuntimeError('no luck')") == 2


def test_helpshort(capsys):
    assert cli.run(["main.py", "--helpshort"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--mode",
        *cli.MODES,
        "--config",
        "--workdir",
        "ddpm_jax/configs.py",
    ):
        assert word in text


def test_an_error_is_one_line_and_code_2(tmp_path):
    code, text = finish(DIGITS, "--config.diffusion.num_timesteps=0", cwd=tmp_path)
    assert code == 2
    assert text == "error: diffusion.num_timesteps=0: must be at least 1\n"
    assert not list(tmp_path.iterdir())


BAD = {
    "--moed=train": "--moed",
    "--mode=trian": "mode",
    "extra": "extra",
    "--config=configs/nothing.py": "configs/nothing.py",
    "--config.model.chanels=8": "no such field; did you mean model.channels?",
    "--config.modle.channels=8": "modle.channels",
    "--config.model.channels=wide": "--config.model.channels=wide",
    "--config.train.batch_size=2.5": "2.5",
    "--config.data.random_flip=perhaps": "perhaps",
    "--config.data.image_size=8": "image_size",
    "--config.data.image_size=(8,9)": "data.image_size=(8, 9)",
    "--config.data.image_size=(0,8)": "data.image_size=(0, 8)",
    "--config.data.image_size=(8,8,8)": "data.image_size=(8, 8, 8)",
    "--config.data.image_size=('a','b')": "data.image_size",
    "--config.data.channels=2": "data.channels=2",
    "--config.data.name=mnits": "data.name='mnits'",
    "--config.data.split=tain": "data.split='tain'",
    "--config.data.eval_split=tset": "data.eval_split='tset'",
    "--config.data.resize=pad": "data.resize='pad'",
    "--config.diffusion.num_timesteps=0": "diffusion.num_timesteps=0",
    "--config.diffusion.beta_start=0": "diffusion.beta_start=0",
    "--config.diffusion.beta_end=1": "diffusion.beta_end=1",
    "--config.diffusion.schedule=linaer": "diffusion.schedule='linaer'",
    "--config.diffusion.variance=big": "diffusion.variance='big'",
    "--config.diffusion.prediction=noise": "diffusion.prediction='noise'",
    "--config.diffusion.loss=l1": "diffusion.loss='l1'",
    "--config.diffusion.variance=learned": "needs diffusion.loss='hybrid' or 'vlb'",
    "--config.data.num_classes=9": "data.num_classes=9: digits has 10 classes: 0, 1, 2",
    "--config.model.kind=classifier": "data.num_classes=0: must be 2 or more for a classifier",
    "--config.train.label_dropout=1.5": "train.label_dropout=1.5: must lie in [0, 1]",
    "--config.sample.sampler=euler": "sample.sampler='euler': choose from ancestral, ddim",
    "--config.sample.num_steps=201": "sample.num_steps=201: must be from 1 to",
    "--config.sample.spacing=cubic": "sample.spacing='cubic'",
    "--config.sample.eta=1.5": "sample.eta=1.5: must lie in [0, 1]",
    "--config.sample.eta=-0.1": "sample.eta=-0.1: must lie in [0, 1]",
    "--config.sample.label=7": "sample.label='7': this model is unconditional",
    "--config.sample.guidance=2": "sample.guidance=2.0: this model is unconditional",
    "--config.sample.eta=0.5": "sample.eta=0.5: must be 0, unless sample.sampler='ddim'",
    "--config.sample.t=200": "sample.t=200: must be from 0 to 199, or -1",
    "--config.sample.classifier=nowhere": "sample.classifier='nowhere': holds no classifier",
    "--config.sample.resamplings=0": "sample.resamplings=0",
    "--config.model.norm_groups=5": "model.channels=32",
    "--config.model.channel_mults=()": "model.channel_mults=()",
    "--config.model.channel_mults=(1,1,1,1,1)": "data.image_size=(8, 8)",
    "--config.model.attention_down=(5,)": "model.attention_down=(5,): must be levels, from 0 to",
    "--config.model.channel_mults=(1.5,2)": "whole numbers above 0",
    "--config.model.dropout=1.0": "model.dropout=1.0",
    "--config.model.dtype=float16": "model.dtype='float16'",
    "--config.model.num_res_blocks=0": "model.num_res_blocks=0",
    "--config.optim.learning_rate=nan": "optim.learning_rate=nan",
    "--config.optim.learning_rate=-1": "optim.learning_rate=-1",
    "--config.optim.decay=linear": "optim.decay='linear'",
    "--config.optim.ema_decay=1.5": "optim.ema_decay=1.5",
    "--config.optim.ema_decay=high": "optim.ema_decay='high': must lie in [0, 1), or be several",
    "--config.optim.ema_decay=(0.9,1)": "optim.ema_decay=(0.9, 1): must lie in [0, 1)",
    "--config.optim.ema_decay=(0.9,0.9)": "optim.ema_decay=(0.9, 0.9)",
    "--config.optim.ema_decay=()": "optim.ema_decay=()",
    "--config.sample.ema_decay=0.9": "sample.ema_decay=0.9: choose from 0.995, or 0",
    "--config.train.timesteps=random": "train.timesteps='random': choose from uniform, low_disc",
    "--config.train.batch_size=6": "train.batch_size=6",
    "--config.train.batch_size=0": "train.batch_size=0",
    "--config.train.num_steps=-5": "train.num_steps=-5",
    "--config.train.num_steps=0": "train.num_epochs=0: train.num_steps=0; one of them",
    "--config.train.num_epochs=3": "train.num_epochs=3: train.num_steps=",
    "--config.train.log_every=0": "train.log_every=0",
    "--config.train.keep_checkpoints=0": "train.keep_checkpoints=0",
    "--config.sample.num_samples=0": "sample.num_samples=0",
    "--config.sample.batch_size=3": "sample.batch_size=3",
    "--config.sample.seed=-1": "sample.seed=-1",
    "--config.seed=5000000000": "seed=5000000000",
    "--config.data.name=mnist:9.9.9": "data.name='mnist:9.9.9'",
    "--config.data.name=mnist/foo": "data.name='mnist/foo'",
    "--config.data.name=": "data.name=''",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input(argument, tmp_path, monkeypatch):
    """Four devices here; nothing is written."""
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "run"
    argv = ["main.py", "--config=configs/digits.py", f"--workdir={workdir}", argument]
    with pytest.raises(UserError) as error:
        cli.run(argv)
    assert BAD[argument] in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_sampling_needs_a_run_with_a_checkpoint(tmp_path, config):
    with pytest.raises(UserError, match="holds no run"):
        cli.run(["main.py", "--mode=sample", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="--config: is missing"):
        cli.run(["main.py", "--mode=sample"])
    run_files.save_config(config, tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        cli.run(["main.py", "--mode=sample", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match=r"model\.channels"):
        cli.run(["main.py", "--mode=sample", f"--workdir={tmp_path}", "--config.model.channels=16"])
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_the_workdir_is_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match=r"workdir=.*not a folder"):
        cli.run(["main.py", DIGITS, f"--workdir={path}"])


def test_damaged_config(tmp_path):
    for text, message in (
        ('{"seed": 0', r"config\.json: not valid JSON"),
        ("[]", r"config\.json: is not a JSON object"),
        ("{}", r"config\.json: lacks data\.channels"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            cli.run(["main.py", "--mode=sample", f"--workdir={tmp_path}"])


def test_a_broken_config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs import digits\ndef get_config():\n    c = digits.get_config()\n"
                    "    c.model.chanels = 3\n    return c\n")  # fmt: skip
    with pytest.raises(UserError, match="chanels"):
        cli.run(["main.py", f"--config={path}"])
    for text, message in (
        ("x = 1", "get_config"),
        ("x = = 1", "invalid syntax"),
        ("import no_such_module", "no_such_module"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            cli.run(["main.py", f"--config={path}"])


# Paths, folders and pipes.


def test_home_in_every_path(tmp_path, monkeypatch):
    """Shells do not expand a ~ after a =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((ROOT / "configs/digits.py").read_text())
    fields = ("data.path", "data.data_dir", "sample.classifier", "evaluate.cache_dir")
    fields += ("evaluate.inception_weights",)
    train = ["--config=~/mine.py", "--workdir=~/run", *(f"--config.{f}=~/a/~b" for f in fields)]
    command = cli.parse(["main.py", *train])
    assert command.workdir == tmp_path / "run"
    flat = configs.flatten(command.config)
    assert {flat[field] for field in fields} == {f"{tmp_path}/a/~b"}
    edit = ["--mode=inpaint", "--config=~/mine.py", "--images=~/a,b,~/c", "--mask=~/mask.png"]
    command = cli.parse(["main.py", *edit])
    assert command.images == (f"{tmp_path}/a", "b", f"{tmp_path}/c")
    assert command.mask == f"{tmp_path}/mask.png"
    export = ["--mode=export", "--config=~/mine.py", "--weights=~/w"]
    assert cli.parse(["main.py", *export]).weights == f"{tmp_path}/w"
    assert cli.parse(["main.py", "--mode=compare", "--workdirs=~/a,b"]).workdirs[0].startswith("/")
    for argument in ("--workdir=~nobody_here/x", "--config.data.path=~nobody_here/x"):
        with pytest.raises(
            UserError, match=r"(--workdir|data\.path)='?~nobody_here/x'?: there is no such home"
        ):
            cli.run(["main.py", DIGITS, argument])


@contextlib.contextmanager
def without_rights():
    """As a user who is not root, whom permissions concern."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", ["sample", "evaluate", "show", "img2img"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(mode, config, monkeypatch):
    """Before any computation: the run's missing checkpoint causes no error."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can only be entered by root
        run_files.save_config(config, folder)
        monkeypatch.setattr(checkpoint, "restore_params", lambda *_: pytest.fail("too late"))
        if mode == "show":  # the report is not in this folder
            os.mkdir(f"{folder}/show")
            os.chmod(f"{folder}/show", 0o777)
        os.chmod(folder, 0o555)
        images = [f"--images={folder}"] if mode == "img2img" else []
        command = ["main.py", f"--mode={mode}", f"--workdir={folder}", *images]
        with without_rights(), pytest.raises(UserError, match=r"workdir=.*Permission denied"):
            cli.run(command)
        os.chmod(folder, 0o755)


def test_a_reader_that_leaves(monkeypatch):
    """As `| head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "argv", ["main.py", "--helpshort"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 128 + signal.SIGPIPE


def test_devices_that_are_not_there(monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda: no such device"):
        cli.run(["main.py", DIGITS])


# What a run of any length would say, for as little as that takes.


@pytest.fixture
def diverged(config, tmp_path):
    """A run whose parameters are not finite, with a chain that does not end in noise."""
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    params = jax.tree.map(lambda s: np.full(s.shape, np.nan, s.dtype), shapes)
    checkpoint.save_imported(tmp_path, params)
    config.diffusion.update(schedule="linear", beta_end=0.02)
    run_files.save_config(config, tmp_path)
    return tmp_path


def test_samples_that_are_not_finite(diverged):
    """They would be written as black images."""
    with pytest.raises(UserError, match=r"images 0, 1, 2, 3 of a batch are not finite, .*rate"):
        cli.run(["main.py", "--mode=sample", f"--workdir={diverged}"])
    assert not (diverged / "samples").exists()
    with pytest.raises(UserError, match=r"images 1, 7 of a batch are not finite"):
        samplers.check_finite([5, 7, 1, 1], [True, False, False, False])
    samplers.check_finite([5, 7], [True, True])


@pytest.mark.parametrize("mode", ["sample", "evaluate", "show"])
def test_a_chain_that_does_not_end_in_noise_is_said_in_every_mode(mode, diverged, caplog):
    few = ["--config.evaluate.num_samples=0", "--config.evaluate.bits_per_dim_images=0"]
    few += ["--config.evaluate.nearest_images=0"]
    with contextlib.suppress(UserError):
        cli.run(["main.py", f"--mode={mode}", f"--workdir={diverged}", *few])
    assert caplog.text.count("does not end in noise") == 1


def test_fewer_samples_leave_the_others(diverged, config):
    """File names contain the number of samples."""
    names = set()
    for fields in (
        {},
        {"sample.num_samples": 2},
        {"model.dtype": "bfloat16"},
        {"sample.label": "a b"},
        {"sample.label": "a-b"},
        {"sample.classifier": "x/run"},
        {"sample.classifier": "y/run"},
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(fields)
        names.add(generate.sample_name(other, diverged, 7))
    assert len(names) == 7 and all(name.startswith("sample_000007_n") for name in names)
