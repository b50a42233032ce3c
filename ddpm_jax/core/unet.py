"""The U-Net of Ho et al. 2020 (App. B), which predicts ε from x_t and t; and a classifier of x_t.

Each level has residual blocks at one resolution. Strided convolutions lead to the next level down,
nearest-neighbour upsampling to the next level up, and skip connections join the two paths. At the
attention resolutions, single-head self-attention follows each residual block. The classifier is the
U-Net's down path and middle block.
"""

import zlib
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

ONE = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# Ho's "zero" initialisation: slightly above zero, so that the first gradients are not zero.
NEAR_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def conv3x3(features, dtype, convolve, name, kernel_init=ONE, strides=1):
    """A 3×3 convolution; with stride 2 on even sizes, SAME padding is (0, 1), as in Ho's code."""
    options = {"kernel_init": kernel_init, "dtype": dtype, "name": name}
    return nn.Conv(features, (3, 3), strides, conv_general_dilated=convolve, **options)


def dense(features, dtype, name, kernel_init=ONE):
    """A linear layer on the last axis (on images: a 1×1 convolution)."""
    return nn.Dense(features, kernel_init=kernel_init, dtype=dtype, name=name)


def group_norm(groups, dtype, name):
    """GroupNorm with Ho's ε; its statistics are float32 for every dtype."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, name=name)


def upsample(x):
    """Doubles height and width, nearest neighbour."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def timestep_embedding(t, dim):
    """Sinusoidal embedding of t (Vaswani et al. 2017, as in Ho's code).

    Args:
      t: [B], counted from 0.
      dim: size of the embedding, even and at least 4.

    Returns:
      [B, dim] float32 (float64 under jax_enable_x64): sines, then cosines, at frequencies
      10000^(-i / (dim / 2 - 1)).
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
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
    """norm, swish, conv, + time embedding, norm, swish, dropout, conv, + x."""

    channels: int
    dropout: float
    norm_groups: int
    dtype: jnp.dtype
    convolve: Callable

    @nn.compact
    def __call__(self, x, temb, dropout_keys):
        h = nn.swish(group_norm(self.norm_groups, self.dtype, "norm1")(x))
        h = conv3x3(self.channels, self.dtype, self.convolve, "conv1")(h)
        h += dense(self.channels, self.dtype, "temb")(nn.swish(temb))[:, None, None, :]
        h = nn.swish(group_norm(self.norm_groups, self.dtype, "norm2")(h))
        if dropout_keys is not None and self.dropout > 0:
            tag = zlib.crc32("/".join(self.path).encode())
            h = per_example_dropout(h, self.dropout, dropout_keys, tag)
        h = conv3x3(self.channels, self.dtype, self.convolve, "conv2", NEAR_ZERO)(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, self.dtype, "shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the H·W positions, with a residual connection."""

    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = group_norm(self.norm_groups, self.dtype, "norm")(x)
        h = h.reshape(batch, height * width, channels)
        query = dense(channels, self.dtype, "query")(h)
        key = dense(channels, self.dtype, "key")(h)
        value = dense(channels, self.dtype, "value")(h)
        # The softmax is computed in float32, or in float64 if the network is.
        softmax_dtype = jnp.promote_types(query.dtype, jnp.float32)
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=softmax_dtype)
        weights = nn.softmax(scores / channels**0.5).astype(value.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, value)
        h = dense(channels, self.dtype, "proj", NEAR_ZERO)(h)
        return x + h.reshape(x.shape)


