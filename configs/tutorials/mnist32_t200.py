"""Tutorial D: MNIST resized to 32×32 with T = 200, whose chain does not end in noise.

    python main.py --config=configs/tutorials/mnist32_t200.py

Recipe: T = 200, linear β from 1e-4 to 0.02, not rescaled; σ² = β̃; Adam with 1e-3, batch size 128,
20 epochs. It shows 64 samples, the forward process at t = 49, 99, 149, 199 (here also at 0), and
five images in the reverse process, after t = 199, 149, 99, 49, 0: here show/forward.png and
denoising.png.

Pitfall, about which the program warns: ᾱ ends at 0.132, so sampling starts from noise that the
network never saw in training. Corrected: --config.diffusion.schedule=linear_rescaled.

Intentional differences: our U-Net has 1.1 M parameters and 0.25 GMAC per image; the tutorial's has
62.4 M (1.43 GMAC), with BatchNorm, which differs between training and sampling; GroupNorm does not.
Samples use the EMA of the parameters. The last batch of an epoch is filled from the next epoch, not
dropped. The tutorial keeps all 200 states of every image on the host; here only the frames that are
shown. The tutorial attributes the cosine schedule to the DDPM paper; it is Nichol and Dhariwal's:
--config.diffusion.schedule=cosine.

Lower losses in three epochs (see docs/tutorials.md), with smaller batches, learning rate decay, and
a larger network of 3.2 M parameters and 0.63 GMAC: --config.train.num_epochs=3
--config.train.batch_size=16 --config.train.eval_every=3750 --config.train.sample_every=3750
--config.optim.decay=cosine --config.model.channels=64 "--config.model.channel_mults=(1,1,2)"
"""

from ddpm_jax.configs import named_config


def get_config():
    """The network of configs/mnist.py."""
    config = named_config("mnist")
    config.data.image_size = (32, 32)
    config.diffusion.update(num_timesteps=200, variance="fixed_small")
    config.optim.update(warmup_steps=0, decay="constant", grad_clip=0.0)
    config.train.update(num_steps=0, num_epochs=20, eval_every=469, sample_every=469)
    config.train.update(checkpoint_every=469, score_every=0)
    config.show.update(timesteps=(199, 149, 99, 49, 0), num_images=5)
    config.show.update(sampler="ancestral", num_steps=0)  # all steps, as in the tutorial
    return config
