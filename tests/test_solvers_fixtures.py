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
    solver = make_solver(case, alpha_bars[taus])
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
