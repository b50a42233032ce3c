"""Images/s of our Inception network, and of the original one in PyTorch.

    pip install -r requirements-parity.txt && pip install --no-deps -r requirements-eval.txt
    python -m benchmarks.inception

Both get the same batches of 32 × 32 images, in turns. Only our time includes resizing.
"""

import time

import numpy as np

from ddpm_jax import cpu
from ddpm_jax.metrics import features, inception

BATCH_SIZE = 64
ROUNDS = 5


def theirs():
    """The TorchScript network on resized images: batch → seconds."""
    import torch

    network = torch.jit.load(inception.packaged(), map_location="cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device)

    def run(images):
        x = np.asarray(inception.preprocess(images, "tf1")).transpose(0, 3, 1, 2)
        x = torch.from_numpy(x.copy()).to(device)
        start = time.perf_counter()
        with torch.no_grad():
            network(x).cpu()
        return time.perf_counter() - start

    return run


def ours():
    """make_extractor: batch → seconds."""
    extract = features.make_extractor(inception.load().params, "tf1", BATCH_SIZE)

    def run(images):
        start = time.perf_counter()
        extract(images)
        return time.perf_counter() - start

    return run


def measure():
    """{contestant: images/s of each turn}."""
    cpu.prepare()
    cpu.use_cores(BATCH_SIZE)
    shape = (BATCH_SIZE, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    runs = {"ours": ours(), "PyTorch": theirs()}
    rates = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):  # the first one compiles
        for name, run in runs.items():
            seconds = run(images)
            if turn:
                rates[name].append(BATCH_SIZE / seconds)
    return rates


if __name__ == "__main__":
    for name, rates in measure().items():
        low, median, high = np.quantile(rates, [0, 0.5, 1])
        print(f"{name:8} {median:6.2f} images/s (from {low:.2f} to {high:.2f})")
