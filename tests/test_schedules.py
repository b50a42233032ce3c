"""Schedules against their definitions; tests/references.py has single values."""

import jax
import numpy as np
import pytest

from ddpm_jax.core import schedules

ALL = sorted(schedules.SCHEDULES)


def close(actual, expected, rtol=2e-7):
    np.testing.assert_allclose(np.float64(actual), expected, rtol=rtol)


def test_sigmoid():
    """Halfway between its ends in the middle, and point-symmetric about it."""
    betas = np.float64(schedules.make_schedule("sigmoid", 1001).betas)
    close(betas[500], (1e-4 + 0.02) / 2)
    close(betas + betas[::-1], np.full(1001, 1e-4 + 0.02), rtol=1e-6)
    close((betas[1000] - 1e-4) / (0.02 - 1e-4), 0.9975273768433653, rtol=1e-6)  # σ(6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_timesteps", [1, 2, 37, 1000])
def test_composing_the_kernels_gives_the_closed_form(name, num_timesteps):
    """x_t = √(1-β) x_{t-1} + √β ε, step by step, has mean √ᾱ x0 and variance 1 - ᾱ."""
    beta_end = 0.0005 if name == "linear_rescaled" and num_timesteps < 37 else 0.02
    s = schedules.make_schedule(name, num_timesteps, 1e-4, beta_end)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(np.float64(s.betas)):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        close(s.sqrt_alpha_bars[t], mean, rtol=3e-5)
        close(s.sqrt_one_minus_alpha_bars[t], np.sqrt(variance), rtol=3e-5)


@pytest.mark.parametrize("name", ALL)
def test_is_a_frozen_pytree_of_float32(name):
    s = schedules.make_schedule(name, 100, 1e-4, 0.02)
    leaves = jax.tree.leaves(s)
    assert leaves and all(x.shape == (100,) and x.dtype == np.float32 for x in leaves)
    assert all(np.isfinite(x).all() for x in leaves)
    with pytest.raises(AttributeError):
        s.betas = s.alpha_bars


@pytest.mark.parametrize(
    "kwargs, field",
    [
        (dict(name="linaer", num_timesteps=10), "diffusion.schedule='linaer'"),
        (dict(name="linear", num_timesteps=0), "diffusion.num_timesteps=0"),
        (dict(name="linear", num_timesteps=10, beta_start=0), "diffusion.beta_start=0"),
        (dict(name="linear", num_timesteps=10, beta_end=1.0), "diffusion.beta_end=1.0"),
        (dict(name="linear", num_timesteps=10, beta_end=float("nan")), "diffusion.beta_end=nan"),
        (dict(name="linear_rescaled", num_timesteps=20), "num_timesteps=20"),
        (dict(name="linear", num_timesteps=20_000), "num_timesteps=20000"),
    ],
)
def test_bad_input(kwargs, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        schedules.make_schedule(**kwargs)
