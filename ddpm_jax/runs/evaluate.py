"""Evaluation of a run: FID and related scores, bits/dim, and the provenance of each number.

Slow intermediate results are kept in files. The name of their folder is a digest of everything that
they depend on. So an interrupted evaluation resumes, and different evaluations do not mix:

  <cache_dir>/<digest>/           features of a dataset
  <workdir>/evaluation/<digest>/  features of a run's samples from a seed, terms of its VLB
"""

import logging
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter

from ddpm_jax import checks, configs, parallel, signals
from ddpm_jax.core import solvers
from ddpm_jax.files import checkpoint, data, disk, images, row_files, run_files
from ddpm_jax.metrics import distances, features, inception
from ddpm_jax.runs import bound, compare, generate, memorisation, reference, samplers

log = logging.getLogger(__name__)

PROGRESSIVE_IMAGES = 8
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
# FID after so many steps of 128 images, of another implementation of it (tqch/ddpm-torch).
PUBLISHED_CURVE = {46_800: 9.162, 93_600: 5.778, 187_200: 4.083, 421_200: 3.31, 795_600: 3.188}


def evaluate(config, workdir, stop=signals.never):
    """Evaluates a run's checkpoint, as the config's evaluate section says.

    Writes evaluation.json, for bits/dim also evaluation.npz and .png, for the nearest training
    images evaluation_neighbours.npz and .png, and prints a table. If there are evaluate.steps, it
    does what evaluate_steps says instead.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      stop: from signals.catch.

    Returns:
      The content of evaluation.json, or of evaluation_steps.json.

    Raises:
      UserError: if there is no checkpoint, dataset, or Inception weights; or if the classes of the
        run and of the dataset differ.
      signals.Stopped: if a signal interrupts it; the same call resumes it.
    """
    section, workdir = config.evaluate, pathlib.Path(workdir)
    checkpoint.check_steps(section.steps, workdir)
    weights = inception.load(section.inception_weights) if section.num_samples else None
    if section.num_samples:
        reference.check_cache(config)
    train, test = (data.open_source(config.data, field) for field in ("split", "eval_split"))
    run_files.check_same_classes(train, workdir)
    if section.steps:
        return evaluate_steps(config, workdir, weights, train, test, stop)
    bounded = bound.open_images(config, test) if section.bits_per_dim_images else None
    step, params = checkpoint.restore_params(config, workdir)
    guidance = generate.guidance_for_run(config, workdir)
    generate.warn_of_chain(config)
    generate.warn_of_young_ema(config, step)
    log.info("evaluating step %d", step)
    provenance = sampling_provenance(config, step, params, guidance["classifier"])
    of_data = data_provenance(config, train, test)
    results = provenance | of_data
    draw, samples = make_draw(config, guidance, stop), ()
    if section.nearest_images:
        samples, found = nearest_in_pixels(
            config, workdir, provenance, of_data, draw, params, train, test, stop
        )
        results |= found
    if section.num_samples:
        score = make_sample_quality(config, workdir, draw, weights, train, test, stop)
        results |= score(provenance, params, samples)
    if section.bits_per_dim_images:
        results |= bound.bits_per_dim(config, workdir, provenance, params, bounded, stop)
        draw_progressive(config, workdir, params, guidance, stop)
    disk.write_json(workdir / "evaluation.json", results)
    if parallel.is_first():
        published = PUBLISHED if is_papers(config) else {}
        print("\n".join(compare.table({str(workdir): results}, published)))
    log.info("wrote %s", workdir / "evaluation.json")
    return results


