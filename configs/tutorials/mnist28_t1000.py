"""Tutorial E: MNIST at 28×28 with the paper's chain and the smallest network.

    python main.py --config=configs/tutorials/mnist28_t1000.py

Its recipe: T = 1000, linear β, σ² = β; Adam with 1e-3, batches of 128, 3 epochs. It shows the
forward process at t = 0, 100, …, 900, the loss, and 8 samples in a row: here show/forward.png,
losses.png and samples.png.

Here on purpose otherwise: images are in [-1, 1], not in [0, 1], whose mean is far from 0. t = 0 is
trained and taken: the tutorial draws t from 1 to T - 1 and stops at 1, so that its last denoising
step is missing. Our U-Net of 0.17 M parameters and 19 million multiply-adds an image takes the
place of one of 0.06 M (about 26 million), which as printed does not run: its first convolution on
the way up expects 128 channels and gets 96. Samples are of averaged parameters. The last
batch of an epoch is filled from the next one.
"""

from ddpm_jax.configs import named_config


def get_config():
    """8 channels at full size, 32 at the bottom."""
    config = named_config("mnist")
    config.model.update(channels=8, channel_mults=(1, 2, 4), norm_groups=4)
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=3, eval_every=469, sample_every=469)
    config.train.checkpoint_every = 469
    config.sample.update(num_samples=8, columns=8)
    config.show.timesteps = tuple(range(0, 1000, 100))
    return config
