"""Quality and time of samplers on the digits; for a conditional run, the effect of guidance.

    python -m benchmarks.samplers --workdir=runs/digits
    python -m benchmarks.samplers --workdir=runs/digits_conditional

Quality is the Fréchet distance between 2,000 samples and the 1,500 images of the training split, on
the 64 hidden units of a classifier trained on this split (scikit-learn's MLPClassifier, on pixels
in [0, 1]). For a conditional run, a second classifier, trained on the other 297 images, measures
the fraction of samples whose class it recognizes. Times do not include compilation.
"""

import time

import numpy as np
from absl import app, flags
from sklearn.neural_network import MLPClassifier

from ddpm_jax import cpu
from ddpm_jax.files import data
from ddpm_jax.files import workdir as run_files
from ddpm_jax.metrics import distances
from ddpm_jax.runs import generate

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "a run of one of the configs of digits")
SAMPLES, BATCH_SIZE = 2000, 500
SAMPLERS = [
    ("ancestral", 0),
    ("ddim", 0),
    ("ddim", 100),
    ("ddim", 50),
    ("ddim", 20),
    ("ddim", 10),
    ("ancestral", 100),
    ("ancestral", 50),
    ("ancestral", 20),
    ("ancestral", 10),
]
WEIGHTS = [0, 0.5, 1, 1.5, 2, 3, 5]


def train_classifier(batch):
    """A classifier of real digits."""
    classifier = MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=0)
    return classifier.fit(pixels(batch.images), batch.labels)


def pixels(images):
    """uint8 [N, 8, 8, 1] to [N, 64] in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def statistics(classifier, images):
    """Mean and covariance of the hidden units."""
    hidden = np.maximum(pixels(images) @ classifier.coefs_[0] + classifier.intercepts_[0], 0)
    return distances.statistics([hidden])


def main(_):
    """Prints a table of samplers, or of guidance scales for a conditional run."""
    cpu.use_cores(BATCH_SIZE)
    config = run_files.saved_config(WORKDIR.value)
    config.sample.batch_size = BATCH_SIZE
    section = config.data.copy_and_resolve_references()
    section.num_classes = 10
    real, rest = (
        data.open_source(section, field).read(np.arange(count))
        for field, count in (("split", 1500), ("eval_split", 297))
    )
    classifier, judge = train_classifier(real), train_classifier(rest)
    reference, labels = statistics(classifier, real.images), np.arange(SAMPLES) % 10

    def distance(images):
        return distances.frechet_distance(reference, statistics(classifier, images))

    print(f"classifier: {classifier.score(pixels(rest.images), rest.labels):.3f} of the 297")
    print(f"judge: {judge.score(pixels(real.images), real.labels):.3f} of the 1,500")
    print(f"the 297 real ones: distance {distance(rest.images):.3f}")
    if config.data.num_classes:
        print("| guidance | recognized | distance |\n|---|---|---|")
        for weight in WEIGHTS:
            config.sample.guidance = float(weight)
            _, sample = generate.restore_sampler(config, WORKDIR.value)
            images = sample(np.arange(SAMPLES)).x
            accuracy = judge.score(pixels(images), labels)
            print(f"| {weight} | {accuracy:.3f} | {distance(images):.3f} |", flush=True)
        return
    print(f"| sampler | steps | distance | seconds for {BATCH_SIZE} |\n|---|---|---|---|")
    for sampler, steps in SAMPLERS:
        config.sample.update(sampler=sampler, num_steps=steps)
        _, sample = generate.restore_sampler(config, WORKDIR.value)
        images = sample(np.arange(SAMPLES)).x
        start = time.perf_counter()
        sample(np.arange(BATCH_SIZE))
        seconds = time.perf_counter() - start
        steps = steps or config.diffusion.num_timesteps
        print(f"| {sampler} | {steps} | {distance(images):.3f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
