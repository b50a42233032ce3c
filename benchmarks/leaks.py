"""Checks that memory does not grow in a long run.

    python -m benchmarks.leaks

It trains, samples, and evaluates bits/dim. Training computes a held-out loss and a grid of samples
every 100 steps, and a checkpoint every 500, after one warm-up of all of these in the same process.
It prints the resident memory of the host, and the used memory of a device that reports it, in MiB:
the minimum of ten readings in the 200 steps after step 200, and of ten in the 200 steps until step
2,000. The minimum is used because drawing a grid or writing a checkpoint takes about 4 MiB for a
while. Orbax keeps 0.16 MiB per checkpoint, so more frequent checkpoints would hide other leaks; in
two of three runs, one checkpoint leaves another 5 to 8 MiB. It takes about three minutes. Exit code
1 if anything grew by more than 12 MiB.

Memory that glibc's malloc keeps unused is not counted: malloc returns it before each reading. For
this, malloc has only one arena, and the other settings of cpu.prepare are not used.
"""

import contextlib
import io
import logging
import os
import pathlib
import sys
import tempfile

import jax

from benchmarks.memory import resident
from ddpm_jax import configs, cpu, progress
from ddpm_jax.runs import evaluate, generate, train

FIRST, LAST, WINDOW, MAX_GROWTH = 200, 2000, 200, 12  # steps; MiB
BATCH_SIZE, NUM_TIMESTEPS = 16, 20


def memory():
    """(host, device) in MiB; 0 for a device that does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {"bytes_in_use": 0}
    return resident(), stats["bytes_in_use"] / 2**20


def watch(task, description, steps_per_unit):
    """Runs a task; returns the memory after FIRST and before LAST, steps of its progress bar."""
    windows = {FIRST: [], LAST - WINDOW: []}
    original = progress.bar

    def bar(total, desc, unit, **options):
        bar = original(total, desc, unit, **options)
        if desc == description:
            update = bar.update

            def watched(n=1):
                before, now = bar.n * steps_per_unit, (bar.n + n) * steps_per_unit
                update(n)
                for start, readings in windows.items():
                    inside = start < now <= start + WINDOW
                    if inside and before // (WINDOW / 10) < now // (WINDOW / 10):
                        readings.append(memory())

            bar.update = watched
        return bar

    progress.bar = bar
    try:
        task()
    finally:
        progress.bar = original
    return [tuple(map(min, zip(*readings, strict=True))) for readings in windows.values()]


def small(num_steps):
    """A config whose steps take milliseconds."""
    config = configs.named_config("digits")
    config.model.update(channels=16, channel_mults=(1,), norm_groups=4)
    config.diffusion.num_timesteps = NUM_TIMESTEPS
    config.train.update(num_steps=num_steps, batch_size=BATCH_SIZE, log_every=50, eval_every=100)
    config.train.update(sample_every=100, checkpoint_every=500)
    config.sample.update(batch_size=BATCH_SIZE, num_samples=BATCH_SIZE * LAST // NUM_TIMESTEPS)
    config.evaluate.update(num_samples=0, nearest_images=0)
    config.evaluate.update(split="train", bits_per_dim_images=1797)
    return config.lock()


def run():
    """Prints the table."""
    if "MALLOC_ARENA_MAX" not in os.environ or "TQDM_DISABLE" in os.environ:
        os.environ["MALLOC_ARENA_MAX"] = "1"
        os.environ.pop("TQDM_DISABLE", None)  # the progress bars count the steps
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.leaks"])
    logging.disable(logging.WARNING)
    cpu.use_cores(BATCH_SIZE)
    config, grew = small(LAST), []
    print("| | host, MiB: step 200 | step 2,000 | device: step 200 | step 2,000 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(small(500), pathlib.Path(name) / "warm")
        for task, description, steps in (
            (train.train, "train", 1),
            (generate.sample, "sample", 1),
            (evaluate.evaluate, "evaluate bits/dim", NUM_TIMESTEPS / BATCH_SIZE),
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                before, after = watch(lambda task=task: task(config, workdir), description, steps)
            cells = (f"{b:.1f} | {a:.1f}" for b, a in zip(before, after, strict=True))
            print(f"| {description} | {' | '.join(cells)} |", flush=True)
            grew.append(max(a - b for b, a in zip(before, after, strict=True)))
    sys.exit(1 if max(grew) > MAX_GROWTH else 0)


if __name__ == "__main__":
    run()
