"""Losses, weights and timesteps besides those of Ho et al."""

import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_eps

from ddpm_jax import checks, configs, parallel
from ddpm_jax.core import diffusion, likelihood, schedules, timesteps, unet, weights
from ddpm_jax.errors import UserError
from ddpm_jax.files import data
from ddpm_jax.runs import objective, states

ALPHA_BARS = schedules.make_alpha_bars("linear", 1000)
# ᾱ / (1 - ᾱ) at t = 0, 99, 499 and 999, in float64 from the products of 1 - β.
SNR = {0: 9999.0, 99: 8.710448569353932, 499: 0.08528994446263685, 999: 4.0359926511684205e-05}


def test_one_large_loss_leaves_the_timesteps_in_range():
    """Its square is infinite in float32; so are the squares of all, if they are all so large."""
    history = full_history()
    large = history._replace(losses=history.losses.at[3, 0].set(3e19))
    p = timesteps.importance(large)
    assert np.isfinite(p).all() and p[3] > 0.98
    t, weights_of_t = timesteps.draw(p, jnp.array([0.0, 0.3, 0.9]))
    assert (t < len(p)).all() and np.isfinite(weights_of_t).all()
    scaled = history._replace(losses=history.losses * 1e25)
    expected = timesteps.importance(history)
    np.testing.assert_allclose(timesteps.importance(scaled), expected, rtol=1e-5)


def test_held_out_timesteps_of_large_chains(config, monkeypatch):
    """Evenly spaced, also where index · T needs more than 32 bits: here up to 3e9."""
    num_timesteps, count = 10**6, 3000
    monkeypatch.setattr(objective, "make_loss", lambda *_: lambda params, x0, labels, t, eps: t / 1)
    images = np.zeros((count, 2, 2, 1), np.uint8)
    source = data.Source(count, lambda i: data.Batch(images[i], None), (), "")
    config.train.update(eval_images=count, batch_size=1500)
    chain = types.SimpleNamespace(num_timesteps=num_timesteps)
    found = objective.make_eval_loss(config, None, chain, source)(params={})
    middles = np.floor((np.arange(count) + 0.5) * (num_timesteps / count))
    assert found == pytest.approx(middles.mean(), 1e-5)


def test_held_out_timesteps_of_few_images(config, monkeypatch):
    """The mean over 50 images is near that over all t, as of the best prediction for N(0, 1/4)."""
    config.diffusion.num_timesteps = 1000
    mse = 0.25 * ALPHA_BARS / (0.25 * ALPHA_BARS + 1 - ALPHA_BARS)

    def loss(params, x0, labels, t, eps):
        return jnp.asarray(mse, jnp.float32)[t]

    monkeypatch.setattr(objective, "make_loss", lambda *_: loss)
    source = data.Source(50, lambda i: data.Batch(np.zeros((len(i), 2, 2, 1)), None), (), "")
    config.train.update(eval_images=50, batch_size=52)
    found = objective.make_eval_loss(config, None, configs.make_schedule(config), source)({})
    assert found == pytest.approx(0.173053, rel=0.005)  # fidelity.md; t = i T / n: 5 % more


@pytest.mark.parametrize(
    "prediction, name, formula",
    [
        ("eps", "min_snr", lambda snr: min(snr, 5) / snr),
        ("x0", "min_snr", lambda snr: min(snr, 5)),
        ("v", "min_snr", lambda snr: min(snr, 5) / (snr + 1)),
        ("eps", "p2", lambda snr: 1 / (1 + snr)),
        ("x0", "p2", lambda snr: snr / (1 + snr)),
        ("v", "p2", lambda snr: snr / (1 + snr) ** 2),
        ("eps", "truncated_snr", lambda snr: max(1, 1 / snr)),
        ("x0", "truncated_snr", lambda snr: max(snr, 1)),
        ("v", "truncated_snr", lambda snr: max(snr, 1) / (snr + 1)),
        ("mean", "none", lambda snr: 1.0),
    ],
)
def test_weights_at_stated_steps(prediction, name, formula):
    """As each paper writes them for its prediction."""
    found = weights.loss_weights(ALPHA_BARS, prediction, name)
    expected = {t: formula(snr) for t, snr in SNR.items()}
    assert {t: found[t] for t in SNR} == pytest.approx(expected, rel=1e-8)


