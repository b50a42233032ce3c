"""Solvers of the reverse process: Ho et al.'s, DDIM, DPM-Solver++, UniPC, Heun, PNDM, RePaint.

Between two calls of the network, all of them compute linear combinations: of the current x, of
earlier x and predictions, of the new prediction of x0, and of noise. Only the weights differ, and
they depend on nothing but ᾱ. So a solver is a table of weights, computed once, in float64;
`sampling.make_step` applies one row of it.

The functions below state each method in its paper's symbols. There, x, x0, eps and the earlier
values are unit vectors: the sum `a * x + b * x0` is a row of weights.

Nodes: the data are node 0, and step i of the chain (t = i in [0, S)) is node i + 1, with
x = α · x0 + σ · ε, α = √ᾱ and σ = √(1 - ᾱ). A step goes from node s to node t = s - 1. The last
step goes to the data, where σ = 0. λ = log(α / σ) is half the log-SNR. With zero terminal SNR,
α = 0 at the first node; methods that would divide by it take a first-order step there.
"""

from typing import NamedTuple

import numpy as np

from ddpm_jax.core import diffusion, schedules


class Solver(NamedTuple):
    """A method on a chain of S steps, as a table of N rows; see num_calls for NFE.

    The state is a tuple of K arrays. The first one is the x at which the network is called; at the
    start the others are 0.
    """

    steps: np.ndarray  # [N] ints in [0, S): the step at which the network is called; -1: no call
    weights: np.ndarray  # [N, K, K + 2] float64: (state, x0_pred, noise) to the next state
    log_variance: np.ndarray | None = None  # [N, 2], see diffusion.log_variance_line


