"""How good a run is: FID and its like, bits/dim, and how each number was obtained.

What takes long is kept in files whose folder is named after all that the numbers depend on, so a
killed evaluation goes on where it was, and another one does not mix with it:

  <cache_dir>/<digest>/           a dataset's features
  <workdir>/evaluation/<digest>/  a run's: features of its samples, terms of its bound
"""

import hashlib
import json
import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ddpm_jax import (
    checkpoint,
    data,
    diffusion,
    generate,
    images,
    likelihood,
    parallel,
    sampling,
    schedules,
    unet,
)
from ddpm_jax import config as configs
from ddpm_jax import workdir as run_files
from ddpm_jax.errors import UserError
from ddpm_jax.metrics import distances, features, inception

log = logging.getLogger(__name__)

SHARD = 1000  # images of a dataset in a file of features
PROGRESSIVE_IMAGES = 8
# Two evaluations that differ in one of these cannot be compared.
COMPARABLE = """
    dataset split split_images eval_split eval_split_images image_size channels
    num_samples resize weights_sha256 max_features ema
    bits_per_dim_split bits_per_dim_images
""".split()
# Ho et al. 2020, Tables 1 and 2, for configs/cifar10.py.
PUBLISHED = {
    "fid": "3.17",
    "fid_test": "5.24",
    "inception_score": "9.46 ± 0.11",
    "bits_per_dim": "≤ 3.75",
    "rate": "1.78",
    "distortion": "1.97",
    "rmse": "0.95",
}


class Reference(NamedTuple):
    """What is known of a dataset's split."""

    statistics: distances.Statistics
    features: np.ndarray  # [max_features, 2048], its first ones


def evaluate(config, workdir):
    """Measures a run's newest checkpoint as the config's evaluate section says.

    Writes evaluation.json, and with bits/dim evaluation.npz and .png; and prints a table.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.

    Returns:
      The content of evaluation.json.

    Raises:
      UserError: if there is no checkpoint, no dataset, or no Inception weights.
    """
    wanted, workdir = config.evaluate, pathlib.Path(workdir)
    weights = inception.load(wanted.inception_weights) if wanted.num_samples else None
    train, test = (data.open_source(config.data, field) for field in ("split", "eval_split"))
    step, params = checkpoint.restore_params(config, workdir)
    log.info("evaluating step %d", step)
    found = {
        "step": step,
        "params_sha256": digest_of(params),
        "ema": config.sample.use_ema,
        "seed": config.sample.seed,
        "sampler": "ancestral",
        "sampler_steps": config.diffusion.num_timesteps,
        "variance": config.diffusion.variance,
        "clip_x0": config.diffusion.clip_x0,
        "dtype": config.model.dtype,
        "image_size": list(config.data.image_size),
        "channels": config.data.channels,
    }
    made = dict(found)  # what samples and bound depend on
    found |= {
        "dataset": config.data.name,
        "split": config.data.split,
        "split_images": train.size,
        "eval_split": config.data.eval_split,
        "eval_split_images": test.size,
    }
    if wanted.num_samples:
        found |= sample_quality(config, workdir, made, params, weights, train, test)
    if wanted.bits_per_dim_images:
        found |= bits_per_dim(config, workdir, made, params, test)
        draw_progressive(config, workdir, params)
    with run_files.atomic_write(workdir / "evaluation.json") as path:
        path.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(table({str(workdir): found}, PUBLISHED if is_papers(config) else {})))
    log.info("wrote %s", workdir / "evaluation.json")
    return found


def sample_quality(config, workdir, made, params, weights, train, test):
    """FID against both splits, KID, precision, recall, and with a classifier Inception Score."""
    wanted = config.evaluate
    how = {"resize": wanted.resize, "weights_sha256": weights.sha256}
    extract = features.make_extractor(weights.params, wanted.resize)
    against, against_test = (
        reference(config, field, source, extract, how)
        for field, source in (("split", train), ("eval_split", test))
    )

    folder = _folder(workdir / "evaluation", {**made, **how})
    sample = generate.make_sampler(config)

    def of_samples(first, last):
        x, _ = sample(params, last - first, config.sample.seed, first=first)
        if wanted.keep_images:
            run_files.write_npz(folder / f"images_{first:07d}.npz", images=x)
        return extract(x)

    size = config.sample.batch_size
    features.collect(folder, wanted.num_samples, size, of_samples, "evaluate samples")
    statistics = distances.statistics(features.chunks(folder, wanted.num_samples))
    if statistics.count <= inception.FEATURES:
        text = "only %d samples: their covariance is singular, do not compare this FID with others"
        log.warning(text, statistics.count)
    fakes = features.rows(folder, min(wanted.max_features, statistics.count))
    kid = distances.kernel_distance(against.features, fakes)
    precision, recall = distances.precision_recall(against.features, fakes)
    scores = {
        "num_samples": wanted.num_samples,
        "max_features": wanted.max_features,
        "gray_repeated_to_rgb": config.data.channels == 1,
        **how,
        "fid": distances.frechet_distance(against.statistics, statistics),
        "fid_test": distances.frechet_distance(against_test.statistics, statistics),
        "kid": kid.value,
        "kid_error": kid.error,
        "precision": precision,
        "recall": recall,
    }
    if weights.head is not None:
        kernel, bias = weights.head
        chunks = features.chunks(folder, wanted.num_samples)
        logits = np.concatenate([chunk @ kernel + bias for chunk in chunks])
        score = distances.inception_score(jax.nn.log_softmax(logits))
        scores |= {"inception_score": score.value, "inception_score_error": score.error}
    return scores


