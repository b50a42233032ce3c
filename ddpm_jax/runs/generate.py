"""Sampling many images from a trained network: in batches over all devices, with progress."""

import functools
import hashlib
import logging
import math
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import configs, cpu, parallel, progress, signals
from ddpm_jax.core import diffusion, likelihood, sampling, schedules, solvers, spacings, unet
from ddpm_jax.errors import UserError, listed
from ddpm_jax.files import checkpoint, images
from ddpm_jax.files import workdir as run_files

log = logging.getLogger(__name__)

GRID_IMAGES = 256  # at most, in a grid
MAX_COLUMNS = 16
# bits/dim of x_t from noise at the first step of fewer than T; below it, digits of few steps have a
# smaller Fréchet distance than those that start at T - 1 (docs/sampling.md).
MAX_START_KL = 0.02
SMALLEST_START = 1e-6  # ᾱ; of the digits it is 6e-8, from where heun and plms diverge
# Parameters × pixels × images × rows of a segment: 0.3 seconds on 2 CPU cores (AMD EPYC).
SEGMENT_WORK = 10**11
MAX_INITIAL_SHARE = 0.1  # of the initial parameters in the EMA; above it the user is warned


class Chain(NamedTuple):
    """The sampling steps of a config: S of T."""

    timesteps: np.ndarray  # τ, [S] ints, ascending: the network's t at each step
    alpha_bars: np.ndarray  # ᾱ at these, [S] float64
    schedule: schedules.Schedule  # of all steps, [T] each

    def until(self, count):
        """The chain of the first `count` steps, up to a smaller t."""
        return self._replace(timesteps=self.timesteps[:count], alpha_bars=self.alpha_bars[:count])


class Task(NamedTuple):
    """What a sampler does: from noise, from an image, …"""

    solver: solvers.Solver
    start: Callable  # (keys [B], inputs) to the first x
    step_of: Callable  # (predict_fn, keys, inputs) to a step, see sampling.make_step


class Generated(NamedTuple):
    """Images and frames of the sampling process; uint8, unless another `finish` is given."""

    x: np.ndarray  # [N, H, W, C]
    frames: np.ndarray  # [K, N, H, W, C], x after some steps
    x0_frames: np.ndarray  # [L, N, H, W, C], the x0 predicted at some steps


def make_chain(config):
    """The Chain of a config's diffusion and sample sections."""
    section, alpha_bars = config.sample, configs.make_alpha_bars(config)
    skip_zero = section.sampler in solvers.SKIP_ZERO
    steps = configs.sampling_steps(config)
    timesteps = spacings.timesteps(section.spacing, alpha_bars, steps, skip_zero)
    return Chain(timesteps, alpha_bars[timesteps], schedules.from_alpha_bars(alpha_bars))


def make_solver(config, chain):
    """The Solver of a config's sample section on a chain."""
    section = config.sample
    options = {"order": section.order} if section.sampler in solvers.ORDERS else {}
    options |= {
        "ancestral": {"variance": config.diffusion.variance},
        "ddim": {"eta": section.eta},
    }.get(section.sampler, {})
    return solvers.SOLVERS[section.sampler](chain.alpha_bars, **options)


def describe_sampler(config, task=None):
    """A config's sampler, its steps and its calls of the network, for a log line.

    Args:
      config: its diffusion and sample sections are used.
      task: see make_sampler; it may take a part of the steps.
    """
    chain, section = make_chain(config), config.sample
    order = f" of order {section.order}" if section.sampler in solvers.ORDERS else ""
    nfe = solvers.num_calls((task or from_noise)(config, chain).solver)
    return f"{section.sampler}{order}, {len(chain.timesteps)} steps, {nfe} network evaluations"


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
    if label.isdecimal() and int(label) < len(names) and not any(map(str.isdecimal, names)):
        return int(label)
    raise UserError(f"sample.label={label!r}: choose from {', '.join(names)}")


