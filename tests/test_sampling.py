"""Algorithm 2 on Gaussian data, whose outcome is known exactly, and what a seed promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_predict, run_solver

from ddpm_jax import configs, parallel
from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings, unet
from ddpm_jax.files import run_files
from ddpm_jax.runs import edit, generate, samplers, states

HO = schedules.make_schedule("linear", 1000, 1e-4, 0.02)


ALPHA_BARS = schedules.make_alpha_bars("linear", 1000, 1e-4, 0.02)


def shorter(num_steps, spacing="leading"):
    """(τ, ᾱ) of some of Ho's 1,000 steps."""
    taus = spacings.timesteps(spacing, ALPHA_BARS, num_steps)
    return taus, ALPHA_BARS[taus]


def keyed_noise(keys):
    """Noise that depends on an image's key and on the row."""
    return lambda n, shape: sampling.noise(keys, n, shape)


@pytest.mark.parametrize("variance, expected", [("fixed_large", 0.25075), ("fixed_small", 0.24613)])
def test_samples_of_gaussian_data(variance, expected):
    """What tests/references.py asserts exactly, through the sampler itself and its noise."""
    keys = sampling.image_keys(3, jnp.arange(8))
    solver, predict_fn = solvers.ancestral(ALPHA_BARS, variance), gaussian_predict(0.25, HO)
    x, fast = sampling.prior(keys, 1000, (64, 64, 1)), {"xla_backend_optimization_level": 3}
    out = run_solver(solver, predict_fn, x, keyed_noise(keys), compiler_options=fast)
    assert float(out.mean()) == pytest.approx(0, abs=0.01)
    # The standard error of a variance from 32,768 values is 0.8 %.
    assert float(out.var()) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("name", ["ancestral", "dpmpp", "heun"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 13])
def test_scan_equals_a_loop(name, num_timesteps):
    alpha_bars = schedules.make_alpha_bars("cosine", num_timesteps)
    schedule = schedules.from_alpha_bars(alpha_bars)
    keys, solver = sampling.image_keys(0, jnp.arange(3)), solvers.SOLVERS[name](alpha_bars)
    step = sampling.make_step(solver, gaussian_predict(0.5, schedule, clip=True), keyed_noise(keys))
    x = sampling.prior(keys, num_timesteps, (4, 4, 2))
    state = loop = sampling.init_state(solver, x)
    rows = np.arange(len(solver.steps))
    frames_at = (rows[-1], 0)[: min(len(rows), 2)]
    state, frames = sampling.reverse_process(step, state, rows, frames_at)
    kept = []
    for n in rows:
        loop, _ = step(loop, jnp.int32(n))
        kept.append(loop[0])
    np.testing.assert_allclose(state[0], loop[0], rtol=1e-5, atol=1e-5)
    assert frames.shape == (len(frames_at), 3, 4, 4, 2)
    np.testing.assert_allclose(frames, [kept[n] for n in frames_at], rtol=1e-5, atol=1e-5)


def test_parts_of_a_scan_equal_the_whole():
    """Also for a method that remembers earlier predictions."""
    _, alpha_bars = shorter(30)
    solver, keys = solvers.dpmpp(alpha_bars, 3), sampling.image_keys(0, jnp.arange(2))
    step = sampling.make_step(
        solver, gaussian_predict(1.0, schedules.from_alpha_bars(alpha_bars)), None
    )
    state, rows = sampling.init_state(solver, sampling.prior(keys, 30, (4, 4, 1))), np.arange(30)
    whole, frames = sampling.reverse_process(step, state, rows, (27, 0, 18))
    middle, early = sampling.reverse_process(step, state, rows[:12], (0, 4))
    end, late = sampling.reverse_process(step, middle, rows[12:], (18, 27))
    np.testing.assert_allclose(end[0], whole[0], rtol=1e-5, atol=1e-5)
    parts = jnp.stack([late[1], early[0], late[0]])
    np.testing.assert_allclose(parts, frames, rtol=1e-5, atol=1e-5)


