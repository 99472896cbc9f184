"""Pictures: grids of images and curves of losses."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from eqxldm.durable import replacing

# What Pillow raises for too many pixels or channels that a format does not have.
FORMAT_ERRORS = (OSError, ValueError, SystemError, OverflowError, MemoryError)


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int, *, gap: int = 2, scale: int = 2
) -> UInt8[np.ndarray, "H W c"]:
    """Images row by row on a grey ground, each enlarged `scale` times."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 96, np.uint8)
    for k, image in enumerate(images):
        i, j = gap + k // columns * (h + gap), gap + k % columns * (w + gap)
        grid[i : i + h, j : j + w] = image
    return grid.repeat(scale, 0).repeat(scale, 1)


def save_png(path: Path, image: UInt8[np.ndarray, "H W c"]) -> None:
    with replacing(path) as temporary:
        _picture(image).save(temporary)


def check_format(ending: str, image: UInt8[np.ndarray, "H W c"]) -> None:
    """Raises one of `FORMAT_ERRORS` where such an image is none of this file ending's format."""
    from PIL import Image

    Image.init()
    _picture(image).save(io.BytesIO(), Image.EXTENSION[ending])


def _picture(image: UInt8[np.ndarray, "H W c"]) -> Any:
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def read_png(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _number(value: Any) -> bool:
    """Whether a log's value can be drawn: a number, not 0, which a logarithm would not show."""
    return isinstance(value, int | float) and 0 < abs(value) < 1e300


def save_curves(path: Path, entries: list[dict[str, Any]], stages: dict[str, list[str]]) -> None:
    """One panel a stage: its named losses over the steps, from the log's entries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.2), squeeze=False)
    for axis, (stage, names) in zip(axes[0], stages.items(), strict=True):
        rows = [e for e in entries if e.get("stage") == stage and _number(e.get("step"))]
        for name in names:
            points = [(e["step"], e[name]) for e in rows if _number(e.get(name))]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        values = [e[n] for e in rows for n in names if _number(e.get(n))]
        if values and min(values) > 0 and max(values) / min(values) > 20:
            axis.set_yscale("log")
        if rows:
            axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
