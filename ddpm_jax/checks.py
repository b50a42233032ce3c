"""Checks of a config: which values are allowed, and what a run may not change."""

import math
import re

import numpy as np

from ddpm_jax import configs, parallel
from ddpm_jax.core import diffusion, solvers, spacings, weights
from ddpm_jax.errors import UserError, require

POSITIVE = """
    data.image_size model.channels model.channel_mults model.widths model.num_res_blocks
    model.num_heads model.norm_groups model.norm_eps diffusion.min_snr_gamma diffusion.p2_k
    optim.learning_rate optim.accumulate train.batch_size train.log_every train.eval_every
    train.eval_images train.sample_every train.checkpoint_every train.keep_checkpoints
    sample.num_samples sample.batch_size sample.resamplings sample.jump_length show.num_images
    show.num_frames evaluate.num_seeds
""".split()
NOT_NEGATIVE = """
    seed data.max_ram_gib data.num_classes model.attention_down model.attention_up
    model.head_channels model.label_channels model.resblock_down model.resblock_up
    model.freq_shift diffusion.p2_gamma optim.warmup_steps optim.weight_decay optim.grad_clip
    optim.max_skipped train.num_steps train.num_epochs train.keep_every train.score_every
    sample.seed sample.num_steps sample.columns sample.guidance show.num_steps evaluate.num_samples
    evaluate.bits_per_dim_images evaluate.nearest_images evaluate.steps
""".split()
# The largest values, far above sensible ones; a mistyped number must not take all memory. Other
# whole numbers may have up to 31 bits.
LARGEST = {
    "seed": 2**32 - 1,
    "data.image_size": 4096,
    "data.num_classes": 1_000_000,
    "diffusion.num_timesteps": 1_000_000,
    "model.channels": 2**14,
    "model.channel_mults": 2**14,
    "model.widths": 2**14,
    "model.num_res_blocks": 64,
    "model.label_channels": 2**14,
    "train.batch_size": 2**20,
    "train.eval_images": 10_000_000,
    "train.score_samples": 10_000_000,
    "sample.num_samples": 10_000_000,
    "sample.batch_size": 2**20,
    "sample.seed": 2**32 - 1,
    "show.num_images": 1000,
    "show.num_frames": 10_000,
    "evaluate.num_samples": 10_000_000,
    "evaluate.num_seeds": 1000,
    "evaluate.max_features": 1_000_000,
    "evaluate.nearest_images": 1_000_000,
    "evaluate.bits_per_dim_images": 10_000_000,
}
MAX_LEVELS = LARGEST["data.image_size"].bit_length()
LARGEST_FLOAT = float(np.finfo(np.float32).max)
MAX_VALUES = 2**34  # in the images of a batch
MAX_STEPS = 1_000_000  # of inpainting, including resampling
SMALLEST_BETA = 1e-8  # below this, 1 - ᾱ is dominated by rounding
CHOICES = {
    "data.resize": ("crop", "squash"),
    "data.channels": (1, 3, 4),
    "diffusion.prediction": diffusion.PREDICTIONS,
    "diffusion.loss": ("simple", "vlb", "hybrid"),
    "diffusion.loss_weight": weights.WEIGHTS,
    "diffusion.variance": diffusion.VARIANCES,
    "model.kind": ("unet", "classifier"),
    "model.dtype": ("float32", "bfloat16"),
    "optim.decay": ("constant", "cosine"),
    "train.timesteps": ("uniform", "low_discrepancy", "importance"),
    "sample.sampler": tuple(solvers.SOLVERS),
    "sample.spacing": tuple(spacings.SPACINGS),
    "show.sampler": tuple(solvers.SOLVERS),
    "show.spacing": tuple(spacings.SPACINGS),
    "evaluate.resize": ("tf1", "torch"),
}
# Editing modes that do not take every sampler: inpaint needs steps that depend on x alone; invert
# samples with ddim, also where the run has ancestral.
SAMPLERS_OF = {"inpaint": solvers.SINGLE_STEP, "invert": ("ancestral", "ddim")}
# Sections and fields of a run that must not change: its data, noise and network to resume training;
# its network and its diffusion process to use imported weights, or to begin their training; to use
# what was trained, also the decays of its EMAs, which tell where each of them is kept.
NETWORK = ("data.image_size", "data.channels", "data.num_classes", "diffusion", "model")
IDENTITY = {
    "train": ("seed", "data", "diffusion", "model", "train.batch_size"),
    "imported": NETWORK,
    "use": (*NETWORK, "optim.ema_decay"),
}
# Fields that decide what training comes to; they may change while a run has steps left.
TRAINING = """
    optim.learning_rate optim.warmup_steps optim.decay optim.weight_decay optim.grad_clip
    optim.ema_decay train.timesteps train.label_dropout
""".split()
# Fields that decide the scores of training; scores from before and after a change do not compare.
SCORING = """
    train.score_samples show.sampler show.num_steps show.spacing diffusion.clip_x0
    diffusion.variance sample.seed sample.use_ema sample.ema_decay sample.label sample.guidance
    sample.classifier sample.dynamic_threshold evaluate.resize evaluate.inception_weights
    evaluate.max_features
""".split()
# Fields of IDENTITY that may change.
FREE = {
    "train": """
        data.path data.data_dir data.max_ram_gib data.eval_split model.remat
        diffusion.variance diffusion.clip_x0
    """.split(),
    "use": """
        diffusion.variance diffusion.clip_x0 diffusion.loss diffusion.loss_weight
        diffusion.min_snr_gamma diffusion.p2_gamma diffusion.p2_k
        model.dropout model.dtype model.remat
    """.split(),
}
FREE["imported"] = FREE["use"]


