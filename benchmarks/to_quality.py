"""Minutes of training until digits have a stated quality: ours, and the same network elsewhere.

    pip install -r requirements-parity.txt && pip install --no-deps -r requirements-peers.txt
    python -m benchmarks.to_quality      # on a CPU

Each trains diffusers' UNet2DModel, or ours with the same parameters, on the digits, alone, for the
config's steps, with its batch size, learning rate and the EMA's decay, in float32, on L_simple:
this project; diffusers as its example does, with its EMAModel (whose decay begins lower),
DDPMScheduler and cosine decay; denoising-diffusion-pytorch by its Trainer, whose learning rate is
constant. Minutes are from the start of the process, without checkpoints and what is scored.
Quality is the fraction of 1,000 images that digits_quality.py is confident about; this project
draws all of them, with dpmpp_sde in 20 steps.
"""

import argparse
import copy
import functools
import multiprocessing
import pathlib
import sys
import tempfile
import time
import types
from unittest import mock

import numpy as np

import ddpm_jax
from benchmarks import digits_quality
from ddpm_jax import configs, cpu, progress
from ddpm_jax.files import data, run_files
from ddpm_jax.runs import networks, samplers, schedulers, show, train

STOPS = 10  # times that the quality is measured, evenly
SAMPLES = 1000


def stops_of(config):
    """The steps after which the quality is measured; the last step is one."""
    steps = config.train.num_steps
    return [steps * (i + 1) // STOPS for i in range(STOPS)]


def train_ours(config, folder, start):
    """Trains a run in `folder`: {step: minutes}."""
    cpu.prepare(configs.positions(config, "train"))
    cpu.use_cores(config.train.batch_size)
    every, begun = stops_of(config)[0], []
    config.train.update(checkpoint_every=every, keep_every=every, log_every=every)
    config.train.update(sample_every=10**6, eval_every=10**6, score_every=0)
    loop = train.run_loop
    with mock.patch.object(train, "run_loop", lambda *a: begun.append(time.time()) or loop(*a)):
        train.train(config, folder)
    minutes = show.minutes_at(run_files.read_metrics(folder), config.train.batch_size)
    return {step: (begun[0] - start) / 60 + minutes[step] for step in stops_of(config)}


def real_digits(config):
    """The training images, uint8 [N, H, W, C]."""
    source = data.open_source(config.data, "split")
    return source.read(np.arange(source.size)).images


def diffusers_pipeline(config):
    """The DDPMPipeline of a config: UNet2DModel and DDPMScheduler."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel.from_config(networks.diffusers_network(config))
    scheduler = DDPMScheduler.from_config(schedulers.write_scheduler(config))
    return DDPMPipeline(network, scheduler)


def time_stops(config, folder, start, train_to, averaged, pipeline):
    """Trains a peer from stop to stop, and writes a pipeline at each: {step: minutes}.

    train_to(step) trains until a step; averaged() is the UNet2DModel of the EMA.
    """
    minutes, saving = {}, 0.0
    for step in stops_of(config):
        train_to(step)
        now = time.time()
        minutes[step] = (now - start - saving) / 60
        type(pipeline)(averaged(), pipeline.scheduler).save_pretrained(folder / str(step))
        saving += time.time() - now
    return minutes


def train_diffusers(config, folder, start):
    """Trains with diffusers' parts: {step: minutes}."""
    import torch
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    pipeline = diffusers_pipeline(config)
    network, scheduler = pipeline.unet.to(memory_format=torch.channels_last), pipeline.scheduler
    optim, steps, size = config.optim, config.train.num_steps, config.train.batch_size
    ema = EMAModel(network.parameters(), decay=optim.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=optim.learning_rate, fused=True)
    rate = get_cosine_schedule_with_warmup(optimizer, optim.warmup_steps, steps)
    x0 = torch.from_numpy(real_digits(config)).permute(0, 3, 1, 2).float() / 127.5 - 1
    loader = torch.utils.data.DataLoader(x0, size, shuffle=True, drop_last=True)
    batches = enumerate(batch for _ in range(steps) for batch in loader)

    def train_to(last):
        for step, batch in batches:
            eps, t = torch.randn_like(batch), torch.randint(len(scheduler), (size,))
            found = network(scheduler.add_noise(batch, eps, t), t).sample
            torch.nn.functional.mse_loss(found, eps).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), optim.grad_clip)
            optimizer.step(), rate.step(), optimizer.zero_grad()
            ema.step(network.parameters())
            if step + 1 == last:
                return

    def averaged():
        other = copy.deepcopy(network)
        ema.copy_to(other.parameters())
        return other

    return time_stops(config, folder, start, train_to, averaged, pipeline)


