"""The network against Ho's known details; tests/references.py has its numbers."""

import functools
import itertools
import zlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ddpm_jax import configs, cpu, winograd
from ddpm_jax.core import unet

TINY = dict(
    channels=8,
    widths=(8, 16),
    num_res_blocks=1,
    attention_down=(1,),
    attention_up=(1,),
    norm_groups=4,
)


def init(model, x):
    return jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(len(x), int))["params"]


def test_six_attention_blocks_on_cifar10():
    model = configs.make_model(configs.named_config("cifar10"))
    names = unet.param_shapes(model, (32, 32, 3))
    assert sorted(n for n in names if "attention" in n) == [
        "down1_block0_attention",
        "down1_block1_attention",
        "middle_attention",
        "up1_block0_attention",
        "up1_block1_attention",
        "up1_block2_attention",
    ]


def test_parameters_of_the_improved_network():
    """Counted from the layers of Nichol & Dhariwal's U-Net."""

    def conv3x3(inputs, outputs):
        return 9 * inputs * outputs + outputs

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    def norm(channels):
        return 2 * channels

    def block(inputs, outputs, attends=False):
        shift_and_scale = linear(512, 2 * outputs)
        shortcut = linear(inputs, outputs) if inputs != outputs else 0
        count = norm(inputs) + conv3x3(inputs, outputs) + shift_and_scale + norm(outputs)
        count += conv3x3(outputs, outputs) + shortcut
        return count + (norm(outputs) + 4 * linear(outputs, outputs) if attends else 0)

    count = linear(128, 512) + linear(512, 512) + conv3x3(3, 128)  # embedding of t, first layer
    count += block(128, 128) + 2 * block(128, 128) + conv3x3(128, 128)  # down: 32 × 32
    count += block(128, 256, True) + 2 * block(256, 256, True) + conv3x3(256, 256)  # 16 × 16
    count += 3 * block(256, 256, True) + conv3x3(256, 256)  # 8 × 8
    count += 3 * block(256, 256)  # 4 × 4
    count += block(256, 256, True) + block(256, 256)  # middle
    count += 4 * block(512, 256) + conv3x3(256, 256)  # up: 4 × 4, each with a skip of 256
    count += 4 * block(512, 256, True) + conv3x3(256, 256)  # 8 × 8
    count += 3 * block(512, 256, True) + block(384, 256, True) + conv3x3(256, 256)  # 16 × 16
    count += block(384, 128) + 3 * block(256, 128)  # 32 × 32
    count += norm(128) + conv3x3(128, 6)  # the mean and the variance
    model = configs.make_model(configs.named_config("cifar10_improved"))
    shapes = unet.param_shapes(model, (32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count == 52_546_438


def test_starts_near_zero():
    """The last convolution makes the first ε almost 0, so that the first loss is about 1."""
    model = unet.UNet(**TINY)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    out = jax.jit(model.apply)({"params": init(model, x)}, x, jnp.arange(4))
    assert out.shape == x.shape
    assert 0 < float(jnp.abs(out).max()) < 1e-3


def direct(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@functools.partial(jax.jit, static_argnums=0)
def all_of(function, x, kernel, dy):
    """A convolution, also where it is differentiated, and its gradients."""
    y, vjp = jax.vjp(function, x, kernel)
    return function(x, kernel), y, *vjp(dy)


def test_winograd_is_the_same_convolution():
    """Values and gradients; within 1e-13 in float64, as exact arithmetic would be."""
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 3)
        x, kernel, dy = map(jax.random.normal, keys, ((2, 8, 6, 5), (3, 3, 5, 7), (2, 8, 6, 7)))
        both = (all_of(f, x, kernel, dy) for f in (winograd.convolve, direct))
        for found, wanted in zip(*both, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-13)


@pytest.mark.parametrize("channels", [64, 128])
def test_wide_layers_are_as_exact_as_direct_ones(channels, monkeypatch):
    """In float32, against float64, with the error that direct convolutions have; gradients too."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((4, 8, 8, channels), (3, 3, channels, channels), (4, 8, 8, channels))
    x, kernel, dy = map(jax.random.normal, keys, shapes)
    calls = []
    monkeypatch.setattr(
        winograd, "convolve", lambda *a, f=winograd.convolve: calls.append(1) or f(*a)
    )
    layer = unet.make_layers(1, 1e-6, jnp.float32, cpu.convolve).conv3x3(channels)

    def by_layer(x, kernel):
        return layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(channels)}}, x)

    found, plain = all_of(by_layer, x, kernel, dy), all_of(direct, x, kernel, dy)
    assert calls
    with jax.enable_x64():
        exact = all_of(direct, *(a.astype(jnp.float64) for a in (x, kernel, dy)))
        for ours, theirs, wanted in zip(found, plain, exact, strict=True):
            errors = [float(jnp.linalg.norm(y - wanted)) for y in (ours, theirs)]
            assert errors[0] < 1e-6 * float(jnp.linalg.norm(wanted))
            assert errors[0] < 4 * errors[1]


@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0)]
)
def test_group_norm_is_flax_s(dtype, tolerance):
    """Value, gradients and the tree of parameters, for images far from zero; its sums are float32
    for bfloat16 too, so that equal inputs give the same rounded result."""
    with jax.enable_x64(dtype == "float64"):
        x = 3 + jax.random.normal(jax.random.key(0), (2, 5, 6, 12), jnp.float32).astype(dtype)
        ours, theirs = (
            norm(4, epsilon=1e-3, dtype=dtype) for norm in (unet.GroupNorm, nn.GroupNorm)
        )
        params = jax.tree.map(lambda p: p + jnp.arange(12.0), theirs.init(jax.random.key(1), x))
        chex.assert_trees_all_equal_shapes(params, ours.init(jax.random.key(1), x))

        def value_and_gradients(norm):
            y, pull = jax.vjp(norm.apply, params, x)
            return y, pull(
                jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(dtype)
            )

        found, wanted = map(value_and_gradients, (ours, theirs))
        chex.assert_trees_all_equal_dtypes(found, wanted)
        if tolerance:
            chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=100 * tolerance)
        else:
            np.testing.assert_allclose(*(np.float32(y) for y, _ in (found, wanted)), rtol=2**-7)


def test_group_norm_of_constant_images():
    """Rounding makes no variance negative: the result is the bias, not nan."""
    norm, x = unet.GroupNorm(2, epsilon=1e-6), jnp.linspace(100, 1000, 64)[:, None, None, None]
    y, _ = norm.init_with_output(jax.random.key(0), jnp.broadcast_to(x, (64, 7, 9, 6)))
    np.testing.assert_allclose(y, 0, atol=0.2)


def test_initialisation_scales():
    """Variance scaling, fan_avg, uniform: limit √(3 · scale / fan_avg)."""
    model = unet.UNet(**{**TINY, "channels": 32, "widths": (32, 64)})
    params = init(model, jnp.zeros((1, 8, 8, 3)))
    block = params["down0_block0"]
    limit = np.sqrt(3 / (9 * 32))
    assert 0.97 * limit < np.abs(block["conv1"]["kernel"]).max() <= limit
    assert np.abs(block["conv2"]["kernel"]).max() <= 1e-5 * limit * 1.001
    assert np.abs(params["middle_attention"]["proj"]["kernel"]).max() < 1e-5
    assert np.abs(params["conv_out"]["kernel"]).max() < 1e-5
    biases = [p for path, p in jax.tree_util.tree_leaves_with_path(params) if "bias" in str(path)]
    assert biases and not any(b.any() for b in biases)


@pytest.mark.parametrize(
    "channels, size, dtype",
    [
        (1, (8, 8), "bfloat16"),
        (3, (8, 16), "float32"),
        pytest.param(4, (16, 8), "float32", marks=pytest.mark.slow),
    ],
)
def test_images_of_all_kinds(channels, size, dtype):
    model = unet.UNet(**TINY, dtype=jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(1), (2, *size, channels))
    params = init(model, x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)({"params": params}, x, jnp.array([0, 5]))
    assert (out.shape, out.dtype) == (x.shape, jnp.float32)


def test_downsampling_pads_like_ho():
    """SAME, stride 2, even size: zeros only below and to the right."""
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
    conv = unet.make_layers(1, 1e-6, jnp.float32, jax.lax.conv_general_dilated).conv3x3(
        1, strides=2
    )
    ones = {"params": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    out = conv.apply(ones, x)[0, :, :, 0]
    np.testing.assert_array_equal(out, [[1, 0], [0, 0]])
    corner = conv.apply(ones, x[:, ::-1, ::-1])[0, :, :, 0]
    np.testing.assert_array_equal(corner, [[0, 0], [0, 1]])
    # The pixel (2, 2) lies in all four windows only if none of them reaches past the top left.
    centre = conv.apply(ones, jnp.zeros((1, 4, 4, 1)).at[0, 2, 2, 0].set(1.0))[0, :, :, 0]
    np.testing.assert_array_equal(centre, [[1, 1], [1, 1]])


def test_downsampling_is_the_mean_of_four():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(unet.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


def test_two_heads_attend_apart():
    """Each head's output is that of single-head attention on its half of the channels."""
    layers = unet.make_layers(1, 1e-6, jnp.float32, jax.lax.conv_general_dilated)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    both = unet.AttentionBlock(layers, 2, 4, normalizes=False)
    params = both.init(jax.random.key(1), x)["params"]
    params["proj"] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    found = both.apply({"params": params}, x) - x

    def half(tree, chosen):
        names = ("query", "key", "value")
        cut = {name: jax.tree.map(lambda leaf: leaf[..., chosen], tree[name]) for name in names}
        return cut | {"proj": {"kernel": jnp.eye(4, 8), "bias": jnp.zeros(8)}}

    one = unet.AttentionBlock(layers, 1, 4, normalizes=False)
    for chosen in (slice(0, 4), slice(4, 8)):
        alone = one.apply({"params": half(params, chosen)}, x) - x
        np.testing.assert_allclose(found[..., chosen], alone[..., :4], rtol=1e-5, atol=1e-6)


def output_of(**options):
    """A tiny network's output, and the names of its parameters; each is drawn with its own key."""
    model = unet.UNet(**{**TINY, "learned_variance": False, **options})
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    shapes = traverse_util.flatten_dict(unet.param_shapes(model, x.shape[1:]))
    params = {
        path: 0.3 * jax.random.normal(jax.random.key(zlib.crc32("/".join(path).encode())), s.shape)
        for path, s in shapes.items()
    }
    labels = [jnp.array([0, 1])] if options.get("num_classes") else []
    apply = unet.net_fn(model, traverse_util.unflatten_dict(params))
    return np.asarray(jax.jit(apply)(x, jnp.array([1, 5]), *labels)), set(shapes)


def test_heads_by_number_or_by_size():
    """Attention is 16 wide: four heads have 4 channels each."""
    found, _ = output_of(num_heads=4)
    np.testing.assert_allclose(found, output_of(head_channels=4)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(found - output_of()[0]).max() > 1e-3


def test_the_middle_with_less():
    (_, whole), (_, without_norm), (_, without) = map(
        lambda options: output_of(**options),
        ({}, {"middle_norm": False}, {"attention_middle": False}),
    )
    attention = {path for path in whole if path[0] == "middle_attention"}
    norm = {path for path in attention if path[1] == "norm"}
    assert norm and whole - without_norm == norm and whole - without == attention


def test_a_label_s_channels_follow_the_image_s():
    """Without the first kernel's inputs after the image's three, the network is unlabelled."""
    model = unet.UNet(**TINY, num_classes=2, label_channels=5)
    shapes = unet.param_shapes(model, (8, 8, 3))
    assert shapes["conv_in"]["kernel"].shape == (3, 3, 8, 8)
    assert shapes["labels"]["embedding"].shape == (3, 5)
    params = jax.tree.map(lambda s: 0.1 * jax.random.normal(jax.random.key(0), s.shape), shapes)
    params["conv_in"]["kernel"] = params["conv_in"]["kernel"].at[:, :, 3:].set(0)
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([1, 1])
    found = jax.jit(unet.net_fn(model, params))(x, t, jnp.array([0, 1]))
    plain = {name: tree for name, tree in params.items() if name != "labels"}
    plain["conv_in"] = {**params["conv_in"], "kernel": params["conv_in"]["kernel"][:, :, :3]}
    expected = jax.jit(unet.net_fn(unet.UNet(**TINY), plain))(x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_upsampling_is_nearest():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(unet.upsample(x)[0, :, :, 0], expected)


@pytest.mark.slow
def test_every_input_reaches_the_output():
    """Both the image and the time, and every parameter but what softmax cancels."""
    model = unet.UNet(**TINY)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    params = jax.tree.map(
        lambda p: (
            p + 0.1 * jax.random.normal(jax.random.key(zlib.crc32(str(p.shape).encode())), p.shape)
        ),
        init(model, x),
    )

    @jax.jit
    def out(params, t):
        return jnp.sum(model.apply({"params": params}, x, t) ** 2)

    assert out(params, jnp.array([3, 3])) != out(params, jnp.array([4, 4]))
    grads = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(out))(params, jnp.array([3, 7])))
    dead = [jax.tree_util.keystr(k) for k, g in grads if float(jnp.abs(g).max()) < 1e-5]
    assert all("key" in k and "bias" in k for k in dead), dead


def test_dropout_depends_on_the_example_only():
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 16, 16, 8))
    out = unet.per_example_dropout(x, 0.25, keys, tag=7)
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert float((out == 0).mean()) == pytest.approx(0.25, abs=0.02)
    part = unet.per_example_dropout(x[2:4], 0.25, keys[2:4], tag=7)
    np.testing.assert_array_equal(part, out[2:4])
    masks = [out[0] == 0, out[1] == 0, unet.per_example_dropout(x, 0.25, keys, tag=8)[0] == 0]
    for a, b in itertools.combinations(masks, 2):
        assert float((a & b).mean()) == pytest.approx(0.0625, abs=0.02)


