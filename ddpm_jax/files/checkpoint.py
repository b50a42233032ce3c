"""Checkpoints: written by Orbax, asynchronously and atomically.

<workdir>/checkpoints/<step>/ has an item for each tree: params, ema_params, opt_state; more EMAs
and a history of losses, where the config wants them. So sampling restores only one of them.
A checkpoint has a temporary name until it is complete. If it is damaged later, the
checkpoint before it is used: sha256.json has a digest of each file, because Orbax does not detect
flipped bits.
"""

import contextlib
import glob
import hashlib
import json
import logging
import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ddpm_jax import configs, parallel
from ddpm_jax.core import unet
from ddpm_jax.errors import UserError, is_disk_full
from ddpm_jax.files import run_files

log = logging.getLogger(__name__)

EMA, HISTORY = "ema_params", "loss_history"
ITEMS = ("params", EMA, "opt_state")  # of every checkpoint; see _items_of
DIGESTS = "sha256.json"
NONE, ALL_DAMAGED = -1, -2  # instead of a step
RESERVE = 2**23  # bytes for everything on the disk except a checkpoint's arrays

NEEDED = ("_METADATA", "manifest.ocdbt", "d")  # files of an item, without which it cannot be read
# What Orbax takes for a bucket's name, and TensorStore for a slash.
MISREAD = re.compile(r"gs:/|^/(gs|s3|az|hf)(/|$)|\\")


class LiteralPath(type(epath.Path())):
    """A path for Orbax whose `glob` takes only its argument for a pattern.

    epath's own takes the path for one as well. In a folder called lr[1e-4] Orbax would not find the
    files it has just written, and leave a checkpoint without the manifest that it reads it by.
    """

    def glob(self, pattern):
        return (self / name for name in glob.glob(pattern, root_dir=self))


class Best:
    """A preservation policy of Orbax: it keeps the checkpoint with the best score so far."""

    def __init__(self, workdir):
        self.workdir = workdir

    def should_preserve(self, checkpoints, *, context):
        """Whether to keep each of these checkpoints; Orbax calls it after a save."""
        steps = [info.step for info in checkpoints]
        best = run_files.best_step(self.workdir, steps)
        return [step == best for step in steps]


@contextlib.contextmanager
def open_manager(workdir, train):
    """Yields a CheckpointManager that keeps the newest checkpoints, every Nth step, and the best.

    Args:
      workdir: the run's folder.
      train: the config's section: keep_checkpoints, keep_every (0: none), keep_best.

    Raises:
      UserError: if the disk is full, also while a checkpoint is written.
    """
    keep = [preservation_policy.LatestN(train.keep_checkpoints)]
    if train.keep_every:
        keep.append(preservation_policy.EveryNSteps(train.keep_every))
    if train.keep_best:
        keep.append(Best(workdir))
    policy = preservation_policy.AnyPreservationPolicy(keep)
    try:
        with _manager(workdir, preservation_policy=policy) as manager:
            yield manager
    except (OSError, ValueError) as error:  # Orbax's threads raise ValueErrors
        if not is_disk_full(error):
            raise
        raise _disk_full(workdir) from None


def save(manager, step, state):
    """Starts to write a state in the background; does nothing if the step is already saved.

    Raises:
      UserError: if the disk has not enough space.
    """
    if step in manager.all_steps():
        return
    items = _items_of(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    free = shutil.disk_usage(manager.directory).free if parallel.is_first() else 0
    if parallel.broadcast_from_first(free < size + RESERVE):
        manager.wait_until_finished()  # the previous checkpoint
        text = f"a checkpoint takes {size / 2**20:.0f} MiB"
        raise _disk_full(pathlib.Path(manager.directory).parent, text)
    manager.save(step, args=_to_save(parallel.as_global(items)))


def _disk_full(workdir, text=""):
    saved = latest_step(workdir)
    state = "no checkpoint was saved" if saved is None else f"step {saved} is saved"
    return UserError(f"workdir={workdir}: no space left on the disk; {text and text + '; '}{state}")


def restore(manager, state):
    """Reads the newest undamaged checkpoint; renames newer, damaged ones.

    Args:
      manager: from open_manager.
      state: a TrainState with the shapes and shardings.

    Returns:
      The TrainState of this checkpoint; `state` itself if there are no checkpoints.

    Raises:
      UserError: if all checkpoints are damaged.
    """
    step = _newest_undamaged(manager.directory)
    if step is None:
        return state
    _rename_damaged(manager, step)
    items = _items_of(state)
    if step == 0:
        items = {"params": state.params}
    elif not (manager.directory / str(step) / HISTORY).exists():  # of a run with other timesteps
        items.pop(HISTORY, None)
    restored = _restore(manager, step, parallel.as_global(items))
    averages = [
        restored.pop(ema_item(index), None) or jax.tree.map(jnp.copy, restored["params"])
        for index in range(len(state.ema_params))
    ]
    step = jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding)
    return state.replace(step=step, ema_params=tuple(averages), **restored)


