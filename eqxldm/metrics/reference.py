"""Reference files as ADM's evaluator has them: the moments of a data set's features in an npz."""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

# Of ADM's files; the second pair is of the spatial features, of sFID.
NAMES = (("mu", "sigma"), ("mu_s", "sigma_s"))
MOST_BYTES = 2**30  # of an array: a covariance of 11,000 features


class Gaussian(NamedTuple):
    """A mean and an unbiased covariance."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


class Reference(NamedTuple):
    """What a reference file says: Gaussians of the pooled and the spatial features, where it does.

    `has_images`: whether it has images beside them, `arr_0`. In ADM's files these are 10,000 of the
    whole set that the moments are of: the distance between the two is not 0.
    """

    pooled: Gaussian | None
    spatial: Gaussian | None
    has_images: bool


def read_reference(path: str | Path) -> Reference:
    """The moments in a file of ADM's form, `mu`, `sigma`, `mu_s`, `sigma_s`; pytorch-fid's, too.

    Nothing is unpickled, and images are left where they are.

    **Raises** `OSError` for what cannot be read; `ValueError` for a file that is no
    npz, or whose moments do not fit each other.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ref.npz"
    >>> write_reference(path, Gaussian(np.zeros(2), np.eye(2)))
    >>> read_reference(path).pooled.covariance.shape, read_reference(path).spatial
    ((2, 2), None)
    """
    with Path(path).open("rb") as opened:
        try:
            names, found = _read(opened)
        except Exception as error:  # zipfile, zlib and NumPy have many ways to fail
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} is no npz of arrays, or a damaged one: {reason}") from error
    pooled, spatial = (_gaussian(path, found, *pair) for pair in NAMES)
    return Reference(pooled, spatial, "arr_0" in names)


def _read(opened: BinaryIO) -> tuple[set[str], dict[str, np.ndarray]]:
    with np.load(opened, allow_pickle=False) as file:
        names = set(file.files)
        wanted = [name for pair in NAMES for name in pair if name in names]
        for name in wanted:
            if file.zip.getinfo(f"{name}.npy").file_size > MOST_BYTES:
                raise ValueError(f"{name} has more than {MOST_BYTES} bytes")
        return names, {name: file[name] for name in wanted}


def write_reference(path: str | Path, pooled: Gaussian, spatial: Gaussian | None = None) -> None:
    """Writes the moments as ADM's evaluator reads them.

    >>> import tempfile
    >>> write_reference(Path(tempfile.mkdtemp()) / "ref.npz", Gaussian(np.zeros(2), np.eye(2)))
    """
    arrays: dict[str, np.ndarray] = {}
    for pair, gaussian in zip(NAMES, (pooled, spatial), strict=True):
        arrays |= {} if gaussian is None else dict(zip(pair, gaussian, strict=True))
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _gaussian(
    path: str | Path, found: Mapping[str, np.ndarray], mu: str, sigma: str
) -> Gaussian | None:
    if mu not in found and sigma not in found:
        return None
    mean, covariance = found.get(mu), found.get(sigma)
    if (
        mean is None
        or covariance is None
        or mean.ndim != 1
        or covariance.shape != (len(mean), len(mean))
    ):
        shapes = ", ".join(f"{k} {found[k].shape}" for k in (mu, sigma) if k in found)
        raise ValueError(f"{path}: need {mu} (d,) and {sigma} (d, d), got {shapes}.")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{path}: {mu} and {sigma} must be floats.")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
