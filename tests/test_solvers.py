"""Solvers against the exact solution for Gaussian data, in float64; spacings; zero terminal SNR."""

import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_outcome, run_solver

from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings

S2 = 0.25  # the data are N(0, S2)
HO = schedules.make_alpha_bars("linear", 1000)
ALL = [
    ("ancestral", {}),
    ("ddim", {}),
    ("dpmpp", {"order": 1}),
    ("dpmpp", {"order": 2}),
    ("dpmpp", {"order": 3}),
    ("dpmpp_sde", {}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("heun", {}),
    ("plms", {}),
]
DETERMINISTIC = [(name, options) for name, options in ALL if name not in ("ancestral", "dpmpp_sde")]


def gain(alpha_bar):
    """E[x0 | x_t] = gain · x_t."""
    return np.sqrt(alpha_bar) * S2 / (alpha_bar * S2 + 1 - alpha_bar)


def exact(alpha_bar):
    """x_t along the ODE, up to a constant factor."""
    return np.sqrt(alpha_bar * S2 + 1 - alpha_bar)


def run(solver, alpha_bars, state, rows):
    """The state after some rows, with the exact predictor; in float64."""
    for n in rows:
        prediction = gain(alpha_bars[solver.steps[n]]) * state[0]
        state = solver.weights[n] @ np.array([*state, prediction, 0.0])
    return state


def even_in_log_snr(num_steps):
    """ᾱ of steps with λ from -3 to 1."""
    return 1 / (1 + np.exp(-2 * np.linspace(1, -3, num_steps)))


@pytest.mark.parametrize(
    "name, options, order",
    [
        ("ddim", {}, 1),
        ("dpmpp", {"order": 1}, 1),
        ("dpmpp", {"order": 2}, 2),
        ("dpmpp", {"order": 3}, 3),
        ("heun", {}, 2),
        ("plms", {}, 2),  # Liu et al. 2022: of second order
        ("unipc", {"order": 2}, 3),  # UniC adds one (Zhao et al. 2023, Theorem 3.1)
        ("unipc", {"order": 3}, 3),  # as its first two steps are of lower order
    ],
)
def test_order_of_convergence(name, options, order):
    """The largest error along the ODE falls as h^order, from S = 40 to 160 steps.

    Without the step to the data, which is of first order: `test_the_ode_s_end` has it.
    """
    errors = []
    for num_steps in (40, 80, 160):
        alpha_bars = even_in_log_snr(num_steps)
        solver, x = solvers.SOLVERS[name](alpha_bars, **options), exact(alpha_bars)
        ends = {n: i - 1 for i, (_, n) in solvers.rows_of_steps(solver).items() if i > 0}
        state, error = np.eye(solver.weights.shape[1])[0] * x[-1], 0
        for n in range(max(ends) + 1):
            state = run(solver, alpha_bars, state, [n])
            if n in ends:
                error = max(error, abs(state[0] / x[ends[n]] - 1))
        errors.append(error)
    assert np.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name, options", DETERMINISTIC)
def test_the_ode_s_end(name, options):
    """x_0 = x_T · s / √(ᾱ_T s² + 1 - ᾱ_T), with all steps of Ho's schedule."""
    solver = solvers.SOLVERS[name](HO, **options)
    out = run(solver, HO, np.eye(solver.weights.shape[1])[0], range(len(solver.steps)))[0]
    expected = np.sqrt(S2) / exact(HO[-1])
    # From t = 0 all go to the mean of x0, whose variance is smaller: 1e-4 / s² of it.
    tolerance = 4e-3 if name == "ddim" or options == {"order": 1} else 4e-4
    assert out == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name, options", ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_few_steps(name, options, num_steps, zero_terminal_snr):
    """Finite; of data that are a point, every method finds the point, and is on the way to it.

    x_t of such data is √ᾱ_t times the point, plus noise that is √(1 - ᾱ_t) times as large
    as that of x_T; only methods that add noise change it.
    """
    alpha_bars = schedules.make_alpha_bars("linear", 1000, zero_terminal_snr=zero_terminal_snr)
    alpha_bars = alpha_bars[spacings.timesteps("trailing", alpha_bars, num_steps)]
    solver = solvers.SOLVERS[name](alpha_bars, **options)
    assert np.isfinite(solver.weights).all()
    sigma, state = np.sqrt(1 - alpha_bars[-1]), np.eye(solver.weights.shape[1])[0]
    state = state * (0.3 * np.sqrt(alpha_bars[-1]) + 0.5 * sigma)
    after = {m: i for i, (_, m) in solvers.rows_of_steps(solver).items()}
    for n, row in enumerate(solver.weights):
        state = row @ np.array([*state, 0.3, 0.0])
        i = after.get(n, 0)  # x_{i - 1} is final
        if i and name in ("ddim", "dpmpp", "unipc", "heun", "plms"):
            on_the_way = np.sqrt(alpha_bars[i - 1]) * 0.3 + np.sqrt(1 - alpha_bars[i - 1]) * 0.5
            assert state[0] == pytest.approx(on_the_way, rel=1e-6)
    assert state[0] == pytest.approx(0.3)


@pytest.mark.parametrize("name, options", ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 12])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_calls_of_the_network(name, options, num_steps, zero_snr):
    """NFE: S; for Heun 2 S - 1, for PLMS S + 1 if it has more than one step.

    With zero terminal SNR one less for these: the first step is an Euler step.
    """
    calls = []
    alpha_bars = schedules.make_alpha_bars("linear", 1000, zero_terminal_snr=zero_snr)
    alpha_bars = alpha_bars[spacings.timesteps("linspace", HO, num_steps)]
    solver = solvers.SOLVERS[name](alpha_bars, **options)
    x = jnp.ones((1, 2, 2, 1))

    def predict_fn(x_t, t):
        calls.append(int(t[0]))
        return diffusion.Prediction(0.5 * x_t, None)

    step = sampling.make_step(solver, predict_fn, lambda _, shape: jnp.ones((1, *shape)))
    state = sampling.init_state(solver, x)
    for n in range(len(solver.steps)):
        state, _ = step(state, n)
    twice = num_steps > 1 and not zero_snr  # whether the first step calls the network twice
    more = {"heun": max(num_steps - 2, 0) + twice, "plms": twice}.get(name, 0)
    assert len(calls) == solvers.num_calls(solver) == num_steps + more
    assert calls[0] == num_steps - 1 and calls[-1] == 0 and set(calls) == set(range(num_steps))


