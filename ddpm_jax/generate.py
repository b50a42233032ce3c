"""Many images from a trained network: batches over all devices, with progress."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from ddpm_jax import checkpoint, images, parallel, sampling, schedules, unet
from ddpm_jax import config as configs
from ddpm_jax.workdir import write_npz

log = logging.getLogger(__name__)

GRID_IMAGES = 256  # nobody looks at a picture of more


def make_sampler(config, frames_at=()):
    """Builds the reverse process of a config; it compiles at the first call, and only then.

    Args:
      config: its model, data, diffusion and sample sections are used.
      frames_at: distinct timesteps after which to keep the images; K of them.

    Returns:
      sample(params, num_samples, seed, first=0, stop=()) → (x, frames), uint8 [N, H, W, C] and
      [K, N, H, W, C], of the images from number `first` on; or None as soon as `stop` holds
      something. Image i depends on (seed, i) only, up to rounding. params are replicated (see
      parallel.py).
    """
    schedule = schedules.from_config(config.diffusion)
    model = unet.make_model(config.model)
    num_timesteps, shape = schedule.num_timesteps, configs.image_shape(config)

    def start(keys):
        x = sampling.prior(keys, num_timesteps, shape)
        return x, jnp.zeros((len(frames_at), *x.shape), x.dtype)

    def run(params, carry, keys, ts):
        step = make_step(config, schedule, unet.eps_fn(model, params), keys)
        x, frames = carry
        return sampling.reverse_process(step, x, ts, frames_at, frames)

    start = parallel.pmap(start)
    run = parallel.pmap(run, in_axes=(None, 0, 0, None), donate_argnums=1)

    def sample(params, num_samples, seed, first=0, stop=()):
        devices = jax.device_count()
        batch_size = min(config.sample.batch_size, -(-num_samples // devices) * devices)
        batches = -(-num_samples // batch_size)
        done = []
        with tqdm(total=batches * num_timesteps, desc="sample", unit="step", leave=False) as bar:
            for start_of_batch in range(first, first + batches * batch_size, batch_size):
                indices = start_of_batch + jnp.arange(batch_size)
                keys = parallel.split(sampling.image_keys(seed, indices))
                carry = start(keys)
                for ts in segments(num_timesteps):
                    carry = jax.block_until_ready(run(params, carry, keys, ts))
                    bar.update(len(ts))
                    if stop:
                        return None
                done.append(_to_host(*carry))
        x, frames = (np.concatenate(parts, axis=-4) for parts in zip(*done, strict=True))
        return x[:num_samples], frames[:, :num_samples]

    return sample


def make_step(config, schedule, eps_fn, keys):
    """The config's step of the reverse process, (x_t, t) to x_{t-1}, for images with these keys."""
    variance, clip_x0 = config.diffusion.variance, config.diffusion.clip_x0

    def step(x_t, t):
        eps = sampling.noise(keys, t, x_t.shape[1:])
        return sampling.ancestral_step(
            schedule, eps_fn, x_t, t, eps, variance=variance, clip_x0=clip_x0
        )

    return step


def segments(num_timesteps):
    """All timesteps, last first, in 20 parts of at most two lengths.

    One scan over all of them would compute the same; in parts it shows progress and can be
    interrupted, and each length is compiled once.
    """
    ts = np.arange(num_timesteps, dtype=np.int32)[::-1]
    return np.array_split(ts, min(20, num_timesteps))


def _to_host(x, frames):
    """[D, B, …] and [D, K, B, …] on the devices to uint8 [D·B, …] and [K, D·B, …] on the host."""
    x = parallel.merge(images.to_uint8(x))
    frames = jnp.moveaxis(images.to_uint8(frames), 0, 1)
    return np.asarray(x), np.asarray(frames.reshape(frames.shape[0], *x.shape))


def sample(config, workdir):
    """Generates `sample.num_samples` images from a run's newest checkpoint.

    Writes samples/sample_<step>_seed<seed>[_raw].npz (`images`, uint8 [N, H, W, C]) and a .png that
    shows the first of them.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.

    Raises:
      UserError: if there is no checkpoint.
    """
    step, params = checkpoint.restore_params(config, workdir)
    seed, count = config.sample.seed, config.sample.num_samples
    which, raw = ("EMA", "") if config.sample.use_ema else ("raw", "_raw")
    log.info("sampling %d images from the %s parameters of step %d", count, which, step)
    x, _ = make_sampler(config)(params, count, seed)
    path = pathlib.Path(workdir) / "samples" / f"sample_{step:06d}_seed{seed}{raw}.npz"
    write_npz(path, images=x)
    images.write_png(path.with_suffix(".png"), images.grid(x[:GRID_IMAGES]))
    log.info("wrote %s and .png", path)
