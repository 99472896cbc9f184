"""LPIPS: the published weights, their names and where they are put."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np

from ..models import LPIPS
from .files import open_pt, open_safetensors
from .layout import Layout, Part, Tensor, WeightsError, fill, own_layout
from .parts import Leaves, conv

OURS = "lpips_vgg.safetensors"


class PublishedFile(NamedTuple):
    """A file that is fetched by hand: its name, where it is, and how its checksum begins."""

    name: str
    url: str
    algorithm: str
    checksum: str


VGG16 = PublishedFile(
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "sha256",
    "397923af",
)
HEADS = PublishedFile(
    "vgg.pth",
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    "md5",
    "d507d7349b931f0638a25a48a722f98a",
)
# VGG16's classes, of which LPIPS has no need.
UNUSED = frozenset(f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias"))


def load_lpips(folder: str | Path) -> LPIPS:
    """LPIPS with the published weights, from files in a folder.

    Either our own `lpips_vgg.safetensors`, or the two published files: torchvision's VGG16,
    `vgg16-397923af.pth`, and the heads, `vgg.pth` of LPIPS 0.1. Their checksums are compared.
    Reading these needs torch, by its weights-only reader; write ours once and it does not any more:

        lpips = pretrained.load_lpips(folder)
        pretrained.save(lpips, folder / "lpips_vgg.safetensors")

    Every tensor is used once and every parameter is filled once, VGG16's `classifier` left out.

    **Raises** `FileNotFoundError` that says what to put where; `WeightsError` for a file with
    another checksum, and for tensors that are missing, unexpected or of a wrong shape.

    >>> import tempfile
    >>> load_lpips(tempfile.mkdtemp())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    FileNotFoundError: LPIPS: its weights are not in ...
    """
    return _load(Path(folder), eqx.filter_eval_shape(LPIPS, key=jax.random.key(0)), VGG16, HEADS)


def published_layout(lpips: LPIPS) -> Layout:
    """The names of the published files: VGG16's features and LPIPS's heads.

    >>> lpips = LPIPS(channels=(2, 2, 2, 2, 2), key=jax.random.key(0))
    >>> [part.name for parts in published_layout(lpips).leaves.values() for part in parts][4:6]
    ['features.5.weight', 'features.5.bias']
    """
    leaves: Leaves = {}
    position = 0
    for i, block in enumerate(lpips.blocks):
        for j in range(len(block)):
            leaves |= conv(f"blocks[{i}][{j}]", f"features.{position}")
            position += 2  # a ReLU follows
        position += 1  # a pooling
    for i in range(len(lpips.heads)):
        leaves[f".heads[{i}]"] = (Part(f"lin{i}.model.1.weight", (), np.ravel, _to_1c11),)
    return Layout(leaves, {})


def _load(folder: Path, like: LPIPS, vgg16: PublishedFile, heads: PublishedFile) -> LPIPS:
    if (folder / OURS).exists():
        tensors = open_safetensors(folder / OURS)[0]
        return fill(like, own_layout(like), tensors, source=str(folder / OURS))
    if absent := [file for file in (vgg16, heads) if not (folder / file.name).exists()]:
        lines = "\n".join(f"  {file.url}\n    as {folder / file.name}" for file in absent)
        raise FileNotFoundError(
            f"LPIPS: its weights are not in {folder}. Fetch\n{lines}\n"
            f"or put there {OURS}, written by pretrained.save from an LPIPS that was loaded "
            "elsewhere."
        )
    for file in (vgg16, heads):
        _check(folder / file.name, file)
    tensors = _used(open_pt(folder / vgg16.name)) | open_pt(folder / heads.name)
    source = f"{folder}: {vgg16.name} with {heads.name}"
    return fill(like, published_layout(like), tensors, source=source)


def _check(path: Path, file: PublishedFile) -> None:
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, file.algorithm).hexdigest()
    if not found.startswith(file.checksum):
        raise WeightsError(
            f"{path} is not the published file: its {file.algorithm} is {found}, that of the "
            f"published one begins with {file.checksum}. Fetch it again from {file.url}"
        )


def _used(vgg16: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vgg16.items() if name not in UNUSED}


def _to_1c11(head: np.ndarray) -> np.ndarray:
    return head.reshape(1, -1, 1, 1)
