"""A diffusers folder as it lies on disk: its parts, their sizes, and what is missing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..pretrained.files import open_index, open_safetensors, read_json
from ..pretrained.layout import Tensor, WeightsError
from .errors import PipelineError

INDEX = "model_index.json"
# Of diffusers' models and of transformers', full precision first.
STEMS = ("diffusion_pytorch_model", "model")
LONGEST_HEADER = 10**8  # bytes; the format allows no more
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class PartFiles(NamedTuple):
    """One part with weights: its class, where it lies, its parameters and the bytes they take."""

    class_name: str
    path: Path
    parameters: int
    largest: int
    dtype: str

    def bytes(self, dtype: Any = None) -> int:
        """What the parameters take in a dtype; None is the file's own.

        >>> PartFiles("UNet", Path("unet"), 10, 4, "F16").bytes(jnp.float32)
        40
        """
        size = (
            {"F64": 8, "F32": 4}.get(self.dtype, 2) if dtype is None else jnp.dtype(dtype).itemsize
        )
        return self.parameters * size


class Folder(NamedTuple):
    """What `model_index.json` names: `class_name` is the pipeline's, `parts` are those that have
    a folder, `options` the other entries (`force_zeros_for_empty_prompt`, say)."""

    path: Path
    class_name: str
    parts: dict[str, str]
    options: dict[str, Any]

    def part(self, name: str) -> Path:
        """Where a part lies; whether it does, `open_pipeline_folder` has checked."""
        return self.path / name


def open_pipeline_folder(path: str | Path, needed: Iterable[str] = ()) -> Folder:
    """Reads `model_index.json`, and checks that the parts that it names are there.

    `needed` are parts without which nothing can be done, which must be among those named. Parts
    that nothing here uses (a safety checker, a feature extractor) may be absent.

    **Raises** `PipelineError` that lists all that is missing.

    >>> open_pipeline_folder("/no/such/folder")
    Traceback (most recent call last):
    ...
    eqxldm.pipelines.errors.PipelineError: /no/such/folder: there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "there is no such folder"
        raise PipelineError(f"{path}: {what}.")
    if not (path / INDEX).is_file():
        one_part = " It is one part of a pipeline: name the folder above it." * (
            (path / "config.json").is_file()
        )
        raise PipelineError(f"{path}: no {INDEX}, so it is no diffusers pipeline.{one_part}")
    try:
        index = read_json(path / INDEX)
    except (WeightsError, OSError) as error:
        raise PipelineError(str(error)) from error
    parts, options = {}, {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_"):
            if isinstance(entry[1], str):
                parts[name] = entry[1]
        elif not name.startswith("_"):
            options[name] = entry
    missing = [f"{name} (not named in {INDEX})" for name in needed if name not in parts]
    missing += [f"{name}/" for name in needed if name in parts and not (path / name).is_dir()]
    if missing:
        raise PipelineError(f"{path} is incomplete. Missing: {', '.join(missing)}.")
    return Folder(path, str(index.get("_class_name")), parts, options)


def open_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a part, unread: safetensors in one file or several, `fp16` variants too.

    Full precision comes first where both are there. Pickle files are not read.

    **Raises** `PipelineError` that names the files that are missing or cannot be used.

    >>> from eqxldm.pretrained.files import write_safetensors
    >>> import tempfile
    >>> part = Path(tempfile.mkdtemp())
    >>> write_safetensors(part / "model.safetensors", {"w": np.ones(2)}, {})
    >>> list(open_weights(part))
    ['w']
    """
    try:
        for stem in STEMS:
            for variant in ("", ".fp16"):
                if (file := folder / f"{stem}{variant}.safetensors").is_file():
                    return open_safetensors(file)[0]
                for index in (
                    folder / f"{stem}.safetensors.index{variant}.json",
                    folder / f"{stem}{variant}.safetensors.index.json",
                ):
                    if index.is_file():
                        return open_index(index)
    except (WeightsError, OSError) as error:
        raise PipelineError(str(error)) from error
    pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES)
    if pickles:
        raise PipelineError(
            f"{folder} has its weights as {', '.join(pickles)} only: pickle, which can run code "
            "when it is read. Fetch the .safetensors, or write them with diffusers: "
            "pipe.save_pretrained(folder, safe_serialization=True)."
        )
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    found = f"; found {', '.join(shards)} and no index" if shards else ""
    raise PipelineError(
        f"{folder} holds no weights: looked for {STEMS[0]}.safetensors or {STEMS[1]}.safetensors, "
        f"and the same in several files with an index.json{found}."
    )


def describe_part(folder: Path, class_name: str) -> PartFiles:
    """A part's size, from its files' headers alone.

    **Raises** `PipelineError` as `open_weights`, and without a `config.json`.
    """
    if not (folder / "config.json").is_file():
        raise PipelineError(f"{folder} is incomplete. Missing: config.json.")
    tensors = open_weights(folder)
    sizes = [int(np.prod(t.shape)) for t in tensors.values() if t.floating] or [0]
    return PartFiles(class_name, folder, sum(sizes), max(sizes), _dtype(folder))


def _dtype(folder: Path) -> str:
    """The dtype of most tensors, as safetensors' header names it."""
    files = sorted(folder.glob("*.safetensors"), key=lambda f: (".fp16." in f.name, f.name))
    try:
        with files[0].open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), LONGEST_HEADER)
            header = json.loads(file.read(length))
        dtypes = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{files[0]} is truncated or not a safetensors file.") from error
    return max(set(dtypes), key=dtypes.count) if dtypes else "F32"
