"""The reverse process (Ho et al. 2020, Algorithm 2) and its relatives, one step each.

A step takes x_t to x_{t-1} by what `predict_fn(x_t, t)` says of x_t (see diffusion.py); guidance is
a function from one predict_fn to another, and a chain of fewer steps is another schedule.
`reverse_process` runs any of them as a `lax.scan`.

Each image has its own PRNG key, folded with t at every step, so an image depends on its key and
on nothing else: not on the batch it is made in, nor on the number of devices.
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
    """x_T ~ N(0, I), [N, *image_shape]: where the reverse process starts."""
    return noise(keys, num_timesteps, image_shape)


def respaced(predict_fn, timesteps):
    """predict_fn in the time of a shorter chain: its step i is the network's step τ_i.

    Args:
      predict_fn: (x_t, t [B]) to a Prediction.
      timesteps: τ, [S] ints, ascending; what the chain's schedule was made with.
    """
    taus = np.asarray(timesteps)
    return lambda x_t, t: predict_fn(x_t, jnp.asarray(taus)[t])


def classifier_free(predict_fn, labels, null_label, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): ε_u + g · (ε_c - ε_u).

    x0 is an affine function of ε, and so are the other things that a network may predict: the same
    mixture of them is the same guidance. A learned variance is that of the conditional half.

    Args:
      predict_fn: (x_t, t, labels [B]) to a Prediction; called once, with a batch of 2B.
      labels: [B] int32.
      null_label: the label that stands for none.
      guidance: g; 0 is the unconditional model, 1 the conditional one, more than 1 exaggerates.

    Returns:
      (x_t, t) to a Prediction.
    """

    def guided(x_t, t):
        twice = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
        both = predict_fn(*twice, jnp.concatenate([labels, jnp.full_like(labels, null_label)]))
        given, free = (
            jax.tree.map(lambda leaf, half=half: jnp.split(leaf, 2)[half], both) for half in (0, 1)
        )
        return given._replace(x0=free.x0 + guidance * (given.x0 - free.x0))

    return guided


def classifier_guided(schedule, predict_fn, log_prob_fn, guidance):
    """Classifier guidance (Dhariwal & Nichol 2021, Alg. 2): ε - √(1 - ᾱ_t) · s · ∇ log p(y | x_t).

    Args:
      schedule: coefficients, each [T].
      predict_fn: (x_t, t) to a Prediction.
      log_prob_fn: (x_t, t) to log p(y | x_t) of the wanted labels, [B].
      guidance: s.

    Returns:
      (x_t, t) to a Prediction.
    """

    def guided(x_t, t):
        gradient = jax.grad(lambda x: log_prob_fn(x, t).sum())(x_t)
        shift = guidance * diffusion.at(schedule.sqrt_one_minus_alpha_bars, t, x_t) * gradient
        # What ε loses, x0 gains √(1 / ᾱ - 1) times.
        shift *= diffusion.at(schedule.sqrt_recip_alpha_bars_minus_one, t, x_t)
        found = predict_fn(x_t, t)
        return found._replace(x0=found.x0 + shift)

    return guided


