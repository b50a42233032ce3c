"""All that one kind of processor, the CPU, needs: flags, devices, and wide convolutions.

Wide 3×3 convolutions are computed by Winograd's method (Winograd 1980; Lavin & Gray 2016). Two
neighbouring outputs y of a kernel of three, F(2, 3), are linear in four inputs d and three weights
g, with four products instead of six:

    m = (Bᵀ d) · (G g),  y = Aᵀ m

Along both axes that makes 16 products instead of 36 for a 2×2 tile of y. Over all tiles of a
feature map, each of the 16 is a matrix product over the channels, which a CPU does best.
"""

import ctypes
import functools
import math
import os
import pathlib
import platform
from importlib.metadata import entry_points

import jax
import jax.numpy as jnp


def is_used():
    """Whether computations run on CPUs, where a gradient inside a loop takes a dozen times as long
    as one that is unrolled."""
    return jax.default_backend() == "cpu"


def cpuinfo():
    """What Linux says of the CPUs; elsewhere nothing."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def prepare(trains):
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


def use_cores(*batch_sizes):
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


def convolve(x, kernel, strides, padding, **options):
    """lax.conv_general_dilated of a 3×3 kernel; on a CPU by Winograd's method where that is faster.

    Measured on 2 cores: with 128 channels or more it takes CIFAR-10's network at batch 8 from 3.9
    to 4.8 training images/s; with 64 it makes the forward pass of the digits' 1.13 times as fast,
    but a training step slower (0.75), so that only what is not differentiated comes that way; with
    32, or fewer than 256 places in a batch, it gains nothing.
    """

    def direct(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    *places, channels = x.shape
    tiles = strides == (1, 1) and places[1] % 2 == places[2] % 2 == 0 and math.prod(places) >= 256
    width = min(channels, kernel.shape[-1])
    if not tiles or width < 64 or x.dtype != jnp.float32 or not is_used():
        return direct(x, kernel)
    if width >= 128:
        return conv3x3_winograd(x, kernel)
    forward_only = jax.custom_vjp(conv3x3_winograd)
    forward_only.defvjp(functools.partial(jax.vjp, direct), lambda vjp, dy: vjp(dy))
    return forward_only(x, kernel)


def _split(x, axis):
    """The even and the odd places of an axis."""
    shape = x.shape
    x = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return (jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in (0, 1))


def _join(even, odd, axis):
    """The inverse of _split."""
    x = jnp.stack([even, odd], axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _shift(x, axis, by):
    """x moved along an axis; zeros follow it."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _inputs(x, axis):
    """Bᵀ d of every second place of a padded axis; a new first axis [4]."""
    even, odd = _split(x, axis)
    count = even.shape[axis] - 1
    d0, d2 = (jax.lax.slice_in_dim(even, i, i + count, axis=axis) for i in (0, 1))
    d1, d3 = (jax.lax.slice_in_dim(odd, i, i + count, axis=axis) for i in (0, 1))
    return jnp.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3])


def _inputs_transposed(m, axis):
    """The transpose of _inputs and of the padding by one place at either end."""
    d0, d1, d2, d3 = m[0], m[1] - m[2] + m[3], m[1] + m[2] - m[0], -m[3]
    return _join(d1 + _shift(d3, axis, 1), d2 + _shift(d0, axis, -1), axis)


@jax.custom_vjp
def _tiles(x):
    """[B, H, W, C] → [4, 4, B, H/2, W/2, C]."""
    # Zeros that are shifted in, as below, XLA would fuse with the sums, which then take 4 times as
    # long.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.moveaxis(_inputs(_inputs(x, 1), 3), 0, 1)


def _tiles_transposed(_, m):
    return (_inputs_transposed(jax.vmap(lambda columns: _inputs_transposed(columns, 2))(m), 1),)


# What JAX derives takes 5 % more of a train step: every slice becomes a padded array of its own.
_tiles.defvjp(lambda x: (_tiles(x), None), _tiles_transposed)


def _weights(g, axis):
    """G g; in place of an axis [3] one of [4]."""
    g0, g1, g2 = jnp.moveaxis(g, axis, 0)
    return jnp.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2], axis)


def _outputs(m, axis):
    """Aᵀ m of the first axis [4]."""
    return _join(m[0] + m[1] + m[2], m[1] - m[2] - m[3], axis)


@jax.checkpoint  # what is made of x and the kernel takes 4 and 1.8 times their memory
def conv3x3_winograd(x, kernel):
    """A 3×3 convolution of stride 1 with SAME padding, with 2.25 times fewer multiplications.

    Args:
      x: [B, H, W, C]; H and W are even.
      kernel: [3, 3, C, K].

    Returns:
      [B, H, W, K].
    """
    channels, features = kernel.shape[2:]
    tiles, kernel = _tiles(x), _weights(_weights(kernel, 0), 1)
    products = tiles.reshape(16, -1, channels) @ kernel.reshape(16, channels, features)
    products = products.reshape(*tiles.shape[:-1], features)
    return _outputs(jax.vmap(lambda columns: _outputs(columns, 2))(products), 1)
