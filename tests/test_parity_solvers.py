"""The solvers, spacings and thresholding live against diffusers, and by hand where those differ.

pip install -r requirements-parity.txt && python -m pytest -m parity
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import legendre
from test_parity import SMALL, batch, converted
from test_solvers_fixtures import CASES, as_in_diffusers, bent, make_solver

from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings, unet
from ddpm_jax.runs import schedulers

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ALPHA_BARS = schedules.make_alpha_bars("linear", 1000)
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (5, 10, 20)


@pytest.fixture(scope="module")
def network(reference, tmp_path_factory):
    """A UNet2DModel, and the same as a net_fn, compiled once."""
    network = reference.make_network((8, 16), {1}, **SMALL)
    model, params = converted(network, tmp_path_factory.mktemp("network"))
    return network, jax.jit(unet.net_fn(model, params))


def run(solver, predict_fn, x, noises=None):
    """x_0; row by row, as a scan would compile the network again for every table."""
    step = sampling.make_step(solver, predict_fn, lambda n, _: jnp.asarray(noises[n]))
    state = sampling.init_state(solver, jnp.asarray(x))
    for n in range(len(solver.steps)):
        state, _ = step(state, jnp.int32(n))
    return np.asarray(state[0])


def make_predict(net_fn, alpha_bars, prediction, clip):
    schedule = schedules.from_alpha_bars(alpha_bars)
    predict_fn = diffusion.predictor(
        schedule, net_fn, prediction=schedulers.PREDICTIONS[prediction]
    )
    return diffusion.clipped(predict_fn) if clip else predict_fn


def assert_close(ours, theirs, tolerance=1e-4):
    # A network that was not trained drives images to hundreds, unless they are clipped.
    assert np.abs(ours - theirs).max() <= tolerance * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", schedulers.PREDICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_chain(case, prediction, clip, reference, network):
    """Every solver with the same noises, through a network: timesteps and x_0."""
    torch_network, net_fn = network
    sampler, options = case.split("/")[0], dict(prediction_type=prediction)
    if sampler == "plms":
        # PNDMScheduler neither knows x0 nor clips it, and it extrapolates v, where the paper and
        # this implementation extrapolate ε: it gets a network that predicts the ε of x0.
        torch_network = reference.to_eps(torch_network, ALPHA_BARS, prediction, clip)
        options = {}
    elif clip:  # thresholding at 1 is clipping
        clipping = dict(thresholding=True, sample_max_value=1.0)
        options |= dict(clip_sample=True) if sampler == "heun" else clipping
    x_T, *_ = batch(network[0], size=1)
    noises = np.random.default_rng(1).standard_normal((max(STEPS), *x_T.shape), np.float32)
    predict_fn = make_predict(net_fn, ALPHA_BARS, prediction, clip)
    for spacing, steps in itertools.product(SPACINGS, STEPS):
        if sampler == "plms" and spacing == "linspace":
            continue  # PNDMScheduler goes from t to t - T // S, whatever the next t is; see by_hand
        taus = spacings.timesteps(spacing, ALPHA_BARS, steps, sampler in solvers.SKIP_ZERO)
        solver = as_in_diffusers(case, ALPHA_BARS[taus])
        scheduler = reference.make_scheduler(case, ALPHA_BARS, timestep_spacing=spacing, **options)
        if sampler == "heun" and spacing == "linspace":  # HeunDiscreteScheduler does not round t
            scheduler.set_timesteps(timesteps=taus[::-1].tolist())
        else:
            scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(scheduler.timesteps, taus[solver.steps])
        noise = noises if sampler == "dpmpp_sde" else None
        theirs = reference.solver_chain(torch_network, x_T, scheduler, noise)
        assert_close(run(solver, sampling.respaced(predict_fn, taus), x_T, noises), theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", ["dpmpp/2", "unipc/2", "heun", "plms"])
@pytest.mark.parametrize("total", [1000, 300, 50])
def test_timesteps(total, case, spacing, reference):
    """Every number of steps below T."""
    alpha_bars, sampler = schedules.make_alpha_bars("linear_rescaled", total), case.split("/")[0]
    scheduler = reference.make_scheduler(case, alpha_bars, timestep_spacing=spacing)
    # One step of linspace is T - 1 here, and 0 in diffusers, where there is nothing to denoise.
    for steps in range(1 + (spacing == "linspace"), total):
        if spacing == "leading" and sampler not in solvers.SKIP_ZERO and total % steps:
            continue  # theirs is i (T // S), which may end at T / 2; ours is i T // S
        ours = spacings.timesteps(spacing, alpha_bars, steps, sampler in solvers.SKIP_ZERO)[::-1]
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()
        if sampler == "heun":
            theirs = np.append(theirs[:1], theirs[1::2])  # without the second calls
        elif sampler == "plms" and steps > 1:
            theirs = np.delete(theirs, 1)
        # For some numbers of trailing steps, diffusers takes one more, at t = -1.
        theirs, unrounded = theirs[:steps], sampler == "heun" and spacing == "linspace"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.5001 if unrounded else 0)


def integrate(node_s, node_t, x, coefficients):
    """The exact solution of the ODE from node s to t with a polynomial x0(λ) (Lu et al., Eq. 9).

      x_t = σ_t / σ_s · x_s + σ_t ∫ e^λ x0(λ) dλ,  x0(λ) = Σ_j c_j u^j,  u = (λ - λ_s) / h

    A node is (α, σ, λ). The integral is Gauss-Legendre's.
    """
    (_, sigma_s, lam_s), (_, sigma_t, lam_t) = node_s, node_t
    points, weights = legendre.leggauss(60)
    lam = lam_s + (lam_t - lam_s) * (points + 1) / 2
    x_t = sigma_t / sigma_s * x
    for j, c in enumerate(coefficients):
        integrand = np.exp(lam) * ((lam - lam_s) / (lam_t - lam_s)) ** j
        x_t = x_t + sigma_t * (weights @ integrand) * (lam_t - lam_s) / 2 * c
    return x_t


def interpolate(node_s, node_t, nodes, x0s):
    """The coefficients, in u, of the polynomial through x0s at nodes."""
    u = [(lam - node_s[2]) / (node_t[2] - node_s[2]) for *_, lam in nodes]
    columns = np.reshape(x0s, (len(x0s), -1))
    c = np.linalg.solve(np.vander(u, increasing=True), columns)
    return c.reshape(np.shape(x0s))


def halfway(node_s, node_t, nodes, x0s):
    """x0_s + D_1 / 2, of the latest two predictions, or of the latest and of the one at t."""
    ratio = (nodes[1][2] - node_s[2]) / (node_t[2] - node_s[2])
    return x0s[0] + (x0s[1] - x0s[0]) / ratio / 2


def dpmpp_step(node_s, node_t, x, nodes, x0s):
    """Multistep DPM-Solver++ (Lu et al. 2022b); the latest prediction is the first one."""
    if len(x0s) == 2:
        return integrate(node_s, node_t, x, [halfway(node_s, node_t, nodes, x0s)])
    return integrate(node_s, node_t, x, interpolate(node_s, node_t, nodes, x0s))


def unipc_step(node_s, node_t, x, nodes, x0s):
    """UniP (Zhao et al. 2023); with the prediction at t as the last one, UniC.

    Its order conditions are the integral of the interpolation, but for two predictions.
    """
    if len(x0s) == 2:
        return integrate(node_s, node_t, x, [halfway(node_s, node_t, nodes, x0s)])
    return integrate(node_s, node_t, x, interpolate(node_s, node_t, nodes, x0s))


def sde_step(node_s, node_t, x, nodes, x0s, noise):
    """SDE-DPM-Solver++: q(x_t | x_s, x0), Eq. (7) of Ho et al., at x0 + D_1 / 2."""
    x0 = x0s[0] if len(x0s) == 1 else halfway(node_s, node_t, nodes, x0s)
    a_s, a_t = node_s[0] ** 2, node_t[0] ** 2
    beta = 1 - a_s / a_t
    mean = (np.sqrt(a_t) * beta * x0 + np.sqrt(1 - beta) * (1 - a_t) * x) / (1 - a_s)
    return mean + np.sqrt(beta * (1 - a_t) / (1 - a_s)) * noise


def multistep_by_hand(sampler, order, nodes, x, x0_fn, noises):
    """DPM-Solver++, its SDE and UniPC; nodes are (α, σ, λ) of each call, in their order."""
    first, start, used = None, None, 0
    x0s, past = [], []  # predictions and their nodes, the latest first
    for n, node in enumerate(nodes):
        x0, left = x0_fn(x, n), len(nodes) - n
        if left == 1:
            return x0
        if sampler == "unipc" and used:
            x = unipc_step(past[0], node, start, [*past[:used], node], [*x0s[:used], x0])
        elif sampler == "unipc" and n:  # UniC-1 from pure noise, where e^-h = 0
            x = node[0] * (first + x0) / 2 + node[1] * start
        start, following = x, nodes[n + 1]
        if node[0] == 0:  # only order 1 is defined where λ = -∞
            x = following[0] * x0 + following[1] * (noises[n] if sampler == "dpmpp_sde" else x)
            first = x0
            continue
        x0s, past = [x0, *x0s], [node, *past]
        used = min(order, len(x0s), left if sampler == "unipc" or len(nodes) < 15 else order)
        arguments = node, following, x, past[:used], x0s[:used]
        if sampler == "dpmpp_sde":
            x = sde_step(*arguments, noises[n])
        else:
            x = {"dpmpp": dpmpp_step, "unipc": unipc_step}[sampler](*arguments)


def heun_by_hand(nodes, x, x0_fn):
    """Karras et al. 2022, Algorithm 1, in x / α and σ / α; n counts the calls' nodes."""
    for n, (alpha, sigma, _) in enumerate(nodes):
        x0 = x0_fn(x, n)
        if n == len(nodes) - 1:
            return x0
        alpha_t, sigma_t, _ = nodes[n + 1]
        if alpha == 0:
            x = alpha_t * x0 + sigma_t * x
            continue
        dt = sigma_t / alpha_t - sigma / alpha
        slope = (x / alpha - x0) / (sigma / alpha)
        end = x / alpha + dt * slope
        slope_end = (end - x0_fn(alpha_t * end, n + 1)) / (sigma_t / alpha_t)
        x = alpha_t * (x / alpha + dt * (slope + slope_end) / 2)


