"""Quality of samplers by the number of network evaluations (NFE); the effect of guidance.

    python -m benchmarks.samplers --workdir=runs/digits --csv=docs/samplers.csv
    python -m benchmarks.samplers --workdir=runs/mnist --csv=docs/samplers.csv
    python -m benchmarks.sampler_chart docs/samplers.csv docs/assets/samplers.png
    python -m benchmarks.samplers --workdir=runs/digits_conditional

Quality is the Fréchet distance between samples and the training split, on the 64 hidden units of a
classifier of its images (scikit-learn's MLPClassifier, on pixels in [0, 1], trained on at most
10,000 of them). Rows that the CSV file has already are not measured again, and parts of a row are
kept in the run's folder, so the command can be interrupted. For a conditional run, a table of
guidance scales is printed: a second classifier, trained on the held-out images, measures the
fraction of samples whose class it recognizes.
"""

import csv
import datetime
import pathlib

import numpy as np
from absl import app, flags
from sklearn.neural_network import MLPClassifier

from ddpm_jax import configs, cpu
from ddpm_jax.core import solvers
from ddpm_jax.files import checkpoint, data
from ddpm_jax.files import workdir as run_files
from ddpm_jax.metrics import distances
from ddpm_jax.runs import generate

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "a run with labelled data")
CSV = flags.DEFINE_string("csv", "docs/samplers.csv", "the file to add rows to")
SAMPLES = flags.DEFINE_integer("samples", 5000, "images of each row")
SEEDS = flags.DEFINE_integer("seeds", 3, "rows of each sampler")
NFE = flags.DEFINE_list("nfe", ["5", "8", "10", "15", "20", "50", "0"], "0: all T steps")
BATCH_SIZE, MOST_LABELLED = 500, 10_000
COLUMNS = "data sampler order spacing steps nfe seed samples distance date".split()
# (sampler, order, spacing); all T steps are measured for the first one.
SAMPLERS = [
    ("ancestral", 2, "leading"),
    ("ddim", 2, "leading"),
    ("dpmpp", 2, "leading"),
    ("dpmpp", 2, "trailing"),
    ("dpmpp", 3, "leading"),
    ("dpmpp_sde", 2, "leading"),
    ("dpmpp_sde", 2, "linspace"),
    ("unipc", 2, "leading"),
    ("unipc", 2, "trailing"),
    ("unipc", 3, "leading"),
    ("heun", 2, "leading"),
    ("plms", 2, "leading"),
]
GUIDANCE = [0, 0.5, 1, 1.5, 2, 3, 5]


def train_classifier(batch):
    """A classifier of real images."""
    classifier = MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=0)
    return classifier.fit(pixels(batch.images), batch.labels)


def pixels(images):
    """uint8 [N, H, W, C] to [N, H W C] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def statistics(classifier, images):
    """Mean and covariance of the hidden units."""
    hidden = np.maximum(pixels(images) @ classifier.coefs_[0] + classifier.intercepts_[0], 0)
    return distances.statistics([hidden])


def steps_for(sampler, nfe):
    """The steps with which a sampler calls the network `nfe` times, or once less."""
    return {"heun": (nfe + 1) // 2, "plms": nfe - 1}.get(sampler, nfe)


def cases(total):
    """(sampler, order, spacing, steps) to measure; the full chain first."""
    for nfe in sorted(map(int, NFE.value)):
        for sampler, order, spacing in SAMPLERS if nfe else SAMPLERS[:1]:
            steps = steps_for(sampler, nfe) or total
            if nfe < total:
                yield sampler, order, spacing, steps


def measured(path):
    """The rows of the CSV file without what was measured: a set of tuples."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in COLUMNS[:-2]) for row in csv.DictReader(file)}


def add_row(path, row):
    """Adds a row to the CSV file; the header, too, if it is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(([COLUMNS] if is_new else []) + [row])


def generate_in_parts(sample, params, seed, name, step):
    """The images of a row, uint8; each part is kept until all are there, to go on after a stop."""
    folder, parts = pathlib.Path(WORKDIR.value) / "samplers", []
    for first in range(0, SAMPLES.value, BATCH_SIZE):
        path = folder / f"{step}_{name}_{first}.npy"
        if not path.exists():
            indices = np.arange(first, min(first + BATCH_SIZE, SAMPLES.value))
            folder.mkdir(exist_ok=True)
            with run_files.atomic_write(path) as part, part.open("wb") as file:
                np.save(file, sample(params, indices, seed=seed).x)
        parts.append(path)
    images = np.concatenate([np.load(part) for part in parts])
    for part in parts:
        part.unlink()
    return images


def measure(config, step, params, distance):
    """Adds the rows that the CSV file lacks, and prints them; step: the checkpoint's."""
    path, name = pathlib.Path(CSV.value), pathlib.Path(WORKDIR.value).name
    done = measured(path)
    for sampler, order, spacing, steps in cases(config.diffusion.num_timesteps):
        config.sample.update(sampler=sampler, order=order, spacing=spacing, num_steps=steps)
        chain = generate.make_chain(config)
        nfe, sample = solvers.num_calls(generate.make_solver(config, chain)), None
        for seed in range(SEEDS.value):
            row = [name, sampler, order, spacing, steps, nfe, seed, SAMPLES.value]
            if tuple(map(str, row)) in done:
                continue
            sample = sample or generate.make_sampler(config)
            images = generate_in_parts(sample, params, seed, "_".join(map(str, row)), step)
            row += [f"{distance(images):.4f}", datetime.date.today()]
            add_row(path, row)
            print(*row, flush=True)


def print_guidance(config, judge, distance):
    """Prints a table of guidance scales."""
    labels = np.arange(SAMPLES.value) % config.data.num_classes
    print("| guidance | recognized | distance |\n|---|---|---|")
    for guidance in GUIDANCE:
        config.sample.guidance = float(guidance)
        _, sample = generate.restore_sampler(config, WORKDIR.value)
        images = sample(np.arange(SAMPLES.value)).x
        accuracy = judge.score(pixels(images), labels)
        print(f"| {guidance} | {accuracy:.3f} | {distance(images):.3f} |", flush=True)


def main(_):
    """Measures the samplers of a run, or the guidance scales of a conditional one."""
    cpu.prepare(trains=False)
    cpu.use_cores(BATCH_SIZE)
    config = run_files.saved_config(WORKDIR.value)
    config.sample.batch_size = BATCH_SIZE
    section = config.data.copy_and_resolve_references()
    section.num_classes = section.num_classes or 10
    sources = [data.open_source(section, field) for field in ("split", "eval_split")]
    real, rest = (s.read(np.arange(min(s.size, MOST_LABELLED))) for s in sources)
    classifier, judge = train_classifier(real), train_classifier(rest)
    reference = statistics(classifier, sources[0].read(np.arange(sources[0].size)).images)

    def distance(images):
        return distances.frechet_distance(reference, statistics(classifier, images))

    print(f"classifier: {classifier.score(pixels(rest.images), rest.labels):.3f} of the held-out")
    print(f"judge: {judge.score(pixels(real.images), real.labels):.3f} of the others")
    print(f"{len(rest.images)} held-out images: distance {distance(rest.images):.3f}")
    if config.data.num_classes:
        print_guidance(config, judge, distance)
    else:
        configs.check(config, "sample")
        measure(config, *checkpoint.restore_params(config, WORKDIR.value), distance)


if __name__ == "__main__":
    app.run(main)
