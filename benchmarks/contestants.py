"""The contestants of `python -m benchmarks`: the same work by this project and by its peers.

`ours`, `diffusers` and `lucidrains` take a Cell, and whether a CPU computes in bfloat16, and return
(work, parameters, GMAC). work() does the work once and waits for its end. `parameters` is the
network's number of parameters. GMAC is the network's multiply-adds per image in billions, or None
if the network is the same as ours.
"""

import bisect
import functools
import importlib
import os
import statistics
import sys
import time
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import peak
from ddpm_jax import configs, cpu, packing, parallel
from ddpm_jax.core import solvers, unet
from ddpm_jax.files import data
from ddpm_jax.runs import networks, objective, samplers, schedulers, states

DIFFUSERS = ("eager", "channels_last", "compile")  # modes of diffusers
OTHER = "denoising-diffusion-pytorch"
BFLOAT16 = ", bfloat16"  # suffix of those that compute in it on a CPU; on a GPU all do
TRAIN_FLOPS = 3 * 2 * 6.222e9  # an image, of CIFAR-10's network: forward and twice as much backward
TURN = 1.0  # seconds; after a pause, steps of 20 ms take up to twice as long at first


class Cell(NamedTuple):
    """One measurement.

    Attributes:
      task: "forward", "train" (loss, backward, clip, Adam, EMA), or a sampler.
      network: the name of a config.
      size: images at once.
      steps: measured steps of the reverse process.
      chain: steps per image, to compute images/s.
      devices: virtual devices of a CPU; 0 for the number that main.py uses.
      rounds: turns of each contestant.
    """

    task: str
    network: str
    size: int
    steps: int = 1
    chain: int = 1
    devices: int = 0
    rounds: int = 5

    def images_per_second(self, seconds):
        """Images/s of one turn."""
        return self.size / seconds * self.steps / self.chain


def get_config(cell):
    """The network's config, without dropout, with the cell's steps and sampler."""
    config = configs.named_config(cell.network)
    config.model.dropout = 0.0
    config.train.batch_size = cell.size
    config.sample.update(batch_size=cell.size, num_samples=cell.size, num_steps=cell.steps)
    if cell.task in solvers.SOLVERS:
        config.sample.update(sampler=cell.task, spacing="trailing" if is_new(cell) else "leading")
        config.diffusion.clip_x0 = cell.task != "plms"  # PNDMScheduler does not clip
    return config


def is_new(cell):
    """Whether a cell is a sampler that only this project and diffusers have."""
    return cell.task in solvers.SOLVERS and cell.task not in solvers.SINGLE_STEP


def random_images(config, size):
    """uint8 [size, H, W, C]."""
    shape = (size, *configs.image_shape(config))
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def use_one_gpu():
    """Lets this process see the first GPU only; call it before JAX or PyTorch is used."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first


def ours(cell, bfloat16):
    """This project, with main.py's setup."""
    config, mode = get_config(cell), "train" if cell.task == "train" else "sample"
    cpu.prepare(configs.positions(config, mode))
    if cell.devices:
        jax.config.update("jax_num_cpu_devices", cell.devices)
    else:
        cpu.use_cores(cell.size)
    if bfloat16 or jax.default_backend() == "gpu":
        config.model.dtype = "bfloat16"
    model, optimizer = configs.make_model(config), states.make_optimizer(config.optim, 100)
    state = states.create_state(config, model, optimizer)
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    images = random_images(config, cell.size)
    if cell.task == "train":
        schedule = configs.make_schedule(config)
        step = objective.make_train_step(config, model, schedule, optimizer)
        state, batch = packing.pack(parallel.replicate(state)), data.Batch(images, None)

        def work():
            nonlocal state
            state, _ = jax.block_until_ready(step(state, parallel.shard(batch)))

    elif cell.task == "forward":
        apply = parallel.pmap(
            lambda params, x, t: unet.net_fn(model, params)(x, t), in_axes=(None, 0, 0)
        )
        inputs = parallel.shard((jnp.asarray(images, jnp.float32), jnp.arange(cell.size)))
        params = parallel.replicate(state.params)

        def work():
            jax.block_until_ready(apply(params, *inputs))

    else:
        sample, params = samplers.make_sampler(config), parallel.replicate(state.params)

        def work():
            sample(params, np.arange(cell.size))

    return work, parameters, None


