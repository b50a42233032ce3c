"""Whether memory grows while a run lasts: after 200 and after 2,000 steps of the network.

    python -m benchmarks.leaks

Training with a checkpoint, a held-out loss and a grid of samples every 100 steps; sampling;
evaluation of bits/dim. What is resident on the host, and in use on a device that says it; MB. It
takes some two minutes. Exit code 1 if anything grew by more than 6 MB.

What glibc's malloc holds on to without use is not counted: it hands that back before a reading.
"""

import contextlib
import ctypes
import gc
import io
import logging
import pathlib
import sys
import tempfile

import jax
import psutil

from configs import digits
from ddpm_jax import evaluate, generate, parallel, progress, train

FIRST, LAST, WINDOW, MOST = 200, 2000, 100, 6
BATCH_SIZE, NUM_TIMESTEPS = 16, 20


def memory():
    """(host, device) in MB; of a device that does not say, 0."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    stats = jax.local_devices()[0].memory_stats() or {"bytes_in_use": 0}
    return psutil.Process().memory_info().rss / 1e6, stats["bytes_in_use"] / 1e6


def watch(task, description, steps_a_unit):
    """Runs a task, and returns memory at FIRST and LAST of the steps that its bar counts.

    Each is the least of what is read at ten of the WINDOW steps before, so that a checkpoint that
    is being written does not count.
    """
    found, original = {FIRST: [], LAST: []}, progress.bar

    def bar(total, desc, unit, **options):
        bar = original(total, desc, unit, **options)
        if desc == description:
            update = bar.update

            def watched(n=1):
                before, now = bar.n * steps_a_unit, (bar.n + n) * steps_a_unit
                update(n)
                for step, readings in found.items():
                    window = step - WINDOW < now <= step
                    if window and before // (WINDOW / 10) < now // (WINDOW / 10):
                        readings.append(memory())

            bar.update = watched
        return bar

    progress.bar = bar
    try:
        task()
    finally:
        progress.bar = original
    return [tuple(map(min, zip(*readings, strict=True))) for readings in found.values()]


def small():
    """A config whose steps take milliseconds."""
    config = digits.get_config()
    config.model.update(channels=16, channel_mults=(1,), norm_groups=4)
    config.diffusion.num_timesteps = NUM_TIMESTEPS
    config.train.update(num_steps=LAST, batch_size=BATCH_SIZE, log_every=50, eval_every=100)
    config.train.update(sample_every=100, checkpoint_every=100)
    config.sample.update(batch_size=BATCH_SIZE, num_samples=BATCH_SIZE * LAST // NUM_TIMESTEPS)
    config.evaluate.update(num_samples=0, split="train", bits_per_dim_images=1797)
    return config.lock()


def run():
    """Prints the table."""
    logging.disable(logging.WARNING)
    parallel.prepare_cpu()
    parallel.use_cpu_cores(BATCH_SIZE)
    config, grew = small(), []
    print("| | host, MB: step 200 | step 2,000 | device: step 200 | step 2,000 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
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