def check(config, mode="train"):
    """Raises a UserError that names the first field with a value that is not allowed."""
    fields = configs.flatten(config)
    for name in POSITIVE:
        kind = "whole numbers " if isinstance(fields[name], tuple) else ""
        allowed = f"must be {kind}above 0"
        require(configs.all_of(lambda v: v > 0, fields[name]), name, fields[name], allowed)
    for name in NOT_NEGATIVE:
        require(
            configs.all_of(lambda v: v >= 0, fields[name]), name, fields[name], "must be 0 or more"
        )
    dropout = config.model.dropout
    require(0 <= dropout < 1, "model.dropout", dropout, "must lie in [0, 1)")
    for name, choices in CHOICES.items():
        allowed = f"choose from {', '.join(map(str, choices))}"
        require(fields[name] in choices, name, fields[name], allowed)
    for name in ("train.label_dropout", "sample.eta", "sample.dynamic_threshold"):
        require(0 <= fields[name] <= 1, name, fields[name], "must lie in [0, 1]")
    check_parameters(config)
    _check_sizes(fields)
    _check_scores(config)
    _check_evaluation(config, mode)
    name, steps, epochs = "train.num_epochs", config.train.num_steps, config.train.num_epochs
    allowed = f"train.num_steps={steps}; one of them must be 0, and the other above 0"
    require((steps > 0) != (epochs > 0), name, epochs, allowed)
    for name in ("diffusion.beta_start", "diffusion.beta_end"):
        allowed = f"must lie in [{SMALLEST_BETA:g}, 1)"
        require(SMALLEST_BETA <= fields[name] < 1, name, fields[name], allowed)
    configs.make_schedule(config)
    _check_model(config.model, config.data.image_size)
    _check_task(config, mode)
    with np.errstate(all="ignore"):
        fits = np.isfinite(np.float32(configs.loss_weights(config))).all()
    allowed = "the weights of L_simple are not finite; take a smaller one, or a larger p2_k"
    require(fits, "diffusion.p2_gamma", config.diffusion.p2_gamma, allowed)
    _check_sampling(config, mode)
    if mode in ("train", "show"):
        _check_sampler(configs.for_show(config), mode, "show")
    if mode in ("train", "evaluate"):
        allowed = "must be the name of a dataset, as --config.data.name=cifar10"
        require(config.data.name != "", "data.name", "", allowed)
    for name, value in configs.batch_sizes(config, mode).items():
        most = MAX_VALUES // math.prod(configs.image_shape(config))
        require(value <= most, name, value, f"must be at most {most} for images of this size")
        microbatches = config.optim.accumulate if name == "train.batch_size" else 1
        parallel.check_batch_size(name, value, microbatches)