def ancestral(alpha_bars, variance="fixed_small"):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), x_{t-1} ~ p(x_{t-1} | x_t).

      x_{t-1} = √ᾱ_{t-1} β_t / (1 - ᾱ_t) · x0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · x_t + σ_t · ε

    This is Eq. (11), written through x0 by Eq. (7). σ_t² is β̃_t or β_t (Sec. 3.2), or learned (see
    diffusion.log_variance_line); the last step adds no noise.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.
      variance: one of diffusion.VARIANCES.

    Returns:
      A Solver, NFE = S.
    """
    x, x0, eps = np.eye(3)
    c = schedules.coefficients(alpha_bars)
    variances = {"fixed_small": c["posterior_variance"], "fixed_large": c["betas"]}
    std = np.sqrt(variances.get(variance, np.ones_like(alpha_bars)))
    std[0] = 0
    rows = np.outer(c["posterior_mean_coef_x0"], x0) + np.outer(c["posterior_mean_coef_x_t"], x)
    rows += np.outer(std, eps)
    lines = None
    if variance in diffusion.LEARNED_VARIANCES:
        small, large = c["fixed_small_log_variance"], np.log(c["betas"])
        lines = np.stack(diffusion.log_variance_line(small, large, variance), axis=1)[::-1]
    return Solver(np.arange(len(alpha_bars))[::-1], rows[::-1, None], lines)


def ddim(alpha_bars, eta=0.0):
    """DDIM (Song et al. 2020, Eq. 12), with η = 0 also DPM-Solver++ of order 1.

      σ_t = η · √β̃_t
      x_{t-1} = √ᾱ_{t-1} · x0 + √(1 - ᾱ_{t-1} - σ_t²) · ε_pred + σ_t · ε

    ε_pred is computed from x0, after clipping if it is clipped. With η = 1 this is `ancestral` with
    fixed_small variance; with η = 0 it is deterministic.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.
      eta: η, in [0, 1].

    Returns:
      A Solver, NFE = S.
    """
    alpha, sigma, _ = _nodes(alpha_bars)
    x, x0, eps = np.eye(3)
    rows, steps = [], range(len(alpha_bars))[::-1]
    for i in steps:
        s, t = i + 1, i
        eps_pred = (x - alpha[s] * x0) / sigma[s]
        std = eta * sigma[t] / sigma[s] * np.sqrt(1 - (alpha[s] / alpha[t]) ** 2)
        rows.append([alpha[t] * x0 + np.sqrt(sigma[t] ** 2 - std**2) * eps_pred + std * eps])
    return Solver(np.array(steps), np.array(rows))


def ddim_inversion(alpha_bars):
    """DDIM inversion (η = 0): from the data to x_T, with the ε predicted at x_{t-1}.

    This and `ddim` are Euler steps of the same ODE in opposite directions. With more steps,
    sampling from the result comes closer to the original image. Clipping x0 helps: where ᾱ is near
    0, a small error of ε is a large error of x0, and clipping keeps the ODE smooth there.

    Args:
      alpha_bars: ᾱ, [S] float64, descending; only the last may be 0.

    Returns:
      A Solver, NFE = S; its steps ascend.
    """
    x, x0, _ = np.eye(3)
    rows, steps = [], range(len(alpha_bars))
    alpha, sigma, _ = _nodes(alpha_bars)
    calls = [max(i - 1, 0) for i in steps]  # the network does not know the data's node
    for i, call in zip(steps, calls, strict=True):
        eps_pred = (x - alpha[call + 1] * x0) / sigma[call + 1]
        x0_pred = (x - sigma[i] * eps_pred) / alpha[i]
        rows.append([alpha[i + 1] * x0_pred + sigma[i + 1] * eps_pred])
    return Solver(np.array(calls), np.array(rows))


def dpmpp(alpha_bars, order=2):
    """DPM-Solver++, multistep, on x0 (Lu et al. 2022b, Algorithm 2 for order 2).

      h = λ_t - λ_s,  r_0 = (λ_s - λ_s') / h,  r_1 = (λ_s' - λ_s'') / h
      order 1: x_t = σ_t / σ_s · x_s - α_t (e^-h - 1) · x0_s
      order 2: … - α_t (e^-h - 1) / 2 · D_1,  D_1 = (x0_s - x0_s') / r_0
      order 3: … + α_t ((e^-h - 1) / h + 1) · D_1 - 2 α_t ((e^-h - 1 + h) / h² - 1/2) · D_2,
        D_1 and D_2 the coefficients of the parabola through x0_s, x0_s' and x0_s''

    The first steps have lower orders, since predictions are missing. So have the last ones of fewer
    than 15 steps, and the very last one, since λ is infinite at the data.

    diffusers' order 3 lacks the factor 2 of D_2, and so is of second order.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.
      order: 1, 2 or 3.

    Returns:
      A Solver, NFE = S.
    """
    alpha, sigma, lam = _nodes(alpha_bars)
    x, m1, m2, m0, _ = np.eye(5)  # m0, m1, m2: x0 predicted at the nodes s, s', s''
    rows, steps = [], range(len(alpha_bars))[::-1]
    for i in steps:
        s, t = i + 1, i
        h = lam[t] - lam[s]
        left = i + 1 if len(alpha_bars) < FEW_STEPS or i == 0 else order
        step_order = min(order, left, _known(alpha_bars, i))
        x_t = sigma[t] / sigma[s] * x - alpha[t] * np.expm1(-h) * m0
        if step_order > 1:
            r0 = (lam[s] - lam[s + 1]) / h
            d1 = (m0 - m1) / r0
        if step_order == 2:
            x_t -= alpha[t] * np.expm1(-h) / 2 * d1
        elif step_order == 3:
            r1 = (lam[s + 1] - lam[s + 2]) / h
            change = d1 - (m1 - m2) / r1
            d1, d2 = d1 + r0 / (r0 + r1) * change, change / (r0 + r1)
            x_t += alpha[t] * (np.expm1(-h) / h + 1) * d1
            x_t -= 2 * alpha[t] * ((np.expm1(-h) + h) / h**2 - 0.5) * d2
        rows.append([x_t, m0, m1])
    return Solver(np.array(steps), np.array(rows))


def dpmpp_sde(alpha_bars):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, Sec. 5): `dpmpp` of order 2 with noise.

      x_t = σ_t / σ_s e^-h · x_s + α_t (1 - e^-2h) (x0_s + D_1 / 2) + σ_t √(1 - e^-2h) · ε

    Without D_1, in the first and last step, it is `ddim` with η = 1.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.

    Returns:
      A Solver, NFE = S.
    """
    alpha, sigma, lam = _nodes(alpha_bars)
    x, m1, m0, eps = np.eye(4)
    rows, steps = [], range(len(alpha_bars))[::-1]
    for i in steps:
        s, t = i + 1, i
        h = lam[t] - lam[s]
        gain = -np.expm1(-2 * h)  # 1 - e^-2h
        x_t = sigma[t] / sigma[s] * np.exp(-h) * x + alpha[t] * gain * m0
        if i > 0 and _known(alpha_bars, i) > 1:
            r0 = (lam[s] - lam[s + 1]) / h
            x_t += alpha[t] * gain / 2 * (m0 - m1) / r0
        rows.append([x_t + sigma[t] * np.sqrt(gain) * eps, m0])
    return Solver(np.array(steps), np.array(rows))


def unipc(alpha_bars, order=2):
    """UniPC on x0 with B(h) = e^h - 1, "bh2" (Zhao et al. 2023, Sec. 3).

    The prediction at x_t first corrects the step that led to x_t (UniC), and then predicts the next
    one (UniP), so the network is called once a step. The order of a step is at most the number of
    predictions known, and of steps left.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.
      order: 2 or 3.

    Returns:
      A Solver, NFE = S.
    """
    # x is where the network was called; the corrected x is what the next step starts from.
    x, corrected, m1, m2, m3, m0, _ = np.eye(7)
    nodes = _nodes(alpha_bars)
    rows, steps, last_order = [], range(len(alpha_bars))[::-1], 0
    for i in steps:
        if last_order:
            earlier = (m1, m2, m3)[:last_order]
            corrected_x = _unipc_step(nodes, i + 1, corrected, earlier, new=m0)
        else:
            corrected_x = x  # the start
        last_order = min(order, i + 1, _known(alpha_bars, i))
        x_t = _unipc_step(nodes, i, corrected_x, (m0, m1, m2)[:last_order])
        rows.append([x_t, corrected_x, m0, m1, m2])
    return Solver(np.array(steps), np.array(rows))


def _unipc_step(nodes, t, x, models, new=None):
    """UniP from node t + 1 to node t, or, with the prediction `new` at t, UniC.

      x_t = σ_t / σ_s · x_s - α_t (e^-h - 1) · (x0_s + Σ_k ρ_k D_k),  D_k = (x0_k - x0_s) / r_k

    Args:
      nodes: α, σ and λ of the nodes.
      t: the node to go to.
      x: the weights of x_s.
      models: the weights of the predictions at s = t + 1, t + 2, …
      new: the weights of the prediction at t, or None.
    """
    alpha, sigma, lam = nodes
    s, m0 = t + 1, models[0]
    h = lam[t] - lam[s]
    ratios = [(lam[s + k] - lam[s]) / h for k in range(1, len(models))]
    others = [*models[1:]]
    if new is not None:
        ratios, others = [*ratios, 1.0], [*others, new]
    differences = [(m - m0) / r for m, r in zip(others, ratios, strict=True)]
    x0 = m0 + sum(rho * d for rho, d in zip(_rhos(ratios, h), differences, strict=True))
    return sigma[t] / sigma[s] * x - alpha[t] * np.expm1(-h) * x0


def _rhos(ratios, h):
    """The ρ_k that solve the order conditions, R ρ = b (Zhao et al. 2023, Theorem 3.1)."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)  # for every B(h), as in the paper
    phi, factorial, b = np.expm1(-h) / -h - 1, 1, []
    for k in range(1, len(ratios) + 1):
        b.append(phi * factorial / np.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(ratios, increasing=True).T, b)


def heun(alpha_bars):
    """Heun's method on the probability-flow ODE (Karras et al. 2022, Algorithm 1).

      d(x / α) / d(σ / α) = ε_pred

    An Euler step (DDIM), a second call of the network where it ends, and the step again with the
    mean of both ε. The last step, to the data, is an Euler step.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.

    Returns:
      A Solver, NFE = 2 S - 1; if ᾱ_T = 0, where the first step is an Euler step, one less (but 1
      if S = 1).
    """
    alpha, sigma, _ = _nodes(alpha_bars)
    x, start, m1, m0, _ = np.eye(5)
    zero, rows, calls = np.zeros(5), [], []
    for i in range(len(alpha_bars))[::-1]:
        s, t = i + 1, i
        eps_pred = (x - alpha[s] * m0) / sigma[s]
        calls.append(i)
        rows.append([alpha[t] * m0 + sigma[t] * eps_pred, x, m0])
        if t > 0 and alpha[s] > 0:
            eps_pred = (start - alpha[s] * m1) / sigma[s] + (x - alpha[t] * m0) / sigma[t]
            calls.append(i - 1)
            rows.append([_transfer(alpha, sigma, s, start, eps_pred / 2), zero, zero])
    return Solver(np.array(calls), np.array(rows))


def plms(alpha_bars):
    """PNDM without Runge-Kutta steps (Liu et al. 2022, Sec. 3): linear multistep on ε.

      ε' = (55 ε_t - 59 ε_{t+1} + 37 ε_{t+2} - 9 ε_{t+3}) / 24

    and with fewer ε known, the Adams-Bashforth formulas of lower order. The first step is taken
    twice, as Heun's: the second time with the mean of ε at both of its ends.

    Args:
      alpha_bars: ᾱ, [S] float64, descending.

    Returns:
      A Solver, NFE = S + 1; one less if ᾱ_T = 0, and 1 if S = 1.
    """
    alpha, sigma, _ = _nodes(alpha_bars)
    x, start, e1, e2, e3, m0, _ = np.eye(7)
    zero, rows, calls, last = np.zeros(7), [], [], len(alpha_bars) - 1
    for i in range(len(alpha_bars))[::-1]:
        s, t = i + 1, i
        eps_pred = (x - alpha[s] * m0) / sigma[s]
        calls.append(i)
        if i == last:
            rows.append([alpha[t] * m0 + sigma[t] * eps_pred, x, eps_pred, zero, zero])
            if t > 0 and alpha[s] > 0:
                mean = (e1 + (x - alpha[t] * m0) / sigma[t]) / 2
                calls.append(i - 1)
                rows.append([_transfer(alpha, sigma, s, start, mean), zero, e1, zero, zero])
            continue
        weights = ADAMS_BASHFORTH[min(last - i, 3)]
        combined = sum(w * e for w, e in zip(weights, (eps_pred, e1, e2, e3), strict=False))
        rows.append([_transfer(alpha, sigma, s, x, combined), zero, eps_pred, e1, e2])
    return Solver(np.array(calls), np.array(rows))


def repaint(solver, alpha_bars, jump_length=1, resamplings=1):
    """RePaint's order of steps down and up (Lugmayr et al. 2022, Alg. 1 and Fig. 9).

    t goes down from S - 1 to 0. Every `jump_length` steps it goes up by as many steps and down
    again, `resamplings` - 1 times, so that the unknown pixels can fit the known ones better. Up is
    the forward process, x_t ~ q(x_t | x_{t-1}), Eq. (2), without a call of the network.

    Args:
      solver: one of SINGLE_STEP, on the same chain: the steps down.
      alpha_bars: ᾱ, [S] float64, descending.
      jump_length: j in RePaint.
      resamplings: r in RePaint; 1 goes down once.

    Returns:
      A Solver, and ᾱ of x after each of its rows, [N]: NaN after a step up.
    """
    num_steps, alpha_bars_prev = len(alpha_bars), np.append(1.0, alpha_bars[:-1])
    beta = 1 - alpha_bars / alpha_bars_prev
    x, _, eps = np.eye(3)
    calls, rows, levels, t = [], [], [], num_steps - 1
    jumps_left = {t: resamplings - 1 for t in range(1, num_steps - jump_length + 1, jump_length)}
    while t >= 0:
        calls.append(t)
        rows.append(solver.weights[num_steps - 1 - t])
        levels.append(alpha_bars_prev[t])
        if jumps_left.get(t, 0) > 0:
            jumps_left[t] -= 1
            for i in range(t, t + jump_length):
                calls.append(-1)
                rows.append([np.sqrt(1 - beta[i]) * x + np.sqrt(beta[i]) * eps])
                levels.append(np.nan)
            t += jump_length
        t -= 1
    calls, lines = np.array(calls), solver.log_variance
    if lines is not None:  # row -1 - t is that of step t; a step up scales its noise by 1
        lines = np.where(calls[:, None] < 0, 0.0, lines[-1 - calls])
    return Solver(calls, np.array(rows), lines), np.array(levels)


def rows_of_steps(solver):
    """Where each step i of a chain is in a solver's table.

    Returns:
      {i: (n, m)}: row n calls the network at x_i for the last time, and x_{i-1} is final after
      row m.
    """
    last = {int(i): n for n, i in enumerate(solver.steps)}
    return {i: (n, last.get(i - 1, len(solver.steps)) - 1) for i, n in last.items()}


def num_calls(solver):
    """NFE: how often a solver calls the network."""
    return int((solver.steps >= 0).sum())


SOLVERS = {f.__name__: f for f in (ancestral, ddim, dpmpp, dpmpp_sde, unipc, heun, plms)}
ORDERS = {"dpmpp": (1, 2, 3), "unipc": (2, 3)}  # of the others: none to choose
SINGLE_STEP = ("ancestral", "ddim")  # each step depends on x alone
SKIP_ZERO = ("dpmpp", "dpmpp_sde", "unipc")  # on evenly spaced steps, see spacings.timesteps
FEW_STEPS = 15  # below it, the last steps of dpmpp have lower orders (Lu et al. 2022b)
ADAMS_BASHFORTH = {
    1: np.array([3, -1]) / 2,
    2: np.array([23, -16, 5]) / 12,
    3: np.array([55, -59, 37, -9]) / 24,
}


def _nodes(alpha_bars):
    """α, σ and λ = log(α / σ) at the data (index 0) and at each step i (index i + 1)."""
    alpha_bars = np.append(1.0, alpha_bars)
    alpha, sigma = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
    with np.errstate(divide="ignore"):  # λ is infinite without noise, and without signal
        return alpha, sigma, np.log(alpha) - np.log(sigma)


def _known(alpha_bars, i):
    """The number of predictions known at step i; one where ᾱ = 0 helps no other, as λ = -∞."""
    count = len(alpha_bars) - i
    return max(1, count - 1) if alpha_bars[-1] == 0 else count


def _transfer(alpha, sigma, s, x, eps):
    """x at node s - 1 of x at node s, with the given ε on the way; needs α_s > 0."""
    return alpha[s - 1] / alpha[s] * x + (sigma[s - 1] - alpha[s - 1] * sigma[s] / alpha[s]) * eps