def _items_of(state):
    """The items of a TrainState: {name: tree}."""
    averages = {ema_item(index): tree for index, tree in enumerate(state.ema_params)}
    items = {"params": state.params, **averages, "opt_state": state.opt_state}
    return items if state.loss_history is None else items | {HISTORY: state.loss_history}


def ema_item(index):
    """The item's name of the EMA with one of optim.ema_decay, from 0."""
    return f"{EMA}_{index + 1}" if index else EMA


def save_imported(workdir, params):
    """Writes imported parameters as step 0.

    This checkpoint has only `params`: `restore` copies them to the EMA, with a new optimizer state.

    Args:
      workdir: the run's folder, without checkpoints.
      params: a tree of arrays.
    """
    with _manager(workdir) as manager:
        manager.save(0, args=_to_save({"params": params}))


def latest_step(workdir):
    """The step of the newest checkpoint, or None."""
    return max(_steps(_folder(workdir)), default=None)


def chosen_step(config, workdir):
    """The step that `sample.checkpoint` chooses: the newest undamaged, the best, or a given one.

    Raises:
      UserError: if there is no such checkpoint, or it is damaged.
    """
    chosen, folder = config.sample.checkpoint, _folder(workdir)
    if chosen == "newest":
        newest = _newest_undamaged(folder)  # of the first process's listing
        if newest is None:
            raise UserError(f"workdir={workdir}: has no checkpoint yet; train it first")
        return newest
    steps = _steps(folder)
    if chosen == "best" and not steps:
        raise UserError(f"workdir={workdir}: has no checkpoint yet; train it first")
    found = run_files.best_step(workdir, steps) if chosen == "best" else int(chosen)
    if found is None:
        text = "no checkpoint has a score; train with train.score_every"
        raise UserError(f"sample.checkpoint='best': {text}")
    _check_step(f"sample.checkpoint={chosen!r}", found, workdir)
    return found


def check_steps(steps, workdir):
    """Raises a UserError unless there are undamaged checkpoints of `evaluate.steps`."""
    for step in steps:
        _check_step(f"evaluate.steps={steps}", step, workdir)


def _check_step(field, step, workdir):
    folder = pathlib.Path(_folder(workdir))
    steps = _steps(folder)
    if step not in steps:
        text = f"the checkpoints of {workdir} are {', '.join(map(str, steps)) or 'not there yet'}"
        raise UserError(f"{field}: step {step} is not there; {text}")
    if damage := _damage(folder / str(step)):
        raise UserError(f"{field}: step {step} is damaged: {damage}")


def restore_params(config, workdir):
    """Reads the parameters (EMA or raw, `sample.use_ema`) of a checkpoint, `sample.checkpoint`.

    Returns:
      (step, params), replicated over all devices.

    Raises:
      UserError: if there is no such checkpoint, or it has another network.
    """
    step = chosen_step(config, workdir)
    params = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    sharding = parallel.replicated(jax.devices())  # the devices of the training may not exist
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding), params
    )
    use_ema = config.sample.use_ema and step > 0
    name = ema_item(configs.ema_index(config)) if use_ema else "params"
    # Compare the shapes here: Orbax's own error is long, and comes from several threads.
    with _quiet():
        stored = ocp.StandardCheckpointer().metadata(_folder(workdir) / str(step) / name)
    stored_shapes, shapes = (
        jax.tree.map(lambda array: array.shape, tree)
        for tree in (stored.item_metadata.tree, params)
    )
    if stored_shapes != shapes:
        text = "its config.json and its checkpoint have different networks"
        raise UserError(f"workdir={workdir}: {text}")
    with ocp.CheckpointManager(_folder(workdir), item_names=(name,)) as manager:
        return step, _restore(manager, step, {name: params})[name]


