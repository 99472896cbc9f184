"""FID's Inception: the published file, its names and where they are put."""

import hashlib
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from ..models import Inception
from .files import open_safetensors
from .layout import Layout, Part, WeightsError, fill, own_layout
from .parts import Leaves, linear
from .torch_files import open_torch

NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
CHECKSUM = "6726825d"  # how the SHA-256 of the published file begins, as its name says
# Our names of what a batch norm holds, and theirs.
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def load_inception(path: str | Path) -> Inception:
    """FID's Inception from the published PyTorch file, or from ours.

    `path` is `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, the same file under
    torch-fidelity's name, or what `pretrained.save` wrote of it. PyTorch is not needed, and no code
    in the file is run. Its checksum is compared: a FID by other weights is another number.

    Every tensor is used once and every parameter is filled once, 472 of each.

    **Raises** `FileNotFoundError` that says where to fetch it; `WeightsError` for another file.

    >>> load_inception("weights/inception.pth")
    Traceback (most recent call last):
    ...
    FileNotFoundError: Inception: there is no file weights/inception.pth. Fetch
      https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
    and give its path.
    """
    return read_inception(path, eqx.filter_eval_shape(Inception, key=jax.random.key(0)), CHECKSUM)


def read_inception(path: str | Path, like: Inception, checksum: str | None = None) -> Inception:
    """The same for a network of any size, with the checksum's beginning or without one.

    **Raises** as `load_inception`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Inception: there is no file {path}. Fetch\n  {URL}\nand give its path."
        )
    if path.suffix == ".safetensors":
        return fill(like, own_layout(like), open_safetensors(path)[0], source=str(path))
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if checksum is not None and not found.startswith(checksum):
        raise WeightsError(
            f"{path} is not the published file: its sha256 is {found}, that of the published one "
            f"begins with {checksum}. Fetch it again from {URL}"
        )
    return fill(like, published_layout(like), open_torch(path), source=str(path))


def published_layout(network: Inception) -> Layout:
    """The names of pytorch-fid's and torch-fidelity's file.

    >>> network = eqx.filter_eval_shape(Inception, key=jax.random.key(0))
    >>> layout = published_layout(network)
    >>> len(layout.names()), layout.names()[0]
    (472, 'Conv2d_1a_3x3.conv.weight')
    """
    leaves: Leaves = {}
    for name in network.units:
        ours = f".units['{name}']"
        leaves[f"{ours}.weight"] = (Part(f"{name}.conv.weight", (), _to_hwio, _to_oihw),)
        for kind, theirs in NORM.items():
            leaves[f"{ours}.{kind}"] = (Part(f"{name}.bn.{theirs}"),)
    leaves |= linear("fc", "fc")
    return Layout(leaves, {})


def _to_hwio(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0)


def _to_oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)
