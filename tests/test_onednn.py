"""oneDNN's convolutions and products against XLA's; where they are used; and if they cannot be."""

import functools
import logging
import os
import platform
import sys

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import cpu, onednn

IS_THERE = sys.platform == "linux" and platform.machine() == "x86_64"
needs_onednn = pytest.mark.skipif(not IS_THERE, reason="JAX's wheels have it for Linux on x86 only")
NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.fixture
def a_new_trial():
    onednn._trial.cache_clear()
    jax.clear_caches()  # of the traced trial
    yield
    onednn._trial.cache_clear()


def arrays(x_shape, features, size=3):
    shapes = (x_shape, (size, size, x_shape[-1], features), (*x_shape[:-1], features))
    return map(jax.random.normal, jax.random.split(jax.random.key(0), 3), shapes)


@needs_onednn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize(
    "x_shape, features, size",
    [
        ((4, 8, 8, 16), 16, 3),
        ((2, 7, 10, 9), 12, 3),
        ((2, 5, 4, 8), 8, 5),
        ((2, 6, 4, 128), 130, 3),
        ((2, 5, 4, 130), 128, 5),
    ],
)
def test_it_is_the_same_convolution(dtype, by_products, x_shape, features, size):
    assert onednn.works(dtype)
    found = functools.partial(onednn.convolve, by_products=by_products)
    assert_same_with_gradients(found, onednn.by_xla, arrays(x_shape, features, size), dtype)


def assert_same_with_gradients(function, expected, operands, dtype):
    """Values and gradients; the expected ones are computed in float64."""
    *operands, dy = (a.astype(dtype) for a in operands)
    found, vjp = jax.vjp(jax.jit(function), *operands)
    error = {"float32": 1e-6, "bfloat16": 0.01}[dtype]
    with jax.enable_x64():
        exact = [a.astype(jnp.float64) for a in operands]
        wanted, exact_vjp = jax.vjp(expected, *exact)
        both = zip((found, *vjp(dy)), (wanted, *exact_vjp(dy.astype(jnp.float64))), strict=True)
        for y, wanted in both:
            assert y.dtype == dtype
            assert jnp.linalg.norm(y - wanted) < error * jnp.linalg.norm(wanted)


@needs_onednn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", [(5,), (2, 4, 3), (2, 3, 5)])
def test_it_is_the_same_linear_layer(dtype, positions):
    shapes = (*positions, 8), (8, 6), (*positions, 6)
    operands = map(jax.random.normal, jax.random.split(jax.random.key(0), 3), shapes)
    assert_same_with_gradients(onednn.linear, lambda x, kernel: x @ kernel, operands, dtype)


@needs_onednn
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (1, 7), (5, 1)])
@pytest.mark.parametrize(
    "strides, padding", [((1, 1), "SAME"), ((1, 1), "VALID"), ((2, 2), "VALID"), ((1, 3), "VALID")]
)
def test_a_network_that_is_not_trained(window, strides, padding):
    """Against XLA in float64."""
    x, kernel = jax.random.normal(jax.random.key(0), (2, 9, 12, 3)), jnp.ones((*window, 3, 5))
    kernel += jax.random.normal(jax.random.key(1), kernel.shape)
    convolve = functools.partial(cpu.convolve_forward, strides=strides, padding=padding, **NUMBERS)
    assert onednn.CONVOLUTION in jax.jit(convolve).lower(x, kernel).as_text()
    found = jax.jit(convolve)(x, kernel)
    with jax.enable_x64():
        exact = (a.astype(jnp.float64) for a in (x, kernel))
        expected = onednn.by_xla(*exact, strides, padding)
        assert found.shape == expected.shape
        assert jnp.linalg.norm(found - expected) < 1e-6 * jnp.linalg.norm(expected)


def test_what_onednn_does_not_compute():
    """Padding that differs on both sides, and another precision."""
    x = jnp.ones((1, 8, 8, 3))
    for dtype, strides, size in (
        (jnp.float32, (2, 2), 3),
        (jnp.float32, (1, 1), 2),
        (jnp.float16, (1, 1), 3),
    ):
        arrays = x.astype(dtype), jnp.ones((size, size, 3, 4), dtype)
        found = cpu.convolve_forward(*arrays, strides, "SAME", **NUMBERS)
        expected = jax.lax.conv_general_dilated(*arrays, strides, "SAME", **NUMBERS)
        assert (found == expected).all()


def programs_of(x_shape, features=16, dtype="float32", strides=(1, 1)):
    """The text of cpu.convolve compiled, and of its gradient."""
    x, kernel, _ = (a.astype(dtype) for a in arrays(x_shape, features))
    convolve = functools.partial(cpu.convolve, strides=strides, padding="SAME", **NUMBERS)
    gradient = jax.grad(lambda *a: convolve(*a).sum().astype(jnp.float32), (0, 1))
    return [jax.jit(f).lower(x, kernel).as_text() for f in (convolve, gradient)]


