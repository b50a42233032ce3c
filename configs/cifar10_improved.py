"""CIFAR-10 with the U-Net and the schedule of Nichol & Dhariwal 2021.

    python main.py --config=configs/cifar10_improved.py

Three residual blocks a level, 128 channels, four heads of attention at 16 × 16 and 8 × 8, and a
time embedding that scales and shifts the features: 52.5 M parameters. As in their Table 2: T = 4000
with the cosine schedule, and L_hybrid, which learns the variance. Not run.
"""

from ddpm_jax.configs import named_config


def get_config():
    """Their network and objective. They give it t · 1000 / T, here it gets t itself, up to 3999."""
    config = named_config("cifar10")
    config.diffusion.update(schedule="cosine", num_timesteps=4000)
    config.diffusion.update(loss="hybrid", variance="learned_range")
    config.model.update(
        num_res_blocks=3,
        attention_down=(1, 2),
        attention_up=(1, 2),
        num_heads=4,
        symmetric_padding=True,
        scale_shift=True,
        dropout=0.3,
        norm_eps=1e-5,
        freq_shift=0,
    )
    config.data.random_flip = False
    config.optim.update(learning_rate=1e-4, warmup_steps=0, grad_clip=0.0)
    config.train.num_steps = 500_000
    return config