def curved(x_t, t):
    """A nonlinear network."""
    return jnp.tanh(2 * x_t) + 0.1


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_is_ancestral_with_fixed_small(clip):
    predict_fn = diffusion.predictor(HO, curved)
    predict_fn = diffusion.clipped(predict_fn) if clip else predict_fn
    keys = sampling.image_keys(0, jnp.arange(2))
    ours, theirs = (
        run_solver(solver, predict_fn, sampling.prior(keys, 1000, (8, 8, 1)), keyed_noise(keys))
        for solver in (solvers.ddim(ALPHA_BARS, 1.0), solvers.ancestral(ALPHA_BARS, "fixed_small"))
    )
    # Not clipped, this network's images grow to hundreds.
    scale = max(1, float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "dpmpp", "unipc", "heun", "plms"])
def test_a_deterministic_sampler_draws_no_noise(name):
    solver = solvers.SOLVERS[name](shorter(5)[1])
    predict_fn = sampling.respaced(diffusion.predictor(HO, curved), shorter(5)[0])
    run_solver(solver, predict_fn, jnp.ones((1, 2, 2, 1)), lambda *_: pytest.fail("draws noise"))


def test_going_to_noise_and_back_errs_less_with_more_steps():
    """Gaussian data, whose exact way there is known: x_T = x0 · √((ᾱ s² + 1 - ᾱ) / s²)."""
    x0, errors, ends = jnp.linspace(-1, 1, 128).reshape(2, 8, 8, 1), [], []
    for steps in (10, 50, 250, 1000):
        taus, alpha_bars = shorter(steps)
        predict_fn = sampling.respaced(gaussian_predict(0.25, HO), taus)
        x_T = run_solver(solvers.ddim_inversion(alpha_bars), predict_fn, x0)
        back = run_solver(solvers.ddim(alpha_bars), predict_fn, x_T)
        errors.append(float(jnp.abs(back - x0).max()))
        a = alpha_bars[-1]
        ends.append(float(jnp.abs(x_T - x0 * np.sqrt((a * 0.25 + 1 - a) / 0.25)).max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]
    assert ends == sorted(ends, reverse=True) and ends[-1] < 0.02 < ends[0]


def test_classifier_free_guidance():
    """Weights 0 and 1 are the two predictions, 2 is as far beyond as the second is from the first;
    one call of the network, on a doubled batch."""
    calls = []

    def net_fn(x_t, t, labels):
        calls.append(x_t.shape)
        means = jnp.tanh(x_t + labels.reshape(-1, 1, 1, 1))
        return jnp.concatenate([means, -jnp.abs(means)], axis=-1)

    predict_fn = diffusion.predictor(HO, net_fn, learned=True)
    x_t, t = jax.random.normal(jax.random.key(0), (3, 4, 4, 1)), jnp.array([0, 500, 999])
    labels = jnp.array([2, 0, 1])
    given, free = predict_fn(x_t, t, labels), predict_fn(x_t, t, jnp.full(3, 10))
    calls.clear()
    none, one, two = (
        sampling.classifier_free(predict_fn, labels, 10, weight)(x_t, t) for weight in (0, 1, 2)
    )
    assert calls == 3 * [(6, 4, 4, 1)]
    np.testing.assert_allclose(none.x0, free.x0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.x0, given.x0, rtol=1e-5, atol=1e-6)
    for found in (none, one, two):
        np.testing.assert_array_equal(found.variance, given.variance)
    # As the paper has it, in ε: ε_u + g (ε_c - ε_u).
    eps = [diffusion.predict_eps(HO, x_t, t, p.x0) for p in (free, given, two)]
    np.testing.assert_allclose(eps[2], eps[0] + 2 * (eps[1] - eps[0]), rtol=1e-3, atol=1e-3)


def test_classifier_guidance_is_bayes_rule():
    """Data N(0, s²) and an exact classifier with p(y | x0) ∝ exp(-(x0 - m)² / 2τ²).

    Guided with weight 1, the predictor is that of p(x0 | y) = N(m', v'), with 1/v' = 1/s² + 1/τ².
    """
    s2, m, tau2 = 0.25, 0.8, 0.3
    v = 1 / (1 / s2 + 1 / tau2)
    mean = v * m / tau2
    a = HO.alpha_bars.reshape(-1)

    def posterior(x_t, t, prior_mean, prior_variance):
        a_t = a[t].reshape(-1, 1, 1, 1)
        gain = jnp.sqrt(a_t) * prior_variance / (a_t * prior_variance + 1 - a_t)
        left = prior_variance * (1 - a_t) / (a_t * prior_variance + 1 - a_t)
        return prior_mean + gain * (x_t - jnp.sqrt(a_t) * prior_mean), left

    def log_prob(x_t, t):
        of_x0, left = posterior(x_t, t, 0.0, s2)
        return (-((of_x0 - m) ** 2) / (2 * (tau2 + left))).sum((1, 2, 3))

    x_t, t = jax.random.normal(jax.random.key(0), (3, 4, 4, 1)), jnp.array([10, 300, 800])
    guided = sampling.classifier_guided(HO, gaussian_predict(s2, HO), log_prob, 1.0)
    np.testing.assert_allclose(guided(x_t, t).x0, posterior(x_t, t, mean, v)[0], atol=2e-4)


@pytest.mark.parametrize("steps, jump, times", [(7, 1, 1), (7, 10, 3), (20, 5, 3), (250, 10, 10)])
def test_inpainting_s_order_of_steps(steps, jump, times):
    """Each step starts where the previous one ended, from x_T to x_0."""
    _, alpha_bars = shorter(steps)
    solver, levels = solvers.repaint(solvers.ancestral(alpha_bars), alpha_bars, jump, times)
    level, before = steps - 1, [*alpha_bars, 1.0]  # before[-1] is the data
    for call, after in zip(solver.steps, levels, strict=True):
        up = call < 0
        assert up or call == level
        level += 1 if up else -1
        assert np.isnan(after) if up else after == before[level]
    assert level == -1
    if times == 1:
        np.testing.assert_array_equal(solver.steps, np.arange(steps)[::-1])
    if steps == 250:
        assert len(levels) == 4570  # RePaint's own setting: 24 places, 9 times 10 up and 10 down
        assert solvers.num_calls(solver) == 4570 - 24 * 9 * 10


def test_inpainting_s_way_up_is_the_forward_process():
    """x_{t-1} ~ N(√ᾱ_{t-1} x0, 1 - ᾱ_{t-1}) becomes N(√ᾱ_t x0, 1 - ᾱ_t), Eq. (4), on any chain."""
    _, a = shorter(50)
    solver, _ = solvers.repaint(solvers.ancestral(a), a, 1, 2)
    for n in np.flatnonzero(solver.steps < 0):
        t = solver.steps[n - 1]
        of_x, of_x0, of_eps = solver.weights[n, 0]
        assert of_x0 == 0 and of_x * np.sqrt(a[t - 1]) == pytest.approx(np.sqrt(a[t]))
        assert of_x**2 * (1 - a[t - 1]) + of_eps**2 == pytest.approx(1 - a[t])


@pytest.mark.parametrize("variance", diffusion.VARIANCES)
def test_inpainting_s_steps_are_those_of_its_sampler(variance):
    """Down: the steps of `ancestral` at the same t; up: Eq. (2). With one ε for all."""
    _, alpha_bars = shorter(20)
    plain = solvers.ancestral(alpha_bars, variance)
    solver, _ = solvers.repaint(plain, alpha_bars, 5, 3)
    x, eps = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 1))
    learned = 0.4 * x if variance in diffusion.LEARNED_VARIANCES else None

    def step_of(solver):
        predict_fn = lambda x_t, _: diffusion.Prediction(0.3 * x_t, learned)  # noqa: E731
        step = sampling.make_step(solver, predict_fn, lambda *_: eps)
        return jax.jit(lambda n: step((x,), n)[0][0])

    down, any_step, level = step_of(plain), step_of(solver), 19
    assert (solver.steps < 0).any()
    for n, call in enumerate(solver.steps):
        level += 1 if call < 0 else -1
        alpha = alpha_bars[level] / np.append(1.0, alpha_bars)[level]
        up = np.sqrt(alpha) * x + np.sqrt(1 - alpha) * eps
        expected = up if call < 0 else down(19 - call)
        np.testing.assert_allclose(any_step(n), expected, rtol=1e-5, atol=1e-5)


