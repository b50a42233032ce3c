"""The Inception network's shape and input, and the files that its weights come in."""

import io
import pickle
import sys
import types
import zipfile

import jax
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.metrics import features, inception, torch_files


def test_network_is_the_fid_s():
    """94 convolutions; the parameters of torchvision's Inception v3 without its two classifiers.

    Those are 23,834,568 with 2,048,000 + 1,000 in the last layer; batch normalisation has two
    numbers a channel there, and a bias stands for both here: 17,216 channels.
    """
    x = jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32)
    network = inception.Inception()
    out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), x)
    assert [part.shape for part in out] == [(2, 2048), (2, 17, 17, 7)]
    params = variables["params"]
    assert len(params) == 94
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 23_834_568 - 2_049_000 - 17_216


def test_spatial_features_are_those_of_sfid():
    """The first 7 channels of the 1×1 branch of mixed_6, torchvision's Mixed_6d, after the ReLU.

    With kernels of zeros, a convolution's output is its bias: here its number and its channel.
    """
    network = inception.Inception()
    x = np.zeros((1, 75, 75, 3), np.float32)  # 17 × 17 become 3 × 3
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    params = {
        f"conv{i}": {
            "kernel": np.zeros(shapes[f"conv{i}"]["kernel"].shape, np.float32),
            "bias": 1000 * i + np.arange(shapes[f"conv{i}"]["bias"].size, dtype=np.float32),
        }
        for i in range(94)
    }
    number = inception.pytorch_fid_layers().index("Mixed_6d.branch1x1")
    params[f"conv{number}"]["bias"][3] *= -1
    spatial = jax.jit(lambda params: network.apply({"params": params}, x)[1])(params)
    expected = [1000 * number + channel if channel != 3 else 0 for channel in range(7)]
    np.testing.assert_array_equal(spatial, np.broadcast_to(np.float32(expected), (1, 3, 3, 7)))


def test_names_of_pytorch_fid():
    names = inception.pytorch_fid_layers()
    assert len(names) == len(set(names)) == 94
    assert names[5] == "Mixed_5b.branch1x1" and names[-1] == "Mixed_7c.branch_pool"


def test_folding_is_batch_normalisation():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 1, 1))
    gamma, beta, mean = rng.standard_normal((3, 4))
    variance = rng.random(4) + 0.1
    x = rng.standard_normal((5, 3))
    y = x @ weight[:, :, 0, 0].T
    for scale, tensors in (
        (1, [weight, beta, mean, variance]),
        (gamma, [weight, gamma, beta, mean, variance]),
    ):
        layer = inception.fold({str(i): t for i, t in enumerate(tensors)})["conv0"]
        expected = scale * (y - mean) / np.sqrt(variance + 0.001) + beta
        np.testing.assert_allclose(x @ layer["kernel"][0, 0] + layer["bias"], expected, rtol=1e-5)


def test_tensorflow_s_resizing():
    """By its definition: pixel i of 299 comes from i · size / 299, between its two neighbours."""
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 8, 3)).astype(np.uint8)
    found = np.asarray(inception.preprocess(image, "tf1"))[0]
    for i, j in ((0, 0), (7, 100), (150, 298), (298, 298), (60, 37)):
        y, x = i * 5 / 299, j * 8 / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 7)
        (a, b), (c, d) = np.float64(image[0])[[[top], [bottom]], [left, right]]
        upper, lower = a + (b - a) * (x - left), c + (d - c) * (x - left)
        expected = (upper + (lower - upper) * (y - top) - 128) / 128
        np.testing.assert_allclose(found[i, j], expected, atol=1e-5)


def test_resizing_to_the_same_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        inception.preprocess(image, "tf1"), (np.float32(image) - 128) / 128, atol=1e-6
    )
    np.testing.assert_allclose(
        inception.preprocess(image, "torch"), np.float32(image) / 127.5 - 1, atol=1e-6
    )


def test_gray_is_repeated():
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 1)).astype(np.uint8)
    gray = inception.preprocess(image, "torch")
    np.testing.assert_array_equal(gray, inception.preprocess(image.repeat(3, -1), "torch"))


