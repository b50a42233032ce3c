"""Evaluations side by side: tables of scores, their differences, and which of these are noise."""

import pathlib

import numpy as np

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.files import disk
from ddpm_jax.metrics import distances

# Evaluations cannot be compared by a score if they differ in one of its fields.
COMPARABLE = {
    "fid": """
        dataset split_sha256 eval_split_sha256 image_size channels num_samples resize
        weights_sha256 ema label
    """.split(),
    "kid": ["scored_features"],
    "bits_per_dim": "bits_per_dim_sha256 bits_per_dim_images image_size channels ema".split(),
    "closer_to_train_pixels": """
        dataset split_sha256 eval_split_sha256 image_size channels nearest_images
        with_mirror_images ema label
    """.split(),
}
SCORES = """
    fid fid_test sfid sfid_test kid precision recall inception_score bits_per_dim rate distortion
""".split()
OF_IMAGES = "of_images_"  # and a score: in evaluation.npz, this score of each image
NOT_IN_TABLE = ("progressive", "warnings", "per_seed", "of_images")
FID_NOISE = 0.013  # relative
FID_NOTE = (
    "FIDs of repeated trainings, with other seeds, spread by 1 to 2 % in the literature; "
    "a difference below about 1.3 % is noise."
)
NEIGHBOURS_NOTE = (
    "closer_to_train: 0.5 is expected of samples that do not depend on the training images; "
    "closer_than_held_out depends on their quality, too."
)


def compare(workdirs):
    """Prints evaluations side by side, and their differences from the first.

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
        evaluation = disk.read_json(path, disk.nan_for_null)
        of_images = scores_of_images(path.with_suffix(".npz"), evaluation)
        results[str(workdir)] = {**evaluation, "of_images": of_images}
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
    print("\n".join([*table(results, {}), "", *differences(results)]))


def scores_of_images(path, evaluation):
    """The scores of single images, {score: [N]}; only those whose mean is the evaluation's score.

    Args:
      path: of evaluation.npz, which may be missing, or belong to another evaluation.
      evaluation: the content of evaluation.json.

    Raises:
      UserError: if the file is damaged.
    """
    if "bits_per_dim" not in evaluation or not path.is_file():
        return {}
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            names = [name for name in arrays if name.startswith(OF_IMAGES)]
            found = {name.removeprefix(OF_IMAGES): arrays[name] for name in names}
            means = {score: values.mean() for score, values in found.items()}
    except disk.ARCHIVE_ERRORS as error:
        raise UserError(f"{path}: {one_line(error)}; evaluate the run again") from None
    return {
        score: values
        for score, values in found.items()
        if np.isclose(means[score], evaluation.get(score, np.nan), rtol=1e-9)
    }


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
        if name not in NOT_IN_TABLE and not name.endswith(("_error", "_spread")):
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
    for score, note in (("fid", FID_NOTE), ("closer_to_train_pixels", NEIGHBOURS_NOTE)):
        if any(score in evaluation for evaluation in results.values()):
            yield from ("", note)


def table_of_steps(evaluations, published):
    """Yields the lines of a Markdown table, with a row for each checkpoint of a run.

    Args:
      evaluations: of the checkpoints.
      published: {step: FID}, the last column; {} for none.
    """
    names = [name for name in SCORES if name in evaluations[0]]
    last = ["published FID"] if published else []
    yield f"| {' | '.join(['step', 'images seen', *names, *last])} |"
    yield "|---" * (2 + len(names) + len(last)) + "|"
    at = {evaluation["step"]: evaluation for evaluation in evaluations}
    for step in sorted({*at, *published}):
        cells = [_cell(at.get(step, {}), name) for name in ("images_seen", *names)]
        yield _row(step, cells, published and {step: str(published.get(step, ""))}, step)
    yield from ("", FID_NOTE)


def differences(results):
    """Yields the lines of a Markdown table: the scores of evaluations minus those of the first.

    Args:
      results: {name: evaluation}.
    """
    (first, base), *others = results.items()
    if not others:
        return
    yield f"| minus {first} | {' | '.join(name for name, _ in others)} |"
    yield "|---" * len(results) + "|"
    for score in SCORES:
        cells = [difference(base, other, score) for _, other in others]
        if any(cells):
            yield _row(score, cells, {}, score)


def difference(base, other, score):
    """The text of a difference in a score, `other` minus `base`; empty if one has no such score.

    It is within noise up to two of its standard errors, where these are known. FIDs of two
    trainings, or without an error, are within noise up to FID_NOISE too.
    """
    if score not in base or score not in other:
        return ""
    change, (error, paired) = other[score] - base[score], error_of_difference(base, other, score)
    text, noise = f"{change:+.5g}", 0.0
    if error is not None:
        text, noise = f"{text} ± {error:.2g}{' (paired)' if paired else ''}", 2 * error
    one_training = base.get("params_sha256") == other.get("params_sha256")
    if score in ("fid", "fid_test") and not (error is not None and one_training):
        noise = max(noise, FID_NOISE * (base[score] + other[score]) / 2)
    return f"{text}, within noise" if abs(change) <= noise else text


def error_of_difference(base, other, score):
    """The standard error of a difference in a score, and whether it is that of paired images.

    Both evaluations are of the same images if they can be compared. Where the scores of these are
    known, their differences give the error: what makes an image hard is in both scores.
    Otherwise it is √(a² + b²); None if one of the errors is not known.
    """
    of_images = [scores.get("of_images", {}).get(score, ()) for scores in (base, other)]
    if len(of_images[0]) == len(of_images[1]) > 1:
        change = np.subtract(*of_images)
        return change.std(ddof=1) / np.sqrt(len(change)), True
    errors = standard_error(base, score), standard_error(other, score)
    return (None if None in errors else np.hypot(*errors)), False


def standard_error(evaluation, score):
    """The standard error of an evaluation's score, or None; of a mean over seeds, by its spread."""
    if (spread := evaluation.get(f"{score}_spread")) is not None:
        return spread / np.sqrt(evaluation["num_seeds"])
    error = evaluation.get(f"{score}_error")
    if error is not None and not np.isfinite(error):  # too few images for one
        return None
    if error is not None and score == "inception_score":
        # That of the mean over splits; the error is their standard deviation, with ddof = 0.
        return error / np.sqrt(distances.INCEPTION_SPLITS - 1)
    return error


def _row(label, cells, published, key):
    last = [published.get(key, "")] if published else []
    return f"| {label} | {' | '.join([*cells, *last])} |"


def _cell(evaluation, name):
    """A value and its error; the mean over seeds and its spread."""
    value, spread = evaluation.get(name, ""), evaluation.get(f"{name}_spread")
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    if spread is not None:
        return f"{text} ± {spread:.2g} ({evaluation['num_seeds']} seeds)"
    error = evaluation.get(f"{name}_error")
    return f"{text} ± {error:.2g}" if error is not None and np.isfinite(error) else text
