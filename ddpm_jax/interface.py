"""The Python interface: a few functions that a notebook or another program needs."""

import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import configs, cpu, parallel
from ddpm_jax.core import diffusion, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import generate, interop
from ddpm_jax.runs import train as training

# Of the section `sample` of a config, what `sample` takes.
OPTIONS = ("seed label guidance classifier sampler num_steps spacing eta batch_size").split()


class Run(NamedTuple):
    """A trained network, and how it was trained."""

    config: ConfigDict
    step: int  # updates done; 0 for weights that were imported
    params: Any  # of the network, a tree of float32 arrays: the averaged ones, or the raw ones
    label_names: tuple[str, ...]  # of each class; empty where it knows none

    def sample(self, num_samples: int, **options) -> np.ndarray:
        """Generates images; see ddpm_jax.sample."""
        return sample(self, num_samples, **options)

    def predict(self, x_t, t, labels=None) -> tuple[jax.Array, jax.Array]:
        """What the network predicts at x_t, for a sampler of one's own; may be jitted.

        Args:
          x_t: [B, H, W, C] float32, an image that is diffused to step t (Eq. 4).
          t: [B] or a scalar, int, in [0, T); 0 is the last denoising step.
          labels: [B] int in [0, K), of a network that knows K classes; None: of no class.

        Returns:
          x0: [B, H, W, C], the image that is predicted; clipped to [-1, 1] if diffusion.clip_x0.
          log_variance: of p(x_{t-1} | x_t), [B, 1, 1, 1], or of x0's shape where it is learned.

        Raises:
          UserError: for arrays of other shapes, or labels of a network that knows none.
        """
        shape, known = configs.image_shape(self.config), self.config.data.num_classes
        if jnp.ndim(x_t) != 4 or jnp.shape(x_t)[1:] != shape:
            raise UserError(f"x_t: has shape {jnp.shape(x_t)}, not [B, {str(shape)[1:-1]}]")
        if labels is not None and not known:
            raise UserError("labels: this model knows no classes (data.num_classes=0)")
        schedule = configs.make_schedule(self.config)
        net_fn = unet.net_fn(configs.make_model(self.config), self.params)
        predict_fn = generate.unguided_predict(self.config, schedule, net_fn)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), jnp.shape(x_t)[:1])
        if known:
            labels = jnp.full(t.shape, known) if labels is None else jnp.asarray(labels)
            predict_fn = generate.labelled(predict_fn, labels)
        if self.config.diffusion.clip_x0:
            predict_fn = diffusion.clipped(predict_fn)
        variance = self.config.diffusion.variance
        p = diffusion.p_mean_variance(schedule, predict_fn, x_t, t, variance=variance)
        return p.x0_pred, p.log_variance


def config(name: str | None = None) -> ConfigDict:
    """A config to train by: its fields may be set, and one that does not exist is an error.

    Args:
      name: a name of those that come with the package, as "digits", "mnist", "cifar10"; or the
        path of a config file. None: the defaults, Ho et al.'s CIFAR-10 model.

    Returns:
      A ConfigDict; ddpm_jax/configs.py has a comment for each field.

    Raises:
      UserError: if there is no such config.
    """
    return configs.default_config() if name is None else configs.named_config(name)


def load(path: str | os.PathLike, use_ema: bool = True) -> Run:
    """Reads a run's newest checkpoint, or the weights in a folder of diffusers.

    Args:
      path: the folder of a run; or one that holds a UNet2DModel or a pipeline around it, from which
        nothing is copied on the disk.
      use_ema: whether to read the averaged parameters rather than the raw ones.

    Returns:
      A Run.

    Raises:
      UserError: if it is neither, or cannot be read.
    """
    cpu.prepare(trains=False)
    path = pathlib.Path(path).expanduser()
    if not (path / "checkpoints").is_dir() and interop.is_diffusers(path):
        config, params = interop.read_run(configs.without_data(), path)
        return Run(config, 0, parallel.replicate(params), ())
    config = run_files.saved_config(path)
    with config.unlocked():
        config.sample.use_ema = use_ema
    step, params = checkpoint.restore_params(config, path)
    return Run(config, step, params, generate.class_names(config, path))


