"""The U-Net of Ho et al. 2020 (App. B), which predicts ε from x_t and t; and a classifier of x_t.

Each level has residual blocks at one resolution. Strided convolutions lead to the next level down,
nearest-neighbour upsampling to the next level up, and skip connections join the two paths. At the
levels with attention, self-attention follows each residual block. The classifier is the U-Net's
down path and middle block.

All of it consists of two blocks, ResBlock and AttentionBlock, which consist of three layers (see
Layers). The defaults are the paper's; the other choices are those of Nichol & Dhariwal 2021 and of
Dhariwal & Nichol 2021 (ADM), and of networks trained with diffusers.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

ONE = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# Ho's "zero" initialisation: slightly above zero, so that the first gradients are not zero.
NEAR_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


class Layers(NamedTuple):
    """The layers that all blocks consist of; each takes a `name`."""

    conv3x3: Callable  # (features): a 3×3 convolution
    dense: Callable  # (features): linear on the last axis; on images, a 1×1 convolution
    group_norm: Callable  # (): its statistics are float32 for every dtype


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of images, with statistics in float32 or more.

    It sums each channel, and then the channels of a group. On a CPU this takes half of the time of
    nn.GroupNorm, whose one sum runs over a few channels at a time. The parameters are the same.

    Attributes:
      num_groups: divides the number of channels.
      epsilon: ε, added to the variance.
      dtype: of the result.
    """

    num_groups: int
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, _, _, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,)).reshape(1, 1, 1, -1)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).reshape(1, 1, 1, -1)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def group_mean(values):
            means = values.mean((1, 2)).reshape(batch, self.num_groups, -1).mean(-1)
            return means.repeat(channels // self.num_groups, axis=-1)[:, None, None]

        mean = group_mean(x)
        variance = jnp.maximum(group_mean(jnp.square(x)) - jnp.square(mean), 0)
        y = (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


def make_layers(norm_groups, norm_eps, dtype, convolve, dot_general=jax.lax.dot_general):
    """The Layers of a network; the arguments are Network's attributes."""
    conv3x3 = functools.partial(
        nn.Conv,
        kernel_size=(3, 3),
        kernel_init=ONE,
        dtype=dtype,
        conv_general_dilated=convolve,
    )
    return Layers(
        conv3x3,
        functools.partial(nn.Dense, kernel_init=ONE, dtype=dtype, dot_general=dot_general),
        functools.partial(GroupNorm, norm_groups, epsilon=norm_eps, dtype=dtype),
    )


def upsample(x):
    """Doubles height and width, nearest neighbour."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def downsample(x):
    """Halves height and width: the mean of each 2×2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def timestep_embedding(t, dim, freq_shift=1):
    """Sinusoidal embedding of t (Vaswani et al. 2017).

    Args:
      t: [B], counted from 0.
      dim: size of the embedding, even and at least 4.
      freq_shift: s below; 1 in Ho's code, 0 in Nichol & Dhariwal's.

    Returns:
      [B, dim] float32 (float64 under jax_enable_x64): sines, then cosines, at frequencies
      10000^(-i / (dim / 2 - s)).
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - freq_shift))
    angles = t.astype(frequencies.dtype)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def per_example_dropout(x, rate, keys, tag):
    """Dropout whose mask depends only on each example's key, not on its place in the batch.

    Args:
      x: [B, ...].
      rate: dropout probability, in [0, 1).
      keys: [B] PRNG keys.
      tag: int, another one for each layer.

    Returns:
      x with some values set to 0, and the others scaled by 1 / (1 - rate).
    """

    def keep_mask(key):
        return jax.random.bernoulli(jax.random.fold_in(key, tag), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep_mask)(keys), x / (1 - rate), 0)


class ResBlock(nn.Module):
    """norm, swish, conv, + time embedding, norm, swish, dropout, conv, + x.

    Attributes:
      channels: of the output.
      layers: Layers.
      dropout: rate, in [0, 1).
      scale_shift: whether the time embedding scales and shifts the second norm's output, instead
        of being added before it (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021, Sec. 3.1).
      resample: what happens to both branches before their convolutions: nothing, `upsample` or
        `downsample` (BigGAN's blocks; Dhariwal & Nichol 2021).
    """

    channels: int
    layers: Layers
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Callable | None = None

    @nn.compact
    def __call__(self, x, temb, dropout_keys):
        conv3x3, dense, group_norm = self.layers
        h = nn.swish(group_norm(name="norm1")(x))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        h = conv3x3(self.channels, name="conv1")(h)
        size = 2 * self.channels if self.scale_shift else self.channels
        temb = dense(size, name="temb")(nn.swish(temb))[:, None, None, :]
        norm2 = group_norm(name="norm2")
        if self.scale_shift:
            scale, shift = jnp.split(temb, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + temb)
        h = nn.swish(h)
        if dropout_keys is not None and self.dropout > 0:
            tag = zlib.crc32("/".join(self.path).encode())
            h = per_example_dropout(h, self.dropout, dropout_keys, tag)
        h = conv3x3(self.channels, kernel_init=NEAR_ZERO, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, name="shortcut")(x)
        return x + h


def split_heads(x, num_heads, head_channels):
    """[B, N, heads · c] to [B · heads, N, c]: for one head, XLA then compiles no transposition."""
    heads = x.reshape(*x.shape[:2], num_heads, head_channels).swapaxes(1, 2)
    return heads.reshape(-1, x.shape[1], head_channels)


def join_heads(x, num_heads, head_channels):
    """The inverse of split_heads."""
    heads = x.reshape(-1, num_heads, x.shape[1], head_channels).swapaxes(1, 2)
    return heads.reshape(-1, x.shape[1], num_heads * head_channels)


def attend(query, key, value):
    """softmax(query keyᵀ / √c) value, each [B · heads, N, c].

    The softmax is computed in float32, or in float64 if the network is; in
    jax.nn.dot_product_attention it is never float64.
    """
    softmax_dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=softmax_dtype)
    weights = nn.softmax(scores / query.shape[-1] ** 0.5).astype(value.dtype)
    return jnp.einsum("bqk,bkc->bqc", weights, value)


class AttentionBlock(nn.Module):
    """Self-attention over the H·W positions (Vaswani et al. 2017), with a residual connection.

    Attributes:
      layers: Layers.
      num_heads: heads of the attention.
      head_channels: channels of each.
      normalizes: whether it begins with a norm.
    """

    layers: Layers
    num_heads: int
    head_channels: int
    normalizes: bool = True

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        _, dense, group_norm = self.layers
        h = group_norm(name="norm")(x) if self.normalizes else x
        h = h.reshape(batch, height * width, channels)
        heads = self.num_heads, self.head_channels
        query, key, value = (
            split_heads(dense(math.prod(heads), name=name)(h), *heads)
            for name in ("query", "key", "value")
        )
        h = join_heads(attend(query, key, value), *heads)
        h = dense(channels, kernel_init=NEAR_ZERO, name="proj")(h)
        return x + h.reshape(x.shape)


class Network(nn.Module):
    """The layers that the U-Net and the classifier share: the down path and the middle block.

    Attributes:
      channels: width of the first convolution and of the embedding of t; a multiple of norm_groups.
      widths: width of each level, the highest resolution first; multiples of norm_groups.
      num_res_blocks: residual blocks per level of the down path; the up path has one more.
      attention_down: levels of the down path with attention; level 0 has the highest resolution.
      attention_up: levels of the up path with attention.
      attention_middle: whether the middle block has attention.
      middle_norm: whether this attention begins with a norm, as the others do.
      num_heads: heads of each attention.
      head_channels: channels of each head, instead of num_heads; 0: num_heads decides.
      resblock_down: levels entered by a downsampling residual block; the others by a strided
        convolution.
      resblock_up: levels left by an upsampling residual block; the others by a convolution.
      symmetric_padding: whether strided convolutions pad (1, 1), as PyTorch's do; otherwise
        (0, 1), as Ho's.
      scale_shift: how the time embedding enters a residual block; see ResBlock.
      dropout: rate inside the residual blocks, in [0, 1).
      norm_groups: groups of every GroupNorm.
      norm_eps: ε of every GroupNorm.
      freq_shift: of the time embedding.
      dtype: of the computation (parameters are float32).
      num_classes: K, the number of labels; 0 for an unconditional network.
      null_class: whether the U-Net has the label K, "no class".
      label_channels: size of the label's embedding, which becomes further channels of x; 0: it is
        added to the embedding of t.
      remat: whether the backward pass recomputes each block's activations instead of storing them.
      convolve: computes the 3×3 convolutions; has the arguments of lax.conv_general_dilated.
      dot_general: computes the linear layers; has the arguments of lax.dot_general.
    """

    channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attention_down: tuple[int, ...] = ()
    attention_up: tuple[int, ...] = ()
    attention_middle: bool = True
    middle_norm: bool = True
    num_heads: int = 1
    head_channels: int = 0
    resblock_down: tuple[int, ...] = ()
    resblock_up: tuple[int, ...] = ()
    symmetric_padding: bool = False
    scale_shift: bool = False
    dropout: float = 0.0
    norm_groups: int = 32
    norm_eps: float = 1e-6
    freq_shift: int = 1
    dtype: jnp.dtype = jnp.float32
    num_classes: int = 0
    null_class: bool = True
    label_channels: int = 0
    remat: bool = False
    convolve: Callable = jax.lax.conv_general_dilated
    dot_general: Callable = jax.lax.dot_general

    @property
    def layers(self):
        """Its Layers."""
        functions = self.convolve, self.dot_general
        return make_layers(self.norm_groups, self.norm_eps, self.dtype, *functions)

    def time_embedding(self, t):
        """The embedding of t for every residual block, [B, 4 · channels]."""
        dense = self.layers.dense
        temb = timestep_embedding(t, self.channels, self.freq_shift)
        temb = dense(4 * self.channels, name="temb1")(temb)
        return dense(4 * self.channels, name="temb2")(nn.swish(temb))

    def res_block(self, h, features, name, context, resample=None):
        """A residual block; context is (temb, dropout_keys)."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        options = {"dropout": self.dropout, "scale_shift": self.scale_shift, "resample": resample}
        return block(features, self.layers, **options, name=name)(h, *context)

    def attention(self, h, name, normalizes=True):
        """An attention block."""
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        count, size = self.num_heads, h.shape[-1] // self.num_heads
        if self.head_channels:
            count, size = h.shape[-1] // self.head_channels, self.head_channels
        return block(self.layers, count, size, normalizes, name=name)(h)

    def level_block(self, h, features, name, context, attends):
        """A residual block, followed by attention at the levels that have it."""
        h = self.res_block(h, features, name, context)
        return self.attention(h, f"{name}_attention") if attends else h

    def down(self, h, level, context):
        """From the level above to `level`: half the height and width."""
        if level in self.resblock_down:
            return self.res_block(h, h.shape[-1], f"down{level}_resblock", context, downsample)
        padding = 1 if self.symmetric_padding else "SAME"  # SAME: (0, 1), since sizes are even
        options = {"strides": 2, "padding": padding, "name": f"down{level}_conv"}
        return self.layers.conv3x3(h.shape[-1], **options)(h)

    def up(self, h, level, context):
        """From `level` to the level above: twice the height and width."""
        if level in self.resblock_up:
            return self.res_block(h, h.shape[-1], f"up{level}_resblock", context, upsample)
        return self.layers.conv3x3(h.shape[-1], name=f"up{level}_conv")(upsample(h))

    def down_path(self, x, context):
        """The outputs of all layers from x down to the lowest resolution, a list."""
        h = self.layers.conv3x3(self.channels, name="conv_in")(x)
        skips = [h]
        for level, width in enumerate(self.widths):
            if level > 0:
                h = self.down(h, level, context)
                skips.append(h)
            for block in range(self.num_res_blocks):
                name, attends = f"down{level}_block{block}", level in self.attention_down
                h = self.level_block(h, width, name, context, attends)
                skips.append(h)
        return skips

    def mid_block(self, h, context):
        """The blocks at the lowest resolution."""
        h = self.res_block(h, self.widths[-1], "middle_block0", context)
        if self.attention_middle:
            h = self.attention(h, "middle_attention", self.middle_norm)
        return self.res_block(h, self.widths[-1], "middle_block1", context)

    def output_norm(self, h):
        """The normalisation before the output layer."""
        return nn.swish(self.layers.group_norm(name="norm_out")(h))


class UNet(Network):
    """ε_θ(x_t, t), or another prediction target.

    Attributes:
      learned_variance: whether it also predicts a variance; the others are Network's.
    """

    learned_variance: bool = False

    def label_embedding(self, labels, batch):
        """[B, 4 · channels], or [B, label_channels]; labels None: the null class for all."""
        if labels is None:
            assert self.null_class or self.is_initializing()
            labels = jnp.full(batch, self.num_classes)
        size = self.num_classes + self.null_class, self.label_channels or 4 * self.channels
        init = nn.initializers.normal(1.0)
        return nn.Embed(*size, self.dtype, embedding_init=init, name="labels")(labels)

    @nn.compact
    def __call__(self, x, t, labels=None, dropout_keys=None):
        """Predicts the noise in x.

        Args:
          x: [B, H, W, C]; the levels halve H and W, so both are multiples of 2^(levels - 1).
          t: [B] int32, in [0, T).
          labels: [B] int32, in [0, K], or [0, K) without a null class; K is "no class", and None is
            K for all.
          dropout_keys: [B] PRNG keys, or None for no dropout.

        Returns:
          eps_pred: [B, H, W, C], of x's dtype; with learned_variance [B, H, W, 2C].
        """
        chex.assert_rank((x, t), (4, 1))
        assert labels is None or self.num_classes > 0
        temb, inputs = self.time_embedding(t), x
        if self.num_classes > 0:
            embedding = self.label_embedding(labels, len(t))
            if self.label_channels:
                of_pixels = jnp.broadcast_to(
                    embedding[:, None, None], (*x.shape[:3], self.label_channels)
                )
                inputs = jnp.concatenate([x, of_pixels], axis=-1)
            else:
                temb += embedding
        context = temb, dropout_keys
        skips = self.down_path(inputs, context)
        h = self.mid_block(skips[-1], context)
        for level in reversed(range(len(self.widths))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                name, attends = f"up{level}_block{block}", level in self.attention_up
                h = self.level_block(h, self.widths[level], name, context, attends)
            if level > 0:
                h = self.up(h, level, context)
        assert not skips

        channels = x.shape[-1] * (2 if self.learned_variance else 1)
        conv_out = self.layers.conv3x3(channels, kernel_init=NEAR_ZERO, name="conv_out")
        return conv_out(self.output_norm(h)).astype(x.dtype)


class Classifier(Network):
    """log p(y | x_t) of each label (Dhariwal & Nichol 2021); its attributes are Network's."""

    @nn.compact
    def __call__(self, x, t, dropout_keys=None):
        """Classifies x.

        Args:
          x: [B, H, W, C], x_t.
          t: [B] int32, in [0, T).
          dropout_keys: [B] PRNG keys, or None for no dropout.

        Returns:
          log p: [B, K], of x's dtype.
        """
        context = self.time_embedding(t), dropout_keys
        h = self.output_norm(self.mid_block(self.down_path(x, context)[-1], context)).mean((1, 2))
        logits = self.layers.dense(self.num_classes, name="logits")(h)
        return nn.log_softmax(logits.astype(x.dtype))


def param_shapes(model, image_shape):
    """The shapes of a network's parameters, a tree of ShapeDtypeStructs.

    Args:
      model: the network.
      image_shape: (H, W, C).
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]


def net_fn(model, params, dropout_keys=None):
    """The network as a function for diffusion.py: (x_t [B, H, W, C], t [B]) to its output.

    A conditional network takes labels [B] as a third argument.
    """

    def apply(x_t, t, *labels):
        return model.apply({"params": params}, x_t, t, *labels, dropout_keys=dropout_keys)

    return apply