@pytest.mark.parametrize(
    "name, calls, rows",
    [
        ("ddim", [3, 2, 1, 0], {3: (0, 0), 2: (1, 1), 1: (2, 2), 0: (3, 3)}),
        # Heun calls the network at x_3 and at its first try of x_2, then at x_2 itself, …
        ("heun", [3, 2, 2, 1, 1, 0, 0], {3: (0, 1), 2: (2, 3), 1: (4, 5), 0: (6, 6)}),
        # PLMS tries its first step like Heun.
        ("plms", [3, 2, 2, 1, 0], {3: (0, 1), 2: (2, 2), 1: (3, 3), 0: (4, 4)}),
    ],
)
def test_rows_of_steps(name, calls, rows):
    """Where the network is called at x_i for the last time, and after which row x_{i-1} is final;
    test_few_steps compares these x with what they have to be."""
    solver = solvers.SOLVERS[name](even_in_log_snr(4))
    assert solver.steps.tolist() == calls
    assert solvers.rows_of_steps(solver) == rows


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_s_noise_and_marginals(eta):
    """Song et al. 2020: σ as in Eq. (16); whatever it is, q(x_{t-1} | x0) is kept (Lemma 1).

    x0 is known to be 0, so x_t ~ N(0, 1 - ᾱ_t), and x_{t-1} has to be N(0, 1 - ᾱ_{t-1}).
    """
    solver = solvers.ddim(HO, eta)
    for t in (1, 20, 500, 999):
        of_x, _, of_eps = solver.weights[999 - t, 0]
        sigma = eta * np.sqrt((1 - HO[t - 1]) / (1 - HO[t]) * (1 - HO[t] / HO[t - 1]))
        assert of_eps == pytest.approx(sigma)
        assert of_x**2 * (1 - HO[t]) + of_eps**2 == pytest.approx(1 - HO[t - 1])


@pytest.mark.parametrize("s2", [1.0, 0.25])
def test_the_sde_keeps_the_variance_of_gaussian_data(s2):
    """Exactly, of the table; with 1,000 steps the error is that of the prior and of the last step.

    Of first order it is ancestral sampling with fixed_small variance, which loses 1 to 2 %
    (reference: 0.99107 and 0.24613); second order is closer to s².
    """
    found = gaussian_outcome(s2, solvers.dpmpp_sde(HO), HO)
    first_order = gaussian_outcome(s2, solvers.ddim(HO, 1.0), HO)
    assert first_order == pytest.approx({1.0: 0.99106738, 0.25: 0.24612521}[s2], rel=1e-7)
    assert found == pytest.approx(s2, rel=2e-3)
    assert abs(found - s2) < 0.1 * abs(first_order - s2)


def test_the_sde_s_samples():
    """The same through the sampler and its noise; s² = 1/4."""
    alpha_bars = HO[spacings.timesteps("trailing", HO, 100)]
    solver, schedule = solvers.dpmpp_sde(alpha_bars), schedules.from_alpha_bars(alpha_bars)
    keys = sampling.image_keys(3, jnp.arange(8))

    def predict_fn(x_t, t):
        a = schedule.alpha_bars[t].reshape(-1, 1, 1, 1)
        return diffusion.Prediction(jnp.sqrt(a) * S2 / (a * S2 + 1 - a) * x_t, None)

    x = sampling.prior(keys, 1000, (64, 64, 1))
    out = run_solver(solver, predict_fn, x, lambda n, shape: sampling.noise(keys, n, shape))
    expected = gaussian_outcome(S2, solver, alpha_bars)
    # The standard error of a variance from 32,768 values is 0.8 %.
    assert float(out.var()) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("name", spacings.SPACINGS)