def sample(run: Run | str | os.PathLike, num_samples: int, **options) -> np.ndarray:
    """Generates images.

    Args:
      run: from `load`, or what that takes.
      num_samples: N.
      **options: OPTIONS, the fields of the config's section `sample` that they are named after; a
        label is a class, by name or number.

    Returns:
      uint8 [N, H, W, C]; image i depends on the seed and i only, up to rounding.

    Raises:
      UserError: for an option that there is not, or that cannot work; or for images that are not
        finite.
    """
    run = run if isinstance(run, Run) else load(run)
    config, devices = run.config.copy_and_resolve_references(), jax.device_count()
    options.setdefault("batch_size", min(config.sample.batch_size, -(-num_samples // devices)))
    options["batch_size"] = -(-options["batch_size"] // devices) * devices
    for name, value in (options | {"num_samples": num_samples}).items():
        if name not in (*OPTIONS, "num_samples"):
            raise UserError(f"{name}={value!r}: no such option; choose from {', '.join(OPTIONS)}")
        value = str(value) if name in ("label", "classifier") else value
        configs.check_kind(f"sample.{name}", value, type(config.sample[name]))
        config.sample[name] = value
    config = configs.normalize(config)
    configs.check(config, "sample")
    seed = config.sample.seed
    config.sample.update(num_samples=1, seed=0)  # what is compiled does not depend on them
    sampler = _sampler(config.to_json_best_effort(), run.label_names)
    return sampler(run.params, np.arange(num_samples), seed=seed).x


@functools.lru_cache(maxsize=8)
def _sampler(text, label_names):
    """A config's sampler, which is compiled once however often it is asked for."""
    config = configs.from_json(text)
    return generate.make_sampler(config, **generate.who_guides(config, label_names))


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Run:
    """Trains, or goes on with a run, as the command line does; without its report at the end.

    On a CPU JAX computes on one device, unless jax.config.update("jax_num_cpu_devices", 2), say,
    was called before anything else: for small networks that is up to 1.5 times as fast.

    Args:
      config: what to train; with images, their shape and classes take the place of its own.
      workdir: the run's folder; a run that is there goes on from its newest checkpoint.
      images: uint8 [N, H, W, C] to train on, in place of the config's dataset. A tenth of them is
        held out, unless config.data.name is "arrays" and its splits say otherwise.
      labels: [N] ints, the classes of the images, from 0.

    Returns:
      The trained Run.

    Raises:
      UserError: for what cannot be trained; or if the folder has a run of another config, or of
        other images.
      KeyboardInterrupt: if a signal ended it early; what was trained is saved.
    """
    cpu.prepare(trains=True)
    workdir, arrays = pathlib.Path(workdir).expanduser(), None
    config = configs.normalize(config)
    if images is not None:
        arrays = _as_batch(images, labels)
        config = _config_of_arrays(config, arrays)
    configs.check(config, "train")
    if training.train(config, workdir, arrays):
        raise KeyboardInterrupt
    return load(workdir, config.sample.use_ema)


def _as_batch(images, labels):
    """A user's arrays as a data.Batch, checked."""
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3, 4):
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"images: {found}, not uint8 [N, H, W, C] with C = 1, 3 or 4")
    if labels is None:
        return data.Batch(images, None)
    labels = np.asarray(labels)
    whole = labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer)
    if not whole or (len(labels) and labels.min() < 0):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"labels: {found}, not {len(images)} whole numbers from 0")
    return data.Batch(images, labels.astype(np.int32))


def _config_of_arrays(config, arrays):
    """A config with the shape and the classes of a user's arrays."""
    if config.data.name != "arrays":
        config.data.update(name="arrays", split="train[:90%]", eval_split="train[90%:]")
    *size, channels = arrays.images.shape[1:]
    classes = 0 if arrays.labels is None else max(config.data.num_classes, arrays.labels.max() + 1)
    config.data.update(image_size=tuple(size), channels=channels, num_classes=int(classes))
    return config