def test_known_pixels_are_a_sample_of_q():
    """√ᾱ x0 + √(1 - ᾱ) ε; x0 itself at the end; NaN leaves x."""
    x0, mask = jnp.full((1, 1, 2, 1), 0.8), jnp.array([True, False]).reshape(1, 1, 2, 1)
    step = sampling.keep_known(
        lambda state, n: (state, None), np.array([0.25, 1.0, np.nan]), x0, mask,
        lambda n, shape: jnp.full((1, *shape), 2.0),
    )  # fmt: skip
    for n, known in ((0, 0.5 * 0.8 + np.sqrt(0.75) * 2), (1, 0.8), (2, 7.0)):
        (x,), _ = step((jnp.full(x0.shape, 7.0),), n)
        np.testing.assert_allclose(x.ravel(), [known, 7.0], rtol=1e-6)


def test_inpainting_gaussian_data():
    """Correlated pixels: painting one, given the other, has the conditional's mean and variance.

    The pair is N(0, [[1, r], [r, 1]]), whose optimal predictor is exact; with RePaint's resampling
    the painted one is closer to r · known than without.
    """
    r = 0.9
    covariance = np.array([[1, r], [r, 1]])
    values, vectors = np.linalg.eigh(covariance)
    a, values = HO.alpha_bars.reshape(-1, 1), values.reshape(1, 2)
    gains = jnp.sqrt(a) * values / (a * values + 1 - a)  # [T, 2], along the eigenvectors

    def predict_fn(x_t, t):
        along = x_t[..., 0] @ vectors  # the width holds the pair
        x0 = (along * gains[t][:, None, :]) @ vectors.T
        return diffusion.Prediction(x0[..., None], None)

    taus, alpha_bars = shorter(50)
    known_mask = jnp.broadcast_to(jnp.array([True, False]).reshape(1, 1, 2, 1), (1, 64, 2, 1))
    x0 = jnp.full((1, 64, 2, 1), 0.8)
    errors = []

    def noise_of(seed):
        return lambda n, shape: jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), n), (1, *shape)
        )

    for times in (1, 10):
        solver, levels = solvers.repaint(solvers.ancestral(alpha_bars), alpha_bars, 1, times)
        step = sampling.make_step(solver, sampling.respaced(predict_fn, taus), noise_of(0))
        step = sampling.keep_known(step, levels, x0, known_mask, noise_of(1))
        x, rows = jax.random.normal(jax.random.key(2), x0.shape), jnp.arange(len(levels))
        run = jax.jit(lambda x, f=step, rows=rows: sampling.reverse_process(f, (x,), rows)[0][0])
        out = run(x)
        np.testing.assert_array_equal(out[:, :, 0], x0[:, :, 0])
        errors.append(abs(float(out[:, :, 1].mean()) - r * 0.8))
    # The conditional's standard deviation is 0.44, of a mean of 64 of them 0.054.
    assert errors[1] < 0.15 and errors[1] < errors[0]


