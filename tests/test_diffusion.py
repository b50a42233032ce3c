"""The algebra against Bayes' rule on a grid and exactly solvable data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import run_solver

from ddpm_jax.core import diffusion, schedules, solvers

HO = schedules.make_schedule("linear", 1000, 1e-4, 0.02)


def scalar(x):
    """A one-pixel image."""
    return jnp.full((1, 1, 1, 1), x, jnp.float32)


def at(t):
    return jnp.array([t], jnp.int32)


def test_q_sample_has_the_closed_forms_moments():
    eps = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
    t = jnp.array([0, 10, 499, 999])
    x_t = diffusion.q_sample(HO, jnp.full(eps.shape, 0.5), t, eps)
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.asarray(t)]
    np.testing.assert_allclose(x_t.mean((1, 2, 3)), 0.5 * np.sqrt(alpha_bars), atol=0.03)
    np.testing.assert_allclose(x_t.var((1, 2, 3)), 1 - alpha_bars, rtol=0.04)


@pytest.mark.parametrize("t", [0, 1, 100, 999])
def test_predict_x0_undoes_q_sample(t):
    x0 = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3), minval=-1, maxval=1)
    eps = jax.random.normal(jax.random.key(2), x0.shape)
    ts = jnp.full((2,), t)
    back = diffusion.predict_x0(HO, diffusion.q_sample(HO, x0, ts, eps), ts, eps)
    np.testing.assert_allclose(back, x0, atol=1e-5 / np.sqrt(float(HO.alpha_bars[t])))


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x0), normalised numerically."""
    betas = np.linspace(1e-4, 0.02, 1000)
    before = np.prod(1 - betas[:t])
    x0, x_t = 0.3, 0.7
    grid = np.linspace(-4, 4, 400_001)
    log_density = -((x_t - np.sqrt(1 - betas[t]) * grid) ** 2) / (2 * betas[t])
    log_density -= (grid - np.sqrt(before) * x0) ** 2 / (2 * (1 - before))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (grid * density).sum()
    variance = ((grid - mean) ** 2 * density).sum()
    ours = diffusion.q_posterior(HO, scalar(x0), scalar(x_t), at(t))
    np.testing.assert_allclose(ours[0].item(), mean, rtol=1e-6)
    np.testing.assert_allclose(ours[1].item(), variance, rtol=1e-5)