def test_a_batch_that_is_not_full_has_no_more_features(monkeypatch):
    """Of six images, four at a time; in place of the network a mean."""

    class Mean:
        def apply(self, variables, x):
            return x.mean(axis=(1, 2)), x[:, :1, :1] + 10

    monkeypatch.setattr(inception, "Inception", lambda convolve: Mean())
    levels = np.arange(0, 60, 10, dtype=np.uint8)
    images = np.broadcast_to(levels.reshape(6, 1, 1, 1), (6, 4, 4, 1))
    found = features.make_extractor({}, "tf1", 4)(images)
    pooled = np.repeat((np.float32(levels)[:, None] - 128) / 128, 3, axis=1)
    np.testing.assert_allclose(found, np.hstack([pooled, pooled + 10]), atol=1e-6)


def test_pooling_is_that_of_the_graph(monkeypatch):
    """Padding is not counted; only the last block takes the maximum."""
    ones, order = np.ones((1, 4, 4, 1), np.float32), []
    np.testing.assert_array_equal(inception._average(ones), ones)
    for name in ("_average", "_maximum"):
        pool = getattr(inception, name)
        monkeypatch.setattr(inception, name, lambda x, n=name, f=pool: order.append(n) or f(x))
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    jax.eval_shape(inception.Inception().init, jax.random.key(0), x)
    assert order == [*["_average"] * 8, "_maximum"]


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def archive(path, content, name="archive/data.pkl"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)


def test_pickles_that_hold_more_than_tensors(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    archive(path, pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match=r"has a builtins\.print"):
        torch_files.read(path)
    path.write_bytes(pickle.dumps(torch_files.LEGACY_MAGIC) + pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"has a builtins\.print"):
        torch_files.read(path)
    assert capsys.readouterr().out == ""


def torch_pickle(monkeypatch, **tensors):
    """What torch.save pickles for {name: (offset, shape, strides)}, all of one storage, "0"."""
    module, storages = types.ModuleType("torch._utils"), types.ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch._utils", module)
    monkeypatch.setitem(sys.modules, "torch", storages)
    exec("def _rebuild_tensor_v2(): pass\n", module.__dict__)
    exec("class FloatStorage: pass\n", storages.__dict__)
    for thing, home in (("_rebuild_tensor_v2", module), ("FloatStorage", storages)):
        getattr(home, thing).__module__ = home.__name__

    class Tensor:
        def __init__(self, *place):
            self.place = place

        def __reduce__(self):
            return module._rebuild_tensor_v2, (Memory(), *self.place, False, None)

    class Memory:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            kind = ("storage", storages.FloatStorage, "0", "cpu", 6)
            return kind if isinstance(thing, Memory) else None

    stream = io.BytesIO()
    Pickler(stream).dump({name: Tensor(*place) for name, place in tensors.items()})
    return stream.getvalue()


def test_tensors_are_views_of_their_storage(tmp_path, monkeypatch):
    path, values = tmp_path / "weights.pt", np.arange(6, dtype="<f4")
    places = {"whole": (0, (2, 3), (3, 1)), "turned": (0, (3, 2), (1, 3)), "last": (5, (), ())}
    archive(path, torch_pickle(monkeypatch, **places))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", values.tobytes())
    read = torch_files.read(path)
    assert list(read) == list(places)
    np.testing.assert_array_equal(read["whole"], values.reshape(2, 3))
    np.testing.assert_array_equal(read["turned"], values.reshape(2, 3).T)
    assert read["last"] == 5


@pytest.mark.parametrize("place", [(0, (7,), (1,)), (5, (3,), (-1,)), (-1, (2,), (1,))], ids=str)
def test_tensors_that_reach_beyond_their_storage(tmp_path, monkeypatch, place):
    path = tmp_path / "weights.pt"
    archive(path, torch_pickle(monkeypatch, outside=place))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(24))
    with pytest.raises(UserError, match="reaches beyond its storage 0"):
        torch_files.read(path)


def test_files_that_are_not_weights(tmp_path):
    path = tmp_path / "weights.pt"
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    for content in (b"", b"nonsense", pickle.dumps(3), stream.getvalue()):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as tensors"):
            torch_files.read(path)


def test_weights_that_are_missing_or_others(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"evaluate\.inception_weights=.*no such file"):
        inception.load(tmp_path / "nothing.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"sha256 d9298a10…, which is not that of"):
        inception.load(tmp_path / "other.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-eval\.txt"):
        inception.load()