def plms_by_hand(nodes, x, x0_fn):
    """Liu et al. 2022, Eqs. (11)-(12), on ε."""

    def transfer(x, eps, a, a_next):
        scale = np.sqrt(a) * (np.sqrt((1 - a_next) * a) + np.sqrt((1 - a) * a_next))
        return np.sqrt(a_next / a) * x - (a_next - a) / scale * eps

    past = []
    for n, (alpha, sigma, _) in enumerate(nodes):
        x0 = x0_fn(x, n)
        a, a_next = alpha**2, nodes[n + 1][0] ** 2 if n + 1 < len(nodes) else 1.0
        e = [(x - alpha * x0) / sigma, *past]
        if alpha == 0:
            x, past = np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * e[0], e
            continue
        if n == 0:
            end = transfer(x, e[0], a, a_next)
            eps_end = (end - np.sqrt(a_next) * x0_fn(end, n + 1)) / np.sqrt(1 - a_next)
            eps = (e[0] + eps_end) / 2
        elif n == 1:
            eps = (3 * e[0] - e[1]) / 2
        elif n == 2:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x, past = transfer(x, eps, a, a_next), e[:3]
    return x


@pytest.mark.parametrize("steps", [10, 16])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_by_hand(case, zero_snr, steps):
    """Loops over the papers' formulas in float64, with v and linspace.

    diffusers differs in plms, as above. With zero terminal SNR its multistep solvers set ᾱ_T to
    2^-24 and keep the order; here ᾱ_T is 0 and the first step of order 1.
    """
    alpha_bars = schedules.make_alpha_bars("linear", 1000, zero_terminal_snr=zero_snr)
    taus = spacings.timesteps("linspace", alpha_bars, steps)
    rng = np.random.default_rng(0)
    x_T, noises = rng.standard_normal((2, 4, 4, 1)), rng.standard_normal((steps, 2, 4, 4, 1))
    alpha, sigma = np.sqrt(alpha_bars[taus]), np.sqrt(1 - alpha_bars[taus])
    with np.errstate(divide="ignore"):
        nodes = [*zip(alpha, sigma, np.log(alpha / sigma), strict=True)][::-1]

    def x0_fn(x, n):
        return nodes[n][0] * x - nodes[n][1] * bent(x, taus[::-1][n])

    sampler, *order = case.split("/")
    by_hand = {"heun": heun_by_hand, "plms": plms_by_hand}.get(sampler)
    if by_hand:
        expected = by_hand(nodes, x_T, x0_fn)
    else:
        expected = multistep_by_hand(sampler, int(*order or [2]), nodes, x_T, x0_fn, noises)

    def net_fn(x, t):
        return bent(x, t.reshape(-1, 1, 1, 1))

    predict_fn = make_predict(net_fn, alpha_bars, "v_prediction", clip=False)
    predict_fn, solver = sampling.respaced(predict_fn, taus), make_solver(case, alpha_bars[taus])
    ours = run(solver, predict_fn, np.float32(x_T), np.float32(noises))
    assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_dynamic_thresholding(prediction, ratio, reference, network):
    """Along a chain; with ε, x0 is in the hundreds."""
    torch_network, net_fn = network
    x_T, *_ = batch(torch_network)
    # Saharia et al. do not bound the quantile.
    options = dict(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=np.inf)
    options |= dict(timestep_spacing="trailing", prediction_type=prediction)
    scheduler = reference.make_scheduler("dpmpp/2", ALPHA_BARS, **options)
    scheduler.set_timesteps(10)
    theirs = reference.solver_chain(torch_network, x_T, scheduler)

    taus = spacings.timesteps("trailing", ALPHA_BARS, 10)
    predict_fn = make_predict(net_fn, ALPHA_BARS, prediction, clip=False)
    predict_fn = sampling.respaced(diffusion.dynamically_thresholded(predict_fn, ratio), taus)
    assert_close(run(make_solver("dpmpp/2", ALPHA_BARS[taus]), predict_fn, x_T), theirs)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_zero_terminal_snr(schedule):
    """rescale_zero_terminal_snr, in float64."""
    import torch
    from diffusers.schedulers import scheduling_ddim

    alpha_bars = schedules.make_alpha_bars(schedule, 1000)
    betas = torch.from_numpy(1 - alpha_bars / np.append(1, alpha_bars[:-1]))
    theirs = np.cumprod(1 - scheduling_ddim.rescale_zero_terminal_snr(betas).numpy())
    ours = schedules.rescale_to_zero_terminal_snr(alpha_bars)
    assert ours[-1] == theirs[-1] == 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_from_pure_noise(eta, clip, reference, network):
    """DDIMScheduler with zero terminal SNR, whose ᾱ_T is 0 too; η = 1 gives NaN there.

    √(1 - ᾱ_{t-1} - σ_t²) is then the root of a rounding error of float32.
    """
    torch_network, net_fn = network
    x_T, *_ = batch(torch_network, size=1)
    noises = np.random.default_rng(1).standard_normal((1000, *x_T.shape), np.float32)
    kwargs = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=clip)
    kwargs |= dict(prediction_type="v_prediction", num_inference_steps=10)
    theirs, visited = reference.ddim_chain(torch_network, x_T, noises, eta, **kwargs)

    alpha_bars = schedules.make_alpha_bars("linear", 1000, zero_terminal_snr=True)
    taus = spacings.timesteps("trailing", alpha_bars, 10)
    np.testing.assert_array_equal(taus[::-1], visited)
    predict_fn = sampling.respaced(make_predict(net_fn, alpha_bars, "v_prediction", clip), taus)
    assert_close(run(solvers.ddim(alpha_bars[taus], eta), predict_fn, x_T, noises[visited]), theirs)
