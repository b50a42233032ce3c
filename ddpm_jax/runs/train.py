"""Training (Ho et al. 2020, Algorithm 1): the step, and the loop around it."""

import contextlib
import fractions
import functools
import logging
import math
import pathlib
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import configs, cpu, parallel, progress, signals
from ddpm_jax.core import diffusion, likelihood, unet, weights
from ddpm_jax.errors import UserError, one_line, printable
from ddpm_jax.files import checkpoint, data, images
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import generate
from ddpm_jax.runs import state as states

log = logging.getLogger(__name__)

# The held-out loss always uses the same noise, whatever the run's seed.
EVAL_SEED = 20200619
HYBRID_WEIGHT = 0.001  # λ of the bound in the hybrid loss, with the bound in bits/dim


def step_keys(seed, step, indices):
    """[B] PRNG keys, a function of (seed, step, global example index) only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def draw(keys, image_shape, num_timesteps):
    """The random variables of each training example, drawn with its key.

    Args:
      keys: [B] PRNG keys.
      image_shape: (H, W, C).
      num_timesteps: T.

    Returns:
      t: [B] int32, uniform in [0, T).
      eps: [B, H, W, C], standard normal.
      dropout_keys: [B] PRNG keys.
      label_uniforms: [B], uniform in [0, 1), which decide whether the label is dropped.
    """

    def draw_one(key):
        t_key, eps_key, dropout_key, label_key = jax.random.split(key, 4)
        t = jax.random.randint(t_key, (), 0, num_timesteps)
        eps, label_uniform = jax.random.normal(eps_key, image_shape), jax.random.uniform(label_key)
        return t, eps, dropout_key, label_uniform

    return jax.vmap(draw_one)(keys)


def low_discrepancy(seed, step, batch_size, num_timesteps):
    """Timesteps that are evenly spread over a global batch (Kingma et al. 2021).

      t_i = ⌊T · (u + i / B mod 1)⌋, with one u ~ U(0, 1) for the whole batch

    Args:
      seed: int.
      step: of the training.
      batch_size: B, over all devices.
      num_timesteps: T.

    Returns:
      [B] int32, each uniform in [0, T).
    """
    (key,) = step_keys(seed, step, jnp.array([batch_size]))  # of no example
    fractions = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1
    return jnp.minimum(num_timesteps * fractions, num_timesteps - 1).astype(jnp.int32)


def make_loss(config, model, schedule):
    """Builds the loss of a config.

    Args:
      config: its model and diffusion sections are used.
      model: the network.
      schedule: coefficients, each [T].

    Returns:
      loss(params, x0 [B, H, W, C], labels [B] or None, t [B], eps [B, H, W, C], dropout_keys) →
      [B]: L_simple; the VLB's term at t, bits/dim, without clipping; both of them; or the
      cross-entropy, nats.
    """
    section = config.diffusion
    variance = section.variance
    options = {name: section[name] for name in ("min_snr_gamma", "p2_gamma", "p2_k")}
    of_t = weights.loss_weights(
        configs.make_alpha_bars(config), section.prediction, section.loss_weight, **options
    )
    of_t = jnp.asarray(of_t, jnp.float32)

    def simple(net_fn, x0, labels, t, eps):
        mse = diffusion.simple_loss(schedule, net_fn, x0, t, eps, section.prediction)
        return mse if section.loss_weight == "none" else of_t[t] * mse

    def hybrid(net_fn, x0, labels, t, eps):
        # L_simple + λ L_vlb (Nichol & Dhariwal 2021, Eq. 16). The bound is T times its term at a
        # random t. It trains the variance only: the mean is constant in it.
        output = net_fn(diffusion.q_sample(schedule, x0, t, eps), t)
        mean, of_variance = jnp.split(output, 2, axis=-1)
        constant = jnp.concatenate([jax.lax.stop_gradient(mean), of_variance], axis=-1)
        bound = schedule.num_timesteps * vlb(lambda *_: constant, x0, labels, t, eps)
        return simple(lambda *_: mean, x0, labels, t, eps) + HYBRID_WEIGHT * bound

    def vlb(net_fn, x0, labels, t, eps):
        predict_fn = generate.unguided_predict(config, schedule, net_fn)
        terms, _ = likelihood.vlb_terms(schedule, predict_fn, x0, t, eps, variances=(variance,))
        return terms[variance]

    def cross_entropy(net_fn, x0, labels, t, eps):
        log_p = net_fn(diffusion.q_sample(schedule, x0, t, eps), t)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]

    is_classifier = config.model.kind == "classifier"
    losses = {"simple": simple, "vlb": vlb, "hybrid": hybrid}
    loss_of = cross_entropy if is_classifier else losses[section.loss]

    def loss(params, x0, labels, t, eps, dropout_keys=None):
        condition = () if labels is None or is_classifier else (labels,)
        apply = unet.net_fn(model, params, dropout_keys)
        return loss_of(lambda x_t, t: apply(x_t, t, *condition), x0, labels, t, eps)

    return loss


def mean_over_microbatches(function, batch, count):
    """The mean of function over microbatches, one after another to save memory.

    Args:
      function: a batch to a tree of arrays, each a mean over the batch.
      batch: a tree of arrays [B, ...].
      count: number of microbatches; divides B.

    Returns:
      The tree of function's means over the whole batch.
    """
    if count == 1:
        return function(batch)
    batch = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], batch))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, microbatch):
        # In the unrolled loop, too, a microbatch must wait until the one before it is done.
        total, microbatch = jax.lax.optimization_barrier((total, microbatch))
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    # On a CPU, a gradient inside a loop takes about 12 times as long.
    total, _ = jax.lax.scan(add, total, batch, unroll=cpu.is_used())
    return jax.tree.map(lambda x: x / count, total)


def train_step(
    state,
    batch,
    *,
    loss_fn,
    num_timesteps,
    optimizer,
    ema_decay,
    label_dropout,
    seed,
    accumulate=1,
    timesteps="uniform",
):
    """One update of Algorithm 1, under parallel.pmap; a non-finite gradient changes the step only.

    Args:
      state: a TrainState.
      batch: a data.Batch, this device's shard of the global batch.
      loss_fn: from make_loss.
      num_timesteps: T.
      optimizer: an optax transformation; it clips the gradient after the mean over devices.
      ema_decay: of the parameters' moving average, in [0, 1).
      label_dropout: (rate, the label for "no class"), for classifier-free guidance.
      seed: int.
      accumulate: microbatches of the shard, for gradient accumulation.
      timesteps: how t is drawn, "uniform" or "low_discrepancy".

    Returns:
      (state, metrics), means over the global batch: the loss; the gradient's norm before clipping;
      for each quarter of the timesteps [4] the share of examples, and their loss times this share;
      and whether the update was applied.
    """
    x0, labels = images.to_float(batch.images), batch.labels
    indices = parallel.example_indices(len(x0))
    keys = step_keys(seed, state.step, indices)
    t, eps, dropout_keys, label_uniforms = draw(keys, x0.shape[1:], num_timesteps)
    if timesteps == "low_discrepancy":
        batch_size = len(x0) * jax.lax.axis_size(parallel.AXIS)
        t = low_discrepancy(seed, state.step, batch_size, num_timesteps)[indices]
    if labels is not None:
        rate, null_label = label_dropout
        labels = jnp.where(label_uniforms < rate, null_label, labels)

    def mean_loss(params, x0, labels, t, eps, dropout_keys):
        losses = loss_fn(params, x0, labels, t, eps, dropout_keys)
        quarter = jax.nn.one_hot(4 * t // num_timesteps, 4)
        quarters = {"share": quarter.mean(0), "loss_share": (losses[:, None] * quarter).mean(0)}
        return losses.mean(), quarters

    def loss_and_gradient(examples):
        return jax.value_and_grad(mean_loss, has_aux=True)(state.params, *examples)

    examples = x0, labels, t, eps, dropout_keys
    means = mean_over_microbatches(loss_and_gradient, examples, accumulate)
    (loss, quarters), grads = jax.lax.pmean(means, parallel.AXIS)
    norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm)
    state = states.apply_gradients(state, grads, optimizer, ema_decay, applied)
    return state, {"loss": loss, "grad_norm": norm, **quarters, "applied": applied}


def make_train_step(config, model, schedule, optimizer, devices=None):
    """train_step over all devices: (state, Batch of [devices, B, …]) → (state, metrics)."""
    rate = 0.0 if config.model.kind == "classifier" else config.train.label_dropout

    def step(state, batch):
        return train_step(
            state,
            batch,
            loss_fn=make_loss(config, model, schedule),
            num_timesteps=schedule.num_timesteps,
            optimizer=optimizer,
            ema_decay=config.optim.ema_decay,
            label_dropout=(rate, config.data.num_classes),
            seed=config.seed,
            accumulate=config.optim.accumulate,
            timesteps=config.train.timesteps,
        )

    # The state is replicated before and after, and its buffers are reused.
    return parallel.pmap(
        step, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices
    )


def make_eval_loss(config, model, schedule, source):
    """The held-out loss: with the same images, timesteps (evenly spaced) and noise every time.

    Args:
      config: its train, model and diffusion sections are used.
      model: the network.
      schedule: coefficients, each [T].
      source: the held-out images.

    Returns:
      eval_loss(params, stop=never) → the mean over the first `train.eval_images` images; None if
      stop() becomes true.
    """
    loss_fn = make_loss(config, model, schedule)
    count, size = min(config.train.eval_images, source.size), config.train.batch_size
    num_timesteps = schedule.num_timesteps

    def batch_loss(params, batch, indices):
        x0, keys = images.to_float(batch.images), step_keys(EVAL_SEED, 0, indices)
        _, eps, *_ = draw(keys, x0.shape[1:], num_timesteps)
        t = jnp.minimum(indices, count - 1) * num_timesteps // count
        loss = loss_fn(params, x0, batch.labels, t, eps)
        return jax.lax.psum(jnp.sum(jnp.where(indices < count, loss, 0)), parallel.AXIS)

    batch_loss = parallel.pmap(batch_loss, in_axes=(None, 0, 0), out_axes=None)

    def eval_loss(params, stop=signals.never):
        total = 0.0
        for first in range(0, count, size):
            indices = parallel.local_shard(first + np.arange(size))  # from `count` on: padding
            batch = source.read(np.minimum(indices, count - 1))
            total += float(batch_loss(params, parallel.shard(batch), parallel.shard(indices)))
            if stop():
                return None
        return total / count

    return eval_loss


class Span(NamedTuple):
    """The steps of one call of `train`."""

    first: int  # the step of the first state
    last: int
    epoch: fractions.Fraction  # steps per epoch

    def due(self, step, interval):
        """Whether the step reaches a multiple of an interval, which may be a fraction."""
        reached = step > 0 and step // interval > (step - 1) // interval
        return step == self.last or reached


def train(config, workdir, arrays=None):
    """Trains a run from scratch, or resumes it from its newest checkpoint.

    Args:
      config: checked (see configs.py).
      workdir: the run's folder; nothing is written before all inputs are checked.
      arrays: a data.Batch of all images, if they are not in files.

    Returns:
      0 when the run is finished, or the number of the signal that stopped it (after saving).

    Raises:
      UserError: if the folder holds another run, or another program trains in it; for invalid data
        (during training, after saving); or for non-finite losses.
    """
    workdir = pathlib.Path(workdir)
    source, eval_source = open_data(config, workdir, arrays)
    guidance = generate.guidance_for(config, source.label_names)
    last = configs.num_steps(config.train, source.size)
    schedule, model = configs.make_schedule(config), configs.make_model(config)
    optimizer = states.make_optimizer(config.optim, last)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_files.lock(workdir, "train"))
        run_files.save_config(config, workdir)
        run_files.save_data(source, workdir)
        stop = stack.enter_context(signals.catch())
        manager = stack.enter_context(checkpoint.open_manager(workdir, config.train))
        state = states.create_state(model, optimizer, configs.image_shape(config), config.seed)
        state = checkpoint.restore(manager, parallel.replicate(state))
        epoch = fractions.Fraction(source.size, config.train.batch_size)
        span = Span(int(state.step), last, epoch)
        describe(config, state, schedule, source, eval_source)
        step_fn = make_train_step(config, model, schedule, optimizer)
        if span.first < last:
            if parallel.is_first():
                (workdir / "report.html").unlink(missing_ok=True)  # it is written again at the end
            describe_memory(step_fn, state, source, config.train.batch_size)
        eval_loss = make_eval_loss(config, model, schedule, eval_source)
        sample = make_grid_sampler(config, guidance)
        with contextlib.closing(run_files.Metrics(workdir, span.first)) as metrics:
            actions = make_actions(config, workdir, span, metrics, eval_loss, sample, stop)
            steps = updates(config, state, step_fn, source)

            def save(step, state):
                if step > span.first:
                    checkpoint.save(manager, step, state)

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
        configs.check_same_run(saved, config, workdir, "train" if trained else "use")
    source, eval_source = (
        data.open_source(config.data, field, arrays) for field in ("split", "eval_split")
    )
    if trained:
        moved = saved.data.path != config.data.path
        run_files.check_same_data(source, workdir, moved)
    return source, eval_source


def make_actions(config, workdir, span, metrics, eval_loss, sample, stop):
    """Actions that show the progress of training: {name: (interval in steps, action(step, state))}.

    A signal may have stopped the run before all actions of its last step were done. So at
    span.first, an action runs only if its result is missing.

    Args:
      config: its train and sample sections are used.
      workdir: the run's folder.
      span: the steps to do.
      metrics: a run_files.Metrics.
      eval_loss: from make_eval_loss.
      sample: from generate.make_sampler; None for a classifier.
      stop: from signals.catch.
    """
    section = config.train
    logged = {k for x in run_files.read_metrics(workdir) if x["step"] == span.first for k in x}

    def end_epoch(step, state):
        if step > span.first or "epoch_loss" not in logged:
            mean = epoch_mean(workdir, span, step)
            metrics.write(step, epoch_loss=mean)
            log.info("epoch %d: mean loss %.6f", step // span.epoch, mean)

    def evaluate(step, state):
        if step > span.first or "eval_loss" not in logged:
            raw, ema = (eval_loss(p, stop) for p in (state.params, state.ema_params))
            if not stop():
                metrics.write(step, eval_loss=raw, eval_loss_ema=ema)

    def draw(step, state):
        path = workdir / "samples" / f"step_{step:06d}.png"
        if step > span.first or not path.exists():
            generate.warn_of_young_ema(config, step)
            write_grid(path, sample, config, state, stop)

    actions = {"the epoch's loss": (span.epoch, end_epoch)} if section.num_epochs else {}
    actions["the held-out loss"] = section.eval_every, evaluate
    if sample is not None:
        actions["the sample grid"] = section.sample_every, draw
    return actions


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

    The first metrics are None. The error is a UserError if the next batch cannot be read.
    """
    batches = data.batches(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        first_step=int(state.step),
        random_flip=config.data.random_flip,
    )
    values = None
    while True:
        batch = error = None
        try:
            batch = next(batches)
        except UserError as caught:  # grain has added lines of its own
            error = UserError(str(caught).partition("\n")[0])
        yield state, values, error
        state, values = step_fn(state, parallel.shard(batch))


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
            due = {k: v for k, (n, v) in actions.items() if not ends and span.due(step, n)}
            saves = not ends and span.due(step, section.checkpoint_every)
            if pending and (ends or due or saves or span.due(step, section.log_every)):
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
            for name, action in due.items():
                attempt(f"step {step}: {name}", functools.partial(action, step, state))
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
    log.info("sample grids: %s", generate.describe_sampler(config))
    return generate.make_sampler(config, **guidance)


def write_grid(path, sample, config, state, stop):
    """Samples from a state and writes a grid to path, unless a signal interrupts it."""
    params = state.ema_params if config.sample.use_ema else state.params
    with contextlib.suppress(signals.Stopped):
        generated = sample(params, np.arange(config.sample.num_samples), stop=stop)
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
    alpha_bar = float(schedule.alpha_bars[-1])
    kl = likelihood.prior_kl(alpha_bar, mean_square)
    log.info(
        "chain: T = %d, ᾱ_T = %.4g, prior KL %.3g bits/dim", schedule.num_timesteps, alpha_bar, kl
    )
    generate.warn_of_chain(config, mean_square)
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
