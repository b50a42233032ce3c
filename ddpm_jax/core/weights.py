"""Weights of the timesteps in L_simple (Eq. 14), for which every t counts the same.

With SNR = ᾱ / (1 - ᾱ), the MSE of ε is SNR times that of x0, and the MSE of v SNR + 1 times that of
x0. So each weight is defined once, as w(SNR) of the MSE of x0, and divided by this factor.
"""

import numpy as np

WEIGHTS = ("none", "min_snr", "p2", "truncated_snr")
PREDICTIONS = ("eps", "x0", "v")  # that these weights are defined for


def loss_weights(alpha_bars, prediction, name, *, min_snr_gamma=5.0, p2_gamma=1.0, p2_k=1.0):
    """The weight of each t.

      min_snr        w = min(SNR, γ)          Hang et al. 2023
      p2             w = SNR / (k + SNR)^γ    Choi et al. 2022
      truncated_snr  w = max(SNR, 1)          Salimans & Ho 2022

    Where SNR = 0 (zero terminal SNR), the weight is 1, as in Hang et al.'s code: a sampler begins
    there, so it must be trained.

    Args:
      alpha_bars: ᾱ, [T] float64.
      prediction: one of PREDICTIONS.
      name: one of WEIGHTS; with "none", the weights are 1, whatever the prediction.
      min_snr_gamma: γ of min_snr.
      p2_gamma: γ of p2; 0 is no weighting for ε.
      p2_k: k of p2.

    Returns:
      [T] float64.
    """
    snr = alpha_bars / (1 - alpha_bars)
    if name == "none":
        return np.ones_like(snr)
    mse = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[prediction]
    if name == "min_snr":
        weights = np.minimum(snr, min_snr_gamma)
    elif name == "p2":
        weights = snr / (p2_k + snr) ** p2_gamma
    else:
        weights = np.maximum(snr, 1)
    return np.divide(weights, mse, out=np.ones_like(snr), where=snr > 0)