def check_parameters(config):
    """Raises a UserError unless the EMAs' decays, and the choice of a checkpoint and of an EMA, are
    possible."""
    decays = configs.ema_decays(config.optim)
    fits = len(decays) > 0 and all(type(d) in (int, float) and 0 <= d < 1 for d in decays)
    fits = fits and len(set(decays)) == len(decays)
    allowed = "must lie in [0, 1), or be several such numbers in round brackets"
    require(fits, "optim.ema_decay", config.optim.ema_decay, allowed)
    allowed = f"choose from {', '.join(map(str, decays))}, or 0 for the first"
    chosen = config.sample.ema_decay
    require(chosen in (0, *decays), "sample.ema_decay", chosen, allowed)
    chosen = config.sample.checkpoint
    fits = chosen in ("newest", "best") or re.fullmatch("[0-9]{1,18}", chosen)
    require(fits, "sample.checkpoint", chosen, "must be newest, best, or a step")


def _check_scores(config):
    """Scores need images, and the best checkpoint needs scores."""
    train = config.train
    name, count = "train.score_samples", train.score_samples
    require(count > 1, name, count, "must be 2 or more")
    allowed = "needs train.score_every; without scores, no checkpoint is the best"
    require(not train.keep_best or train.score_every > 0, "train.keep_best", True, allowed)


def _check_evaluation(config, mode):
    """Scores need two samples, steps need samples, and each seed must be one."""
    for name in ("num_samples", "nearest_images"):
        value = config.evaluate[name]
        require(value != 1, f"evaluate.{name}", value, "must be 0, or 2 or more")
    features = config.evaluate.max_features
    require(features > 1, "evaluate.max_features", features, "must be 2 or more")
    if mode == "evaluate" and config.evaluate.num_samples:
        allowed = "Inception takes 1 or 3 (or evaluate.num_samples=0)"
        require(config.data.channels != 4, "data.channels", 4, allowed)
    section, most = config.evaluate, LARGEST["sample.seed"] - config.sample.seed + 1
    allowed = f"must be at most {most}, with sample.seed={config.sample.seed}"
    require(section.num_seeds <= most, "evaluate.num_seeds", section.num_seeds, allowed)
    fits = not section.steps or section.num_samples > 0
    allowed = "scores samples; evaluate.num_samples must be above 0"
    require(fits, "evaluate.steps", section.steps, allowed)


def _check_sizes(fields):
    """Numbers must not exceed LARGEST."""
    for name, value in fields.items():
        if name == "optim.ema_decay":
            continue
        if isinstance(value, float):
            allowed = f"must be a finite number, at most {LARGEST_FLOAT:.2g}"
            require(abs(value) <= LARGEST_FLOAT, name, value, allowed)
        elif not isinstance(value, bool | str):
            most = LARGEST.get(name, 2**31 - 1)
            kind = "whole numbers, " if isinstance(value, tuple) else ""
            fits = configs.all_of(lambda v, most=most: v <= most, value)
            require(fits, name, value, f"must be {kind}at most {most}")


