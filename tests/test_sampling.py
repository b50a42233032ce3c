"""Algorithm 2 on Gaussian data, whose outcome is known exactly, and what a seed promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_predict

from ddpm_jax import configs, parallel
from ddpm_jax.core import diffusion, sampling, schedules, unet
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import generate, state

HO = schedules.make_schedule("linear", 1000, 1e-4, 0.02)


def make_step(variance, data_variance=1.0, schedule=HO, seed=0, clip=False):
    predict_fn = gaussian_predict(data_variance, schedule, clip)

    def step(x, t):
        eps = sampling.noise(sampling.image_keys(seed, jnp.arange(len(x))), t, x.shape[1:])
        return sampling.ancestral_step(schedule, predict_fn, x, t, eps, variance=variance)

    return step


@pytest.mark.parametrize("variance, expected", [("fixed_large", 0.25075), ("fixed_small", 0.24613)])
def test_samples_of_gaussian_data(variance, expected):
    """What tests/references.py asserts exactly, through the sampler itself and its noise."""
    x = sampling.prior(sampling.image_keys(3, jnp.arange(8)), 1000, (64, 64, 1))
    step = make_step(variance, 0.25, seed=3)
    out, _ = jax.jit(lambda x: sampling.reverse_process(step, x, jnp.arange(1000)[::-1]))(x)
    assert float(out.mean()) == pytest.approx(0, abs=0.01)
    # The standard error of a variance from 32,768 values is 0.8 %.
    assert float(out.var()) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("num_timesteps", [1, 2, 13])
def test_scan_equals_a_loop(num_timesteps):
    schedule = schedules.make_schedule("cosine", num_timesteps)
    step = make_step("fixed_small", 0.5, schedule, clip=True)
    x = loop = sampling.prior(sampling.image_keys(0, jnp.arange(3)), num_timesteps, (4, 4, 2))
    ts = list(reversed(range(num_timesteps)))
    frames_at = (num_timesteps - 1, 0)[: min(num_timesteps, 2)]
    x, frames = sampling.reverse_process(step, x, jnp.array(ts), frames_at)
    kept = {}
    for t in ts:
        loop, _ = step(loop, jnp.int32(t))
        kept[t] = loop
    np.testing.assert_allclose(x, loop, rtol=1e-5, atol=1e-5)
    assert frames.shape == (len(frames_at), 3, 4, 4, 2)
    np.testing.assert_allclose(frames, [kept[t] for t in frames_at], rtol=1e-5, atol=1e-5)


def test_parts_of_a_scan_equal_the_whole():
    step, ts = make_step("fixed_large"), np.arange(30)[::-1]
    x = sampling.prior(sampling.image_keys(0, jnp.arange(2)), 30, (4, 4, 1))
    whole, frames = sampling.reverse_process(step, x, ts, (2, 29, 11))
    middle, early = sampling.reverse_process(step, x, ts[:12], (29, 25))
    end, late = sampling.reverse_process(step, middle, ts[12:], (11, 2))
    np.testing.assert_allclose(end, whole, rtol=1e-5, atol=1e-5)
    parts = jnp.stack([late[1], early[0], late[0]])
    np.testing.assert_allclose(parts, frames, rtol=1e-5, atol=1e-5)


def test_last_step_adds_no_noise():
    out = [
        sampling.ancestral_step(
            HO,
            gaussian_predict(1.0, HO, clip=True),
            jnp.ones((1, 2, 2, 1)),
            jnp.int32(0),
            jnp.full((1, 2, 2, 1), eps),
            variance="fixed_large",
        )[0]
        for eps in (0.0, 5.0)
    ]
    np.testing.assert_array_equal(*out)


def chain(step_fn, predict_fn, ts, schedule=HO, x=None):
    """x_0 of two images, with the noise of their keys."""
    keys = sampling.image_keys(0, jnp.arange(2))
    x = sampling.prior(keys, 1000, (8, 8, 1)) if x is None else x

    def step(x, t):
        return step_fn(schedule, predict_fn, x, t, sampling.noise(keys, t, x.shape[1:]))

    return jax.jit(lambda x: sampling.reverse_process(step, x, ts)[0])(x)


def curved(x_t, t):
    """A nonlinear network."""
    return jnp.tanh(2 * x_t) + 0.1


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_is_ancestral_with_fixed_small(clip):
    predict_fn = diffusion.predictor(HO, curved)
    predict_fn = diffusion.clipped(predict_fn) if clip else predict_fn
    ancestral = functools.partial(sampling.ancestral_step, variance="fixed_small")
    ddim = functools.partial(sampling.ddim_step, eta=1.0)
    ts = jnp.arange(1000)[::-1]
    ours, theirs = (chain(step, predict_fn, ts) for step in (ddim, ancestral))
    # Not clipped, this network's images grow to hundreds.
    scale = max(1, float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)


def test_ddim_without_eta_is_a_function_of_the_start():
    predict_fn = diffusion.clipped(diffusion.predictor(HO, curved))
    ddim = functools.partial(sampling.ddim_step, eta=0.0)
    for t in (999, 1, 0):
        x = jnp.linspace(-2, 2, 64).reshape(1, 8, 8, 1)
        outs = [ddim(HO, predict_fn, x, t, jnp.full_like(x, eps))[0] for eps in (0, 7)]
        np.testing.assert_array_equal(*outs)
        assert np.isfinite(outs[0]).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_s_noise_and_marginals(eta):
    """Song et al. 2020: σ as in Eq. (16); whatever it is, q(x_{t-1} | x0) is kept (Lemma 1).

    x0 is known to be 0, so x_t ~ N(0, 1 - ᾱ_t), and x_{t-1} has to be N(0, 1 - ᾱ_{t-1}).
    """
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - betas)
    zeros, ones = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    for t in (1, 20, 500, 999):
        of_x, of_eps = (
            sampling.ddim_step(HO, lambda *_: diffusion.Prediction(zeros, None), *case, eta=eta)[0]
            for case in ((ones, t, zeros), (zeros, t, ones))
        )
        sigma = eta * np.sqrt((1 - a[t - 1]) / (1 - a[t]) * (1 - a[t] / a[t - 1]))
        assert float(of_eps.squeeze()) == pytest.approx(sigma, rel=1e-5)
        variance = float(of_x.squeeze()) ** 2 * (1 - a[t]) + float(of_eps.squeeze()) ** 2
        assert variance == pytest.approx(1 - a[t - 1], rel=1e-5)


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("total, steps", [(1, 1), (200, 1), (200, 7), (1000, 50), (1000, 999)])
def test_spacings(spacing, total, steps):
    taus = schedules.SPACINGS[spacing](total, steps)
    assert len(taus) == steps and taus[0] == 0 and taus[-1] < total
    assert (np.diff(taus) > 0).all()
    np.testing.assert_array_equal(schedules.SPACINGS[spacing](total, total), np.arange(total))


def test_spacings_of_song_et_al():
    np.testing.assert_array_equal(schedules.leading_spacing(1000, 50), np.arange(0, 1000, 20))
    squares = schedules.quadratic_spacing(1000, 10)
    np.testing.assert_array_equal(squares, np.linspace(0, np.sqrt(800), 10).__pow__(2).astype(int))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_shorter_chain_has_the_same_alpha_bars(name):
    """And the β's of Nichol & Dhariwal: 1 - ᾱ_τ / ᾱ_τ', which only agree with ᾱ if all do."""
    taus = schedules.leading_spacing(1000, 7)
    long, short = (schedules.make_schedule(name, 1000, timesteps=t) for t in (None, taus))
    np.testing.assert_allclose(short.alpha_bars, long.alpha_bars[taus], rtol=1e-6)
    assert short.num_timesteps == 7
    np.testing.assert_allclose(np.cumprod(1 - np.float64(short.betas)), short.alpha_bars, rtol=1e-4)
    whole = schedules.make_schedule(name, 1000, timesteps=np.arange(1000))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(long), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_going_to_noise_and_back_errs_less_with_more_steps():
    """Gaussian data, whose exact way there is known: x_T = x0 · √((ᾱ s² + 1 - ᾱ) / s²)."""
    x0, errors, ends = jnp.linspace(-1, 1, 128).reshape(2, 8, 8, 1), [], []
    for steps in (10, 50, 250, 1000):
        taus = schedules.leading_spacing(1000, steps)
        short = schedules.make_schedule("linear", 1000, timesteps=taus)
        predict_fn = sampling.respaced(gaussian_predict(0.25, HO), taus)

        def there(x, t, short=short, predict_fn=predict_fn):
            return sampling.ddim_inverse_step(short, predict_fn, x, t)

        ts = jnp.arange(steps)
        x_T, _ = jax.jit(lambda x, ts=ts, f=there: sampling.reverse_process(f, x, ts))(x0)
        back = chain(
            functools.partial(sampling.ddim_step, eta=0.0), predict_fn, ts[::-1], short, x_T
        )
        errors.append(float(jnp.abs(back - x0).max()))
        a = float(short.alpha_bars[-1])
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
        np.testing.assert_array_equal(found.log_variance, given.log_variance)
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
def test_inpaint_plan(steps, jump, times):
    """Each step starts where the previous one ended, from x_T to x_0."""
    ts, ups = sampling.inpaint_plan(steps, jump, times)
    level = steps - 1  # x_t, from which a step down starts
    for t, up in zip(ts, ups, strict=True):
        assert t == (level + 1 if up else level)
        level += 1 if up else -1
    assert level == -1
    if times == 1:
        np.testing.assert_array_equal(ts, np.arange(steps)[::-1])
    if steps == 250:
        assert len(ts) == 4570  # RePaint's own setting: 24 places, 9 times 10 up and 10 down


def test_inpainting_s_way_up_is_the_forward_process():
    """x_{t-1} ~ N(√ᾱ_{t-1} x0, 1 - ᾱ_{t-1}) becomes N(√ᾱ_t x0, 1 - ᾱ_t), Eq. (4), on any chain."""
    taus = schedules.leading_spacing(1000, 50)
    short = schedules.make_schedule("linear", 1000, timesteps=taus)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[taus]
    zeros, ones = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    for t in (1, 10, 49):

        def go_up(x, eps, t=t):
            down, known = lambda x, t: (x, x), jnp.zeros(x.shape, bool)  # neither is used
            return float(sampling.inpaint_step(short, down, x, t, True, x, known, eps)[0].squeeze())

        of_x, of_eps = go_up(ones, zeros), go_up(zeros, ones)
        assert of_x * np.sqrt(a[t - 1]) == pytest.approx(np.sqrt(a[t]), rel=1e-5)
        assert of_x**2 * (1 - a[t - 1]) + of_eps**2 == pytest.approx(1 - a[t], rel=1e-5)


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

    taus = schedules.leading_spacing(1000, 50)
    short = schedules.make_schedule("linear", 1000, timesteps=taus)
    known_mask = jnp.broadcast_to(jnp.array([True, False]).reshape(1, 1, 2, 1), (1, 64, 2, 1))
    x0 = jnp.full((1, 64, 2, 1), 0.8)
    errors = []
    for times in (1, 10):
        ts, ups = map(jnp.asarray, sampling.inpaint_plan(50, 1, times))

        def step(x, n, ts=ts, ups=ups):
            eps = jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (2, *x.shape))

            def reverse(x, t):
                guess = sampling.respaced(predict_fn, taus)
                return sampling.ancestral_step(short, guess, x, t, eps[0], variance="fixed_small")

            return sampling.inpaint_step(short, reverse, x, ts[n], ups[n], x0, known_mask, eps[1])

        x = jax.random.normal(jax.random.key(1), x0.shape)
        plan = jnp.arange(len(ts))
        run = jax.jit(lambda x, f=step, plan=plan: sampling.reverse_process(f, x, plan)[0])
        out = run(x)
        np.testing.assert_array_equal(out[:, :, 0], x0[:, :, 0])
        errors.append(abs(float(out[:, :, 1].mean()) - r * 0.8))
    # The conditional's standard deviation is 0.44, of a mean of 64 of them 0.054.
    assert errors[1] < 0.15 and errors[1] < errors[0]


@pytest.mark.parametrize("num_timesteps", [1, 7, 20, 97, 200, 1000, 4000])
def test_segments_of_the_reverse_process(num_timesteps):
    """At most two lengths, so that two programs are compiled; each frame is in its segment."""
    kept = {0, num_timesteps // 2, num_timesteps - 1}
    for one_by_one in (False, True):
        segments = generate.split_steps(np.arange(num_timesteps)[::-1], kept, one_by_one)
        steps = np.concatenate([segment.steps for segment in segments])
        np.testing.assert_array_equal(steps, np.arange(num_timesteps)[::-1])
        assert len({len(segment.steps) for segment in segments}) <= 2
        assert len(segments) == (num_timesteps if one_by_one else min(20, num_timesteps))
        assert sorted(step for s in segments for step in s.frames_at) == sorted(kept)
        assert len({len(segment.padded_frames_at) for segment in segments}) == 1
        assert all(set(s.frames_at) <= set(s.steps.tolist()) for s in segments)


def some_params(config):
    """Parameters that make the network's output depend on its input."""
    optimizer = state.make_optimizer(config.optim, 10)
    model = configs.make_model(config)
    params = state.create_state(model, optimizer, configs.image_shape(config), 0).params
    return parallel.replicate(jax.tree.map(lambda p: p + 0.02, params))