def reference(config, field, source, extract, how):
    """Features of a split: from the cache, or computed and put there.

    Args:
      config: its data and evaluate sections.
      field: "split" or "eval_split".
      source: the split's images.
      extract: from features.make_extractor.
      how: what extract depends on.

    Returns:
      A Reference.
    """
    some = source.read(np.linspace(0, source.size - 1, min(source.size, 64)).astype(int))
    provenance = {
        "dataset": config.data.name,
        "split": config.data[field],
        "images": source.size,
        "image_size": list(config.data.image_size),
        "channels": config.data.channels,
        "resized_by": config.data.resize,
        "some_images_sha256": hashlib.sha256(some.tobytes()).hexdigest(),
        **how,
    }
    cache = config.evaluate.cache_dir or pathlib.Path.home() / ".cache" / "ddpm_jax"
    folder = _folder(pathlib.Path(cache), provenance)
    name = f"features of {config.data.name} {config.data[field]}"
    features.collect(
        folder, source.size, SHARD, lambda a, b: extract(source.read(np.arange(a, b))), name
    )
    path = folder / "statistics.npz"
    if not path.exists():
        statistics = distances.statistics(features.chunks(folder))
        run_files.write_npz(path, **statistics._asdict())
    with np.load(path) as arrays:
        statistics = distances.Statistics(**arrays)
    some = features.rows(folder, min(config.evaluate.max_features, source.size))
    return Reference(statistics, some)


def bits_per_dim(config, workdir, made, params, test):
    """The bound's mean over images, its parts, and the progressive code.

    Writes evaluation.npz (the terms over t) and evaluation.png.
    """
    split = config.evaluate.split or config.data.eval_split
    source = test
    if split != config.data.eval_split:
        section = config.data.copy_and_resolve_references()
        section.eval_split = split
        source = data.open_source(section, "eval_split")
    count = min(config.evaluate.bits_per_dim_images, source.size)
    folder = _folder(workdir / "evaluation", {**made, "dataset": config.data.name, "split": split})
    rows_of = make_bound_rows(config, params, source)
    features.collect(folder, count, config.sample.batch_size, rows_of, "evaluate bits/dim")
    rows = np.float64(features.rows(folder, count))

    num_timesteps = config.diffusion.num_timesteps
    prior, *parts = np.split(rows, [1 + i * num_timesteps for i in range(3)], axis=1)
    *terms, x0_mse = parts
    terms = dict(zip(diffusion.VARIANCES, terms, strict=True))
    totals = {name: prior[:, 0] + values.sum(axis=1) for name, values in terms.items()}
    mine = terms[config.diffusion.variance].mean(axis=0)
    rate, rmse = likelihood.progressive_code(mine, x0_mse.mean(axis=0), prior.mean())
    curves = {f"terms_{name}": values.mean(axis=0) for name, values in terms.items()}
    curves |= {"rate": rate, "rmse": rmse}
    run_files.write_npz(workdir / "evaluation.npz", prior=prior.mean(), **curves)
    draw_curves(workdir / "evaluation.png", curves)

    total = totals[config.diffusion.variance]
    tenths = np.unique(np.linspace(0, num_timesteps, 11).round().astype(int))[1:]
    return {
        "bits_per_dim_split": split,
        "bits_per_dim_images": count,
        "bits_per_dim": total.mean(),
        "bits_per_dim_error": total.std(ddof=1) / np.sqrt(count) if count > 1 else None,
        **{f"bits_per_dim_{name}": values.mean() for name, values in totals.items()},
        "prior_bits_per_dim": prior.mean(),
        "rate": rate[-1],
        "distortion": mine[0],
        "rmse": rmse[-1],
        "progressive": [
            {"steps": int(steps), "rate": rate[steps - 1], "rmse": rmse[steps - 1]}
            for steps in tenths
        ],
    }


def make_bound_rows(config, params, source):
    """Builds (first, last) → [N, 1 + 3T]: an image's L_T, terms of each variance, MSE of x0."""
    schedule, model = schedules.from_config(config.diffusion), unet.make_model(config.model)
    size = config.sample.batch_size

    def rows(params, batch, indices):
        x0, keys = images.to_float(batch), sampling.image_keys(config.sample.seed, indices)
        bound = likelihood.bound(
            schedule,
            unet.eps_fn(model, params),
            x0,
            lambda t: sampling.noise(keys, t, x0.shape[1:]),
            clip_x0=config.diffusion.clip_x0,
        )
        terms = [bound.terms[variance].T for variance in diffusion.VARIANCES]
        return jnp.concatenate([bound.prior[:, None], *terms, bound.x0_mse.T], axis=1)

    rows = parallel.pmap(rows, in_axes=(None, 0, 0))

    def rows_of(first, last):
        indices = np.minimum(first + np.arange(size), last - 1)  # the last one fills the batch
        out = rows(params, parallel.split(source.read(indices)), parallel.split(indices))
        return np.asarray(parallel.merge(out))[: last - first]

    return rows_of


