"""The algebra of the forward process q and the reverse process p (Ho et al. 2020, Secs. 2-3).

Everything here is a pure function of arrays. The network enters as `eps_fn(x_t, t)`, [B, H, W, C]
and [B] to [B, H, W, C]; parameters and modules are not known here. For time see schedules.py.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

VARIANCES = ("fixed_small", "fixed_large")


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t), and the x0 that its mean is built on."""

    mean: jax.Array  # [B, H, W, C]
    log_variance: jax.Array  # [B, 1, 1, 1]
    x0_pred: jax.Array  # [B, H, W, C]


def _at(coefficients, t, x):
    """Picks coefficients [T] at t [B], shaped to broadcast against x [B, ...]."""
    chex.assert_rank(t, 1)
    chex.assert_equal_shape_prefix((t, x), 1)
    return coefficients[t].reshape(t.shape + (1,) * (x.ndim - 1))


def q_sample(schedule, x0, t, eps):
    """Diffuses x0 to step t in one shot: q(x_t | x_0), Eq. (4).

    Args:
      schedule: coefficients, each [T].
      x0: [B, H, W, C], in [-1, 1].
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], standard normal.

    Returns:
      x_t: [B, H, W, C], √ᾱ_t · x0 + √(1 - ᾱ_t) · eps.
    """
    chex.assert_equal_shape((x0, eps))
    return (
        _at(schedule.sqrt_alpha_bars, t, x0) * x0
        + _at(schedule.sqrt_one_minus_alpha_bars, t, x0) * eps
    )


def predict_x0(schedule, x_t, t, eps):
    """Solves Eq. (4) for x0: x_t / √ᾱ_t - √(1 / ᾱ_t - 1) · eps.

    Args:
      schedule: coefficients, each [T].
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], the (predicted) noise in x_t.

    Returns:
      x0: [B, H, W, C], not clipped.
    """
    chex.assert_equal_shape((x_t, eps))
    return (
        _at(schedule.sqrt_recip_alpha_bars, t, x_t) * x_t
        - _at(schedule.sqrt_recip_alpha_bars_minus_one, t, x_t) * eps
    )


def q_posterior(schedule, x0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), Eqs. (6)-(7).

    Args:
      schedule: coefficients, each [T].
      x0: [B, H, W, C].
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).

    Returns:
      mean: [B, H, W, C], μ̃_t(x_t, x0).
      variance: [B, 1, 1, 1], β̃_t; 0 at t = 0, where x_{t-1} is x0 itself.
    """
    chex.assert_equal_shape((x0, x_t))
    mean = (
        _at(schedule.posterior_mean_coef_x0, t, x_t) * x0
        + _at(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    return mean, _at(schedule.posterior_variance, t, x_t)


def p_mean_variance(schedule, eps_fn, x_t, t, *, variance, clip_x0):
    """p(x_{t-1} | x_t) with the network's ε, Eq. (11) written through x0.

    The mean is μ̃_t(x_t, x0_pred), which equals Eq. (11) when x0 is not clipped. Ho's code clips,
    before the mean is taken.

    Args:
      schedule: coefficients, each [T].
      eps_fn: the network, (x_t, t) to ε.
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).
      variance: "fixed_small" (β̃_t) or "fixed_large" (β_t), Sec. 3.2.
      clip_x0: whether to clip the predicted x0 to [-1, 1].

    Returns:
      A PMeanVariance.
    """
    x0_pred = predict_x0(schedule, x_t, t, eps_fn(x_t, t))
    if clip_x0:
        x0_pred = jnp.clip(x0_pred, -1, 1)
    mean, _ = q_posterior(schedule, x0_pred, x_t, t)
    log_variances = {
        "fixed_small": schedule.fixed_small_log_variance,
        "fixed_large": schedule.fixed_large_log_variance,
    }
    return PMeanVariance(mean, _at(log_variances[variance], t, x_t), x0_pred)


def simple_loss(schedule, eps_fn, x0, t, eps):
    """L_simple of each example, Eq. (14): the ε-MSE, a mean over pixels.

    Args:
      schedule: coefficients, each [T].
      eps_fn: the network, (x_t, t) to ε.
      x0: [B, H, W, C], in [-1, 1].
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], standard normal.

    Returns:
      loss: [B], near 1 for a network that predicts 0.
    """
    eps_pred = eps_fn(q_sample(schedule, x0, t, eps), t)
    chex.assert_equal_shape((eps, eps_pred))
    return jnp.mean(jnp.square(eps - eps_pred), axis=tuple(range(1, eps.ndim)))