def evaluate_steps(config, workdir, weights, train, test, stop):
    """Scores the samples of several checkpoints, `evaluate.steps`.

    After each of them it writes evaluation_steps.json, a list of evaluations, and draws them in
    evaluation_steps.png.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      weights: inception.Weights.
      train: the images of data.split.
      test: those of data.eval_split.
      stop: from signals.catch.

    Returns:
      The evaluations.
    """
    guidance = generate.guidance_for_run(config, workdir)
    generate.warn_of_chain(config)
    draw = make_draw(config, guidance, stop)
    score = make_sample_quality(config, workdir, draw, weights, train, test, stop)
    of_data, size = data_provenance(config, train, test), config.train.batch_size
    published = PUBLISHED_CURVE if is_papers(config) and size == 128 else {}
    evaluations, config = [], config.copy_and_resolve_references()
    for step in sorted({*config.evaluate.steps}):
        config.sample.checkpoint = str(step)
        _, params = checkpoint.restore_params(config, workdir)
        generate.warn_of_young_ema(config, step)
        log.info("evaluating step %d", step)
        provenance = sampling_provenance(config, step, params, guidance["classifier"])
        results = {**provenance, "images_seen": step * size, **of_data}
        evaluations.append(results | score(provenance, params))
        disk.write_json(workdir / "evaluation_steps.json", evaluations)
        draw_steps(workdir / "evaluation_steps.png", evaluations, size, published)
    if parallel.is_first():
        print("\n".join(compare.table_of_steps(evaluations, published)))
    log.info("wrote %s", workdir / "evaluation_steps.json")
    return evaluations


def data_provenance(config, train, test):
    """What the samples are compared with, and the EMA's decay: {field: value}."""
    found = {"ema_decay": configs.ema_decay(config), "dataset": config.data.name}
    for field, source in (("split", train), ("eval_split", test)):
        description = reference.describe(config.data, config.data[field], source)
        found |= {field: config.data[field], f"{field}_sha256": description["images_sha256"]}
    return found


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
        "params_sha256": reference.digest_of(params),
        "ema": config.sample.use_ema,
        "seed": config.sample.seed,
        "sampler": config.sample.sampler,
        "sampler_order": config.sample.order,
        "nfe": solvers.num_calls(samplers.make_solver(config, samplers.make_chain(config))),
        "dynamic_threshold": config.sample.dynamic_threshold,
        "sampler_steps": configs.sampling_steps(config),
        "spacing": config.sample.spacing,
        "eta": config.sample.eta,
        "num_classes": config.data.num_classes,
        "label": config.sample.label,
        "guidance": config.sample.guidance,
        "classifier_sha256": classifier and reference.digest_of(classifier[1]),
        "variance": config.diffusion.variance,
        "clip_x0": config.diffusion.clip_x0,
        "dtype": config.model.dtype,
        "image_size": list(config.data.image_size),
        "channels": config.data.channels,
    }


def make_draw(config, guidance, stop):
    """Builds draw(params, seed, first, last) → samples with these numbers, uint8 [N, H, W, C]."""
    sample, size = samplers.make_sampler(config, **guidance), config.sample.batch_size

    def draw(params, seed, first, last):
        # A smaller last batch would compile again.
        numbers = np.arange(first, first + size)
        return sample(params, numbers, stop=stop, seed=seed).x[: last - first]

    return draw


def nearest_in_pixels(config, workdir, provenance, of_data, draw, params, train, test, stop):
    """The samples whose nearest images are searched, and the scores of memorisation.in_pixels.

    Args:
      config: the run's config.
      workdir: the run's folder.
      provenance: what the samples depend on: {field: value}.
      of_data: from data_provenance.
      draw: from make_draw.
      params: of the network.
      train: the images of data.split.
      test: those of data.eval_split.
      stop: from signals.catch.
    """

    def draw_first(first, last):
        return draw(params, config.sample.seed, first, last)

    folder = reference.provenance_folder(workdir / "evaluation", {**provenance, "rows": "samples"})
    samples = memorisation.keep_samples(config, folder, draw_first, train, test, stop)
    compared = {**of_data, "mirrored": config.data.random_flip}
    inside = reference.provenance_folder(folder, compared)
    return samples, memorisation.in_pixels(config, workdir, inside, samples, train, test, stop)


