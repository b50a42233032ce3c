"""Checkpoints: Orbax, asynchronous, whole or not there.

Step s lives in <workdir>/checkpoints/<s>/, as three items (params, ema_params, opt_state), so that
sampling reads only the one it needs, and the digest of each, because Orbax does not notice a
flipped bit. A checkpoint that was being written when its process died has a temporary name and does
not count; one that was damaged later is passed over, for the one before it.
"""

import contextlib
import hashlib
import logging
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ddpm_jax import parallel, unet
from ddpm_jax.config import image_shape
from ddpm_jax.errors import UserError, is_disk_full, one_line

log = logging.getLogger(__name__)

ITEMS = ("params", "ema_params", "opt_state")
DIGESTS = "digests"


def digest(tree):
    """sha256 of a tree of arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def open_manager(workdir, train):
    """Yields a CheckpointManager that keeps the newest few and every Nth.

    Args:
      workdir: the run's folder.
      train: the config's section: keep_checkpoints, keep_every (0: none for ever).

    Raises:
      UserError: if the disk is full, be it while a checkpoint is written.
    """
    keep = [preservation_policy.LatestN(train.keep_checkpoints)]
    if train.keep_every:
        keep.append(preservation_policy.EveryNSteps(train.keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
    )
    try:
        with _manager(workdir, options) as manager:
            yield manager
    except (OSError, ValueError) as error:  # of Orbax's threads, ValueErrors
        if not is_disk_full(error):
            raise
        raise _disk_full(workdir) from None


def save(manager, step, state):
    """Starts writing a state; training may go on at once. Saving a step again does nothing.

    Raises:
      UserError: if there is no room for it.
    """
    if step in manager.all_steps():
        return
    items = {name: getattr(state, name) for name in ITEMS}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    room = shutil.disk_usage(manager.directory).free if parallel.is_first() else size
    if parallel.of_first(room < size):
        text = f"a checkpoint takes {size / 2**20:.0f} MiB"
        raise _disk_full(pathlib.Path(manager.directory).parent, text)
    manager.save(step, args=_to_save(parallel.as_global(items)))


def _disk_full(workdir, text=""):
    saved = latest_step(workdir)
    rest = "no checkpoint was saved" if saved is None else f"step {saved} is saved"
    return UserError(f"workdir={workdir}: no space left on the disk; {text and text + '; '}{rest}")


def restore(manager, state):
    """Reads the newest checkpoint that is whole; damaged ones before it are renamed.

    Args:
      manager: from open_manager.
      state: a TrainState of the wanted shapes and shardings.

    Returns:
      The TrainState of that checkpoint, or `state` itself where there is none.

    Raises:
      UserError: if there are only damaged ones.
    """
    items = {name: getattr(state, name) for name in ITEMS}
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, parallel.as_global(items))
    step, restored, damaged = _newest_whole(
        manager,
        lambda step: like if step > 0 else {"params": like["params"]},  # see save_imported
    )
    if step is None:
        return state
    if parallel.is_first():
        for name in map(str, damaged):  # their steps will be saved again
            path = pathlib.Path(manager.directory) / name
            path.rename(path.with_name(f"{name}.damaged.{time.time_ns()}"))
    parallel.barrier()
    if damaged:
        manager.reload()
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
    with _manager(workdir) as manager:
        manager.save(0, args=_to_save({"params": params}))


def latest_step(workdir):
    """The step of the newest checkpoint, or None where there is none."""
    folder = _folder(workdir)
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def restore_params(config, workdir):
    """Reads the parameters (EMA or raw, `sample.use_ema`) of the newest checkpoint that is whole.

    Returns:
      (step, params), the parameters on all devices.

    Raises:
      UserError: if there is no such checkpoint.
    """
    if latest_step(workdir) is None:
        raise UserError(f"workdir={workdir}: has no checkpoint yet; train it first")
    params = unet.param_shapes(unet.make_model(config), image_shape(config))
    here = parallel.replicated(jax.devices())  # those they were saved from may not exist
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), params)

    def like_of(step):
        return {"ema_params" if config.sample.use_ema and step > 0 else "params": params}

    with _manager(workdir) as manager:
        step, restored, _ = _newest_whole(manager, like_of)
    (params,) = restored.values()
    return step, params


def _folder(workdir):
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _manager(workdir, options=None):
    return ocp.CheckpointManager(_folder(workdir), options=options, item_names=(*ITEMS, DIGESTS))


def _to_save(items):
    """Orbax's arguments for {name: tree}, and their digests."""
    digests = ocp.args.JsonSave({name: digest(tree) for name, tree in items.items()})
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**trees, **{DIGESTS: digests})


def _newest_whole(manager, like_of):
    """Reads the newest checkpoint whose files can be read, and hold what was saved.

    Args:
      manager: a CheckpointManager.
      like_of: a step to {item: tree of shapes and shardings}.

    Returns:
      (step, {item: tree}, steps of the damaged ones that are newer); step is None where there is
      no checkpoint at all.

    Raises:
      UserError: if all are damaged.
    """
    damaged, error = [], None
    for step in sorted(manager.all_steps(), reverse=True):
        found, error = _read_whole(manager, step, like_of(step))
        if not int(parallel.largest(error is not None)):
            return step, parallel.as_local(found), damaged
        damaged.append(step)
        log.warning("the checkpoint of step %d is damaged (%s)", step, error or "elsewhere")
    if damaged:
        raise UserError(f"{manager.directory}: no checkpoint is whole; the last error: {error}")
    return None, {}, []


def _read_whole(manager, step, like):
    """({item: tree}, None), or (None, what is wrong with it)."""
    items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    if (pathlib.Path(manager.directory) / str(step) / DIGESTS).exists():  # not in older runs
        items[DIGESTS] = ocp.args.JsonRestore()
    try:
        found = dict(manager.restore(step, args=ocp.args.Composite(**items)))
    except jax.errors.JaxRuntimeError:
        raise  # of a device or a process, not of a file
    except Exception as error:  # Orbax raises this very class, among others
        return None, f"{type(error).__name__}: {one_line(error)[:200]}"
    digests = found.pop(DIGESTS, {})
    wrong = [name for name in digests if name in found and digest(found[name]) != digests[name]]
    return (None, f"{', '.join(wrong)} is not what was saved") if wrong else (found, None)