def guided_predict(config, chain, params, labels, classifier=None):
    """The predict_fn of a chain's steps, with the config's guidance and clipping.

    Args:
      config: its model, data, diffusion and sample sections are used.
      chain: a Chain.
      params: of the network.
      labels: [B] int32, or None for an unconditional network.
      classifier: (model, params), for classifier guidance to the labels.

    Returns:
      predict_fn: (x_t, i [B]) to a Prediction, i in [0, S).
    """
    guidance, num_classes = config.sample.guidance, config.data.num_classes
    net_fn = unet.net_fn(configs.make_model(config), params)
    predict_fn = configs.make_predictor(config, chain.schedule, net_fn)
    if classifier is not None:
        log_p = unet.net_fn(*classifier)

        def log_prob(x_t, t):
            return jnp.take_along_axis(log_p(x_t, t), labels[:, None], axis=1)[:, 0]

        if num_classes:
            predict_fn = with_labels(predict_fn, labels)
        predict_fn = sampling.classifier_guided(chain.schedule, predict_fn, log_prob, guidance)
    elif num_classes and guidance not in (0, 1):
        predict_fn = sampling.classifier_free(predict_fn, labels, num_classes, guidance)
    elif num_classes:  # only the conditional or the unconditional prediction is needed
        labels = labels if guidance else jnp.full_like(labels, num_classes)
        predict_fn = with_labels(predict_fn, labels)
    predict_fn = sampling.respaced(predict_fn, chain.timesteps)
    if config.sample.dynamic_threshold:
        return diffusion.dynamically_thresholded(predict_fn, config.sample.dynamic_threshold)
    return diffusion.clipped(predict_fn) if config.diffusion.clip_x0 else predict_fn


def predict_for(config, schedule, params, labels=None):
    """The predict_fn of parameters on all steps of the chain: clipped if the config says so, for
    these labels, without guidance."""
    net_fn = unet.net_fn(configs.make_model(config), params)
    predict_fn = configs.make_predictor(config, schedule, net_fn)
    if labels is not None:
        predict_fn = with_labels(predict_fn, labels)
    return diffusion.clipped(predict_fn) if config.diffusion.clip_x0 else predict_fn


def with_labels(predict_fn, labels):
    """The predict_fn of a conditional network for given labels."""
    return lambda x_t, t: predict_fn(x_t, t, labels)


def make_step(solver, chain, predict_fn, keys, inputs=None):
    """A solver's step for images with these keys; the noise depends on the network's t.

    The first two arguments make it the `step_of` of a Task, whose inputs it does not need.

    Returns:
      (state, n) to (state, x0_pred), see sampling.make_step.
    """
    times = jnp.asarray(chain.timesteps[solver.steps])

    def noise_fn(n, shape):
        return sampling.noise(keys, times[n], shape)

    return sampling.make_step(solver, predict_fn, noise_fn)


def from_noise(config, chain):
    """The Task of sampling from noise."""
    solver = make_solver(config, chain)
    total, shape = config.diffusion.num_timesteps, configs.image_shape(config)

    def start(keys, inputs):
        return sampling.prior(keys, total, shape)

    return Task(solver, start, functools.partial(make_step, solver, chain))


class Segment(NamedTuple):
    """Rows of a solver's table that run in one scan."""

    rows: np.ndarray  # int32, of the solver's table
    padded_frames_at: np.ndarray  # int32, the rows after which to keep frames, padded with -1
    frames_at: list[int]  # the same without the -1


