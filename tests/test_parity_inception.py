"""Inception against the published network itself, its input against TensorFlow and PyTorch.

pip install -r requirements-parity.txt
pip install --no-deps -r requirements-eval.txt
python -m pytest -m parity
"""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from ddpm_jax.metrics import distances, features, inception, torch_files
from ddpm_jax.runs import reference

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
    """What the archive's own code computes, [B, 299, 299, 3] to [B, 2048] and [B, 17, 17, 7]."""
    import torch

    network = torch.jit.load(inception.packaged(), map_location="cpu")

    def run(x):
        x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            pool = network(x)
            for name, block in network.net.layers.named_children():
                if name == "mixed_6":
                    return pool.numpy(), channels_last(block.conv(x)[:, :7])
                x = block(x)

    return run


def channels_last(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1)


def relative_errors(ours, theirs):
    """Of rows of our extractor to (pool, spatial), for each image: [2, B]."""
    parts = features.pooled(ours), features.spatial(ours)
    pairs = [
        (part, other.reshape(len(ours), -1)) for part, other in zip(parts, theirs, strict=True)
    ]
    return np.array([np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1) for a, b in pairs])


@pytest.mark.parametrize(
    "make, resize",
    [(real_images, "tf1"), (random_images, "tf1"), (gray_images, "tf1"), (real_images, "torch")],
)
def test_features(make, resize, extract, published):
    images = make()
    theirs = published(np.asarray(inception.preprocess(images, resize)))
    assert relative_errors(extract[resize](images), theirs).max() <= 1e-4


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