class Network(nn.Module):
    """The layers that the U-Net and the classifier share: the down path and the middle block.

    Attributes:
      channels: width of the first level; a multiple of norm_groups.
      channel_mults: width of each level in multiples of `channels`.
      num_res_blocks: residual blocks per level of the down path; the up path has one more.
      attention_resolutions: heights of the feature maps that get attention.
      dropout: rate inside the residual blocks, in [0, 1).
      norm_groups: groups of every GroupNorm.
      dtype: of the computation (parameters are float32).
      num_classes: K, the number of labels; 0 for an unconditional network.
      remat: whether the backward pass recomputes each block's activations instead of storing them.
      convolve: computes the 3×3 convolutions; has the arguments of lax.conv_general_dilated.
    """

    channels: int
    channel_mults: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    num_classes: int = 0
    remat: bool = False
    convolve: Callable = jax.lax.conv_general_dilated

    def time_embedding(self, t):
        """The embedding of t for every residual block, [B, 4 · channels]."""
        temb = timestep_embedding(t, self.channels)
        temb = dense(4 * self.channels, self.dtype, "temb1")(temb)
        return dense(4 * self.channels, self.dtype, "temb2")(nn.swish(temb))

    def res_block(self, h, features, name, context):
        """A residual block; context is (temb, dropout_keys)."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        options = self.dropout, self.norm_groups, self.dtype, self.convolve
        return block(features, *options, name=name)(h, *context)

    def attention(self, h, name):
        """An attention block."""
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        return block(self.norm_groups, self.dtype, name=name)(h)

    def level_block(self, h, features, name, context):
        """A residual block, followed by attention at the attention resolutions."""
        h = self.res_block(h, features, name, context)
        has_attention = h.shape[1] in self.attention_resolutions
        return self.attention(h, f"{name}_attention") if has_attention else h

    def down_path(self, x, context):
        """The outputs of all layers from x down to the lowest resolution, a list."""
        widths = [mult * self.channels for mult in self.channel_mults]
        h = conv3x3(self.channels, self.dtype, self.convolve, "conv_in")(x)
        skips = [h]
        for level, width in enumerate(widths):
            if level > 0:
                h = conv3x3(
                    widths[level - 1], self.dtype, self.convolve, f"down{level}_conv", strides=2
                )(h)
                skips.append(h)
            for block in range(self.num_res_blocks):
                h = self.level_block(h, width, f"down{level}_block{block}", context)
                skips.append(h)
        return skips

    def mid_block(self, h, context):
        """The blocks at the lowest resolution."""
        width = self.channel_mults[-1] * self.channels
        h = self.res_block(h, width, "middle_block0", context)
        h = self.attention(h, "middle_attention")
        return self.res_block(h, width, "middle_block1", context)

    def output_norm(self, h):
        """The normalisation before the output layer."""
        return nn.swish(group_norm(self.norm_groups, self.dtype, "norm_out")(h))


class UNet(Network):
    """ε_θ(x_t, t), or another prediction target.

    Attributes:
      learned_variance: whether it also predicts a log variance; the others are Network's.
    """

    learned_variance: bool = False

    @nn.compact
    def __call__(self, x, t, labels=None, dropout_keys=None):
        """Predicts the noise in x.

        Args:
          x: [B, H, W, C]; the levels halve H and W, so both are multiples of 2^(levels - 1).
          t: [B] int32, in [0, T).
          labels: [B] int32, in [0, K]; K is "no class", and None is K for all.
          dropout_keys: [B] PRNG keys, or None for no dropout.

        Returns:
          eps_pred: [B, H, W, C], of x's dtype; with learned_variance [B, H, W, 2C].
        """
        chex.assert_rank((x, t), (4, 1))
        assert labels is None or self.num_classes > 0
        temb = self.time_embedding(t)
        if self.num_classes > 0:
            labels = jnp.full(t.shape, self.num_classes) if labels is None else labels
            size, init = (self.num_classes + 1, temb.shape[-1]), nn.initializers.normal(1.0)
            temb += nn.Embed(*size, self.dtype, embedding_init=init, name="labels")(labels)
        context = temb, dropout_keys
        skips = self.down_path(x, context)
        h = self.mid_block(skips[-1], context)
        for level, mult in reversed(tuple(enumerate(self.channel_mults))):
            width = mult * self.channels
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.level_block(h, width, f"up{level}_block{block}", context)
            if level > 0:
                h = conv3x3(width, self.dtype, self.convolve, f"up{level}_conv")(upsample(h))
        assert not skips

        channels = x.shape[-1] * (2 if self.learned_variance else 1)
        h = conv3x3(channels, self.dtype, self.convolve, "conv_out", NEAR_ZERO)(self.output_norm(h))
        return h.astype(x.dtype)


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
        return nn.log_softmax(dense(self.num_classes, self.dtype, "logits")(h).astype(x.dtype))


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
