"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) in JAX.

    import ddpm_jax

    run = ddpm_jax.load("runs/digits")
    images = run.sample(16, sampler="ddim", num_steps=20)  # uint8 [16, 8, 8, 1]

The command line does the same; see README.md and docs/.
"""

from ddpm_jax.errors import UserError
from ddpm_jax.interface import Run, config, load, sample, train

__all__ = ["Run", "UserError", "config", "load", "sample", "train"]