LARGE = (16, 16, 16, 16)  # 4,096 positions


@needs_onednn
@pytest.mark.parametrize(
    "uses, options",
    [
        (True, {"x_shape": LARGE}),
        (True, {"x_shape": (16, 16, 16, 64), "features": 64}),  # Winograd's without a gradient
        (False, {"x_shape": (16, 16, 16, 128), "features": 128}),  # Winograd's
        (False, {"x_shape": (15, 16, 16, 16)}),
        (False, {"x_shape": (16, 16, 16, 3)}),
        (False, {"x_shape": LARGE, "strides": (2, 2)}),
    ],
)
def test_only_large_differentiated_convolutions_use_it(uses, options):
    plain, gradient = programs_of(**options)
    assert onednn.CONVOLUTION not in plain
    assert (onednn.CONVOLUTION in gradient) == uses


@pytest.fixture
def processor(monkeypatch):
    """Replaces the processor by one that has the given instructions."""

    def replace(names):
        monkeypatch.setattr(cpu, "cpuinfo", lambda: f"flags : fpu {names} sse")
        cpu.instructions.cache_clear()

    yield replace
    cpu.instructions.cache_clear()


@needs_onednn
@pytest.mark.parametrize("names, uses", [("avx512f avx512_bf16", True), ("avx512f", False)])
def test_bfloat16_where_the_processor_has_it(names, uses, processor):
    processor(names)
    for text in programs_of((2, 4, 4, 8), dtype="bfloat16"):
        assert (onednn.CONVOLUTION in text) == uses
    x, kernel = jnp.ones((2, 5, 8), jnp.bfloat16), jnp.ones((8, 3), jnp.bfloat16)
    for dtype in ("float32", "bfloat16"):
        layer = jax.jit(functools.partial(cpu.dot_general, dimensions=(((2,), (0,)), ((), ()))))
        text = layer.lower(x.astype(dtype), kernel.astype(dtype)).as_text()
        assert (onednn.MATMUL in text) == (uses and dtype == "bfloat16")


@needs_onednn
@pytest.mark.parametrize(
    "names, channels, uses",
    [("avx512_bf16", 64, False), ("avx512_bf16", 128, True), ("amx_bf16", 16, True)],
)
def test_kernel_gradients_that_are_products(names, channels, uses, processor):
    """In bfloat16; with AMX, those of few channels too."""
    processor(names)
    _, gradient = programs_of((2, 4, 4, channels), channels, "bfloat16")
    assert (onednn.MATMUL in gradient) == uses


@needs_onednn
@pytest.mark.parametrize(
    "names, own", [("avx2", True), ("avx512f", False), ("avx512f amx_tile amx_bf16", True)]
)
def test_whose_convolutions_xla_takes(names, own, processor, monkeypatch):
    """YNNPACK's, or its own."""
    processor(names)
    monkeypatch.setattr(cpu, "entry_points", lambda group: [])
    monkeypatch.setenv("XLA_FLAGS", "--xla_flag=1")
    cpu.prepare(positions=0)
    assert ("ynn_fusion_type" in os.environ["XLA_FLAGS"]) == own
    assert "CONVOLUTION" not in os.environ["XLA_FLAGS"]


def is_not_used_but_computes():
    _, gradient = programs_of(LARGE)
    return onednn.CONVOLUTION not in gradient


@needs_onednn
@pytest.mark.usefixtures("a_new_trial")
@pytest.mark.parametrize("name", ["CONVOLUTION", "MATMUL"])
def test_a_name_that_xla_does_not_have(name, monkeypatch, caplog):
    monkeypatch.setattr(onednn, name, "__onednn$another")
    assert is_not_used_but_computes()
    assert "oneDNN cannot be used: " in caplog.text


@needs_onednn
@pytest.mark.usefixtures("a_new_trial")
@pytest.mark.parametrize("name", ["forward", "matmul"])
def test_another_result_than_xla_s(name, monkeypatch, caplog):
    function = getattr(onednn, name)
    monkeypatch.setattr(onednn, name, lambda *arguments: function(*arguments) + 1)
    assert is_not_used_but_computes()
    assert "what oneDNN computes differs from XLA's" in caplog.text


@needs_onednn
@pytest.mark.usefixtures("a_new_trial")
def test_a_newer_jax(monkeypatch, caplog):
    monkeypatch.setattr(jax, "__version_info__", (99, 0, 0))
    with caplog.at_level(logging.INFO):
        assert is_not_used_but_computes()
    assert "is newer than what oneDNN was tested with" in caplog.text


@pytest.mark.usefixtures("a_new_trial")
def test_another_processor(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert is_not_used_but_computes()