def nearest_in_features(workdir, of_samples, of_train, of_test, samples, train, stop):
    """memorisation.in_features, for the features of FID.

    Args:
      workdir: the run's folder.
      of_samples: the folder of the samples' features.
      of_train: the Reference of data.split.
      of_test: that of data.eval_split.
      samples: uint8 [N, H, W, C].
      train: the images of data.split.
      stop: from signals.catch.
    """
    pooled = [row_files.reader(split.folder, features.pooled) for split in (of_train, of_test)]
    names = {"neighbours_in": [of_train.folder.name, of_test.folder.name]}
    inside = reference.provenance_folder(of_samples, names)
    rows = features.pooled(row_files.rows(of_samples, len(samples)))
    return memorisation.in_features(workdir, inside, samples, rows, *pooled, train, stop)


def make_sample_quality(config, workdir, draw, weights, train, test, stop):
    """Builds the function that scores samples; for several checkpoints it compiles once.

    Returns:
      score(provenance, params, samples=()) → {name: value}: the scores of `sample_scores`, and how
      they were obtained. With several seeds each score is the mean, see `over_seeds`. The first
      samples of the first seed need not be drawn again; their nearest images are searched.
    """
    section, size, count = config.evaluate, config.sample.batch_size, config.evaluate.num_samples
    inputs = {"resize": section.resize, "weights_sha256": weights.sha256}
    extract = features.make_extractor(weights.params, section.resize, size)
    of_train, of_test = (
        reference.features_of_split(config, field, source, extract, inputs, stop)
        for field, source in (("split", train), ("eval_split", test))
    )
    warnings = warn_of_few_images(config, of_train, of_test)
    with_images = {"images": "kept"} if section.keep_images else {}

    def collect(provenance, params, seed, samples):
        known = {**provenance, "seed": seed, **inputs, **with_images}
        folder = reference.provenance_folder(workdir / "evaluation", known)

        def features_of_samples(first, last):
            there = seed == config.sample.seed and last <= len(samples)
            x = samples[first:last] if there else draw(params, seed, first, last)
            if section.keep_images:
                disk.write_npz(folder / f"images_{first:07d}.npz", images=x)
            return extract(x)

        row_files.collect(folder, count, size, features_of_samples, "evaluate samples", stop)
        return folder

    def score(provenance, params, samples=()):
        seeds = range(config.sample.seed, config.sample.seed + section.num_seeds)
        folders = [collect(provenance, params, seed, samples) for seed in seeds]
        scores = [sample_scores(config, f, of_train, of_test, weights.head) for f in folders]
        found = {
            "num_samples": count,
            "num_seeds": section.num_seeds,
            # For KID, precision, recall.
            "scored_features": [len(of_train.features), min(section.max_features, count)],
            "gray_repeated_to_rgb": config.data.channels == 1,
            **inputs,
            **over_seeds(seeds, scores),
            "warnings": warnings,
        }
        if len(samples):
            searched = folders[0], of_train, of_test, samples, train
            found |= nearest_in_features(workdir, *searched, stop)
        return found

    return score


def sample_scores(config, folder, of_train, of_test, head):
    """FID and sFID for both splits, KID, precision, recall of the samples whose features are in a
    folder; Inception Score if there is a head (see inception.Weights)."""
    count = config.evaluate.num_samples
    statistics, spatial = features.statistics(folder, count)
    fakes = features.pooled(row_files.rows(folder, min(config.evaluate.max_features, count)))
    kid = distances.kernel_distance(of_train.features, fakes)
    precision, recall = distances.precision_recall(of_train.features, fakes)
    found = {
        "fid": distances.frechet_distance(of_train.statistics, statistics),
        "fid_test": distances.frechet_distance(of_test.statistics, statistics),
        "sfid": distances.frechet_distance(of_train.spatial, spatial),
        "sfid_test": distances.frechet_distance(of_test.spatial, spatial),
        "kid": kid.value,
        "kid_error": kid.error,
        "precision": precision,
        "recall": recall,
    }
    if head is not None:
        # Without the bias, as in the original Inception Score.
        kernel, _ = head
        chunks = map(features.pooled, row_files.chunks(folder, count))
        log_probs = (np.asarray(jax.nn.log_softmax(chunk @ kernel)) for chunk in chunks)
        score = distances.inception_score(log_probs, count)
        found |= {"inception_score": score.value, "inception_score_error": score.error}
    return found


