"""Tutorial D: MNIST resized to 32×32 with a chain of 200 steps that does not end in noise.

    python main.py --config=configs/tutorials/mnist32_t200.py

Its recipe: T = 200, linear β from 1e-4 to 0.02, not rescaled; σ² = β̃; Adam with 1e-3, batches of
128, 20 epochs. It shows 64 samples, the forward process at t = 49, 99, 149, 199 (here at 0, too),
and five images on their way, after t = 199, 149, 99, 49, 0: here show/forward.png and
denoising.png.

A trap, which the program names when it starts: ᾱ ends at 0.132, so that samples start from noise
that training never saw. The corrected twin: --config.diffusion.schedule=linear_rescaled.

Here on purpose otherwise: our U-Net of 1.1 M parameters and 0.25 GMAC an image takes the place of
one of 62.4 M (1.43 GMAC), whose BatchNorm works differently in training and in sampling; group norm
does not. Samples are of averaged parameters. The last batch of an epoch is filled from the next
one, not dropped. The tutorial keeps all 200 states of every image on the host; here only those that
are shown. The cosine schedule is Nichol and Dhariwal's; the tutorial credits it to the DDPM paper:
--config.diffusion.schedule=cosine.

Lower losses in three epochs (see docs/tutorials.md), by smaller batches, a decay of the learning
rate, and a larger network, of 3.2 M parameters and 0.63 GMAC: --config.train.num_epochs=3
--config.train.batch_size=16 --config.train.eval_every=3750 --config.train.sample_every=3750
--config.optim.decay=cosine --config.model.channels=64 "--config.model.channel_mults=(1,1,2)"
"""

from ddpm_jax.configs import named_config


def get_config():
    """The network of configs/mnist.py."""
    config = named_config("mnist")
    config.data.image_size = (32, 32)
    config.diffusion.update(num_timesteps=200, variance="fixed_small")
    config.model.attention_resolutions = (8,)
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=20, eval_every=469, sample_every=469)
    config.train.checkpoint_every = 469
    config.show.update(timesteps=(199, 149, 99, 49, 0), num_images=5)
    return config