def test_the_constants_of_weights():
    found = weights.loss_weights(ALPHA_BARS, "eps", "min_snr", min_snr_gamma=1.0)
    assert found[99] == pytest.approx(1 / SNR[99], rel=1e-8) and found[499] == 1
    found = weights.loss_weights(ALPHA_BARS, "eps", "p2", p2_gamma=0.5, p2_k=2.0)
    assert found[99] == pytest.approx((2 + SNR[99]) ** -0.5, rel=1e-8)
    zero_snr = schedules.make_alpha_bars("linear", 1000, zero_terminal_snr=True)
    for name, prediction in itertools.product(weights.WEIGHTS, weights.PREDICTIONS):
        found = weights.loss_weights(zero_snr, prediction, name)
        assert np.isfinite(found).all() and found[-1] == 1  # where sampling begins


def pieces(config):
    """(the loss, the network, its parameters, a batch) of a config."""
    model, schedule = configs.make_model(config), configs.make_schedule(config)
    loss_fn = objective.make_loss(config, model, schedule)
    shape = configs.image_shape(config)
    shapes = unet.param_shapes(model, shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: np.float32(0.2 * rng.standard_normal(s.shape)), shapes)
    x0, eps = (np.float32(rng.uniform(-1, 1, (4, *shape))) for _ in range(2))
    return loss_fn, model, params, (x0, None, jnp.array([0, 3, 11, 19]), eps)


def test_weights_multiply_the_loss(config):
    plain, _, params, batch = pieces(config)
    config.diffusion.update(loss_weight="min_snr", min_snr_gamma=2.0)
    weighted, *_ = pieces(config)
    alpha_bars = configs.make_alpha_bars(config)[np.array(batch[2])]
    expected = np.minimum(1, 2 * (1 - alpha_bars) / alpha_bars)
    ratios = jax.jit(weighted)(params, *batch) / jax.jit(plain)(params, *batch)
    np.testing.assert_allclose(ratios, expected, rtol=1e-5)


def test_hybrid_is_the_mse_and_a_share_of_the_bound(config):
    """L_simple + 0.001 T L_t, with L_t in bits/dim (Nichol & Dhariwal's code: T / 1000)."""
    config.diffusion.update(loss="hybrid", variance="learned_range")
    loss_fn, model, params, (x0, _, t, eps) = pieces(config)
    schedule, net_fn = configs.make_schedule(config), unet.net_fn(model, params)
    predict_fn = diffusion.predictor(schedule, net_fn, learned=True)
    bound, _ = likelihood.vlb_terms(schedule, predict_fn, x0, t, eps, variances=["learned_range"])

    def mean(x, t):
        return net_fn(x, t)[..., : x0.shape[-1]]

    mse = diffusion.simple_loss(schedule, mean, x0, t, eps)
    expected = mse + 0.001 * 20 * bound["learned_range"]
    np.testing.assert_allclose(loss_fn(params, x0, None, t, eps), expected, rtol=1e-5)


def test_the_bound_in_hybrid_does_not_train_the_mean(config):
    """The gradient of the last layer's mean half is L_simple's; the variance half has one, too."""
    config.diffusion.update(loss="hybrid", variance="learned_range")
    loss_fn, model, params, batch = pieces(config)
    config.diffusion.loss = "vlb"
    vlb_fn, *_ = pieces(config)

    def gradient(loss_fn):
        def of_last_layer(kernel):
            last = params["conv_out"] | {"kernel": kernel}
            return loss_fn(params | {"conv_out": last}, *batch).mean()

        grad = jax.grad(of_last_layer)(params["conv_out"]["kernel"])
        return np.split(np.asarray(grad), 2, axis=-1)

    def simple(params, x0, _, t, eps):
        schedule, net_fn = configs.make_schedule(config), unet.net_fn(model, params)
        return diffusion.simple_loss(schedule, lambda x, t: net_fn(x, t)[..., :1], x0, t, eps)

    (mean, variance), (of_mse, none), (_, of_bound) = map(gradient, (loss_fn, simple, vlb_fn))
    np.testing.assert_array_equal(mean, of_mse)
    assert not none.any() and np.abs(variance).max() > 0
    np.testing.assert_allclose(variance, 0.02 * of_bound, rtol=1e-4, atol=1e-7)


