"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) in JAX.

    import ddpm_jax

    run = ddpm_jax.load("runs/digits")
    images = run.sample(16, sampler="ddim", num_steps=20)  # uint8 [16, 8, 8, 1]

These functions are what the command line does, too; README.md and docs/ say more.
"""

from ddpm_jax.errors import UserError
from ddpm_jax.interface import Run, config, load, sample, train

__all__ = ["Run", "UserError", "config", "load", "sample", "train"]