def ancestral_step(schedule, predict_fn, x_t, t, eps, *, variance):
    """One line of Algorithm 2: draws x_{t-1} ~ p(x_{t-1} | x_t).

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
    """One step of DDIM (Song et al. 2020, Eq. 12); ε is that of x0_pred, whether clipped or not.

      σ = η · √β̃_t
      x_{t-1} = √ᾱ_{t-1} · x0_pred + √(1 - ᾱ_{t-1} - σ²) · eps_pred + σ · eps

    With η = 1 it is ancestral_step with fixed_small variance; with η = 0 nothing is random.

    Args:
      schedule: coefficients, each [T]; of the steps that are taken.
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
    """The way back of DDIM with η = 0: x_{t-1} to x_t, with the ε that x_{t-1} is seen to hold.

    Both ways are Euler steps of one differential equation, so the more there are, the closer
    ddim_step comes back to where this began. Clipping x0 helps: it keeps the equation smooth where
    ᾱ is near 0, and a small error of ε is a large one of x0.

    Args:
      schedule: coefficients, each [T]; of the steps that are taken.
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
    """The order in which inpainting visits the steps (Lugmayr et al. 2022, RePaint, Fig. 9).

    It goes down from the last step to 0; every `jump_length` steps it goes up again by that many,
    and down anew, `resamplings` - 1 times.

    Args:
      num_steps: S, of the chain.
      jump_length: j in RePaint.
      resamplings: r in RePaint; 1 goes straight down.

    Returns:
      (t, up): [N] int32 and bool. Down takes x_t to x_{t-1}, up takes x_{t-1} to x_t.
    """
    plan, t = [], num_steps - 1
    left = {t: resamplings - 1 for t in range(1, num_steps - jump_length + 1, jump_length)}
    while t >= 0:
        plan.append((t, False))
        if left.get(t, 0) > 0:
            left[t] -= 1
            plan += [(t + i, True) for i in range(jump_length)]
            t += jump_length
        t -= 1
    ts, ups = zip(*plan, strict=True)
    return np.array(ts, np.int32), np.array(ups)


def inpaint_step(schedule, step_fn, x, t, up, x0, known, eps):
    """One step of RePaint (Lugmayr et al. 2022, Alg. 1).

    Down: step_fn's x_{t-1}, with the known pixels replaced by their own q(x_{t-1} | x0). Up:
    x_t ~ q(x_t | x_{t-1}), Eq. (2), which gives what was painted another chance to fit.

    Args:
      schedule: coefficients, each [T]; of the steps that are taken.
      step_fn: (x_t, t) to (x_{t-1}, x0_pred).
      x: [B, H, W, C], x_t on the way down, x_{t-1} on the way up.
      t: int32 scalar, in [0, T).
      up: bool scalar.
      x0: [B, H, W, C], the image, in [-1, 1].
      known: [B, H, W, 1] bool, its pixels that are to stay.
      eps: [B, H, W, C], standard normal.

    Returns:
      (x, x0_pred), [B, H, W, C] each; at t = 0 the known pixels of x are x0's own.
    """

    def go_down(x):
        x, x0_pred = step_fn(x, t)
        of_known = jnp.sqrt(schedule.alpha_bars_prev[t]) * x0
        of_known += jnp.sqrt(schedule.one_minus_alpha_bars_prev[t]) * eps
        return jnp.where(known, of_known, x), x0_pred

    def go_up(x):
        beta = schedule.betas[t]
        return jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * eps, x

    return jax.lax.cond(up, go_up, go_down, x)


def reverse_process(step_fn, x, ts, frames_at=(), keep=lambda x, x0_pred: x):
    """Runs x, x0_pred = step_fn(x, t) over ts as one `lax.scan`, and keeps the frames asked for.

    Args:
      step_fn: (x_t, t) to (x_{t-1}, x0_pred).
      x: [B, H, W, C], the state before the first step.
      ts: [S] int32, the steps in the order they are taken, as T - 1, …, 0.
      frames_at: [K], distinct ts after which to keep a frame.
      keep: (x, x0_pred) to a frame, a pytree of arrays; of x alone by default.

    Returns:
      x: [B, H, W, C], after the last step.
      frames: keep's pytree with a leading axis of K, in the order of frames_at; zeros for a t that
        ts does not hold.
    """
    frames_at = jnp.asarray(frames_at, jnp.int32)
    frame, count = jax.eval_shape(keep, x, x), len(frames_at)
    frames = jax.tree.map(lambda f: jnp.zeros((count, *f.shape), f.dtype), frame)

    def body(carry, t):
        x, frames = carry
        x, x0_pred = step_fn(x, t)
        if count:
            hit = frames_at == t
            # Nothing is written at the index past the end.
            slot = jnp.where(hit.any(), hit.argmax(), count)
            frames = jax.tree.map(
                lambda kept, new: kept.at[slot].set(new, mode="drop"), frames, keep(x, x0_pred)
            )
        return (x, frames), None

    return jax.lax.scan(body, (x, frames), ts)[0]
