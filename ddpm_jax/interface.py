"""The Python interface: functions for notebooks and other programs."""

import functools
import logging
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ddpm_jax import checks, compilation, configs, cpu, parallel
from ddpm_jax.core import diffusion
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint as checkpoints
from ddpm_jax.files import data, run_files
from ddpm_jax.runs import generate, interop, samplers
from ddpm_jax.runs import train as training

log = logging.getLogger(__name__)

# The fields of a config's section `sample` that the function `sample` takes.
OPTIONS = """
    seed label guidance classifier sampler order num_steps spacing eta dynamic_threshold batch_size
""".split()


class Run(NamedTuple):
    """A trained network and its config."""

    config: ConfigDict
    step: int  # updates; 0 for imported weights
    params: Any  # of the network, a tree of float32 arrays: their EMA or the raw ones
    label_names: tuple[str, ...]  # of each class; empty if unconditional

    def sample(self, num_samples: int, **options) -> np.ndarray:
        """Generates images; see ddpm_jax.sample."""
        return sample(self, num_samples, **options)

    def predict(self, x_t, t, labels=None) -> tuple[jax.Array, jax.Array]:
        """The network's prediction at x_t, for custom samplers; may be jitted.

        Args:
          x_t: [B, H, W, C] float32, an image diffused to step t (Eq. 4).
          t: [B] or a scalar, int, in [0, T); 0 is the last denoising step.
          labels: [B] int in [0, K), for a network with K classes; K or None: the null class.

        Returns:
          x0: [B, H, W, C], the predicted image; clipped to [-1, 1] if diffusion.clip_x0.
          log_variance: of p(x_{t-1} | x_t), [B, 1, 1, 1], or of x0's shape if it is learned.

        Raises:
          UserError: for a classifier; for arrays of other shapes or kinds, labels for an
            unconditional network, or none for a network without a null class; for t or labels out
            of range, unless they are traced.
        """
        shape, num_classes = configs.image_shape(self.config), self.config.data.num_classes
        if self.config.model.kind != "unet":
            raise UserError("model.kind='classifier': a classifier predicts no image")
        if jnp.ndim(x_t) != 4 or jnp.shape(x_t)[1:] != shape:
            raise UserError(f"x_t: has shape {jnp.shape(x_t)}, not [B, {str(shape)[1:-1]}]")
        if not jnp.issubdtype(jnp.result_type(x_t), jnp.floating):
            raise UserError(f"x_t: is {jnp.result_type(x_t)}, not float32")
        if labels is not None and not num_classes:
            raise UserError("labels: this model is unconditional (data.num_classes=0)")
        if labels is None and num_classes and not self.config.model.null_class:
            raise UserError("labels: must be given; model.null_class=False, there is no null class")
        count = len(x_t)
        _check_numbers("t", t, self.config.diffusion.num_timesteps, ((), (1,), (count,)))
        if labels is not None:
            stop = num_classes + self.config.model.null_class
            _check_numbers("labels", labels, stop, ((count,),))
        schedule = configs.make_schedule(self.config)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), jnp.shape(x_t)[:1])
        if num_classes:
            labels = jnp.full(t.shape, num_classes) if labels is None else jnp.asarray(labels)
        predict_fn = samplers.predict_for(self.config, schedule, self.params, labels)
        variance = self.config.diffusion.variance
        p = diffusion.p_mean_variance(schedule, predict_fn, x_t, t, variance=variance)
        return p.x0_pred, p.log_variance


