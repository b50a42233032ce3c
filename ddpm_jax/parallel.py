"""Every line that knows about devices or processes: one batch axis, and functions pmapped over it.

Functions that run under `pmap` see one device's part of a batch, may average over the axis with
`lax.pmean(…, AXIS)`, and learn which examples they hold from `example_indices`.

Several processes, on one machine or many, run the same program with the same arguments and do the
same things in the same order. Each feeds its devices `part` of every global batch; all read the
same folder, and (but for Orbax's checkpoints) only the first writes there. A lone process is the
first of one.
"""

import atexit
import contextlib
import ctypes
import functools
import math
import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import entry_points

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError, one_line

AXIS = "batch"
LOST = (
    "a process was lost, or cannot be reached; start all of them again, and the run goes on from "
    "its newest checkpoint"
)
TOO_LARGE = (
    "not enough memory; use a smaller batch_size, or to train optim.accumulate and model.remat"
)

pmap = functools.partial(jax.pmap, axis_name=AXIS)


def cpuinfo():
    """What Linux says of the CPUs; elsewhere nothing."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def prepare_cpu(trains):
    """Sets what XLA and glibc should do otherwise where no accelerator is; before JAX is used.

    XLA takes what keeps the parts of model.remat and optim.accumulate apart for superfluous on a
    CPU, before it plans the memory. It leaves convolutions to YNNPACK, which without AVX-512 is
    slower than XLA itself, by up to 30 times for the gradients of the weights: with XLA's own,
    MNIST's network trains 1.8 times as fast, that of the 8×8 digits 1.3 times; CIFAR-10's, whose
    3×3 convolutions are mostly Winograd's, as before. Of YNNPACK's sums, a step gains (without
    them: MNIST 0.76, CIFAR-10 0.85, digits 0.97) and sampling loses (1.05 to 1.2 times as fast
    without). Flags in XLA_FLAGS have precedence.

    And glibc is to keep what a step has freed for the next one: to hand it back, and get it again
    full of zeros, takes 5 to 10 % of a step of CIFAR-10's network.

    Args:
      trains: bool, whether the program is to train.
    """
    if entry_points(group="jax_plugins"):
        return
    wanted = {"--xla_disable_hlo_passes": "cse_barrier_expander"}
    cpu = cpuinfo()
    if platform.machine() == "x86_64" and cpu and "avx512f" not in cpu:
        sums = ",LIBRARY_FUSION_TYPE_REDUCE" if trains else ""
        left_to_ynnpack = f"LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT{sums}"
        wanted["--xla_cpu_experimental_ynn_fusion_type"] = left_to_ynnpack
    given = os.environ.get("XLA_FLAGS", "")
    added = (f"{flag}={value}" for flag, value in wanted.items() if flag not in given)
    os.environ["XLA_FLAGS"] = " ".join((given, *added))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 1)  # M_ARENA_MAX: only the first one can keep large blocks
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def use_cpu_cores(*batch_sizes):
    """Makes several devices of a CPU's cores; call it before JAX is used.

    XLA spreads only large operations over the cores. Data parallelism spreads all of them: training
    on two cores was 1.4 to 1.5 times as fast (MNIST and digits networks). The environment variable
    JAX_NUM_CPU_DEVICES has precedence.

    Args:
      batch_sizes: as many cores are used as divide all of these, and leave 16 examples to each.
    """
    if jax.config.jax_num_cpu_devices > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common = math.gcd(*batch_sizes)
    fitting = (n for n in range(1, cores + 1) if common % n == 0 and common // n >= 16)
    jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


@contextlib.contextmanager
def connected(coordinator=None, num_processes=None, process_id=None):
    """Joins the other processes, for as long as the context lasts; before JAX is used.

    Args:
      coordinator: host:port of the first process; None, like the rest, where Slurm, Kubernetes or
        Open MPI has started the processes and says it.
      num_processes: how many there are.
      process_id: this one's number, from 0.

    Raises:
      UserError: if they cannot be found.
    """
    jax.config.update("jax_enable_preemption_service", False)  # train.py catches SIGTERM itself
    # When another process is lost, JAX ends this one from a thread of its own, with a stack trace
    # and before Python can say anything. So a child does, unless it hears that all is well.
    code = "import sys; sys.stdin.read() or print('error:', sys.argv[1], file=sys.stderr)"
    command = [sys.executable, "-c", code, LOST]
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)
    try:
        _initialize(coordinator, num_processes, process_id)
        barrier()  # Gloo connects at the first meeting, and then waits for 30 seconds only
        yield
    except Exception:
        atexit.register(os._exit, 1)  # JAX's own way out would wait for the others
        raise
    finally:
        witness.communicate("all is well")


def check_devices():
    """Raises a UserError if JAX has none of the devices that it is asked for."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        text = one_line(error)[:200] or "none is installed"
        raise UserError(f"JAX_PLATFORMS={wanted}: no such device ({text}); or unset it") from None


