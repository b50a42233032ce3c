"""Many images from a trained network: batches over all devices, with progress."""

import functools
import hashlib
import logging
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import cpu
from ddpm_jax import configs, parallel, progress, signals
from ddpm_jax.core import diffusion, likelihood, sampling, schedules, unet
from ddpm_jax.files import checkpoint, images
from ddpm_jax.files import workdir as run_files
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

GRID_IMAGES = 256  # nobody looks at a picture of more
MOST_COLUMNS = 16
MOST_OF_START = 0.1  # of the averaged parameters may be what training started from


class Chain(NamedTuple):
    """The steps that a config's sampler takes: S of T."""

    timesteps: np.ndarray  # τ, [S] ints, ascending: the network's time of each step
    schedule: schedules.Schedule  # of these steps, [S] each
    of_network: schedules.Schedule  # of all steps, [T] each


class Generated(NamedTuple):
    """Images, and what they were on the way; uint8."""

    x: np.ndarray  # [N, H, W, C]
    frames: np.ndarray  # [K, N, H, W, C], x_t
    x0_frames: np.ndarray  # [L, N, H, W, C], the x0 predicted on the way to it


def make_chain(config):
    """The Chain of a config's diffusion and sample sections."""
    total, wanted = config.diffusion.num_timesteps, config.sample
    timesteps = schedules.SPACINGS[wanted.spacing](total, wanted.num_steps or total)
    whole = configs.make_schedule(config)
    fewer = len(timesteps) < total
    short = configs.make_schedule(config, timesteps) if fewer else whole
    return Chain(timesteps, short, whole)


def label_number(label, names):
    """The number of a class, from its name or number as in `sample.label`; None where it is empty.

    Raises:
      UserError: for a class that is not there; it lists those that are.
    """
    if label == "":
        return None
    if label in names:
        return names.index(label)
    # Where classes are called by numbers, a number is never a place in their list.
    if label.isdecimal() and int(label) < len(names) and not any(map(str.isdecimal, names)):
        return int(label)
    raise UserError(f"sample.label={label!r}: choose from {', '.join(names)}")


def guided_predict(config, chain, params, labels, classifier=None):
    """What the network says of x_t at a chain's steps, guided and clipped as the config says.

    Args:
      config: its model, data, diffusion and sample sections are used.
      chain: a Chain.
      params: of the network.
      labels: [B] int32, or None for a network that knows none.
      classifier: (model, params) whose gradient guides to the labels.

    Returns:
      predict_fn: (x_t, i [B]) to a Prediction, i in [0, S).
    """
    guidance, known = config.sample.guidance, config.data.num_classes
    net_fn = unet.net_fn(configs.make_model(config), params)
    predict_fn = unguided_predict(config, chain.of_network, net_fn)
    if classifier is not None:
        model, params = classifier
        log_p = unet.net_fn(model, params)

        def log_prob(x_t, t):
            return jnp.take_along_axis(log_p(x_t, t), labels[:, None], axis=1)[:, 0]

        told = labelled(predict_fn, labels) if known else predict_fn
        predict_fn = sampling.classifier_guided(chain.of_network, told, log_prob, guidance)
    elif known and guidance not in (0, 1):
        predict_fn = sampling.classifier_free(predict_fn, labels, known, guidance)
    elif known:  # one of the two halves is enough
        predict_fn = labelled(predict_fn, labels if guidance else jnp.full_like(labels, known))
    predict_fn = sampling.respaced(predict_fn, chain.timesteps)
    return diffusion.clipped(predict_fn) if config.diffusion.clip_x0 else predict_fn


def unguided_predict(config, schedule, net_fn):
    """The network's output as a Prediction, for what the config's network predicts."""
    section = config.diffusion
    return diffusion.predictor(
        schedule, net_fn, prediction=section.prediction, learned=section.variance == "learned"
    )


def labelled(predict_fn, labels):
    """predict_fn of a conditional network, for images of these classes."""
    return lambda x_t, t: predict_fn(x_t, t, labels)


