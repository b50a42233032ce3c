"""What diffusers and PyTorch compute, for the parity tests; images are [B, H, W, C] arrays.

tests/test_parity.py and tests/test_parity_solvers.py compare with it as it runs. test_interop.py
and test_solvers_fixtures.py compare with what it once computed, in tests/fixtures, so that they
need no PyTorch. To write those files again:

    pip install -r requirements-parity.txt && python tests/torch_reference.py
"""

import contextlib
import pathlib
import types
import unittest.mock

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from family import DIFFUSERS

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
# Where Ho's U-Net is not diffusers' default.
HO = dict(
    norm_eps=1e-6,
    downsample_padding=0,
    freq_shift=1,
    flip_sin_to_cos=False,
    attention_head_dim=None,
)
DPMPP = dict(algorithm_type="dpmsolver++", solver_type="midpoint")
SDE = dict(algorithm_type="sde-dpmsolver++", solver_type="midpoint", solver_order=2)
UNIPC = dict(solver_type="bh2", predict_x0=True)
# The scheduler, and its arguments, of each of our solvers and orders.
SOLVERS = {
    "dpmpp/1": (DPMSolverMultistepScheduler, dict(DPMPP, solver_order=1)),
    "dpmpp/2": (DPMSolverMultistepScheduler, dict(DPMPP, solver_order=2)),
    "dpmpp/3": (DPMSolverMultistepScheduler, dict(DPMPP, solver_order=3)),
    "dpmpp_sde": (DPMSolverMultistepScheduler, SDE),
    "unipc/2": (UniPCMultistepScheduler, dict(UNIPC, solver_order=2)),
    "unipc/3": (UniPCMultistepScheduler, dict(UNIPC, solver_order=3)),
    "heun": (HeunDiscreteScheduler, {}),
    "plms": (PNDMScheduler, dict(skip_prk_steps=True, set_alpha_to_one=True)),
}


def make_network(widths, attention, seed=0, **changes):
    """A UNet2DModel with random weights.

    Args:
      widths: of each level.
      attention: levels that have it.
      seed: of the weights.
      **changes: its other arguments.
    """
    torch.manual_seed(seed)
    attends = [level in attention for level in range(len(widths))]
    blocks = dict(
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
    )
    network = UNet2DModel(**{**HO, **blocks, **changes})
    with torch.no_grad():  # biases and norms would be zeros and ones
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def to_torch(images):
    """[B, H, W, C] to [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def from_torch(images):
    """[B, C, H, W] to [B, H, W, C]."""
    return images.detach().numpy().transpose(0, 2, 3, 1)


def output(network, x_t, t, *labels):
    """The network's output for a batch, [B, C, H, W]."""
    return network(to_torch(x_t), torch.from_numpy(t), *map(torch.from_numpy, labels)).sample


def forward(network, x_t, t, *labels):
    """The network's output for a batch, [B, H, W, C]."""
    with torch.no_grad():
        return from_torch(output(network, x_t, t, *labels))


def embed_in_float64(network):
    """Makes a network compute its time embedding in float64; diffusers rounds it to float32."""
    config = network.config
    half = config.block_out_channels[0] // 2

    class Embedding(torch.nn.Module):
        def forward(self, t):
            frequencies = 10000.0 ** -(np.arange(half) / (half - config.freq_shift))
            angles = np.float64(t.numpy())[:, None] * frequencies
            parts = [np.sin(angles), np.cos(angles)]
            parts = parts[::-1] if config.flip_sin_to_cos else parts
            return torch.from_numpy(np.concatenate(parts, axis=1))

    network.time_proj = Embedding()
    return network.double()


def gradients(network, x_t, t, eps, *labels):
    """{name: gradient of the ε-MSE}."""
    loss = torch.nn.functional.mse_loss(output(network, x_t, t, *labels), to_torch(eps))
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {name: grad.numpy() for name, grad in zip(names, grads, strict=True)}


def reverse_chain(network, x, noises, **scheduler):
    """Every step of DDPMScheduler.

    Args:
      network: (x_t [B, C, H, W], t) to an object with ε as `sample`.
      x: x_T.
      noises: [T, B, H, W, C]; noises[t] is added in the step from t.
      **scheduler: arguments of DDPMScheduler.

    Returns:
      x_0.
    """
    scheduler = DDPMScheduler(num_train_timesteps=len(noises), **scheduler)
    x = to_torch(x)
    with torch.no_grad():
        for t in range(len(noises))[::-1]:
            with given_noise(noises[t]):
                x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return from_torch(x)


