"""What the objectives are worth: each choice trained for equal steps, from several seeds.

    python -m benchmarks.objectives --data=digits
    python -m benchmarks.objectives --data=mnist
    python -m benchmarks.objectives_chart docs/objectives.csv docs/assets/objectives.png

For each run: the held-out MSE of ε by quarter of t, without clipping; the bits/dim of the first
held-out images, with the better of both fixed variances unless it is learned; the Fréchet distance
of metrics/classifier.py with all T steps, and with 10 steps of dpmpp_sde; for digits, the fraction
that digits_quality.py is confident about. All runs are scored with the same images and noise.
Scores that the CSV file has are not measured again, and trainings go on where they were stopped.
"""

import datetime
import pathlib
import time

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import digits_quality, quality
from ddpm_jax import checks, configs, cpu, parallel
from ddpm_jax.core import diffusion, unet
from ddpm_jax.files import checkpoint, data, images
from ddpm_jax.metrics import classifier
from ddpm_jax.runs import bound, objective, reference, samplers, train

DATA = flags.DEFINE_enum("data", "digits", ["digits", "mnist"], "what to train on")
RUNS = flags.DEFINE_string("runs", "runs/objectives", "the folder for the runs")
CSV = flags.DEFINE_string("csv", "docs/objectives.csv", "the file to add scores to")
SEEDS = flags.DEFINE_integer("seeds", 3, "trainings of each choice")
ONLY = flags.DEFINE_list("only", [], "rows to measure; all by default")
SCORES = flags.DEFINE_list("scores", "mse bits fast confident full".split(), "what to measure")
COLUMNS = "data choice seed steps score value date".split()
STEPS = {"digits": 1100, "mnist": 1000}
VLB_IMAGES = {"digits": 297, "mnist": 128}
SAMPLES = {"fast": {"digits": 5000, "mnist": 5000}, "full": {"digits": 5000, "mnist": 500}}
LEARNED = {"diffusion.variance": "learned_range"}
# Whatever the configs have; the baseline is the first choice.
BASE = {
    "diffusion.loss": "simple",
    "diffusion.loss_weight": "none",
    "diffusion.prediction": "eps",
    "train.timesteps": "uniform",
    "train.score_every": 0,
}
BASE_VARIANCE = {"digits": "fixed_small", "mnist": "fixed_large"}
BASE_RATE = {"digits": 3e-3, "mnist": 1e-3}
CHOICES = {
    "simple": {},
    "low discrepancy": {"train.timesteps": "low_discrepancy"},
    "importance": {"train.timesteps": "importance"},
    "min-SNR": {"diffusion.loss_weight": "min_snr"},
    "P2": {"diffusion.loss_weight": "p2"},
    "min-SNR, importance": {
        "diffusion.loss_weight": "min_snr",
        "train.timesteps": "importance",
    },
    "v": {"diffusion.prediction": "v"},
    "v, min-SNR": {"diffusion.prediction": "v", "diffusion.loss_weight": "min_snr"},
    "v, truncated SNR": {"diffusion.prediction": "v", "diffusion.loss_weight": "truncated_snr"},
    "hybrid": {"diffusion.loss": "hybrid", **LEARNED},
    "hybrid, importance": {
        "diffusion.loss": "hybrid",
        **LEARNED,
        "train.timesteps": "importance",
    },
    "vlb": {"diffusion.loss": "vlb", **LEARNED},
    "vlb, importance": {"diffusion.loss": "vlb", **LEARNED, "train.timesteps": "importance"},
}
# Of every run, which keeps several EMAs; the first is the config's own.
EMA_DECAYS = (0.995, 0.98, 0.99, 0.998)


def config_of(choice, seed):
    """The config of a run, which trains for STEPS and draws nothing."""
    config = configs.named_config(DATA.value)
    base = {**BASE, "diffusion.variance": BASE_VARIANCE[DATA.value]}
    config.update_from_flattened_dict({**base, **CHOICES[choice], "seed": seed})
    config.optim.learning_rate = BASE_RATE[DATA.value]
    config.optim.ema_decay = EMA_DECAYS
    config.train.update(num_steps=STEPS[DATA.value], checkpoint_every=100, keep_checkpoints=1)
    config.train.update(eval_every=10**6, sample_every=10**6, log_every=50)
    config.sample.update(num_samples=2, batch_size=config.train.batch_size)
    return config


def workdir_of(choice, seed):
    """The folder of a run."""
    name = "".join(c if c.isalnum() else "_" for c in choice)
    return pathlib.Path(RUNS.value) / DATA.value / f"{name}_{seed}"


