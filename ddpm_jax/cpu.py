"""What a CPU needs: flags, devices, and the fastest of several convolutions."""

import ctypes
import functools
import math
import os
import pathlib
import platform
from importlib.metadata import entry_points

import jax
import jax.numpy as jnp

from ddpm_jax import onednn, winograd

# The least channels of a bfloat16 convolution whose kernel gradient is a product by oneDNN. With
# AMX all are, and MNIST's network trains 1.24 times as fast. Without (an AMD, measured with an
# earlier way of computing it) it was 0.95 times as fast from 64 channels on.
WIDE = 128
FEW_POSITIONS = 2**15  # in a batch; 64 digits have 4,096, 64 images of MNIST 50,176


def is_used():
    """Whether JAX computes on CPUs, where a gradient inside a `lax` loop takes about 12 times as
    long as in an unrolled loop."""
    return jax.default_backend() == "cpu"


def cpuinfo():
    """The text of /proc/cpuinfo; empty if the system is not Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@functools.cache
def instructions():
    """The words of /proc/cpuinfo, among them the names of the processor's instruction sets."""
    return frozenset(cpuinfo().split())


def prepare(positions=math.inf):
    """Sets XLA and glibc options if there is no accelerator; call it before JAX is used.

    On a CPU, XLA removes the optimization barriers of model.remat and optim.accumulate before it
    plans the memory, so this pass is disabled. XLA uses YNNPACK for convolutions. Without AVX-512
    this is slower than XLA's own code, by up to 30 times for weight gradients. With XLA's own code,
    MNIST's network trains 1.8 times as fast and that of the 8×8 digits 1.3 times; CIFAR-10's speed
    does not change, since most of its 3×3 convolutions use Winograd's algorithm. On an Intel with
    AMX (and AVX-512), MNIST's network trains 1.16 times as fast with XLA's own code, the others as
    before; on an AMD with AVX-512, it trains 0.8 times as fast. YNNPACK's sums stay: without them
    training is 0.76 times as fast for MNIST, 0.85 for CIFAR-10, 0.97 for the digits. Flags in
    XLA_FLAGS have precedence.

    glibc is told to keep freed memory for the next step: returning it to the system, and getting it
    back filled with zeros, takes 5 to 10 % of a step of CIFAR-10's network. Large blocks are kept
    in its first arena only, so there is one arena; with more, MNIST's network trains 0.9 times as
    fast. But after compiling, that arena has many free blocks to search, under one lock: with more
    arenas, the digits' network trains 1.2 to 2 times and samples 1.04 to 1.4 times as fast, so it
    has them.

    Args:
      positions: images × pixels of a batch, if the program knows them.
    """
    if entry_points(group="jax_plugins"):
        return
    flags = {"--xla_disable_hlo_passes": "cse_barrier_expander"}
    known = instructions() if platform.machine() == "x86_64" else frozenset()
    if known and ("avx512f" not in known or "amx_tile" in known):
        for_ynnpack = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
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


def use_cores(*batch_sizes, parts=()):
    """Makes each CPU core a device; call it before JAX is used.

    XLA parallelizes only large operations. Data parallelism over the cores parallelizes everything:
    on two cores, training was 1.1 to 1.5 times as fast (MNIST and digits networks). The environment
    variable JAX_NUM_CPU_DEVICES has precedence.

    Args:
      batch_sizes: the number of devices divides all of these, with at least 16 examples for each.
      parts: sizes of the parts of a batch that are computed at once; the number divides them, too.
    """
    if jax.config.jax_num_cpu_devices > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common, of_parts = math.gcd(*batch_sizes), math.gcd(*batch_sizes, *parts)
    fitting = (n for n in range(1, cores + 1) if of_parts % n == 0 and common // n >= 16)
    jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def convolve(x, kernel, strides, padding, **options):
    """lax.conv_general_dilated of a 3×3 kernel; on a CPU by the fastest of three ways.

    Winograd's algorithm: measured on 2 cores, with 128 channels or more, CIFAR-10's network at
    batch 8 trains on 4.8 instead of 3.9 images/s. With 64 channels, the forward pass of the digits'
    network is 1.13 times as fast but a training step is slower (0.75 times), so only
    undifferentiated convolutions use it. With 32 channels, or fewer than 256 positions in a batch,
    it is no faster.

    oneDNN (see onednn.py), in float32 where a gradient is taken: MNIST's network trains 1.05 times
    as fast on an AMD with AVX-512, the digits' as before, so only large convolutions use it. In
    bfloat16 everywhere, on processors that have instructions for it: on an Intel with AMX,
    CIFAR-10's network trains 1.45 times as fast as with float32, and its forward pass is 1.7 times
    as fast; on an AMD it trains 1.16 times as fast.
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
            return winograd.convolve(x, kernel)
        plain = winograd.convolve
    pays = {"float32": count >= 4096, "bfloat16": has_bfloat16()}
    if pays.get(x.dtype.name) and channels >= 8 and onednn.works(x.dtype.name):
        if x.dtype == jnp.bfloat16:
            by_products = "amx_bf16" in instructions() or channels >= WIDE
            return onednn.convolve(x, kernel, by_products)
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


def dot_general(x, kernel, dimensions, **options):
    """lax.dot_general of a linear layer: [..., C] times [C, D]; on a CPU in bfloat16 by oneDNN.

    On an Intel with AMX, the networks of CIFAR-10 and MNIST then train 1.1 times as fast.
    """
    if is_used() and x.dtype == jnp.bfloat16 and has_bfloat16() and onednn.works("bfloat16"):
        return onednn.linear(x, kernel)
    return jax.lax.dot_general(x, kernel, dimensions, **options)


def has_bfloat16():
    """Whether the processor multiplies bfloat16 numbers."""
    return bool({"avx512_bf16", "amx_bf16"} & instructions())