def make_sampler(
    config,
    label=None,
    frames_at=(),
    x0_at=(),
    task=from_noise,
    classifier=None,
    finish=images.to_uint8,
):
    """Builds the sampler of a config; it compiles once, at the first call.

    Args:
      config: its model, data, diffusion and sample sections are used.
      label: the class of all images; None for all classes in turn.
      frames_at: K rows of the task's solver after which x is kept; see solvers.rows_of_steps.
      x0_at: L rows after which x0_pred is kept.
      task: (config, chain) to a Task.
      classifier: (model, params) for classifier guidance; params are replicated.
      finish: applied to the last x.

    Returns:
      sample(params, indices [N], inputs=None, stop=never, seed=None) → Generated, the images with
      these indices; frames are in the order of the rows. params are replicated (see parallel.py);
      inputs is a tree of arrays [N, …] for the task. Up to rounding, image i depends only on the
      seed (by default sample.seed), i and its inputs. Raises a UserError for non-finite images, and
      signals.Stopped when stop() is true.
    """
    chain = make_chain(config)
    task = task(config, chain)
    num_rows, kept = len(task.solver.steps), (sorted({*frames_at}), sorted({*x0_at}))
    model, classifier_params = classifier or (None, None)
    classes = model.num_classes if model else config.data.num_classes
    begin, run, end = pmapped_task(config, chain, task, model, finish)

    def sample_batch(params, seed, indices, inputs, bar, stop):
        # On a CPU, a gradient inside a scan takes about 12 times as long.
        one_by_one = model is not None and cpu.is_used()
        most = num_rows if one_by_one else most_segments(config, params, len(indices), num_rows)
        segments = split_rows(num_rows, {*kept[0], *kept[1]}, most)
        keys, labels = sampling.image_keys(seed, indices), labels_of(indices, label, classes)
        arrays = parallel.shard(parallel.local_shard((keys, labels, inputs)))
        state, shape = begin(arrays[0], arrays[2]), (len(indices), *configs.image_shape(config))
        stacks = [np.empty((len(rows), *shape), np.uint8) for rows in kept]
        for segment in segments:
            scan = segment.rows, segment.padded_frames_at
            state, frames = run(params, classifier_params, state, *arrays, *scan)
            if segment.frames_at:  # frames leave the device after each segment
                frames = parallel.gather(frames)
                store_frames(stacks, kept, segment.frames_at, frames)
            jax.block_until_ready(state)
            bar.update(len(segment.rows))
            signals.check(stop)
        x, finite = parallel.gather(end(state))
        check_finite(indices, finite)
        return Generated(x, *stacks)

    return functools.partial(in_batches, config, num_rows, sample_batch)


def labels_of(indices, label, classes):
    """The labels of images, [B] int32: `label`, or all classes in turn if it is None.

    None for a model without classes.
    """
    if not classes:
        return None
    return (indices % classes if label is None else np.full(len(indices), label)).astype(np.int32)