def sample(config, batch_size, num_samples, seed=5, frames_at=(), x0_at=()):
    config.sample.update(batch_size=batch_size, seed=seed)
    sampler = generate.make_sampler(config, frames_at=frames_at, x0_at=x0_at)
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

        def step(x, t):
            eps = sampling.noise(keys, t, (8, 8, 1))
            return sampling.ancestral_step(schedule, predict_fn, x, t, eps, variance="fixed_large")

        return sampling.reverse_process(step, x, jnp.arange(20)[::-1])[0]

    alone = jnp.concatenate([run(i, 1) for i in range(18)])
    parts = [run(i, batch_size) for i in range(0, 18, batch_size)]
    np.testing.assert_allclose(jnp.concatenate(parts)[:18], alone, atol=1e-4)


def test_frames(config):
    """The frame after t = 0 is the image, and its x0; N need not fill the batches."""
    x, frames, x0_frames = sample(config, 4, 6, frames_at=(15, 0), x0_at=(12, 3, 0))
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
    step = generate.make_step(
        config, generate.make_chain(config), lambda *_: diffusion.Prediction(zeros, None), keys
    )
    beta = 1 - a[3] / a[2]
    expected = sigma2(beta, beta * (1 - a[2]) / (1 - a[3]))
    # The standard error of a variance from 16,384 values is 1.1 %.
    assert float(step(zeros, 3)[0].var()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("clip", [True, False])
def test_x0_is_clipped_where_the_config_says_so(config, monkeypatch, clip):
    """A network that sees no noise in x_t takes x_t / √ᾱ_t for x0."""
    config.diffusion.update(schedule="linear", beta_end=0.4, clip_x0=clip)
    monkeypatch.setattr(unet, "net_fn", lambda *_: lambda x_t, t: jnp.zeros_like(x_t))
    predict_fn = generate.guided_predict(config, generate.make_chain(config), {}, None)
    x_t = jnp.linspace(-2, 2, 64).reshape(1, 8, 8, 1)
    expected = x_t / np.sqrt(np.prod(1 - np.linspace(1e-4, 0.4, 20)))
    expected = np.clip(expected, -1, 1) if clip else expected
    np.testing.assert_allclose(predict_fn(x_t, jnp.array([19])).x0, expected, rtol=1e-5)


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


@pytest.mark.parametrize("steps, warns", [(1, True), (2, True), (50, False), (200, False)])
def test_a_chain_that_does_not_start_in_noise_is_reported(config, caplog, steps, warns):
    config.diffusion.num_timesteps = 200
    config.sample.num_steps = steps
    generate.warn_of_chain(config)
    assert ("is not yet noise" in caplog.text) == warns