def torch_device(bfloat16):
    """(device, autocast): a GPU always computes in bfloat16."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.autocast(device, torch.bfloat16, enabled=bfloat16 or device == "cuda")


def synchronized(work):
    """Returns work followed by waiting for the GPU."""
    import torch

    def call():
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def torch_train_step(network, optim, loss):
    """The equivalent of objective.train_step, for loss()."""
    import torch

    weights = list(network.parameters())
    ema = [p.detach().clone() for p in weights]
    optimizer = torch.optim.Adam(weights, lr=optim.learning_rate, fused=True)

    def work():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, optim.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, weights, 1 - optim.ema_decay)

    return work


def diffusers(cell, mode, bfloat16):
    """diffusers' UNet2DModel and pipelines with PyTorch, in one of the modes DIFFUSERS."""
    import torch
    from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

    config, (device, autocast) = get_config(cell), torch_device(bfloat16)
    network = UNet2DModel.from_config(networks.diffusers_network(config)).to(device)
    fields = schedulers.write_scheduler(config)
    scheduler = getattr(importlib.import_module("diffusers"), fields["_class_name"])
    scheduler = scheduler.from_config(fields)
    parameters = sum(p.numel() for p in network.parameters())
    if mode == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    call = torch.compile(network) if mode == "compile" else network
    images = torch.from_numpy(random_images(config, cell.size)).to(device)

    def noisy():
        x0 = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if mode != "channels_last":
            x0 = x0.contiguous()
        eps, t = torch.randn_like(x0), torch.randint(0, len(scheduler), (cell.size,), device=device)
        return scheduler.add_noise(x0, eps, t), t, eps

    def loss():
        x_t, t, eps = noisy()
        with autocast:
            return torch.nn.functional.mse_loss(call(x_t, t).sample.float(), eps)

    if cell.task == "train":
        work = torch_train_step(network, config.optim, loss)
    elif cell.task == "forward":
        x_t, t, _ = noisy()

        def work():
            with torch.no_grad(), autocast:
                call(x_t, t)

    elif is_new(cell):

        def work():
            with autocast:
                sample_with(scheduler, call, images.permute(0, 3, 1, 2).shape, cell.steps)

    else:
        pipeline = {"ancestral": DDPMPipeline, "ddim": DDIMPipeline}[cell.task](network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet = call
        options = {"num_inference_steps": cell.steps, "output_type": "np"}

        def work():
            with autocast:
                pipeline(batch_size=cell.size, **options)

    return synchronized(work), parameters, None


def sample_with(scheduler, network, shape, num_steps):
    """The loop of diffusers' pipelines for any scheduler: float images, [B, H, W, C]."""
    import torch

    scheduler.set_timesteps(num_steps)
    with torch.no_grad():
        x = torch.randn(shape) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def multiply_adds(network, shape):
    """Multiply-adds per image, counted by PyTorch on its meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    height, width, channels = shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, channels, height, width, device="meta"), torch.zeros(1).to("meta"))
    return counter.get_total_flops() // 2


def lucidrains(cell, bfloat16):
    """denoising-diffusion-pytorch: its own network; the width is that with the nearest GMAC."""
    import torch
    from diffusers import UNet2DModel

    # Only its Trainer uses torchvision, which cannot be imported with a CPU-only PyTorch.
    sys.modules["torchvision"] = types.SimpleNamespace(transforms=None, utils=None)
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    config, (device, autocast) = get_config(cell), torch_device(bfloat16)
    shape = configs.image_shape(config)
    options = {"dim_mults": tuple(config.model.channel_mults), "channels": shape[-1]}
    with torch.device("meta"):
        target = multiply_adds(UNet2DModel.from_config(networks.diffusers_network(config)), shape)
        cost = functools.cache(lambda dim: multiply_adds(Unet(dim, **options), shape))
        dims = range(8, 257, 8)
        above = bisect.bisect_left(dims, target, lo=1, hi=len(dims) - 1, key=cost)
        dim = min(dims[above - 1 : above + 1], key=lambda dim: abs(cost(dim) - target))
    network = Unet(dim, **options).to(device)
    chain = {"image_size": shape[:2], "objective": "pred_noise", "timesteps": cell.steps}
    if cell.task == "ddim":
        chain.update(timesteps=1000, sampling_timesteps=cell.steps)
    elif cell.task == "train":
        chain.update(timesteps=1000)
    diffusion = GaussianDiffusion(network, **chain).to(device)
    images = torch.from_numpy(random_images(config, cell.size)).to(device)
    x = images.permute(0, 3, 1, 2).float().contiguous() / 255

    def loss():
        with autocast:
            return diffusion(x)

    if cell.task == "train":
        work = torch_train_step(network, config.optim, loss)
    elif cell.task == "forward":
        t = torch.zeros(cell.size, dtype=torch.int64, device=device)

        def work():
            with torch.no_grad(), autocast:
                network(x, t)

    else:

        def work():
            with autocast:
                diffusion.sample(batch_size=cell.size)

    return synchronized(work), sum(p.numel() for p in network.parameters()), cost(dim) / 1e9


def make(name, cell):
    """(work, parameters, GMAC) of a contestant."""
    mode = name.removesuffix(BFLOAT16)
    bfloat16 = mode != name
    if mode == "ours":
        return ours(cell, bfloat16)
    return lucidrains(cell, bfloat16) if mode == OTHER else diffusers(cell, mode, bfloat16)


def serve(pipe, name, cell):
    """The main function of a contestant's process: warms up, then does the work on request.

    Sends (parameters, GMAC, seconds until warm). For each True that it receives, it works for at
    least TURN seconds and sends the mean seconds. After a False it sends the peak memory in MiB
    (Linux) and ends.
    """
    start = time.perf_counter()
    work, parameters, gmac = make(name, cell)
    work(), work()
    pipe.send((parameters, gmac, time.perf_counter() - start))
    while pipe.recv():
        start, times = time.perf_counter(), 0
        while time.perf_counter() < start + TURN:
            work()
            times += 1
        pipe.send((time.perf_counter() - start) / times)
    pipe.send(peak())


def matrix_rate(size=8192, repeats=20):
    """FLOP/s of the device, measured with a bfloat16 product of square matrices."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