def test_posterior_at_zero_is_x0():
    mean, variance = diffusion.q_posterior(HO, scalar(0.3), scalar(0.9), at(0))
    assert mean.item() == pytest.approx(0.3, abs=1e-7)
    assert variance.item() == 0


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_mean_is_equation_11(t):
    """Without clipping: μ = (x_t - β / √(1 - ᾱ) ε) / √α."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.prod(1 - betas[: t + 1])
    predict_fn = diffusion.predictor(HO, lambda x, t: 0.4 * x)
    p = diffusion.p_mean_variance(HO, predict_fn, scalar(0.8), at(t), variance="fixed_large")
    expected = (0.8 - betas[t] / np.sqrt(1 - alpha_bar) * 0.32) / np.sqrt(1 - betas[t])
    np.testing.assert_allclose(p.mean.item(), expected, rtol=2e-5)


def test_clipping_comes_before_the_mean():
    predict_fn = diffusion.clipped(diffusion.predictor(HO, lambda x, t: -x))
    p = diffusion.p_mean_variance(HO, predict_fn, scalar(1.0), at(500), variance="fixed_small")
    assert p.x0_pred.item() == 1.0
    expected, _ = diffusion.q_posterior(HO, scalar(1.0), scalar(1.0), at(500))
    assert p.mean.item() == expected.item()


@pytest.mark.parametrize("variance", diffusion.FIXED_VARIANCES)
def test_fixed_variances(variance):
    predict_fn = diffusion.predictor(HO, lambda x, t: x)
    p = diffusion.p_mean_variance(HO, predict_fn, scalar(1.0), at(500), variance=variance)
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    beta_tilde = betas[500] * (1 - bars[499]) / (1 - bars[500])
    expected = {"fixed_small": beta_tilde, "fixed_large": betas[500]}[variance]
    np.testing.assert_allclose(np.exp(p.log_variance.item()), expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_to_x0_undoes_target(prediction):
    """For each prediction target, the exact target converts back to x0."""
    x0 = jax.random.uniform(jax.random.key(1), (4, 4, 4, 3), minval=-1, maxval=1)
    eps, t = jax.random.normal(jax.random.key(2), x0.shape), jnp.array([0, 1, 100, 400])
    x_t = diffusion.q_sample(HO, x0, t, eps)
    truth = diffusion.target(HO, x0, x_t, t, eps, prediction)
    np.testing.assert_allclose(diffusion.to_x0(HO, truth, x_t, t, prediction), x0, atol=2e-4)
    loss = diffusion.simple_loss(HO, lambda *_: truth, x0, t, eps, prediction)
    np.testing.assert_array_equal(loss, 0)


def optimal(prediction, variance):
    """The best linear guess of each quantity from x_t, for data of this variance, by regression.

    x_t has variance m = ᾱ s² + 1 - ᾱ; its covariance with x0 is √ᾱ s², with ε √(1-ᾱ), and with
    x_{t-1} √α (ᾱ_{t-1} s² + 1 - ᾱ_{t-1}).
    """
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    m = a * variance + 1 - a
    slopes = {
        "eps": np.sqrt(1 - a) / m,
        "x0": np.sqrt(a) * variance / m,
        "mean": np.sqrt(1 - betas) * (before * variance + 1 - before) / m,
        "v": np.sqrt(a * (1 - a)) * (1 - variance) / m,
    }
    slope = jnp.asarray(slopes[prediction], jnp.float32)
    return lambda x_t, t: slope[t].reshape(-1, 1, 1, 1) * x_t


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["x0", "mean", "v"])
def test_every_prediction_gives_the_same_chain(prediction, clip):
    """1,000 steps with the exact predictor of each for N(0, 1/4) data, and the same noise."""

    def sample(prediction):
        predict_fn = diffusion.predictor(HO, optimal(prediction, 0.25), prediction=prediction)
        predict_fn = diffusion.clipped(predict_fn) if clip else predict_fn

        def noise_fn(n, shape):
            return jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (2, *shape))

        x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
        solver = solvers.ancestral(schedules.make_alpha_bars("linear", 1000), "fixed_large")
        return run_solver(solver, predict_fn, x, noise_fn)

    np.testing.assert_allclose(sample(prediction), sample("eps"), atol=1e-4)


@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("v, power", [(-1.0, 0.0), (0.0, 0.5), (1.0, 1.0)])
def test_learned_range(steps, v, power):
    """β^p β̃^(1-p), p = (v + 1) / 2 (Nichol & Dhariwal 2021, Eq. 15), of a shorter chain, too."""
    alpha_bars = schedules.make_alpha_bars("linear", 1000)[999 // steps :: 1000 // steps]
    before = np.append(1.0, alpha_bars[:-1])
    betas = 1 - alpha_bars / before
    small = betas * (1 - before) / (1 - alpha_bars)
    expected = np.log(betas[1:] ** power * small[1:] ** (1 - power))  # β̃ is 0 at t = 0
    t = np.arange(1, steps)
    x_t = jnp.ones((steps - 1, 1, 1, 1))
    predict_fn = diffusion.predictor(
        schedules.from_alpha_bars(alpha_bars),
        lambda x, t: jnp.concatenate([x, v * x], axis=-1),
        learned=True,
    )
    schedule = schedules.from_alpha_bars(alpha_bars)
    p = diffusion.p_mean_variance(schedule, predict_fn, x_t, t, variance="learned_range")
    np.testing.assert_allclose(p.log_variance.ravel(), expected, rtol=2e-6)
    a, b = solvers.ancestral(alpha_bars, "learned_range").log_variance[::-1][1:].T
    np.testing.assert_allclose(a + b * v, expected, rtol=1e-12)


def test_learned_range_at_the_last_step():
    """From β̃ of t = 1, as β̃ is 0 at t = 0, to β of t = 0, as in Nichol & Dhariwal's code."""
    x_t, t = jnp.ones((1, 1, 1, 1)), jnp.array([0])
    for v, expected in ((-1.0, -9.81672513529567), (1.0, np.log(1e-4))):
        predict_fn = diffusion.predictor(
            HO, lambda x, t, v=v: jnp.concatenate([x, v * x], axis=-1), learned=True
        )
        p = diffusion.p_mean_variance(HO, predict_fn, x_t, t, variance="learned_range")
        assert float(p.log_variance[0, 0, 0, 0]) == pytest.approx(expected, rel=1e-6)


def test_learned_variance_is_the_second_half_of_the_output():
    def net_fn(x_t, t):
        return jnp.concatenate([0.4 * x_t, jnp.full_like(x_t, -3.0)], axis=-1)

    x_t = jnp.ones((1, 2, 2, 3))
    learned = diffusion.predictor(HO, net_fn, learned=True)
    p = diffusion.p_mean_variance(HO, learned, x_t, at(500), variance="learned")
    fixed = diffusion.predictor(HO, lambda x, t: 0.4 * x)
    q = diffusion.p_mean_variance(HO, fixed, x_t, at(500), variance="fixed_large")
    np.testing.assert_array_equal(p.mean, q.mean)
    np.testing.assert_array_equal(p.log_variance, jnp.full((1, 2, 2, 3), -3.0))


@pytest.mark.parametrize(
    "variance_in, expected", [(1.0, 0.2755132333968061), (0.25, 0.17305340608368602)]
)
def test_loss_of_the_optimal_predictor_on_gaussian_data(variance_in, expected):
    """For x0 ~ N(0, s²) the best ε is √(1-ᾱ) x_t / (ᾱ s² + 1 - ᾱ); its loss is known."""
    bars = jnp.asarray(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), jnp.float32)

    def eps_fn(x_t, t):
        a = bars[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * x_t / (a * variance_in + 1 - a)

    t = jnp.arange(1000)
    x0 = np.sqrt(variance_in) * jax.random.normal(jax.random.key(3), (1000, 32, 32, 1))
    eps = jax.random.normal(jax.random.key(4), x0.shape)
    loss = diffusion.simple_loss(HO, eps_fn, x0, t, eps)
    assert loss.shape == (1000,)
    assert float(loss.mean()) == pytest.approx(expected, rel=0.005)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        diffusion.q_sample(
            HO, jnp.zeros((2, 4, 4, 1)), jnp.zeros((3,), int), jnp.zeros((2, 4, 4, 1))
        )
    with pytest.raises(AssertionError):
        diffusion.q_sample(
            HO, jnp.zeros((2, 4, 4, 1)), jnp.zeros((2,), int), jnp.zeros((2, 4, 4, 3))
        )