def ddim_chain(network, x, noises, eta, **scheduler):
    """Every step of DDIMScheduler.

    Args:
      network: (x_t [B, C, H, W], t) to an object with what it predicts as `sample`.
      x: x_T.
      noises: [T, B, H, W, C]; noises[t] is added in the step from t.
      eta: η.
      **scheduler: num_inference_steps, and arguments of DDIMScheduler.

    Returns:
      (x_0, the timesteps that were visited).
    """
    steps = scheduler.pop("num_inference_steps")
    # The last step ends at ᾱ = 1; where x0 is clipped, ε is derived from it again.
    scheduler = DDIMScheduler(set_alpha_to_one=True, **scheduler)
    scheduler.set_timesteps(steps)
    x = to_torch(x)
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            output = network(x, t).sample
            noise = to_torch(noises[t])
            kwargs = dict(eta=eta, use_clipped_model_output=True, variance_noise=noise)
            x = scheduler.step(output, t, x, **kwargs).prev_sample
    return from_torch(x), scheduler.timesteps.numpy()


def make_scheduler(case, alpha_bars, **options):
    """The scheduler that does what a solver of ours does, before set_timesteps.

    It gets ᾱ in float64. Its own is the product of float32 values: at t = 0, 1 - ᾱ is off by up to
    3e-4, which plms and Heun's method show in images that are not clipped.

    Args:
      case: one of SOLVERS.
      alpha_bars: ᾱ, [T] float64.
      **options: its other arguments.
    """
    scheduler, arguments = SOLVERS[case]
    scheduler = scheduler(num_train_timesteps=len(alpha_bars), **arguments, **options)
    scheduler.alphas_cumprod = torch.from_numpy(alpha_bars)
    return scheduler


def solver_chain(network, x, scheduler, noises=None):
    """Every step of a scheduler whose timesteps are set.

    Args:
      network: (x_t [B, C, H, W], t) to an object with what it predicts as `sample`.
      x: x_T, with variance 1.
      scheduler: of make_scheduler.
      noises: [N, B, H, W, C], of each step; None if it is deterministic.

    Returns:
      x_0.
    """
    x = to_torch(x)
    if isinstance(scheduler, HeunDiscreteScheduler):  # its x is ours divided by α
        x = x * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    with torch.no_grad():
        for n, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), t).sample
            noise = {} if noises is None else dict(variance_noise=to_torch(noises[n]))
            x = scheduler.step(output, t, x, **noise).prev_sample
    return from_torch(x)


def to_eps(network, alpha_bars, prediction, clip):
    """A network whose output is ε, of x0 clipped to [-1, 1] if `clip`; PNDMScheduler does neither.

    Args:
      network: (x_t [B, C, H, W], t) to an object with what it predicts as `sample`.
      alpha_bars: ᾱ, [T].
      prediction: "epsilon", "sample" or "v_prediction".
      clip: whether to clip x0.
    """

    def eps(x, t):
        alpha, sigma = (alpha_bars[t] ** 0.5).item(), ((1 - alpha_bars[t]) ** 0.5).item()
        output = network(x, t).sample
        x0 = {
            "epsilon": (x - sigma * output) / alpha,
            "sample": output,
            "v_prediction": alpha * x - sigma * output,
        }[prediction]
        x0 = x0.clamp(-1, 1) if clip else x0
        return types.SimpleNamespace(sample=(x - alpha * x0) / sigma)

    return eps


@contextlib.contextmanager
def given_noise(*noises):
    """Makes DDPMScheduler and both pipelines draw these noises, one after the other."""
    noises = iter(noises)

    def draw(*_, **__):
        return to_torch(next(noises))

    with (
        unittest.mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", draw),
        unittest.mock.patch("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", draw),
        unittest.mock.patch("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", draw),
    ):
        yield


def pipeline_images(pipeline, noises, **options):
    """What a DDPMPipeline or a DDIMPipeline generates, uint8.

    Args:
      pipeline: the pipeline.
      noises: x_T, then the noise of each step but the last, if it has any, as [B, H, W, C].
      **options: of the pipeline's call; by default, as many steps as there are noises.
    """
    with given_noise(*noises):
        options = dict(num_inference_steps=len(noises), output_type="np") | options
        images = pipeline(batch_size=len(noises[0]), **options).images
    return (255 * images).round().astype(np.uint8)


