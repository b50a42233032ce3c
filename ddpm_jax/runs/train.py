"""Training: the loop around the steps, which resumes, logs, saves and draws."""

import collections
import contextlib
import fractions
import functools
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import checks, configs, packing, parallel, progress, signals
from ddpm_jax.core import likelihood
from ddpm_jax.errors import UserError, one_line, printable
from ddpm_jax.files import checkpoint, data, disk, images, run_files
from ddpm_jax.runs import frames, generate, objective, samplers, scores, states

log = logging.getLogger(__name__)

# Steps that may wait to be computed. With 32, XLA's CPU runtime deadlocks: the thread that starts
# the next step on a device waits for room, and no thread is left for that device's part of a mean.
AHEAD = 4


class Span(NamedTuple):
    """The steps of one call of `train`."""

    first: int  # the step of the first state
    last: int
    epoch: fractions.Fraction  # steps per epoch

    def due(self, step, interval):
        """Whether the step reaches a multiple of an interval, which may be a fraction."""
        reached = step > 0 and step // interval > (step - 1) // interval
        return step == self.last or reached


class Action(NamedTuple):
    """Something that shows the progress of training."""

    interval: Any  # in steps; may be a fraction
    run: Callable  # (step, state)
    is_done: bool  # whether the run's folder has its result of the first step

    def due(self, span, step):
        """Whether it is to be done at a step of a Span."""
        return span.due(step, self.interval) and (step > span.first or not self.is_done)


def train(config, workdir, arrays=None):
    """Trains a run from scratch, or resumes it from its newest checkpoint.

    Args:
      config: checked (see checks.py).
      workdir: the run's folder; nothing is written before all inputs are checked.
      arrays: a data.Batch of all images, if they are not in files.

    Returns:
      0 when the run is finished, or the number of the signal that stopped it (after saving).

    Raises:
      UserError: if the folder holds another run (see check_changes), or another program trains in
        it; for invalid data (during training, after saving); or for non-finite losses.
    """
    workdir = pathlib.Path(workdir)
    source, eval_source = open_data(config, workdir, arrays)
    chosen = scores.choose(config, arrays) if config.train.score_every else None
    guidance = generate.guidance_for(config, source.label_names)
    last = configs.num_steps(config.train, source.size)
    check_changes(config, workdir, last)
    schedule, model = configs.make_schedule(config), configs.make_model(config)
    optimizer = states.make_optimizer(config.optim, last)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk.lock(workdir, "train"))
        run_files.save_config(config, workdir)
        run_files.save_data(source, workdir)
        stop = stack.enter_context(signals.catch())
        manager = stack.enter_context(checkpoint.open_manager(workdir, config.train))
        state = states.create_state(config, model, optimizer)
        state = checkpoint.restore(manager, parallel.replicate(state))
        epoch = fractions.Fraction(source.size, config.train.batch_size)
        span = Span(int(state.step), last, epoch)
        describe(config, state, schedule, source, eval_source)
        state = packing.pack(state)
        step_fn = objective.make_train_step(config, model, schedule, optimizer)
        if span.first < last:
            if parallel.is_first():
                (workdir / "report.html").unlink(missing_ok=True)  # it is written again at the end
            describe_memory(step_fn, state, source, config.train.batch_size)
        eval_loss = objective.make_eval_loss(config, model, schedule, eval_source)
        sample = make_grid_sampler(config, guidance)
        score = None
        with contextlib.suppress(signals.Stopped):  # the loop below ends before its first step
            score = chosen and scores.make_score(config, source, chosen, sample, workdir, stop)
        with contextlib.closing(run_files.Metrics(workdir, span.first)) as metrics:
            actions = make_actions(config, workdir, span, metrics, eval_loss, sample, score, stop)
            steps = updates(config, state, step_fn, source)

            def save(step, state):
                if step > span.first:
                    checkpoint.save(manager, step, packing.unpack(state))

            run_loop(config, workdir, span, steps, metrics, save, actions, stop)
        manager.wait_until_finished()
        caught, step = stop(), manager.latest_step()
        if caught:
            saved = "no step was trained" if step is None else f"step {step} is saved"
            log.info("stopped by %s; %s", signal.Signals(caught).name, saved)
    return caught