def make_step(config, chain, predict_fn, keys):
    """The config's step of the reverse process for images with these keys.

    Returns:
      (x_t, i) to (x_{t-1}, x0_pred), i in [0, S).
    """
    taus = jnp.asarray(chain.timesteps)

    def step(x_t, i):
        eps = sampling.noise(keys, taus[i], x_t.shape[1:])
        if config.sample.sampler == "ddim":
            eta = config.sample.eta
            return sampling.ddim_step(chain.schedule, predict_fn, x_t, i, eps, eta=eta)
        variance = config.diffusion.variance
        return sampling.ancestral_step(chain.schedule, predict_fn, x_t, i, eps, variance=variance)

    return step


def from_noise(config, chain):
    """Generating from nothing: (start, make_step, steps), see make_sampler."""
    total, shape = config.diffusion.num_timesteps, configs.image_shape(config)

    def start(keys, inputs):
        return sampling.prior(keys, total, shape)

    def step_of(predict_fn, keys, inputs):
        return make_step(config, chain, predict_fn, keys)

    return start, step_of, np.arange(len(chain.timesteps))[::-1]


class Part(NamedTuple):
    """Some steps of the reverse process, which run as one scan."""

    steps: np.ndarray  # int32, in the order they are taken
    slots: np.ndarray  # int32, the steps after which frames are kept, filled up with -1
    kept: list[int]  # the same without the -1


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
      frames_at, x0_at: K and L steps of the task, after which to keep x and x0_pred.
      task: (config, chain) to
        start: (keys [B], inputs) to the first x,
        step_of: (predict_fn, keys, inputs) to a step, (x, i) to (x, x0_pred),
        steps: the i's in their order.
      classifier: (model, params) for classifier guidance; params are replicated.
      finish: applied to the last x.

    Returns:
      sample(params, indices [N], inputs=None, stop=never, seed=None) → Generated, the images with
      these indices; frames are in the order of the steps. params are replicated (see parallel.py);
      inputs is a tree of arrays [N, …] for the task. Up to rounding, image i depends only on the
      seed (by default sample.seed), i and its inputs. Raises a UserError for non-finite images, and
      signals.Stopped when stop() is true.
    """
    chain = make_chain(config)
    start, step_of, steps = task(config, chain)
    model, classifier_params = classifier or (None, None)
    classes = model.num_classes if model else config.data.num_classes
    wanted = set(frames_at), set(x0_at)
    parts = split_steps(steps, wanted[0] | wanted[1], one_by_one=model and cpu.is_used())
    begin, run, end = compiled(config, chain, start, step_of, model, finish)

    def sample_batch(params, seed, numbers, inputs, bar, stop):
        labels, keys = None, sampling.image_keys(seed, numbers)
        if classes:
            labels = numbers % classes if label is None else np.full(len(numbers), label)
            labels = labels.astype(np.int32)
        keys, labels, inputs = parallel.split(parallel.part((keys, labels, inputs)))
        x, shape = begin(keys, inputs), (len(numbers), *configs.image_shape(config))
        stacks = [np.empty((len(steps), *shape), np.uint8) for steps in wanted]
        places = [iter(stack) for stack in stacks]
        for part in parts:
            x, frames = run(
                params, classifier_params, x, keys, labels, inputs, part.steps, part.slots
            )
            if part.kept:  # they leave the device when the part is done
                store_frames(places, wanted, part.kept, parallel.merge(frames))
            jax.block_until_ready(x)
            bar.update(len(part.steps))
            signals.check(stop)
        x, finite = parallel.merge(end(x))
        check_finite(numbers, finite)
        return Generated(x, *stacks)

    return functools.partial(in_batches, config, len(steps), sample_batch)


def in_batches(
    config,
    num_steps,
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
    done, total = [], -(-count // size) * num_steps
    with progress.bar(total, "sample", "step") as bar:
        for first in range(0, count, size):
            # The last batch is filled up with the last image.
            chosen = np.minimum(np.arange(first, first + size), count - 1)
            given = jax.tree.map(lambda a, c=chosen: np.asarray(a)[c], inputs)
            numbers = np.asarray(indices)[chosen]
            done.append(sample_batch(params, seed, numbers, given, bar, stop))
    whole = (np.concatenate(p, -4) if len(p) > 1 else p[0] for p in zip(*done, strict=True))
    return Generated(*(array[..., :count, :, :, :] for array in whole))


def split_steps(steps, kept, one_by_one):
    """A chain's steps in 20 Parts of at most two lengths.

    One scan over all of them would compute the same; in parts it shows progress and can be
    interrupted, and each length is compiled once.

    Args:
      steps: [N] ints, in the order they are taken.
      kept: the set of those after which frames are kept.
      one_by_one: whether each step is a part: on a CPU, a gradient inside a scan takes six times as
        long.
    """
    steps = np.asarray(steps, np.int32)
    assert kept <= set(steps.tolist())
    parts = np.array_split(steps, len(steps) if one_by_one else min(20, len(steps)))
    hits = [[t for t in part.tolist() if t in kept] for part in parts]
    most = max(map(len, hits))
    slots = [np.array(hit + (most - len(hit)) * [-1], np.int32) for hit in hits]
    return [Part(*fields) for fields in zip(parts, slots, hits, strict=True)]


def compiled(config, chain, start, step_of, model, finish):
    """The start of a task, a part of its steps, and its end: three functions under pmap.

    Args:
      config: its model, data, diffusion and sample sections are used.
      chain: a Chain.
      start: of the task.
      step_of: of the task.
      model: of a classifier that guides, or None.
      finish: what is done with the last x.
    """

    def run(params, classifier_params, x, keys, labels, inputs, steps, slots):
        guide = model and (model, classifier_params)
        predict_fn = guided_predict(config, chain, params, labels, guide)
        step = step_of(predict_fn, keys, inputs)
        x, frames = sampling.reverse_process(step, x, steps, slots, keep=_as_uint8)
        return x, jax.tree.map(lambda f: jnp.moveaxis(f, 0, 1), frames)  # [B, K, …]

    def end(x):
        return finish(x), jnp.isfinite(x).all(axis=(1, 2, 3))

    in_axes = (None, None, 0, 0, 0, 0, None, None)
    run = parallel.pmap(run, in_axes=in_axes, donate_argnums=2)
    return parallel.pmap(start), run, parallel.pmap(end)


def store_frames(places, wanted, steps, frames):
    """Puts the frames of a part where they belong.

    Args:
      places: of x_t and of x0, an iterator over the arrays that are still empty.
      wanted: of x_t and of x0, the set of steps to keep.
      steps: the part's steps that have frames.
      frames: of x_t and of x0, [B, K, …] each.
    """
    for empty, of_part, chosen in zip(places, frames, wanted, strict=True):
        for step, frame in zip(steps, np.moveaxis(of_part, 1, 0), strict=False):
            if step in chosen:
                next(empty)[:] = frame


def check_finite(numbers, finite):
    """Raises a UserError that names the images of a batch that are not finite.

    Args:
      numbers: [B], of the images.
      finite: [B], whether all pixels of each are.
    """
    bad = sorted({*np.asarray(numbers)[~np.asarray(finite)].tolist()})
    if bad:
        more = f" and {len(bad) - 5} more" if bad[5:] else ""
        raise UserError(
            f"images {', '.join(map(str, bad[:5]))}{more} of a batch are not finite, so none is "
            "written: training has diverged (a smaller optim.learning_rate may help), or "
            "sample.guidance is too large"
        )


def _as_uint8(x, x0_pred):
    return images.to_uint8(x), images.to_uint8(x0_pred)


def write_grid(path, config, x):
    """A picture of the first images."""
    images.write_png(path, images.grid(x[:GRID_IMAGES], grid_columns(config)))


def grid_columns(config):
    """sample.columns; or one for each class if they come in turn and are few; or None, which leaves
    it to the grid."""
    classes, in_turn = config.data.num_classes, config.sample.label == ""
    of_classes = classes if in_turn and classes <= MOST_COLUMNS else 0
    return config.sample.columns or of_classes or None


def load_classifier(config):
    """The classifier that `sample.classifier` names, or None: (model, params, label names).

    Raises:
      UserError: if it is no run of a classifier, or one of other images or another chain.
    """
    workdir = config.sample.classifier
    if not workdir:
        return None
    field = f"sample.classifier={workdir!r}"
    saved = run_files.load_config(workdir)
    mine, its = configs.flatten(config), configs.ADDED | configs.flatten(saved or {})
    if its["model.kind"] != "classifier":
        raise UserError(f"{field}: holds no classifier (model.kind='classifier')")
    for name in (name for name in mine if name.startswith(configs.IDENTITY["use"])):
        if name not in its:
            raise UserError(f"{field}: its config.json lacks {name}")
        configs.check_kind(f"{field}: its {name}", its[name], type(mine[name]))
    chain = ("schedule", "num_timesteps", "beta_start", "beta_end")
    for name in ("data.image_size", "data.channels", *(f"diffusion.{name}" for name in chain)):
        if mine[name] != its[name]:
            raise UserError(f"{field}: its {name} is {its[name]!r}, this run's {mine[name]!r}")
    _, params = checkpoint.restore_params(saved, workdir)
    return configs.make_model(saved), params, run_files.load_label_names(workdir)


def who_guides(config, names):
    """The class and the classifier that a config's sample section asks for.

    Args:
      config: checked.
      names: of the run's own classes.

    Returns:
      {"label", "classifier"} as make_sampler takes them.

    Raises:
      UserError: if there is no such label or classifier, or it knows other classes.
    """
    found = load_classifier(config)
    if found is None:
        return {"label": label_number(config.sample.label, names), "classifier": None}
    *classifier, its_names = found
    if names and names != its_names:
        text = f"sample.classifier={config.sample.classifier!r}: knows other classes"
        raise UserError(f"{text}: {', '.join(its_names)}")
    label = label_number(config.sample.label, its_names)
    return {"label": label, "classifier": tuple(classifier)}


def class_names(config, workdir):
    """The names of a run's classes; where they are lost, their numbers."""
    return run_files.load_label_names(workdir) or tuple(map(str, range(config.data.num_classes)))


