"""Live against diffusers and PyTorch: many networks, full sizes, long chains, optimisation.

pip install -r requirements-parity.txt && python -m pytest -m parity
"""

import importlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from family import DIFFUSERS, configs_of_networks
from flax import traverse_util
from hypothesis import given, settings
from references import assert_same_gradients, gradients

from ddpm_jax import checks, cli, configs
from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings, unet
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.runs import interop, networks, schedulers, states

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SMALL = dict(sample_size=8, norm_num_groups=4, layers_per_block=1)
TRAIN_UNCONDITIONAL = dict(DIFFUSERS, sample_size=64)  # the script's network, at its resolution
SHIFT, DOWN = "scale_shift", "DownBlock2D"
ADM = dict(
    DIFFUSERS,
    norm_num_groups=8,
    attn_norm_num_groups=8,
    resnet_time_scale_shift=SHIFT,
    downsample_type="resnet",
    upsample_type="resnet",
)
ADM_BLOCKS = dict(
    ADM,
    attn_norm_num_groups=4,
    down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
)
# widths, levels with attention, the other arguments of UNet2DModel
NETWORKS = {
    "cifar10, a quarter wide": ((32, 64, 64, 64), {1}, dict(sample_size=32)),
    "256², a quarter wide": ((32, 32, 64, 64, 128, 128), {4}, dict(sample_size=256)),
    "gray": ((32, 64), {1}, dict(sample_size=16, in_channels=1, out_channels=1)),
    "RGBA": ((32, 64), {0}, dict(sample_size=16, in_channels=4, out_channels=4)),
    "not square": ((32, 64, 64), {1}, dict(sample_size=(16, 24), layers_per_block=1)),
    "attention on two levels": ((16, 32, 32), {0, 2}, dict(sample_size=16, norm_num_groups=8)),
    "attention in the middle only": ((32, 64), set(), dict(sample_size=16)),
    "one level": ((32,), {0}, dict(sample_size=8, layers_per_block=3)),
    "cosines first": ((32, 64), {1}, dict(sample_size=8, flip_sin_to_cos=True)),
    "one head said otherwise": ((32, 64), {1}, dict(sample_size=8, attention_head_dim=64)),
    "four heads": ((32, 64), {1}, dict(sample_size=8, attention_head_dim=16)),
    "heads that do not fill the width": ((20, 36), {0, 1}, dict(SMALL, attention_head_dim=8)),
    "odd widths": ((12, 20, 52), {1}, dict(sample_size=16, norm_num_groups=4)),
    "narrower below": ((32, 16), {1}, dict(SMALL)),
    "no attention in the middle": ((8, 16), {1}, dict(SMALL, add_attention=False)),
    "scale-shift, middle without norm": ((8, 16), {1}, dict(SMALL, resnet_time_scale_shift=SHIFT)),
    "blocks of every kind": ((8, 8, 16, 16), set(), dict(
        SMALL,
        sample_size=(16, 8),
        downsample_type="resnet",
        down_block_types=[DOWN, "AttnDownBlock2D", "ResnetDownsampleBlock2D", DOWN],
        up_block_types=["ResnetUpsampleBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )),
    "train_unconditional, a quarter wide": ((32, 32, 64, 64, 128, 128), {4}, TRAIN_UNCONDITIONAL),
    "the course's MNIST, with classes": ((32, 64, 64), {1, 2}, dict(
        DIFFUSERS, sample_size=28, in_channels=1, out_channels=1, num_class_embeds=10,
    )),
    "ADM for ImageNet 64, an eighth wide": ((24, 48, 72, 96), {1, 2, 3}, dict(
        ADM,
        sample_size=64,
        layers_per_block=3,
        num_class_embeds=1000,
        down_block_types=["ResnetDownsampleBlock2D", *3 * ["AttnDownBlock2D"]],
        up_block_types=[*3 * ["AttnUpBlock2D"], "ResnetUpsampleBlock2D"],
    )),
    "ADM for LSUN 256, a sixteenth wide": ((16, 16, 32, 32, 64, 64), {3, 4, 5}, dict(
        ADM,
        sample_size=64,
        out_channels=6,
        down_block_types=[*3 * ["ResnetDownsampleBlock2D"], *3 * ["AttnDownBlock2D"]],
        up_block_types=[*3 * ["AttnUpBlock2D"], *3 * ["ResnetUpsampleBlock2D"]],
    )),
}  # fmt: skip
FULL = {
    "cifar10": ((128, 256, 256, 256), {1}, dict(sample_size=32)),
    "train_unconditional": ((128, 128, 256, 256, 512, 512), {4}, TRAIN_UNCONDITIONAL),
    "256²": ((128, 128, 256, 256, 512, 512), {4}, dict(sample_size=256)),
}


def converted(network, folder):
    """(model, params) of a UNet2DModel, by way of its files."""
    network.save_pretrained(folder)
    config = configs.default_config()
    fields = json.loads((folder / "config.json").read_text())
    config.update_from_flattened_dict(networks.network_fields(fields, "config.json"))
    checks.check(config, "import")
    flip = fields["flip_sin_to_cos"]
    params = interop.read_params(folder / interop.TENSORS, config, flip_sin_to_cos=flip)
    return configs.make_model(config), params


def batch(network, size=2, seed=0):
    """x_t, t, eps, and labels if the network has classes."""
    rng, config = np.random.default_rng(seed), network.config
    shape = (size, *np.broadcast_to(config.sample_size, 2), config.in_channels)
    x_t, eps = rng.standard_normal((2, *shape), np.float32)
    if config.out_channels != config.in_channels:  # a learned variance
        eps = np.concatenate([eps, eps[..., ::-1]], axis=-1)
    t, classes = rng.integers(1000, size=size), config.num_class_embeds
    return x_t, t, eps, *([rng.integers(classes, size=size)] if classes else [])


def relative_error(ours, theirs):
    ours = np.asarray(ours)  # JAX would subtract in float32
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def swapped(gradient, name):
    """Swaps the halves of a time embedding, as read_params does if the cosines are first."""
    return np.roll(gradient, gradient.shape[1] // 2, 1) if "linear_1.weight" in name else gradient


# Most of their time is compiling; each kind of block is in a smaller network too.
LONG = {
    "ADM for LSUN 256, a sixteenth wide",
    "ADM for ImageNet 64, an eighth wide",
    "256², a quarter wide",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.nightly if n in LONG else ()) for n in NETWORKS]
)
def test_network(name, reference, tmp_path):
    """float32, float64, and every gradient."""
    widths, attention, kwargs = NETWORKS[name]
    network = reference.make_network(widths, attention, **kwargs)
    model, params = converted(network, tmp_path)
    x_t, t, eps, *labels = batch(network, size=1 if "256²" in name else 2)
    out = jax.jit(unet.net_fn(model, params))(x_t, t, *labels)
    error = relative_error(out, reference.forward(network, x_t, t, *labels))
    assert error <= 1e-5
    theirs = reference.gradients(network, x_t, t, eps, *labels)
    if kwargs.get("flip_sin_to_cos"):
        theirs = {name: swapped(g, name) for name, g in theirs.items()}
    assert_same_gradients(gradients(model, params, x_t, t, eps, *labels), theirs)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda p: np.float64(np.asarray(p)), params)
        eps_fn = unet.net_fn(model.clone(dtype=jnp.float64), double)
        out = np.asarray(jax.jit(eps_fn)(np.float64(x_t), t, *labels))
    theirs = reference.forward(reference.embed_in_float64(network), np.float64(x_t), t, *labels)
    assert out.dtype == np.float64 and relative_error(out, theirs) <= 1e-12


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(configs_of_networks())
def test_names_and_shapes_of_the_family(given):
    """Every tensor of a random UNet2DModel has its place here, and none is left."""
    import torch
    from diffusers import UNet2DModel

    with torch.device("meta"):
        network = UNet2DModel.from_config(given)
    theirs = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(given, "f"))
    params = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    ours, levels = {}, len(given["block_out_channels"])
    for path, leaf in traverse_util.flatten_dict(params).items():
        name = interop.tensor_name(path, levels)
        ours[name] = interop.to_diffusers(name, np.empty(leaf.shape, np.int8)).shape
    assert ours == theirs


