"""Tutorial A: CIFAR-10 with the paper's schedule and a small network.

    python main.py --config=configs/tutorials/cifar10_t1000.py
    python main.py --mode=show --workdir=runs/cifar10_t1000

Recipe: T = 1000, linear β, σ² = β; Adam with 1e-4, batch size 128, 100 epochs, no flips. It shows a
4×4 grid of data and a strip of the reverse process: ten states, after t = 999, 899, …, 99, and the
image. Here these are show/data.png and denoising.png.

Intentional differences: our U-Net has 4.4 M parameters and 0.99 GMAC per image; the tutorial's has
6.2 M (about 1.2 GMAC, estimated from its speed). Samples use the EMA of the parameters
(--noconfig.sample.use_ema for the raw ones). The last batch of an epoch is filled from the next
epoch. The tutorial keeps all 1,000 states of every image on the host; here only the frames that are
shown.
"""

from ddpm_jax.configs import default_config


def get_config():
    """Ho et al.'s schedule; 64 channels on three levels."""
    config = default_config()
    config.model.update(
        channels=64,
        channel_mults=(1, 2, 2),
        num_res_blocks=1,
        attention_down=(2,),
        attention_up=(2,),
        dropout=0.0,
    )
    config.optim.update(learning_rate=1e-4, warmup_steps=0, grad_clip=0.0, ema_decay=0.999)
    config.train.update(num_steps=0, num_epochs=100, sample_every=2000, checkpoint_every=1000)
    config.train.update(eval_every=1000, keep_every=0)
    config.sample.num_samples = 16
    config.show.timesteps = (*range(999, 0, -100), 0)
    config.show.update(sampler="ancestral", num_steps=0)  # all steps, as in the tutorial
    return config
