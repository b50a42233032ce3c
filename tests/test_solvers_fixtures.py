"""The solvers against what diffusers computed, in tests/fixtures; see torch_reference.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
STEPS = (10, 20)  # dpmpp lowers its order in the last steps of fewer than 15
WITHOUT_ORDER = ["dpmpp_sde", "heun", "plms"]
CASES = WITHOUT_ORDER + [f"{name}/{n}" for name, orders in solvers.ORDERS.items() for n in orders]


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "solvers.npz") as arrays:
        return dict(arrays)


def make_solver(case, alpha_bars):
    sampler, *order = case.split("/")
    return solvers.SOLVERS[sampler](alpha_bars, *map(int, order))


def as_in_diffusers(case, alpha_bars):
    """The solver; of third order, with diffusers' half of the weight of D_2.

    With this half, dpmpp of order 3 converges with order 2 on Gaussian data; with the weight of the
    exact integral with order 3 (tests/test_solvers.py, test_by_hand in test_parity_solvers.py).
    """
    solver = make_solver(case, alpha_bars)
    if case != "dpmpp/3":
        return solver
    lam = 0.5 * np.log(alpha_bars / (1 - alpha_bars))
    for n in np.flatnonzero(solver.weights[:, 0, 2]):  # where x0 of two steps before is used
        i = solver.steps[n]
        h, alpha = lam[i - 1] - lam[i], np.sqrt(alpha_bars[i - 1])
        # D_2 = h² times the second divided difference of x0 at i, i + 1 and i + 2.
        for j, column in ((0, 3), (1, 1), (2, 2)):
            others = [lam[i + j] - lam[i + k] for k in range(3) if k != j]
            weight = alpha * ((np.expm1(-h) + h) / h**2 - 0.5)
            solver.weights[n, 0, column] += weight * h**2 / np.prod(others)
    return solver


def bent(x, t):
    """A network that is not linear, and whose x0 stays near 1; torch_reference.py has the same."""
    bend = 3 * x + t / 500
    return x - (1 - t / 1000) ** 2 * bend / (1 + bend**2) ** 0.5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_solver(case, steps, expected):
    alpha_bars = schedules.make_alpha_bars("linear", 1000)
    sampler = case.split("/")[0]
    taus = spacings.timesteps("trailing", alpha_bars, steps, sampler in solvers.SKIP_ZERO)
    solver = as_in_diffusers(case, alpha_bars[taus])
    np.testing.assert_array_equal(taus[solver.steps], expected[f"{case}/{steps}/timesteps"])

    def net_fn(x, t):
        return bent(x, t.reshape(-1, 1, 1, 1))

    predict_fn = diffusion.predictor(schedules.from_alpha_bars(alpha_bars), net_fn)
    noises, rows = jnp.asarray(expected["noises"]), jnp.arange(len(solver.steps))
    step = sampling.make_step(solver, sampling.respaced(predict_fn, taus), lambda n, _: noises[n])
    start = sampling.init_state(solver, jnp.asarray(expected["x_T"]))
    (x_0, *_), _ = jax.jit(lambda state: sampling.reverse_process(step, state, rows))(start)
    theirs = expected[f"{case}/{steps}/x_0"]
    assert np.abs(np.asarray(x_0) - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())
