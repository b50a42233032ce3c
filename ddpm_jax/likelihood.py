"""The variational bound (Ho et al. 2020, Eq. 5), in bits/dim."""

import numpy as np


def prior_kl(schedule, mean_square):
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) per dimension: how far from noise the chain ends.

    Args:
      schedule: coefficients, each [T].
      mean_square: E[x²] of the data, scaled to [-1, 1].

    Returns:
      bits/dim, float: ½ · (ᾱ_T · (E[x²] - 1) - log(1 - ᾱ_T)) / log 2.
    """
    alpha_bar = np.float64(schedule.alpha_bars[-1])
    return float((alpha_bar * (mean_square - 1) - np.log1p(-alpha_bar)) / (2 * np.log(2)))
