"""One step of training (Ho et al. 2020, Algorithm 1): its random variables, loss and update."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import configs, cpu, packing, parallel, signals
from ddpm_jax.core import diffusion, likelihood, timesteps, unet
from ddpm_jax.files import images
from ddpm_jax.runs import states

# The held-out loss always uses the same noise, whatever the run's seed.
EVAL_SEED = 20200619
HYBRID_WEIGHT = 0.001  # λ of the bound in the hybrid loss, with the bound in bits/dim


def step_keys(seed, step, indices):
    """[B] PRNG keys, a function of (seed, step, global example index) only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def draw(keys, image_shape, num_timesteps):
    """The random variables of each training example, drawn with its key.

    Args:
      keys: [B] PRNG keys.
      image_shape: (H, W, C).
      num_timesteps: T.

    Returns:
      t: [B] int32, uniform in [0, T).
      eps: [B, H, W, C], standard normal.
      dropout_keys: [B] PRNG keys.
      label_uniforms: [B], uniform in [0, 1), which decide whether the label is dropped.
      t_uniforms: [B], uniform in [0, 1), for timesteps that are not uniform, instead of t.
    """

    def draw_one(key):
        t_key, eps_key, dropout_key, label_key = jax.random.split(key, 4)
        t = jax.random.randint(t_key, (), 0, num_timesteps)
        eps, label_uniform = jax.random.normal(eps_key, image_shape), jax.random.uniform(label_key)
        return t, eps, dropout_key, label_uniform, jax.random.uniform(t_key)

    return jax.vmap(draw_one)(keys)


def make_loss(config, model, schedule):
    """Builds the loss of a config.

    Args:
      config: its model and diffusion sections are used.
      model: the network.
      schedule: coefficients, each [T].

    Returns:
      loss(params, x0 [B, H, W, C], labels [B] or None, t [B], eps [B, H, W, C], dropout_keys) →
      [B]: L_simple; the VLB's term at t, bits/dim, without clipping; both of them; or the
      cross-entropy, nats. The params may be packed (see packing.py).
    """
    section = config.diffusion
    variance = section.variance
    of_t = jnp.asarray(configs.loss_weights(config), jnp.float32)

    def simple(net_fn, x0, t, eps):
        mse = diffusion.simple_loss(schedule, net_fn, x0, t, eps, section.prediction)
        return of_t[t] * mse

    def hybrid(net_fn, x0, t, eps):
        # L_simple + λ L_vlb (Nichol & Dhariwal 2021, Eq. 16). The bound is T times its term at a
        # random t. It trains the variance only: the mean is constant in it.
        output = net_fn(diffusion.q_sample(schedule, x0, t, eps), t)
        mean, of_variance = jnp.split(output, 2, axis=-1)
        constant = jnp.concatenate([jax.lax.stop_gradient(mean), of_variance], axis=-1)
        bound = schedule.num_timesteps * vlb(lambda *_: constant, x0, t, eps)
        return simple(lambda *_: mean, x0, t, eps) + HYBRID_WEIGHT * bound

    def vlb(net_fn, x0, t, eps):
        predict_fn = configs.make_predictor(config, schedule, net_fn)
        terms, _ = likelihood.vlb_terms(schedule, predict_fn, x0, t, eps, variances=(variance,))
        return terms[variance]

    loss_of = {"simple": simple, "vlb": vlb, "hybrid": hybrid}[section.loss]

    def loss(params, x0, labels, t, eps, dropout_keys=None):
        apply = unet.net_fn(model, packing.unpack(params), dropout_keys)
        if config.model.kind == "classifier":
            log_p = apply(diffusion.q_sample(schedule, x0, t, eps), t)
            return -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
        condition = () if labels is None else (labels,)
        return loss_of(lambda x_t, t: apply(x_t, t, *condition), x0, t, eps)

    return loss


class Examples(NamedTuple):
    """A device's examples of one step, with the random variables of each."""

    weight: jax.Array  # [B], of the loss; 1 unless t is drawn by importance
    x0: jax.Array  # [B, H, W, C], in [-1, 1]
    labels: jax.Array | None  # [B] int32
    t: jax.Array  # [B] int32, in [0, T)
    eps: jax.Array  # [B, H, W, C]
    dropout_keys: jax.Array  # [B] PRNG keys


def draw_examples(config, state, batch):
    """This device's Examples, under parallel.pmap; `train_step` explains the arguments."""
    num_timesteps, seed = config.diffusion.num_timesteps, config.seed
    x0, labels = images.to_float(batch.images), batch.labels
    indices = parallel.example_indices(len(x0))
    keys = step_keys(seed, state.step, indices)
    t, eps, dropout_keys, label_uniforms, t_uniforms = draw(keys, x0.shape[1:], num_timesteps)
    weight = jnp.ones(len(x0))
    if config.train.timesteps == "importance":
        t, weight = timesteps.draw(timesteps.importance(state.loss_history), t_uniforms)
    elif config.train.timesteps == "low_discrepancy":
        batch_size = len(x0) * jax.lax.axis_size(parallel.AXIS)
        (key,) = step_keys(seed, state.step, jnp.array([batch_size]))  # of no example
        u = jax.random.uniform(key)
        t = timesteps.low_discrepancy(u, batch_size, num_timesteps)[indices]
    if labels is not None and config.model.kind != "classifier":  # for classifier-free guidance
        is_dropped = label_uniforms < config.train.label_dropout
        labels = jnp.where(is_dropped, config.data.num_classes, labels)
    return Examples(weight, x0, labels, t, eps, dropout_keys)


