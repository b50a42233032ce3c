"""Samplers: one step of ancestral sampling (Ho et al. 2020, Algorithm 2), DDIM and RePaint.

A step maps x_t to x_{t-1} with a `predict_fn(x_t, t)` (see diffusion.py). Guidance maps one
predict_fn to another, and a sampler of fewer steps uses a respaced schedule. `reverse_process` runs
any of these steps in a `lax.scan`.

Each image has its own PRNG key, folded with t at every step. So an image depends only on its key,
not on the other images of its batch or on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.core import diffusion

SAMPLERS = ("ancestral", "ddim")


def image_keys(seed, indices):
    """[N] PRNG keys, one for each image index; the same index always gives the same image."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def noise(keys, t, shape):
    """Standard normal noise, [N, *shape], for step t of the images with these keys."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def prior(keys, num_timesteps, image_shape):
    """x_T ~ N(0, I), [N, *image_shape]: the start of the reverse process."""
    return noise(keys, num_timesteps, image_shape)


def respaced(predict_fn, timesteps):
    """Returns predict_fn for a respaced schedule, whose step i is the network's step τ_i.

    Args:
      predict_fn: (x_t, t [B]) to a Prediction.
      timesteps: τ, [S] ints, ascending, as given to schedules.make_schedule.
    """
    taus = np.asarray(timesteps)
    return lambda x_t, t: predict_fn(x_t, jnp.asarray(taus)[t])


def classifier_free(predict_fn, labels, null_label, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): ε_u + g · (ε_c - ε_u).

    x0 is an affine function of ε, and so is every other prediction target, so guidance is the same
    combination of x0. A learned variance is the conditional prediction's.

    Args:
      predict_fn: (x_t, t, labels [B]) to a Prediction; called once, with a batch of 2B.
      labels: [B] int32.
      null_label: the label for "no class".
      guidance: g; 0 is the unconditional model, 1 the conditional one, above 1 amplifies the class.

    Returns:
      (x_t, t) to a Prediction.
    """

    def guided(x_t, t):
        doubled = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
        both = predict_fn(*doubled, jnp.concatenate([labels, jnp.full_like(labels, null_label)]))
        cond, uncond = (
            jax.tree.map(lambda leaf, half=half: jnp.split(leaf, 2)[half], both) for half in (0, 1)
        )
        return cond._replace(x0=uncond.x0 + guidance * (cond.x0 - uncond.x0))

    return guided


def classifier_guided(schedule, predict_fn, log_prob_fn, guidance):
    """Classifier guidance (Dhariwal & Nichol 2021, Alg. 2): ε - √(1 - ᾱ_t) · s · ∇ log p(y | x_t).

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t) to a Prediction.
      log_prob_fn: (x_t, t) to log p(y | x_t), [B], of each image's target label y.
      guidance: s.

    Returns:
      (x_t, t) to a Prediction.
    """

    def guided(x_t, t):
        gradient = jax.grad(lambda x: log_prob_fn(x, t).sum())(x_t)
        shift = guidance * diffusion.at(schedule.sqrt_one_minus_alpha_bars, t, x_t) * gradient
        # ε - shift is x0 + √(1 / ᾱ - 1) · shift.
        shift *= diffusion.at(schedule.sqrt_recip_alpha_bars_minus_one, t, x_t)
        prediction = predict_fn(x_t, t)
        return prediction._replace(x0=prediction.x0 + shift)

    return guided


def ancestral_step(schedule, predict_fn, x_t, t, eps, *, variance):
    """One step of Algorithm 2: draws x_{t-1} ~ p(x_{t-1} | x_t).

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t [B]) to a Prediction.
      x_t: [B, H, W, C].
      t: int32 scalar, in [0, T).
      eps: [B, H, W, C], standard normal; not used at t = 0, the last step.
      variance: one of diffusion.VARIANCES.

    Returns:
      (x_{t-1}, x0_pred), [B, H, W, C] each; at t = 0 x_{t-1} is the image.
    """
    ts = jnp.full(x_t.shape[:1], t)
    p = diffusion.p_mean_variance(schedule, predict_fn, x_t, ts, variance=variance)
    return p.mean + jnp.where(t > 0, jnp.exp(0.5 * p.log_variance), 0) * eps, p.x0_pred


def ddim_step(schedule, predict_fn, x_t, t, eps, *, eta):
    """One step of DDIM (Song et al. 2020, Eq. 12).

      σ = η · √β̃_t
      x_{t-1} = √ᾱ_{t-1} · x0_pred + √(1 - ᾱ_{t-1} - σ²) · eps_pred + σ · eps

    eps_pred is computed from x0_pred, after clipping if it is clipped. With η = 1 this is
    ancestral_step with fixed_small variance; with η = 0 it is deterministic.

    Args:
      schedule: coefficients, each [T], of the sampler's steps.
      predict_fn: (x_t, t [B]) to a Prediction.
      x_t: [B, H, W, C].
      t: int32 scalar, in [0, T).
      eps: [B, H, W, C], standard normal; not used at t = 0, nor with η = 0.
      eta: η, in [0, 1].

    Returns:
      (x_{t-1}, x0_pred), [B, H, W, C] each; at t = 0 x_{t-1} is the image.
    """
    ts = jnp.full(x_t.shape[:1], t)
    x0_pred = predict_fn(x_t, ts).x0
    eps_pred = diffusion.predict_eps(schedule, x_t, ts, x0_pred)
    variance = eta**2 * schedule.posterior_variance[t]
    direction = jnp.sqrt(jnp.maximum(schedule.one_minus_alpha_bars_prev[t] - variance, 0))
    mean = jnp.sqrt(schedule.alpha_bars_prev[t]) * x0_pred + direction * eps_pred
    return mean + jnp.sqrt(variance) * eps, x0_pred