def over_seeds(seeds, scores):
    """The scores of one seed; of several, the mean and the spread of each, never the best.

    Args:
      seeds: N ints.
      scores: N times {name: value}.

    Returns:
      {name: value}. With several seeds, <name>_spread is the standard deviation over them, and
      per_seed has the scores of each.
    """
    if len(scores) == 1:
        return scores[0]
    found = {}
    for name in scores[0]:
        if not name.endswith("_error"):
            values = np.array([score[name] for score in scores])
            found |= {name: float(values.mean()), f"{name}_spread": float(values.std(ddof=1))}
    per_seed = [{"seed": seed, **score} for seed, score in zip(seeds, scores, strict=True)]
    return {**found, "per_seed": per_seed}


def warn_of_few_images(config, of_train, of_test):
    """Warns of sets that are too small for FID and sFID; returns the warnings."""
    sets = {
        "samples": config.evaluate.num_samples,
        f"fid ({config.data.split})": of_train.statistics.count,
        f"fid_test ({config.data.eval_split})": of_test.statistics.count,
    }
    text = "images, so the covariance is singular; do not compare its FID or sFID"
    few = {name: count for name, count in sets.items() if count <= inception.FEATURES}
    warnings = [f"{name}: {count} {text}" for name, count in few.items()]
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def draw_steps(path, evaluations, batch_size, published):
    """Plots FID and sFID over steps and images seen.

    Args:
      path: of the picture.
      evaluations: of some steps, ascending.
      batch_size: images of a step.
      published: {step: FID}; {} for none.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    steps = [evaluation["step"] for evaluation in evaluations]
    for axes, score in zip(figure.subplots(1, 2), ("fid", "sfid"), strict=True):
        for name, split in ((score, "split"), (f"{score}_test", "eval_split")):
            values = [evaluation[name] for evaluation in evaluations]
            spreads = [evaluation.get(f"{name}_spread", 0) for evaluation in evaluations]
            label = f"against {evaluations[0][split]}"
            axes.errorbar(steps, values, spreads, marker=".", capsize=3, label=label)
        if published and score == "fid":
            axes.plot(*zip(*published.items(), strict=True), "k:.", label="published")
        axes.set(xlabel="step", ylabel={"fid": "FID", "sfid": "sFID"}[score], yscale="log")
        images_seen = (lambda x: x * batch_size, lambda x: x / batch_size)
        top = axes.secondary_xaxis("top", functions=images_seen)
        top.set_xlabel("images seen")
        for axis in (axes.xaxis, top.xaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(LogFormatter())  # without powers of ten
        axes.legend()
    images.write_figure(path, figure)


def draw_progressive(config, workdir, params, guidance, stop):
    """Draws the x0 predicted along the reverse process, to evaluation_progressive.png."""
    chain = samplers.make_chain(config)
    rows = solvers.rows_of_steps(samplers.make_solver(config, chain))
    chosen = np.linspace(len(chain.timesteps) - 1, 0, 10).round().astype(int).tolist()
    x0_at = {rows[i][0] for i in chosen}
    sample = samplers.make_sampler(config, **guidance, x0_at=x0_at)
    frames = sample(params, np.arange(PROGRESSIVE_IMAGES), stop=stop).x0_frames
    images.write_png(workdir / "evaluation_progressive.png", images.strips(frames))


def is_papers(config):
    """Whether a config is the paper's CIFAR-10 model, with the paper's evaluation."""
    fields, papers = configs.flatten(config), configs.flatten(configs.default_config())
    # A run may be used with other values of these; but the paper's was trained with this loss.
    free = set(checks.FREE["use"]) - {"diffusion.loss", "diffusion.loss_weight"}
    names = {name for name in papers if name.startswith(("diffusion.", "model."))} - free
    names |= {"data.name", "data.split", "data.eval_split", "data.image_size", "data.num_classes"}
    names |= {f"sample.{name}" for name in ("use_ema", "sampler", "num_steps")}
    names |= {f"evaluate.{name}" for name in ("num_samples", "resize", "split")}
    return all(fields[name] == papers[name] for name in names | {"train.timesteps"})