def run_guides(config, workdir):
    """who_guides for a run that was trained."""
    return who_guides(config, class_names(config, workdir))


def restore_sampler(config, workdir, in_turn=True, **options):
    """make_sampler for a run: with its newest parameters, label names and classifier.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      in_turn: whether without a `sample.label` the images are of all classes in turn, or of none.
      **options: more arguments of make_sampler.

    Returns:
      (step of the checkpoint, sample(indices, inputs=None, stop=never) → Generated).

    Raises:
      UserError: if there is no checkpoint, no such label, or no such classifier.
    """
    known, guides = config.data.num_classes, run_guides(config, workdir)
    if guides["label"] is None and not in_turn:
        field = "sample.label='': is missing"
        if guides["classifier"]:
            raise UserError(f"{field}; sample.classifier guides to one class")
        if known and config.train.label_dropout == 0:
            raise UserError(f"{field}; this run was always told the class (train.label_dropout=0)")
        guides["label"] = known
    warn_of_chain(config)
    step, params = checkpoint.restore_params(config, workdir)
    warn_of_young_ema(config, step)
    return step, functools.partial(make_sampler(config, **guides, **options), params)


def warn_of_chain(config, mean_square=1 / 3):
    """Says so if sampling starts from noise where the images of the forward process are none yet.

    Args:
      config: its diffusion and sample sections are used.
      mean_square: E[x²] of the images, in [-1, 1].
    """
    chain = make_chain(config)
    start, last = int(chain.timesteps[-1]), config.diffusion.num_timesteps - 1
    kl = likelihood.prior_kl(chain.of_network, mean_square)
    kl_of_start = likelihood.prior_kl(chain.schedule, mean_square)
    if kl > likelihood.MAX_PRIOR_KL:
        log.warning(
            "the chain does not end in noise (a prior KL of %.2g bits/dim): sampling starts where "
            "training never was. Train with more diffusion.num_timesteps, or with "
            "diffusion.schedule=linear_rescaled",
            kl,
        )
    elif start < last and kl_of_start > likelihood.MAX_PRIOR_KL:
        log.warning(
            "sample.num_steps=%d: sampling starts at t = %d, where images are not noise yet",
            len(chain.timesteps),
            start,
        )


