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

from ddpm_jax import configs, parallel, signals
from ddpm_jax.core import diffusion, likelihood, sampling, schedules, unet
from ddpm_jax.files import checkpoint, data, images
from ddpm_jax.runs import generate
from ddpm_jax.files import workdir as run_files
from ddpm_jax.errors import UserError
from ddpm_jax.metrics import distances, features, inception

log = logging.getLogger(__name__)

SHARD = 1000  # images of a dataset in a file of features
HASHED = 2**31  # bytes of images, up to which all of a split tell it from others
PROGRESSIVE_IMAGES = 8
FORMAT = 1  # of what is cached; counts up when features or terms are computed otherwise
# Two evaluations that both have a score, and differ in one of these fields, cannot be compared.
COMPARABLE = {
    "fid": """
        dataset split_sha256 eval_split_sha256 image_size channels num_samples resize
        weights_sha256 ema label
    """.split(),
    "kid": ["scored_features"],
    "bits_per_dim": "bits_per_dim_sha256 bits_per_dim_images image_size channels ema".split(),
}
# What bits/dim do not depend on (they are computed for every variance).
SAMPLING = """
    variance sampler sampler_steps spacing eta label guidance classifier_sha256
""".split()
# Ho et al. 2020, Tables 1, 2 and 4, for configs/cifar10.py.
PUBLISHED = {
    "fid": "3.17",
    "fid_test": "5.24",
    "inception_score": "9.46 ± 0.11",
    "bits_per_dim": "≤ 3.75",
    "rate": "1.78",
    "distortion": "1.97",
    "rmse": "0.95",
    100: "0.00000, 67.60125",
    200: "0.00013, 60.97170",
    300: "0.00081, 54.18826",
    400: "0.00282, 46.12765",
    500: "0.00716, 38.03236",
    600: "0.01507, 30.80948",
    700: "0.02866, 24.43656",
    800: "0.05415, 18.47482",
    900: "0.11994, 12.02277",
    1000: "1.77581, 0.95136",
}


class Reference(NamedTuple):
    """What is known of a dataset's split."""

    statistics: distances.Statistics
    features: np.ndarray  # [max_features, 2048], its first ones


def evaluate(config, workdir, stop=signals.never):
    """Measures a run's newest checkpoint as the config's evaluate section says.

    Writes evaluation.json, and with bits/dim evaluation.npz and .png; and prints a table.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      stop: from signals.catch.

    Returns:
      The content of evaluation.json.

    Raises:
      UserError: if there is no checkpoint, no dataset, no Inception weights, or if the run was
        trained on other classes than the dataset's.
      signals.Stopped: if a signal came before the end; the same call goes on from there.
    """
    wanted, workdir = config.evaluate, pathlib.Path(workdir)
    weights = inception.load(wanted.inception_weights) if wanted.num_samples else None
    train, test = (data.open_source(config.data, field) for field in ("split", "eval_split"))
    run_files.check_same_classes(train, workdir)
    step, params = checkpoint.restore_params(config, workdir)
    guides = generate.run_guides(config, workdir)
    generate.warn_of_chain(config)
    generate.warn_of_young_ema(config, step)
    log.info("evaluating step %d", step)
    found = sampling_provenance(config, step, params, guides["classifier"])
    made = dict(found)  # what samples depend on
    found |= {
        "dataset": config.data.name,
        "split": config.data.split,
        "split_sha256": describe(config.data, config.data.split, train)["images_sha256"],
        "eval_split": config.data.eval_split,
        "eval_split_sha256": describe(config.data, config.data.eval_split, test)["images_sha256"],
    }
    if wanted.num_samples:
        found |= sample_quality(config, workdir, made, params, guides, weights, train, test, stop)
    if wanted.bits_per_dim_images:
        found |= bits_per_dim(config, workdir, made, params, test, stop)
        draw_progressive(config, workdir, params, guides, stop)
    with run_files.atomic_write(workdir / "evaluation.json") as path:
        path.write_text(run_files.to_json(found, indent=2) + "\n")
    if parallel.is_first():
        published = PUBLISHED if is_papers(config) else {}
        print("\n".join(table({str(workdir): found}, published)))
    log.info("wrote %s", workdir / "evaluation.json")
    return found


