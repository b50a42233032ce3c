"""What to run first when a GPU is at hand for minutes only.

    python -m benchmarks.gpu profile
    python -m benchmarks.gpu profile "--only=as it is,batch 4"
    python -m benchmarks.gpu train --minutes=8
    python -m benchmarks.gpu score --minutes=8
    python -m benchmarks.gpu profile --config=digits --batch=32   # on a CPU, to try it

profile    the rate of a train step as it is, and of each candidate for a faster one; where a step's
           time goes. Each is a process of its own, so that one that fails takes nothing with it.
train      trains for some minutes, saves, and goes on when called again.
score      samples and evaluates the run; goes on when called again.

Each phase appends JSON lines to --out. What the file has of this device is not measured again.
Further arguments, as --config.train.batch_size=256, go to main.py (train and score).
"""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import contestants
from ddpm_jax import compilation, configs, cpu, packing, parallel
from ddpm_jax.core import unet
from ddpm_jax.files import data, run_files
from ddpm_jax.runs import objective, states

MAIN = pathlib.Path(__file__).resolve().parent.parent / "main.py"
SECONDS = 3  # of each measurement
# What each candidate changes: fields of the config, XLA_FLAGS, a function of REPLACED, or the
# number of images or steps.
CANDIDATES = {
    "as it is": {},
    "batch 2": {"batch": 2},
    "batch 4": {"batch": 4},
    "no dropout": {"fields": {"model.dropout": 0.0}},
    "dropout of 16 bits": {"replaces": "dropout"},
    "10 steps a dispatch": {"steps": 10},
    "small arrays packed": {"replaces": "packing"},
    "norms computed again": {"replaces": "norms"},
    "flax's norms": {"replaces": "flax's norms"},
    "cuDNN's attention": {"replaces": "attention"},
    "latency hiding": {"flags": "--xla_gpu_enable_latency_hiding_scheduler=true"},
    "no Triton products": {"flags": "--xla_gpu_enable_triton_gemm=false"},
    "convolutions in NHWC": {"flags": "--xla_gpu_force_conv_nhwc=true"},
    "convolutions in NCHW": {"flags": "--xla_gpu_force_conv_nchw=true"},
    "deterministic": {"flags": "--xla_gpu_deterministic_ops=true"},
    "float32": {"fields": {"model.dtype": "float32"}},
    # The last one: it may take longer than a phase.
    "exhaustive tiling": {"flags": "--xla_gpu_exhaustive_tiling_search=true"},
}


