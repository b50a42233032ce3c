"""Compiled programs are kept in a folder, so that the next command need not compile them again."""

import hashlib
import logging
import os
import pathlib
import platform
import stat

import jax

from ddpm_jax import cpu

log = logging.getLogger(__name__)

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
FOLDER = "~/.cache/ddpm_jax/programs"
MOST_BYTES = 2**30
SHORTEST = 0.0  # seconds; JAX's default of 1 leaves out many of a command's programs


def keep_programs():
    """Turns on JAX's persistent compilation cache; call it before JAX compiles.

    The environment variable JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty.
    Each kind of processor has a folder of its own, since JAX does not tell them apart: several
    machines may share the home. Programs that were not used for the longest time are deleted when
    all take more than 1 GiB.

    Of several processes, only the first would find its programs; the others would compile, and on
    GPUs wait for results of its autotuning. So it does nothing if they are connected already.
    """
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:
        return
    if jax.distributed.is_initialized():
        return
    name = hashlib.sha256(_processor().encode()).hexdigest()[:16]
    try:
        root = pathlib.Path(FOLDER).expanduser()
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        delete_oldest(root, MOST_BYTES)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # a RuntimeError: there is no home
        writable = False
    if not writable:
        log.warning("%s cannot be written, so compiled programs are not kept; %s=… names "
                    "another folder, an empty one turns this off", FOLDER, VARIABLE)  # fmt: skip
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)


def delete_oldest(root, most_bytes):
    """Deletes the files in a folder that were not used for the longest time, until the rest take at
    most this much. Other processes may use the folder at the same time."""
    files = []
    for path in root.rglob("*"):  # on GPUs, XLA has folders of its own in JAX's
        try:
            status = path.stat()
        except FileNotFoundError:  # deleted by another process
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        # A file system may note the time of reading once a day, or never.
        files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(size for _, size, _ in files)
    for _, bytes_of_file, path in sorted(files):
        if size <= most_bytes:
            return
        path.unlink(missing_ok=True)
        size -= bytes_of_file


def _processor():
    """What compiled code may depend on: the processor's model and instructions."""
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = (line for line in cpu.cpuinfo().splitlines() if line.startswith(names))
    return "\n".join([platform.machine(), *sorted(set(lines))])
