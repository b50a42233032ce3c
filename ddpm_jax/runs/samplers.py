"""Sampling many images from a network: in batches over all devices, with progress."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import configs, cpu, parallel, progress, signals
from ddpm_jax.core import diffusion, sampling, schedules, solvers, spacings, unet
from ddpm_jax.errors import UserError, listed
from ddpm_jax.files import images

# Parameters × pixels × images × rows of a segment: 0.3 seconds on 2 CPU cores (AMD EPYC).
SEGMENT_WORK = 10**11


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
