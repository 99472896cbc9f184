"""Makes the diagrams of the page on video: no training.

.venv/bin/python docs/make_video_pictures.py   # writes docs/images/video-{causal,clock}.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

import eqxldm as ex
from eqxldm.data import MovingDigits
from eqxldm.models import CausalVideoAutoencoder

IMAGES = Path(__file__).parent / "images"
INK, FIRST, LATER = "#7d8590", "#d98a3d", "#6690ea"  # read on white and on black
FRAMES, LATENT = 17, 5


def reach() -> np.ndarray:
    """Which frames `(latent, frame)` change which latent frames: measured, by a gradient."""
    network = CausalVideoAutoencoder(
        1, 2, channels=(4, 4, 4), blocks=1, patch_size=2, time_levels=(True, True),
        attention=False, key=jax.random.key(0),
    )  # fmt: skip
    clip = jax.random.normal(jax.random.key(1), (1, FRAMES, 16, 16))
    rows = jax.jacrev(lambda x: network.encode(x)[0, :, 0, 0])(clip)
    return np.abs(np.asarray(rows)).sum((1, 3, 4)) > 0


def causal() -> None:
    """Frames above, latent frames below, and what each latent frame sees."""
    seen = reach()
    figure, axis = plt.subplots(figsize=(9, 3.2))
    own = lambda f: 0 if f == 0 else 1 + (f - 1) // 4
    for f in range(FRAMES):
        colour = FIRST if f == 0 else LATER
        axis.add_patch(Rectangle((f - 0.42, 2), 0.84, 0.84, color=colour, alpha=0.75, lw=0))
        axis.text(f, 2.42, str(f), ha="center", va="center", fontsize=9)
    for k in range(LATENT):
        x = 0 if k == 0 else 4 * k - 1.5
        width = 0.84 if k == 0 else 3.84
        colour = FIRST if k == 0 else LATER
        axis.add_patch(Rectangle((x - width / 2, 0), width, 0.6, color=colour, alpha=0.75, lw=0))
        axis.text(x, 0.3, f"latent {k}", ha="center", va="center", fontsize=7 if k == 0 else 9)
        for f in np.flatnonzero(seen[k]):
            near = own(f) == k
            axis.plot(
                [float(f), float(x)], [1.95, 0.65], color=INK, lw=1.3 if near else 0.35, zorder=0
            )
    axis.set(xlim=(-0.9, FRAMES - 0.1), ylim=(-0.15, 3.1))
    axis.axis("off")
    _save(figure, "video-causal.png")


def clock() -> None:
    """A digit's place over the frames, and the times at which a shifted grid spends its steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    square = np.full((1, 28, 28), 255, np.uint8)
    clip = MovingDigits(square, np.array([0]), 1, frames=33, count=1, speeds=(3.5, 3.5)).clip(0)
    left.plot(clip.places[:, 0, 0], "o-", ms=3, color=LATER, label="row")
    left.plot(clip.places[:, 0, 1], "o-", ms=3, color=FIRST, label="column")
    for wall in (0, 36):
        left.axhline(wall, color=INK, lw=1, ls=":")
    left.set(xlabel="frame", ylabel="pixels")
    for shift, colour in ((1.0, INK), (2.0, FIRST), (5.0, LATER)):
        times = np.asarray(ex.shifted_times(20, shift))
        right.plot(times, "o-", ms=3, color=colour, label=f"shift {shift:g}")
    right.set(xlabel="step of the solver", ylabel="t")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)
        axis.tick_params(colors=INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        for spine in axis.spines.values():
            spine.set_color(INK)
    _save(figure, "video-clock.png")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110, transparent=True)
    plt.close(figure)


if __name__ == "__main__":
    causal()
    clock()
