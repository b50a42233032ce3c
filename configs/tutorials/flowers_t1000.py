"""Tutorial B: photographs of flowers, or a folder of any others, at 32×32.

    python main.py --config=configs/tutorials/flowers_t1000.py --config.data.path=FOLDER
    python main.py --mode=sample --workdir=runs/flowers_t1000 \\
        --config.sample.num_samples=256 --config.sample.columns=32
    python main.py --mode=show --config=configs/tutorials/flowers_t1000.py \\
        --config.data.path=FOLDER --workdir=runs/flowers_data \\
        --config.sample.num_samples=128 --config.sample.columns=16

Its recipe: images resized to 32×32 without cropping, flipped at random; T = 1000, linear β rescaled
by 1000 / T, σ² = β; Ho et al.'s U-Net, 64 wide, multiples 1, 2, 4, 4, attention at 16 and 8, which
is ours to the multiply-add (2.36 GMAC); AdamW with 2e-4 and PyTorch's weight decay, batches of 32,
800 epochs. Every 20 epochs of the 4,317 flowers there is a checkpoint (the two newest are kept) and
a grid of 32 samples, 4 a row; in the end 256 samples, 32 a row, the forward process of six images
at its twelve steps, and the whole reverse process as a video. What happens every 20 epochs is
counted in steps: a folder of N images wants 20 * (0.95 * N // 32) for train.sample_every,
checkpoint_every and eval_every. A new run is another --workdir, where the tutorial numbers its
folders.

Here on purpose otherwise: mixed precision is --config.model.dtype=bfloat16, which has float32's
range and needs no scaling of the loss; one image in twenty is held out; samples are of averaged
parameters. t = 0 is trained and taken: the tutorial draws t from 1 to T - 1 and stops at 1, so that
its last denoising step is missing. For its video it keeps all 1,000 states of every image; here
only the frames that are shown. On MNIST it does not flip: --config.data.name=mnist
--config.data.channels=1 --noconfig.data.random_flip. Its branch for CIFAR-100 loads CIFAR-10 (here:
--config.data.name=cifar100); its call for training has two arguments in each other's place, and it
saves one file and loads another.
"""

from ddpm_jax.configs import default_config

EPOCH = 4317 * 95 // 100 // 32  # steps; 5 % are held out


def get_config():
    """Ho et al.'s U-Net, half as wide."""
    config = default_config()
    config.data.update(name="folder", split="train[5%:]", eval_split="train[:5%]")
    config.data.update(resize="squash", random_flip=True)
    config.diffusion.schedule = "linear_rescaled"
    config.model.update(channels=64, channel_mults=(1, 2, 4, 4), attention_resolutions=(16, 8))
    config.optim.update(warmup_steps=0, grad_clip=0.0, weight_decay=0.01, ema_decay=0.999)
    config.train.update(batch_size=32, num_steps=0, num_epochs=800)
    config.train.update(eval_every=20 * EPOCH, sample_every=20 * EPOCH)
    config.train.update(checkpoint_every=20 * EPOCH, keep_every=0)
    config.sample.update(num_samples=32, batch_size=32, columns=4)
    config.show.timesteps = (999, 800, 600, 400, 300, 250, 200, 150, 100, 50, 10, 0)
    config.show.num_images = 6
    return config
