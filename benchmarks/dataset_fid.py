"""The FID between the two splits of a dataset, measured by this code: that of a perfect model.

    python -m benchmarks.dataset_fid
    python -m benchmarks.dataset_fid --config=configs/digits.py

It caches features in files, as `--mode=evaluate` does. So an interrupted run resumes, and a later
evaluation reuses the features.
"""

from absl import app, flags

from ddpm_jax import configs, cpu
from ddpm_jax.files import data
from ddpm_jax.metrics import distances, features, inception
from ddpm_jax.runs import reference

CONFIG = flags.DEFINE_string("config", "configs/cifar10.py", "whose data section is used")


def main(_):
    """Prints the FID of split against eval_split."""
    config = configs.named_config(CONFIG.value)
    cpu.prepare()
    cpu.use_cores(config.sample.batch_size)
    weights = inception.load(config.evaluate.inception_weights)
    provenance = {"resize": config.evaluate.resize, "weights_sha256": weights.sha256}
    size = config.sample.batch_size
    extract = features.make_extractor(weights.params, config.evaluate.resize, size)
    statistics = []
    for field in ("eval_split", "split"):
        source = data.open_source(config.data, field)
        found = reference.features_of_split(config, field, source, extract, provenance)
        statistics.append(found.statistics)
        print(f"{config.data.name} {config.data[field]}: {source.size} images", flush=True)
    print(f"FID {distances.frechet_distance(*statistics):.4f}")


if __name__ == "__main__":
    app.run(main)
