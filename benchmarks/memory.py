"""Memory of a train step: planned by the compiler, and measured in the process.

    python -m benchmarks.memory
    python -m benchmarks.memory --config=configs/celebahq256.py --batch_size=8 --plan_only

Each row is measured in its own process. It has optim.accumulate and model.remat; the bytes of a
step on one device in XLA's plan (parameters, optimizer and batch; temporary buffers); the peak
resident size during steps above that between steps (Linux); and the seconds per step.
"""

import argparse
import ctypes
import gc
import itertools
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import psutil

from ddpm_jax import configs, cpu, packing, parallel
from ddpm_jax.files import data
from ddpm_jax.runs import objective, states

STEPS = 3


def resident():
    """The resident memory of the process in MiB, after malloc has returned its free memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def peak():
    """The peak resident memory in MiB; None if the system is not Linux."""
    status = pathlib.Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) / 1024 if match else None


def measure(config, plan_only):
    """Prints one row."""
    shape, size = configs.image_shape(config), config.train.batch_size
    model, optimizer = configs.make_model(config), states.make_optimizer(config.optim, 100)
    step = objective.make_train_step(config, model, configs.make_schedule(config), optimizer)
    state = packing.pack(parallel.replicate(states.create_state(config, model, optimizer)))
    batch = data.Batch(np.zeros((size, *shape), np.uint8), None)
    memory = step.lower(state, parallel.shard(batch)).compile().memory_analysis()
    planned = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    cells = [f"{number / 2**20:,.0f}" for number in planned]
    if not plan_only:
        state, _ = jax.block_until_ready(step(state, parallel.shard(batch)))  # compiles once more
        before, seconds = resident(), []
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak of compiling
        for _ in range(STEPS):
            start = time.perf_counter()
            state, values = step(state, parallel.shard(batch))
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - start)
        cells += [f"{peak() - before:,.0f}", f"{min(seconds):.2f}"]
    print(f"| {config.optim.accumulate} | {config.model.remat} | {' | '.join(cells)} |", flush=True)


def run():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/cifar10.py")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--plan_only", action="store_true")
    parser.add_argument("--row", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        config = configs.named_config(options.config)
        config.train.batch_size = options.batch_size
        cpu.prepare(configs.positions(config, "train"))
        config.optim.accumulate, config.model.remat = options.row[0], bool(options.row[1])
        measure(config, options.plan_only)
        return
    measured = "" if options.plan_only else " measured above state, MiB | s a step |"
    print(f"| accumulate | remat | planned: state, MiB | planned: temporary, MiB |{measured}")
    print("|---" * (4 + measured.count("|")) + "|", flush=True)
    for accumulate, remat in itertools.product((1, 2, 4), (0, 1)):
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
        command += ["--row", str(accumulate), str(remat)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    run()