def warn_of_young_ema(config, step):
    """Says so if the averaged parameters have hardly moved from where training started."""
    left = config.optim.ema_decay**step
    if config.sample.use_ema and step > 0 and left > MOST_OF_START:
        log.warning(
            "the averaged parameters are still %.0f %% the initial ones (optim.ema_decay=%g, step "
            "%d); --noconfig.sample.use_ema samples from the raw ones",
            100 * left,
            config.optim.ema_decay,
            step,
        )


def sample_name(config, workdir, step):
    """The name of the files with a checkpoint's samples; no two that differ have the same."""
    return f"sample_{step:06d}_n{config.sample.num_samples}_{settings(config, workdir)}"


def settings(config, workdir):
    """The part of a file's name that tells samples of one checkpoint apart: seed0_ddim50_label7."""
    wanted, chain, saved = config.sample, config.diffusion, run_files.load_config(workdir)
    fewer = wanted.num_steps not in (0, chain.num_timesteps)
    parts = {
        f"seed{wanted.seed}": True,
        "raw": not wanted.use_ema,
        config.model.dtype: config.model.dtype != saved.model.dtype,
        chain.variance: chain.variance != saved.diffusion.variance,
        f"clip{chain.clip_x0:d}": chain.clip_x0 != saved.diffusion.clip_x0,
        f"{wanted.sampler}{wanted.num_steps or ''}": wanted.sampler != "ancestral" or fewer,
        wanted.spacing: wanted.spacing != "leading" and fewer,
        f"eta{wanted.eta:g}": wanted.eta > 0,
        f"label{_in_a_name(wanted.label)}": wanted.label != "",
        f"guidance{wanted.guidance:g}": wanted.guidance != 1,
        _in_a_name(wanted.classifier): wanted.classifier != "",
    }
    return "_".join(part for part, said in parts.items() if said)


def _in_a_name(text):
    """A label or a path as part of a file's name; what would be lost of it is in a digest."""
    short = re.sub(r"[^\w.-]", "-", pathlib.Path(text).name)[:40]
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
    return short if short == text else f"{short}-{digest}"


def sample(config, workdir, stop=signals.never):
    """Generates `sample.num_samples` images from a run's newest checkpoint.

    Writes samples/sample_<step>_n<count>_<settings>.npz (`images`, uint8 [N, H, W, C]) and a .png
    that shows the first of them; see `settings`.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      stop: from signals.catch.

    Raises:
      UserError: if there is no checkpoint, or the images are not finite.
      signals.Stopped: if a signal came first; nothing is written then.
    """
    step, sampler = restore_sampler(config, workdir)
    count, which = config.sample.num_samples, "EMA" if config.sample.use_ema else "raw"
    log.info("sampling %d images from the %s parameters of step %d", count, which, step)
    x = sampler(np.arange(count), stop=stop).x
    path = pathlib.Path(workdir) / "samples" / f"{sample_name(config, workdir, step)}.npz"
    run_files.write_npz(path, images=x)
    write_grid(path.with_suffix(".png"), config, x)
    log.info("wrote %s and .png", path)