def test_a_fitted_variance_is_at_most_the_better_fixed_one():
    """With the optimal mean for Gaussian data; v is fitted to each t on a grid of [-1, 1]."""
    schedule = schedules.make_schedule("linear", 1000)
    rng = np.random.default_rng(0)
    x0 = np.float32(0.2 * rng.standard_normal((400, 1, 1, 1)))
    eps = np.float32(rng.standard_normal(x0.shape))
    eps_fn = gaussian_eps(0.04, schedule)

    @jax.jit
    def terms_of(ts, v):
        def net_fn(x, t):
            return jnp.concatenate([eps_fn(x, t), jnp.full_like(x, v)], axis=-1)

        predict_fn = diffusion.predictor(schedule, net_fn, learned=True)
        variances = diffusion.VARIANCES
        return likelihood.vlb_terms(schedule, predict_fn, x0, ts, eps, variances=variances)[0]

    for t in (0, 1, 10, 100, 500, 999):
        best = []
        for v in np.linspace(-1, 1, 21):
            terms = terms_of(jnp.full(len(x0), t), v)
            best.append(float(terms["learned_range"].mean()))
        fixed = [float(terms[name].mean()) for name in diffusion.FIXED_VARIANCES]
        assert best[0] == pytest.approx(fixed[0], rel=1e-4)
        if t > 0:  # Ho et al.'s fixed_large has β̃_2 there, the range ends at β_1
            assert best[-1] == pytest.approx(fixed[1], rel=1e-4)
        assert min(best) <= min(fixed) + 1e-7


