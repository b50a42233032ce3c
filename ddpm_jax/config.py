"""What a config may say, and what a run may not change afterwards."""

import math
import os

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import diffusion, parallel, sampling, schedules
from ddpm_jax.errors import UserError

POSITIVE = """
    data.image_size model.channels model.channel_mults model.num_res_blocks model.norm_groups
    optim.learning_rate optim.accumulate train.batch_size
    train.log_every train.eval_every train.eval_images train.sample_every
    train.checkpoint_every train.keep_checkpoints sample.num_samples sample.batch_size
    sample.resamplings sample.jump_length show.num_images show.num_frames
""".split()
NOT_NEGATIVE = """
    seed data.max_ram_gib data.num_classes optim.warmup_steps optim.weight_decay optim.grad_clip
    optim.max_skipped train.num_steps train.num_epochs train.keep_every
    sample.seed sample.num_steps sample.columns sample.guidance
    evaluate.num_samples evaluate.bits_per_dim_images
""".split()
BELOW_ONE = ("model.dropout", "optim.ema_decay")  # in [0, 1)
# The largest values, far beyond what is sensible; of whole numbers that are not here, what 32 bits
# hold. They keep a slip of the finger from taking all memory.
LARGEST = {
    "seed": 2**32 - 1,
    "data.image_size": 4096,
    "data.num_classes": 1_000_000,
    "diffusion.num_timesteps": 1_000_000,
    "model.channels": 2**14,
    "model.channel_mults": 2**14,
    "model.num_res_blocks": 64,
    "train.batch_size": 2**20,
    "train.eval_images": 10_000_000,
    "sample.num_samples": 10_000_000,
    "sample.batch_size": 2**20,
    "sample.seed": 2**32 - 1,
    "show.num_images": 1000,
    "show.num_frames": 10_000,
    "evaluate.num_samples": 10_000_000,
    "evaluate.max_features": 1_000_000,
    "evaluate.bits_per_dim_images": 10_000_000,
}
LARGEST_FLOAT = float(np.finfo(np.float32).max)
MOST_VALUES = 2**34  # of the images of a batch
MOST_STEPS = 1_000_000  # of inpainting, with its repetitions
SMALLEST_BETA = 1e-8  # with less, 1 - ᾱ would be rounding errors
CHOICES = {
    "data.resize": ("crop", "squash"),
    "data.channels": (1, 3, 4),
    "diffusion.prediction": diffusion.PREDICTIONS,
    "diffusion.loss": ("simple", "bound"),
    "diffusion.variance": diffusion.VARIANCES,
    "model.kind": ("unet", "classifier"),
    "model.dtype": ("float32", "bfloat16"),
    "optim.decay": ("constant", "cosine"),
    "sample.sampler": sampling.SAMPLERS,
    "sample.spacing": tuple(schedules.SPACINGS),
    "evaluate.resize": ("tf1", "torch"),
}
# What names a file or a folder; ~ is the user's home there.
PATHS = (
    "data.path",
    "data.data_dir",
    "sample.classifier",
    "evaluate.inception_weights",
    "evaluate.cache_dir",
)
UNKNOWN_USER = "the home of a user who is not known (or write ./~…)"
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "whole numbers in brackets",
}
# What a run may not change later: to go on training, its data, noise and network; to be used
# otherwise, its network and chain.
IDENTITY = {
    "train": ("seed", "data", "diffusion", "model", "train.batch_size"),
    "use": ("data.image_size", "data.channels", "data.num_classes", "diffusion", "model"),
}
# But for these.
FREE = {
    "train": """
        data.path data.data_dir data.max_ram_gib data.eval_split model.remat
        diffusion.variance diffusion.clip_x0
    """.split(),
    "use": """
        diffusion.variance diffusion.clip_x0 diffusion.loss model.dropout model.dtype model.remat
    """.split(),
}
# Fields that came after the first runs, and what runs without them were made with.
ADDED = {
    "data.num_classes": 0,
    "diffusion.prediction": "eps",
    "diffusion.loss": "simple",
    "model.kind": "unet",
    "model.remat": False,
    "optim.accumulate": 1,
    "optim.max_skipped": 0,
    "train.label_dropout": 0.0,
    "train.num_epochs": 0,
}


# And sections that do not concern how a run was trained: what it lacks of them are defaults.
LATER = ("sample.", "show.", "evaluate.")


def flatten(config):
    """{"section.field": value} of a config."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat.update({f"{name}.{field}": v for field, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def check_kind(name, value, kind):
    """Raises a UserError unless a value is of a field's kind, one of KINDS."""
    fits = isinstance(value, kind)
    if kind is int:
        fits = _is_whole(value)
    elif kind is float:
        fits = fits or _is_whole(value)
    elif kind is tuple:
        fits = fits and all(map(_is_whole, value))
    _require(fits, name, value, f"must be {KINDS[kind]}")


