"""Evaluation of a run: FID and related scores, bits/dim, and the provenance of each number.

Slow intermediate results are kept in files. The name of their folder is a digest of everything that
they depend on. So an interrupted evaluation resumes, and different evaluations do not mix:

  <cache_dir>/<digest>/           features of a dataset
  <workdir>/evaluation/<digest>/  features of a run's samples, terms of its VLB
"""

import hashlib
import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ddpm_jax import configs, parallel, signals
from ddpm_jax.core import diffusion, likelihood, sampling, solvers, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, images
from ddpm_jax.files import workdir as run_files
from ddpm_jax.metrics import distances, features, inception
from ddpm_jax.runs import generate, memorisation

log = logging.getLogger(__name__)

IMAGES_PER_FILE = 1000  # of a dataset, in a file of features
MAX_HASHED = 2**31  # bytes of images; of a larger split only some images are hashed
PROGRESSIVE_IMAGES = 8
FORMAT = 1  # of the cache; increment it when features or terms are computed in another way
# Evaluations cannot be compared by a score if they differ in one of its fields.
COMPARABLE = {
    "fid": """
        dataset split_sha256 eval_split_sha256 image_size channels num_samples resize
        weights_sha256 ema label
    """.split(),
    "kid": ["scored_features"],
    "bits_per_dim": "bits_per_dim_sha256 bits_per_dim_images image_size channels ema".split(),
    "closer_to_train_pixels": """
        dataset split_sha256 eval_split_sha256 image_size channels with_mirror_images ema label
    """.split(),
}
# Fields that bits/dim do not depend on (they are computed for every variance).
SAMPLING = """
    variance sampler sampler_order sampler_steps nfe spacing eta dynamic_threshold label guidance
    classifier_sha256
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
    """Statistics and features of a dataset's split."""

    statistics: distances.Statistics
    features: np.ndarray  # [max_features, 2048], of its first images
    folder: pathlib.Path  # with the features of all images; its name is a digest


def evaluate(config, workdir, stop=signals.never):
    """Evaluates a run's newest checkpoint, as the config's evaluate section says.

    Writes evaluation.json, for bits/dim also evaluation.npz and .png, for the nearest training
    images evaluation_neighbours.npz and .png, and prints a table.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      stop: from signals.catch.

    Returns:
      The content of evaluation.json.

    Raises:
      UserError: if there is no checkpoint, dataset, or Inception weights; or if the classes of the
        run and of the dataset differ.
      signals.Stopped: if a signal interrupts it; the same call resumes it.
    """
    section, workdir = config.evaluate, pathlib.Path(workdir)
    weights = inception.load(section.inception_weights) if section.num_samples else None
    train, test = (data.open_source(config.data, field) for field in ("split", "eval_split"))
    run_files.check_same_classes(train, workdir)
    step, params = checkpoint.restore_params(config, workdir)
    guidance = generate.guidance_for_run(config, workdir)
    generate.warn_of_chain(config)
    generate.warn_of_young_ema(config, step)
    log.info("evaluating step %d", step)
    provenance = sampling_provenance(config, step, params, guidance["classifier"])
    results = provenance | {
        "ema_decay": configs.ema_decay(config),
        "dataset": config.data.name,
        "split": config.data.split,
        "split_sha256": describe(config.data, config.data.split, train)["images_sha256"],
        "eval_split": config.data.eval_split,
        "eval_split_sha256": describe(config.data, config.data.eval_split, test)["images_sha256"],
    }
    draw, samples = make_draw(config, params, guidance, stop), ()
    if section.nearest_images:
        folder = _folder(workdir / "evaluation", {**provenance, "rows": "samples"})
        samples = memorisation.keep_samples(config, folder, draw, train, test, stop)
        inside = _folder(folder, {**results, "mirrored": config.data.random_flip})
        results |= memorisation.in_pixels(config, workdir, inside, samples, train, test, stop)
    if section.num_samples:
        results |= sample_quality(
            config, workdir, provenance, draw, samples, weights, train, test, stop
        )
    if section.bits_per_dim_images:
        results |= bits_per_dim(config, workdir, provenance, params, test, stop)
        draw_progressive(config, workdir, params, guidance, stop)
    with run_files.atomic_write(workdir / "evaluation.json") as path:
        path.write_text(run_files.to_json(results, indent=2) + "\n")
    if parallel.is_first():
        published = PUBLISHED if is_papers(config) else {}
        print("\n".join(table({str(workdir): results}, published)))
    log.info("wrote %s", workdir / "evaluation.json")
    return results


