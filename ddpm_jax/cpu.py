"""Everything specific to CPUs: flags, devices, and a faster algorithm for wide convolutions.

Wide 3×3 convolutions use Winograd's algorithm (Winograd 1980; Lavin & Gray 2016). F(2, 3) computes
two neighbouring outputs y of a kernel of size three from four inputs d and three weights g, with
four multiplications instead of six:

    m = (Bᵀ d) · (G g),  y = Aᵀ m

Along both axes, a 2×2 tile of y takes 16 multiplications instead of 36. Over all tiles of a feature
map, each of the 16 is a matrix product over the channels, for which CPUs are fast.
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

from ddpm_jax import onednn

FEW_POSITIONS = 2**15  # in a batch; 64 digits have 4,096, 64 images of MNIST 50,176


def is_used():
    """Whether JAX computes on CPUs, where a gradient inside a `lax` loop takes about 12 times as
    long as in an unrolled loop."""
    return jax.default_backend() == "cpu"


def cpuinfo():
    """The text of /proc/cpuinfo; empty if the system is not Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def prepare(trains, positions=math.inf):
    """Sets XLA and glibc options if there is no accelerator; call it before JAX is used.

    On a CPU, XLA removes the optimization barriers of model.remat and optim.accumulate before it
    plans the memory, so this pass is disabled. XLA uses YNNPACK for convolutions. Without AVX-512
    this is slower than XLA's own code, by up to 30 times for weight gradients. With XLA's own code,
    MNIST's network trains 1.8 times as fast and that of the 8×8 digits 1.3 times; CIFAR-10's speed
    does not change, since most of its 3×3 convolutions use Winograd's algorithm. YNNPACK's
    reductions make training faster (without them the speed is 0.76 times for MNIST, 0.85 for
    CIFAR-10, 0.97 for the digits) but sampling slower (1.05 to 1.2 times as fast without them).
    Flags in XLA_FLAGS have precedence.

    glibc is told to keep freed memory for the next step: returning it to the system, and getting it
    back filled with zeros, takes 5 to 10 % of a step of CIFAR-10's network. Large blocks are kept
    in its first arena only, so there is one arena; with more, MNIST's network trains 0.9 times as
    fast. But after compiling, that arena has many free blocks to search, under one lock: with more
    arenas, the digits' network trains 1.2 to 2 times and samples 1.04 to 1.4 times as fast, so it
    has them.

    Args:
      trains: bool, whether the program trains.
      positions: images × pixels of a batch, if the program knows them.
    """
    if entry_points(group="jax_plugins"):
        return
    flags = {"--xla_disable_hlo_passes": "cse_barrier_expander"}
    cpu = cpuinfo()
    if platform.machine() == "x86_64" and cpu and "avx512f" not in cpu:
        reductions = ",LIBRARY_FUSION_TYPE_REDUCE" if trains else ""
        for_ynnpack = f"LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT{reductions}"
        flags["--xla_cpu_experimental_ynn_fusion_type"] = for_ynnpack
    user_flags = os.environ.get("XLA_FLAGS", "")
    added = (f"{flag}={value}" for flag, value in flags.items() if flag not in user_flags)
    os.environ["XLA_FLAGS"] = " ".join((user_flags, *added))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if positions > FEW_POSITIONS:
            mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-4, 0)  # M_MMAP_MAX: do not map blocks one by one
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def use_cores(*batch_sizes):
    """Makes each CPU core a device; call it before JAX is used.

    XLA parallelizes only large operations. Data parallelism over the cores parallelizes everything:
    on two cores, training was 1.4 to 1.5 times as fast (MNIST and digits networks). The environment
    variable JAX_NUM_CPU_DEVICES has precedence.

    Args:
      batch_sizes: the number of devices divides all of these, with at least 16 examples for each.
    """
    if jax.config.jax_num_cpu_devices > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common = math.gcd(*batch_sizes)
    fitting = (n for n in range(1, cores + 1) if common % n == 0 and common // n >= 16)
    jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def convolve(x, kernel, strides, padding, **options):
    """lax.conv_general_dilated of a 3×3 kernel; on a CPU by the fastest of three ways.

    Winograd's algorithm: measured on 2 cores, with 128 channels or more, CIFAR-10's network at
    batch 8 trains on 4.8 instead of 3.9 images/s. With 64 channels, the forward pass of the digits'
    network is 1.13 times as fast but a training step is slower (0.75 times), so only
    undifferentiated convolutions use it. With 32 channels, or fewer than 256 positions in a batch,
    it is no faster.

    oneDNN (see onednn.py), where a gradient is taken: MNIST's network trains 1.05 times as fast on
    an AMD with AVX-512, the digits' as before, so only large convolutions use it. With bfloat16, on
    processors that have instructions for it, CIFAR-10's network trains 1.3 times as fast as without
    it, and 1.04 times as fast as with float32.
    """

    def direct(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    if not is_used() or strides != (1, 1):
        return direct(x, kernel)
    *positions, channels = x.shape
    count, (height, width) = math.prod(positions), positions[1:]
    channels = min(channels, kernel.shape[-1])
    plain, differentiated = direct, direct
    if x.dtype == jnp.float32 and height % 2 == width % 2 == 0 and count >= 256 and channels >= 64:
        if channels >= 128:
            return conv3x3_winograd(x, kernel)
        plain = conv3x3_winograd
    pays = {"float32": count >= 4096, "bfloat16": has_bfloat16()}
    if pays.get(x.dtype.name) and channels >= 8 and onednn.works(x.dtype.name):
        differentiated = onednn.convolve
    if plain is differentiated:
        return direct(x, kernel)
    chosen = jax.custom_vjp(plain)
    chosen.defvjp(functools.partial(jax.vjp, differentiated), lambda vjp, dy: vjp(dy))
    return chosen(x, kernel)


def convolve_forward(x, kernel, strides, padding, **options):
    """lax.conv_general_dilated of a network that is not trained; on a CPU by oneDNN.

    Measured on 2 cores, images/s of the Inception network: 12.2 without it and 16.3 with it on an
    AMD with AVX-512; 13.5 and 15.0 there when both are limited to AVX2.
    """
    odd = all(n % 2 for n in kernel.shape[:2])
    fits = padding == "VALID" or (padding == "SAME" and strides == (1, 1) and odd)
    if is_used() and fits and x.dtype == jnp.float32 and onednn.works("float32"):
        return onednn.forward(x, kernel, strides, padding)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


@functools.cache
def has_bfloat16():
    """Whether the processor multiplies bfloat16 numbers."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo().split()))


def _split(x, axis):
    """The even and the odd positions along an axis."""
    shape = x.shape
    x = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return (jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in (0, 1))


def _join(even, odd, axis):
    """The inverse of _split."""
    x = jnp.stack([even, odd], axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _shift(x, axis, by):
    """x shifted along an axis and padded with zeros."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _inputs(x, axis):
    """Bᵀ d at every second position of a padded axis; a new first axis [4]."""
    even, odd = _split(x, axis)
    count = even.shape[axis] - 1
    d0, d2 = (jax.lax.slice_in_dim(even, i, i + count, axis=axis) for i in (0, 1))
    d1, d3 = (jax.lax.slice_in_dim(odd, i, i + count, axis=axis) for i in (0, 1))
    return jnp.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3])