def test_the_course_s_network_with_classes(reference, tmp_path):
    """Its label embedding is not added to the time's, but concatenated to x; gradients, too."""
    import torch

    class ClassConditionedUnet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.class_emb = torch.nn.Embedding(10, 4)
            kwargs = dict(DIFFUSERS, sample_size=28, in_channels=5, out_channels=1)
            self.model = reference.make_network((32, 64, 64), {1, 2}, **kwargs)

        def forward(self, x, t, labels):
            maps = self.class_emb(labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            return self.model(torch.cat([x, maps], 1), t)

    network = ClassConditionedUnet()
    network.model.save_config(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / interop.TENSORS)
    arguments = [f"--weights={tmp_path}", "--config.data.num_classes=10"]
    cli.run(["main", "--mode=import", f"--workdir={tmp_path / 'run'}", *arguments])
    config = run_files.saved_config(tmp_path / "run")
    _, params = checkpoint.restore_params(config, tmp_path / "run")
    model = configs.make_model(config)

    rng = np.random.default_rng(0)
    x_t, eps = rng.standard_normal((2, 2, 28, 28, 1), np.float32)
    t, labels = np.array([5, 700]), np.array([3, 8])
    out = jax.jit(unet.net_fn(model, params))(x_t, t, labels)
    assert relative_error(out, reference.forward(network, x_t, t, labels)) <= 1e-5
    theirs = reference.gradients(network, x_t, t, eps, labels)
    theirs = {name.removeprefix("model."): swapped(g, name) for name, g in theirs.items()}
    theirs["class_embedding.weight"] = theirs.pop("class_emb.weight")
    assert_same_gradients(gradients(model, params, x_t, t, eps, labels), theirs)


@pytest.mark.parametrize(
    "name", ["cifar10", "train_unconditional", pytest.param("256²", marks=pytest.mark.nightly)]
)
def test_full_size(name, reference, tmp_path):
    """Published networks: the output, and for CIFAR-10 every gradient."""
    widths, attention, kwargs = FULL[name]
    network = reference.make_network(widths, attention, **kwargs)
    model, params = converted(network, tmp_path)
    x_t, t, eps = batch(network, size=2 if name == "cifar10" else 1)
    out = jax.jit(unet.net_fn(model, params))(x_t, t)
    assert relative_error(out, reference.forward(network, x_t, t)) <= 1e-5
    if name == "cifar10":
        theirs = reference.gradients(network, x_t, t, eps)
        assert_same_gradients(gradients(model, params, x_t, t, eps), theirs)


def run(solver, predict_fn, x_T, noises):
    """x_0 of a solver; noises [N, B, H, W, C] are those of its rows."""
    noises, rows = jnp.asarray(noises), jnp.arange(len(solver.steps))
    step = sampling.make_step(solver, predict_fn, lambda n, _: noises[n])
    start = sampling.init_state(solver, x_T)
    (x_0, *_), _ = jax.jit(lambda state: sampling.reverse_process(step, state, rows))(start)
    return np.asarray(x_0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_reverse_chain(variance, clip, reference, tmp_path):
    """1,000 steps with the same noises, through a network."""
    learned = variance == "learned_range"
    network = reference.make_network((8, 16), {1}, **SMALL, out_channels=6 if learned else 3)
    model, params = converted(network, tmp_path)
    x_T, *_ = batch(network, size=1)
    noises = np.random.default_rng(1).standard_normal((1000, *x_T.shape), np.float32)
    kwargs = dict(variance_type=variance, clip_sample=clip)
    theirs = reference.reverse_chain(network, x_T, noises, **kwargs)

    alpha_bars = schedules.make_alpha_bars("linear", 1000)
    schedule = schedules.from_alpha_bars(alpha_bars)
    predict_fn = diffusion.predictor(schedule, unet.net_fn(model, params), learned=learned)
    predict_fn = diffusion.clipped(predict_fn) if clip else predict_fn
    ours = run(solvers.ancestral(alpha_bars, variance), predict_fn, x_T, noises[::-1])
    # A network that was not trained drives images to hundreds, unless they are clipped.
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("steps, eta, clip", [(1000, 0.0, True), (50, 1.0, True), (50, 0.5, False)])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_chain(prediction, steps, eta, clip, reference, tmp_path):
    """DDIMScheduler with the same noises, for each prediction that it knows."""
    network = reference.make_network((8, 16), {1}, **SMALL)
    model, params = converted(network, tmp_path)
    x_T, *_ = batch(network, size=1)
    noises = np.random.default_rng(1).standard_normal((1000, *x_T.shape), np.float32)
    kwargs = dict(prediction_type=prediction, clip_sample=clip, num_inference_steps=steps)
    theirs, visited = reference.ddim_chain(network, x_T, noises, eta, **kwargs)

    alpha_bars = schedules.make_alpha_bars("linear", 1000)
    taus = spacings.timesteps("leading", alpha_bars, steps)
    np.testing.assert_array_equal(taus[::-1], visited)
    predict_fn = diffusion.predictor(
        schedules.from_alpha_bars(alpha_bars),
        unet.net_fn(model, params),
        prediction=schedulers.PREDICTIONS[prediction],
    )
    predict_fn = sampling.respaced(diffusion.clipped(predict_fn) if clip else predict_fn, taus)
    ours = run(solvers.ddim(alpha_bars[taus], eta), predict_fn, x_T, noises[visited])
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("name", ["linear", "linear_rescaled", "cosine", "quadratic", "sigmoid"])
def test_schedules(name, reference):
    """DDPMScheduler computes in float32: its 1 - ᾱ is off by up to 1e-7, whatever it is."""
    config = configs.default_config()
    config.diffusion.update(schedule=name, num_timesteps=500)
    ours = configs.make_schedule(config)
    fields = schedulers.write_scheduler(config)
    for kind in ("DDPMScheduler", "DDIMScheduler"):
        theirs = getattr(importlib.import_module("diffusers"), kind).from_config(fields)
        np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(ours.alpha_bars, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", schedulers.FIELDS)
def test_fields_that_a_scheduler_ignores(kind):
    """A field of another class that import ignores is none that diffusers' class takes."""
    theirs = inspect.signature(getattr(importlib.import_module("diffusers"), kind)).parameters
    ours = {*schedulers.DEFAULTS, *schedulers.FIELDS[kind], *schedulers.FIXED.get(kind, ())}
    ignored = schedulers.ANY_CLASS - ours
    assert ignored and not ignored & theirs.keys()


def test_optimisation(reference, tmp_path):
    """Ten steps of Adam: a warm-up of 5, clipping that bites, EMA, no dropout."""
    network = reference.make_network((8, 16), {1}, **SMALL)
    model, params = converted(network, tmp_path)
    batches = [batch(network, size=4, seed=seed) for seed in range(10)]
    settings = dict(learning_rate=1e-3, warmup_steps=5, grad_clip=0.1, ema_decay=0.9)
    before = interop.diffusers_tensors(params, 2)
    *theirs, norms = reference.optimise(network, batches, **settings)
    assert min(norms) > 2 * settings["grad_clip"]

    config = configs.default_config()
    decay = settings.pop("ema_decay")
    config.optim.update(settings)
    optimizer = states.make_optimizer(config.optim, 10)
    params = jax.tree.map(jnp.asarray, params)
    ours = states.TrainState(jnp.int32(0), params, (params,), optimizer.init(params))

    @jax.jit
    def step(ours, x_t, t, eps):
        def loss(params):
            return jnp.mean(jnp.square(unet.net_fn(model, params)(x_t, t) - eps))

        grads = jax.grad(loss)(ours.params)
        return states.apply_gradients(ours, grads, optimizer, (decay,))

    for x_t, t, eps in batches:
        ours = step(ours, x_t, t, eps)
    zero = {name for name in before if name.endswith("to_k.bias")}
    for mine, yours in zip((ours.params, ours.ema_params[0]), theirs, strict=True):
        mine = interop.diffusers_tensors(mine, 2)
        for name in before.keys() - zero:
            moved, error = yours[name] - before[name], mine[name] - yours[name]
            assert np.linalg.norm(moved) > 0
            assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(moved), name


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("kwargs", [{}, ADM_BLOCKS], ids=["Ho's", "ADM's"])
def test_pipelines_load_what_we_export(kwargs, schedule, reference, tmp_path, caplog):
    """DDPMPipeline and DDIMPipeline generate the images that we do, within one level."""
    from diffusers import DDIMPipeline, DDPMPipeline

    kwargs = {**kwargs, **SMALL, "sample_size": (8, 16)}
    network = reference.make_network((8, 16), {1}, **kwargs)
    network.save_pretrained(tmp_path / "weights")
    run = f"--workdir={tmp_path / 'run'}"
    chain = [f"--config.diffusion.schedule={schedule}", "--config.diffusion.num_timesteps=20"]
    chain += ["--config.diffusion.beta_end=0.4"]
    cli.run(["main", "--mode=import", run, f"--weights={tmp_path / 'weights'}", *chain])
    cli.run(["main", "--mode=export", run, f"--weights={tmp_path / 'out'}"])

    ddpm = DDPMPipeline.from_pretrained(tmp_path / "out")
    for name, tensor in ddpm.unet.state_dict().items():
        theirs = network.state_dict()[name].numpy()
        theirs = swapped(theirs, name) if kwargs.get("flip_sin_to_cos") else theirs
        assert tensor.numpy().tobytes() == theirs.tobytes()

    few = [f"--config.sample.{name}=4" for name in ("num_samples", "batch_size")]
    keys = sampling.image_keys(0, jnp.arange(4))
    noises = [np.asarray(sampling.noise(keys, t, (8, 16, 3))) for t in range(20, 0, -1)]
    cli.run(["main", "--mode=sample", run, *few])
    ours = np.load(tmp_path / "run/samples/sample_000000_n4_seed0.npz")["images"]
    theirs = reference.pipeline_images(ddpm, noises)
    assert np.abs(ours - np.float64(theirs)).max() <= 1

    ddim = ["--config.sample.sampler=ddim", "--config.sample.num_steps=10"]
    cli.run(["main", "--mode=sample", run, *few, *ddim])
    ours = np.load(tmp_path / "run/samples/sample_000000_n4_seed0_ddim10.npz")["images"]
    theirs = reference.pipeline_images(
        DDIMPipeline.from_pretrained(tmp_path / "out"),
        noises[:1],
        num_inference_steps=10,
        use_clipped_model_output=True,  # its direction, too, is from the clipped x0
    )
    assert np.abs(ours - np.float64(theirs)).max() <= 1

    solver = ["--config.sample.sampler=dpmpp", "--config.sample.num_steps=10"]
    caplog.set_level("INFO", "ddpm_jax")
    cli.run(["main", "--mode=export", run, f"--weights={tmp_path / 'solver'}", *solver])
    assert "the DDPMPipeline with num_inference_steps=10;" in caplog.text
    cli.run(["main", "--mode=sample", run, *few, *solver])
    ours = np.load(tmp_path / "run/samples/sample_000000_n4_seed0_dpmpp10.npz")["images"]
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "solver")
    theirs = reference.pipeline_images(pipeline, noises[:1], num_inference_steps=10)
    assert np.abs(ours - np.float64(theirs)).max() <= 1


def test_loss_is_the_one_of_pytorch(reference):
    """mse_loss, of which the gradients above are."""
    import torch

    x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1), np.float32)
    schedule, t = schedules.make_schedule("linear", 10), jnp.array([0, 3, 9])
    ours = diffusion.simple_loss(schedule, lambda x_t, _: x_t, x0, t, eps).mean()
    x_t = np.array(diffusion.q_sample(schedule, x0, t, eps))
    theirs = torch.nn.functional.mse_loss(torch.from_numpy(x_t), torch.from_numpy(eps))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
