"""Samples of a trained run: its parameters and guidance, grids, file names, warnings."""

import functools
import hashlib
import logging
import pathlib
import re

import numpy as np

from ddpm_jax import checks, configs, signals
from ddpm_jax.core import likelihood
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, disk, images, run_files
from ddpm_jax.runs import samplers

log = logging.getLogger(__name__)

GRID_IMAGES = 256  # at most, in a grid
MAX_COLUMNS = 16
# bits/dim of x_t from noise at the first step of fewer than T; below it, digits of few steps have a
# smaller Fréchet distance than those that start at T - 1 (docs/sampling.md).
MAX_START_KL = 0.02
SMALLEST_START = 1e-6  # ᾱ; of the digits it is 6e-8, from where heun and plms diverge
MAX_INITIAL_SHARE = 0.1  # of the initial parameters in the EMA; above it the user is warned


def label_number(label, names):
    """The number of the class that `sample.label` gives by name or number; None if it is empty.

    Raises:
      UserError: for an unknown class; lists the classes.
    """
    if label == "":
        return None
    if label in names:
        return names.index(label)
    # If the classes' names are numbers, a number is always a name, not an index.
    number = int(label) if re.fullmatch(r"\d{1,9}", label) else len(names)
    if number < len(names) and not any(map(str.isdecimal, names)):
        return number
    raise UserError(f"sample.label={label!r}: choose from {', '.join(names)}")


def write_grid(path, config, x):
    """Writes a grid of the first images."""
    images.write_png(path, images.grid(x[:GRID_IMAGES], grid_columns(config)))


def grid_columns(config):
    """sample.columns; else a column per class if all of a few classes are sampled; else None, and
    the grid is square."""
    classes, all_classes = config.data.num_classes, config.sample.label == ""
    per_class = classes if all_classes and classes <= MAX_COLUMNS else 0
    return config.sample.columns or per_class or None


def load_classifier(config):
    """Loads the run `sample.classifier`: (model, params, label names); None if it is empty.

    Raises:
      UserError: if it is not a classifier's run, or has other image shapes or another schedule.
    """
    workdir = config.sample.classifier
    if not workdir:
        return None
    field = f"sample.classifier={workdir!r}"
    saved = run_files.load_config(workdir)
    if saved is None or saved.model.kind != "classifier":
        raise UserError(f"{field}: holds no classifier (model.kind='classifier')")
    fields, theirs = configs.flatten(config), configs.flatten(saved)
    schedule = (f"diffusion.{name}" for name in configs.SCHEDULE_FIELDS)
    for name in ("data.image_size", "data.channels", *schedule):
        if fields[name] != theirs[name]:
            raise UserError(f"{field}: its {name} is {theirs[name]!r}, this run's {fields[name]!r}")
    _, params = checkpoint.restore_params(saved, workdir)
    return configs.make_model(saved), params, run_files.load_label_names(workdir)


def guidance_for(config, label_names):
    """The label and the classifier of a config's sample section.

    Args:
      config: checked.
      label_names: of the run's classes.

    Returns:
      {"label", "classifier"}, arguments of samplers.make_sampler.

    Raises:
      UserError: for an unknown label, a missing classifier, or one with other classes.
    """
    classifier = load_classifier(config)
    if classifier is None:
        return {"label": label_number(config.sample.label, label_names), "classifier": None}
    *classifier, its_names = classifier
    if label_names and label_names != its_names:
        text = f"sample.classifier={config.sample.classifier!r}: has other classes"
        raise UserError(f"{text}: {', '.join(its_names)}")
    label = label_number(config.sample.label, its_names)
    return {"label": label, "classifier": tuple(classifier)}


def class_names(config, workdir):
    """The names of a run's classes; their numbers if the file with the names is missing."""
    return run_files.load_label_names(workdir) or tuple(map(str, range(config.data.num_classes)))


def guidance_for_run(config, workdir):
    """guidance_for with the class names of a trained run."""
    return guidance_for(config, class_names(config, workdir))


def restore_sampler(config, workdir, task=samplers.from_noise, **options):
    """samplers.make_sampler of the checkpoint that `sample.checkpoint` chooses, with its guidance.

    Without a `sample.label`, sampling from noise has all classes in turn; editing has none.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      task: see samplers.make_sampler.
      **options: other arguments of samplers.make_sampler.

    Returns:
      (step of the checkpoint, sample(indices, inputs=None, stop=never) → Generated).

    Raises:
      UserError: for a missing checkpoint, an unknown label, or a missing classifier.
    """
    num_classes, guidance = config.data.num_classes, guidance_for_run(config, workdir)
    if guidance["label"] is None and task is not samplers.from_noise:
        field = "sample.label='': is missing"
        if guidance["classifier"]:
            raise UserError(f"{field}; sample.classifier guides to one class")
        if num_classes and config.train.label_dropout == 0:
            raise UserError(f"{field}; this run has no {checks.missing_null_class(config)}")
        guidance["label"] = num_classes
    if task is samplers.from_noise:
        warn_of_chain(config)
    else:
        log.info("%s", samplers.describe_sampler(config, task))
    step, params = checkpoint.restore_params(config, workdir)
    warn_of_young_ema(config, step)
    return step, functools.partial(
        samplers.make_sampler(config, task=task, **guidance, **options), params
    )