def over_microbatches(function, batch, count):
    """Applies a function to microbatches, one after another to save memory.

    Args:
      function: a batch to (means, each): a tree of arrays that are means over the batch, and an
        array [B] with a value for each example.
      batch: a tree of arrays [B, ...].
      count: number of microbatches; divides B.

    Returns:
      (means, each) of the whole batch.
    """
    if count == 1:
        return function(batch)
    batch = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)
    shapes, _ = jax.eval_shape(function, jax.tree.map(lambda a: a[0], batch))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, microbatch):
        # In the unrolled loop, too, a microbatch must wait until the one before it is done.
        total, microbatch = jax.lax.optimization_barrier((total, microbatch))
        means, each = function(microbatch)
        return jax.tree.map(jnp.add, total, means), each

    # On a CPU, a gradient inside a loop takes about 12 times as long.
    total, each = jax.lax.scan(add, total, batch, unroll=cpu.is_used())
    return jax.tree.map(lambda x: x / count, total), each.reshape(-1)


def train_step(config, loss_fn, optimizer, state, batch):
    """One update of Algorithm 1, under parallel.pmap; a non-finite gradient changes the step only.

    Args:
      config: T, the seed, how t and the labels are drawn, microbatches and EMAs are used.
      loss_fn: from make_loss.
      optimizer: an optax transformation; it clips the gradient after the mean over devices.
      state: a TrainState, packed or not.
      batch: a data.Batch, this device's shard of the global batch.

    Returns:
      (state, metrics), means over the global batch, with the weights of the timesteps: the loss;
      the gradient's norm before clipping; for each quarter of the timesteps [4] the share of
      examples, and their loss times this share; and whether the update was applied.
    """
    examples, num_timesteps = draw_examples(config, state, batch), config.diffusion.num_timesteps

    def mean_loss(params, weight, x0, labels, t, *noise):
        losses = loss_fn(params, x0, labels, t, *noise)
        weighted, quarter = weight * losses, jax.nn.one_hot(4 * t // num_timesteps, 4)
        shares = {"share": weight, "loss_share": weighted}
        quarters = {k: (v[:, None] * quarter).mean(0) for k, v in shares.items()}
        return weighted.mean(), (quarters, losses)

    def loss_and_gradient(examples):
        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, (quarters, losses)), grads = gradient(state.params, *examples)
        return (loss, quarters, grads), losses

    means, losses = over_microbatches(loss_and_gradient, examples, config.optim.accumulate)
    loss, quarters, grads = jax.lax.pmean(means, parallel.AXIS)
    norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm)
    history = state.loss_history
    if history is not None:
        of_all = jax.lax.all_gather((examples.t, losses), parallel.AXIS, tiled=True)
        recorded = timesteps.record(history, *of_all)
        history = jax.tree.map(functools.partial(jnp.where, applied), recorded, history)
    ema_decays = configs.ema_decays(config.optim)
    state = states.apply_gradients(state, grads, optimizer, ema_decays, applied)
    state = state.replace(loss_history=history)
    return state, {"loss": loss, "grad_norm": norm, **quarters, "applied": applied}


def make_step(config, model, schedule, optimizer):
    """train_step of a config, for parallel.pmap: (state, a device's Batch) → (state, metrics)."""
    return functools.partial(train_step, config, make_loss(config, model, schedule), optimizer)


def make_train_step(config, model, schedule, optimizer, devices=None):
    """make_step over all devices: (state, Batch of [devices, B, …]) → (state, metrics)."""
    # The state is replicated before and after, and its buffers are reused.
    return parallel.pmap(
        make_step(config, model, schedule, optimizer),
        in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices,
    )  # fmt: skip


def make_eval_loss(config, model, schedule, source):
    """The held-out loss: with the same images, timesteps (evenly spaced) and noise every time.

    Args:
      config: its train, optim, model and diffusion sections are used.
      model: the network.
      schedule: coefficients, each [T].
      source: the held-out images.

    Returns:
      eval_loss(params, stop=never) → the mean over the first `train.eval_images` images; None if
      stop() becomes true.
    """
    loss_fn = make_loss(config, model, schedule)
    count = min(config.train.eval_images, source.size)
    size = config.train.batch_size // config.optim.accumulate  # all at once do not fit in memory
    num_timesteps = schedule.num_timesteps

    def batch_loss(params, batch, indices, t):
        x0, keys = images.to_float(batch.images), step_keys(EVAL_SEED, 0, indices)
        _, eps, *_ = draw(keys, x0.shape[1:], num_timesteps)
        loss = loss_fn(params, x0, batch.labels, t, eps)
        return jax.lax.psum(jnp.sum(jnp.where(indices < count, loss, 0)), parallel.AXIS)

    batch_loss = parallel.pmap(batch_loss, in_axes=(None, 0, 0, 0), out_axes=None)

    def eval_loss(params, stop=signals.never):
        total = 0.0
        for first in range(0, count, size):
            indices = parallel.local_shard(first + np.arange(size))  # from `count` on: padding
            inside = np.minimum(indices, count - 1)
            # The middles of `count` equal parts of the chain. The product may need 64 bits.
            t = (2 * inside + 1) * num_timesteps // (2 * count)
            batch = parallel.shard((source.read(inside), indices, t))
            total += float(batch_loss(params, *batch))
            if stop():
                return None
        return total / count

    return eval_loss
