"""Reading and writing files of tensors: safetensors, sharded or not, and PyTorch's `.pt`.

Opening reads headers only; each tensor is read when it is asked for.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from ..durable import read_file, replacing
from .layout import Tensor, WeightsError

# How the names of weights begin in the folders of diffusers, and of transformers.
WEIGHTS, TRANSFORMERS = "diffusion_pytorch_model", "model"
SEAL = "sha256"  # in the header of our files: of the tensors and of the other strings
DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split())


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file, unread, and the strings of its header.

    **Raises** `FileNotFoundError`; `WeightsError` if the file is truncated or no safetensors.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_safetensors(path, {"w": np.ones((2, 3))}, {"note": "ones"})
    >>> tensors, header = open_safetensors(path)
    >>> tensors["w"].shape, tensors["w"].read().sum().item(), header
    ((2, 3), 6.0, {'note': 'ones'})
    """
    import safetensors

    _must_exist(path)
    try:
        file = safetensors.safe_open(path, framework="np")
        # Only the names and shapes; the values stay on disk.
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        _check_dtypes(path, dtypes)
        tensors = {name: _tensor(file, name) for name in dtypes}
        return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is truncated or not a safetensors file ({_reason(path, error)}); "
            "fetch or write it again."
        ) from error


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    header: Mapping[str, str],
    *,
    sealed: bool = False,
) -> None:
    """Writes one safetensors file; a write that is killed leaves what was there before.

    `sealed` adds a checksum of the tensors and of the other strings to the header, for
    `check_seal`.

    >>> import tempfile
    >>> write_safetensors(Path(tempfile.mkdtemp()) / "a.safetensors", {"w": np.ones(2)}, {})
    """
    from safetensors.numpy import save

    content = save(dict(tensors), metadata=dict(header))
    size = 8 + int.from_bytes(content[:8], "little")
    start, data = content[:size], memoryview(content)[size:]
    strings = dict(header)
    if sealed:
        sha = _seal(header)
        sha.update(data)
        strings[SEAL] = sha.hexdigest()
    if len(strings) > 1 or sealed:  # safetensors has them in another order in each process
        described = json.loads(start[8:]) | {"__metadata__": dict(sorted(strings.items()))}
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(start)
        file.write(data)


def check_seal(path: Path, header: Mapping[str, str]) -> None:
    """Compares a file with the checksum in its header, if it has one.

    **Raises** `WeightsError` if the file is not what was written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_safetensors(path, {"w": np.ones(2)}, {}, sealed=True)
    >>> check_seal(path, open_safetensors(path)[1])
    """
    if SEAL not in header:
        return
    sha = _seal({name: text for name, text in header.items() if name != SEAL})
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while part := file.read(2**24):
            sha.update(part)
    if sha.hexdigest() != header[SEAL]:
        raise WeightsError(
            f"{path} is damaged: not what was written. Restore it, or write it again."
        )


def _seal(header: Mapping[str, str]) -> Any:
    return hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())


