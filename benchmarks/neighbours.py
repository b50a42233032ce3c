"""Distances/s of the search for nearest neighbours, at the sizes of CIFAR-10.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --count=10000

Every image of one set is searched in another set: pixels (3,072 whole numbers), then Inception's
features (2,048 numbers). The values are random. Then the test images of CIFAR-10 are searched in
its training images. Where rounding errors do not exclude that another image is among the nearest, a
search in float64 follows, which takes longer.
"""

import resource
import time

import jax
import numpy as np
from absl import app, flags

from ddpm_jax import configs, cpu
from ddpm_jax.errors import UserError
from ddpm_jax.files import data, row_files
from ddpm_jax.metrics import neighbours

COUNT = flags.DEFINE_integer("count", 50_000, "rows of each set")
NEAREST = 5


def pixels_of(field, count):
    """The first images of a split of CIFAR-10: uint8 [N, 3072]."""
    source = data.open_source(configs.named_config("cifar10").data, field)
    return source.read(np.arange(min(count, source.size))).images.reshape(-1, 3072)


def main(_):
    """Prints the time and the rate for pixels and for features, and the largest memory so far."""
    cpu.use_cores(neighbours.MAX_ROWS)
    rng, count = np.random.default_rng(0), COUNT.value
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    for name, draw in (
        ("pixels", lambda _: rng.integers(0, 256, (count, 3072), np.uint8)),
        ("features", lambda _: rng.standard_normal((count, 2048), np.float32)),
        ("CIFAR-10", lambda field: pixels_of(field, count)),
    ):
        try:
            queries, references = draw("eval_split"), row_files.in_memory(draw("split"))
        except UserError as error:
            print(f"{name}: not measured, {error}")
            continue
        neighbours.nearest(queries[: neighbours.MAX_ROWS], references, NEAREST)  # compiles
        start = time.perf_counter()
        neighbours.nearest(queries, references, NEAREST)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = len(queries) * references.count / seconds / 1e6
        sizes = f"{len(queries):,} in {references.count:,}"
        text = f"{seconds:.0f} s, {rate:.1f} million distances/s"
        print(f"{name}, {sizes}: {text}; at most {memory:.1f} GiB of memory", flush=True)


if __name__ == "__main__":
    app.run(main)
