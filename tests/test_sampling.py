"""Algorithm 2 on Gaussian data, whose outcome is known exactly, and what a seed promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gaussian_eps

from ddpm_jax import config as configs
from ddpm_jax import generate, parallel, sampling, schedules, state, unet

HO = schedules.make_schedule("linear", 1000, 1e-4, 0.02)


def make_step(variance, eps_fn=None, schedule=HO, seed=0, clip_x0=False):
    eps_fn = eps_fn or gaussian_eps(1.0, HO)

    def step(x, t):
        eps = sampling.noise(sampling.image_keys(seed, jnp.arange(len(x))), t, x.shape[1:])
        return sampling.ancestral_step(
            schedule, eps_fn, x, t, eps, variance=variance, clip_x0=clip_x0
        )

    return step


@pytest.mark.parametrize("variance, expected", [("fixed_large", 0.25075), ("fixed_small", 0.24613)])
def test_samples_of_gaussian_data(variance, expected):
    """What tests/references.py asserts exactly, through the sampler itself and its noise."""
    x = sampling.prior(sampling.image_keys(3, jnp.arange(8)), 1000, (64, 64, 1))
    step = make_step(variance, gaussian_eps(0.25, HO), seed=3)
    out, _ = jax.jit(lambda x: sampling.reverse_process(step, x, jnp.arange(1000)[::-1]))(x)
    assert float(out.mean()) == pytest.approx(0, abs=0.01)
    # The standard error of a variance from 32,768 values is 0.8 %.
    assert float(out.var()) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("num_timesteps", [1, 2, 13])
def test_scan_equals_a_loop(num_timesteps):
    schedule = schedules.make_schedule("cosine", num_timesteps)
    step = make_step("fixed_small", gaussian_eps(0.5, schedule), schedule, clip_x0=True)
    x = loop = sampling.prior(sampling.image_keys(0, jnp.arange(3)), num_timesteps, (4, 4, 2))
    ts = list(reversed(range(num_timesteps)))
    frames_at = (num_timesteps - 1, 0)[: min(num_timesteps, 2)]
    x, frames = sampling.reverse_process(step, x, jnp.array(ts), frames_at)
    kept = {}
    for t in ts:
        loop = kept[t] = step(loop, jnp.int32(t))
    np.testing.assert_allclose(x, loop, rtol=1e-5, atol=1e-5)
    assert frames.shape == (len(frames_at), 3, 4, 4, 2)
    np.testing.assert_allclose(frames, [kept[t] for t in frames_at], rtol=1e-5, atol=1e-5)


def test_parts_of_a_scan_equal_the_whole():
    step, ts, frames_at = make_step("fixed_large"), np.arange(30)[::-1], (2, 29, 11)
    x = sampling.prior(sampling.image_keys(0, jnp.arange(2)), 30, (4, 4, 1))
    whole = sampling.reverse_process(step, x, ts, frames_at)
    first = sampling.reverse_process(step, x, ts[:12], frames_at)
    parts = sampling.reverse_process(step, first[0], ts[12:], frames_at, first[1])
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_last_step_adds_no_noise():
    out = [
        sampling.ancestral_step(
            HO,
            gaussian_eps(1.0, HO),
            jnp.ones((1, 2, 2, 1)),
            jnp.int32(0),
            jnp.full((1, 2, 2, 1), eps),
            variance="fixed_large",
            clip_x0=True,
        )
        for eps in (0.0, 5.0)
    ]
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize("num_timesteps", [1, 7, 20, 97, 200, 1000, 4000])
def test_segments(num_timesteps):
    parts = generate.segments(num_timesteps)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(num_timesteps)[::-1])
    assert len({len(p) for p in parts}) <= 2
    assert len(parts) == min(20, num_timesteps)


def some_params(config):
    """Parameters that make the network's output depend on its input."""
    optimizer = state.make_optimizer(config.optim, 10)
    model = unet.make_model(config.model)
    params = state.create_state(model, optimizer, configs.image_shape(config), 0).params
    return parallel.replicate(jax.tree.map(lambda p: p + 0.02, params))


def sample(config, batch_size, num_samples, seed=5, frames_at=()):
    config.sample.batch_size = batch_size
    return generate.make_sampler(config, frames_at)(some_params(config), num_samples, seed)


def test_a_seed_gives_the_same_images_in_every_batch_size(config):
    """7 does not divide over 4 devices: batches are 8 and 16 here; see the next test for 7."""
    small, _ = sample(config, 8, 18)
    large, _ = sample(config, 16, 18)
    assert small.shape == (18, 8, 8, 1) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - large).max() <= 1
    assert len(np.unique(small.reshape(18, -1), axis=0)) == 18
    other, _ = sample(config, 16, 18, seed=6)
    assert (other != large).mean() > 0.5


@pytest.mark.parametrize("batch_size", [7, 16])
def test_images_do_not_depend_on_their_batch(config, batch_size):
    model, params = unet.make_model(config.model), some_params(config)
    schedule = schedules.from_config(config.diffusion)

    @functools.partial(jax.jit, static_argnums=1)
    def run(first, size):
        keys = sampling.image_keys(5, first + jnp.arange(size))
        x = sampling.prior(keys, 20, (8, 8, 1))

        def step(x, t):
            eps = sampling.noise(keys, t, (8, 8, 1))
            kwargs = dict(variance="fixed_large", clip_x0=True)
            return sampling.ancestral_step(schedule, eps_fn, x, t, eps, **kwargs)

        def eps_fn(x, t):
            return model.apply({"params": params}, x, t)

        return sampling.reverse_process(step, x, jnp.arange(20)[::-1])[0]

    alone = jnp.concatenate([run(i, 1) for i in range(18)])
    parts = [run(i, batch_size) for i in range(0, 18, batch_size)]
    np.testing.assert_allclose(jnp.concatenate(parts)[:18], alone, atol=1e-4)


def test_frames(config):
    """The frame after t = 0 is the image; N need not fill the batches."""
    x, frames = sample(config, 4, 6, frames_at=(15, 0))
    assert frames.shape == (2, 6, 8, 8, 1) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[1], x)
    assert (frames[0] != x).mean() > 0.5