def _check_numbers(name, values, stop, shapes):
    """Refuses all but whole numbers in [0, stop); those that are traced have no values yet."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    kind, shape = values.dtype, values.shape
    if not jnp.issubdtype(kind, jnp.integer) or shape not in shapes:
        raise UserError(f"{name}: {kind} {list(shape)}, not whole numbers {list(shapes[-1])}")
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    for value in values[(values < 0) | (values >= stop)].flat:
        raise UserError(f"{name}: {value}; must be from 0 to {stop - 1}")


def config(name: str | None = None) -> ConfigDict:
    """A config for training; set its fields as needed. A misspelt field is an error.

    Args:
      name: the name of a config of this package, as "digits", "mnist", "cifar10"; or the path of a
        config file. None: the defaults, Ho et al.'s CIFAR-10 model.

    Returns:
      A ConfigDict; ddpm_jax/configs.py has a comment for each field.

    Raises:
      UserError: if there is no such config.
    """
    return configs.default_config() if name is None else configs.named_config(name)


def load(
    path: str | os.PathLike,
    use_ema: bool = True,
    ema_decay: float = 0.0,
    checkpoint: str | int = "newest",
) -> Run:
    """Reads a run's checkpoint, or the weights in a folder in diffusers' format.

    Args:
      path: the folder of a run; or one with diffusers' UNet2DModel, or with a pipeline that has
        one.
      use_ema: read the EMA of the parameters; False: the raw ones.
      ema_decay: which EMA, if the run has several; 0: the first.
      checkpoint: "newest"; "best", the one with the best score during training; or a step.

    Returns:
      A Run.

    Raises:
      UserError: if the folder is neither, or cannot be read.
    """
    compilation.keep_programs()
    path = pathlib.Path(configs.at_home("path", path))
    if not (path / "checkpoints").is_dir() and interop.is_diffusers(path):
        cpu.prepare()
        config, params = interop.read_run(configs.without_data(), path)
        return Run(config, 0, parallel.replicate(params), generate.class_names(config, path))
    config = run_files.saved_config(path)
    cpu.prepare(configs.positions(config, "sample"))
    choice = dict(use_ema=use_ema, ema_decay=float(ema_decay), checkpoint=str(checkpoint))
    config.sample.update(choice)
    checks.check_parameters(config)
    step, params = checkpoints.restore_params(config, path)
    return Run(config, step, params, generate.class_names(config, path))


def sample(run: Run | str | os.PathLike, num_samples: int, **options) -> np.ndarray:
    """Generates images.

    Args:
      run: from `load`, or a path for it.
      num_samples: N.
      **options: OPTIONS, which are fields of the config's section `sample`; a label is a class, by
        name or number.

    Returns:
      uint8 [N, H, W, C]; up to rounding, image i depends only on the seed and i.

    Raises:
      UserError: for an unknown option or an invalid value; or for non-finite images.
    """
    run = run if isinstance(run, Run) else load(run)
    config, devices = run.config.copy_and_resolve_references(), jax.device_count()
    # The run's own, for as many devices as there are here; fewer images make a smaller batch.
    options.setdefault("batch_size", -(-config.sample.batch_size // devices) * devices)
    for name, value in (options | {"num_samples": num_samples}).items():
        if name not in (*OPTIONS, "num_samples"):
            raise UserError(f"{name}={value!r}: no such option; choose from {', '.join(OPTIONS)}")
        value = str(value) if name in ("label", "classifier") else value
        configs.check_kind(f"sample.{name}", value, type(config.sample[name]))
        config.sample[name] = value
    config = configs.normalize(config)
    checks.check(config, "sample")
    seed = config.sample.seed
    config.sample.update(num_samples=1, seed=0)  # the compiled sampler does not depend on them
    trained = _state_of(config.sample.classifier) if config.sample.classifier else None
    sampler = _sampler(FrozenConfigDict(config), run.label_names, trained)
    return sampler(run.params, np.arange(num_samples), seed=seed).x


def _state_of(workdir):
    """The newest step of a run, and when it was written: it may be trained between two calls."""
    step = checkpoints.latest_step(workdir)
    folder = pathlib.Path(workdir) / "checkpoints" / str(step)
    return step, folder.stat().st_mtime_ns if step is not None else 0


@functools.lru_cache(maxsize=8)
def _sampler(frozen, label_names, trained):
    """A config's sampler; it is cached, so that it compiles once.

    Args:
      frozen: the config, as a FrozenConfigDict.
      label_names: of the run.
      trained: _state_of the classifier.
    """
    config = ConfigDict(frozen)
    return samplers.make_sampler(config, **generate.guidance_for(config, label_names))


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Run:
    """Trains a run or resumes it, as the command line does, but without the report at the end.

    On a CPU, JAX uses one device by default. For small networks, two devices are up to 1.5 times as
    fast: call jax.config.update("jax_num_cpu_devices", 2) before anything else.

    Args:
      config: the config; `images` replace its image shape, `labels` its number of classes if they
        need more, and no labels mean no classes.
      workdir: the run's folder; a run in it is resumed from its newest checkpoint.
      images: uint8 [N, H, W, C] to train on, instead of the config's dataset. A tenth of them is
        held out, unless config.data.name is "arrays": then its splits decide.
      labels: [N] ints, the classes of the images, from 0.

    Returns:
      The trained Run.

    Raises:
      UserError: for an invalid config or invalid images; or if the folder has a run with another
        config or other images.
      KeyboardInterrupt: if a signal stopped the training; a checkpoint is saved first.
    """
    compilation.keep_programs()
    workdir, arrays = pathlib.Path(configs.at_home("workdir", workdir)), None
    config = configs.normalize(config)
    if images is None and labels is not None:
        raise UserError("labels: need images")
    if images is not None:
        arrays = _as_batch(images, labels)
        config = _config_of_arrays(config, arrays)
    cpu.prepare(configs.positions(config, "train"))
    checks.check(config, "train")
    if training.train(config, workdir, arrays):
        raise KeyboardInterrupt
    return load(workdir, config.sample.use_ema, config.sample.ema_decay)


def _as_batch(images, labels):
    """Checks a user's arrays; returns a data.Batch."""
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3, 4):
        kind = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"images: {kind}, not uint8 [N, H, W, C] with C = 1, 3 or 4")
    if len(images) < 2:
        raise UserError(f"images: {len(images)}, not 2 or more; some are held out")
    if labels is None:
        return data.Batch(images, None)
    labels = np.asarray(labels)
    whole = labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer)
    most = checks.LARGEST["data.num_classes"]
    if not whole or labels.min() < 0 or labels.max() >= most:
        kind = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"labels: {kind}, not {len(images)} whole numbers from 0 to {most - 1}")
    return data.Batch(images, labels.astype(np.int32))


def _config_of_arrays(config, arrays):
    """Sets a config's image shape and number of classes to those of a user's arrays.

    Gray and RGBA images without labels have no scores, unless Inception's weights are named for
    gray ones.
    """
    if config.data.name != "arrays":
        config.data.update(name="arrays", split="train[:90%]", eval_split="train[90%:]")
    *size, channels = arrays.images.shape[1:]
    classes = 0 if arrays.labels is None else max(config.data.num_classes, arrays.labels.max() + 1)
    config.data.update(image_size=tuple(size), channels=channels, num_classes=int(classes))
    if arrays.labels is None and config.train.score_every and not configs.can_have_fid(config):
        log.info("train.score_every=0: gray and RGBA images without labels have no score")
        config.train.score_every = 0
    return config