def open_data(config, workdir, arrays):
    """Opens the training and the held-out images: two Sources.

    Raises:
      UserError: for invalid data, or a run that was started with another config or other data.
    """
    checkpoint.check_path(workdir)
    saved = run_files.load_config(workdir)
    # A run at step 0 was imported: it does not depend on data and seed yet.
    trained = saved is not None and checkpoint.latest_step(workdir) != 0
    if saved is not None:
        checks.check_same_run(saved, config, workdir, "train" if trained else "imported")
    source, eval_source = (
        data.open_source(config.data, field, arrays) for field in ("split", "eval_split")
    )
    if trained:
        moved = saved.data.path != config.data.path
        run_files.check_same_data(source, workdir, moved)
    return source, eval_source


def check_changes(config, workdir, last):
    """Logs how the training of a run, or its scores, change from here on.

    Raises:
      UserError: if no step is left to be trained so: config.json would name what was not used.
    """
    saved, step = run_files.load_config(workdir), checkpoint.latest_step(workdir)
    if saved is None or not step:
        return
    if step > last:
        field = "num_epochs" if config.train.num_epochs else "num_steps"
        text = f"train.{field}={config.train[field]}: {workdir} has {step} steps already"
        raise UserError(f"{text}; give as many, or more, or another --workdir")
    flat = configs.flatten(saved), configs.flatten(config)
    names = [n for n in checks.TRAINING if n != "train.label_dropout" or config.data.num_classes]
    changed = ", ".join(checks.changes(*flat, names))
    if changed and step == last:
        text = f"workdir={workdir}: is finished, and its config.json has other settings: {changed}"
        raise UserError(f"{text}; give another --workdir, or more steps")
    if changed:
        log.info("trained differently from step %d on: %s", step, changed)
    changed = ", ".join(checks.changes(*flat, checks.SCORING))
    if changed and saved.train.score_every and config.train.score_every and step < last:
        log.warning("scores before and after step %d do not compare: %s", step, changed)


