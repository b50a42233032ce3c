"""The U-Net of Ho et al. 2020 (App. B): predicts ε from x_t and t.

Each level runs residual blocks at one resolution; levels are joined by strided convolutions down
and nearest-neighbour upsampling up, with skip connections between them. Blocks at the attention
resolutions are followed by single-head self-attention.
"""

import zlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

ONE = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# Ho's "zero" initialisation: not quite zero, so the first gradients are not either.
NEAR_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def conv3x3(features, dtype, name, kernel_init=ONE, strides=1):
    """A 3×3 convolution; SAME padding is (0, 1) for stride 2 on even sizes, as Ho's is."""
    return nn.Conv(
        features, (3, 3), strides=strides, kernel_init=kernel_init, dtype=dtype, name=name
    )


def dense(features, dtype, name, kernel_init=ONE):
    """A linear map of the last axis (on images: a 1×1 convolution)."""
    return nn.Dense(features, kernel_init=kernel_init, dtype=dtype, name=name)


def group_norm(groups, dtype, name):
    """GroupNorm with Ho's ε; its statistics are float32 whatever dtype is."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, name=name)


def upsample(x):
    """Doubles height and width, nearest neighbour."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def timestep_embedding(t, dim):
    """Sinusoidal embedding of t (Vaswani et al. 2017, as in Ho's code).

    Args:
      t: [B], counted from 0.
      dim: its size, even and at least 4.

    Returns:
      [B, dim] float32 (float64 under jax_enable_x64): sines, then cosines, at frequencies
      10000^(-i / (dim / 2 - 1)).
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
    angles = t.astype(frequencies.dtype)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def per_example_dropout(x, rate, keys, tag):
    """Dropout whose mask depends on each example's key only, not on its place in a batch.

    Args:
      x: [B, ...].
      rate: probability of a zero, in [0, 1).
      keys: [B] PRNG keys.
      tag: int that tells this layer from the others.

    Returns:
      x with zeros, the rest scaled by 1 / (1 - rate).
    """

    def keep_mask(key):
        return jax.random.bernoulli(jax.random.fold_in(key, tag), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep_mask)(keys), x / (1 - rate), 0)


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv; around it a shortcut."""

    channels: int
    dropout: float
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, temb, dropout_keys):
        h = nn.swish(group_norm(self.norm_groups, self.dtype, "norm1")(x))
        h = conv3x3(self.channels, self.dtype, "conv1")(h)
        h += dense(self.channels, self.dtype, "temb")(nn.swish(temb))[:, None, None, :]
        h = nn.swish(group_norm(self.norm_groups, self.dtype, "norm2")(h))
        if dropout_keys is not None and self.dropout > 0:
            tag = zlib.crc32("/".join(self.path).encode())
            h = per_example_dropout(h, self.dropout, dropout_keys, tag)
        h = conv3x3(self.channels, self.dtype, "conv2", NEAR_ZERO)(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, self.dtype, "shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the H·W positions, one head; around it a shortcut."""

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
        # The softmax is float32 at least (jax.nn's is at most, too).
        at_least = jnp.promote_types(query.dtype, jnp.float32)
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=at_least)
        weights = nn.softmax(scores / channels**0.5).astype(value.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, value)
        h = dense(channels, self.dtype, "proj", NEAR_ZERO)(h)
        return x + h.reshape(x.shape)


class UNet(nn.Module):
    """ε_θ(x_t, t).

    Attributes:
      channels: width of the first level; a multiple of norm_groups.
      channel_mults: width of each level in multiples of `channels`.
      num_res_blocks: residual blocks of a level on the way down; one more on the way up.
      attention_resolutions: heights of the feature maps that get attention.
      dropout: rate inside the residual blocks, in [0, 1).
      norm_groups: groups of every GroupNorm.
      dtype: of the computation (parameters are float32).
    """

    channels: int
    channel_mults: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, t, dropout_keys=None):
        """Predicts the noise in x.

        Args:
          x: [B, H, W, C]; the levels halve H and W, so both are multiples of 2^(levels - 1).
          t: [B] int32, in [0, T).
          dropout_keys: [B] PRNG keys, or None for no dropout.

        Returns:
          eps_pred: [B, H, W, C], of x's dtype.
        """
        chex.assert_rank((x, t), (4, 1))

        def res_block(h, features, name):
            block = ResBlock(features, self.dropout, self.norm_groups, self.dtype, name=name)
            return block(h, temb, dropout_keys)

        def attention(h, name):
            return AttentionBlock(self.norm_groups, self.dtype, name=name)(h)

        def level_block(h, features, name):
            h = res_block(h, features, name)
            attends = h.shape[1] in self.attention_resolutions
            return attention(h, f"{name}_attention") if attends else h

        temb = timestep_embedding(t, self.channels)
        temb = dense(4 * self.channels, self.dtype, "temb1")(temb)
        temb = dense(4 * self.channels, self.dtype, "temb2")(nn.swish(temb))

        widths = [mult * self.channels for mult in self.channel_mults]
        h = conv3x3(self.channels, self.dtype, "conv_in")(x)
        skips = [h]
        for level, width in enumerate(widths):
            if level > 0:
                h = conv3x3(widths[level - 1], self.dtype, f"down{level}_conv", strides=2)(h)
                skips.append(h)
            for block in range(self.num_res_blocks):
                h = level_block(h, width, f"down{level}_block{block}")
                skips.append(h)

        h = res_block(h, widths[-1], "middle_block0")
        h = attention(h, "middle_attention")
        h = res_block(h, widths[-1], "middle_block1")

        for level, width in reversed(tuple(enumerate(widths))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = level_block(h, width, f"up{level}_block{block}")
            if level > 0:
                h = conv3x3(width, self.dtype, f"up{level}_conv")(upsample(h))
        assert not skips

        h = nn.swish(group_norm(self.norm_groups, self.dtype, "norm_out")(h))
        return conv3x3(x.shape[-1], self.dtype, "conv_out", NEAR_ZERO)(h).astype(x.dtype)


def make_model(model):
    """The U-Net that a config's `model` section describes; dtype is a name there."""
    return UNet(**{**model, "dtype": jnp.dtype(model.dtype)})


def param_shapes(model, image_shape):
    """The tree of a network's parameters, as ShapeDtypeStructs.

    Args:
      model: the U-Net.
      image_shape: (H, W, C).
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]


def eps_fn(model, params, dropout_keys=None):
    """The network as diffusion.py wants it: (x_t [B, H, W, C], t [B]) to ε."""
    return lambda x_t, t: model.apply({"params": params}, x_t, t, dropout_keys)