def open_folder(folder: Path, stem: str = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of a diffusers folder: one safetensors file, several with an index, or `.bin`.

    Where a folder holds several forms, the first of these counts: full precision, sharded, fp16,
    fp16 sharded, `.bin`. `stem` is what their names begin with; that of transformers is `model`,
    whose folders are read from safetensors only.

    **Raises** `WeightsError` if there is none, if a file that the index names is missing, or if
    index and files disagree.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_safetensors(folder / "diffusion_pytorch_model.safetensors", {"w": np.ones(2)}, {})
    >>> list(open_folder(folder))
    ['w']
    """
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        f"{stem}.safetensors": lambda path: open_safetensors(path)[0],
        f"{stem}.safetensors.index.json": open_index,
        f"{stem}.fp16.safetensors": lambda path: open_safetensors(path)[0],
        f"{stem}.safetensors.index.fp16.json": open_index,
    }
    if stem == WEIGHTS:
        readers[f"{WEIGHTS}.bin"] = open_pt
    for name, reader in readers.items():
        if (folder / name).exists():
            return reader(folder / name)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    hint = (
        f" {', '.join(pickled)} can hold code and is not read: take the safetensors file, or write "
        "one with save_pretrained of transformers."
    )
    raise WeightsError(
        f"{folder} holds no weights; looked for {', '.join(readers)}.{hint if pickled else ''}"
    )


def open_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all the files that a `*.safetensors.index.json` names.

    **Raises** `WeightsError` that lists all the missing files, or all tensors that are not where
    the index says.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_safetensors(folder / "1.safetensors", {"w": np.ones(2)}, {})
    >>> _ = (folder / "index.json").write_text('{"weight_map": {"w": "1.safetensors"}}')
    >>> list(open_index(folder / "index.json"))
    ['w']
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict):
        raise WeightsError(f"{path} has no weight_map.")
    # A name with a folder in it could point anywhere.
    if odd := [s for s in index.values() if not isinstance(s, str) or Path(s).name != s]:
        raise WeightsError(f"{path} names files outside its folder: {str(odd)[:200]}.")
    shards = sorted(set(index.values()))
    if absent := [shard for shard in shards if not os.path.isfile(path.parent / shard)]:
        raise WeightsError(f"{path} names files that are not there: {', '.join(absent)[:200]}.")
    tensors, problems = {}, []
    for shard in shards:
        held = open_safetensors(path.parent / shard)[0]
        named = {name for name, where in index.items() if where == shard}
        problems += [f"{name} is not in {shard}" for name in sorted(named - held.keys())]
        problems += [f"{name} is in {shard} unnamed" for name in sorted(held.keys() - named)]
        tensors |= held
    if problems:
        raise WeightsError(f"{path} and its files disagree:\n  " + "\n  ".join(problems))
    return tensors


def open_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, by torch's weights-only reader: no code in it is run.

    Takes a plain state dict, or a training checkpoint with one under `ema` (preferred, as the
    official code does), `model` or `state_dict`.

    **Raises** `WeightsError` if torch is not installed, and for a file that holds anything else.
    """
    _must_exist(path)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"{path} is a PyTorch file, and torch is not installed. Run `pip install torch`, or "
            "where torch is, write it as safetensors with safetensors.torch.save_file."
        ) from error
    try:
        # The official training checkpoints hold their options, which become plain attributes.
        options = (SimpleNamespace, "argparse.Namespace")
        with torch.serialization.safe_globals([options]):
            mapped = zipfile.is_zipfile(path)  # not so before torch 1.6
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle, zipfile and torch raise their own kinds
        raise WeightsError(
            f"{path} is truncated, or holds something else than tensors; none of it was run."
        ) from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise WeightsError(f"{path} holds no state dict: a dict of tensors, or one under `ema`.")
    return {
        name: Tensor(tuple(t.shape), t.is_floating_point(), lambda t=t: _torch_to_numpy(t))
        for name, t in content.items()
    }


def from_arrays(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """A dict of arrays as tensors of a file.

    >>> from_arrays({"w": np.ones(2)})["w"].shape
    (2,)
    """

    def tensor(array: Any) -> Tensor:
        kept = np.asarray(array)
        return Tensor(kept.shape, _floating(kept.dtype), lambda: kept)

    return {name: tensor(array) for name, array in arrays.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `WeightsError` if the file holds anything else.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "config.json"
    >>> _ = path.write_text('{"a": 1}')
    >>> read_json(path)
    {'a': 1}
    """
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object.")
    return content


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    """Refuses floats of 8 and fewer bits, which mean nothing without the scales of their kind."""
    if small := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES]:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        raise WeightsError(
            f"{path} has tensors of dtypes that are not read: {', '.join(small[:5])}{more}. Take "
            "the file in float32, bfloat16 or float16."
        )


def _tensor(file: Any, name: str) -> Tensor:
    info = file.get_slice(name)
    floating = info.get_dtype().startswith(("F", "BF"))
    return Tensor(tuple(info.get_shape()), floating, lambda: file.get_tensor(name))


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy: the same bits, named by ml_dtypes
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _floating(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer, without the data"
    return str(error)
