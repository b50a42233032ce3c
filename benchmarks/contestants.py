"""What `python -m benchmarks` measures: the same work by this project and by its peers.

Each function takes a Cell and returns (work, parameters): work() does it once and comes back when
it is done; parameters is how many the network has.
"""

import importlib
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import peak
from ddpm_jax import config as configs
from ddpm_jax import data, generate, interop, parallel, schedules, train, unet
from ddpm_jax import state as states

PEERS = ("eager", "channels_last", "compile")


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
    parallel.prepare_cpu()
    if cell.devices:
        jax.config.update("jax_num_cpu_devices", cell.devices)
    else:
        parallel.use_cpu_cores(cell.size)
    config = get_config(cell)
    if jax.default_backend() == "gpu":
        config.model.dtype = "bfloat16"
    model, optimizer = unet.make_model(config), states.make_optimizer(config.optim, 100)
    state = states.create_state(model, optimizer, configs.image_shape(config), 0)
    state = parallel.replicate(state)
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    images, params = random_images(config, cell.size), state.params
    if cell.task == "train":
        schedule = schedules.from_config(config.diffusion)
        step = train.make_train_step(config, model, schedule, optimizer)
        batch = data.Batch(images, None)

        def work():
            nonlocal state
            state, _ = jax.block_until_ready(step(state, parallel.split(batch)))

    elif cell.task == "forward":
        apply = parallel.pmap(
            lambda params, x, t: unet.net_fn(model, params)(x, t), in_axes=(None, 0, 0)
        )
        inputs = parallel.split((jnp.asarray(images, jnp.float32), jnp.arange(cell.size)))

        def work():
            jax.block_until_ready(apply(params, *inputs))

    else:
        sample = generate.make_sampler(config)

        def work():
            sample(params, np.arange(cell.size))

    return work, parameters


def diffusers(cell, mode):
    """diffusers' UNet2DModel and pipelines with PyTorch, in one of its modes."""
    import torch
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

    config = get_config(cell)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    network = UNet2DModel.from_config(interop.diffusers_network(config)).to(device)
    scheduler = DDPMScheduler.from_config(interop.diffusers_scheduler(config))
    parameters = sum(p.numel() for p in network.parameters())
    if mode == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    call = torch.compile(network) if mode == "compile" else network
    images = torch.from_numpy(random_images(config, cell.size)).to(device)

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    def noisy():
        x0 = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if mode != "channels_last":
            x0 = x0.contiguous()
        eps, t = torch.randn_like(x0), torch.randint(0, len(scheduler), (cell.size,), device=device)
        return scheduler.add_noise(x0, eps, t), t, eps

    if cell.task == "train":
        ema = [p.detach().clone() for p in network.parameters()]
        weights, optim = list(network.parameters()), config.optim
        optimizer = torch.optim.Adam(weights, lr=optim.learning_rate, fused=True)

        def work():
            x_t, t, eps = noisy()
            with autocast:
                loss = torch.nn.functional.mse_loss(call(x_t, t).sample.float(), eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, optim.grad_clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, weights, 1 - optim.ema_decay)
            synchronize()

    elif cell.task == "forward":
        x_t, t, _ = noisy()

        def work():
            with torch.no_grad(), autocast:
                call(x_t, t)
            synchronize()

    else:
        pipeline = {"ancestral": DDPMPipeline, "ddim": DDIMPipeline}[cell.task](network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet = call
        options = {"num_inference_steps": cell.steps, "output_type": "np"}

        def work():
            with autocast:
                pipeline(batch_size=cell.size, **options)
            synchronize()

    return work, parameters


def make(name, cell):
    """(work, parameters) of a contestant."""
    return ours(cell) if name == "ours" else diffusers(cell, name)


def serve(pipe, name, cell):
    """In a process of its own: warms up, then does the work whenever it is asked; says how long.

    Sends (parameters, seconds until warm), then the seconds of each turn, and when asked for no
    more the peak memory in MiB (Linux).
    """
    start = time.perf_counter()
    work, parameters = make(name, cell)
    work(), work()
    pipe.send((parameters, time.perf_counter() - start))
    while pipe.recv():
        start = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - start)
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
