"""Spacings: which S of the T steps a sampler takes.

Each function maps ᾱ [T] and S to S times in [0, T - 1], ascending; `timesteps` rounds them to whole
steps as diffusers does, to even at .5. Steps that would coincide move apart.
"""

import numpy as np


def leading(alpha_bars, num_steps):
    """Evenly spaced steps from 0: every 20th of 1000 for 50 steps.

    If S does not divide T, ⌊i T / S⌋ spans the whole chain; diffusers takes i ⌊T / S⌋.
    """
    return np.arange(num_steps) * len(alpha_bars) // num_steps


def linspace(alpha_bars, num_steps):
    """Evenly spaced steps from 0 to T - 1, with both ends; a single step is T - 1."""
    last = len(alpha_bars) - 1
    return np.linspace(0, last, num_steps) if num_steps > 1 else np.array([last])


def trailing(alpha_bars, num_steps):
    """Evenly spaced steps that end with T - 1 (Lin et al. 2023, Sec. 3.3)."""
    total = len(alpha_bars)
    # arange may give one step more, below 0. Its rounding errors decide at .5, as in diffusers.
    return np.round(np.arange(total, 0, -total / num_steps)[:num_steps][::-1]) - 1


def quadratic(alpha_bars, num_steps):
    """Steps that grow with t, up to 0.8 T (Song et al. 2020, App. D.2, and their code)."""
    i = np.arange(num_steps)
    return np.floor(0.8 * len(alpha_bars) * (i / max(num_steps - 1, 1)) ** 2)


def logsnr(alpha_bars, num_steps):
    """Evenly spaced in log-SNR, with both ends (Lu et al. 2022); a single step is T - 1."""
    return _interpolate(alpha_bars, lambda low, high: np.linspace(high, low, num_steps)[::-1])


def karras(alpha_bars, num_steps, rho=7):
    """Evenly spaced in (σ / α)^(1/ρ), with both ends (Karras et al. 2022, Eq. 5).

    A single step is T - 1.
    """

    def spaced(low, high):
        roots = np.linspace(np.exp(high / rho), np.exp(low / rho), num_steps)[::-1]
        return rho * np.log(roots)

    return _interpolate(alpha_bars, spaced)


def _interpolate(alpha_bars, spaced):
    """The times, between steps, whose log(σ / α) are `spaced` from the lowest to the highest."""
    log_sigmas = 0.5 * (np.log1p(-alpha_bars) - np.log(alpha_bars))
    return np.interp(spaced(*log_sigmas[[0, -1]]), log_sigmas, np.arange(len(alpha_bars)))


SPACINGS = {f.__name__: f for f in (leading, linspace, trailing, quadratic, logsnr, karras)}
WITH_LAST = ("linspace", "trailing")  # that take T - 1 with every schedule and any S


def timesteps(name, alpha_bars, num_steps, skip_zero=False):
    """The steps that a sampler takes.

    Args:
      name: a key of SPACINGS.
      alpha_bars: ᾱ of the full chain, [T].
      num_steps: S, from 1 to T; with T, all steps.
      skip_zero: for leading and linspace, leave out t = 0, as diffusers' schedulers of the
        solvers.SKIP_ZERO do: leading is i (T // (S + 1)), and linspace has S + 1 steps, i > 0. So
        leading starts at S (T // (S + 1)), which is S itself from S = T / 2 on.

    Returns:
      τ, [S] ints in [0, T), ascending.
    """
    total = len(alpha_bars)
    if num_steps == total:
        return np.arange(total)
    i = np.arange(num_steps)
    if skip_zero and name == "leading":
        times = (i + 1) * (total // (num_steps + 1))
    elif skip_zero and name == "linspace":
        times = linspace(alpha_bars, num_steps + 1)[1:]
    else:
        times = SPACINGS[name](alpha_bars, num_steps)
    distinct = np.maximum.accumulate(np.round(times).astype(int) - i) + i
    return np.minimum(distinct, total - num_steps + i)
