"""Convolutions and products of oneDNN, PyTorch's library, which JAX's CPU wheels contain too.

XLA does not use them by itself. They are called by the names that XLA has for them, an interface
without a promise; so small ones are tried before the first, and versions of JAX that were not
tested do without. A program that has such a call cannot be kept by JAX's compilation cache.
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
CONVOLUTION, MATMUL = "__onednn$convolution", "__onednn$matmul"
# Nothing is fused or prepared.
PLAIN = {"bias_broadcast": False, "user_scratchpad": False, "weights_prepacked": False}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x, kernel, by_products=False):
    """A convolution with stride 1 and SAME padding, and its gradients.

    Args:
      x: [B, H, W, C], float32 or bfloat16.
      kernel: [K, K, C, D], of the same dtype; K is odd.
      by_products: whether the kernel's gradient is computed by `kernel_gradient`, or by XLA.

    Returns:
      [B, H, W, D].
    """
    return forward(x, kernel)


def _gradients(by_products, residuals, dy):
    x, kernel = residuals
    dx = forward(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if by_products:
        return dx, kernel_gradient(x, dy, len(kernel))
    (dkernel,) = jax.vjp(lambda kernel: by_xla(x, kernel), kernel)[1](dy)
    return dx, dkernel


convolve.defvjp(lambda x, kernel, _: (forward(x, kernel), (x, kernel)), _gradients)


def kernel_gradient(x, dy, size):
    """The gradient of a convolution's kernel as one product of matrices.

    oneDNN has this gradient, but XLA's interface to it has not.

    Args:
      x: [B, H, W, C].
      dy: [B, H, W, D], the gradient of the output.
      size: K, odd.

    Returns:
      [K, K, C, D].
    """
    (_, height, width, channels), features = x.shape, dy.shape[-1]
    around = size // 2
    # Without barriers, XLA computes the copies below in float32, and converts each of them.
    x, dy = jax.lax.optimization_barrier((x, dy))
    # Each row of the kernel sees x shifted up or down; each column, dy shifted left or right.
    x = jnp.pad(x, ((0, 0), (around, around), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, 0), (around, around), (0, 0)))
    x = jnp.concatenate([x[:, i : i + height] for i in range(size)], axis=-1)
    dy = jnp.concatenate([dy[:, :, i : i + width] for i in reversed(range(size))], axis=-1)
    x, dy = jax.lax.optimization_barrier((x, dy))
    product = matmul(_rows(x), _rows(dy), transpose_a=True)
    return product.reshape(size, channels, size, features).swapaxes(1, 2)


@jax.custom_vjp
def linear(x, kernel):
    """x · kernel, and its gradients.

    Args:
      x: [..., C], float32 or bfloat16.
      kernel: [C, D], of the same dtype.

    Returns:
      [..., D].
    """
    return matmul(_rows(x), kernel).reshape(*x.shape[:-1], -1)


def _linear_gradients(residuals, dy):
    x, kernel = residuals
    dx = matmul(_rows(dy), kernel, transpose_b=True)
    return dx.reshape(x.shape), matmul(_rows(x), _rows(dy), transpose_a=True)


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_gradients)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


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
        "optimization_config": PLAIN,
    }
    shape = x.shape[0], *size, features
    return _call(CONVOLUTION, shape, {"onednn_conv_config": config}, x, kernel)


def matmul(a, b, transpose_a=False, transpose_b=False):
    """A product of matrices of which no gradient is taken.

    Args:
      a: [M, K], or [K, M] if it is to be transposed; float32 or bfloat16.
      b: [K, N], or [N, K] if it is to be transposed; of the same dtype.

    Returns:
      [M, N].
    """
    shape = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
    config = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    config["optimization_config"] = PLAIN
    return _call(MATMUL, shape, {"onednn_matmul_config": config}, a, b)


def _call(target, shape, config, *arrays):
    """What oneDNN computes under a name, for a config in the form that XLA gives to it."""
    config |= {"outer_dimension_partitions": []}
    call = jax.ffi.ffi_call(
        target,
        jax.ShapeDtypeStruct(shape, arrays[0].dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
    )
    return call(*arrays)


def works(dtype):
    """Whether oneDNN is there and computes what is small in this dtype as XLA does."""
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
    matrices = [rng.integers(-3, 4, shape).astype(dtype) for shape in ((9, 8), (9, 7), (8, 7))]

    def trial(convolve, matmul, x, kernel, a, b, c):
        found = [convolve(x, kernel), convolve(x, kernel, (2, 2), "VALID")]
        found += [matmul(a, b, True, False), matmul(b, c, False, True), matmul(a, c, False, False)]
        return jnp.concatenate([y.ravel() for y in found])

    def matmul_by_xla(a, b, transpose_a, transpose_b):
        return (a.T if transpose_a else a) @ (b.T if transpose_b else b)

    ways = (forward, matmul), (by_xla, matmul_by_xla)
    ways = (functools.partial(trial, *way) for way in ways)
    try:
        found, expected = (np.asarray(_compiled(way, x, kernel, *matrices)) for way in ways)
    except jax.errors.JaxRuntimeError as error:
        log.warning("oneDNN cannot be used: %s", str(error).splitlines()[0])
        return False
    if (found != expected).any():
        log.warning("what oneDNN computes differs from XLA's, so it is not used")
        return False
    return True


def _compiled(function, *arrays):
    """The function's value, also while JAX traces another."""
    return jax.jit(function).lower(*arrays).compile()(*arrays)