def held_out_mse(config, params, source):
    """The MSE of ε in each quarter of t: [4]. Each image has one t in each quarter."""
    schedule, model = configs.make_schedule(config), configs.make_model(config)
    size, num_timesteps = config.sample.batch_size, schedule.num_timesteps
    count = min(source.size, config.train.eval_images)

    def squared(params, batch, indices, quarter):
        x0, keys = images.to_float(batch.images), objective.step_keys(0, quarter, indices)
        _, eps, *_ = objective.draw(keys, x0.shape[1:], num_timesteps)
        # The middles of as many equal parts of the chain as there are images, within a quarter.
        t = (quarter * num_timesteps + (2 * indices + 1) * num_timesteps // (2 * count)) // 4
        x_t = diffusion.q_sample(schedule, x0, t, eps)
        predict_fn = configs.make_predictor(config, schedule, unet.net_fn(model, params))
        found = diffusion.predict_eps(schedule, x_t, t, predict_fn(x_t, t).x0)
        return jnp.square(found - eps).mean(axis=(1, 2, 3))

    squared = parallel.pmap(squared, in_axes=(None, 0, 0, None))
    errors = np.zeros((4, count))
    for first in range(0, count, size):
        indices = np.minimum(first + np.arange(size), count - 1)
        batch = parallel.shard((source.read(indices), indices))
        for quarter in range(4):
            found = parallel.gather(squared(params, *batch, quarter))
            errors[quarter, first : first + size] = found[: count - first]
    return errors.mean(axis=1)


def bits_per_dim(config, params, source):
    """Of the first held-out images; the better of both fixed variances, unless it is learned."""
    rows_of, size = bound.make_rows(config, params, source), config.sample.batch_size
    count = VLB_IMAGES[DATA.value]
    firsts = range(0, count, size)
    rows = np.concatenate([rows_of(first, min(first + size, count)) for first in firsts])
    found, _ = bound.summarize(config, bound.unpack(config, rows))
    own = config.diffusion.variance
    measured = (own,) if own in diffusion.LEARNED_VARIANCES else bound.variances(config)
    return min(found[f"bits_per_dim_{variance}"] for variance in measured)


def sample(config, params, kind, workdir):
    """Images of the full chain, or of the fast sampler."""
    config = config.copy_and_resolve_references()
    fast = {"sampler": "dpmpp_sde", "num_steps": min(10, config.diffusion.num_timesteps)}
    config.sample.update(fast if kind == "fast" else {})
    config.sample.batch_size = quality.BATCH_SIZE
    sampler, count = samplers.make_sampler(config), SAMPLES[kind][DATA.value]
    name = f"{kind}_{config.sample.ema_decay}"
    return quality.generate_in_parts(
        lambda indices: sampler(params, indices).x, count, workdir / "parts", name
    )


def scores_of(config, workdir, kind, distance):
    """Measures scores of a trained run: {name: value}."""
    _, params = checkpoint.restore_params(config, workdir)
    source = data.open_source(config.data, "eval_split")
    config.sample.batch_size = 64
    if kind == "mse":
        return {f"mse_q{i + 1}": mse for i, mse in enumerate(held_out_mse(config, params, source))}
    if kind == "bits":
        return {"bits/dim": bits_per_dim(config, params, source)}
    if kind == "confident":
        config.sample.batch_size = quality.BATCH_SIZE
        found = samplers.make_sampler(config)(params, np.arange(1000)).x
        judge, _ = digits_quality.make_judge()
        return {"confident": digits_quality.confident(judge, found / 255)[0]}
    return {kind: distance(sample(config, params, kind, workdir))}


def cases():
    """(choice, seed, EMA decay, kind of score) in the order of measuring: all seeds last."""
    rows = [("simple", decay) for decay in EMA_DECAYS]
    rows += [(choice, EMA_DECAYS[0]) for choice in CHOICES if choice != "simple"]
    rows = [row for row in rows if not ONLY.value or row_name(*row) in ONLY.value]
    slow = [kind for kind in SCORES.value if kind == "full"]
    for kinds in ([kind for kind in SCORES.value if kind not in slow], slow):
        for seed in range(SEEDS.value):
            for choice, decay in rows:
                if kinds != slow or decay == EMA_DECAYS[0]:
                    yield from ((choice, seed, decay, kind) for kind in kinds)


def row_name(choice, decay):
    """The name of a row: that of the choice, or of an EMA other than the first."""
    return choice if decay == EMA_DECAYS[0] else f"EMA {decay}"


def main(_):
    """Trains and scores what the CSV file lacks."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells each step of reading
    config, path = configs.named_config(DATA.value), pathlib.Path(CSV.value)
    cpu.prepare(configs.positions(config, "train"))
    cpu.use_cores(config.train.batch_size)
    source, _ = quality.labelled_sources(config)
    trained = classifier.train(*reference.first_images(source))
    distance = quality.distance_to(source, trained)
    for choice, seed, decay, kind in cases():
        if kind == "confident" and DATA.value != "digits":
            continue
        steps = STEPS[DATA.value]
        row = DATA.value, row_name(choice, decay), seed, steps
        first_score = {"mse": "mse_q1", "bits": "bits/dim"}.get(kind, kind)
        if (*map(str, row), first_score) in quality.measured(path, COLUMNS[:5]):
            continue
        config, workdir = config_of(choice, seed), workdir_of(choice, seed)
        checks.check(config)
        if checkpoint.latest_step(workdir) != steps and train.train(config, workdir):
            return  # by a signal
        config.sample.ema_decay = decay
        start = time.monotonic()
        scores = scores_of(config, workdir, kind, distance)
        today = datetime.date.today()
        new = [(*row, name, f"{value:.5g}", today) for name, value in scores.items()]
        quality.add_rows(path, COLUMNS, new)
        print(*row[1:3], scores, f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