def with_added(config, defaults):
    """The config of a run, with the fields that are newer than the run.

    Args:
      config: as it was saved.
      defaults: for fields that do not concern how it was trained.
    """
    later = {k: v for k, v in flatten(defaults).items() if k.startswith(LATER)}
    fields = {**later, **ADDED, **flatten(config)}
    nested = {}
    for name, value in fields.items():
        *section, field = name.split(".")
        (nested.setdefault(section[0], {}) if section else nested)[field] = value
    return ConfigDict(nested).lock()


def with_home(config):
    """A config whose PATHS have the user's home in place of ~, which no shell puts there."""
    fields = {name: os.path.expanduser(flatten(config)[name]) for name in PATHS}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def batch_sizes(config, mode):
    """{field: value} of what has to divide over the devices in a mode."""
    fields = {"train": ("train.batch_size", "sample.batch_size"), "import": (), "export": ()}
    return {name: flatten(config)[name] for name in fields.get(mode, ("sample.batch_size",))}


def num_steps(train, size):
    """Updates in a whole run; a batch that ends an epoch has the first images of the next one.

    Args:
      train: the config's section.
      size: of the dataset.
    """
    return train.num_steps or -(-train.num_epochs * size // train.batch_size)


def image_shape(config):
    """(H, W, C) of the images that a config is about."""
    return (*config.data.image_size, config.data.channels)


def check(config, mode="train"):
    """Raises a UserError that names the first field whose value cannot work."""
    fields = flatten(config)
    for name in POSITIVE:
        kind = "whole numbers " if isinstance(fields[name], tuple) else ""
        allowed = f"must be {kind}above 0"
        _require(_all(lambda v: v > 0, fields[name]), name, fields[name], allowed)
    for name in NOT_NEGATIVE:
        _require(_all(lambda v: v >= 0, fields[name]), name, fields[name], "must be 0 or more")
    for name in BELOW_ONE:
        _require(0 <= fields[name] < 1, name, fields[name], "must lie in [0, 1)")
    for name, choices in CHOICES.items():
        allowed = f"choose from {', '.join(map(str, choices))}"
        _require(fields[name] in choices, name, fields[name], allowed)
    for name in ("train.label_dropout", "sample.eta"):
        _require(0 <= fields[name] <= 1, name, fields[name], "must lie in [0, 1]")
    _check_sizes(fields)
    name, steps, epochs = "train.num_epochs", config.train.num_steps, config.train.num_epochs
    allowed = f"train.num_steps={steps}; one of them must be 0, and the other above 0"
    _require((steps > 0) != (epochs > 0), name, epochs, allowed)
    for name in ("diffusion.beta_start", "diffusion.beta_end"):
        allowed = f"must lie in [{SMALLEST_BETA:g}, 1)"
        _require(SMALLEST_BETA <= fields[name] < 1, name, fields[name], allowed)
    schedules.from_config(config.diffusion)
    _check_model(config.model, config.data.image_size)
    _check_task(config, mode)
    _check_sampling(config, mode)
    name, count = "evaluate.num_samples", config.evaluate.num_samples
    _require(count != 1, name, count, "must be 0, or 2 or more")
    if mode in ("train", "evaluate"):
        allowed = "must be a dataset's name, as --config.data.name=cifar10"
        _require(config.data.name != "", "data.name", "", allowed)
    name, features = "evaluate.max_features", config.evaluate.max_features
    _require(features > 1, name, features, "must be 2 or more")
    if mode == "evaluate" and count:
        name, allowed = "data.channels", "Inception takes 1 or 3 (or evaluate.num_samples=0)"
        _require(config.data.channels != 4, name, 4, allowed)
    for name in PATHS:
        _require(not fields[name].startswith("~"), name, fields[name], UNKNOWN_USER)
    for name, value in batch_sizes(config, mode).items():
        most = MOST_VALUES // math.prod(image_shape(config))
        _require(value <= most, name, value, f"must be at most {most} for images of this size")
        parts = config.optim.accumulate if name == "train.batch_size" else 1
        parallel.check_batch_size(name, value, parts)


def _check_sizes(fields):
    """Numbers must not be larger than can be computed with."""
    for name, value in fields.items():
        if isinstance(value, float):
            allowed = f"must be a finite number, at most {LARGEST_FLOAT:.2g}"
            _require(abs(value) <= LARGEST_FLOAT, name, value, allowed)
        elif not isinstance(value, bool | str):
            most = LARGEST.get(name, 2**31 - 1)
            kind = "whole numbers, " if isinstance(value, tuple) else ""
            fits = _all(lambda v, most=most: v <= most, value)
            _require(fits, name, value, f"must be {kind}at most {most}")


def _check_model(model, image_size):
    """The network's levels must divide the image, its groups the channels."""
    allowed = f"must be a multiple of model.norm_groups={model.norm_groups} and even, at least 4"
    fits = model.channels % model.norm_groups == 0 and model.channels % 2 == 0
    _require(fits and model.channels >= 4, "model.channels", model.channels, allowed)
    _require(len(image_size) == 2, "data.image_size", image_size, "must be (height, width)")
    name, mults = "model.channel_mults", model.channel_mults
    levels, most = len(mults), LARGEST["data.image_size"].bit_length()
    _require(0 < levels <= most, name, mults, f"needs at least one level, and at most {most}")
    widest = model.channels * max(mults)
    most = LARGEST["model.channels"]
    allowed = f"makes {widest} channels of model.channels={model.channels}, of {most} at most"
    _require(widest <= most, name, mults, allowed)
    factor = 2 ** (levels - 1)
    allowed = f"must be multiples of {factor} (model.channel_mults has {levels} levels)"
    _require(_all(lambda v: v % factor == 0, image_size), "data.image_size", image_size, allowed)
    heights = [image_size[0] // 2**level for level in range(levels)]
    name, resolutions = "model.attention_resolutions", model.attention_resolutions
    allowed = f"choose from the levels' heights, {', '.join(map(str, heights))}"
    _require(_all(lambda v: v in heights, resolutions), name, resolutions, allowed)


def _check_task(config, mode):
    """What the network is for must go with how it is trained and used."""
    variance, loss, kind = config.diffusion.variance, config.diffusion.loss, config.model.kind
    allowed = "needs diffusion.loss='bound'; L_simple trains no variance"
    _require(variance != "learned" or loss == "bound", "diffusion.variance", variance, allowed)
    if kind == "classifier":
        name, count = "data.num_classes", config.data.num_classes
        _require(count > 1, name, count, "must be 2 or more for a classifier")
        allowed = "a classifier can only be trained; name it in sample.classifier to guide another"
        _require(mode in ("train", "show"), "model.kind", kind, allowed)


def _check_sampling(config, mode):
    """The sampler's settings must fit the chain and what the network was told."""
    sample, total = config.sample, config.diffusion.num_timesteps
    allowed = f"must be from 1 to diffusion.num_timesteps={total}, or 0 for all"
    _require(sample.num_steps <= total, "sample.num_steps", sample.num_steps, allowed)
    ancestral = sample.sampler == "ancestral" and mode != "invert"  # which is always ddim
    allowed = "must be 0, unless sample.sampler='ddim'"
    _require(sample.eta == 0 or not ancestral, "sample.eta", sample.eta, allowed)
    learned = config.diffusion.variance == "learned" and ancestral
    allowed = f"a learned variance is one of all {total} steps; use sample.sampler='ddim' for fewer"
    fits = not learned or sample.num_steps in (0, total)
    _require(fits, "sample.num_steps", sample.num_steps, allowed)
    steps, name, repeats = sample.num_steps or total, "sample.resamplings", sample.resamplings
    allowed = f"must be at most {MOST_STEPS // steps}, for {steps} steps"
    _require(steps * repeats <= MOST_STEPS, name, repeats, allowed)
    name, ts = "show.timesteps", config.show.timesteps
    _require(_all(lambda v: 0 <= v < total, ts), name, ts, f"must be whole numbers below {total}")
    allowed = f"must be from 0 to {total - 1}, or -1 for T / 2"
    _require(-1 <= sample.t < total, "sample.t", sample.t, allowed)
    if not config.data.num_classes and not sample.classifier:
        allowed = "this model knows no classes (data.num_classes=0; sample.classifier is empty)"
        _require(sample.guidance == 1, "sample.guidance", sample.guidance, allowed)
        _require(sample.label == "", "sample.label", sample.label, allowed)
    elif config.train.label_dropout == 0 and not sample.classifier:
        allowed = "must be 1: this model was always told the class (train.label_dropout=0)"
        _require(sample.guidance == 1, "sample.guidance", sample.guidance, allowed)


def _all(predicate, value):
    """Whether a number, or every one of a tuple of whole numbers, satisfies the predicate."""
    if isinstance(value, tuple):
        return all(_is_whole(v) and predicate(v) for v in value)
    return abs(value) < math.inf and predicate(value)


def _is_whole(value):
    """Whether a value is an int of 64 bits."""
    return type(value) is int and abs(value) < 2**63


def _require(condition, name, value, allowed):
    if not condition:
        raise UserError(f"{name}={value!r}: {allowed}")


def check_same_run(saved, config, workdir, purpose):
    """Raises a UserError unless `config` can go on with the run that `saved` describes.

    Args:
      saved: the run's config.
      config: the wanted one.
      workdir: the run's folder, for the error.
      purpose: "train" (steps, logging, optimizer and sampling may change; what decides the
        network or the data may not) or "use".
    """
    saved, new = ADDED | flatten(saved), flatten(config)
    free, variance = set(FREE[purpose]), "diffusion.variance"
    in_loss = purpose == "train" and new["diffusion.loss"] == "bound"
    if in_loss or "learned" in (saved.get(variance), new[variance]):
        free.remove(variance)
    changed = [
        f"{name} {saved.get(name)!r} -> {new.get(name)!r}"
        for name in sorted((saved.keys() | new.keys()) - free)
        if name.startswith(IDENTITY[purpose]) and saved.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(f"workdir={workdir}: was made with another config: {', '.join(changed)}")