def ddim_inverse_step(schedule, predict_fn, x, t):
    """One step of DDIM inversion (η = 0): x_{t-1} to x_t, with the ε predicted at x_{t-1}.

    ddim_step and ddim_inverse_step are Euler steps of the same ODE in opposite directions. With
    more steps, sampling from the result comes closer to the original image. Clipping x0 helps:
    where ᾱ is near 0, a small error of ε is a large error of x0, and clipping keeps the ODE smooth
    there.

    Args:
      schedule: coefficients, each [T], of the sampler's steps.
      predict_fn: (x_t, t [B]) to a Prediction.
      x: [B, H, W, C], x_{t-1}; at t = 0 the image.
      t: int32 scalar, in [0, T).

    Returns:
      (x_t, x0_pred), [B, H, W, C] each.
    """
    before = jnp.full(x.shape[:1], jnp.maximum(t - 1, 0))
    eps_pred = diffusion.predict_eps(schedule, x, before, predict_fn(x, before).x0)
    x0_pred = x - jnp.sqrt(schedule.one_minus_alpha_bars_prev[t]) * eps_pred
    x0_pred /= jnp.sqrt(schedule.alpha_bars_prev[t])
    return diffusion.q_sample(schedule, x0_pred, jnp.full(x.shape[:1], t), eps_pred), x0_pred


def inpaint_plan(num_steps, jump_length=1, resamplings=1):
    """The order of RePaint's denoising and diffusion steps (Lugmayr et al. 2022, Fig. 9).

    t goes down from S - 1 to 0. Every `jump_length` steps it goes up by as many steps and down
    again, `resamplings` - 1 times.

    Args:
      num_steps: S, the sampler's steps.
      jump_length: j in RePaint.
      resamplings: r in RePaint; 1 goes down once.

    Returns:
      (t, up): [N] int32 and bool. Down maps x_t to x_{t-1}, up maps x_{t-1} to x_t.
    """
    plan, t = [], num_steps - 1
    jumps_left = {t: resamplings - 1 for t in range(1, num_steps - jump_length + 1, jump_length)}
    while t >= 0:
        plan.append((t, False))
        if jumps_left.get(t, 0) > 0:
            jumps_left[t] -= 1
            plan += [(t + i, True) for i in range(jump_length)]
            t += jump_length
        t -= 1
    ts, ups = zip(*plan, strict=True)
    return np.array(ts, np.int32), np.array(ups)


def inpaint_step(schedule, step_fn, x, t, up, x0, known_mask, eps):
    """One step of RePaint (Lugmayr et al. 2022, Alg. 1).

    Down: step_fn's x_{t-1}, with the known pixels replaced by a sample of q(x_{t-1} | x0). Up:
    x_t ~ q(x_t | x_{t-1}), Eq. (2), so that the next steps down can fit the unknown pixels better
    to the known ones.

    Args:
      schedule: coefficients, each [T], of the sampler's steps.
      step_fn: (x_t, t) to (x_{t-1}, x0_pred).
      x: [B, H, W, C], x_t for a step down, x_{t-1} for a step up.
      t: int32 scalar, in [0, T).
      up: bool scalar.
      x0: [B, H, W, C], the image, in [-1, 1].
      known_mask: [B, H, W, 1] bool, True at the pixels to keep.
      eps: [B, H, W, C], standard normal.

    Returns:
      (x, x0_pred), [B, H, W, C] each; at t = 0 the known pixels of x are those of x0.
    """

    def down(x):
        x, x0_pred = step_fn(x, t)
        known = jnp.sqrt(schedule.alpha_bars_prev[t]) * x0
        known += jnp.sqrt(schedule.one_minus_alpha_bars_prev[t]) * eps
        return jnp.where(known_mask, known, x), x0_pred

    def diffuse(x):
        beta = schedule.betas[t]
        return jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * eps, x

    return jax.lax.cond(up, diffuse, down, x)


def reverse_process(step_fn, x, ts, frames_at=(), keep=lambda x, x0_pred: x):
    """Runs x, x0_pred = step_fn(x, t) over ts in one `lax.scan`, and keeps some frames.

    Args:
      step_fn: (x_t, t) to (x_{t-1}, x0_pred).
      x: [B, H, W, C], the state before the first step.
      ts: [S] int32, the steps in their order, as T - 1, …, 0.
      frames_at: [K], distinct ts after which to keep a frame.
      keep: (x, x0_pred) to a frame, a pytree of arrays; x by default.

    Returns:
      x: [B, H, W, C], after the last step.
      frames: keep's pytree with a leading axis of K, in the order of frames_at; zeros for a t that
        is not in ts.
    """
    frames_at = jnp.asarray(frames_at, jnp.int32)
    frame, count = jax.eval_shape(keep, x, x), len(frames_at)
    frames = jax.tree.map(lambda f: jnp.zeros((count, *f.shape), f.dtype), frame)

    def body(carry, t):
        x, frames = carry
        x, x0_pred = step_fn(x, t)
        if count:
            is_t = frames_at == t
            # The index `count` is past the end: mode="drop" writes nothing there.
            index = jnp.where(is_t.any(), is_t.argmax(), count)
            frames = jax.tree.map(
                lambda old, new: old.at[index].set(new, mode="drop"), frames, keep(x, x0_pred)
            )
        return (x, frames), None

    return jax.lax.scan(body, (x, frames), ts)[0]
