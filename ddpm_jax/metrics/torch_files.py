"""Reads tensors from PyTorch's files, without PyTorch, and without running pickled code.

It reads TorchScript archives, torch.save's zip files, and its streams before version 1.6. Only
tensors, containers and empty modules are unpickled; other files are refused.
"""

import collections
import pickle
import zipfile

import numpy as np

from ddpm_jax.errors import UserError, one_line

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}
# Errors of unpickling for a damaged file, or another kind of file.
DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Module:
    """Stands for a pickled module; has only its state."""

    def __setstate__(self, state):
        """Stores the pickled state."""
        self.state = state


class Storage(collections.namedtuple("Storage", "dtype key size")):
    """The memory of a tensor: its key in the file, and its size in elements."""


class _Tensor(collections.namedtuple("_Tensor", "storage offset shape strides")):
    """A view of a storage, strides in elements."""


def read(path):
    """Reads every tensor of a file.

    Args:
      path: the file.

    Returns:
      {"module.name": numpy array}, in the order of the file.

    Raises:
      UserError: if it is another kind of file, is damaged, or has other objects than tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            tree, arrays = _read_zip(path)
        else:
            tree, arrays = _read_stream(path)
        return dict(_flatten(tree, arrays))
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be read as tensors ({one_line(error)})") from None


class _Unpickler(pickle.Unpickler):
    """Unpickles only tensors and their containers."""

    def find_class(self, module, name):
        if module.startswith("torch") and name in DTYPES:
            return name
        allowed = {
            ("torch._utils", "_rebuild_tensor"): _rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.jit._pickle", "build_intlist"): list,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module.startswith("__torch__."):  # a class compiled by TorchScript
            return Module
        raise pickle.UnpicklingError(f"has a {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"has a {kind}")
        return Storage(DTYPES[dtype], key, size)


def _rebuild(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, shape, strides)


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = index.removesuffix("data.pkl")
        with archive.open(index) as file:
            tree = _Unpickler(file).load()
        prefix = f"{root}data/"
        arrays = {
            name.removeprefix(prefix): archive.read(name)
            for name in archive.namelist()
            if name.startswith(prefix)
        }
    return tree, arrays


def _read_stream(path):
    """Reads pickles of magic, version, system, object and keys; then the storages in this order."""
    with open(path, "rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise pickle.UnpicklingError("not a file of torch.save")
        _Unpickler(file).load(), _Unpickler(file).load()
        sizes = {}

        class Unpickler(_Unpickler):
            def persistent_load(self, pid):
                storage = super().persistent_load(pid)
                sizes[storage.key] = storage.dtype.itemsize
                return storage

        tree = Unpickler(file).load()
        arrays = {}
        for key in _Unpickler(file).load():
            count = int.from_bytes(file.read(8), "little")
            arrays[key] = file.read(count * sizes[key])
    return tree, arrays


def _flatten(tree, arrays, prefix=""):
    """Yields (name, array) of a tree of dicts and modules."""
    if isinstance(tree, Module):
        tree = tree.state
    if isinstance(tree, _Tensor):
        yield prefix.rstrip("."), _array(tree, arrays)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flatten(value, arrays, f"{prefix}{name}.")


def _array(tensor, arrays):
    storage = tensor.storage
    values = np.frombuffer(arrays[storage.key], storage.dtype)
    last = tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
    )
    if last >= len(values) or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        raise ValueError(f"a tensor reaches beyond its storage {storage.key}")
    strides = [storage.dtype.itemsize * stride for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
    return view.copy()
