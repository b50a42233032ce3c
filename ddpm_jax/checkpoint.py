"""Checkpoints: Orbax, asynchronous, whole or not there.

Step s lives in <workdir>/checkpoints/<s>/, as three items (params, ema_params, opt_state), so that
sampling reads only the one it needs. A checkpoint that was being written when its process died has
a temporary name and does not count.
"""

import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ddpm_jax import parallel, unet
from ddpm_jax.config import image_shape
from ddpm_jax.errors import UserError

ITEMS = ("params", "ema_params", "opt_state")


def open_manager(workdir, train):
    """A CheckpointManager that keeps the newest few and every Nth.

    Args:
      workdir: the run's folder.
      train: the config's section: keep_checkpoints, keep_every (0: none for ever).
    """
    keep = [preservation_policy.LatestN(train.keep_checkpoints)]
    if train.keep_every:
        keep.append(preservation_policy.EveryNSteps(train.keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(_folder(workdir), options=options, item_names=ITEMS)


def save(manager, step, state):
    """Starts writing a state; training may go on at once. Saving a step again does nothing."""
    if step not in manager.all_steps():
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ITEMS}
        manager.save(step, args=ocp.args.Composite(**items))


def restore(manager, state):
    """Reads the newest checkpoint.

    Args:
      manager: from open_manager.
      state: a TrainState of the wanted shapes and shardings.

    Returns:
      The TrainState of that checkpoint, or `state` itself where there is none.
    """
    step = manager.latest_step()
    if step is None:
        return state
    items = {
        name: ocp.args.StandardRestore(
            jax.tree.map(ocp.utils.to_shape_dtype_struct, getattr(state, name))
        )
        for name in (ITEMS if step > 0 else ITEMS[:1])  # see save_imported
    }
    restored = dict(manager.restore(step, args=ocp.args.Composite(**items)))
    if step == 0:
        restored["ema_params"] = jax.tree.map(jnp.copy, restored["params"])
    step = jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding)
    return state.replace(step=step, **restored)


def save_imported(workdir, params):
    """Writes parameters that were not trained here as step 0.

    That is all it holds: the EMA starts as a copy, and the optimizer as fresh as in any run.

    Args:
      workdir: the run's folder; has no checkpoint.
      params: a tree of arrays.
    """
    with ocp.CheckpointManager(_folder(workdir), item_names=ITEMS) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))


def latest_step(workdir):
    """The step of the newest checkpoint, or None where there is none."""
    folder = _folder(workdir)
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def restore_params(config, workdir):
    """Reads the parameters (EMA or raw, `sample.use_ema`) of the newest checkpoint.

    Returns:
      (step, params), the parameters on all devices.

    Raises:
      UserError: if there is no checkpoint.
    """
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"workdir={workdir}: has no checkpoint yet; train it first")
    params = unet.param_shapes(unet.make_model(config), image_shape(config))
    here = parallel.replicated()  # not where they were saved: those devices may not exist
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), params)
    name = "ema_params" if config.sample.use_ema and step > 0 else "params"
    with ocp.CheckpointManager(_folder(workdir), item_names=ITEMS) as manager:
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore(params)})
        return step, manager.restore(step, args=items)[name]


def _folder(workdir):
    return pathlib.Path(workdir).absolute() / "checkpoints"