def draw_curves(path, curves):
    """The bound over t, and rate against distortion."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_t, trade = figure.subplots(1, 2)
    for variance in diffusion.VARIANCES:
        over_t.semilogy(curves[f"terms_{variance}"], label=variance)
    over_t.set(xlabel="t", ylabel="bits/dim", title="terms of the bound")
    over_t.legend()
    trade.plot(curves["rate"], curves["rmse"])
    trade.set(xlabel="rate (bits/dim)", ylabel="RMSE of x0 (0 to 255)", title="progressive code")
    with run_files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_progressive(config, workdir, params):
    """A few images' predicted x0 along the reverse process, to evaluation_progressive.png."""
    schedule, model = schedules.from_config(config.diffusion), unet.make_model(config.model)
    last = schedule.num_timesteps - 1
    seen = np.unique(np.linspace(last, 0, 10).round().astype(int))[::-1]
    keys = sampling.image_keys(config.sample.seed, jnp.arange(PROGRESSIVE_IMAGES))

    @jax.jit
    def run(params):
        eps_fn = unet.eps_fn(model, params)
        x = sampling.prior(keys, schedule.num_timesteps, configs.image_shape(config))
        step = generate.make_step(config, schedule, eps_fn, keys)
        # Before the step from t, x is what the step from t + 1 left.
        _, frames = sampling.reverse_process(step, x, jnp.arange(last, -1, -1), tuple(seen[1:] + 1))
        x_ts = jnp.concatenate([x[None], frames])

        def x0_pred(x_t, t):
            ts = jnp.full(len(x_t), t)
            return diffusion.predict_x0(schedule, x_t, ts, eps_fn(x_t, ts))

        return images.to_uint8(jax.lax.map(lambda pair: x0_pred(*pair), (x_ts, jnp.asarray(seen))))

    here = jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), params)
    frames = np.asarray(run(here))  # [t, image, …]
    pictures = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    path = workdir / "evaluation_progressive.png"
    images.write_png(path, images.grid(pictures, columns=len(seen)))


def compare(workdirs):
    """Prints evaluations side by side.

    Args:
      workdirs: folders with an evaluation.json.

    Raises:
      UserError: if one has none, or they were not obtained in the same way.
    """
    results = {}
    for workdir in workdirs:
        path = pathlib.Path(workdir) / "evaluation.json"
        if not path.is_file():
            raise UserError(f"--workdirs={workdir}: has no evaluation.json; evaluate it first")
        results[workdir] = json.loads(path.read_text())
    different = [
        f"{name} {' / '.join(str(found.get(name)) for found in results.values())}"
        for name in COMPARABLE
        if len({str(found.get(name)) for found in results.values()}) > 1
    ]
    if different:
        raise UserError(f"--workdirs: cannot be compared, they differ in {', '.join(different)}")
    print("\n".join(table(results, {})))


def table(results, published):
    """Yields the lines of a Markdown table, a column for each of {name: evaluation}."""
    columns = [*results, *(["published"] if published else [])]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    names = dict.fromkeys(name for found in results.values() for name in found)
    for name in names:
        if name == "progressive" or name.endswith("_error"):
            continue
        cells = [_cell(found, name) for found in results.values()]
        if published:
            cells.append(published.get(name, ""))
        yield f"| {name} | {' | '.join(cells)} |"
    for steps in zip(*(found.get("progressive", []) for found in results.values()), strict=False):
        cells = [f"{step['rate']:.5f}, {step['rmse']:.5f}" for step in steps]
        cells += [""] * bool(published)
        yield f"| rate, RMSE after {steps[0]['steps']} steps | {' | '.join(cells)} |"


def _cell(found, name):
    value, error = found.get(name, ""), found.get(f"{name}_error")
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f"{text} ± {error:.2g}" if error is not None else text


def is_papers(config):
    """Whether a config's network, chain and data are those of the paper's CIFAR-10 model."""
    fields = configs.flatten(config)
    papers = {
        "data.name": "cifar10",
        "data.image_size": (32, 32),
        "model.channels": 128,
        "model.channel_mults": (1, 2, 2, 2),
        "model.attention_resolutions": (16,),
        "diffusion.schedule": "linear",
        "diffusion.num_timesteps": 1000,
    }
    return all(fields[name] == value for name, value in papers.items())


def digest_of(params):
    """sha256 of parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _folder(parent, provenance):
    """The folder for what depends on just this; provenance.json in it says on what."""
    text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    with run_files.atomic_write(folder / "provenance.json") as path:
        path.write_text(text)
    return folder
