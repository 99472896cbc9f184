"""Images for the smoke run: coloured shapes, drawn and not fetched."""

import numpy as np
from jaxtyping import UInt8

from eqxldm.data import ImageArrays, ImageSource

SHAPES = ("circle", "cross", "square", "triangle")
SIDE, EACH = 40, 100


def shapes() -> ImageSource:
    """A hundred of each shape, on a dark ground, always the same."""
    rng = np.random.default_rng(0)
    images = np.stack([_shape(name, rng) for name in SHAPES for _ in range(EACH)])
    labels = np.repeat(np.arange(len(SHAPES)), EACH)
    captions = [f"a {SHAPES[label]}" for label in labels]
    return ImageArrays(images, labels, class_names=SHAPES, captions=captions, name="shapes")


def _shape(name: str, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    radius = rng.uniform(0.26, 0.36) * SIDE
    x0, y0 = rng.uniform(0.44, 0.56, 2) * SIDE
    x, y = (x - x0) / radius, (y - y0) / radius
    inside = {
        "circle": x * x + y * y < 1,
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
        "square": np.ones_like(x, bool),
        "triangle": abs(x) < (y + 1) / 2,
    }[name] & (np.maximum(abs(x), abs(y)) < 1)
    light = rng.permutation(np.array([255, rng.integers(40, 160), 40]))
    dark = rng.integers(0, 40, 3)
    return np.where(inside[..., None], light, dark).astype(np.uint8)
