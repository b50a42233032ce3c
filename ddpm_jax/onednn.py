"""The convolutions of oneDNN, the library that PyTorch's are from, which JAX's CPU wheels contain.

XLA does not use them by itself. They are called by the name that XLA has for them, an interface
without a promise; so a small convolution is tried before the first, and versions of JAX that were
not tested do without. A program that has such a call cannot be kept by JAX's compilation cache.
"""

import functools
import json
import logging
import platform
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger(__name__)

NEWEST_TESTED = (0, 12)
TARGET = "__onednn$convolution"
# Channels from which `kernel_gradient` pays, with bfloat16. On an AMD with AVX-512, CIFAR-10's
# network trains 1.14 times as fast; with 64, MNIST's 0.95 times. With float32 it never pays.
WIDE = 128


@jax.custom_vjp
def convolve(x, kernel):
    """A convolution with stride 1 and SAME padding, and its gradients.

    Args:
      x: [B, H, W, C], float32 or bfloat16.
      kernel: [K, K, C, D], of the same dtype; K is odd.

    Returns:
      [B, H, W, D].
    """
    return forward(x, kernel)


def _gradients(residuals, dy):
    x, kernel = residuals
    dx = forward(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if x.dtype == jnp.bfloat16 and min(kernel.shape[2:]) >= WIDE:
        return dx, kernel_gradient(x, dy, len(kernel))
    (dkernel,) = jax.vjp(lambda kernel: by_xla(x, kernel), kernel)[1](dy)
    return dx, dkernel


convolve.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), _gradients)


def kernel_gradient(x, dy, size):
    """The gradient of a convolution's kernel as products of matrices, one for each of its rows.

    oneDNN has this gradient, but XLA's interface to it has not. Here each product is a convolution
    of size 1, whose input channels are the pixels.

    Args:
      x: [B, H, W, C].
      dy: [B, H, W, D], the gradient of the output.
      size: K, odd.

    Returns:
      [K, K, C, D].
    """
    (height, width, channels), features = x.shape[1:], dy.shape[-1]
    around = size // 2
    # Without barriers, XLA computes the copies below in float32, and converts each of them.
    x, dy = jax.lax.optimization_barrier((x, dy))
    x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    # What a row of the kernel sees of each pixel, as further channels.
    x = jnp.concatenate([x[:, :, i : i + width] for i in range(size)], axis=-1)
    x = jax.lax.optimization_barrier(x)
    dy = dy.reshape(-1, features).T.reshape(1, features, 1, -1)
    rows = [x[:, i : i + height].reshape(1, 1, dy.shape[-1], -1) for i in range(size)]
    products = jnp.stack([forward(dy, row, padding="VALID") for row in rows])
    return products.reshape(size, features, size, channels).transpose(0, 2, 3, 1)


def by_xla(x, kernel, strides=(1, 1), padding="SAME"):
    """The same as `forward` by XLA."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def forward(x, kernel, strides=(1, 1), padding="SAME"):
    """A convolution of which no gradient is taken.

    Args:
      x: [B, H, W, C], float32 or bfloat16.
      kernel: [K, L, C, D], of the same dtype.
      strides: any with padding "VALID"; (1, 1) with "SAME", and K and L are odd.
      padding: "SAME" or "VALID".

    Returns:
      [B, H', W', D].
    """
    *window, _, features = kernel.shape
    pixels = {"batch_dim": "0", "feature_dim": "3", "spatial_dims": ["1", "2"]}
    weights = {"input_feature_dim": "2", "output_feature_dim": "3", "spatial_dims": ["0", "1"]}
    weights["shape"] = [str(n) for n in kernel.shape]
    around = [n // 2 if padding == "SAME" else 0 for n in window]
    axes = zip(x.shape[1:3], around, window, strides, strict=True)
    size = [(length + 2 * pad - n) // stride + 1 for length, pad, n, stride in axes]
    around = [str(n) for n in around]
    config = {
        "dims": "4",
        "feature_groups": "1",
        "input": {"data": pixels, "dims": "0"},
        "kernel": {"filter": weights, "dims": "0"},
        "output": {"data": pixels, "dims": "0"},
        "window": {"pad_left": around, "pad_right": around, "size": []}
        | {"strides": [str(n) for n in strides], "window_dilations": ["1", "1"]},
        "optimization_config": {"bias_broadcast": False, "user_scratchpad": False}
        | {"weights_prepacked": False},
    }
    config = {"onednn_conv_config": config, "outer_dimension_partitions": []}
    shape = jax.ShapeDtypeStruct((x.shape[0], *size, features), x.dtype)
    call = jax.ffi.ffi_call(
        TARGET, shape, custom_call_api_version=2, legacy_backend_config=json.dumps(config)
    )
    return call(x, kernel)


def works(dtype):
    """Whether oneDNN is there and computes a small convolution of this dtype as XLA does."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    # JAX tries to keep each program, and warns.
    text = "Error writing persistent compilation cache entry .*bad_alloc"
    warnings.filterwarnings("ignore", message=text)
    return _trial(dtype)


@functools.cache
def _trial(dtype):
    if jax.__version_info__[:2] > NEWEST_TESTED:
        text = "JAX %s is newer than what oneDNN was tested with, so it is not used"
        log.info(text, jax.__version__)
        return False
    rng = np.random.default_rng(0)
    # Small integers: their products and sums are exact.
    x, kernel = (rng.integers(-3, 4, shape).astype(dtype) for shape in ((1, 5, 5, 8), (3, 3, 8, 8)))

    def both_kinds(convolve, *arrays):
        found = convolve(*arrays), convolve(*arrays, (2, 2), "VALID")
        return jnp.concatenate([y.ravel() for y in found])

    ways = (functools.partial(both_kinds, convolve) for convolve in (forward, by_xla))
    try:
        found, expected = (np.asarray(_compiled(way, x, kernel)) for way in ways)
    except jax.errors.JaxRuntimeError as error:
        log.warning("oneDNN's convolutions cannot be used: %s", str(error).splitlines()[0])
        return False
    if (found != expected).any():
        log.warning("oneDNN's convolutions differ from XLA's, so they are not used")
        return False
    return True


def _compiled(function, *arrays):
    """The function's value, also while JAX traces another."""
    return jax.jit(function).lower(*arrays).compile()(*arrays)
