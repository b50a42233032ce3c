"""Scores of samples during training."""

import logging
import math
import pathlib
import shutil

import numpy as np

from ddpm_jax import configs, parallel, signals
from ddpm_jax.errors import UserError
from ddpm_jax.files import data, row_files
from ddpm_jax.metrics import classifier, distances, features, inception
from ddpm_jax.runs import reference

log = logging.getLogger(__name__)

MOST_NUMBERS = 2**28  # of the images that a classifier is trained on, 8 bytes each


def choose(config, arrays=None):
    """What the scores of a run are (train.score_every).

    With RGB images and the weights of Inception they are FID and KID, as with gray images where
    evaluate.inception_weights names them; otherwise the Fréchet distance on the features of a small
    classifier of the training images.

    Args:
      config: the run's config.
      arrays: of the user, see train.train.

    Returns:
      (inception.Weights or None, the training and the held-out images with labels or ()).

    Raises:
      UserError: if Inception is not used, and the images have no labels or are too large; if there
        is one training image; if the file of the weights is missing or is another one; or if
        evaluate.cache_dir cannot be used.
    """
    reference.check_cache(config)
    path = config.evaluate.inception_weights
    if configs.can_have_fid(config) and (path or inception.is_packaged()):
        return inception.load(path), ()
    labelled = [data.open_labelled(config.data, f, arrays) for f in ("split", "eval_split")]
    train, shape = labelled[0], configs.image_shape(config)
    numbers = min(train.size, classifier.MOST_IMAGES) * math.prod(shape)
    for fits, text in (
        (train.size > 1, f"{config.data.name} {config.data.split} holds 1 image"),
        (len(train.label_names) > 1, f"{config.data.name} has no classes"),
        (numbers <= MOST_NUMBERS, f"images of {shape[0]}×{shape[1]} are large for a classifier"),
    ):
        if not fits:
            text += ", and FID needs Inception's weights, of gray images those that "
            text += "evaluate.inception_weights names; 0 turns it off"
            raise UserError(f"train.score_every={config.train.score_every}: {text}")
    return None, labelled


def make_score(config, source, chosen, sample, workdir, stop):
    """Builds the score of a run.

    Args:
      config: the run's config.
      source: the training images.
      chosen: from `choose`.
      sample: from train.make_grid_sampler.
      workdir: the run's folder; a score that is interrupted leaves its features there.
      stop: from signals.catch; computing the features of the training images may take long.

    Returns:
      score(step, params, stop=never) → {name: value}. It raises signals.Stopped when stop() is
      true, and goes on from there the next time, if the images are sampled in the same way.
    """
    count, size = config.train.score_samples, config.sample.batch_size
    weights, labelled = chosen
    if weights:
        log.info("scores: FID and KID of %d samples against the training images", count)
        measure, features_of = fid_and_kid(config, source, weights, stop)
    else:
        log.info("scores: Fréchet distance of %d samples, by a small classifier's features", count)
        measure, features_of = classifier_distance(config, source, labelled)
    shown = configs.for_show(config)
    inputs = {name: shown[name].to_dict() for name in ("diffusion", "model", "sample")}
    inputs["features"] = {"inception": weights and weights.sha256, **config.evaluate.to_dict()}
    warn_of_few_samples(count, inception.FEATURES if weights else classifier.FEATURES)

    def score(step, params, stop=signals.never):
        parent = pathlib.Path(workdir) / "scores"
        # The first process's: on other processors the last bits of a copy may be others.
        digest = parallel.broadcast_from_first(int(reference.digest_of(params)[:7], 16))
        known = {"step": step, "params": digest, **inputs}
        folder = reference.provenance_folder(parent, known)

        def rows(first, last):
            # A smaller last batch would compile again.
            x = sample(params, np.arange(first, first + size), stop=stop).x
            return features_of(x)[: last - first]

        row_files.collect(folder, count, size, rows, f"score step {step}", stop)
        found = measure(folder)
        parallel.barrier()  # all processes have read the features
        if parallel.is_first():
            shutil.rmtree(parent)
        return found

    return score


def warn_of_few_samples(count, num_features):
    """Warns of a score whose covariance is singular."""
    if count <= num_features:
        text = (
            "train.score_samples=%d: not above the %d features, so their covariance is singular; "
        )
        log.warning(text + "compare these scores with each other only", count, num_features)


def fid_and_kid(config, source, weights, stop):
    """(folder of features → scores, uint8 images → features), by Inception."""
    count, resize = config.train.score_samples, config.evaluate.resize
    inputs = {"resize": resize, "weights_sha256": weights.sha256}
    extract = features.make_extractor(weights.params, resize, config.sample.batch_size)
    of_data = reference.features_of_split(config, "split", source, extract, inputs, stop)

    def measure(folder):
        statistics, _ = features.statistics(folder, count)
        rows = features.pooled(row_files.rows(folder, min(count, config.evaluate.max_features)))
        return {
            "fid": distances.frechet_distance(of_data.statistics, statistics),
            "kid": distances.kernel_distance(of_data.features, rows).value,
        }

    return measure, extract


def classifier_distance(config, source, labelled):
    """(folder of features → score, uint8 images → features), by a small classifier."""
    small = reference.cached_classifier(config, source, labelled)

    def measure(folder):
        statistics = distances.statistics(row_files.chunks(folder, config.train.score_samples))
        return {"distance": distances.frechet_distance(small.statistics, statistics)}

    return measure, lambda images: classifier.features(small.layer, images)
