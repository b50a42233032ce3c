"""The variational lower bound (VLB; Ho et al. 2020, Eq. 5), in bits/dim.

  bits/dim = L_T + Σ_{t ≥ 1} L_{t-1} + L_0: the cost of sending an image x0 losslessly. L_T is the
  cost of x_T, L_{t-1} that of x_{t-1} given x_t (code t ≥ 1), and L_0 that of x0 given x_1, under a
  Gaussian discretized to 256 bins (Eq. 13, code t = 0).

The paper calls L_T + Σ L_{t-1} the rate, L_0 the distortion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.core import diffusion

BITS = float(1 / np.log(2))  # per nat
# Above this prior KL (bits/dim), the chain does not end in noise and the user is warned.
MAX_PRIOR_KL = 1e-3


def prior_kl(alpha_bar, mean_square):
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) per dimension: the distance of x_T from noise.

    Args:
      alpha_bar: ᾱ_T, float64 where it may be near 1.
      mean_square: E[x²] of the data, scaled to [-1, 1].

    Returns:
      bits/dim, float: ½ · (ᾱ_T · (E[x²] - 1) - log(1 - ᾱ_T)) / log 2.
    """
    alpha_bar = np.float64(alpha_bar)
    return float((alpha_bar * (mean_square - 1) - np.log1p(-alpha_bar)) / (2 * np.log(2)))


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, …) ‖ N(mean2, …)) of each element, in nats."""
    ratio = log_variance1 - log_variance2
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (jnp.expm1(ratio) - ratio + distance)


def normal_cdf(x):
    """Φ(x), by the tanh approximation that Ho's code uses."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x0, mean, log_variance):
    """log p(x0 | x_1) of each element, Eq. (13).

    The Gaussian's mass between the midpoints to the neighbouring levels; the lowest and the highest
    level get the whole tail. The mass is at least 1e-12, as in Ho's code.

    Args:
      x0: uint8 levels as floats in [-1, 1].
      mean: the Gaussian's mean, of x0's shape.
      log_variance: its log variance, broadcasts against x0.

    Returns:
      nats, of x0's shape.
    """
    scale = jnp.exp(-0.5 * log_variance)
    above = normal_cdf(scale * (x0 - mean + 1 / 255))
    below = normal_cdf(scale * (x0 - mean - 1 / 255))
    mass = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))


def vlb_terms(schedule, predict_fn, x0, t, eps, *, variances):
    """The VLB's term at one t for each image: L_0 where t = 0, else L_t.

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t [B]) to a Prediction; called once.
      x0: [B, H, W, C], uint8 levels as floats in [-1, 1].
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], standard normal: the noise in x_t.
      variances: the variances of p to compute the term for, of diffusion.VARIANCES.

    Returns:
      terms: {variance: [B]}, bits/dim.
      x0_pred: [B, H, W, C].
    """
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    prediction = predict_fn(x_t, t)
    mean, _ = diffusion.q_posterior(schedule, x0, x_t, t)
    log_variance = diffusion.at(schedule.fixed_small_log_variance, t, x0)
    terms = {}
    for variance in variances:
        p = diffusion.p_mean_variance(schedule, lambda *_: prediction, x_t, t, variance=variance)
        kl = gaussian_kl(mean, log_variance, p.mean, p.log_variance)
        decoder = -decoder_log_likelihood(x0, p.mean, p.log_variance)
        cost = jnp.where((t == 0)[:, None, None, None], decoder, kl)
        terms[variance] = cost.mean(axis=(1, 2, 3)) * BITS
    return terms, prediction.x0


class Vlb(NamedTuple):
    """The terms of each image's VLB, bits/dim; entry t of [T] belongs to code t."""

    prior: jax.Array  # [B], L_T
    terms: dict  # {variance: [T, B]}, L_0 at t = 0, L_t elsewhere
    x0_mse: jax.Array  # [T, B], of the x0 predicted from x_t, for images in [-1, 1]


def vlb(schedule, predict_fn, x0, noise_fn, *, variances=diffusion.FIXED_VARIANCES):
    """Every term of Eq. (5), by one `lax.scan` over t; the network runs once for each t.

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t [B]) to a Prediction; clipped, as in Ho's evaluation, or not.
      x0: [B, H, W, C], uint8 levels as floats in [-1, 1].
      noise_fn: t to ε [B, H, W, C], the noise in x_t.
      variances: the variances of p to compute the terms for, of diffusion.VARIANCES.

    Returns:
      A Vlb.
    """

    def body(_, t):
        ts = jnp.full(len(x0), t)
        terms, x0_pred = vlb_terms(schedule, predict_fn, x0, ts, noise_fn(t), variances=variances)
        return None, (terms, jnp.square(x0_pred - x0).mean(axis=(1, 2, 3)))

    _, (terms, x0_mse) = jax.lax.scan(body, None, jnp.arange(schedule.num_timesteps))
    alpha_bar = schedule.alpha_bars[-1]
    mean_square = jnp.square(x0).mean(axis=(1, 2, 3))
    # log(1 - ᾱ_T), each where its argument has all digits in float32.
    sigma = schedule.sqrt_one_minus_alpha_bars[-1]
    log_noise = jnp.where(alpha_bar < 0.5, jnp.log1p(-alpha_bar), 2 * jnp.log(sigma))
    prior = (alpha_bar * (mean_square - 1) - log_noise) * (BITS / 2)
    return Vlb(prior, terms, x0_mse)


def progressive_code(rates, x0_mse, prior):
    """Rate and distortion of progressive lossy compression (Sec. 4.3).

    Args:
      rates: [T], the terms of the VLB, bits/dim.
      x0_mse: [T], of the x0 predicted from x_t.
      prior: L_T, bits/dim.

    Returns:
      (rate, rmse), [T] each. Entry s - 1 is after s reverse steps: the bits/dim that send x_t of
      code t = T - s, and the error of the x0 predicted from it, in levels of [0, 255].
    """
    above_t = np.append(np.cumsum(np.float64(rates)[:0:-1])[::-1], 0.0)  # Σ over codes above t
    rate = prior + above_t
    return rate[::-1], 127.5 * np.sqrt(np.float64(x0_mse))[::-1]