def optimise(network, batches, learning_rate, warmup_steps, grad_clip, ema_decay):
    """Adam on the ε-MSE, as Ho et al. train.

    Args:
      network: is changed.
      batches: (x_t, t, eps) of each step.
      learning_rate: after the warm-up.
      warmup_steps: linear, from 0.
      grad_clip: norm that clip_grad_norm_ clips to.
      ema_decay: of the plain moving average.

    Returns:
      {name: parameter}, {name: its average}, and the norms of the gradients before clipping.
    """
    parameters = dict(network.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    adam = torch.optim.Adam(parameters.values(), lr=learning_rate)
    norms = []
    for step, (x_t, t, eps) in enumerate(batches):
        adam.param_groups[0]["lr"] = learning_rate * min(step / warmup_steps, 1)
        adam.zero_grad()
        eps_pred = network(to_torch(x_t), torch.from_numpy(t)).sample
        torch.nn.functional.mse_loss(eps_pred, to_torch(eps)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), grad_clip)))
        adam.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                average[name] = ema_decay * average[name] + (1 - ema_decay) * parameter
    after = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    return after, {name: value.numpy() for name, value in average.items()}, norms


def write_fixtures():
    """A small network with attention, and what it computes."""
    network = make_network((8, 16), {1}, sample_size=8, norm_num_groups=4, layers_per_block=1)
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_end=0.2)
    DDPMPipeline(network, scheduler).save_pretrained(FIXTURES)

    rng = np.random.default_rng(0)
    x_t, eps, x_T = (rng.standard_normal((2, 8, 8, 3), np.float32) for _ in range(3))
    t = np.array([3, 41])
    noises = rng.standard_normal((50, 1, 8, 8, 3), np.float32)
    arrays = dict(x_t=x_t, t=t, eps=eps, x_T=x_T[:1], noises=noises)
    arrays["output"] = forward(network, x_t, t)
    for name, gradient in gradients(network, x_t, t, eps).items():
        arrays[f"gradient/{name}"] = gradient
    for variance in ("fixed_small", "fixed_large"):
        for clip in (True, False):
            kwargs = dict(beta_end=0.2, variance_type=variance, clip_sample=clip)
            arrays[f"chain/{variance}/{clip}"] = reverse_chain(network, x_T[:1], noises, **kwargs)
    arrays["output_float64"] = forward(embed_in_float64(network), np.float64(x_t), t)
    np.savez_compressed(FIXTURES / "expected.npz", **arrays)


def write_family_fixtures():
    """Two networks of the family, in float16, and their output; Ho's is in write_fixtures."""
    small = dict(sample_size=(8, 16), norm_num_groups=4, layers_per_block=1)
    adm = dict(
        attn_norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        out_channels=6,
        num_class_embeds=3,
    )
    members = {
        "defaults": make_network((8, 20), {1}, **small, **DIFFUSERS),
        "adm": make_network((8, 16), {1}, **small, **{**DIFFUSERS, **adm}),
    }
    rng = np.random.default_rng(0)
    x_t, t = rng.standard_normal((2, 8, 16, 3), np.float32), np.array([3, 900])
    for name, network in members.items():
        network.half().save_pretrained(FIXTURES / "family" / name)
        network, labels = network.float(), [np.array([2, 0])] if name == "adm" else []
        arrays = dict(x_t=x_t, t=t, output=forward(network, x_t, t, *labels))
        arrays |= {"labels": labels[0]} if labels else {}
        network = embed_in_float64(network)
        arrays["output_float64"] = forward(network, np.float64(x_t), t, *labels)
        np.savez_compressed(FIXTURES / "family" / name / "expected.npz", **arrays)


def write_solver_fixtures():
    """What each solver makes of a simple function; tests/test_solvers_fixtures.py has the same."""

    def bent(x, t):
        bend = 3 * x + t / 500
        eps = x - (1 - t / 1000) ** 2 * bend / (1 + bend**2) ** 0.5
        return types.SimpleNamespace(sample=eps)

    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    rng = np.random.default_rng(0)
    x_T, noises = (rng.standard_normal((*n, 2, 4, 4, 1), np.float32) for n in ((), (20,)))
    arrays = dict(x_T=x_T, noises=noises)
    for case in SOLVERS:
        for steps in (10, 20):  # PNDMScheduler needs a divisor of T
            scheduler = make_scheduler(case, alpha_bars, timestep_spacing="trailing")
            scheduler.set_timesteps(steps)
            noise = noises if case == "dpmpp_sde" else None
            arrays[f"{case}/{steps}/timesteps"] = np.int32(scheduler.timesteps)
            arrays[f"{case}/{steps}/x_0"] = solver_chain(bent, x_T, scheduler, noise)
    np.savez_compressed(FIXTURES / "solvers.npz", **arrays)


if __name__ == "__main__":
    write_fixtures()
    write_family_fixtures()
    write_solver_fixtures()