def _check_model(model, image_size):
    """The network's levels must divide the image size, and its groups the channels."""
    groups = f"must be a multiple of model.norm_groups={model.norm_groups}"
    fits = model.channels % model.norm_groups == 0 and model.channels % 2 == 0
    allowed = f"{groups} and even, at least 4"
    require(fits and model.channels >= 4, "model.channels", model.channels, allowed)
    require(len(image_size) == 2, "data.image_size", image_size, "must be (height, width)")
    name = "model.widths" if model.widths else "model.channel_mults"
    given, of_levels = model.widths or model.channel_mults, configs.widths(model)
    levels = len(of_levels)
    fits = 0 < levels <= MAX_LEVELS
    require(fits, name, given, f"needs at least one level, and at most {MAX_LEVELS}")
    fits = configs.all_of(lambda width: width % model.norm_groups == 0, of_levels)
    require(fits, name, given, groups.replace("a multiple", "multiples"))
    most = LARGEST["model.channels"]
    widest = max(of_levels)
    allowed = f"times model.channels={model.channels} is {widest} channels; must be at most {most}"
    require(widest <= most, name, given, allowed)
    factor = 2 ** (levels - 1)
    allowed = f"must be multiples of {factor} ({name} has {levels} levels)"
    require(
        configs.all_of(lambda v: v % factor == 0, image_size),
        "data.image_size",
        image_size,
        allowed,
    )
    for path in ("attention_down", "attention_up", "resblock_down", "resblock_up"):
        first = 1 if "resblock" in path else 0  # no layer leads to level 0, or up from it
        allowed = f"must be levels, from {first} to {levels - 1}"
        fits = configs.all_of(lambda v, first=first: first <= v < levels, model[path])
        require(fits, f"model.{path}", model[path], allowed)
    _check_heads(model)
    name, shift = "model.freq_shift", model.freq_shift
    require(shift < model.channels // 2, name, shift, "must be below half of model.channels")


def attention_widths(model):
    """The widths at which a config's `model` section has attention, ascending."""
    of_levels = configs.widths(model)
    levels = {*model.attention_down, *model.attention_up}
    levels |= {len(of_levels) - 1} if model.attention_middle else set()
    return sorted({of_levels[level] for level in levels})


def _check_heads(model):
    """Heads must divide the widths at which there is attention."""
    name, heads, size = "model.num_heads", model.num_heads, model.head_channels
    require(not size or heads == 1, name, heads, f"must be 1 with model.head_channels={size}")
    for width in attention_widths(model):
        require(width % heads == 0, name, heads, f"must divide {width}, a width with attention")
        allowed = f"must be at most {width}, a width with attention"
        require(size <= width, "model.head_channels", size, allowed)


def _check_task(config, mode):
    """The variance must fit the loss, and the kind of network the mode."""
    name, prediction = "diffusion.zero_terminal_snr", config.diffusion.prediction
    fits = not config.diffusion.zero_terminal_snr or prediction in ("x0", "v")
    allowed = f"needs diffusion.prediction='x0' or 'v'; {prediction!r} hardly tells x0 at ᾱ = 0"
    require(fits, name, True, allowed)
    _check_loss(config.diffusion)
    kind = config.model.kind
    name, channels = "model.label_channels", config.model.label_channels
    fits = channels == 0 or (config.data.num_classes > 0 and kind == "unet")
    require(fits, name, channels, "must be 0 for a classifier, and where data.num_classes is 0")
    name, rate = "train.label_dropout", config.train.label_dropout
    allowed = "must be 0: the network has no null class (model.null_class=False)"
    fits = config.model.null_class or not config.data.num_classes or kind == "classifier"
    require(fits or rate == 0, name, rate, allowed)
    if kind == "classifier":
        name, count = "data.num_classes", config.data.num_classes
        require(count > 1, name, count, "must be 2 or more for a classifier")
        name, every = "train.score_every", config.train.score_every
        require(every == 0, name, every, "must be 0: a classifier makes no samples")
        allowed = "a classifier cannot do this; for guidance, set sample.classifier to its run"
        require(mode in ("train", "show"), "model.kind", kind, allowed)


def _check_loss(section):
    """The loss, its weights, the variance and the prediction must fit each other."""
    loss, variance, name = section.loss, section.variance, "diffusion.variance"
    learned, fits = diffusion.LEARNED_VARIANCES, loss != "simple"
    allowed = "needs diffusion.loss='hybrid' or 'vlb'; L_simple trains no variance"
    require(fits or variance not in learned, name, variance, allowed)
    allowed = f"diffusion.loss='hybrid' needs {' or '.join(learned)}"
    require(loss != "hybrid" or variance in learned, name, variance, allowed)
    name, weight = "diffusion.loss_weight", section.loss_weight
    allowed = "must be 'none' with diffusion.loss='vlb', which has its own weights"
    require(weight == "none" or loss != "vlb", name, weight, allowed)
    allowed = f"needs diffusion.prediction to be one of {', '.join(weights.PREDICTIONS)}"
    require(weight == "none" or section.prediction in weights.PREDICTIONS, name, weight, allowed)


def _check_sampling(config, mode):
    """The sampler's settings must fit the schedule and the network's conditioning."""
    sample, total = config.sample, config.diffusion.num_timesteps
    _check_sampler(config, mode, "sample")
    steps, name, repeats = configs.sampling_steps(config), "sample.resamplings", sample.resamplings
    allowed = f"must be at most {MAX_STEPS // steps}, for {steps} steps"
    require(steps * repeats <= MAX_STEPS, name, repeats, allowed)
    name, ts = "show.timesteps", config.show.timesteps
    require(
        configs.all_of(lambda v: 0 <= v < total, ts),
        name,
        ts,
        f"must be whole numbers below {total}",
    )
    allowed = f"must be from 0 to {total - 1}, or -1 for T / 2"
    require(-1 <= sample.t < total, "sample.t", sample.t, allowed)
    if not config.data.num_classes and not sample.classifier:
        allowed = "this model is unconditional (data.num_classes=0; sample.classifier is empty)"
        require(sample.guidance == 1, "sample.guidance", sample.guidance, allowed)
        require(sample.label == "", "sample.label", sample.label, allowed)
    elif config.train.label_dropout == 0 and not sample.classifier:
        allowed = f"must be 1: this model was trained without {missing_null_class(config)}"
        require(sample.guidance == 1, "sample.guidance", sample.guidance, allowed)


def missing_null_class(config):
    """What a conditional model lacks that samples a class only, for errors."""
    if config.model.null_class:
        return "label dropout (train.label_dropout=0)"
    return "a null class (model.null_class=False)"


def _check_sampler(config, mode, section):
    """The sampler, its order, steps and spacing must fit each other; `section` names the fields."""
    sample, total = config.sample, config.diffusion.num_timesteps
    allowed = f"must be from 1 to diffusion.num_timesteps={total}, or 0 for all"
    require(sample.num_steps <= total, f"{section}.num_steps", sample.num_steps, allowed)
    sampler = "ddim" if mode == "invert" else sample.sampler
    if mode in SAMPLERS_OF:
        allowed = f"{mode} takes {' or '.join(SAMPLERS_OF[mode])}"
        require(sample.sampler in SAMPLERS_OF[mode], "sample.sampler", sample.sampler, allowed)
    orders = solvers.ORDERS.get(sampler, (2,))
    allowed = f"with sample.sampler={sampler!r}, choose from {', '.join(map(str, orders))}"
    require(sample.order in orders, "sample.order", sample.order, allowed)
    allowed = "must be 0, unless sample.sampler='ddim'"
    require(sample.eta == 0 or sampler == "ddim", "sample.eta", sample.eta, allowed)
    learned = config.diffusion.variance == "learned" and sampler == "ancestral"
    allowed = f"a learned variance needs all {total} steps; use {section}.sampler='ddim' for fewer"
    fewer = configs.sampling_steps(config) != total
    require(not (learned and fewer), f"{section}.num_steps", sample.num_steps, allowed)
    allowed = f"with zero_terminal_snr, choose from {', '.join(spacings.WITH_LAST)}"
    zero_snr, spaced = config.diffusion.zero_terminal_snr, sample.spacing in spacings.WITH_LAST
    require(spaced or not (zero_snr and fewer), f"{section}.spacing", sample.spacing, allowed)


def check_same_run(saved, config, workdir, purpose):
    """Raises a UserError unless `config` fits the run that was saved with the config `saved`.

    Args:
      saved: the run's config, complete.
      config: the new config.
      workdir: the run's folder, for the error.
      purpose: "train" (steps, logging, optimizer and sampling may change; the network and the data
        may not); "use"; or "imported", to use a run that was not trained, or to begin to train it.
    """
    saved, new = configs.flatten(saved), configs.flatten(config)
    free, variance = set(FREE[purpose]), "diffusion.variance"
    loss_uses_variance = purpose == "train" and new["diffusion.loss"] != "simple"
    learned = any(v in diffusion.LEARNED_VARIANCES for v in (saved[variance], new[variance]))
    if loss_uses_variance or learned:
        free.remove(variance)
    names = [name for name in sorted(new.keys() - free) if name.startswith(IDENTITY[purpose])]
    changed = changes(saved, new, names)
    decays = saved["optim.ema_decay"], new["optim.ema_decay"]
    if purpose == "train" and any(isinstance(d, tuple) for d in decays) and decays[0] != decays[1]:
        changed += changes(saved, new, ["optim.ema_decay"])
    name, conditional = "train.label_dropout", new["data.num_classes"] > 0
    if purpose == "use" and conditional and (saved[name] > 0) != (new[name] > 0):
        changed += changes(saved, new, [name])  # whether guidance has a null class
    if changed:
        raise UserError(f"workdir={workdir}: was made with another config: {', '.join(changed)}")


def changes(saved, new, names):
    """The differences between two flat configs in the fields `names`, as ["name old -> new"]."""
    return [
        f"{name} {saved[name]!r} -> {new[name]!r}" for name in names if saved[name] != new[name]
    ]
