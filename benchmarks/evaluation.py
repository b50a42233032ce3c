"""The overhead of an evaluation: Inception's time relative to sampling.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --config=configs/celebahq256.py --batch_size=16

The network is untrained, which does not affect its speed. A few steps are timed, and extrapolated.
"""

import time

import jax
import numpy as np
from absl import app, flags

from ddpm_jax import configs, cpu, parallel
from ddpm_jax.core import unet
from ddpm_jax.metrics import features, inception
from ddpm_jax.runs import samplers

CONFIG = flags.DEFINE_string("config", "configs/cifar10.py", "whose network and T are used")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images at a time")
STEPS = 20  # timed; one scan each in make_sampler


def seconds(run):
    """The time of the second of two runs; the first one compiles."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(_):
    """Prints the time of sampling and of Inception for one batch."""
    config = configs.named_config(CONFIG.value)
    num_timesteps, size = config.diffusion.num_timesteps, BATCH_SIZE.value
    config.diffusion.update(num_timesteps=STEPS, schedule="cosine")
    config.sample.batch_size = size
    cpu.use_cores(size)
    shape = configs.image_shape(config)
    shapes = unet.param_shapes(configs.make_model(config), shape)
    params = jax.tree.map(lambda s: np.full(s.shape, 0.01, s.dtype), shapes)
    params = parallel.replicate(params)
    sample = samplers.make_sampler(config)
    sampling = seconds(lambda: sample(params, np.arange(size))) * num_timesteps / STEPS

    images = np.random.default_rng(0).integers(0, 256, (size, *shape)).astype(np.uint8)
    extract = features.make_extractor(inception.load().params, "tf1", size)
    scoring = seconds(lambda: extract(images))
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {size} images of {shape}")
    print(f"sampling {num_timesteps} steps: {sampling:.1f} s; Inception: {scoring:.1f} s")
    print(f"overhead: {scoring / sampling:.2%}")


if __name__ == "__main__":
    app.run(main)
