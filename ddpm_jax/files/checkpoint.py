"""Checkpoints: Orbax, asynchronous, whole or not there.

Step s lives in <workdir>/checkpoints/<s>/, as three items (params, ema_params, opt_state), so that
sampling reads only the one it needs. A checkpoint that was being written when its process died has
a temporary name and does not count. One that was damaged later is passed over for the one before
it: sha256.json has a digest of each file, because Orbax reads flipped bits without a word.
"""

import contextlib
import glob
import hashlib
import json
import logging
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ddpm_jax import configs, parallel
from ddpm_jax.configs import image_shape
from ddpm_jax.core import unet
from ddpm_jax.errors import UserError, is_disk_full

log = logging.getLogger(__name__)

ITEMS = ("params", "ema_params", "opt_state")
DIGESTS = "sha256.json"
NONE, ALL_DAMAGED = -1, -2  # no step of a checkpoint
ROOM = 2**23  # bytes that a checkpoint and the run's other files may take besides the arrays


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
    policy = preservation_policy.AnyPreservationPolicy(keep)
    try:
        with _manager(workdir, preservation_policy=policy) as manager:
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
    free = shutil.disk_usage(manager.directory).free if parallel.is_first() else 0
    if parallel.of_first(free < size + ROOM):
        manager.wait_until_finished()  # for the one before it
        text = f"a checkpoint takes {size / 2**20:.0f} MiB"
        raise _disk_full(pathlib.Path(manager.directory).parent, text)
    manager.save(step, args=_to_save(parallel.as_global(items)))


def _disk_full(workdir, text=""):
    saved = latest_step(workdir)
    rest = "no checkpoint was saved" if saved is None else f"step {saved} is saved"
    return UserError(f"workdir={workdir}: no space left on the disk; {text and text + '; '}{rest}")


def restore(manager, state):
    """Reads the newest checkpoint that is whole; newer ones are renamed.

    Args:
      manager: from open_manager.
      state: a TrainState of the wanted shapes and shardings.

    Returns:
      The TrainState of that checkpoint, or `state` itself where there is none.

    Raises:
      UserError: if there are only damaged ones.
    """
    step = _newest_whole(manager.directory)
    if step is None:
        return state
    _put_damaged_aside(manager, step)
    items = {name: getattr(state, name) for name in (ITEMS if step > 0 else ITEMS[:1])}
    restored = _restore(manager, step, parallel.as_global(items))
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
      UserError: if there is no such checkpoint, or it is of another network.
    """
    step = _newest_whole(_folder(workdir))
    if step is None:
        raise UserError(f"workdir={workdir}: has no checkpoint yet; train it first")
    params = unet.param_shapes(configs.make_model(config), image_shape(config))
    here = parallel.replicated(jax.devices())  # those they were saved from may not exist
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), params)
    name = "ema_params" if config.sample.use_ema and step > 0 else "params"
    # Orbax would say so at length, from several threads.
    with _quiet():
        stored = ocp.StandardCheckpointer().metadata(_folder(workdir) / str(step) / name)
    there, wanted = (
        jax.tree.map(lambda array: array.shape, tree)
        for tree in (stored.item_metadata.tree, params)
    )
    if there != wanted:
        text = "its config.json describes another network than its checkpoint holds"
        raise UserError(f"workdir={workdir}: {text}")
    with ocp.CheckpointManager(_folder(workdir), item_names=ITEMS) as manager:
        return step, _restore(manager, step, {name: params})[name]


@contextlib.contextmanager
def _quiet():
    """Without Orbax's warning of a file that only its other checkpointers write."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _folder(workdir):
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _manager(workdir, **options):
    """A CheckpointManager that writes DIGESTS into what it saves, before that gets its name."""

    def write_digests():
        if parallel.is_first():
            (unfinished,) = _folder(workdir).glob("*.orbax-checkpoint-tmp")
            for item in (path for path in unfinished.iterdir() if path.name in ITEMS):
                if lacks := _lacks(item):
                    raise RuntimeError(f"{item}: Orbax has not written {lacks}")
            files = (p for p in unfinished.glob("*/**/*") if p.is_file())
            digests = {str(p.relative_to(unfinished)): _digest(p) for p in files}
            (unfinished / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")

    options = ocp.CheckpointManagerOptions(
        **options,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=write_digests),
    )
    # With OCDBT, Orbax looks for each process's files by a pattern that is the path itself.
    folder = _folder(workdir)
    use_ocdbt = str(folder) == glob.escape(str(folder))
    handlers = {name: ocp.StandardCheckpointHandler(use_ocdbt=use_ocdbt) for name in ITEMS}
    return ocp.CheckpointManager(folder, options=options, item_names=ITEMS, item_handlers=handlers)


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_save(items):
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**trees)