def test_network_dropout():
    model = unet.UNet(**TINY, dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = {"params": jax.tree.map(lambda p: p + 0.1, init(model, x))}
    t = jnp.array([1, 1])
    a, b = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(params, x, t), apply(params, x, t))
    assert (apply(params, x, t, None, a) != apply(params, x, t, None, b)).any()
    assert (apply(params, x, t, None, a) != apply(params, x, t)).any()


def test_a_classifier_s_output_is_log_probabilities():
    model = unet.Classifier(**TINY, num_classes=3)
    shapes = unet.param_shapes(model, (8, 8, 1))
    params = jax.tree.map(lambda s: 0.5 * jax.random.normal(jax.random.key(0), s.shape), shapes)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    log_p = jax.jit(unet.net_fn(model, params))(x, jnp.array([1, 5]))
    assert log_p.shape == (2, 3) and jnp.ptp(log_p) > 0.01
    np.testing.assert_allclose(jnp.exp(log_p).sum(1), 1, rtol=1e-5)


def test_every_block_has_the_network_s_dropout_and_its_own_mask(monkeypatch):
    seen = []

    def dropout(x, rate, keys, tag):
        seen.append((rate, tag))
        return x

    monkeypatch.setattr(unet, "per_example_dropout", dropout)
    model = unet.UNet(**TINY, dropout=0.1)
    params, keys = unet.param_shapes(model, (8, 8, 1)), jax.random.split(jax.random.key(0), 1)
    x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, int)
    jax.eval_shape(lambda params: unet.net_fn(model, params, keys)(x, t), params)
    blocks = [name for name, tree in params.items() if "conv2" in tree]
    assert {rate for rate, _ in seen} == {0.1}
    assert len({tag for _, tag in seen}) == len(seen) == len(blocks) == 8
