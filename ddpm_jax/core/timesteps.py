"""Which timesteps a batch is trained on, besides uniform ones.

A draw has weights, with which the mean loss of a batch is an unbiased estimate of the mean over all
timesteps: 1 / (T · p_t), where p_t is the probability of t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HISTORY = 10  # losses of each timestep that are remembered
UNIFORM_SHARE = 0.001  # of the draws of importance sampling, which bounds the weights
GRID = 2**23  # numbers that jax.random.uniform draws


class LossHistory(NamedTuple):
    """The latest losses at each timestep."""

    losses: jax.Array  # [T, HISTORY]
    counts: jax.Array  # [T] int32, of all losses so far; the next replaces column count % HISTORY


def empty_history(num_timesteps):
    """A LossHistory before the first step."""
    return LossHistory(jnp.zeros((num_timesteps, HISTORY)), jnp.zeros((num_timesteps,), jnp.int32))


def low_discrepancy(uniform, batch_size, num_timesteps):
    """Timesteps that are evenly spread over a global batch (Kingma et al. 2021, App. I.1).

      t_i = ⌊T · (u + i / B mod 1)⌋, with one u ~ U(0, 1) for the whole batch

    Args:
      uniform: u.
      batch_size: B, over all devices.
      num_timesteps: T.

    Returns:
      [B] int32, each uniform in [0, T): all weights are 1.
    """
    fractions = (uniform + jnp.arange(batch_size) / batch_size) % 1
    return jnp.minimum(num_timesteps * fractions, num_timesteps - 1).astype(jnp.int32)


def importance(history):
    """The probability of each timestep (Nichol & Dhariwal 2021, Eq. 18).

      p_t ∝ √(E[L_t²]), the mean of the last HISTORY losses at t

    It is uniform until each t has as many. A share UNIFORM_SHARE is always uniform, as in their
    code.

    Args:
      history: a LossHistory.

    Returns:
      [T], with sum 1.
    """
    uniform = jnp.full(len(history.counts), 1 / len(history.counts))
    largest = history.losses.max()  # without it, squares of large losses are infinite
    relative = history.losses / jnp.where(largest > 0, largest, 1)
    root = jnp.sqrt(jnp.mean(jnp.square(relative), axis=1))
    total = root.sum()
    learned = (1 - UNIFORM_SHARE) * root / jnp.where(total > 0, total, 1) + UNIFORM_SHARE * uniform
    return jnp.where((history.counts >= HISTORY).all() & (total > 0), learned, uniform)


def draw(probabilities, uniforms):
    """Draws timesteps with given probabilities.

    Args:
      probabilities: [T], with sum 1 up to rounding.
      uniforms: [B], in [0, 1), multiples of 2⁻²³ as jax.random.uniform's.

    Returns:
      t: [B] int32; the smallest t whose cumulative probability is above the uniform number.
      weights: [B], 1 / (T · p_t), for the p_t that t is drawn with: a multiple of 2⁻²³, at least
        one. With p_t itself, the expectation would be wrong for t that float32 hardly draws.
    """
    i, cumulative = jnp.arange(len(probabilities)), jnp.cumsum(probabilities)
    edges = jnp.round(cumulative / cumulative[-1] * GRID).astype(jnp.int32)
    edges = jax.lax.cummax(jnp.maximum(edges, i + 1) - i) + i  # at least one apart
    edges = jnp.minimum(edges, GRID - i[::-1])  # the last one is GRID
    t = jnp.searchsorted(edges, (uniforms * GRID).astype(jnp.int32), side="right")
    counts = jnp.diff(edges, prepend=0)
    return t.astype(jnp.int32), GRID / len(probabilities) / counts[t]


def record(history, t, losses):
    """Returns the history with the losses of a batch, in the batch's order.

    Args:
      history: a LossHistory.
      t: [B] int32, of the global batch.
      losses: [B], without weights.
    """
    order = jnp.argsort(t, stable=True)
    t, losses = t[order], losses[order]
    first, behind = (jnp.searchsorted(t, t, side=side) for side in ("left", "right"))
    column = (history.counts[t] + jnp.arange(len(t)) - first) % HISTORY
    # Of more than HISTORY losses of one t, only the last ones; T is no row, and is dropped.
    row = jnp.where(behind - jnp.arange(len(t)) <= HISTORY, t, len(history.counts))
    return LossHistory(
        history.losses.at[row, column].set(losses, mode="drop"), history.counts.at[t].add(1)
    )
