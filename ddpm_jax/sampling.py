"""The reverse process (Ho et al. 2020, Algorithm 2).

Each image has its own PRNG key, folded with t at every step, so an image depends on its key and
on nothing else: not on the batch it is made in, nor on the number of devices.
"""

import jax
import jax.numpy as jnp

from ddpm_jax import diffusion


def image_keys(seed, indices):
    """[N] PRNG keys, one for each image index; the same index always gives the same image."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def noise(keys, t, shape):
    """Standard normal noise, [N, *shape], for step t of the images with these keys."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def prior(keys, num_timesteps, image_shape):
    """x_T ~ N(0, I), [N, *image_shape]: where the reverse process starts."""
    return noise(keys, num_timesteps, image_shape)


def ancestral_step(schedule, eps_fn, x_t, t, eps, *, variance, clip_x0):
    """One line of Algorithm 2: draws x_{t-1} ~ p(x_{t-1} | x_t).

    Args:
      schedule: coefficients, each [T].
      eps_fn: the network, (x_t, t [B]) to ε.
      x_t: [B, H, W, C].
      t: int32 scalar, in [0, T).
      eps: [B, H, W, C], standard normal; not used at t = 0, the last step.
      variance: "fixed_small" or "fixed_large".
      clip_x0: whether to clip the predicted x0 to [-1, 1].

    Returns:
      x_{t-1}: [B, H, W, C]; at t = 0 the image.
    """
    p = diffusion.p_mean_variance(
        schedule, eps_fn, x_t, jnp.full(x_t.shape[:1], t), variance=variance, clip_x0=clip_x0
    )
    return p.mean + jnp.where(t > 0, jnp.exp(0.5 * p.log_variance), 0) * eps


def reverse_process(step_fn, x, ts, frames_at=(), frames=None):
    """Runs x = step_fn(x, t) over ts as one `lax.scan`, and keeps the frames asked for.

    Args:
      step_fn: (x_t, t) to x_{t-1}.
      x: [B, H, W, C], the state before the first step.
      ts: [S] int32, the steps in the order they are taken, as T - 1, …, 0.
      frames_at: distinct ts after which to keep x; K of them.
      frames: [K, B, H, W, C], frames kept by an earlier call that this one continues; zeros
        where there is none.

    Returns:
      x: [B, H, W, C], after the last step.
      frames: [K, B, H, W, C], in the order of frames_at; a t that ts does not hold leaves its
        frame as it was.
    """
    if frames is None:
        frames = jnp.zeros((len(frames_at), *x.shape), x.dtype)

    def body(carry, t):
        x, frames = carry
        x = step_fn(x, t)
        if frames_at:
            hit = jnp.asarray(frames_at) == t
            # Nothing is written at the index past the end.
            slot = jnp.where(hit.any(), hit.argmax(), len(frames_at))
            frames = frames.at[slot].set(x, mode="drop")
        return (x, frames), None

    return jax.lax.scan(body, (x, frames), ts)[0]