def check_path(workdir):
    """Raises a UserError if a folder's path is one in which Orbax cannot keep checkpoints."""
    path = pathlib.Path(workdir).absolute()
    found = MISREAD.search(str(path))
    if found:
        raise UserError(
            f"workdir={workdir}: no checkpoint can be in {path} because of its {found[0]}; "
            r"allowed are paths without \ and gs:/ that do not begin with /gs, /s3, /az or /hf"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError:
        text = f"no checkpoint can be in {path}, whose name is not UTF-8"
        raise UserError(f"workdir={workdir}: {text}") from None


@contextlib.contextmanager
def _quiet():
    """Suppresses Orbax's warning about a file that only its other checkpointers write."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _folder(workdir):
    check_path(workdir)
    return LiteralPath(pathlib.Path(workdir).absolute(), "checkpoints")


def _manager(workdir, **options):
    """A CheckpointManager that adds DIGESTS to a checkpoint, before it gets its final name."""

    def write_digests():
        if parallel.is_first():
            (unfinished,) = pathlib.Path(_folder(workdir)).glob("*.orbax-checkpoint-tmp")
            digests = {name: _digest(unfinished / name) for name in _files(unfinished)}
            missing = _missing(int(unfinished.stem), digests)
            if missing:
                raise RuntimeError(f"Orbax did not finish {unfinished}: {missing}")
            (unfinished / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")

    options = ocp.CheckpointManagerOptions(
        **options,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=write_digests),
    )
    return ocp.CheckpointManager(_folder(workdir), options=options)


def _steps(folder):
    """The steps of all checkpoints, ascending."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def _files(folder):
    """The names of all items' files, from the checkpoint's folder."""
    return [str(p.relative_to(folder)) for p in folder.glob("*/**/*") if p.is_file()]


def _missing(step, files):
    """What a checkpoint with these files would need to be restored; empty if nothing."""
    items = ITEMS if step > 0 else ITEMS[:1]  # one of step 0 was imported, and has no more
    for needed in (f"{item}/{name}" for item in items for name in NEEDED):
        if not any(name == needed or name.startswith(f"{needed}/") for name in files):
            return f"{needed} is missing"
    return ""


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_save(items):
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**trees)


def _restore(manager, step, template):
    """Reads the items of a checkpoint; `template` has their shapes and shardings."""
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    trees = {name: ocp.args.StandardRestore(tree) for name, tree in template.items()}
    return parallel.as_local(dict(manager.restore(step, args=ocp.args.Composite(**trees))))


def _newest_undamaged(folder):
    """The step of the newest undamaged checkpoint, or None if there are no checkpoints.

    Raises:
      UserError: if all are damaged.
    """
    local = _search(pathlib.Path(folder)) if parallel.is_first() else NONE
    step = parallel.broadcast_from_first(local)
    if step == ALL_DAMAGED:
        raise UserError(f"{folder}: all checkpoints are damaged")
    return None if step == NONE else step


def _search(folder):
    """The newest undamaged step, or NONE, or ALL_DAMAGED."""
    while True:
        steps = _steps(folder)
        with_digests = [step for step in steps if (folder / str(step) / DIGESTS).exists()]
        deleted = False
        for step in reversed(steps):
            damage = _damage(folder / str(step))
            if any(step > other for other in with_digests) and step not in with_digests:
                damage = f"{DIGESTS} is missing"  # runs of old versions have no digests at all
            if not (folder / str(step)).exists():
                deleted = True  # by a training process, which has saved a newer one
            elif not damage:
                return step
            else:
                log.warning("the checkpoint of step %d is damaged: %s", step, damage)
        if not deleted:
            return ALL_DAMAGED if steps else NONE


def _damage(folder):
    """Describes the damage of a checkpoint; empty if there is none."""
    step = int(folder.name)
    try:
        if not (folder / DIGESTS).exists():
            return _missing(step, _files(folder))
        digests = json.loads((folder / DIGESTS).read_text())
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (AttributeError, ValueError):
        return f"{DIGESTS} cannot be read"
    return _missing(step, digests)


def _rename_damaged(manager, step):
    """Renames the damaged checkpoints after a step, so that these steps can be saved again."""
    later = [s for s in manager.all_steps() if s > step]
    if later and parallel.is_first():
        for path in (pathlib.Path(manager.directory) / str(s) for s in later):
            path.rename(path.with_name(f"{path.name}.damaged.{time.time_ns()}"))
    parallel.barrier()
    manager.reload()
