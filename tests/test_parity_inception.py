"""Inception against the published network itself, its input against TensorFlow and PyTorch.

pip install -r requirements-parity.txt
pip install --no-deps -r requirements-eval.txt
python -m pytest -m parity
"""

import hashlib

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from ddpm_jax import evaluate
from ddpm_jax.metrics import distances, features, inception, torch_files

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def real_images():
    """Pieces of two photographs, 40 × 64."""
    photos = load_sample_images().images
    return np.stack([photo[y : y + 160 : 4, y : y + 256 : 4] for photo in photos for y in (0, 150)])


def random_images():
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)


def gray_images():
    return np.uint8(load_digits().images[:4, :, :, None] * 255 / 16)


@pytest.fixture(scope="module")
def weights():
    return inception.load()


@pytest.fixture(scope="module")
def extract(weights):
    how = ("tf1", "torch")
    return {resize: features.make_extractor(weights.params, resize, 4) for resize in how}


@pytest.fixture(scope="module")
def published():
    """What the archive's own code computes, [B, 299, 299, 3] to [B, 2048]."""
    import torch

    network = torch.jit.load(inception.packaged(), map_location="cpu")

    def run(x):
        with torch.no_grad():
            return network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()

    return run


@pytest.mark.parametrize(
    "make, resize",
    [(real_images, "tf1"), (random_images, "tf1"), (gray_images, "tf1"), (real_images, "torch")],
)
def test_features(make, resize, extract, published):
    images = make()
    theirs = published(np.asarray(inception.preprocess(images, resize)))
    ours = extract[resize](images)
    errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert errors.max() <= 1e-4


@pytest.mark.parametrize("size", [(32, 32), (8, 16), (400, 310)])
def test_resizing(size):
    import tensorflow as tf
    import torch

    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    theirs = tf.compat.v1.image.resize_bilinear(np.float32(images), (299, 299)).numpy()
    ours = inception.preprocess(images, "tf1")
    np.testing.assert_allclose(ours, (theirs - 128) / 128, atol=5e-6)
    x = torch.from_numpy(np.float32(images / 255).transpose(0, 3, 1, 2))
    theirs = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    ours = inception.preprocess(images, "torch")
    np.testing.assert_allclose(ours, 2 * theirs.numpy().transpose(0, 2, 3, 1) - 1, atol=2e-5)


@pytest.mark.parametrize("legacy", [True, False])
def test_files_of_torch(tmp_path, legacy):
    import torch

    x = torch.randn(3, 4, 2, 2)
    saved = {
        "contiguous": x,
        "moved": x.permute(1, 0, 3, 2),
        "part": x[1:, 1],
        "half": x.half(),
        "whole": torch.arange(5),
        "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(x),
    }
    path = tmp_path / "file.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    read = torch_files.read(path)
    assert list(read) == list(saved)
    for name, tensor in saved.items():
        np.testing.assert_array_equal(read[name], tensor.detach().numpy())


def test_archive_of_the_package_as_torch_reads_it():
    import torch

    theirs = torch.jit.load(inception.packaged(), map_location="cpu").state_dict()
    ours = torch_files.read(inception.packaged())
    assert list(ours) == list(theirs) and len(ours) == 4 * 94
    assert all(np.array_equal(ours[name], theirs[name].numpy()) for name in ours)


def test_pytorch_fid_s_archive(tmp_path, weights, monkeypatch):
    """The same weights under its names, in another order, with gammas and a classifier."""
    import torch

    tensors = iter(torch_files.read(inception.packaged()).values())
    saved = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    for layer in inception.pytorch_fid_layers():
        kernel, beta, mean, variance = (torch.from_numpy(next(tensors)) for _ in range(4))
        saved |= {
            f"{layer}.bn.weight": torch.full_like(beta, 2.0),
            f"{layer}.bn.bias": beta,
            f"{layer}.bn.running_mean": 0.5 * mean,
            f"{layer}.bn.running_var": variance,
            f"{layer}.bn.num_batches_tracked": torch.tensor(0),
            f"{layer}.conv.weight": 0.5 * kernel,
        }
    path = tmp_path / "inception.pth"
    torch.save(dict(sorted(saved.items())), path, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(inception.ARCHIVES, digest[:8], "this one")
    found = inception.load(path)
    assert found.sha256 == digest
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found.params,
        weights.params,
    )
    kernel, bias = found.head
    np.testing.assert_array_equal(kernel, saved["fc.weight"].numpy().T)
    np.testing.assert_array_equal(bias, saved["fc.bias"].numpy())


def test_reference_of_a_dataset(tmp_path, config, extract, weights):
    """Computed once, the second time read; and FID of a set against itself is 0."""
    from ddpm_jax import data

    config.data.split = "train[:16]"
    config.evaluate.cache_dir = str(tmp_path)
    source = data.open_source(config.data)
    how = {"resize": "tf1", "weights_sha256": weights.sha256}
    first = evaluate.reference(config, "split", source, extract["tf1"], how)
    again = evaluate.reference(config, "split", source, None, how)
    assert first.statistics.count == 16
    np.testing.assert_array_equal(first.statistics.covariance, again.statistics.covariance)
    scale = np.trace(first.statistics.covariance)
    assert abs(distances.frechet_distance(first.statistics, again.statistics)) < 1e-6 * scale
    other = evaluate.reference(
        config, "split", source, extract["torch"], {**how, "resize": "torch"}
    )
    assert distances.frechet_distance(first.statistics, other.statistics) > 1e-3 * scale
