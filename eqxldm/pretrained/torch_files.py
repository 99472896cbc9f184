"""PyTorch's files and pickles of NumPy arrays, read without either and without running them."""

import math
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .layout import Tensor, WeightsError
from .pickle_data import Call, Global, Persistent, read_pickle

# The storages of PyTorch, by their class, with what NumPy calls them.
STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # of files of before torch 1.6
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")


class _View(NamedTuple):
    """Where the numbers of a tensor are: the storage's key and dtype, and which part of it."""

    key: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote, new files and those before torch 1.6.

    PyTorch is not needed, and nothing in the file is run: `read_pickle` follows its instructions
    as data, and of what they would call only the making of a tensor is understood. Of a training
    checkpoint the tensors under `ema`, `model` or `state_dict` are taken, in this order.

    **Raises** `FileNotFoundError`; `WeightsError` for a file that is damaged, or holds anything
    else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")
    try:
        opened = _open_zip(path) if zipfile.is_zipfile(path) else _open_old(path)
    except WeightsError:
        raise
    except Exception as error:  # zipfile raises many kinds
        raise WeightsError(f"{path} is truncated or no PyTorch file: {error}.") from error
    content, read = opened
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no state dict: a dict of tensors, or one under `ema`.")
    views = {str(name): _view(value, f"{path}: {name}") for name, value in content.items()}
    return {name: _tensor(view, read) for name, view in views.items()}


def open_arrays(path: str | Path, separator: str = "/") -> dict[str, Tensor]:
    """The arrays of a pickle of nested dicts of NumPy arrays, by their paths; nothing is run.

    **Raises** `FileNotFoundError`; `WeightsError` for anything else than such arrays.

    >>> import pickle, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.ckpt"
    >>> _ = path.write_bytes(pickle.dumps({"a": {"b": np.arange(3.0)}}))
    >>> {name: tensor.read().tolist() for name, tensor in open_arrays(path).items()}
    {'a/b': [0.0, 1.0, 2.0]}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}{separator}{key}" if name else str(key))
        else:
            array = _array(value, f"{path}: {name}")
            floating = _is_floating(array.dtype)
            found[name] = Tensor(array.shape, floating, lambda: array)

    try:
        walk(read_pickle(path.read_bytes(), str(path)), "")
    except RecursionError as error:
        raise WeightsError(f"{path} is nested too deeply.") from error
    return found


def _open_zip(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        records = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(records) != 1:
            raise WeightsError(f"{path} is a zip without one data.pkl: no PyTorch file.")
        prefix = records[0].removesuffix("data.pkl")
        order = prefix + "byteorder"
        if order in names and file.read(order).strip() != sys.byteorder.encode():
            raise WeightsError(f"{path} was written on a machine of another byte order.")
        content = read_pickle(file.read(records[0]), str(path))

    def read(key: str) -> bytes:
        with zipfile.ZipFile(path) as again:
            return again.read(f"{prefix}data/{key}")

    return content, read


def _open_old(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """Four pickles and a fifth with the order of the storages, which come then."""
    with path.open("rb") as file:
        magic = read_pickle(file, str(path))
        if magic != OLD_MAGIC:
            raise WeightsError(f"{path} is no PyTorch file.")
        _version, about, content, keys = (read_pickle(file, str(path)) for _ in range(4))
        if not (isinstance(about, dict) and about.get("little_endian", True)):
            raise WeightsError(f"{path} was written on a machine of another byte order.")
        start = file.tell()
    sizes = {view.key: np.dtype(view.dtype).itemsize for view in _views(content)}
    places, length = {}, path.stat().st_size
    for key in keys if isinstance(keys, list) else []:
        with path.open("rb") as file:
            file.seek(start)
            count = int.from_bytes(file.read(8), "little")
        # A storage that no tensor of the state dict uses cannot be measured.
        if key not in sizes or start + 8 + count * sizes[key] > length:
            raise WeightsError(f"{path} is truncated, or has numbers that no tensor uses.")
        places[key] = (start + 8, count * sizes[key])
        start += 8 + count * sizes[key]

    def read(key: str) -> bytes:
        at, size = places[key]
        with path.open("rb") as file:
            file.seek(at)
            return file.read(size)

    return content, read


def _views(content: Any) -> list[_View]:
    values = content.values() if isinstance(content, dict) else []
    inner = [v for value in values if isinstance(value, dict) for v in _views(value)]
    return inner + [_view(v, "") for v in values if isinstance(v, Call)]


def _view(value: Any, where: str) -> _View:
    """A tensor's place, from the call that would make it."""
    if isinstance(value, Call) and value.function == _PARAMETER and value.arguments:
        value = value.arguments[0]
    try:
        assert isinstance(value, Call) and value.function == _TENSOR
        (storage, offset, shape, strides), _ = value.arguments[:4], value.arguments[4:]
        assert isinstance(storage, Persistent)
        kind, storage_class, key = storage.about[:3]
        assert kind == "storage" and storage_class.module == "torch"
        dtype = STORAGES[storage_class.name]
        numbers = (offset, *shape, *strides)
        assert all(isinstance(n, int) and n >= 0 for n in numbers) and len(shape) == len(strides)
        return _View(str(key), dtype, offset, tuple(shape), tuple(strides))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        raise WeightsError(
            f"{where} is no tensor of a kind that is read here; nothing of the file was run."
        ) from None


def _tensor(view: _View, read: Callable[[str], bytes]) -> Tensor:
    def values() -> np.ndarray:
        try:
            held = np.frombuffer(read(view.key), view.dtype)
        except Exception as error:  # zipfile and zlib raise their own kinds
            raise WeightsError(f"the storage {view.key} is damaged: {error}.") from error
        steps = zip(view.shape, view.strides, strict=True)
        reach = view.offset + sum((n - 1) * step for n, step in steps)
        if not math.prod(view.shape):
            return np.zeros(view.shape, view.dtype)
        if reach >= len(held):
            raise WeightsError(f"the storage {view.key} has too few numbers.")
        strides = [stride * held.itemsize for stride in view.strides]
        return np.lib.stride_tricks.as_strided(
            held[view.offset :], view.shape, strides, writeable=False
        )

    return Tensor(view.shape, _is_floating(np.dtype(view.dtype)), values)


def _array(value: Any, where: str) -> np.ndarray:
    """A NumPy array from the call that would make it, `_reconstruct`, and its state."""
    try:
        assert isinstance(value, Call) and value.function.name == "_reconstruct"
        assert value.function.module in _ARRAYS
        _, shape, dtype, fortran, content = value.state
        assert isinstance(dtype, Call) and dtype.function == Global("numpy", "dtype")
        assert isinstance(content, bytes) and dtype.state[1] in ("<", "|")
        kind = np.dtype(dtype.state[1] + dtype.arguments[0])
        assert kind.kind in "fiub"
        return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError):
        raise WeightsError(
            f"{where} is no NumPy array of numbers; nothing of the file was run."
        ) from None


def _is_floating(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
