"""The VLB on data for which it is known exactly; tests/references.py has single values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_predict
from scipy.stats import norm

from ddpm_jax import configs
from ddpm_jax.core import diffusion, likelihood, sampling, schedules

HO = schedules.make_schedule("linear", 1000)


@functools.cache
def gaussian_bound(variance, count=64):
    """The VLB of N(0, variance) data with the optimal network."""
    x0 = np.sqrt(variance) * jax.random.normal(jax.random.key(1), (count, 16, 16, 3))
    keys = sampling.image_keys(0, jnp.arange(count))

    def noise(t):
        return sampling.noise(keys, t, x0.shape[1:])

    def bound(x0):
        return likelihood.vlb(HO, gaussian_predict(variance, HO), x0, noise)

    fast = {"xla_backend_optimization_level": 3}  # a long scan
    return x0, jax.jit(bound, compiler_options=fast)(x0)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_gaussian_data(kind):
    """x0 given x_t is Gaussian of variance v_t, and the mean is off by μ̃'s coefficient times it.

    KL = ½ (log(σ²/β̃) + (β̃ + c² v_t) / σ² - 1), averaged over x0 and noise.
    """
    data_variance = 0.25
    _, bound = gaussian_bound(data_variance)
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    small = (betas * (1 - before) / (1 - a))[1:]
    c = (np.sqrt(before) * betas / (1 - a))[1:]
    v = (data_variance * (1 - a) / (a * data_variance + 1 - a))[1:]
    sigma2 = {"fixed_small": small, "fixed_large": betas[1:]}[kind]
    kl = 0.5 * (np.log(sigma2 / small) + (small + c**2 * v) / sigma2 - 1) / np.log(2)
    terms = np.asarray(bound.terms[kind])
    assert terms.shape == (1000, 64)
    assert terms[1:].mean(1).sum() == pytest.approx(kl.sum(), rel=0.01)
    # 49,152 squared errors a term: a standard error of 0.6 %.
    np.testing.assert_allclose(terms[1:].mean(1), kl, rtol=0.04)


def test_x0_error_on_gaussian_data():
    _, bound = gaussian_bound(0.25)
    a = np.float64(HO.alpha_bars)
    expected = 0.25 * (1 - a) / (a * 0.25 + 1 - a)
    np.testing.assert_allclose(np.asarray(bound.x0_mse).mean(1), expected, rtol=0.04)


def test_prior_of_a_chain_that_hardly_adds_noise(config):
    """½ (ᾱ (E[x²] - 1) - log(1 - ᾱ)) with ᾱ = (1 - 1e-8)²; in float32, ᾱ is 1."""
    config.diffusion.update(schedule="linear", num_timesteps=2, beta_start=1e-8, beta_end=1e-8)
    schedule, x0 = configs.make_schedule(config), jnp.full((1, 2, 2, 1), 0.5)
    predict_fn = diffusion.predictor(schedule, lambda x, t: x)
    found = likelihood.vlb(schedule, predict_fn, x0, lambda t: jnp.zeros_like(x0)).prior
    expected = (0.25 - 1 - np.log(2e-8)) / 2 / np.log(2)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    alpha_bar = configs.make_alpha_bars(config)[-1]
    assert likelihood.prior_kl(alpha_bar, 0.25) == pytest.approx(expected, rel=1e-7)


def test_prior_of_each_image():
    x0, bound = gaussian_bound(0.25)
    for image, prior in zip(x0[:3], bound.prior[:3], strict=True):
        expected = likelihood.prior_kl(HO.alpha_bars[-1], float(jnp.mean(image**2)))
        assert float(prior) == pytest.approx(expected, rel=1e-5)


def test_decoder_is_a_distribution():
    """The 256 levels' probabilities sum to 1, wherever the Gaussian is."""
    levels = jnp.arange(256) / 127.5 - 1
    for mean, log_variance in ((0.3, -3.0), (-1.2, -9.8), (0.999, -9.0), (0.0, 2.0)):
        logs = likelihood.decoder_log_likelihood(levels, jnp.full(256, mean), log_variance)
        assert float(jnp.exp(logs).sum()) == pytest.approx(1, abs=1e-5)


def test_decoder_is_the_mass_of_a_gaussian():
    """Against scipy's normal; the tanh is within 2e-4 of it in mass. Floored at 1e-12."""
    levels = np.arange(256) / 127.5 - 1
    sigma = np.exp(-2.0)
    edges = np.concatenate([[-np.inf], levels[:-1] + 1 / 255, [np.inf]])
    mass = np.diff(norm.cdf(edges, 0.1, sigma))
    found = likelihood.decoder_log_likelihood(jnp.float32(levels), jnp.full(256, 0.1), -4.0)
    np.testing.assert_allclose(np.exp(found), mass, atol=2e-4)
    assert float(likelihood.decoder_log_likelihood(-1.0, 1.0, -12.0)) == pytest.approx(
        np.log(1e-12), rel=1e-6
    )


def test_kl_of_gaussians():
    """Against the textbook formula: log(τ/σ) + (σ² + (μ - ν)²) / 2τ² - ½."""
    mu, sigma, nu, tau = 0.3, 0.5, -0.2, 0.8
    expected = np.log(tau / sigma) + (sigma**2 + (mu - nu) ** 2) / (2 * tau**2) - 0.5
    found = likelihood.gaussian_kl(mu, 2 * np.log(sigma), nu, 2 * np.log(tau))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_progressive_code_by_hand():
    """T = 3. After one step x_t of code 2 is known (only L_T sent), after three that of code 0."""
    rate, rmse = likelihood.progressive_code([5.0, 2.0, 1.0], [0.01, 0.04, 0.25], 0.5)
    np.testing.assert_allclose(rate, [0.5, 1.5, 3.5])
    np.testing.assert_allclose(rmse, [63.75, 25.5, 12.75])


def test_the_last_term_is_the_decoder_s():
    """At t = 0 the mean is x0_pred and σ² is β̃ of t = 1: -log₂ of the level's probability."""
    levels = jnp.array([-1.0, 51 / 127.5 - 1, 1.0]).reshape(3, 1, 1, 1)
    b, b1 = 1e-4, 1e-4 + 0.0199 / 999
    sigma = np.sqrt(b1 * b / (1 - (1 - b) * (1 - b1)))  # β̃ of t = 1
    below, above = ((side / 255 - 0.005) / sigma for side in (-1, 1))
    probability = [norm.cdf(above), norm.cdf(above) - norm.cdf(below), norm.sf(below)]
    guess, options = levels + 0.005, {"variances": diffusion.FIXED_VARIANCES}
    found, _ = likelihood.vlb_terms(
        HO, lambda x, t: diffusion.Prediction(guess, None), levels, jnp.zeros(3, int),
        jnp.ones_like(levels), **options,
    )  # fmt: skip
    assert found.keys() == set(diffusion.FIXED_VARIANCES)
    for terms in found.values():
        np.testing.assert_allclose(terms, -np.log2(probability), rtol=2e-3)
