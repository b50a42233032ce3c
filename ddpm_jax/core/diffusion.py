"""The algebra of the forward process q and the reverse process p (Ho et al. 2020, Secs. 2-3).

Everything here is a pure function of arrays: no parameters, no modules. A network enters as
`predict_fn(x_t, t)`, which maps [B, H, W, C] and [B] to a Prediction. `predictor` makes a
predict_fn of a network, for every prediction target; samplers and likelihood take only predict_fn.
schedules.py defines t.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

PREDICTIONS = ("eps", "x0", "mean", "v")
FIXED_VARIANCES = ("fixed_small", "fixed_large")
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCES = FIXED_VARIANCES + LEARNED_VARIANCES


class Prediction(NamedTuple):
    """The network's prediction at x_t."""

    x0: jax.Array  # [B, H, W, C]
    variance: jax.Array | None  # [B, H, W, C], what log_variance_line takes; None unless learned


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t), and the predicted x0 in its mean."""

    mean: jax.Array  # [B, H, W, C]
    log_variance: jax.Array  # [B, 1, 1, 1]; learned: [B, H, W, C]
    x0_pred: jax.Array  # [B, H, W, C]


def at(coefficients, t, x):
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
        at(schedule.sqrt_alpha_bars, t, x0) * x0
        + at(schedule.sqrt_one_minus_alpha_bars, t, x0) * eps
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
        at(schedule.sqrt_recip_alpha_bars, t, x_t) * x_t
        - at(schedule.sqrt_recip_alpha_bars_minus_one, t, x_t) * eps
    )


def predict_eps(schedule, x_t, t, x0):
    """Solves Eq. (4) for ε: (x_t - √ᾱ_t · x0) / √(1 - ᾱ_t).

    Args:
      schedule: coefficients, each [T].
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).
      x0: [B, H, W, C], the (predicted) image.

    Returns:
      eps: [B, H, W, C].
    """
    chex.assert_equal_shape((x_t, x0))
    noise = x_t - at(schedule.sqrt_alpha_bars, t, x_t) * x0
    return noise / at(schedule.sqrt_one_minus_alpha_bars, t, x_t)


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
        at(schedule.posterior_mean_coef_x0, t, x_t) * x0
        + at(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    return mean, at(schedule.posterior_variance, t, x_t)


def target(schedule, x0, x_t, t, eps, prediction):
    """The prediction target at x_t (Sec. 3.2; Table 2).

    Args:
      schedule: coefficients, each [T].
      x0: [B, H, W, C], in [-1, 1].
      x_t: [B, H, W, C], from q_sample.
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], the noise in x_t.
      prediction: "eps", "x0", "mean" (μ̃_t) or "v" (√ᾱ_t · eps - √(1 - ᾱ_t) · x0, Salimans & Ho
        2022, App. D).

    Returns:
      [B, H, W, C].
    """
    if prediction == "eps":
        return eps
    if prediction == "mean":
        return q_posterior(schedule, x0, x_t, t)[0]
    if prediction == "v":
        a, b = schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars
        return at(a, t, x0) * eps - at(b, t, x0) * x0
    return x0


def to_x0(schedule, output, x_t, t, prediction):
    """Converts a network's output to x0: the inverse of `target`.

    Args:
      schedule: coefficients, each [T].
      output: [B, H, W, C], the network's output.
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).
      prediction: the prediction target, one of PREDICTIONS.

    Returns:
      x0: [B, H, W, C], not clipped.
    """
    if prediction == "eps":
        return predict_x0(schedule, x_t, t, output)
    if prediction == "mean":
        x_t_term = at(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
        return (output - x_t_term) / at(schedule.posterior_mean_coef_x0, t, x_t)
    if prediction == "v":
        a, b = schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars
        return at(a, t, x_t) * x_t - at(b, t, x_t) * output
    return output


def predictor(schedule, net_fn, *, prediction="eps", learned=False):
    """Makes a predict_fn of a network.

    Args:
      schedule: coefficients, each [T], of all steps that the network was trained on.
      net_fn: the network, (x_t [B, H, W, C], t [B], …) to [B, H, W, C].
      prediction: the prediction target, one of PREDICTIONS.
      learned: whether the output is [B, H, W, 2C], whose second half is a learned variance; see
        log_variance_line.

    Returns:
      predict_fn: (x_t, t, …) to a Prediction, not clipped.
    """

    def predict_fn(x_t, t, *condition):
        output, variance = net_fn(x_t, t, *condition), None
        if learned:
            output, variance = jnp.split(output, 2, axis=-1)
        chex.assert_equal_shape((output, x_t))
        return Prediction(to_x0(schedule, output, x_t, t, prediction), variance)

    return predict_fn


def clipped(predict_fn):
    """Returns predict_fn with x0 clipped to [-1, 1]."""

    def clip(*args):
        prediction = predict_fn(*args)
        return prediction._replace(x0=jnp.clip(prediction.x0, -1, 1))

    return clip


def dynamically_thresholded(predict_fn, quantile):
    """Returns predict_fn with dynamic thresholding of x0 (Saharia et al. 2022, Sec. 2.3).

      s = max(1, the quantile of |x0| over an image's values),  x0 ← clip(x0, -s, s) / s

    Args:
      predict_fn: (x_t, t, …) to a Prediction.
      quantile: in (0, 1]; 0.995 in Imagen's code. 1 divides by max |x0| where that is above 1.
    """

    def threshold(*args):
        prediction = predict_fn(*args)
        x0, axes = prediction.x0, tuple(range(1, prediction.x0.ndim))
        s = jnp.maximum(1, jnp.quantile(jnp.abs(x0), quantile, axis=axes, keepdims=True))
        return prediction._replace(x0=jnp.clip(x0, -s, s) / s)

    return threshold


def log_variance_line(log_small, log_large, variance):
    """log σ² of p(x_{t-1} | x_t) as a + b · v, where v is the second half of the network's output.

    "learned" is v itself, as in Ho's code. "learned_range" lies between log β̃_t at v = -1 and
    log β_t at v = 1 (Nichol & Dhariwal 2021, Eq. 15), those of the chain at hand: of fewer steps,
    too. The fixed variances do not depend on v.

    Args:
      log_small: log β̃, [T].
      log_large: log β, [T].
      variance: one of VARIANCES.

    Returns:
      (a, b): each [T].
    """
    zero = 0 * log_small
    return {
        "fixed_small": (log_small, zero),
        "fixed_large": (log_large, zero),
        "learned": (zero, zero + 1),
        "learned_range": ((log_large + log_small) / 2, (log_large - log_small) / 2),
    }[variance]


def p_mean_variance(schedule, predict_fn, x_t, t, *, variance):
    """p(x_{t-1} | x_t): Eq. (11), written through x0.

    The mean is μ̃_t(x_t, x0_pred), which equals Eq. (11) when x0 is not clipped. Ho's code clips x0
    before it computes the mean.

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t) to a Prediction.
      x_t: [B, H, W, C].
      t: [B] int32, in [0, T).
      variance: one of VARIANCES: "fixed_small" (β̃_t), "fixed_large" (β_t), Sec. 3.2, or learned.

    Returns:
      A PMeanVariance.
    """
    x0_pred, v = predict_fn(x_t, t)
    mean, _ = q_posterior(schedule, x0_pred, x_t, t)
    log_small, log_large = schedule.fixed_small_log_variance, schedule.fixed_large_log_variance
    if variance == "learned_range":
        log_large = jnp.log(schedule.betas)  # β at t = 0, where fixed_large has β̃ of t = 1
    a, b = log_variance_line(log_small, log_large, variance)
    log_variance = at(a, t, x_t)
    if variance in LEARNED_VARIANCES:
        log_variance += at(b, t, x_t) * v
    return PMeanVariance(mean, log_variance, x0_pred)


def simple_loss(schedule, net_fn, x0, t, eps, prediction="eps"):
    """L_simple of each example, Eq. (14): the MSE of the prediction, averaged over pixels.

    Args:
      schedule: coefficients, each [T].
      net_fn: the network, (x_t, t) to its output.
      x0: [B, H, W, C], in [-1, 1].
      t: [B] int32, in [0, T).
      eps: [B, H, W, C], standard normal.
      prediction: the prediction target, one of PREDICTIONS.

    Returns:
      loss: [B]; with "eps" near 1 for a network that predicts 0.
    """
    x_t = q_sample(schedule, x0, t, eps)
    output, expected = net_fn(x_t, t), target(schedule, x0, x_t, t, eps, prediction)
    chex.assert_equal_shape((expected, output))
    return jnp.mean(jnp.square(expected - output), axis=tuple(range(1, eps.ndim)))
