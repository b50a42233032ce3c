"""Quality of samplers by the number of network evaluations (NFE); the effect of guidance.

    python -m benchmarks.samplers --workdir=runs/digits --csv=docs/samplers.csv
    python -m benchmarks.samplers --workdir=runs/mnist --csv=docs/samplers.csv
    python -m benchmarks.sampler_chart docs/samplers.csv docs/assets/samplers.png
    python -m benchmarks.samplers --workdir=runs/digits_conditional

Quality is the Fréchet distance of metrics/classifier.py. Rows that the CSV file has already are not
measured again, and parts of a row are kept in the run's folder, so the command can be interrupted.
For a conditional run, a table of guidance scales is printed: a second classifier, trained on the
held-out images, measures the fraction of samples whose class it recognizes.
"""

import datetime
import pathlib

import numpy as np
from absl import app, flags

from benchmarks import quality
from ddpm_jax import checks, configs, cpu
from ddpm_jax.core import solvers
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.metrics import classifier
from ddpm_jax.runs import generate, reference, samplers

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "a run with labelled data")
CSV = flags.DEFINE_string("csv", "docs/samplers.csv", "the file to add rows to")
SAMPLES = flags.DEFINE_integer("samples", 5000, "images of each row")
SEEDS = flags.DEFINE_integer("seeds", 3, "rows of each sampler")
NFE = flags.DEFINE_list("nfe", ["5", "8", "10", "15", "20", "50", "0"], "0: all T steps")
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


def measure(config, step, params, distance):
    """Adds the rows that the CSV file lacks, and prints them; step: the checkpoint's."""
    path, name = pathlib.Path(CSV.value), pathlib.Path(WORKDIR.value).name
    done = quality.measured(path, COLUMNS[:-2])
    for sampler, order, spacing, steps in cases(config.diffusion.num_timesteps):
        config.sample.update(sampler=sampler, order=order, spacing=spacing, num_steps=steps)
        chain = samplers.make_chain(config)
        nfe, sample = solvers.num_calls(samplers.make_solver(config, chain)), None
        for seed in range(SEEDS.value):
            row = [name, sampler, order, spacing, steps, nfe, seed, SAMPLES.value]
            if tuple(map(str, row)) in done:
                continue
            sample = sample or samplers.make_sampler(config)
            images = quality.generate_in_parts(
                lambda indices, sample=sample, seed=seed: sample(params, indices, seed=seed).x,
                SAMPLES.value,
                pathlib.Path(WORKDIR.value) / "samplers",
                "_".join(map(str, [step, *row])),
            )
            row += [f"{distance(images):.4f}", datetime.date.today()]
            quality.add_rows(path, COLUMNS, [row])
            print(*row, flush=True)


def print_guidance(config, judge, distance):
    """Prints a table of guidance scales."""
    labels = np.arange(SAMPLES.value) % config.data.num_classes
    print("| guidance | recognized | distance |\n|---|---|---|")
    for guidance in GUIDANCE:
        config.sample.guidance = float(guidance)
        _, sample = generate.restore_sampler(config, WORKDIR.value)
        images = sample(np.arange(SAMPLES.value)).x
        accuracy = judge.score(classifier.pixels(images), labels)
        print(f"| {guidance} | {accuracy:.3f} | {distance(images):.3f} |", flush=True)


def main(_):
    """Measures the samplers of a run, or the guidance scales of a conditional one."""
    config = run_files.saved_config(WORKDIR.value)
    cpu.prepare(configs.positions(config, "sample"))
    cpu.use_cores(quality.BATCH_SIZE)
    config.sample.batch_size = quality.BATCH_SIZE
    sources = quality.labelled_sources(config)
    real, rest = map(reference.first_images, sources)
    trained, judge = classifier.train(*real), classifier.train(*rest)
    distance = quality.distance_to(sources[0], trained)
    for name, model, batch in (("classifier", trained, rest), ("judge", judge, real)):
        score = model.score(classifier.pixels(batch.images), batch.labels)
        print(f"{name}: {score:.3f} of the images that it was not trained on")
    print(f"{len(rest.images)} held-out images: distance {distance(rest.images):.3f}")
    if config.data.num_classes:
        print_guidance(config, judge, distance)
    else:
        checks.check(config, "sample")
        measure(config, *checkpoint.restore_params(config, WORKDIR.value), distance)


if __name__ == "__main__":
    app.run(main)