def without_torchvision():
    """The transforms of images that need none; torchvision does not fit a PyTorch for CPUs."""
    import torch

    same = lambda size: lambda image: image  # noqa: E731
    return types.SimpleNamespace(
        Compose=lambda steps: lambda image: functools.reduce(lambda x, f: f(x), steps, image),
        Lambda=lambda function: function,
        Resize=same,
        CenterCrop=same,
        ToTensor=lambda: lambda image: torch.from_numpy(np.array(image))[None] / 255,
    )


def train_lucidrains(config, folder, start):
    """Trains with denoising-diffusion-pytorch's Trainer: {step: minutes}."""
    import torch
    from PIL import Image

    pipeline = diffusers_pipeline(config)  # diffusers must not find the stand-in
    fake = types.SimpleNamespace(transforms=without_torchvision(), utils=None)
    sys.modules["torchvision"] = fake
    multiprocessing.set_start_method("fork", force=True)  # its loader's; those transforms are local
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    class Network(torch.nn.Module):
        """UNet2DModel as GaussianDiffusion calls a network."""

        channels = out_dim = config.data.channels
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self):
            super().__init__()
            self.network = pipeline.unet

        def forward(self, x, t, x_self_cond=None):
            return self.network(x, t).sample

    chain = GaussianDiffusion(
        Network(),
        image_size=tuple(config.data.image_size),
        timesteps=config.diffusion.num_timesteps,
        objective="pred_noise",
        beta_schedule=config.diffusion.schedule,
    )
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(real_digits(config)):
        Image.fromarray(image[..., 0]).save(folder / "images" / f"{i}.png")
    trainer = Trainer(
        chain,
        folder / "images",
        train_batch_size=config.train.batch_size,
        train_lr=config.optim.learning_rate,
        ema_decay=config.optim.ema_decay,
        ema_update_every=1,
        augment_horizontal_flip=False,
        calculate_fid=False,
        save_and_sample_every=10**9,
        results_folder=str(folder),
    )

    def train_to(step):
        trainer.train_num_steps = step
        trainer.train()

    def averaged():
        return trainer.ema.ema_model.model.network

    return time_stops(config, folder, start, train_to, averaged, pipeline)


CONTESTANTS = {
    "ours": train_ours,
    "diffusers, channels_last": train_diffusers,
    "denoising-diffusion-pytorch": train_lucidrains,
}


def serve(pipe, name, config, folder, start):
    """The main function of a contestant's process."""
    pipe.send(CONTESTANTS[name](config, folder, start))


def trained(name, config, folder):
    """Trains in a process of its own: {step: minutes}."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    arguments = other, name, config, folder, time.time()
    process = context.Process(target=serve, args=arguments)
    process.start()
    other.close()
    minutes = pipe.recv()
    process.join()
    return minutes


def make_quality():
    """Returns quality(name, folder, step) -> that of the images of one stop."""
    config, judge = configs.named_config("digits"), digits_quality.make_judge()[0]
    config.sample.update(sampler="dpmpp_sde", num_steps=20, batch_size=SAMPLES)
    sampler = samplers.make_sampler(config)

    def quality(name, folder, step):
        if name == "ours":
            run = ddpm_jax.load(folder, checkpoint=str(step))
        else:
            run = ddpm_jax.load(folder / str(step))
        images = sampler(run.params, np.arange(SAMPLES)).x
        return digits_quality.confident(judge, images / 255)[0]

    return quality


def table(found, wanted):
    """Lines of the table: found: {contestant: {step: (minutes, quality)}}; wanted: qualities."""
    columns = ["trained by", *(f"minutes to {quality:g}" for quality in wanted), "at the end"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, stops in found.items():
        cells = [name]
        for quality in wanted:
            reached = {step: minutes for step, (minutes, q) in stops.items() if q >= quality}
            step = min(reached, default=None)
            cells.append(f"{reached[step]:.1f} (step {step:,})" if reached else "never")
        minutes, quality = stops[max(stops)]
        cells.append(f"{quality:.2f} after {minutes:.1f} minutes")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quality", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--num_steps", type=int, help="fewer than the config's, for a trial")
    flags = parser.parse_args()
    if not cpu.is_used():
        parser.error("digits are for CPUs: there is a GPU here, which the peers would not use")
    if (flags.num_steps or STOPS) % STOPS:
        parser.error(f"--num_steps={flags.num_steps}: must be a multiple of {STOPS}")
    quality, found = make_quality(), {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        progress.bar(len(CONTESTANTS), "trained", "run") as bar,
    ):
        for name in CONTESTANTS:
            config, folder = configs.named_config("digits"), pathlib.Path(temporary) / name
            config.train.num_steps = flags.num_steps or config.train.num_steps
            minutes = trained(name, config, folder)
            found[name] = {step: (minutes[step], quality(name, folder, step)) for step in minutes}
            bar.update()
    print(*table(found, flags.quality), sep="\n")


if __name__ == "__main__":
    main()