def _restore(manager, step, like):
    """Reads the items of a checkpoint; `like` has their shapes and shardings."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    trees = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    return parallel.as_local(dict(manager.restore(step, args=ocp.args.Composite(**trees))))


def _newest_whole(folder):
    """The newest step whose files are those that were written, or None where there is no step.

    Raises:
      UserError: if all are damaged.
    """
    step = parallel.of_first(_search(pathlib.Path(folder)) if parallel.is_first() else NONE)
    if step == ALL_DAMAGED:
        raise UserError(f"{folder}: all checkpoints are damaged")
    return None if step == NONE else step


def _search(folder):
    """The newest whole step, or NONE, or ALL_DAMAGED."""
    while True:
        steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
        with_digests = [step for step in steps if (folder / str(step) / DIGESTS).exists()]
        gone = False
        for step in sorted(steps, reverse=True):
            wrong = _damage(folder / str(step))
            if any(step > other for other in with_digests) and step not in with_digests:
                wrong = f"{DIGESTS} is missing"  # older runs have none at all
            if not (folder / str(step)).exists():
                gone = True  # the run that is being trained has deleted it, and has a newer one
            elif not wrong:
                return step
            else:
                log.warning("the checkpoint of step %d is damaged: %s", step, wrong)
        if not gone:
            return ALL_DAMAGED if steps else NONE


def _damage(folder):
    """What is wrong with the files of a checkpoint; empty if nothing is."""
    try:
        if (folder / DIGESTS).exists():
            for name, digest in json.loads((folder / DIGESTS).read_text()).items():
                if _digest(folder / name) != digest:
                    return f"{name} is not what was written"
        for name in ITEMS if folder.name != "0" else ITEMS[:1]:
            if lacks := _lacks(folder / name):
                return f"{name}/{lacks} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError:
        return f"{DIGESTS} cannot be read"
    return ""


def _lacks(item):
    """A file that Orbax needs to read an item, and that is not there; empty if nothing lacks."""
    if not (item / "_METADATA").exists():
        return "_METADATA"
    metadata = json.loads((item / "_METADATA").read_text())
    if metadata.get("use_ocdbt", True):
        names = ["manifest.ocdbt", "d"]
    else:
        leaves = metadata["tree_metadata"].values()
        arrays = (leaf for leaf in leaves if not leaf["value_metadata"]["skip_deserialize"])
        keys = (leaf["key_metadata"] for leaf in arrays)
        names = [".".join(key["key"] for key in path) + "/.zarray" for path in keys]
    return next((name for name in names if not (item / name).exists()), "")


def _put_damaged_aside(manager, step):
    """Renames the checkpoints after this step, which will be saved again; deletes nothing."""
    later = [s for s in manager.all_steps() if s > step]
    if later and parallel.is_first():
        for path in (pathlib.Path(manager.directory) / str(s) for s in later):
            path.rename(path.with_name(f"{path.name}.damaged.{time.time_ns()}"))
    parallel.barrier()
    manager.reload()