def make_actions(config, workdir, span, metrics, eval_loss, sample, score, stop):
    """What shows the progress of training: {name: Action}.

    A signal may have stopped the run before all actions of its last step were done. So at
    span.first, an action runs only if its result is missing.

    Args:
      config: its train and sample sections are used.
      workdir: the run's folder.
      span: the steps to do.
      metrics: a run_files.Metrics.
      eval_loss: from objective.make_eval_loss.
      sample: from samplers.make_sampler; None for a classifier.
      score: from scores.make_score; None for none.
      stop: from signals.catch.
    """
    section = config.train
    logged = {k for x in run_files.read_metrics(workdir) if x["step"] == span.first for k in x}

    def end_epoch(step, state):
        mean = epoch_mean(workdir, span, step)
        metrics.write(step, epoch_loss=mean)
        log.info("epoch %d: mean loss %.6f", step // span.epoch, mean)

    def evaluate(step, state):
        ema_params = state.ema_params[configs.ema_index(config)]
        raw, ema = (eval_loss(p, stop) for p in (state.params, ema_params))
        if not stop():
            metrics.write(step, eval_loss=raw, eval_loss_ema=ema)

    def measure(step, state):
        with contextlib.suppress(signals.Stopped):
            metrics.write(step, **score(step, parameters(config, state), stop))

    def draw(step, state):
        generate.warn_of_young_ema(config, step)
        write_grid(grid_path(step), sample, config, state, stop)

    def grid_path(step):
        return workdir / "samples" / f"step_{step:06d}.png"

    actions = {}
    if section.num_epochs:
        actions["the epoch's loss"] = span.epoch, end_epoch, "epoch_loss" in logged
    actions["the held-out loss"] = section.eval_every, evaluate, "eval_loss" in logged
    if sample is not None:
        actions["the sample grid"] = section.sample_every, draw, grid_path(span.first).exists()
    if score is not None:
        actions["the score"] = section.score_every, measure, bool(logged & {*run_files.SCORES})
    # A network file system may show each process another state of the folder.
    return {
        name: Action(interval, run, bool(parallel.broadcast_from_first(is_done)))
        for name, (interval, run, is_done) in actions.items()
    }


def attempt(name, action):
    """Runs an action that training does not depend on; if it fails, warns and continues.

    With several processes, the error is raised: a process cannot know whether the others failed.
    """
    try:
        action()
    except Exception as error:
        if jax.process_count() > 1:
            raise
        text = one_line(error) if isinstance(error, UserError) else repr(error)
        log.warning("%s failed, and was skipped: %s", name, printable(text))


def updates(config, state, step_fn, source):
    """Trains without end: yields (state, metrics of the last step, error).

    The first metrics are None. The error is a UserError if the next batch cannot be read. At most
    AHEAD steps wait to be computed.
    """
    batches = data.batches(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        first_step=int(state.step),
        random_flip=config.data.random_flip,
    )
    values, started = None, collections.deque()
    while True:
        batch = error = None
        try:
            batch = next(batches)
        except UserError as caught:  # grain has added lines of its own
            error = UserError(str(caught).partition("\n")[0])
        yield state, values, error
        state, values = step_fn(state, parallel.shard(batch))
        started.append(values)
        if len(started) > AHEAD:
            jax.block_until_ready(started.popleft())


def run_loop(config, workdir, span, steps, metrics, save, actions, stop):
    """Trains to the last step or until a signal; logs, saves, and runs the actions when due.

    Args:
      config: its train section and optim.max_skipped are used.
      workdir: the run's folder.
      span: the steps to do.
      steps: from `updates`.
      metrics: a run_files.Metrics.
      save: (step, state); called before the actions, so that a failing action loses no steps.
      actions: from make_actions; they run in this order, and all at the last step.
      stop: from signals.catch; when it is true, the state is saved and the loop ends.

    Raises:
      UserError: after more than optim.max_skipped consecutive skipped updates; or for unreadable
        data, after saving.
    """
    section = config.train
    pending, skipped = [], 0  # metrics since the last log line; consecutive skipped updates
    mark = span.first, time.monotonic()  # step and time, for images/s
    with progress.bar(span.last, "train", "step", initial=span.first, leave=True) as bar:
        for step, (state, values, error) in enumerate(steps, span.first):
            if values is not None:
                pending.append(values)
                bar.update()
            if step < span.last and error and jax.process_count() > 1:
                raise error  # saving needs all processes, and the others do not know of the error
            # behind: do not wait for the step that has just started
            ends = stop(behind=2) or (error and step < span.last)
            due = {k: a.run for k, a in actions.items() if not ends and a.due(span, step)}
            # A score that is interrupted goes on from a checkpoint of its step.
            saves = span.due(step, section.checkpoint_every) or "the score" in due
            saves = saves and not ends
            if pending and (ends or due or saves or span.due(step, section.log_every)):
                pending = jax.device_get(pending)  # all at once, not one number after another
                skipped = count_skipped(pending, step, skipped, config.optim.max_skipped)
                speed = (step - mark[0]) * section.batch_size / (time.monotonic() - mark[1])
                metrics.write(
                    step,
                    epoch=float(step / span.epoch),
                    **(means := summarize(pending)),
                    images_per_second=speed,
                )
                bar.set_postfix_str(progress_text(config, workdir, span, step, means, speed))
                pending, mark = [], (step, time.monotonic())
            # While updates are skipped, the parameters may be the cause: keep older checkpoints.
            if saves and (not skipped or step == span.last):
                save(step, state)
            whole = packing.unpack(state) if due else None
            for name, action in due.items():
                attempt(f"step {step}: {name}", functools.partial(action, step, whole))
            if ends or stop.agreed or step >= span.last:
                save(step, state)
                break
            if due or saves:
                mark = step, time.monotonic()  # images/s does not count this time
    if error and step < span.last and not stop.agreed:
        raise error


def progress_text(config, workdir, span, step, means, speed):
    """The text of the progress bar; with train.num_epochs it has the epoch's mean loss."""
    loss = f"loss {means.get('loss', np.nan):.4f}"
    if config.train.num_epochs:
        loss += f" (epoch: {epoch_mean(workdir, span, step):.4f})"
    return f"epoch {float(step / span.epoch):.2f}, {loss}, {speed:.0f} img/s"


def epoch_mean(workdir, span, step):
    """The mean loss of a step's epoch, up to this step."""
    start = math.ceil((step - 1) // span.epoch * span.epoch)
    return mean_loss(run_files.read_metrics(workdir), start, step)


def count_skipped(pending, step, skipped, most):
    """The number of consecutive skipped updates up to `step`.

    Args:
      pending: the metrics of the last steps, up to `step`.
      step: int.
      skipped: the number before these steps.
      most: the maximum.

    Raises:
      UserError: if the number exceeds the maximum.
    """
    for number, values in enumerate(pending, step - len(pending) + 1):
        skipped = 0 if values["applied"] else skipped + 1
        if skipped > most:
            raise UserError(
                f"loss={values['loss']:g}, gradient norm={values['grad_norm']:g}: not finite at "
                f"step {number}, and at the optim.max_skipped={most} steps before it; the newest "
                "checkpoint is older; a smaller optim.learning_rate may help"
            )
    return skipped


def summarize(pending):
    """The mean metrics of some steps; skipped updates are only counted."""
    columns = {k: np.array([v[k] for v in pending]) for k in pending[0]}
    applied = columns.pop("applied")
    columns = {k: v[applied] for k, v in columns.items()}
    share, loss_share = columns.pop("share").sum(0), columns.pop("loss_share").sum(0)
    means = {k: float(v.mean()) for k, v in columns.items()} if applied.any() else {}
    quarters = {f"loss_q{i + 1}": loss_share[i] / share[i] for i in range(4) if share[i] > 0}
    means |= {k: float(v) for k, v in quarters.items()}
    return means | {"skipped": int((~applied).sum())}


def mean_loss(lines, start, end):
    """The mean loss of the applied steps in (start, end].

    Args:
      lines: of metrics.jsonl; a line has the mean loss since the line before it.
      start: the step of a line, or 0.
      end: the step of a line.
    """
    total, count, before = 0.0, 0, 0
    for line in (line for line in lines if "skipped" in line):
        if start < line["step"] <= end and "loss" in line:
            applied = line["step"] - before - line["skipped"]
            total, count = total + applied * line["loss"], count + applied
        before = line["step"]
    return total / count if count else float("nan")


def make_grid_sampler(config, guidance):
    """The sampler of the grids, that of the show section; None for a classifier."""
    if config.model.kind == "classifier":
        return None
    config = configs.for_show(config)
    log.info("sample grids: %s", samplers.describe_sampler(config))
    return samplers.make_sampler(config, **guidance, **frames.of_reverse(config).options)


def parameters(config, state):
    """The parameters of a state that the config's sample section chooses: an EMA, or the raw."""
    if not config.sample.use_ema:
        return state.params
    return state.ema_params[configs.ema_index(config)]


def write_grid(path, sample, config, state, stop):
    """Samples from a state and writes a grid to path, unless a signal interrupts it."""
    indices = np.arange(min(config.sample.num_samples, generate.GRID_IMAGES))
    with contextlib.suppress(signals.Stopped):
        generated = sample(parameters(config, state), indices, stop=stop)
        generate.write_grid(path, config, generated.x)


def describe(config, state, schedule, source, eval_source):
    """Logs the devices, data, network and chain; warns if the chain does not end in noise."""
    devices = jax.devices()
    log.info("devices: %d x %s", len(devices), devices[0].device_kind)
    height, width, channels = configs.image_shape(config)
    text = "data: %s, %d images to train, %d held out, %dx%dx%d"
    log.info(text, config.data.name, source.size, eval_source.size, height, width, channels)
    log.info("network: %s parameters", f"{sum(p.size for p in jax.tree.leaves(state.params)):,}")
    first = np.arange(min(eval_source.size, 256))
    mean_square = float(np.mean(np.square(images.to_float(eval_source.read(first).images))))
    alpha_bar = float(configs.make_alpha_bars(config)[-1])
    kl = likelihood.prior_kl(alpha_bar, mean_square)
    log.info(
        "chain: T = %d, ᾱ_T = %.4g, prior KL %.3g bits/dim", schedule.num_timesteps, alpha_bar, kl
    )
    draws = config.model.kind == "unet"
    generate.warn_of_chain(configs.for_show(config) if draws else config, mean_square)
    step = int(state.step)
    if step >= configs.num_steps(config.train, source.size):
        field = "num_epochs" if config.train.num_epochs else "num_steps"
        log.info("this run is finished (%d steps); a larger train.%s continues it", step, field)
    elif step:
        log.info("resuming from the checkpoint of step %d", step)


def describe_memory(step_fn, state, source, batch_size):
    """Compiles the train step and logs its memory; warns if it does not fit."""
    batch = source.read(np.zeros(batch_size // jax.process_count(), int))
    start = time.monotonic()
    compiled = step_fn.lower(state, parallel.shard(batch)).compile()  # the first step reuses it
    seconds, memory = time.monotonic() - start, compiled.memory_analysis()
    parallel.barrier()  # the first step connects all devices, with a timeout of 30 seconds
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    available = parallel.device_memory()
    total_gib, arguments_gib, available_gib = (
        f"{n / 2**30:.2f} GiB" for n in (total, arguments, available)
    )
    log.info(
        "compiled in %.1f s; memory per device: %s%s, of which %s parameters, optimizer and data",
        seconds,
        total_gib,
        f" of {available_gib}" if available else "",
        arguments_gib,
    )
    if 0 < available < total:
        log.warning(
            "not enough memory: use a smaller train.batch_size, a larger optim.accumulate (smaller "
            "microbatches), model.remat=true, or more devices"
        )