def sampling_provenance(config, step, params, classifier):
    """Everything that a run's samples and its VLB depend on: {field: value}.

    Args:
      config: the run's config.
      step: of the checkpoint.
      params: of the network.
      classifier: (model, params) for classifier guidance, or None.
    """
    return {
        "step": step,
        "params_sha256": digest_of(params),
        "ema": config.sample.use_ema,
        "seed": config.sample.seed,
        "sampler": config.sample.sampler,
        "sampler_order": config.sample.order,
        "nfe": solvers.num_calls(generate.make_solver(config, generate.make_chain(config))),
        "dynamic_threshold": config.sample.dynamic_threshold,
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
    """Identifies a split's images: {field: value}; of a large split, 1,000 images are hashed."""
    num_bytes = source.size * int(np.prod(section.image_size)) * section.channels
    count = source.size if num_bytes <= MAX_HASHED else min(source.size, 1000)
    hashed, digest = np.linspace(0, source.size - 1, count).astype(int), hashlib.sha256()
    for indices in np.array_split(hashed, -(-count // IMAGES_PER_FILE)):
        digest.update(source.read(indices).images.tobytes())
    return {
        "dataset": section.name,
        "split": split,
        "images": source.size,
        "images_sha256": digest.hexdigest(),
        "image_size": list(section.image_size),
        "channels": section.channels,
    }


def make_draw(config, params, guidance, stop):
    """Builds (first, last) → the run's samples with these numbers, uint8 [N, H, W, C]."""
    sample, size = generate.make_sampler(config, **guidance), config.sample.batch_size

    def draw(first, last):
        # A smaller last batch would compile again.
        return sample(params, np.arange(first, first + size), stop=stop).x[: last - first]

    return draw


def sample_quality(config, workdir, provenance, draw, samples, weights, train, test, stop):
    """FID for both splits, KID, precision, recall; Inception Score if `weights` has a head."""
    section = config.evaluate
    inputs = {"resize": section.resize, "weights_sha256": weights.sha256}
    extract = features.make_extractor(weights.params, section.resize, config.sample.batch_size)
    reference, reference_test = (
        reference_features(config, field, source, extract, inputs, stop)
        for field, source in (("split", train), ("eval_split", test))
    )

    with_images = {"images": "kept"} if section.keep_images else {}
    folder = _folder(workdir / "evaluation", {**provenance, **inputs, **with_images})

    def features_of_samples(first, last):
        x = samples[first:last] if last <= len(samples) else draw(first, last)
        if section.keep_images:
            run_files.write_npz(folder / f"images_{first:07d}.npz", images=x)
        return extract(x)

    count, size = section.num_samples, config.sample.batch_size
    features.collect(folder, count, size, features_of_samples, "evaluate samples", stop)
    statistics = distances.statistics(features.chunks(folder, count))
    warnings = [
        f"{name}: {few.count} images, so the covariance is singular; do not compare its FID"
        for name, few in (
            ("samples", statistics),
            (f"fid ({config.data.split})", reference.statistics),
            (f"fid_test ({config.data.eval_split})", reference_test.statistics),
        )
        if few.count <= inception.FEATURES
    ]
    for warning in warnings:
        log.warning("%s", warning)
    fakes = features.rows(folder, min(section.max_features, count))
    kid = distances.kernel_distance(reference.features, fakes)
    precision, recall = distances.precision_recall(reference.features, fakes)
    scores = {
        "num_samples": count,
        "scored_features": [len(reference.features), len(fakes)],  # for KID, precision, recall
        "gray_repeated_to_rgb": config.data.channels == 1,
        **inputs,
        "fid": distances.frechet_distance(reference.statistics, statistics),
        "fid_test": distances.frechet_distance(reference_test.statistics, statistics),
        "kid": kid.value,
        "kid_error": kid.error,
        "precision": precision,
        "recall": recall,
        "warnings": warnings,
    }
    if weights.head is not None:
        # Without the bias, as in the original Inception Score.
        kernel, _ = weights.head
        chunks = features.chunks(folder, count)
        log_probs = (np.asarray(jax.nn.log_softmax(chunk @ kernel)) for chunk in chunks)
        score = distances.inception_score(log_probs, count)
        scores |= {"inception_score": score.value, "inception_score_error": score.error}
    if len(samples):
        folders = folder, reference.folder, reference_test.folder
        scores |= nearest_in_features(workdir, *folders, samples, train, stop)
    return scores


def nearest_in_features(workdir, of_samples, of_train, of_test, samples, train, stop):
    """memorisation.in_features, for the folders of the features of samples and of both splits."""
    inside = _folder(of_samples, {"neighbours_in": [of_train.name, of_test.name]})
    rows, splits = (
        features.rows(of_samples, len(samples)),
        map(features.reader, (of_train, of_test)),
    )
    return memorisation.in_features(workdir, inside, samples, rows, *splits, train, stop)


def reference_features(config, field, source, extract, provenance, stop=signals.never):
    """Features of a split: from the cache, or computed and cached.

    Args:
      config: its data and evaluate sections are used.
      field: "split" or "eval_split".
      source: the split's images.
      extract: from features.make_extractor.
      provenance: everything that extract depends on.
      stop: from signals.catch.

    Returns:
      A Reference.
    """
    if source.size < 2:
        raise UserError(f"data.{field}={config.data[field]!r}: holds 1 image, FID needs 2 or more")
    provenance = {**describe(config.data, config.data[field], source), **provenance}
    cache = pathlib.Path(config.evaluate.cache_dir or "~/.cache/ddpm_jax").expanduser()
    with run_files.named_errors("evaluate.cache_dir", cache):
        folder = _folder(cache, provenance)
    name = f"features of {config.data.name} {config.data[field]}"

    def features_of_images(first, last):
        return extract(source.read(np.arange(first, last)).images)

    features.collect(folder, source.size, IMAGES_PER_FILE, features_of_images, name, stop)
    path = folder / "statistics.npz"
    if path.exists():
        with np.load(path) as arrays:
            statistics = distances.Statistics(**arrays)
    else:
        statistics = distances.statistics(features.chunks(folder, source.size))
        run_files.write_npz(path, **statistics._asdict())
    first_rows = features.rows(folder, min(config.evaluate.max_features, source.size))
    return Reference(statistics, first_rows, folder)


def bits_per_dim(config, workdir, provenance, params, test, stop):
    """The mean VLB over images, its parts, and progressive lossy compression.

    Writes evaluation.npz (the terms over t) and evaluation.png.
    """
    section, source = config.data, test
    split = config.evaluate.split or section.eval_split
    if split != section.eval_split:
        section = section.copy_and_resolve_references()
        section.eval_split = split
        source = data.open_source(section, "eval_split")
    count = min(config.evaluate.bits_per_dim_images, source.size)
    description = describe(section, split, source)
    provenance = {name: value for name, value in provenance.items() if name not in SAMPLING}
    folder = _folder(workdir / "evaluation", {**provenance, **description})
    vlb_rows = make_vlb_rows(config, params, source)
    features.collect(folder, count, config.sample.batch_size, vlb_rows, "evaluate bits/dim", stop)
    rows = features.rows(folder, count)

    num_timesteps, variances = config.diffusion.num_timesteps, vlb_variances(config)
    prior, *parts = np.split(rows, range(1, rows.shape[1], num_timesteps), axis=1)
    *terms, x0_mse = parts
    terms = dict(zip(variances, terms, strict=True))
    results = {"bits_per_dim_split": split, "bits_per_dim_images": count}
    results |= {"bits_per_dim_sha256": description["images_sha256"]}
    for variance, values in terms.items():
        rate = prior[:, 0] + values[:, 1:].sum(axis=1, dtype=np.float64)
        scores = {"bits_per_dim": rate + values[:, 0], "rate": rate, "distortion": values[:, 0]}
        for name, per_image in scores.items():
            mean, error = _mean(per_image)
            results |= {f"{name}_{variance}": mean, f"{name}_{variance}_error": error}
            if variance == config.diffusion.variance:
                results |= {name: mean, f"{name}_error": error}

    curves = {f"terms_{name}": values.mean(0, dtype=np.float64) for name, values in terms.items()}
    rates, mse = curves[f"terms_{config.diffusion.variance}"], x0_mse.mean(0, dtype=np.float64)
    rate, rmse = likelihood.progressive_code(rates, mse, prior.mean(dtype=np.float64))
    curves |= {"rate": rate, "rmse": rmse}
    run_files.write_npz(workdir / "evaluation.npz", prior=prior.mean(dtype=np.float64), **curves)
    draw_curves(workdir / "evaluation.png", curves)
    tenths = np.unique(np.linspace(0, num_timesteps, 11).round().astype(int))[1:]
    return results | {
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


def vlb_variances(config):
    """The variances that bits/dim are computed for: the fixed ones, and the learned one if any."""
    variance, fixed = config.diffusion.variance, diffusion.FIXED_VARIANCES
    return (*fixed, variance) if variance in diffusion.LEARNED_VARIANCES else fixed


def make_vlb_rows(config, params, source):
    """Builds (first, last) → [N, 1 + (V + 1) T]: for each image L_T, the VLB's terms for each of V
    variances, and the MSE of x0. A conditional network gets the labels."""
    schedule, model = configs.make_schedule(config), configs.make_model(config)
    size = config.sample.batch_size

    def rows(params, batch, indices):
        x0, keys = images.to_float(batch.images), sampling.image_keys(config.sample.seed, indices)
        predict_fn = generate.unguided_predict(config, schedule, unet.net_fn(model, params))
        if batch.labels is not None:
            predict_fn = generate.with_labels(predict_fn, batch.labels)
        vlb = likelihood.vlb(
            schedule,
            diffusion.clipped(predict_fn) if config.diffusion.clip_x0 else predict_fn,
            x0,
            lambda t: sampling.noise(keys, t, x0.shape[1:]),
            variances=vlb_variances(config),
        )
        terms = [vlb.terms[variance].T for variance in vlb_variances(config)]
        return jnp.concatenate([vlb.prior[:, None], *terms, vlb.x0_mse.T], axis=1)

    rows = parallel.pmap(rows, in_axes=(None, 0, 0))

    def vlb_rows(first, last):
        indices = np.minimum(first + np.arange(size), last - 1)  # padded with the last image
        local = parallel.local_shard(indices)
        out = rows(params, *parallel.shard((source.read(local), local)))
        return parallel.gather(out)[: last - first]

    return vlb_rows


def draw_curves(path, curves):
    """Plots the VLB's terms over t, and distortion over rate."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_t, trade = figure.subplots(1, 2)
    for name in sorted(name for name in curves if name.startswith("terms_")):
        over_t.semilogy(curves[name], label=name.removeprefix("terms_"))
    over_t.set(xlabel="t", ylabel="bits/dim", title="terms of the VLB")
    over_t.legend()
    trade.plot(curves["rate"], curves["rmse"])
    title = "progressive lossy compression"
    trade.set(xlabel="rate (bits/dim)", ylabel="RMSE of x0 (0 to 255)", title=title)
    with run_files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_progressive(config, workdir, params, guidance, stop):
    """Draws the x0 predicted along the reverse process, to evaluation_progressive.png."""
    chain = generate.make_chain(config)
    rows = solvers.rows_of_steps(generate.make_solver(config, chain))
    chosen = np.linspace(len(chain.timesteps) - 1, 0, 10).round().astype(int).tolist()
    x0_at = {rows[i][0] for i in chosen}
    sample = generate.make_sampler(config, **guidance, x0_at=x0_at)
    frames = sample(params, np.arange(PROGRESSIVE_IMAGES), stop=stop).x0_frames
    images.write_png(workdir / "evaluation_progressive.png", images.strips(frames))


def compare(workdirs):
    """Prints evaluations side by side.

    Args:
      workdirs: folders with an evaluation.json.

    Raises:
      UserError: if an evaluation is missing, or the evaluations are not comparable.
    """
    results = {}
    for workdir in workdirs:
        path = pathlib.Path(workdir) / "evaluation.json"
        if not path.is_file():
            raise UserError(f"--workdirs={workdir}: has no evaluation.json; evaluate it first")
        results[str(workdir)] = run_files.read_json(path, run_files.nan_for_null)
    for score, fields in COMPARABLE.items():
        scored = [evaluation for evaluation in results.values() if score in evaluation]
        different = [
            f"{name} {' / '.join(str(evaluation.get(name)) for evaluation in scored)}"
            for name in fields
            if len({str(evaluation.get(name)) for evaluation in scored}) > 1
        ]
        if different:
            text = f"{score} cannot be compared, it differs in {', '.join(different)}"
            raise UserError(f"--workdirs: {text}")
    print("\n".join(table(results, {})))


def table(results, published):
    """Yields the lines of a Markdown table.

    Args:
      results: {name: evaluation}, one column each.
      published: {field, or number of reverse steps: text}, the last column; {} for none.
    """
    columns = [*results, *(["published"] if published else [])]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in dict.fromkeys(name for evaluation in results.values() for name in evaluation):
        if name not in ("progressive", "warnings") and not name.endswith("_error"):
            cells = [_cell(evaluation, name) for evaluation in results.values()]
            yield _row(name, cells, published, name)
    codes = [
        {
            step["steps"]: f"{step['rate']:.5f}, {step['rmse']:.5f}"
            for step in evaluation.get("progressive", [])
        }
        for evaluation in results.values()
    ]
    for steps in sorted({steps for code in codes for steps in code}):
        cells = [code.get(steps, "") for code in codes]
        yield _row(f"rate, RMSE after {steps} steps", cells, published, steps)


def _row(label, cells, published, key):
    last = [published.get(key, "")] if published else []
    return f"| {label} | {' | '.join([*cells, *last])} |"


def _cell(evaluation, name):
    value, error = evaluation.get(name, ""), evaluation.get(f"{name}_error")
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f"{text} ± {error:.2g}" if error is not None and np.isfinite(error) else text


def is_papers(config):
    """Whether a config is the paper's CIFAR-10 model, with the paper's evaluation."""
    fields, papers = configs.flatten(config), configs.flatten(configs.default_config())
    # A run may be used with other values of these; but the paper's was trained with this loss.
    free = set(configs.FREE["use"]) - {"diffusion.loss", "diffusion.loss_weight"}
    names = {name for name in papers if name.startswith(("diffusion.", "model."))} - free
    names |= {"data.name", "data.split", "data.eval_split", "data.image_size", "data.num_classes"}
    names |= {f"sample.{name}" for name in ("use_ema", "sampler", "num_steps")}
    names |= {f"evaluate.{name}" for name in ("num_samples", "resize", "split")}
    return all(fields[name] == papers[name] for name in names | {"train.timesteps"})


def digest_of(params):
    """sha256 of parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _folder(parent, provenance):
    """The folder of results with this provenance, which is written to provenance.json in it."""
    provenance = {"format": FORMAT, **provenance}
    text = run_files.to_json(provenance, indent=2, sort_keys=True) + "\n"
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "provenance.json").exists():
        with run_files.atomic_write(folder / "provenance.json") as path:
            path.write_text(text)
    return folder
