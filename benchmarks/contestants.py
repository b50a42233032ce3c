"""What `python -m benchmarks` measures: the same work by this project and by its peers.

Each of `ours`, `diffusers`, and `lucidrains` takes a Cell and returns (work, parameters, GMAC):
work() does it once and comes back when it is done; the others are the network's, the multiply-adds
of an image in billions only for a network that differs from ours.
"""

import importlib
import statistics
import sys
import time
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import peak
from ddpm_jax import configs, cpu, parallel
from ddpm_jax.core import unet
from ddpm_jax.files import data
from ddpm_jax.runs import generate, interop, train
from ddpm_jax.runs import state as states

DIFFUSERS = ("eager", "channels_last", "compile")  # its modes
OTHER = "denoising-diffusion-pytorch"
TURN = 1.0  # seconds; after a pause, steps of 20 ms take up to twice as long at first


class Cell(NamedTuple):
    """One measurement.

    Attributes:
      task: "forward", "train" (loss, backward, clip, Adam, EMA), "ancestral" or "ddim".
      network: the name of a config.
      size: images at once.
      steps: of the reverse process that are measured.
      chain: steps that an image takes, by which images/s are reckoned.
      devices: of a CPU, virtual ones; 0 for as many as main.py makes.
      rounds: turns that each contestant gets.
    """

    task: str
    network: str
    size: int
    steps: int = 1
    chain: int = 1
    devices: int = 0
    rounds: int = 5

    def images_per_second(self, seconds):
        """Of one turn."""
        return self.size / seconds * self.steps / self.chain


def get_config(cell):
    """The network's config, without dropout, and of this chain."""
    config = importlib.import_module(f"configs.{cell.network}").get_config()
    config.model.dropout = 0.0
    config.train.batch_size = cell.size
    config.sample.update(batch_size=cell.size, num_samples=cell.size, num_steps=cell.steps)
    config.sample.sampler = cell.task if cell.task in ("ancestral", "ddim") else "ancestral"
    return config


def random_images(config, size):
    """uint8 [size, H, W, C]."""
    shape = (size, *configs.image_shape(config))
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def ours(cell):
    """This project, as main.py sets it up."""
    cpu.prepare(trains=cell.task == "train")
    if cell.devices:
        jax.config.update("jax_num_cpu_devices", cell.devices)
    else:
        cpu.use_cores(cell.size)
    config = get_config(cell)
    if jax.default_backend() == "gpu":
        config.model.dtype = "bfloat16"
    model, optimizer = configs.make_model(config), states.make_optimizer(config.optim, 100)
    state = states.create_state(model, optimizer, configs.image_shape(config), 0)
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    images = random_images(config, cell.size)
    if cell.task == "train":
        schedule = configs.make_schedule(config)
        step = train.make_train_step(config, model, schedule, optimizer)
        state, batch = parallel.replicate(state), data.Batch(images, None)

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
        sample, params = generate.make_sampler(config), parallel.replicate(state.params)

        def work():
            sample(params, np.arange(cell.size))

    return work, parameters, None


def torch_device():
    """(device, autocast): bfloat16 on a GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def synchronized(work):
    """work, then waiting for the GPU."""
    import torch

    def call():
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def torch_train_step(network, optim, loss):
    """What train.train_step does, of loss()."""
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


def diffusers(cell, mode):
    """diffusers' UNet2DModel and pipelines with PyTorch, in one of its modes."""
    import torch
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

    config, (device, autocast) = get_config(cell), torch_device()
    network = UNet2DModel.from_config(interop.diffusers_network(config)).to(device)
    scheduler = DDPMScheduler.from_config(interop.diffusers_scheduler(config))
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

    else:
        pipeline = {"ancestral": DDPMPipeline, "ddim": DDIMPipeline}[cell.task](network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet = call
        options = {"num_inference_steps": cell.steps, "output_type": "np"}

        def work():
            with autocast:
                pipeline(batch_size=cell.size, **options)

    return synchronized(work), parameters, None


def multiply_adds(network, shape):
    """Of one image, counted by PyTorch on its meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    height, width, channels = shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, channels, height, width, device="meta"), torch.zeros(1).to("meta"))
    return counter.get_total_flops() // 2


def lucidrains(cell):
    """denoising-diffusion-pytorch: its own network, of the width nearest to ours in GMAC."""
    import torch
    from diffusers import UNet2DModel

    # Its Trainer alone uses torchvision, which does not load beside a CPU-only PyTorch.
    sys.modules["torchvision"] = types.SimpleNamespace(transforms=None, utils=None)
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    config, (device, autocast) = get_config(cell), torch_device()
    shape = configs.image_shape(config)
    options = {"dim_mults": tuple(config.model.channel_mults), "channels": shape[-1]}
    with torch.device("meta"):
        target = multiply_adds(UNet2DModel.from_config(interop.diffusers_network(config)), shape)
        found = {dim: multiply_adds(Unet(dim, **options), shape) for dim in range(8, 257, 8)}
    dim = min(found, key=lambda dim: abs(found[dim] - target))
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

    return synchronized(work), sum(p.numel() for p in network.parameters()), found[dim] / 1e9


def make(name, cell):
    """What a contestant returns."""
    if name == "ours":
        return ours(cell)
    return lucidrains(cell) if name == OTHER else diffusers(cell, name)


def serve(pipe, name, cell):
    """In a process of its own: warms up, then does the work whenever it is asked; says how long.

    Sends (parameters, GMAC, seconds until warm), then the seconds that the work took on average in
    each turn of at least TURN seconds, and when asked for no more the peak memory in MiB (Linux).
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
    """FLOP/s of the device, by a bfloat16 product of square matrices."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
