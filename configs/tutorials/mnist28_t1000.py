"""Tutorial E: MNIST at 28×28 with the paper's schedule and the smallest network.

    python main.py --config=configs/tutorials/mnist28_t1000.py

Recipe: T = 1000, linear β, σ² = β; Adam with 1e-3, batch size 128, 3 epochs. It shows the forward
process at t = 0, 100, …, 900, the loss, and 8 samples in a row: here show/forward.png, losses.png
and samples.png.

Intentional differences: images are in [-1, 1]; the tutorial's are in [0, 1], whose mean is far from
0. Training and sampling include t = 0: the tutorial draws t from 1 to T - 1 and stops at 1, so that
its last denoising step is missing. Our U-Net has 0.17 M parameters and 19 million multiply-adds per
image; the tutorial's has 0.06 M (about 26 million), but does not run as printed: the first
convolution of its up path expects 128 channels and gets 96. Samples use the EMA of the parameters.
The last batch of an epoch is filled from the next epoch.
"""

from ddpm_jax.configs import named_config


def get_config():
    """8 channels at full resolution, 32 at the lowest."""
    config = named_config("mnist")
    config.model.update(channels=8, channel_mults=(1, 2, 4), norm_groups=4)
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=3, eval_every=469, sample_every=469)
    config.train.update(checkpoint_every=469, score_every=0)
    config.sample.update(num_samples=8, columns=8)
    config.show.timesteps = tuple(range(0, 1000, 100))
    config.show.update(sampler="ancestral", num_steps=0)  # all steps, as in the tutorial
    return config