def _inputs_transposed(m, axis):
    """The transpose of _inputs and of the padding by one position at both ends."""
    d0, d1, d2, d3 = m[0], m[1] - m[2] + m[3], m[1] + m[2] - m[0], -m[3]
    return _join(d1 + _shift(d3, axis, 1), d2 + _shift(d0, axis, -1), axis)


@jax.custom_vjp
def _tiles(x):
    """[B, H, W, C] → [4, 4, B, H/2, W/2, C]."""
    # With zeros shifted in, as in _inputs_transposed, XLA fuses them into the sums, which then take
    # 4 times as long.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.moveaxis(_inputs(_inputs(x, 1), 3), 0, 1)


def _tiles_transposed(_, m):
    return (_inputs_transposed(jax.vmap(lambda columns: _inputs_transposed(columns, 2))(m), 1),)


# With JAX's own gradient a train step takes 5 % longer: every slice becomes a padded array.
_tiles.defvjp(lambda x: (_tiles(x), None), _tiles_transposed)


def _weights(g, axis):
    """G g along an axis; its size becomes 4 instead of 3."""
    g0, g1, g2 = jnp.moveaxis(g, axis, 0)
    return jnp.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2], axis)


def _outputs(m, axis):
    """Aᵀ m of the first axis [4]."""
    return _join(m[0] + m[1] + m[2], m[1] - m[2] - m[3], axis)


@jax.checkpoint  # the transformed x and kernel take 4 and 1.8 times their memory
def conv3x3_winograd(x, kernel):
    """A 3×3 convolution with stride 1, SAME padding and 2.25 times fewer multiplications.

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
