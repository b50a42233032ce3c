"""Tutorial B: photographs of flowers, or any folder of images, at 32×32.

    python main.py --config=configs/tutorials/flowers_t1000.py --config.data.path=FOLDER
    python main.py --mode=sample --workdir=runs/flowers_t1000 \
        --config.sample.num_samples=256 --config.sample.columns=32
    python main.py --mode=show --config=configs/tutorials/flowers_t1000.py \
        --config.data.path=FOLDER --workdir=runs/flowers_data \
        --config.sample.num_samples=128 --config.sample.columns=16

Recipe: images resized to 32×32 without cropping, random flips; T = 1000, linear β rescaled by 1000
/ T, σ² = β; Ho et al.'s U-Net with 64 channels, multiples 1, 2, 4, 4 and attention at 16 and 8,
exactly as ours (2.36 GMAC); AdamW with 2e-4 and PyTorch's weight decay, batch size 32, 800 epochs.
Every 20 epochs of the 4,317 flowers it writes a checkpoint (the two newest are kept) and a grid of
32 samples, 4 per row. At the end it shows 256 samples, 32 per row, the forward process of six
images at twelve steps, and the reverse process as a video. Here, the interval of 20 epochs is given
in steps: for a folder of N images, set train.sample_every, checkpoint_every and eval_every to 20 *
(0.95 * N // 32). The tutorial numbers its folders; here, a new run needs another --workdir.

Intentional differences: for mixed precision, --config.model.dtype=bfloat16 has float32's range and
needs no loss scaling. 5 % of the images are held out. Samples use the EMA of the parameters.
Training and sampling include t = 0: the tutorial draws t from 1 to T - 1 and stops at 1, so that
its last denoising step is missing. For its video it keeps all 1,000 states of every image; here
only the frames that are shown. On MNIST it does not flip: --config.data.name=mnist
--config.data.channels=1 --noconfig.data.random_flip. Its branch for CIFAR-100 loads CIFAR-10 (here:
--config.data.name=cifar100); its training call has two arguments swapped, and it loads another file
than it saves.
"""

from ddpm_jax.configs import default_config

EPOCH = 4317 * 95 // 100 // 32  # steps; 5 % are held out


def get_config():
    """Ho et al.'s U-Net, half as wide."""
    config = default_config()
    config.data.update(name="folder", split="train[5%:]", eval_split="train[:5%]")
    config.data.update(resize="squash", random_flip=True)
    config.diffusion.schedule = "linear_rescaled"
    config.model.update(channels=64, channel_mults=(1, 2, 4, 4))
    config.model.update(attention_down=(1, 2), attention_up=(1, 2))  # at 16 × 16 and 8 × 8
    config.optim.update(warmup_steps=0, grad_clip=0.0, weight_decay=0.01, ema_decay=0.999)
    config.train.update(batch_size=32, num_steps=0, num_epochs=800)
    config.train.update(eval_every=20 * EPOCH, sample_every=20 * EPOCH)
    config.train.update(checkpoint_every=20 * EPOCH, keep_every=0)
    config.sample.update(num_samples=32, batch_size=32, columns=4)
    config.show.timesteps = (999, 800, 600, 400, 300, 250, 200, 150, 100, 50, 10, 0)
    config.show.update(sampler="ancestral", num_steps=0)  # all steps, as in the tutorial
    config.show.num_images = 6
    return config
