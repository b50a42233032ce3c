"""Does memory grow in a long run?

    python -m benchmarks.leaks

Training with a held-out loss and a grid of samples every 100 steps and a checkpoint every 500, in a
process that has done all of it once; sampling; evaluation of bits/dim. What is resident on the
host, and in use on a device that says it, MiB; the least of ten readings over the 200 steps after
step 200, and over the 200 until step 2,000: while a grid is drawn or a checkpoint written, some 4
MiB more are in use. Of every checkpoint Orbax keeps 0.16 MiB, so that as many of them as of grids
would hide what else grows; and one of them leaves 5 to 8 MiB, once, in two runs of three. It takes
some three minutes. Exit code 1 if anything grew by more than 12 MiB.

What glibc's malloc holds on to without use is not counted: it hands that back before a reading, and
gets one arena, but not the rest of parallel.prepare_cpu, with which it can hand back less.
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
from ddpm_jax import configs, evaluate, generate, parallel, progress, train

FIRST, LAST, WINDOW, MOST = 200, 2000, 200, 12
BATCH_SIZE, NUM_TIMESTEPS = 16, 20


def memory():
    """(host, device) in MiB; of a device that does not say, 0."""
    stats = jax.local_devices()[0].memory_stats() or {"bytes_in_use": 0}
    return resident(), stats["bytes_in_use"] / 2**20


def watch(task, description, steps_a_unit):
    """Runs a task, and returns memory after FIRST and before LAST of the steps its bar counts."""
    windows = {FIRST: [], LAST - WINDOW: []}
    original = progress.bar

    def bar(total, desc, unit, **options):
        bar = original(total, desc, unit, **options)
        if desc == description:
            update = bar.update

            def watched(n=1):
                before, now = bar.n * steps_a_unit, (bar.n + n) * steps_a_unit
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
    config.evaluate.update(num_samples=0, split="train", bits_per_dim_images=1797)
    return config.lock()


def run():
    """Prints the table."""
    if "MALLOC_ARENA_MAX" not in os.environ or "TQDM_DISABLE" in os.environ:
        os.environ["MALLOC_ARENA_MAX"] = "1"
        os.environ.pop("TQDM_DISABLE", None)  # the bars are what counts the steps
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.leaks"])
    logging.disable(logging.WARNING)
    parallel.use_cpu_cores(BATCH_SIZE)
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
    sys.exit(1 if max(grew) > MOST else 0)


if __name__ == "__main__":
    run()
