"""Tutorial C: MNIST at 28×28 with T = 200, whose chain does not end in noise.

    python main.py --config=configs/tutorials/mnist28_t200.py

Recipe: T = 200, linear β from 1e-4 to 0.02, not rescaled; σ² = β̃ (for σ² = β:
--config.diffusion.variance=fixed_large); a U-Net with 64 channels, two residual blocks per level
and a time embedding of size 256; Adam. It does not give the learning rate, batch size and number of
epochs: here 1e-3, 128 and 20, as in tutorial D. It shows ᾱ over t, here in show/schedule.png.

Pitfall, about which the program warns: ᾱ ends at 0.132 (in the tutorial's plot at 0.096), so
sampling starts from noise that the network never saw in training. Corrected:
--config.diffusion.schedule=linear_rescaled. For CIFAR-10, which the tutorial also mentions:
--config.data.name=cifar10 --config.data.channels=3 "--config.data.image_size=(32,32)". Cosine
schedule: --config.diffusion.schedule=cosine. Next steps: --config.sample.sampler=ddim, and
--config.data.num_classes=10 for guidance.

Intentional differences: samples use the EMA of the parameters. The last batch of an epoch is filled
from the next epoch.
"""

from ddpm_jax.configs import named_config


def get_config():
    """64 channels on three levels."""
    config = named_config("mnist")
    config.diffusion.update(num_timesteps=200, variance="fixed_small")
    config.model.update(channels=64, num_res_blocks=2, norm_groups=32)
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=20, eval_every=469, sample_every=469)
    config.train.update(checkpoint_every=469, score_every=0)
    return config
