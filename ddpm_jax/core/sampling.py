"""Sampling: keys and noise, guidance, and the reverse process as one `lax.scan`.

A solver (see solvers.py) is a table of weights; `make_step` applies a row of it with a
`predict_fn(x_t, t)` (see diffusion.py), and `reverse_process` runs the rows in a `lax.scan`.
Guidance and clipping map one predict_fn to another.

Each image has its own PRNG key, folded with t at every step. So an image depends only on its key,
not on the other images of its batch or on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.core import diffusion


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
    """Returns predict_fn for a chain whose step i is the network's step τ_i.

    Args:
      predict_fn: (x_t, t [B]) to a Prediction.
      timesteps: τ, [S] ints, ascending.
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
        # ε - shift is x0 + √(1 / ᾱ - 1) · shift. Where ᾱ = 0, x_t knows nothing of the class.
        scale = diffusion.at(schedule.sqrt_recip_alpha_bars_minus_one, t, x_t)
        shift *= jnp.where(jnp.isfinite(scale), scale, 0)
        prediction = predict_fn(x_t, t)
        return prediction._replace(x0=prediction.x0 + shift)

    return guided


def init_state(solver, x):
    """The state before a solver's first row: x, and zeros for what it remembers."""
    return (x, *(jnp.zeros_like(x) for _ in range(solver.weights.shape[1] - 1)))


def make_step(solver, predict_fn, noise_fn):
    """Builds the step of a solver: one call of the network, and one row of its table.

    Args:
      solver: a solvers.Solver, on a chain of S steps.
      predict_fn: (x_t, t [B]) to a Prediction, t in [0, S).
      noise_fn: (n, (H, W, C)) to standard normal noise, [B, H, W, C]; called only if a row of the
        table has noise.

    Returns:
      step: (state, n) to (state, x0_pred). The state is a tuple of [B, H, W, C]; its first one is
        x. n is an int32 scalar in [0, N).
    """
    steps, weights = jnp.asarray(solver.steps, jnp.int32), jnp.asarray(solver.weights, jnp.float32)
    used = solver.weights.any(axis=0)  # [K, K + 2]; what no row uses is not computed

    def predict(x, i):
        return predict_fn(x, jnp.full(x.shape[:1], i))

    def step(state, n):
        x, i = state[0], steps[n]
        if solver.steps.min() < 0:  # some rows do not call the network
            shapes = jax.eval_shape(predict, x, i)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            prediction = jax.lax.cond(i < 0, lambda *_: zeros, predict, x, i)
        else:
            prediction = predict(x, i)
        terms = [*state, prediction.x0]
        if used[:, -1].any():
            eps = noise_fn(n, x.shape[1:])
            if solver.log_variance is not None:
                a, b = jnp.asarray(solver.log_variance, jnp.float32)[n]
                eps *= jnp.exp(0.5 * (a + b * prediction.variance))
            terms.append(eps)

        def combine(k):
            chosen = [weights[n, k, j] * term for j, term in enumerate(terms) if used[k, j]]
            return sum(chosen) if chosen else jnp.zeros_like(x)

        return tuple(map(combine, range(len(state)))), prediction.x0

    return step


def keep_known(step, alpha_bars, x0, known_mask, noise_fn):
    """Replaces known pixels after each step, as RePaint (Lugmayr et al. 2022, Alg. 1, line 8).

    Args:
      step: of make_step, for a solver of solvers.repaint.
      alpha_bars: ᾱ of x after each row, [N]; NaN where x is to stay as it is.
      x0: [B, H, W, C], the image, in [-1, 1].
      known_mask: [B, H, W, 1] bool, True at the pixels to keep.
      noise_fn: (n, (H, W, C)) to standard normal noise, [B, H, W, C].

    Returns:
      (state, n) to (state, x0_pred): known pixels of x are a sample of q(x_{t-1} | x0), and at the
      end those of x0.
    """
    signal, std = (jnp.asarray(c, jnp.float32) for c in (alpha_bars**0.5, (1 - alpha_bars) ** 0.5))

    def inpaint_step(state, n):
        (x, *others), x0_pred = step(state, n)
        known = signal[n] * x0 + std[n] * noise_fn(n, x0.shape[1:])
        x = jnp.where(known_mask & jnp.isfinite(signal[n]), known, x)
        return (x, *others), x0_pred

    return inpaint_step


def reverse_process(step_fn, state, rows, frames_at=(), keep=lambda x, x0_pred: x):
    """Runs state, x0_pred = step_fn(state, n) over rows in one `lax.scan`, and keeps some frames.

    Args:
      step_fn: of make_step.
      state: a tuple of [B, H, W, C], before the first step; see init_state.
      rows: [N] int32, the n in their order.
      frames_at: [F], distinct n after which to keep a frame.
      keep: (x, x0_pred) to a frame, a pytree of arrays; x by default.

    Returns:
      state: after the last step.
      frames: keep's pytree with a leading axis of F, in the order of frames_at; zeros for an n that
        is not in rows.
    """
    frames_at = jnp.asarray(frames_at, jnp.int32)
    frame, count = jax.eval_shape(keep, state[0], state[0]), len(frames_at)
    frames = jax.tree.map(lambda f: jnp.zeros((count, *f.shape), f.dtype), frame)

    def body(carry, n):
        state, frames = carry
        state, x0_pred = step_fn(state, n)
        if count:
            is_n = frames_at == n
            # The index `count` is past the end: mode="drop" writes nothing there.
            index = jnp.where(is_n.any(), is_n.argmax(), count)
            frames = jax.tree.map(
                lambda old, new: old.at[index].set(new, mode="drop"),
                frames,
                keep(state[0], x0_pred),
            )
        return (state, frames), None

    return jax.lax.scan(body, (state, frames), rows)[0]