def pytorch_inception():
    """The network in PyTorch with torchvision's names of modules and pytorch-fid's poolings."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Conv(nn.Module):
        def __init__(self, width, kernel=1, stride=1, padding=0):
            super().__init__()
            self.conv = nn.LazyConv2d(width, kernel, stride, padding, bias=False)
            self.bn = nn.BatchNorm2d(width, eps=0.001)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    class Block(nn.Module):
        """Branches by name; a list of names is a chain, a pair at its end a fork."""

        def __init__(self, pool, chains, **convolutions):
            super().__init__()
            for name, settings in convolutions.items():
                setattr(self, name, Conv(*settings))
            self.pool, self.chains = pool, chains

        def forward(self, x):
            out = []
            for chain in self.chains:
                h = x
                for name in chain:
                    if name == "pool":
                        h = self.pool(h)
                    elif isinstance(name, tuple):
                        h = torch.cat([getattr(self, n)(h) for n in name], 1)
                    else:
                        h = getattr(self, name)(h)
                out.append(h)
            return torch.cat(out, 1)

    average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    shrink, maximum = nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 1, 1)
    triple = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    wide, high = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))

    def a(pool_width):
        return Block(
            average,
            [["branch1x1"], ["branch5x5_1", "branch5x5_2"], triple, ["pool", "branch_pool"]],
            branch1x1=(64,),
            branch5x5_1=(48,),
            branch5x5_2=(64, 5, 1, 2),
            branch3x3dbl_1=(64,),
            branch3x3dbl_2=(96, 3, 1, 1),
            branch3x3dbl_3=(96, 3, 1, 1),
            branch_pool=(pool_width,),
        )

    def c(width):
        names = [f"branch7x7_{i}" for i in range(1, 4)], [f"branch7x7dbl_{i}" for i in range(1, 6)]
        return Block(
            average,
            [["branch1x1"], *names, ["pool", "branch_pool"]],
            branch1x1=(192,),
            branch7x7_1=(width,),
            branch7x7_2=(width, *wide),
            branch7x7_3=(192, *high),
            branch7x7dbl_1=(width,),
            branch7x7dbl_2=(width, *high),
            branch7x7dbl_3=(width, *wide),
            branch7x7dbl_4=(width, *high),
            branch7x7dbl_5=(192, *wide),
            branch_pool=(192,),
        )

    def e(pool):
        fork = [*triple[:2], ("branch3x3dbl_3a", "branch3x3dbl_3b")]
        return Block(
            pool,
            [
                ["branch1x1"],
                ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
                fork,
                ["pool", "branch_pool"],
            ],
            branch1x1=(320,),
            branch3x3_1=(384,),
            branch3x3_2a=(384, (1, 3), 1, (0, 1)),
            branch3x3_2b=(384, (3, 1), 1, (1, 0)),
            branch3x3dbl_1=(448,),
            branch3x3dbl_2=(384, 3, 1, 1),
            branch3x3dbl_3a=(384, (1, 3), 1, (0, 1)),
            branch3x3dbl_3b=(384, (3, 1), 1, (1, 0)),
            branch_pool=(192,),
        )

    modules = {
        "Conv2d_1a_3x3": Conv(32, 3, 2),
        "Conv2d_2a_3x3": Conv(32, 3),
        "Conv2d_2b_3x3": Conv(64, 3, 1, 1),
        "maxpool1": shrink,
        "Conv2d_3b_1x1": Conv(80),
        "Conv2d_4a_3x3": Conv(192, 3),
        "maxpool2": shrink,
        **{f"Mixed_5{letter}": a(width) for letter, width in zip("bcd", (32, 64, 64), strict=True)},
        "Mixed_6a": Block(
            shrink,
            [["branch3x3"], triple, ["pool"]],
            branch3x3=(384, 3, 2),
            branch3x3dbl_1=(64,),
            branch3x3dbl_2=(96, 3, 1, 1),
            branch3x3dbl_3=(96, 3, 2),
        ),
        **{f"Mixed_6{x}": c(width) for x, width in zip("bcde", (128, 160, 160, 192), strict=True)},
        "Mixed_7a": Block(
            shrink,
            [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)], ["pool"]],
            branch3x3_1=(192,),
            branch3x3_2=(320, 3, 2),
            branch7x7x3_1=(192,),
            branch7x7x3_2=(192, *wide),
            branch7x7x3_3=(192, *high),
            branch7x7x3_4=(192, 3, 2),
        ),
        "Mixed_7b": e(average),
        "Mixed_7c": e(maximum),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    network = nn.Sequential()
    for name, module in modules.items():
        network.add_module(name, module)
    torch.manual_seed(0)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 299, 299))  # makes the weights
        for name, tensor in network.state_dict().items():
            if "bn" in name and tensor.ndim:
                tensor.copy_(torch.rand_like(tensor) + 0.5 * ("running_var" in name))
    return network


def test_pytorch_fid_s_archive(tmp_path, monkeypatch):
    """Its names, the stream of old torch.save, gammas, a classifier, another order of tensors."""
    import torch

    network = pytorch_inception()
    saved = {**network.state_dict(), "fc.weight": torch.randn(1008, 2048)}
    saved["fc.bias"] = torch.randn(1008)
    path = tmp_path / "inception.pth"
    torch.save(dict(sorted(saved.items())), path, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(inception.ARCHIVES, digest[:8], "this one")
    found = inception.load(path)
    assert found.sha256 == digest
    kernel, bias = found.head
    np.testing.assert_array_equal(kernel, saved["fc.weight"].numpy().T)
    np.testing.assert_array_equal(bias, saved["fc.bias"].numpy())
    images = random_images()
    x = np.asarray(inception.preprocess(images, "torch")).transpose(0, 3, 1, 2)
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[2][:, :7]))
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.copy())).numpy(), channels_last(*spatial)
    ours = features.make_extractor(found.params, "torch", 4)(images)
    assert relative_errors(ours, theirs).max() <= 1e-4


def test_reference_of_a_dataset(tmp_path, config, extract, weights):
    """Computed once, the second time read; and FID of a set against itself is 0."""
    from ddpm_jax.files import data

    config.data.split = "train[:16]"
    config.evaluate.cache_dir = str(tmp_path)
    source = data.open_source(config.data)
    how = {"resize": "tf1", "weights_sha256": weights.sha256}
    first = reference.features_of_split(config, "split", source, extract["tf1"], how)
    again = reference.features_of_split(config, "split", source, None, how)
    assert first.statistics.count == 16
    np.testing.assert_array_equal(first.statistics.covariance, again.statistics.covariance)
    scale = np.trace(first.statistics.covariance)
    assert abs(distances.frechet_distance(first.statistics, again.statistics)) < 1e-6 * scale
    other = reference.features_of_split(
        config, "split", source, extract["torch"], {**how, "resize": "torch"}
    )
    assert distances.frechet_distance(first.statistics, other.statistics) > 1e-3 * scale