@pytest.mark.parametrize("batch_size, num_timesteps", [(8, 1000), (128, 1000), (64, 20)])
def test_low_discrepancy_covers_every_part(batch_size, num_timesteps):
    """One t in each 1 / B of [0, T), cyclically, and every t as likely as any other."""
    # The middles of parts that end wherever a t of the batch changes.
    count = math.lcm(batch_size, num_timesteps)
    uniforms = (np.arange(count, dtype=np.float32)[:, None] + 0.5) / count
    draw = jax.vmap(lambda uniform: timesteps.low_discrepancy(uniform, batch_size, num_timesteps))
    t = np.sort(draw(uniforms[:, 0]), axis=1)
    gaps = np.diff(t, append=t[:, :1] + num_timesteps)
    assert gaps.max() <= int(np.ceil(num_timesteps / batch_size))
    assert gaps.min() >= int(num_timesteps / batch_size)
    seen = np.bincount(t.ravel(), minlength=num_timesteps)
    np.testing.assert_array_equal(seen, count * batch_size // num_timesteps)


def full_history(num_timesteps=20):
    losses = np.random.default_rng(0).uniform(0.1, 4, (num_timesteps, timesteps.HISTORY))
    counts = jnp.full(num_timesteps, timesteps.HISTORY)
    return timesteps.LossHistory(jnp.asarray(losses, jnp.float32), counts)


def test_importance_by_hand():
    """p ∝ √(mean L²), with 0.001 of a uniform distribution; uniform until all t have 10 losses."""
    history = full_history()
    root = np.sqrt(np.square(history.losses).mean(1))
    expected = 0.999 * root / root.sum() + 0.001 / 20
    np.testing.assert_allclose(timesteps.importance(history), expected, rtol=1e-5)
    for other in (
        history._replace(counts=history.counts.at[7].set(9)),
        timesteps.empty_history(20),
    ):
        np.testing.assert_allclose(timesteps.importance(other), 1 / 20, rtol=1e-6)
    zero = history._replace(losses=0 * history.losses)
    np.testing.assert_allclose(timesteps.importance(zero), 1 / 20, rtol=1e-6)


def test_the_loss_with_importance_is_unbiased():
    """Over every possible draw, the weighted loss has the mean of uniform draws."""
    probabilities = timesteps.importance(full_history())
    ends = np.cumsum(np.float64(probabilities))
    assert ends[-1] == pytest.approx(1, abs=1e-6)
    middles = np.float32(ends - np.float64(probabilities) / 2)
    t, weights = timesteps.draw(probabilities, middles)
    np.testing.assert_array_equal(t, np.arange(20))
    losses = np.random.default_rng(1).uniform(size=20)
    assert (probabilities * weights * losses).sum() == pytest.approx(losses.mean(), rel=1e-6)
    # A number draws t exactly where it lies between the sums up to t - 1 and up to t.
    uniforms = np.random.default_rng(2).uniform(size=20_000).astype(np.float32)
    t, _ = timesteps.draw(probabilities, uniforms)
    frequencies = np.bincount(t, minlength=20) / len(uniforms)
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * np.sqrt(0.1 / len(uniforms)))
    t, _ = timesteps.draw(probabilities, np.float32([0, 1 - 2**-24]))
    np.testing.assert_array_equal(t, [0, 19])
    t, _ = timesteps.draw(jnp.full(4, 0.25), np.float32([0, 0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(t, [0, 1, 2, 3])


@pytest.mark.parametrize("rare", [1e-6, 1e-9, 0.0])
def test_rare_timesteps_are_drawn_as_often_as_their_weights_say(rare):
    """Of all 2²³ uniform numbers, with probabilities that float32 cannot add up exactly."""
    p = np.full(4000, rare, np.float32)
    p[[0, 700, 1500, 2200, 3100]] = (1 - rare * 3995) / 5
    t, weights = jax.jit(timesteps.draw)(p, np.arange(2**23, dtype=np.float32) / 2**23)
    share = np.bincount(t, minlength=4000) / 2**23
    assert share.min() > 0
    np.testing.assert_allclose(share[t[::997]] * weights[::997], 1 / 4000, rtol=1e-6)
    np.testing.assert_allclose(share, p, atol=2000 / 2**23)  # 1,798 rare ones beside another


def test_the_step_weights_loss_and_gradient(config):
    """4,096 draws by importance; the loss w · c_t has the mean of all c_t, and so has its gradient.

    Without weights, both would be the mean over the draws, which is far larger.
    """
    history, c = full_history(), jnp.linspace(0.1, 4, 20)
    losses = jnp.tile(c[:, None], (1, timesteps.HISTORY))
    history = history._replace(losses=losses)
    optimizer = states.make_optimizer(config.optim, 10)
    params = {"w": jnp.ones(())}
    state = states.TrainState(
        jnp.zeros((), int), params, (params,), optimizer.init(params), history
    )

    config.train.timesteps = "importance"

    def loss_fn(params, x0, labels, t, eps, dropout_keys):
        return params["w"] * c[t]

    step = functools.partial(objective.train_step, config, loss_fn, optimizer)
    one = jax.devices()[:1]
    run = parallel.pmap(step, in_axes=(None, 0), out_axes=(None, None), devices=one)
    batch = data.Batch(np.zeros((4096, 2, 2, 1), np.uint8), None)
    state, values = run(parallel.replicate(state, one), parallel.shard(batch, 1))
    share = np.square(c).sum() / c.sum()  # the mean of c_t over draws in proportion to c_t
    assert (
        float(values["loss"]) == pytest.approx(float(c.mean()), rel=0.03) and share > 1.3 * c.mean()
    )
    assert float(values["grad_norm"]) == pytest.approx(float(c.mean()), rel=0.03)
    np.testing.assert_allclose(values["share"], 0.25, atol=0.04)
    np.testing.assert_allclose(state.loss_history.losses, losses, rtol=1e-6)  # without weights


@pytest.mark.parametrize("most", [3, 20, 200])
def test_the_history_has_the_last_losses(most):
    """Against a list for each t, with batches that hold up to 200 examples of one t."""
    rng, history = np.random.default_rng(0), timesteps.empty_history(4)
    lists = [[] for _ in range(4)]
    for _ in range(12):
        t, losses = rng.integers(0, 4, most), rng.uniform(size=most).astype(np.float32)
        history = jax.jit(timesteps.record)(history, t, losses)
        for one, loss in zip(t, losses, strict=True):
            lists[one].append(loss)
    assert [len(seen) for seen in lists] == history.counts.tolist()
    for row, seen in zip(np.asarray(history.losses), lists, strict=True):
        padded = np.append(seen, np.zeros(10))[: max(len(seen), 10)]
        np.testing.assert_array_equal(np.sort(row), np.sort(padded[-10:]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variance": "learned_range"}, "needs diffusion.loss='hybrid' or 'vlb'"),
        ({"loss": "hybrid"}, "diffusion.loss='hybrid' needs learned or learned_range"),
        ({"loss": "vlb", "loss_weight": "p2"}, "loss_weight='p2': must be 'none' with"),
        ({"prediction": "mean", "loss_weight": "min_snr"}, "needs diffusion.prediction to be one"),
        (
            {"loss_weight": "p2", "p2_gamma": 20.0, "p2_k": 0.001},
            "p2_gamma=20.0: the weights of L_simple are not finite; take a smaller one",
        ),
        ({"loss_weight": "snr"}, "choose from none, min_snr, p2, truncated_snr"),
        ({"min_snr_gamma": 0.0}, "diffusion.min_snr_gamma=0.0: must be above 0"),
    ],
    ids=str,
)
def test_objectives_that_do_not_fit(config, changes, message):
    config.diffusion.update(changes)
    with pytest.raises(UserError) as error:
        checks.check(config)
    assert message in str(error.value)


def test_the_classifier_s_loss_is_its_cross_entropy_at_x_t(config, monkeypatch):
    config.model.kind, config.data.num_classes = "classifier", 3

    def log_p(x_t, t):
        return jax.nn.log_softmax(jnp.outer(x_t.sum((1, 2, 3)), jnp.arange(3.0)))

    monkeypatch.setattr(unet, "net_fn", lambda *_: log_p)
    x0, eps = np.random.default_rng(0).standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    t, labels = np.array([0, 3, 11, 19]), np.array([2, 0, 1, 2])
    a = configs.make_alpha_bars(config)[t].reshape(4, 1, 1, 1)
    logits = np.outer((np.sqrt(a) * x0 + np.sqrt(1 - a) * eps).sum((1, 2, 3)), np.arange(3))
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
    loss_fn = objective.make_loss(config, None, configs.make_schedule(config))
    np.testing.assert_allclose(loss_fn({}, x0, labels, t, eps), expected, rtol=1e-4, atol=1e-4)


def test_a_step_s_timesteps_are_spread_and_others_than_the_last_one_s(config):
    """`low_discrepancy` in a step over four devices: one in each eighth of the chain."""
    config.diffusion.num_timesteps, config.train.timesteps = 1000, "low_discrepancy"

    def t_of(step, batch):
        return objective.draw_examples(config, types.SimpleNamespace(step=step), batch).t

    run = parallel.pmap(t_of, in_axes=(None, 0))
    batch = parallel.shard(data.Batch(np.zeros((8, 2, 2, 1), np.uint8), None))
    first, second = (np.sort(parallel.gather(run(np.int32(step), batch))) for step in (0, 1))
    for t in (first, second):
        np.testing.assert_array_equal(t * 8 // 1000, np.arange(8))
    assert (first != second).all()


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(config):
    """That of √w at w = 0."""
    optimizer, params = states.make_optimizer(config.optim, 10), {"w": jnp.zeros(())}
    state = states.TrainState(jnp.zeros((), int), params, (params,), optimizer.init(params))

    def loss_fn(params, x0, *_):
        return jnp.sqrt(params["w"]) + jnp.zeros(len(x0))

    step = functools.partial(objective.train_step, config, loss_fn, optimizer)
    one, batch = jax.devices()[:1], data.Batch(np.zeros((4, 2, 2, 1), np.uint8), None)
    run = parallel.pmap(step, in_axes=(None, 0), out_axes=(None, None), devices=one)
    state, values = run(parallel.replicate(state, one), parallel.shard(batch, 1))
    assert values["loss"] == 0 and not np.isfinite(values["grad_norm"])
    assert not values["applied"] and int(state.step) == 1 and state.params["w"] == 0