def _initialize(coordinator, num_processes, process_id):
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed: {one_line(error)[:300]}") from None


def explanation(error):
    """What a JaxRuntimeError means to the user; empty where that is not known."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return TOO_LARGE
    of_others = any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE"))
    return LOST if jax.distributed.is_initialized() and of_others else ""


def leave(code):
    """Ends this process, which failed; the others, who count on it, need not be waited for."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_first():
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def _together(function, *args, **options):
    """Calls a function of multihost_utils, which says ValueError when a process is lost."""
    try:
        return function(*args, **options)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"{LOST} ({one_line(error)[:200]})") from None


def barrier():
    """Waits until all processes are here."""
    _together(multihost_utils.sync_global_devices, "barrier")


@contextlib.contextmanager
def first_goes_first():
    """What is done inside, the first process has done before the others begin."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def of_first(number):
    """What the first process says, int, in all of them."""
    return int(_together(multihost_utils.broadcast_one_to_all, np.int32(number)))


_largest = pmap(lambda x: jax.lax.pmax(x, AXIS), out_axes=None)


def largest(number):
    """The largest of what the processes say, an int32 scalar that is still being computed."""
    return _largest(np.full(jax.local_device_count(), number, np.int32))


def check_batch_size(field, batch_size, parts=1):
    """Raises a UserError unless the global batch divides evenly over the devices.

    Args:
      field: its name.
      batch_size: its size.
      parts: into which each device's part is cut again, optim.accumulate.
    """
    devices = jax.device_count()
    if batch_size % (devices * parts):
        times = f" times optim.accumulate={parts}" if parts > 1 else ""
        raise UserError(f"{field}={batch_size}: must be a multiple of the {devices} devices{times}")


def memory_of_a_device():
    """How many bytes it has in all; on a CPU, where they share, its part of what is free; 0 if it
    does not say."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else 0


def replicated(devices=None):
    """The sharding of an array that each of these devices, by default all of this process, has a
    whole copy of."""
    return NamedSharding(Mesh(devices or jax.local_devices(), (AXIS,)), PartitionSpec())


def replicate(tree, devices=None):
    """Puts a whole copy of every array on each device.

    Args:
      tree: a pytree of arrays.
      devices: where to; all of this process by default.

    Returns:
      The tree, as arrays that pmap takes with in_axes=None as they are (uncommitted arrays would
      make it compile a second time).
    """
    return jax.device_put(tree, replicated(devices))


def as_global(tree):
    """Replicated arrays of each process's devices as ones of all devices, which Orbax wants."""
    if jax.process_count() == 1:
        return tree
    everywhere = replicated(jax.devices())

    def one(array):
        copies = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, everywhere, copies)

    return jax.tree.map(one, tree)


def as_local(tree):
    """The inverse of as_global, and what pmap wants."""
    if jax.process_count() == 1:
        return tree

    def one(array):
        copies = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, replicated(), copies)

    return jax.tree.map(one, tree)


def part(tree):
    """This process's examples of global batches [B, ...]: equally many, in the processes' order."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return tree
    return jax.tree.map(lambda a: a[len(a) * index // count : len(a) * (index + 1) // count], tree)


def split(tree, num_devices=None):
    """This process's arrays [B, ...] to [devices, B / devices, ...], for pmap with in_axes=0."""
    devices = num_devices or jax.local_device_count()
    return jax.tree.map(lambda array: array.reshape(devices, -1, *array.shape[1:]), tree)


def merge(tree):
    """What pmap gives back, [devices, B / devices, ...], as NumPy arrays [B, ...] of the whole
    global batch, in every process."""

    def one(array):
        array = np.asarray(array)
        array = array.reshape(-1, *array.shape[2:])
        if jax.process_count() == 1:
            return array
        return _together(multihost_utils.process_allgather, array, tiled=True)

    return jax.tree.map(one, tree)


def example_indices(local_batch):
    """Inside pmap: the places in the global batch, [local_batch], of this device's examples."""
    return jax.lax.axis_index(AXIS) * local_batch + jnp.arange(local_batch)
