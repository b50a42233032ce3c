"""Distances/s of the search for nearest neighbours, at the sizes of CIFAR-10.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --count=10000

Every image of one set is searched in another set: pixels (3,072 whole numbers), then Inception's
features (2,048 numbers). The values are random, which does not affect the speed unless many
neighbours are equally near.
"""

import resource
import time

import jax
import numpy as np
from absl import app, flags

from ddpm_jax import cpu
from ddpm_jax.metrics import neighbours

COUNT = flags.DEFINE_integer("count", 50_000, "rows of each set")
NEAREST = 5


def main(_):
    """Prints the time and the rate for pixels and for features, and the largest memory so far."""
    cpu.use_cores(neighbours.MAX_ROWS)
    rng, count = np.random.default_rng(0), COUNT.value
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {count:,} in {count:,}")
    for name, draw in (
        ("pixels", lambda: rng.integers(0, 256, (count, 3072), np.uint8)),
        ("features", lambda: rng.standard_normal((count, 2048), np.float32)),
    ):
        queries, references = draw(), neighbours.in_memory(draw())
        neighbours.nearest(queries[: neighbours.MAX_ROWS], references, NEAREST)  # compiles
        start = time.perf_counter()
        neighbours.nearest(queries, references, NEAREST)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = count**2 / seconds / 1e6
        text = f"{seconds:.0f} s, {rate:.1f} million distances/s"
        print(f"{name}: {text}; at most {memory:.1f} GiB of memory", flush=True)


if __name__ == "__main__":
    app.run(main)
