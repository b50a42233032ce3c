"""The training state, and how an update changes it."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddpm_jax import configs, cpu
from ddpm_jax.core import timesteps


@flax.struct.dataclass
class TrainState:
    """The state of training. It has no PRNG key: noise depends only on (seed, step, example), so
    that resuming is exact."""

    step: jax.Array  # int32, updates done so far
    params: Any
    ema_params: tuple  # exponential moving averages of params, one for each decay
    opt_state: optax.OptState
    loss_history: timesteps.LossHistory | None = None  # for sampling t by importance


def learning_rate(optim, num_steps):
    """Linear warm-up from 0, then constant, or a cosine to 0 at the last step.

    As in Ho's code, update n (from 0) has n / warmup_steps of the rate, so the first update is 0.

    Args:
      optim: the config's section: learning_rate, warmup_steps, decay.
      num_steps: updates in the whole run.

    Returns:
      A function of n.
    """
    decay_steps = max(num_steps - optim.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(optim.learning_rate),
        "cosine": optax.cosine_decay_schedule(optim.learning_rate, decay_steps),
    }[optim.decay]
    warmup = optax.linear_schedule(0, optim.learning_rate, max(optim.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def make_optimizer(optim, num_steps):
    """Gradient clipping by global norm, then Adam (Kingma & Ba 2015), or AdamW with weight_decay.

    Args:
      optim: the config's section; grad_clip = 0 clips nothing.
      num_steps: updates in the whole run.

    Returns:
      An optax transformation.
    """
    clip = optax.clip_by_global_norm(optim.grad_clip) if optim.grad_clip else optax.identity()
    rate = learning_rate(optim, num_steps)
    return optax.chain(clip, optax.adamw(rate, weight_decay=optim.weight_decay))


def create_state(config, model, optimizer):
    """The state before the first step: parameters from the seed, and EMAs equal to them.

    Args:
      config: its seed, the images' shape, the number of EMAs and train.timesteps are used.
      model: a linen module, called as model(x_t, t).
      optimizer: an optax transformation.

    Returns:
      A TrainState at step 0.
    """
    image_shape, num_averages = configs.image_shape(config), len(configs.ema_decays(config.optim))
    of_importance = config.train.timesteps == "importance"  # nothing else needs the losses
    # It runs once: on a CPU a third of the compilation time, for the same bits.
    options = {"xla_backend_optimization_level": 0} if cpu.is_used() else {}

    @functools.partial(jax.jit, compiler_options=options)
    def create(key):
        x, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
        params = model.init(key, x, t)["params"]
        total = config.diffusion.num_timesteps
        history = timesteps.empty_history(total) if of_importance else None
        step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
        # Copies, not aliases: all are donated to the train step.
        ema_params = tuple(jax.tree.map(jnp.copy, params) for _ in range(num_averages))
        return TrainState(step, params, ema_params, opt_state, history)

    return create(jax.random.key(config.seed))


def apply_gradients(state, grads, optimizer, ema_decays, applies=True):
    """One update: optimizer, then ema = decay · ema + (1 - decay) · params (no bias correction).

    There is one EMA for each of `ema_decays`. If `applies` is false, only `step` changes.
    """
    step = state.step + 1

    def apply(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = tuple(
            optax.incremental_update(params, average, 1 - decay)
            for average, decay in zip(state.ema_params, ema_decays, strict=True)
        )
        return state.replace(step=step, params=params, ema_params=ema_params, opt_state=opt_state)

    def keep(state, grads):
        return state.replace(step=step)

    # On a CPU, selecting between both results nearly doubles the update's time (60 and 110 ms for
    # CIFAR-10's network). On a GPU, a branch would wait for `applies`.
    if cpu.is_used():
        return jax.lax.cond(applies, apply, keep, state, grads)
    choose = functools.partial(jnp.where, applies)
    return jax.tree.map(choose, apply(state, grads), keep(state, grads))