def sampling_provenance(config, step, params, classifier):
    """What a run's samples and its bound depend on: {field: value}.

    Args:
      config: the run's config.
      step: of the checkpoint.
      params: of the network.
      classifier: (model, params) that guides, or None.
    """
    return {
        "step": step,
        "params_sha256": digest_of(params),
        "ema": config.sample.use_ema,
        "seed": config.sample.seed,
        "sampler": config.sample.sampler,
        "sampler_steps": config.sample.num_steps or config.diffusion.num_timesteps,
        "spacing": config.sample.spacing,
        "eta": config.sample.eta,
        "num_classes": config.data.num_classes,
        "label": config.sample.label,
        "guidance": config.sample.guidance,
        "classifier_sha256": classifier and digest_of(classifier[1]),
        "variance": config.diffusion.variance,
        "clip_x0": config.diffusion.clip_x0,
        "dtype": config.model.dtype,
        "image_size": list(config.data.image_size),
        "channels": config.data.channels,
    }


def describe(section, split, source):
    """What tells a split's images from others: {field: value}; of a large one, 1,000 are hashed."""
    in_bytes = source.size * int(np.prod(section.image_size)) * section.channels
    count = source.size if in_bytes <= HASHED else min(source.size, 1000)
    chosen, digest = np.linspace(0, source.size - 1, count).astype(int), hashlib.sha256()
    for part in np.array_split(chosen, -(-count // SHARD)):
        digest.update(source.read(part).images.tobytes())
    return {
        "dataset": section.name,
        "split": split,
        "images": source.size,
        "images_sha256": digest.hexdigest(),
        "image_size": list(section.image_size),
        "channels": section.channels,
    }


def sample_quality(config, workdir, made, params, guides, weights, train, test, stop):
    """FID against both splits, KID, precision, recall, and with a classifier Inception Score."""
    wanted = config.evaluate
    how = {"resize": wanted.resize, "weights_sha256": weights.sha256}
    size = config.sample.batch_size
    extract = features.make_extractor(weights.params, wanted.resize, size)
    against, against_test = (
        reference(config, field, source, extract, how, stop)
        for field, source in (("split", train), ("eval_split", test))
    )

    kept = {"images": "kept"} if wanted.keep_images else {}
    folder = _folder(workdir / "evaluation", {**made, **how, **kept})
    sample = generate.make_sampler(config, **guides)

    def of_samples(first, last):
        # Another size would be compiled again.
        x = sample(params, np.arange(first, first + size), stop=stop).x
        if wanted.keep_images:
            run_files.write_npz(folder / f"images_{first:07d}.npz", images=x[: last - first])
        return extract(x)[: last - first]

    features.collect(folder, wanted.num_samples, size, of_samples, "evaluate samples", stop)
    statistics = distances.statistics(features.chunks(folder, wanted.num_samples))
    warnings = [
        f"{name}: {few.count} images, so the covariance is singular; do not compare its FID"
        for name, few in (
            ("samples", statistics),
            (f"fid ({config.data.split})", against.statistics),
            (f"fid_test ({config.data.eval_split})", against_test.statistics),
        )
        if few.count <= inception.FEATURES
    ]
    for warning in warnings:
        log.warning("%s", warning)
    fakes = features.rows(folder, min(wanted.max_features, statistics.count))
    kid = distances.kernel_distance(against.features, fakes)
    precision, recall = distances.precision_recall(against.features, fakes)
    scores = {
        "num_samples": wanted.num_samples,
        "scored_features": [len(against.features), len(fakes)],  # by KID, precision, recall
        "gray_repeated_to_rgb": config.data.channels == 1,
        **how,
        "fid": distances.frechet_distance(against.statistics, statistics),
        "fid_test": distances.frechet_distance(against_test.statistics, statistics),
        "kid": kid.value,
        "kid_error": kid.error,
        "precision": precision,
        "recall": recall,
        "warnings": warnings,
    }
    if weights.head is not None:
        # Without the bias, as the score was first computed.
        kernel, _ = weights.head
        chunks = features.chunks(folder, wanted.num_samples)
        logs = (np.asarray(jax.nn.log_softmax(chunk @ kernel)) for chunk in chunks)
        score = distances.inception_score(logs, wanted.num_samples)
        scores |= {"inception_score": score.value, "inception_score_error": score.error}
    return scores


def reference(config, field, source, extract, how, stop=signals.never):
    """Features of a split: from the cache, or computed and put there.

    Args:
      config: its data and evaluate sections.
      field: "split" or "eval_split".
      source: the split's images.
      extract: from features.make_extractor.
      how: what extract depends on.
      stop: from signals.catch.

    Returns:
      A Reference.
    """
    if source.size < 2:
        raise UserError(f"data.{field}={config.data[field]!r}: holds 1 image, FID needs 2 or more")
    provenance = {**describe(config.data, config.data[field], source), **how}
    cache = pathlib.Path(config.evaluate.cache_dir or "~/.cache/ddpm_jax").expanduser()
    with run_files.named_errors("evaluate.cache_dir", cache):
        folder = _folder(cache, provenance)
    name = f"features of {config.data.name} {config.data[field]}"

    def of_images(first, last):
        return extract(source.read(np.arange(first, last)).images)

    features.collect(folder, source.size, SHARD, of_images, name, stop)
    path = folder / "statistics.npz"
    if path.exists():
        with np.load(path) as arrays:
            statistics = distances.Statistics(**arrays)
    else:
        statistics = distances.statistics(features.chunks(folder, source.size))
        run_files.write_npz(path, **statistics._asdict())
    some = features.rows(folder, min(config.evaluate.max_features, source.size))
    return Reference(statistics, some)


def bits_per_dim(config, workdir, made, params, test, stop):
    """The bound's mean over images, its parts, and the progressive code.

    Writes evaluation.npz (the terms over t) and evaluation.png.
    """
    section, source = config.data, test
    split = config.evaluate.split or section.eval_split
    if split != section.eval_split:
        section = section.copy_and_resolve_references()
        section.eval_split = split
        source = data.open_source(section, "eval_split")
    count = min(config.evaluate.bits_per_dim_images, source.size)
    about = describe(section, split, source)
    made = {name: value for name, value in made.items() if name not in SAMPLING}
    folder = _folder(workdir / "evaluation", {**made, **about})
    rows_of = make_bound_rows(config, params, source)
    features.collect(folder, count, config.sample.batch_size, rows_of, "evaluate bits/dim", stop)
    rows = features.rows(folder, count)

    num_timesteps, variances = config.diffusion.num_timesteps, bound_variances(config)
    prior, *parts = np.split(rows, range(1, rows.shape[1], num_timesteps), axis=1)
    *terms, x0_mse = parts
    terms = dict(zip(variances, terms, strict=True))
    found = {"bits_per_dim_split": split, "bits_per_dim_images": count}
    found |= {"bits_per_dim_sha256": about["images_sha256"]}
    for name, values in terms.items():
        rate = prior[:, 0] + values[:, 1:].sum(axis=1, dtype=np.float64)
        parts = {"bits_per_dim": rate + values[:, 0], "rate": rate, "distortion": values[:, 0]}
        for part, of_images in parts.items():
            mean, error = _mean(of_images)
            found |= {f"{part}_{name}": mean, f"{part}_{name}_error": error}
            if name == config.diffusion.variance:
                found |= {part: mean, f"{part}_error": error}

    curves = {f"terms_{name}": values.mean(0, dtype=np.float64) for name, values in terms.items()}
    mine, mse = curves[f"terms_{config.diffusion.variance}"], x0_mse.mean(0, dtype=np.float64)
    rate, rmse = likelihood.progressive_code(mine, mse, prior.mean(dtype=np.float64))
    curves |= {"rate": rate, "rmse": rmse}
    run_files.write_npz(workdir / "evaluation.npz", prior=prior.mean(dtype=np.float64), **curves)
    draw_curves(workdir / "evaluation.png", curves)
    tenths = np.unique(np.linspace(0, num_timesteps, 11).round().astype(int))[1:]
    return found | {
        "prior_bits_per_dim": float(prior.mean(dtype=np.float64)),
        "rmse": rmse[-1],
        "progressive": [
            {"steps": int(steps), "rate": rate[steps - 1], "rmse": rmse[steps - 1]}
            for steps in tenths
        ],
    }


def _mean(values):
    """The mean, and its standard error (None of a single value)."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error and float(error)


def bound_variances(config):
    """The variances that bits/dim are computed for: the fixed ones, and what was learned."""
    learned = config.diffusion.variance == "learned"
    return diffusion.VARIANCES if learned else diffusion.FIXED_VARIANCES


def make_bound_rows(config, params, source):
    """Builds (first, last) → [N, 1 + (V + 1) T]: an image's L_T, terms of each of V variances, MSE
    of x0. A conditional network is told the labels."""
    schedule, model = configs.make_schedule(config), configs.make_model(config)
    size = config.sample.batch_size

    def rows(params, batch, indices):
        x0, keys = images.to_float(batch.images), sampling.image_keys(config.sample.seed, indices)
        predict_fn = generate.unguided_predict(config, schedule, unet.net_fn(model, params))
        if batch.labels is not None:
            predict_fn = generate.labelled(predict_fn, batch.labels)
        bound = likelihood.vlb(
            schedule,
            diffusion.clipped(predict_fn) if config.diffusion.clip_x0 else predict_fn,
            x0,
            lambda t: sampling.noise(keys, t, x0.shape[1:]),
            variances=bound_variances(config),
        )
        terms = [bound.terms[variance].T for variance in bound_variances(config)]
        return jnp.concatenate([bound.prior[:, None], *terms, bound.x0_mse.T], axis=1)

    rows = parallel.pmap(rows, in_axes=(None, 0, 0))

    def rows_of(first, last):
        indices = np.minimum(first + np.arange(size), last - 1)  # the last one fills the batch
        mine = parallel.part(indices)
        out = rows(params, *parallel.split((source.read(mine), mine)))
        return parallel.merge(out)[: last - first]

    return rows_of


def draw_curves(path, curves):
    """The bound over t, and rate against distortion."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_t, trade = figure.subplots(1, 2)
    for name in sorted(name for name in curves if name.startswith("terms_")):
        over_t.semilogy(curves[name], label=name.removeprefix("terms_"))
    over_t.set(xlabel="t", ylabel="bits/dim", title="terms of the bound")
    over_t.legend()
    trade.plot(curves["rate"], curves["rmse"])
    trade.set(xlabel="rate (bits/dim)", ylabel="RMSE of x0 (0 to 255)", title="progressive code")
    with run_files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_progressive(config, workdir, params, guides, stop):
    """A few images' predicted x0 along the reverse process, to evaluation_progressive.png."""
    steps = config.sample.num_steps or config.diffusion.num_timesteps
    seen = tuple(np.unique(np.linspace(steps - 1, 0, 10).round().astype(int))[::-1].tolist())
    sample = generate.make_sampler(config, **guides, x0_at=seen)
    frames = sample(params, np.arange(PROGRESSIVE_IMAGES), stop=stop).x0_frames
    images.write_png(workdir / "evaluation_progressive.png", images.strips(frames))


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
        results[str(workdir)] = run_files.read_json(path)
    for score, fields in COMPARABLE.items():
        have = [found for found in results.values() if score in found]
        different = [
            f"{name} {' / '.join(str(found.get(name)) for found in have)}"
            for name in fields
            if len({str(found.get(name)) for found in have}) > 1
        ]
        if different:
            text = f"{score} cannot be compared, it differs in {', '.join(different)}"
            raise UserError(f"--workdirs: {text}")
    print("\n".join(table(results, {})))


def table(results, published):
    """Yields the lines of a Markdown table.

    Args:
      results: {name: evaluation}, a column for each.
      published: {field, or number of reverse steps: text}, the last column; {} for none.
    """
    columns = [*results, *(["published"] if published else [])]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in dict.fromkeys(name for found in results.values() for name in found):
        if name not in ("progressive", "warnings") and not name.endswith("_error"):
            yield _row(name, [_cell(found, name) for found in results.values()], published, name)
    codes = [
        {
            step["steps"]: f"{step['rate']:.5f}, {step['rmse']:.5f}"
            for step in found.get("progressive", [])
        }
        for found in results.values()
    ]
    for steps in sorted({steps for code in codes for steps in code}):
        cells = [code.get(steps, "") for code in codes]
        yield _row(f"rate, RMSE after {steps} steps", cells, published, steps)


def _row(label, cells, published, key):
    last = [published.get(key, "")] if published else []
    return f"| {label} | {' | '.join([*cells, *last])} |"


def _cell(found, name):
    value, error = found.get(name, ""), found.get(f"{name}_error")
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f"{text} ± {error:.2g}" if error is not None else text


def is_papers(config):
    """Whether a config is the paper's CIFAR-10 model, measured as the paper did."""
    fields = configs.flatten(config)
    papers = {
        "data.name": "cifar10",
        "data.split": "train",
        "data.eval_split": "test",
        "data.image_size": (32, 32),
        "diffusion.schedule": "linear",
        "diffusion.num_timesteps": 1000,
        "diffusion.beta_start": 1e-4,
        "diffusion.beta_end": 0.02,
        "model.channels": 128,
        "model.channel_mults": (1, 2, 2, 2),
        "model.num_res_blocks": 2,
        "model.attention_resolutions": (16,),
        "data.num_classes": 0,
        "diffusion.prediction": "eps",
        "diffusion.loss": "simple",
        "sample.use_ema": True,
        "sample.sampler": "ancestral",
        "sample.num_steps": 0,
        "evaluate.num_samples": 50_000,
        "evaluate.resize": "tf1",
        "evaluate.split": "",
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
    provenance = {"format": FORMAT, **provenance}
    text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "provenance.json").exists():
        with run_files.atomic_write(folder / "provenance.json") as path:
            path.write_text(text)
    return folder
