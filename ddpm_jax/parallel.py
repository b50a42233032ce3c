"""Devices and processes: one batch axis, and functions pmapped over it.

A function under `pmap` gets one device's shard of a batch. It may average over the devices with
`lax.pmean(…, AXIS)`, and `example_indices` gives the indices of its examples in the global batch.

Several processes, on one machine or many, run the same program with the same arguments and make the
same calls in the same order. Each process gives its devices the `local_shard` of every global
batch. All read the same folder; only the first writes there (Orbax's checkpoints excepted). A
single process is the first process.
"""

import atexit
import contextlib
import functools
import logging
import os
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

log = logging.getLogger(__name__)

AXIS = "batch"
LOST = (
    "a process was lost, or cannot be reached; start all processes again to resume from the newest "
    "checkpoint"
)
TOO_LARGE = (
    "not enough memory; use a smaller batch_size, or to train optim.accumulate and model.remat"
)

pmap = functools.partial(jax.pmap, axis_name=AXIS)


@contextlib.contextmanager
def connected(coordinator=None, num_processes=None, process_id=None):
    """Connects to the other processes while the context lasts; call it before JAX is used.

    Args:
      coordinator: host:port of the first process. None, like the other arguments, if Slurm,
        Kubernetes or Open MPI started the processes: JAX reads their variables.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.

    Raises:
      UserError: if they cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", False)  # signals.py catches SIGTERM itself
    # When another process is lost, JAX's own thread ends this process with a stack trace, before
    # Python can print a message. So a child process prints it, unless it reads "all is well".
    code = "import sys; sys.stdin.read() or print('error:', sys.argv[1], file=sys.stderr)"
    command = [sys.executable, "-c", code, LOST]
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)
    try:
        _initialize(coordinator, num_processes, process_id)
        barrier()  # Gloo connects at the first collective, which times out after 30 seconds
        yield
    except Exception as error:
        # JAX's own exit would wait for the other processes.
        atexit.register(os._exit, 2 if isinstance(error, UserError) else 1)
        raise
    finally:
        witness.communicate("all is well")


def check_devices():
    """Raises a UserError if JAX cannot use the platform in JAX_PLATFORMS."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        text = one_line(error)[:200] or "none is installed"
        raise UserError(f"JAX_PLATFORMS={platforms}: no such device ({text}); unset it") from None
    plugins = [plugin.name for plugin in entry_points(group="jax_plugins")]
    if plugins and jax.default_backend() == "cpu" and not jax.config.jax_platforms:
        text = "JAX has the plugin %s but finds no such device, so this runs on the CPU; "
        log.warning(text + "JAX_PLATFORMS=cpu says that it shall", plugins[0])


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
        text = f"--distributed: {one_line(error)[:300]}"
        if coordinator is None:
            flags = "--coordinator, --num_processes and --process_id"
            text += f" (without Slurm, Kubernetes or Open MPI, give {flags})"
        raise UserError(text) from None


def explain(error):
    """A message for the user about a JaxRuntimeError; empty for an unexpected error."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return TOO_LARGE
    network = any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE"))
    return LOST if jax.distributed.is_initialized() and network else ""


def exit_process(code):
    """Ends this process after a failure, without waiting for the other processes."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_first():
    """Whether this is the first process, which writes files and prints."""
    return jax.process_index() == 0


def _collective(function, *args, **options):
    """Calls a function of multihost_utils; it raises a ValueError when a process is lost."""
    try:
        return function(*args, **options)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"{LOST} ({one_line(error)[:200]})") from None


def barrier():
    """Waits until all processes call it."""
    _collective(multihost_utils.sync_global_devices, "barrier")


@contextlib.contextmanager
def first_process_first():
    """The first process runs the context's body; then the other processes do."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def broadcast_from_first(number):
    """Returns the first process's int in all processes."""
    return int(_collective(multihost_utils.broadcast_one_to_all, np.int32(number)))


_pmax = pmap(lambda x: jax.lax.pmax(x, AXIS), out_axes=None)


def max_over_processes(number):
    """The maximum of the processes' ints: an int32 scalar, computed asynchronously."""
    return _pmax(np.full(jax.local_device_count(), number, np.int32))


def check_batch_size(field, batch_size, microbatches):
    """Raises a UserError unless the global batch divides evenly over the devices.

    Args:
      field: the name of its field.
      batch_size: the global batch size.
      microbatches: per device, optim.accumulate.
    """
    devices = jax.device_count()
    if batch_size % (devices * microbatches):
        times = f" times optim.accumulate={microbatches}" if microbatches > 1 else ""
        raise UserError(f"{field}={batch_size}: must be a multiple of the {devices} devices{times}")


def device_memory():
    """Bytes of a device's memory: on a CPU, its share of the free memory; 0 if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else 0


def replicated(devices=None):
    """The replicated sharding over these devices, by default all of this process."""
    return NamedSharding(Mesh(devices or jax.local_devices(), (AXIS,)), PartitionSpec())


def replicate(tree, devices=None):
    """Puts a copy of every array on each device.

    Args:
      tree: a pytree of arrays.
      devices: by default all of this process.

    Returns:
      The tree, for pmap with in_axes=None (with uncommitted arrays it would compile twice).
    """
    return jax.device_put(tree, replicated(devices))


def as_global(tree):
    """Converts arrays replicated in each process to arrays replicated over all, for Orbax."""
    return _replicated_over(jax.devices(), tree)


def as_local(tree):
    """The inverse of as_global, for pmap."""
    return _replicated_over(jax.local_devices(), tree)


def _replicated_over(devices, tree):
    """The same copies as arrays that are replicated over other devices."""
    if jax.process_count() == 1:
        return tree
    sharding = replicated(devices)

    def convert(array):
        copies = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, copies)

    return jax.tree.map(convert, tree)


def local_shard(tree):
    """This process's equal share of global batches [B, ...], in the order of the processes."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return tree
    return jax.tree.map(lambda a: a[len(a) * index // count : len(a) * (index + 1) // count], tree)


def shard(tree, num_devices=None):
    """Reshapes this process's arrays [B, ...] to [devices, B / devices, ...], for in_axes=0."""
    devices = num_devices or jax.local_device_count()
    return jax.tree.map(lambda array: array.reshape(devices, -1, *array.shape[1:]), tree)


def gather(tree):
    """Converts pmap's outputs [devices, B / devices, ...] to NumPy arrays [B, ...] of the global
    batch, in every process."""

    def to_numpy(array):
        array = np.asarray(array)
        array = array.reshape(-1, *array.shape[2:])
        if jax.process_count() == 1:
            return array
        return _collective(multihost_utils.process_allgather, array, tiled=True)

    return jax.tree.map(to_numpy, tree)


def example_indices(local_batch):
    """Inside pmap: the indices [local_batch] of this device's examples in the global batch."""
    return jax.lax.axis_index(AXIS) * local_batch + jnp.arange(local_batch)
