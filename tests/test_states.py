"""The optimizer, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from ddpm_jax.runs import states

OPTIM = dict(
    learning_rate=0.1,
    warmup_steps=5,
    decay="constant",
    weight_decay=0.0,
    grad_clip=1.0,
    ema_decay=0.9,
)


def optim(**changes):
    return ConfigDict({**OPTIM, **changes})


def run(grads, start=(1.0, 2.0), decays=(0.9,), **changes):
    """Parameters and EMAs after each update with these gradients."""
    optimizer = states.make_optimizer(optim(**changes), 20)
    params = {"w": jnp.array(start)}
    averages = (params,) * len(decays)
    state = states.TrainState(jnp.int32(0), params, averages, optimizer.init(params))
    history = [(params["w"],) * (1 + len(decays))]
    for g in grads:
        state = states.apply_gradients(state, {"w": jnp.array(g)}, optimizer, decays)
        history.append((state.params["w"], *(average["w"] for average in state.ema_params)))
    assert state.step == len(grads)
    return np.array(history)


def test_warmup_starts_at_zero():
    rate = states.learning_rate(optim(), 20)
    expected = [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1]
    np.testing.assert_allclose([rate(i) for i in range(7)], expected, rtol=1e-6)
    history = run([(3.0, 4.0)])
    np.testing.assert_array_equal(history[0], history[1])


def test_no_warmup_is_full_rate_at_once():
    assert states.learning_rate(optim(warmup_steps=0), 20)(0) == pytest.approx(0.1)


def test_cosine_ends_at_zero():
    rate = states.learning_rate(optim(decay="cosine"), 25)
    assert rate(5) == pytest.approx(0.1)
    assert rate(15) == pytest.approx(0.05)
    assert rate(25) == pytest.approx(0, abs=1e-9)


def test_adam_by_hand():
    """Constant gradients make Adam's first and every step rate · g / |g| (up to its 1e-8)."""
    history = run([(0.3, -0.4)] * 3, warmup_steps=0)
    moved = np.diff(history[:, 0], axis=0)
    np.testing.assert_allclose(moved, [[-0.1, 0.1]] * 3, rtol=1e-4)
    second = run([(0.3, -0.4), (0.0, 0.0)], warmup_steps=0)
    # m = 0.9·0.1·g / (1 - 0.81), v = 0.999·0.001·g² / (1 - 0.999²)
    step = 0.1 * (0.09 / 0.19) / np.sqrt(0.000999 / (1 - 0.999**2))
    np.testing.assert_allclose(second[2, 0] - second[1, 0], [-step, step], rtol=1e-4)


def test_clipping_bites_above_its_norm():
    """After a large gradient the second moment shows what Adam was given."""
    optimizer = states.make_optimizer(optim(), 20)
    params = {"w": jnp.zeros(2)}
    _, opt_state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    mu = optax.tree_utils.tree_get(opt_state, "mu")["w"]
    np.testing.assert_allclose(mu, [0.06, 0.08], rtol=1e-5)  # 0.1 · (0.6, 0.8)
    _, opt_state = optimizer.update({"w": jnp.array([0.3, 0.4])}, optimizer.init(params), params)
    mu = optax.tree_utils.tree_get(opt_state, "mu")["w"]
    np.testing.assert_allclose(mu, [0.03, 0.04], rtol=1e-5)


def test_weight_decay_is_decoupled():
    """AdamW: with a zero gradient only rate · decay · w is left."""
    history = run([(0.0, 0.0)], warmup_steps=0, weight_decay=0.01)
    np.testing.assert_allclose(history[1, 0], [0.999, 1.998], rtol=1e-6)


def test_ema_has_no_bias_correction():
    history = run([(0.3, -0.4)] * 2, warmup_steps=0)
    (p0, e0), (p1, e1), (p2, e2) = history
    np.testing.assert_array_equal(e0, p0)
    np.testing.assert_allclose(e1, 0.9 * p0 + 0.1 * p1, rtol=1e-6)
    np.testing.assert_allclose(e2, 0.9 * e1 + 0.1 * p2, rtol=1e-6)


def test_each_ema_has_its_own_decay():
    history = run([(0.3, -0.4)] * 3, warmup_steps=0, decays=(0.9, 0.5))
    for column, decay in ((1, 0.9), (2, 0.5)):
        expected = history[0, 0]
        for params in history[1:, 0]:
            expected = decay * expected + (1 - decay) * params
        np.testing.assert_allclose(history[-1, column], expected, rtol=1e-6)


@pytest.mark.parametrize("applies", [True, False])
def test_an_update_without_a_branch(monkeypatch, applies):
    """As on a GPU: the same as on a CPU."""
    optimizer, params = states.make_optimizer(optim(warmup_steps=0), 20), {"w": jnp.array([1.0, 2])}
    state = states.TrainState(jnp.int32(0), params, (params,), optimizer.init(params))
    grads, found = {"w": jnp.array([0.3, -0.4])}, []
    for on_cpu in (True, False):
        monkeypatch.setattr(states.cpu, "is_used", lambda used=on_cpu: used)
        found.append(states.apply_gradients(state, grads, optimizer, (0.9,), applies))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert (found[1].params["w"] != params["w"]).all() == applies
