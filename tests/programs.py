"""main.py as a user starts it: as a process, or several."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = f"--config={ROOT}/configs/digits.py"
# A network and a chain that take no time.
TINY = (
    "--config.model.channels=8",
    "--config.model.norm_groups=4",
    "--config.model.channel_mults=(1,)",
    "--config.model.attention_down=()",
    "--config.model.attention_up=()",
    "--config.diffusion.num_timesteps=20",
    "--config.optim.decay=constant",
    "--config.train.batch_size=32",
    "--config.train.log_every=2",
    "--config.train.eval_every=10",
    "--config.train.score_every=0",
)


def start(*arguments, cwd, devices=2):
    """Starts main.py in another folder than the repository's."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def result(process, seconds=300):
    """(exit code, output) of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out + err


def finish(*arguments, cwd, devices=2):
    """Runs main.py: (exit code, output)."""
    return result(start(*arguments, cwd=cwd, devices=devices))


def start_several(*arguments, cwd, count=2, devices=2):
    """Starts main.py as several connected processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [
        start(*arguments, *flags, f"--process_id={i}", cwd=cwd, devices=devices)
        for i in range(count)
    ]


def finish_several(*arguments, cwd, count=2, devices=2):
    """Runs main.py as several processes: a list of (exit code, output)."""
    processes = start_several(*arguments, cwd=cwd, count=count, devices=devices)
    return [result(process) for process in processes]
