"""Every number of the paper, or that follows from it, that needs no training; and ours beside it.

    python -m tests.references

prints them as a table; tests/test_references.py asserts them. "float64" as a source means: worked
out in float64 from the definitions in the paper's equation, apart from this code.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from ddpm_jax import configs
from ddpm_jax.core import diffusion, likelihood, sampling, schedules, solvers, spacings, unet
from ddpm_jax.runs import interop, networks, schedulers

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
CIFAR10 = dict(mults=(1, 2, 2, 2), attention=(1,))
LARGE = dict(mults=(1, 1, 2, 2, 4, 4), attention=(4,))


class Reference(NamedTuple):
    """A reference value, a number or an array."""

    quantity: str
    source: str
    reference: float | np.ndarray
    ours: Callable  # computes it
    tolerance: float  # of the relative error, or of the error itself where the reference is 0


def error(row, ours):
    """‖ours - reference‖₂ / ‖reference‖₂."""
    reference = np.float64(row.reference)
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(np.float64(ours) - reference) / (norm if norm > 0 else 1))


@functools.cache
def schedule(name="linear", num_timesteps=1000):
    """A schedule with the paper's β range."""
    return schedules.make_schedule(name, num_timesteps)


def gaussian_eps(variance, schedule):
    """The network that is optimal for x0 ~ N(0, variance): E[ε | x_t]."""

    def eps_fn(x_t, t):
        a = schedule.alpha_bars[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * x_t / (a * variance + 1 - a)

    return eps_fn


def gaussian_loss(variance):
    """L_simple of that network, averaged over t.

    Its error is linear in x0 and ε, which are independent: their mean squares add up.
    """
    s, t = schedule(), jnp.arange(1000)
    eps_fn = gaussian_eps(variance, s)
    zeros, ones = jnp.zeros((1000, 1, 1, 1)), jnp.ones((1000, 1, 1, 1))
    of_x0 = diffusion.simple_loss(s, eps_fn, np.sqrt(variance) * ones, t, zeros)
    of_eps = diffusion.simple_loss(s, eps_fn, zeros, t, ones)
    return np.float64(of_x0 + of_eps).mean()


def cost_of_fixed_large():
    """Σ L_{t-1} of a chain with a perfect mean, which a known image of zeros has."""
    s = schedule()
    keys = sampling.image_keys(0, jnp.arange(1))

    def net_fn(x_t, t):
        return x_t / s.sqrt_one_minus_alpha_bars[t].reshape(-1, 1, 1, 1)

    def noise(t):
        return sampling.noise(keys, t, (2, 2, 1))

    predict_fn = diffusion.predictor(s, net_fn)
    found = likelihood.vlb(s, predict_fn, jnp.zeros((1, 2, 2, 1)), noise)
    return np.float64(found.terms["fixed_large"][1:]).sum()


def gaussian_predict(data_variance, schedule, clip=False):
    """That network as a predict_fn."""
    predict_fn = diffusion.predictor(schedule, gaussian_eps(data_variance, schedule))
    return diffusion.clipped(predict_fn) if clip else predict_fn


def run_solver(solver, predict_fn, x, noise_fn=None, **options):
    """x_0 by a solver, in one scan; noise_fn as in sampling.make_step, options of jax.jit."""
    step, rows = sampling.make_step(solver, predict_fn, noise_fn), jnp.arange(len(solver.steps))

    def run(x):
        return sampling.reverse_process(step, sampling.init_state(solver, x), rows)[0][0]

    return jax.jit(run, **options)(x)


def gaussian_outcome(data_variance, solver, alpha_bars):
    """Variance of x_0 after sampling from N(0, 1) with that network, in float64.

    Each row is linear in the state, x0_pred and ε, and so is x0_pred in x: the state's covariance
    follows C ← A C Aᵀ + b bᵀ.

    Args:
      data_variance: s².
      solver: a Solver.
      alpha_bars: ᾱ of its chain, [S].
    """
    a = np.asarray(alpha_bars)[solver.steps]
    gains = np.sqrt(a) * data_variance / (a * data_variance + 1 - a)  # x0_pred / x
    size = solver.weights.shape[1]
    covariance = np.diag([1.0] + (size - 1) * [0.0])
    for row, gain in zip(solver.weights, gains, strict=True):
        of_state = row[:, :size].copy()
        of_state[:, 0] += gain * row[:, size]
        covariance = of_state @ covariance @ of_state.T + np.outer(row[:, -1], row[:, -1])
    return covariance[0, 0]


def gaussian_variance(data_variance, name, num_steps=1000, **options):
    """gaussian_outcome of a solver on every (1000 / num_steps)-th step of Ho's schedule."""
    alpha_bars = schedules.make_alpha_bars("linear", 1000)
    alpha_bars = alpha_bars[spacings.timesteps("leading", alpha_bars, num_steps)]
    solver = solvers.SOLVERS[name](alpha_bars, **options)
    return gaussian_outcome(data_variance, solver, alpha_bars)


def make_unet(channels, mults, attention, **options):
    """The paper's U-Net, with other widths; attention: the levels that have it."""
    widths = tuple(mult * channels for mult in mults)
    paths = {"attention_down": attention, "attention_up": attention}
    return unet.UNet(channels, widths, 2, **paths, **options)


def parameters(channels, layout, size):
    """Number of parameters of a network for size × size RGB images."""
    shapes = unet.param_shapes(make_unet(channels, **layout), (size, size, 3))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def macs(layout, size):
    """Multiply-accumulates of one image's forward pass: convolutions and matrix products.

    In bfloat16, whose convolutions are direct ones on every backend.
    """
    model = make_unet(128, **layout, dtype=jnp.bfloat16)
    params = unet.param_shapes(model, (size, size, 3))
    x, t = jnp.zeros((1, size, size, 3)), jnp.zeros(1, int)
    jaxpr = jax.make_jaxpr(lambda params: unet.net_fn(model, params)(x, t))(params)
    return _macs(jaxpr.jaxpr)


def _macs(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_macs(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval  # each output sums over the kernel's [h, w, in]
            total += equation.outvars[0].aval.size * kernel.size // kernel.shape[-1]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            summed = np.prod([left.shape[axis] for axis in contracted], dtype=int)
            total += equation.outvars[0].aval.size * summed
    return int(total)


def embedding(index, t=1):
    """An entry of the time embedding."""
    return unet.timestep_embedding(jnp.array([t]), 128)[0, index]


def embedding_norm():
    """The squared norm of a time embedding: of all t, the one furthest from 64."""
    norms = np.asarray((unet.timestep_embedding(jnp.arange(1000), 128) ** 2).sum(1))
    return norms[np.abs(norms - 64).argmax()]


def initial_loss():
    """The ε-MSE of a network that has not been trained."""
    model = unet.UNet(32, (32, 64), 1, (1,), (1,))
    x0, eps = np.random.default_rng(0).standard_normal((2, 128, 16, 16, 3), np.float32)

    @jax.jit
    def loss(x0, eps):
        params = model.init(jax.random.key(0), x0, jnp.zeros(128, int))["params"]
        eps_fn, t = unet.net_fn(model, params), jnp.arange(128) * 7
        return diffusion.simple_loss(schedule(), eps_fn, x0, t, eps).mean()

    return loss(x0, eps)


@functools.cache
def fixture():
    """The weights that diffusers wrote, read by interop.py: (model, params, schedule, expected)."""
    with np.load(FIXTURES / "expected.npz") as file:
        expected = dict(file)
    config = fixture_config()
    params = interop.read_params(FIXTURES / "unet" / interop.TENSORS, config)
    model = configs.make_model(config)
    return model, params, configs.make_schedule(config), expected


def fixture_config():
    """The config that interop.py makes of the fixtures."""
    config = configs.default_config()
    network, scheduler = (
        json.loads((FIXTURES / name).read_text())
        for name in ("unet/config.json", "scheduler/scheduler_config.json")
    )
    config.update_from_flattened_dict(networks.network_fields(network, "config.json"))
    config.update_from_flattened_dict(schedulers.read_scheduler(scheduler, "scheduler_config.json"))
    return config


def network_output(dtype=np.float32):
    """ε of the fixture's batch."""
    model, params, _, expected = fixture()
    model, x_t = model.clone(dtype=jnp.dtype(dtype)), expected["x_t"].astype(dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    return np.asarray(jax.jit(unet.net_fn(model, params))(x_t, expected["t"]))


def network_output_float64():
    """network_output in float64."""
    with jax.enable_x64(True):
        return network_output(np.float64)


@functools.cache
def network_gradients():
    """{diffusers' name: gradient of the ε-MSE of the fixture's batch}."""
    model, params, _, expected = fixture()
    return gradients(model, params, expected["x_t"], expected["t"], expected["eps"])


def gradients(model, params, x_t, t, eps, *labels):
    """{diffusers' name: gradient of the ε-MSE} of a batch."""

    @jax.jit
    def grad(params):
        def loss(params):
            return jnp.mean(jnp.square(unet.net_fn(model, params)(x_t, t, *labels) - eps))

        return jax.grad(loss)(params)

    return interop.diffusers_tensors(grad(params), len(model.widths))


def assert_same_gradients(ours, theirs):
    """Per tensor; a key's bias, which softmax cancels, has an exact gradient of 0."""
    assert ours.keys() == theirs.keys()
    everything = np.linalg.norm(flat(theirs))
    for name, gradient in theirs.items():
        allowed = 1e-4 * np.linalg.norm(gradient) + 1e-6 * everything
        assert np.linalg.norm(ours[name] - gradient) <= allowed, name


def all_gradients():
    """All gradients in one vector, in the order of the fixture."""
    return flat({name: network_gradients()[name] for name in expected_gradients()})


def expected_gradients():
    """{diffusers' name: gradient} as PyTorch computed them."""
    prefix = "gradient/"
    found = fixture()[-1].items()
    return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def flat(tensors):
    """All values of a dict of arrays in one vector."""
    return np.concatenate([np.ravel(value) for value in tensors.values()])


def reverse_chain(variance, clip_x0):
    """x_0 of the fixture's chain, with its noises."""
    model, params, s, expected = fixture()
    noises = jnp.asarray(expected["noises"])

    predict_fn = diffusion.predictor(s, unet.net_fn(model, params))
    predict_fn = diffusion.clipped(predict_fn) if clip_x0 else predict_fn

    solver = solvers.ancestral(configs.make_alpha_bars(fixture_config()), variance)
    steps = jnp.asarray(solver.steps)
    return run_solver(solver, predict_fn, expected["x_T"], lambda n, _: noises[steps[n]])


def table():
    """All references, in the paper's order."""
    rows = []

    def add(quantity, source, reference, ours, tolerance=2e-7):
        rows.append(Reference(quantity, source, reference, ours, tolerance))

    ho = schedule()
    source = "Sec. 4, float64"
    add("ᾱ at the last step, linear", source, 4.035829765375676e-5, lambda: ho.alpha_bars[-1])
    add("ᾱ at t = 499", source, 0.07858724288177824, lambda: ho.alpha_bars[499])
    mean = 0.2755132333968061
    add("mean of ᾱ over t", source, mean, lambda: np.float64(ho.alpha_bars).mean())
    source = "Eq. 7, float64"
    for t, value in ((0, 0.0), (1, 5.4531876613021935e-5), (999, 0.01999998352656061)):
        add(f"β̃ at t = {t}", source, value, lambda t=t: ho.posterior_variance[t])
    coefficients = (0.5452914995102903, 0.4547084989905303)
    add("μ̃'s coefficient of x0, t = 1", source, coefficients[0],
        lambda: ho.posterior_mean_coef_x0[1])  # fmt: skip
    add("μ̃'s coefficient of x_t, t = 1", source, coefficients[1],
        lambda: ho.posterior_mean_coef_x_t[1])  # fmt: skip
    source, clipped = "Ho's code, float64", -9.81672513529567
    add("log β̃ at t = 0 (that of t = 1)", source, clipped, lambda: ho.fixed_small_log_variance[0])
    add("fixed-large log variance, t = 0", source, clipped, lambda: ho.fixed_large_log_variance[0])
    value = -9.02868637
    add("fixed-large log variance, t = 1", source, value, lambda: ho.fixed_large_log_variance[1])
    for mean_square, name, value in (
        (0, "0", 5.8747841e-10),
        (1 / 3, "1/3", 9.7047068e-6),
        (1, "1", 2.9112945e-5),
    ):
        add(f"prior KL, E[x²] = {name}, bits/dim", "Eq. 5 (L_T), float64", value,
            lambda m=mean_square: likelihood.prior_kl(ho.alpha_bars[-1], m), 1e-6)  # fmt: skip

    source = "Nichol & Dhariwal 2021, Eq. 17"
    cosine = schedule("cosine")
    add("cosine: β at t = 0", source, 4.128422482196914e-5, lambda: cosine.betas[0])
    add("cosine: ᾱ at t = 499", source, 0.4938435904406382, lambda: cosine.alpha_bars[499])
    add("cosine: ᾱ at the last step", source, 2.4287669070348567e-9, lambda: cosine.alpha_bars[-1])
    add("cosine: β's clipped to 0.999", source, 1,
        lambda: np.sum(np.asarray(cosine.betas) == np.float32(0.999)))  # fmt: skip
    for name, num_timesteps, label, value in (
        ("quadratic", 1000, "quadratic: ᾱ at the last step", 7.334124595808159e-4),
        ("linear_rescaled", 4000, "rescaled, T = 4000: ᾱ at the last step", 4.246652275802249e-5),
        ("linear", 200, "linear, T = 200: ᾱ at the last step", 0.13218275425061793),
    ):
        add(label, "definition, float64", value,
            lambda name=name, T=num_timesteps: schedule(name, T).alpha_bars[-1])  # fmt: skip
    add("linear, T = 200: prior KL, E[x²] = 1/3", "Eq. 5 (L_T), float64", 0.0387,
        lambda: likelihood.prior_kl(0.13218275425061793, 1 / 3), 1e-3)  # fmt: skip

    add("fixed-large β with a perfect mean, t ≥ 1, bits/dim", "Eq. 5, float64", 0.48641923004409315,
        cost_of_fixed_large, 2e-6)  # fmt: skip

    source = "Gaussian data, exact"
    for data_variance, label, value in ((1, "1", mean), (0.25, "¼", 0.17305340608368602)):
        add(f"mean ε-MSE over t, s² = {label}", source, value,
            lambda v=data_variance: gaussian_loss(v), 1e-6)  # fmt: skip
    for data_variance, label, variance, value in (
        (1.0, "1", "fixed_large", 0.9998999999999989),
        (1.0, "1", "fixed_small", 0.9910673763528225),
        (0.25, "¼", "fixed_large", 0.2507520750075313),
        (0.25, "¼", "fixed_small", 0.24612521136044793),
    ):
        add(f"variance of samples, s² = {label}, {variance}", source, value,
            lambda v=data_variance, name=variance: gaussian_variance(
                v, "ancestral", variance=name), 1e-11)  # fmt: skip
    for data_variance, label, num_steps, value in (
        (1.0, "1", 1000, 0.9962521062682085),
        (1.0, "1", 50, 0.92944884164934),
        (0.25, "¼", 1000, 0.24849754716933067),
        (0.25, "¼", 50, 0.22319871551899875),
    ):
        add(f"variance of samples, s² = {label}, DDIM, {num_steps} steps", source, value,
            lambda v=data_variance, n=num_steps: gaussian_variance(
                v, "ddim", n), 1e-11)  # fmt: skip

    learned = {**CIFAR10, "learned_variance": True}
    for label, source, channels, layout, size, value in (
        ("CIFAR-10", "App. B: 35.7 M", 128, CIFAR10, 32, 35_746_307),
        ("CIFAR-10, learned variance", "Ho's code", 128, learned, 32, 35_749_766),
        ("256×256", "App. B: 114 M", 128, LARGE, 256, 113_673_219),
        ("256×256, 192 wide", "App. B: 256 M", 192, LARGE, 256, 255_677_955),
    ):
        add(f"parameters, {label}", source, value,
            lambda c=channels, y=layout, s=size: parameters(c, y, s), 0)  # fmt: skip
    for label, layout, size, value in (
        ("CIFAR-10", CIFAR10, 32, 6.222e9),
        ("256×256", LARGE, 256, 248.5e9),
    ):
        add(f"multiply-adds an image, {label}", "App. B, counted", value,
            lambda y=layout, s=size: macs(y, s), 2e-4)  # fmt: skip
    source = "Ho's code"
    add("time embedding, t = 1: first sine", source, 0.8414709848, lambda: embedding(0))
    add("time embedding, t = 1: last sine", source, 9.99999998e-5, lambda: embedding(63), 1e-5)
    add("time embedding, t = 1: first cosine", source, 0.5403023059, lambda: embedding(64))
    add("time embedding, every t: squared norm", source, 64, embedding_norm, 1e-5)
    add("ε-MSE before training", "last layer near 0", 1.0, initial_loss, 0.01)

    source, expected = "diffusers 0.42.1", fixture()[-1]
    add("a U-Net's output, float32", source, expected["output"], network_output, 1e-5)
    output = expected["output_float64"]
    add("a U-Net's output, float64", source, output, network_output_float64, 1e-12)
    gradient = flat(expected_gradients())
    add("its gradients of the ε-MSE", "PyTorch 2.13.0", gradient, all_gradients, 1e-4)
    for variance in ("fixed_small", "fixed_large"):
        for clip in (True, False):
            label = f"its samples, {variance}, {'' if clip else 'not '}clipped"
            add(label, "diffusers 0.42.1", expected[f"chain/{variance}/{clip}"],
                lambda v=variance, c=clip: reverse_chain(v, c), 9e-6)  # fmt: skip
    return rows


def shown(value):
    """A number; of an array, its norm."""
    norm = "‖·‖ = " if np.ndim(value) else ""
    value = float(np.linalg.norm(np.float64(value)) if norm else value)  # the same everywhere
    return norm + (f"{value:,.0f}" if value >= 1e4 else f"{value:.8g}")


def lines(rows):
    """The table as Markdown."""
    yield "| quantity | source | reference | ours | error |"
    yield "|---|---|---|---|---|"
    for row in rows:
        ours = row.ours()
        values = f"{shown(row.reference)} | {shown(ours)} | {error(row, ours):.0e}"
        yield f"| {row.quantity} | {row.source} | {values} |"


if __name__ == "__main__":
    for line in lines(table()):
        print(line, flush=True)