def warn_of_chain(config, mean_square=1 / 3):
    """Warns if x at the first sampling step is not noise in the forward process.

    Args:
      config: its diffusion and sample sections are used.
      mean_square: E[x²] of the images, in [-1, 1].
    """
    chain = samplers.make_chain(config)
    start, last = int(chain.timesteps[-1]), config.diffusion.num_timesteps - 1
    kl = likelihood.prior_kl(configs.make_alpha_bars(config)[-1], mean_square)
    kl_of_start = likelihood.prior_kl(chain.alpha_bars[-1], mean_square)
    if kl > likelihood.MAX_PRIOR_KL:
        log.warning(
            "the chain does not end in noise (prior KL %.2g bits/dim), but sampling starts from "
            "noise. Train with more diffusion.num_timesteps, or with "
            "diffusion.schedule=linear_rescaled",
            kl,
        )
    elif start < last and kl_of_start > MAX_START_KL:
        log.warning(
            "%s with %d steps starts at t = %d, where x_t is not yet noise",
            config.sample.sampler,
            len(chain.timesteps),
            start,
        )
    first = chain.alpha_bars[-1]
    if config.sample.sampler in ("heun", "plms") and 0 < first < SMALLEST_START:
        log.warning(
            "%s starts at ᾱ = %.2g, where it amplifies the network's errors %.0f times; take fewer "
            "steps with sample.spacing=leading, or another sampler",
            config.sample.sampler,
            first,
            first**-0.5,
        )


def warn_of_young_ema(config, step):
    """Warns if the EMA is still close to the initial parameters."""
    decay = configs.ema_decay(config)
    initial_share = decay**step
    if config.sample.use_ema and step > 0 and initial_share > MAX_INITIAL_SHARE:
        log.warning(
            "the EMA is still %.0f %% the initial parameters (optim.ema_decay=%g, step %d); "
            "--noconfig.sample.use_ema samples from the raw parameters",
            100 * initial_share,
            decay,
            step,
        )


def sample_name(config, workdir, step):
    """The name of the files with a checkpoint's samples; different samples have other names."""
    return f"sample_{step:06d}_n{config.sample.num_samples}_{settings(config, workdir)}"


def settings(config, workdir):
    """The sampling settings in a file's name, as seed0_ddim50_label7."""
    sample, chain, saved = config.sample, config.diffusion, run_files.load_config(workdir)
    fewer = configs.sampling_steps(config) != chain.num_timesteps
    parts = {
        f"seed{sample.seed}": True,
        "raw": not sample.use_ema,
        f"ema{sample.ema_decay:g}": configs.ema_index(config) > 0,
        config.model.dtype: config.model.dtype != saved.model.dtype,
        chain.variance: chain.variance != saved.diffusion.variance,
        f"clip{chain.clip_x0:d}": chain.clip_x0 != saved.diffusion.clip_x0,
        f"{sample.sampler}{sample.num_steps or ''}": sample.sampler != "ancestral" or fewer,
        f"order{sample.order}": sample.order != 2,
        sample.spacing: sample.spacing != "leading" and fewer,
        f"eta{sample.eta:g}": sample.eta > 0,
        f"threshold{sample.dynamic_threshold:g}": sample.dynamic_threshold > 0,
        f"label{_in_file_name(sample.label)}": sample.label != "",
        f"guidance{sample.guidance:g}": sample.guidance != 1,
        _in_file_name(sample.classifier): sample.classifier != "",
    }
    return "_".join(part for part, included in parts.items() if included)


def _in_file_name(text):
    """A label or a path as part of a file's name; shortened, with a digest, if it does not fit."""
    short = re.sub(r"[^\w.-]", "-", pathlib.Path(text).name)[:40]
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
    return short if short == text else f"{short}-{digest}"


def sample(config, workdir, stop=signals.never):
    """Generates `sample.num_samples` images from the checkpoint that `sample.checkpoint` chooses.

    Writes samples/sample_<step>_n<count>_<settings>.npz (`images`, uint8 [N, H, W, C]) and a .png
    of the first images; see `settings`.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      stop: from signals.catch.

    Raises:
      UserError: if there is no checkpoint, or the images are not finite.
      signals.Stopped: if a signal interrupts it; nothing is written then.
    """
    step, sampler = restore_sampler(config, workdir)
    count, which = config.sample.num_samples, "EMA" if config.sample.use_ema else "raw"
    text = "sampling %d images from the %s parameters of step %d: %s"
    log.info(text, count, which, step, samplers.describe_sampler(config))
    x = sampler(np.arange(count), stop=stop).x
    path = pathlib.Path(workdir) / "samples" / f"{sample_name(config, workdir, step)}.npz"
    disk.write_npz(path, images=x)
    write_grid(path.with_suffix(".png"), config, x)
    log.info("wrote %s and .png", path)