def in_batches(
    config,
    num_rows,
    sample_batch,
    params,
    indices,
    inputs=None,
    stop=signals.never,
    seed=None,
):
    """`sample` of make_sampler: batches of sample.batch_size images, with progress."""
    seed = config.sample.seed if seed is None else seed
    devices, count = jax.device_count(), len(indices)
    size = min(config.sample.batch_size, -(-count // devices) * devices)
    batches, total = [], -(-count // size) * num_rows
    with progress.bar(total, "sample", "step") as bar:
        for first in range(0, count, size):
            # The last batch is padded with the last image.
            rows = np.minimum(np.arange(first, first + size), count - 1)
            batch_inputs = jax.tree.map(lambda a, rows=rows: np.asarray(a)[rows], inputs)
            batch_indices = np.asarray(indices)[rows]
            batches.append(sample_batch(params, seed, batch_indices, batch_inputs, bar, stop))
    fields = zip(*batches, strict=True)
    arrays = (np.concatenate(field, -4) if len(field) > 1 else field[0] for field in fields)
    return Generated(*(array[..., :count, :, :, :] for array in arrays))


def most_segments(config, params, num_images, num_rows):
    """How many segments show the progress of a batch: 20, or fewer if there is little to do.

    Each takes about 2 ms to start: with ten of one row, 64 digits took 1.15 times as long as with
    one of ten rows (2 CPU cores, AMD EPYC with AVX-512).
    """
    height, width = config.data.image_size
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    work = size * height * width * num_images * num_rows
    return min(20, num_rows, math.ceil(work / SEGMENT_WORK))


def split_rows(num_rows, frames_at, most):
    """Splits the rows of a solver into Segments, if possible of one length, else of two.

    Segments make progress visible and allow interruption; the results are those of one scan. Each
    length is compiled once.

    Args:
      num_rows: N.
      frames_at: the set of rows after which to keep frames.
      most: how many segments there are; rather half as many, if these are of one length.
    """
    assert frames_at <= set(range(num_rows))
    rows = np.arange(num_rows, dtype=np.int32)
    of_one_length = (n for n in range(most, (most - 1) // 2, -1) if num_rows % n == 0)
    chunks = np.array_split(rows, next(of_one_length, most))
    chosen = [[n for n in chunk.tolist() if n in frames_at] for chunk in chunks]
    most = max(map(len, chosen))
    padded = [np.array(ns + (most - len(ns)) * [-1], np.int32) for ns in chosen]
    return [Segment(*fields) for fields in zip(chunks, padded, chosen, strict=True)]


def pmapped_task(config, chain, task, model, finish):
    """Three functions under pmap: the start of a task, a segment of its rows, and its end.

    Args:
      config: its model, data, diffusion and sample sections are used.
      chain: a Chain.
      task: a Task.
      model: the classifier for classifier guidance, or None.
      finish: applied to the last x.
    """

    def begin(keys, inputs):
        return sampling.init_state(task.solver, task.start(keys, inputs))

    def run(params, classifier_params, state, keys, labels, inputs, rows, frames_at):
        classifier = model and (model, classifier_params)
        predict_fn = guided_predict(config, chain, params, labels, classifier)
        step = task.step_of(predict_fn, keys, inputs)
        state, frames = sampling.reverse_process(step, state, rows, frames_at, keep=_as_uint8)
        return state, jax.tree.map(lambda f: jnp.moveaxis(f, 0, 1), frames)  # [B, K, …]

    def end(state):
        x, *_ = state
        return finish(x), jnp.isfinite(x).all(axis=(1, 2, 3))

    in_axes = (None, None, 0, 0, 0, 0, None, None)
    run = parallel.pmap(run, in_axes=in_axes, donate_argnums=2)
    return parallel.pmap(begin), run, parallel.pmap(end)


def store_frames(stacks, kept, rows, frames):
    """Copies the frames of a segment to their places.

    Args:
      stacks: of x and of x0, [the rows to keep, B, …] each.
      kept: the rows to keep of x and of x0.
      rows: the segment's rows that have frames.
      frames: of x and of x0, [B, K, …] each, K at least the number of these rows.
    """
    for stack, chosen, new in zip(stacks, kept, frames, strict=True):
        for n, frame in zip(rows, np.moveaxis(new, 1, 0), strict=False):
            if n in chosen:
                stack[chosen.index(n)] = frame


def check_finite(indices, finite):
    """Raises a UserError that names the non-finite images of a batch.

    Args:
      indices: [B], of the images.
      finite: [B], whether all pixels of an image are finite.
    """
    bad = sorted({*np.asarray(indices)[~np.asarray(finite)].tolist()})
    if bad:
        raise UserError(
            f"images {listed([*map(str, bad)])} of a batch are not finite, so none is "
            "written: training has diverged (a smaller optim.learning_rate may help), or "
            "sample.guidance is too large"
        )


def _as_uint8(x, x0_pred):
    return images.to_uint8(x), images.to_uint8(x0_pred)


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
      {"label", "classifier"}, arguments of make_sampler.

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


def restore_sampler(config, workdir, task=from_noise, **options):
    """make_sampler for the checkpoint that `sample.checkpoint` chooses, its label and classifier.

    Without a `sample.label`, sampling from noise has all classes in turn; editing has none.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      task: see make_sampler.
      **options: other arguments of make_sampler.

    Returns:
      (step of the checkpoint, sample(indices, inputs=None, stop=never) → Generated).

    Raises:
      UserError: for a missing checkpoint, an unknown label, or a missing classifier.
    """
    num_classes, guidance = config.data.num_classes, guidance_for_run(config, workdir)
    if guidance["label"] is None and task is not from_noise:
        field = "sample.label='': is missing"
        if guidance["classifier"]:
            raise UserError(f"{field}; sample.classifier guides to one class")
        if num_classes and config.train.label_dropout == 0:
            raise UserError(f"{field}; this run has no {configs.missing_null_class(config)}")
        guidance["label"] = num_classes
    warn_of_chain(config)
    if task is not from_noise:
        log.info("%s", describe_sampler(config, task))
    step, params = checkpoint.restore_params(config, workdir)
    warn_of_young_ema(config, step)
    return step, functools.partial(make_sampler(config, task=task, **guidance, **options), params)


def warn_of_chain(config, mean_square=1 / 3):
    """Warns if x at the first sampling step is not noise in the forward process.

    Args:
      config: its diffusion and sample sections are used.
      mean_square: E[x²] of the images, in [-1, 1].
    """
    chain = make_chain(config)
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
    log.info(text, count, which, step, describe_sampler(config))
    x = sampler(np.arange(count), stop=stop).x
    path = pathlib.Path(workdir) / "samples" / f"{sample_name(config, workdir, step)}.npz"
    run_files.write_npz(path, images=x)
    write_grid(path.with_suffix(".png"), config, x)
    log.info("wrote %s and .png", path)