@pytest.mark.parametrize("total, steps", [(1, 1), (200, 1), (200, 7), (1000, 50), (1000, 999)])
def test_spacings(name, total, steps):
    """S distinct steps in ascending order; all of them for S = T."""
    alpha_bars = schedules.make_alpha_bars("linear", total)
    taus = spacings.timesteps(name, alpha_bars, steps)
    assert len(taus) == steps and taus[0] >= 0 and taus[-1] < total
    assert (np.diff(taus) > 0).all()
    np.testing.assert_array_equal(spacings.timesteps(name, alpha_bars, total), np.arange(total))


def test_spacings_by_hand():
    def of(name, steps, **options):
        return spacings.timesteps(name, HO, steps, **options).tolist()

    assert of("leading", 50) == list(range(0, 1000, 20))
    assert of("leading", 3) == [0, 333, 666]
    assert of("leading", 600)[-1] == 998  # 599 · 1000 / 600
    assert of("leading", 4, skip_zero=True) == [200, 400, 600, 800]
    assert of("leading", 400, skip_zero=True)[-1] == 800
    assert of("leading", 900, skip_zero=True)[-1] == 900
    for name in ("linspace", "trailing", "logsnr", "karras"):
        assert of(name, 1) == [999]
    assert of("linspace", 4) == [0, 333, 666, 999]
    assert of("linspace", 5) == [0, 250, 500, 749, 999]  # 249.75, 499.5 (to even), 749.25
    assert of("linspace", 3, skip_zero=True) == [333, 666, 999]
    assert of("trailing", 4) == [249, 499, 749, 999]
    assert of("trailing", 3) == [332, 666, 999]
    squares = np.linspace(0, np.sqrt(800), 10) ** 2
    assert of("quadratic", 10) == squares.astype(int).tolist()
    # Even in log-SNR, up to rounding; in (σ / α)^(1/7) likewise.
    ratio = np.sqrt(1 / HO - 1)
    for name, values, limit in (
        ("logsnr", np.log(ratio), 0.03),
        ("karras", ratio ** (1 / 7), 0.01),
    ):
        taus = of(name, 8)
        assert taus[0] == 0 and taus[-1] == 999
        assert np.ptp(np.diff(values[taus])[1:]) < limit * np.ptp(values)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_zero_terminal_snr(name):
    """Lin et al. 2023: ᾱ_1 is kept, ᾱ_T is 0, √ᾱ is an affine function of the old one."""
    old, new = (
        schedules.make_alpha_bars(name, 500, 1e-4, 0.04, zero_terminal_snr=zero)
        for zero in (False, True)
    )
    assert new[0] == pytest.approx(old[0]) and new[-1] == 0 and (np.diff(new) < 0).all()
    slope = np.diff(np.sqrt(new)) / np.diff(np.sqrt(old))
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)
    schedule = schedules.from_alpha_bars(new)
    for field in ("betas", "posterior_variance", "posterior_mean_coef_x0", "sqrt_alpha_bars"):
        assert np.isfinite(getattr(schedule, field)).all()
    assert schedule.betas[-1] == 1


def test_x0_and_v_know_the_image_at_zero_snr():
    """x_T is noise alone: v = -x0 there, and the sampler's first x0 is the network's."""
    schedule = schedules.make_schedule("linear", 10, zero_terminal_snr=True)
    x0, eps = np.random.default_rng(0).standard_normal((2, 1, 4, 4, 1)).astype(np.float32)
    t = jnp.array([9])
    x_t = diffusion.q_sample(schedule, x0, t, eps)
    np.testing.assert_array_equal(x_t, eps)
    for prediction in ("x0", "v"):
        output = diffusion.target(schedule, x0, x_t, t, eps, prediction)
        found = diffusion.to_x0(schedule, output, x_t, t, prediction)
        np.testing.assert_allclose(found, x0, rtol=1e-6)


def test_dynamic_thresholding():
    """Saharia et al. 2022: the quantile of |x0|, of each image, if it is above 1."""
    small, large = np.linspace(-0.5, 0.5, 11), np.linspace(-4, 4, 11)
    x0 = jnp.asarray(np.stack([small, large]).reshape(2, 11, 1, 1), jnp.float32)
    predict_fn = diffusion.dynamically_thresholded(lambda x: diffusion.Prediction(x, None), 0.5)
    found = predict_fn(x0).x0.reshape(2, 11)
    np.testing.assert_allclose(found[0], small, rtol=1e-6)
    # |x0| is 0, 0.8, 0.8, 1.6, 1.6, 2.4, 2.4, …: the median is 2.4.
    np.testing.assert_allclose(found[1], np.clip(large, -2.4, 2.4) / 2.4, rtol=1e-5)
