"""Tutorial C: MNIST at 28×28 with a chain of 200 steps that does not end in noise.

    python main.py --config=configs/tutorials/mnist28_t200.py

Its recipe: T = 200, linear β from 1e-4 to 0.02, not rescaled; σ² = β̃ (σ² = β is
--config.diffusion.variance=fixed_large); a U-Net of 64 channels, two residual blocks a level and a
time embedding of 256; Adam. It gives no learning rate, batch size, or length: here 1e-3, 128, 20
epochs, as tutorial D has. It shows ᾱ over t, here in show/schedule.png.

A trap, which the program names when it starts: ᾱ ends at 0.132 (the tutorial's plot has 0.096), so
that samples start from noise that training never saw. The corrected twin:
--config.diffusion.schedule=linear_rescaled. CIFAR-10, which it also names:
--config.data.name=cifar10 --config.data.channels=3 "--config.data.image_size=(32,32)"
"--config.model.attention_resolutions=(8,)". Cosine schedule: --config.diffusion.schedule=cosine.
Its next steps: --config.sample.sampler=ddim, --config.data.num_classes=10 for guidance.

Here on purpose otherwise: samples are of averaged parameters. The last batch of an epoch is filled
from the next one.
"""

from ddpm_jax.configs import named_config


def get_config():
    """64 channels on three levels."""
    config = named_config("mnist")
    config.diffusion.update(num_timesteps=200, variance="fixed_small")
    config.model.update(channels=64, num_res_blocks=2, norm_groups=32)
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=20, eval_every=469, sample_every=469)
    config.train.checkpoint_every = 469
    return config