def sixteen_bits(x, rate, keys, tag):
    """unet.per_example_dropout with half of the random bits; the rate is a multiple of 2^-16.

    Of jax.random.bits, 16 bits cost as much as 32. The number of channels is even.
    """
    *positions, channels = x.shape[1:]
    threshold, shape = round(rate * 2**16), (*positions, channels // 2)

    def keep_mask(key):
        words = jax.random.bits(jax.random.fold_in(key, tag), shape, jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
        return halves.reshape(x.shape[1:]) >= threshold

    return jnp.where(jax.vmap(keep_mask)(keys), x / (1 - threshold / 2**16), 0)


def cudnn_attention(query, key, value, implementation="cudnn"):
    """unet.attend by one kernel, which keeps no [N, N] weights for the backward pass."""
    arrays = (x[:, :, None] for x in (query, key, value))  # as one head each
    return jax.nn.dot_product_attention(*arrays, implementation=implementation)[:, :, 0]


# {name: (module, attribute, what to put there)}.
REPLACED = {
    "dropout": (unet, "per_example_dropout", sixteen_bits),
    "attention": (unet, "attend", cudnn_attention),
    "packing": (packing, "pack", packing.packed),
    # The backward pass computes a norm's output again: there is less to write and to read.
    "norms": (unet, "GroupNorm", unet.nn.remat(unet.GroupNorm)),
    # One sum over positions and channels of a group, instead of two.
    "flax's norms": (unet, "GroupNorm", unet.nn.GroupNorm),
}


def make_work(config, steps):
    """(work, state): work(state) → state does some steps with one dispatch, on random images.

    With several steps, the images of all are on the device before, as those of a dataset would be.
    """
    model, optimizer = configs.make_model(config), states.make_optimizer(config.optim, 10**6)
    state = parallel.replicate(states.create_state(config, model, optimizer))
    size = config.train.batch_size
    one = objective.make_step(config, model, configs.make_schedule(config), optimizer)

    def update(state, x):
        state, metrics = one(state, data.Batch(x, None))
        return state, metrics["loss"]

    def several(state, images):
        return jax.lax.scan(update, state, images)

    run = parallel.pmap(
        update if steps == 1 else several,
        in_axes=(None, 0), out_axes=(None, None), donate_argnums=0,
    )  # fmt: skip
    x = contestants.random_images(config, steps * size)
    devices = jax.local_device_count()
    batches = x.reshape(devices, steps, size // devices, *x.shape[1:])
    batches = batches[:, 0] if steps == 1 else parallel.pmap(lambda x: x)(batches)
    return lambda state: run(state, batches)[0], packing.pack(state)


def measure(case):
    """Measures one candidate in this process, on one GPU; returns a line's fields."""
    contestants.use_one_gpu()
    compilation.keep_programs()  # a candidate that had no time left goes on from there
    # XLA's own caches do not tell its flags apart, of which some candidates consist.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    config = configs.named_config(case["config"])
    config.update_from_flattened_dict({"model.dtype": "bfloat16", **case.get("fields", {})})
    config.train.batch_size = case["size"] * case.get("batch", 1)
    cpu.prepare(configs.positions(config, "train"))
    cpu.use_cores(config.train.batch_size)
    steps, seconds = case.get("steps", 1), []
    with contextlib.ExitStack() as stack:
        if "replaces" in case:
            stack.enter_context(mock.patch.object(*REPLACED[case["replaces"]]))
        start = time.perf_counter()
        work, state = make_work(config, steps)
        state = jax.block_until_ready(work(work(state)))
        warm, end = time.perf_counter() - start, time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            state = jax.block_until_ready(work(state))
            seconds.append((time.perf_counter() - start) / steps)
    rate = config.train.batch_size / float(np.median(seconds))
    found = {"images_per_second": rate, "batch_size": config.train.batch_size, "warm": warm}
    if case["config"] == "cifar10" and not cpu.is_used():
        flops = contestants.matrix_rate()
        found |= {"matrix_flops": flops, "share": contestants.TRAIN_FLOPS * rate / flops}
    if case["name"] == "as it is":
        try:
            found["trace"] = trace(lambda: jax.block_until_ready(work(state)))
        except Exception as error:  # the rate is worth more than the profiler's answer
            found["trace_failed"] = repr(error)[:300]
    return found


def trace(work, most=25):
    """Where the time of one call goes: {operation: milliseconds}, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_device = [plane for plane in planes if "GPU" in plane.name] or planes
    total = collections.Counter()
    for plane in on_device:
        for line in plane.lines:
            for event in line.events:
                total[event.name[:80]] += event.duration_ns / 1e6
    return {name: round(ms, 3) for name, ms in total.most_common(most)}


def profile(flags):
    """Measures each candidate in a process of its own; yields the lines."""
    deadline = time.monotonic() + 60 * flags.minutes
    known = [{name: line.get(name) for name in ("device", "phase", "name", "config", "size")}
             for line in read(flags.out) if "failed" not in line]  # fmt: skip
    for name in tqdm(flags.only or CANDIDATES, "profile", unit="candidate"):
        asked = {"name": name, "config": flags.config, "size": flags.batch}
        if {"device": flags.device, "phase": "profile", **asked} in known:
            continue
        case = asked | CANDIDATES[name]
        left = deadline - time.monotonic()
        if left < 5:
            print(f"{name}: no time left; the same command goes on")
            return
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {case.pop('flags', '')}".strip()
        command = [sys.executable, "-m", "benchmarks.gpu", "measure", "--case", json.dumps(case)]
        try:
            done = subprocess.run(
                command, timeout=left, capture_output=True, text=True,
                env={**os.environ, "XLA_FLAGS": xla_flags, "JAX_TRACEBACK_FILTERING": "off"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name}: no time left; the same command goes on")
            return
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        text = last[0] if last else f"exit code {done.returncode}"
        found = json.loads(text) if done.returncode == 0 else {"failed": text[:300]}
        yield {**asked, "flags": xla_flags, **found}


def main_for(flags, seconds, *arguments):
    """Runs main.py; after so many seconds it gets SIGTERM, and saves. Returns its exit code.

    An error of the user ends this program, too.
    """
    command = [sys.executable, str(MAIN), *arguments, f"--workdir={flags.workdir}", *flags.rest]
    print(" ".join(command[1:]), flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code == 2:
        sys.exit(code)
    return code


def train(flags):
    """Trains for some minutes; yields one line."""
    path = MAIN.parent / "configs" / f"{flags.config}.py"
    start = time.monotonic()
    code = main_for(flags, 60 * flags.minutes, f"--config={path}", "--config.model.dtype=bfloat16")
    lines = [line for line in run_files.read_metrics(flags.workdir) if "images_per_second" in line]
    size = run_files.saved_config(flags.workdir).train.batch_size
    newest = lines[-1] if lines else {"step": 0}
    yield {"exit_code": code, "minutes": (time.monotonic() - start) / 60, "batch_size": size,
           "images_seen": newest["step"] * size, **newest}  # fmt: skip


def score(flags):
    """Evaluates the run with a fast sampler; yields one line, if it came to its end."""
    few = ["--config.sample.sampler=dpmpp_sde", "--config.sample.num_steps=20"]
    start, path = time.time(), pathlib.Path(flags.workdir) / "evaluation.json"
    code = main_for(flags, 60 * flags.minutes, "--mode=evaluate", *few)
    if path.exists() and path.stat().st_mtime > start:
        yield {"exit_code": code, **json.loads(path.read_text())}
    else:
        print("not evaluated to the end; the same command goes on")


def device_name():
    """The name of the device, as another process finds it."""
    code = "from benchmarks.__main__ import device_name; print(device_name())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.strip().splitlines()[-1]


def read(path):
    """The lines of a file of JSON lines."""
    path = pathlib.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names_of(text):
    """The candidates in a text."""
    names = text.split(",")
    if unknown := set(names) - set(CANDIDATES):
        choices = ", ".join(CANDIDATES)
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {choices}")
    return names


def main():
    """Runs a phase and appends its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=["profile", "train", "score", "measure"])
    parser.add_argument("--config", default="cifar10", help="the name of a config")
    parser.add_argument("--batch", type=int, default=128, help="images of a step (profile)")
    parser.add_argument("--only", type=names_of, help="candidates, separated by commas (profile)")
    parser.add_argument("--minutes", type=float, default=8, help="the phase takes no longer")
    parser.add_argument("--workdir", default="runs/gpu", help="the folder of the run")
    parser.add_argument("--out", default="runs/gpu.jsonl", help="the file to append to")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    flags, flags.rest = parser.parse_known_args()
    if flags.phase == "measure":
        print(json.dumps(measure(json.loads(flags.case))))
        return
    flags.device = device_name()
    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPU to its children
    pathlib.Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    for found in {"profile": profile, "train": train, "score": score}[flags.phase](flags):
        line = {"phase": flags.phase, "device": flags.device, "date": str(datetime.date.today())}
        with open(flags.out, "a") as file:
            file.write(json.dumps(line | found) + "\n")
        print(json.dumps(found)[:500], flush=True)


if __name__ == "__main__":
    main()