@pytest.mark.parametrize("num_timesteps", [1, 7, 20, 97, 200, 1000, 4000])
def test_segments_of_the_reverse_process(num_timesteps):
    """At most two lengths, so that two programs are compiled; each frame is in its segment."""
    kept = {0, num_timesteps // 2, num_timesteps - 1}
    for most in {min(20, num_timesteps), min(6, num_timesteps), num_timesteps, 1}:
        segments = samplers.split_rows(num_timesteps, kept, most)
        rows = np.concatenate([segment.rows for segment in segments])
        np.testing.assert_array_equal(rows, np.arange(num_timesteps))
        assert len({len(segment.rows) for segment in segments}) <= 2
        assert most / 2 <= len(segments) <= most
        if any(num_timesteps % n == 0 for n in range(-(-most // 2), most + 1)):
            assert len({len(segment.rows) for segment in segments}) == 1
        assert sorted(n for s in segments for n in s.frames_at) == sorted(kept)
        assert len({len(segment.padded_frames_at) for segment in segments}) == 1
        assert all(set(s.frames_at) <= set(s.rows.tolist()) for s in segments)


def test_little_work_is_done_at_once():
    """The digits' ten steps in one segment, their 200 in six; CIFAR-10's in as many as can be."""
    digits, cifar10 = configs.named_config("digits"), configs.named_config("cifar10")
    params = {"kernel": np.zeros(650_000, np.int8)}
    assert samplers.most_segments(digits, params, 64, 10) == 1
    assert samplers.most_segments(digits, params, 64, 200) == 6
    params = {"kernel": np.zeros(35_700_000, np.int8)}
    assert samplers.most_segments(cifar10, params, 64, 10) == 10
    assert samplers.most_segments(cifar10, params, 1, 1000) == 20


def some_params(config):
    """Parameters that make the network's output depend on its input."""
    optimizer = states.make_optimizer(config.optim, 10)
    model = configs.make_model(config)
    params = states.create_state(config, model, optimizer).params
    return parallel.replicate(jax.tree.map(lambda p: p + 0.02, params))


def sample(config, batch_size, num_samples, seed=5, frames_at=(), x0_at=()):
    config.sample.update(batch_size=batch_size, seed=seed)
    sampler = samplers.make_sampler(config, frames_at=frames_at, x0_at=x0_at)
    return sampler(some_params(config), np.arange(num_samples))


def test_a_seed_gives_the_same_images_in_every_batch_size(config):
    """7 does not divide over 4 devices: batches are 8 and 16 here; see the next test for 7."""
    small, large = sample(config, 8, 18).x, sample(config, 16, 18).x
    assert small.shape == (18, 8, 8, 1) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - large).max() <= 1
    assert len(np.unique(small.reshape(18, -1), axis=0)) == 18
    other = sample(config, 16, 18, seed=6).x
    assert (other != large).mean() > 0.5


@pytest.mark.parametrize("batch_size", [7, 16])
def test_images_do_not_depend_on_their_batch(config, batch_size):
    model, params = configs.make_model(config), some_params(config)
    schedule = configs.make_schedule(config)

    @functools.partial(jax.jit, static_argnums=1)
    def run(first, size):
        keys = sampling.image_keys(5, first + jnp.arange(size))
        x = sampling.prior(keys, 20, (8, 8, 1))

        predict_fn = diffusion.predictor(schedule, unet.net_fn(model, params))
        predict_fn = diffusion.clipped(predict_fn)

        solver = solvers.ancestral(configs.make_alpha_bars(config), "fixed_large")
        step = sampling.make_step(solver, predict_fn, keyed_noise(keys))
        return sampling.reverse_process(step, (x,), jnp.arange(20))[0][0]

    alone = jnp.concatenate([run(i, 1) for i in range(18)])
    parts = [run(i, batch_size) for i in range(0, 18, batch_size)]
    np.testing.assert_allclose(jnp.concatenate(parts)[:18], alone, atol=1e-4)


def test_frames(config):
    """The frame after the last row is the image, and its x0; N need not fill the batches."""
    x, frames, x0_frames = sample(config, 4, 6, frames_at=(4, 19), x0_at=(7, 16, 19))
    assert frames.shape == (2, 6, 8, 8, 1) and x0_frames.shape == (3, 6, 8, 8, 1)
    assert frames.dtype == x0_frames.dtype == np.uint8
    np.testing.assert_array_equal(x0_frames[2], x)
    np.testing.assert_array_equal(frames[1], x)
    assert (frames[0] != x).mean() > 0.5


@pytest.mark.parametrize(
    "changes, sigma2",
    [
        ({"diffusion.variance": "fixed_small"}, lambda beta, posterior: posterior),
        ({"diffusion.variance": "fixed_large"}, lambda beta, posterior: beta),
        ({"sample.sampler": "ddim", "sample.eta": 0.5}, lambda beta, posterior: posterior / 4),
    ],
    ids=["fixed_small", "fixed_large", "ddim"],
)
def test_the_noise_of_a_config_s_step(config, changes, sigma2):
    """What is left of x_t = 0 where x0 is taken for 0; on a chain of 5 of 20 steps."""
    config.diffusion.update(schedule="linear", beta_end=0.4)
    config.sample.num_steps = 5
    config.update_from_flattened_dict(changes)
    a = np.cumprod(1 - np.linspace(1e-4, 0.4, 20))[::4]
    keys, zeros = sampling.image_keys(0, jnp.arange(256)), jnp.zeros((256, 8, 8, 1))
    chain = samplers.make_chain(config)
    step = samplers.make_step(
        samplers.make_solver(config, chain),
        chain,
        lambda *_: diffusion.Prediction(zeros, None),
        keys,
    )
    beta = 1 - a[3] / a[2]
    expected = sigma2(beta, beta * (1 - a[2]) / (1 - a[3]))
    # The standard error of a variance from 16,384 values is 1.1 %.
    (x, *_), _ = step((zeros,), 1)  # i = 3
    assert float(x.var()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("clip", [True, False, 0.5])
def test_x0_is_clipped_where_the_config_says_so(config, monkeypatch, clip):
    """A network that sees no noise in x_t takes x_t / √ᾱ_t for x0; 0.5: dynamic thresholding."""
    config.diffusion.update(schedule="linear", beta_end=0.4, clip_x0=bool(clip))
    config.sample.dynamic_threshold = 0.5 if clip == 0.5 else 0.0
    monkeypatch.setattr(unet, "net_fn", lambda *_: lambda x_t, t: jnp.zeros_like(x_t))
    predict_fn = samplers.guided_predict(config, samplers.make_chain(config), {}, None)
    x_t = jnp.linspace(-2, 2, 64).reshape(1, 8, 8, 1)
    expected = x_t / np.sqrt(np.prod(1 - np.linspace(1e-4, 0.4, 20)))
    bound = np.median(np.abs(expected)) if clip == 0.5 else 1
    expected = np.clip(expected, -bound, bound) / bound if clip else expected
    np.testing.assert_allclose(predict_fn(x_t, jnp.array([19])).x0, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, times, solver",
    [
        ({}, [0, 4, 8, 12, 16], lambda a: solvers.ancestral(a, "fixed_large")),
        ({"sample.sampler": "ddim", "sample.eta": 0.5}, [0, 4, 8, 12, 16],
         lambda a: solvers.ddim(a, 0.5)),
        ({"sample.sampler": "dpmpp", "sample.order": 3}, [3, 6, 9, 12, 15],
         lambda a: solvers.dpmpp(a, 3)),
        ({"sample.sampler": "unipc", "sample.spacing": "linspace"}, [4, 8, 11, 15, 19],
         lambda a: solvers.unipc(a, 2)),
        ({"sample.sampler": "dpmpp_sde", "sample.spacing": "trailing"}, [3, 7, 11, 15, 19],
         solvers.dpmpp_sde),
        ({"sample.sampler": "heun", "sample.spacing": "linspace"}, [0, 5, 10, 14, 19],
         solvers.heun),
        ({"sample.sampler": "plms"}, [0, 4, 8, 12, 16], solvers.plms),
    ],
)  # fmt: skip
def test_a_config_s_steps_and_solver(config, changes, times, solver):
    """5 of 20 steps; multistep solvers leave out t = 0."""
    config.diffusion.variance = "fixed_large"
    config.sample.num_steps = 5
    config.update_from_flattened_dict(changes)
    chain = samplers.make_chain(config)
    np.testing.assert_array_equal(chain.timesteps, times)
    expected = solver(configs.make_alpha_bars(config)[times])
    np.testing.assert_array_equal(samplers.make_solver(config, chain).weights, expected.weights)


def test_grids_and_reports_take_few_steps(config):
    """Whatever sampler the images of --mode=sample have; and T steps where T is smaller."""
    config.sample.update(sampler="ddim", eta=0.5, spacing="quadratic", num_steps=3)
    described = samplers.describe_sampler(configs.for_show(config))
    assert "dpmpp_sde, 10 steps, 10 network" in described
    config.diffusion.num_timesteps = 5
    assert "dpmpp_sde, 5 steps" in samplers.describe_sampler(configs.for_show(config))
    assert "ddim, 3 steps, 3 network evaluations" in samplers.describe_sampler(config)


def test_a_learned_variance_scales_the_noise():
    """By exp(log σ² / 2), of each pixel; not in the last step."""
    solver = solvers.ancestral(shorter(5)[1], "learned")
    zeros = jnp.zeros((1, 2, 2, 1))
    log_variance = jnp.log(jnp.arange(1.0, 5).reshape(1, 2, 2, 1))
    prediction = diffusion.Prediction(zeros, log_variance)
    step = sampling.make_step(solver, lambda *_: prediction, lambda _, shape: jnp.ones((1, *shape)))
    for n, expected in ((0, np.arange(1.0, 5) ** 0.5), (4, np.zeros(4))):
        (x,), _ = step((zeros,), n)
        np.testing.assert_allclose(x.ravel(), expected, rtol=1e-6)


def test_a_learned_range_scales_the_noise_of_each_step():
    """By σ = β^(p/2) β̃^((1-p)/2) of the step at hand, p = (v + 1) / 2."""
    alpha_bars = shorter(5)[1]
    solver = solvers.ancestral(alpha_bars, "learned_range")
    before = np.append(1.0, alpha_bars[:-1])
    betas = 1 - alpha_bars / before
    small = betas * (1 - before) / (1 - alpha_bars)
    zeros, v = jnp.zeros((1, 2, 2, 1)), jnp.linspace(-1, 1, 4).reshape(1, 2, 2, 1)
    prediction, power = diffusion.Prediction(zeros, v), (np.linspace(-1, 1, 4) + 1) / 2
    step = sampling.make_step(solver, lambda *_: prediction, lambda _, shape: jnp.ones((1, *shape)))
    for n, i in ((0, 4), (2, 2)):  # row n is the chain's step i
        (x,), _ = step((zeros,), n)
        expected = np.sqrt(betas[i] ** power * small[i] ** (1 - power))
        np.testing.assert_allclose(x.ravel(), expected, rtol=1e-5)


def test_a_classifier_cannot_guide_pure_noise():
    """Where ᾱ = 0 there is nothing to shift: finite, and the unguided x0."""
    schedule = schedules.make_schedule("linear", 10, zero_terminal_snr=True)
    predict_fn = diffusion.predictor(schedule, lambda x, t: 0.5 * x, prediction="v")
    guided = sampling.classifier_guided(schedule, predict_fn, lambda x, t: x.sum((1, 2, 3)), 2.0)
    x_t, t = jnp.ones((2, 4, 4, 1)), jnp.array([9, 8])
    found, unguided = guided(x_t, t).x0, predict_fn(x_t, t).x0
    np.testing.assert_array_equal(found[0], unguided[0])
    assert np.isfinite(found).all() and (found[1] != unguided[1]).all()


def test_samples_of_other_settings_have_other_names(config, tmp_path):
    run_files.save_config(config, tmp_path)
    names = [generate.settings(config, tmp_path)]
    changes = {
        "sample.seed": 1,
        "sample.use_ema": False,
        "sample.sampler": "ddim",
        "sample.num_steps": 5,
        "sample.spacing": "quadratic",
        "sample.eta": 0.5,
        "sample.order": 3,
        "sample.dynamic_threshold": 0.99,
        "sample.label": "3",
        "sample.guidance": 2.0,
        "sample.classifier": "runs/other",
        "diffusion.variance": "fixed_large",
        "diffusion.clip_x0": False,
    }
    for name, value in changes.items():
        config.update_from_flattened_dict({name: value})
        names.append(generate.settings(config, tmp_path))
    assert len(set(names)) == len(names)


def test_calls_of_the_network_of_a_part_of_the_chain(config):
    """From t = 9 of 20: at 8, 6, 4, 2 and 0; Heun calls it twice, but for the last."""
    config.sample.update(sampler="heun", num_steps=10, t=9)
    found = samplers.describe_sampler(config, edit.img2img_task)
    assert found == "heun, 10 steps, 9 network evaluations"
    assert samplers.describe_sampler(config) == "heun, 10 steps, 19 network evaluations"


@pytest.mark.parametrize("sampler, spacing, warns",
    [("plms", "trailing", True), ("heun", "trailing", True), ("plms", "leading", False),
     ("dpmpp", "trailing", False)])  # fmt: skip
def test_samplers_that_amplify_errors_at_small_alpha_bar(config, caplog, sampler, spacing, warns):
    config.diffusion.update(num_timesteps=200, schedule="cosine")
    config.sample.update(sampler=sampler, spacing=spacing, num_steps=10)
    generate.warn_of_chain(config)
    assert ("where it amplifies" in caplog.text) == warns
    assert (f"{sampler} starts at ᾱ = 6.1e-08, where it amplifies" in caplog.text) == warns


@pytest.mark.parametrize("steps, warns", [(1, True), (2, True), (50, False), (200, False)])
def test_a_chain_that_does_not_start_in_noise_is_reported(config, caplog, steps, warns):
    config.diffusion.num_timesteps = 200
    config.sample.num_steps = steps
    generate.warn_of_chain(config)
    assert ("is not yet noise" in caplog.text) == warns
