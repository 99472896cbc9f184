"""Makes the diagrams of the page on video: no training.

.venv/bin/python docs/make_video_pictures.py  # docs/images/video-{patches,causal,clock,seconds}.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

import eqxldm as ex
from eqxldm.data import MovingDigits, open_mnist
from eqxldm.models import CausalVideoAutoencoder
from experiments.video.config import DiffusionOptions

IMAGES = Path(__file__).parent / "images"
INK, FIRST, LATER = "#7d8590", "#d98a3d", "#6690ea"  # read on white and on black
FRAMES, LATENT = 17, 5


def patches() -> None:
    """A clip's frames, four to a latent frame; the boxes that are tokens, and the sequence."""
    source = open_mnist("mnist", split="test")
    assert source.labels is not None
    clip = MovingDigits(source.images[..., 0], source.labels, 30).clip(8).frames[..., 0]
    rows, columns = (8 // side for side in DiffusionOptions().patch_size[1:])
    figure, axis = plt.subplots(figsize=(9, 3.4))
    gap, lift, row, column, strip = 1.75, 0.11, rows // 2, columns // 4, (0.0, 8.6)
    chosen = (0, 2, 4)  # latent frames of which a token is shown
    for k in range(LATENT):
        x = k * gap
        group = clip[:1] if k == 0 else clip[4 * k - 3 : 4 * k + 1]
        for f in reversed(range(len(group))):  # the first in front
            left, low = x + lift * f, lift * f
            place = (left, left + 1, low, low + 1)
            axis.imshow(group[f], cmap="gray", extent=place, zorder=10 - f, aspect="auto")
            axis.add_patch(Rectangle((left, low), 1, 1, fc="none", ec=INK, lw=0.7, zorder=10 - f))
            if k in chosen:
                corner = left + column / columns, low + 1 - (row + 1) / rows
                box = Rectangle(corner, 1 / columns, 1 / rows, color=FIRST, zorder=10 - f)
                box.set(alpha=0.75, lw=0)
                axis.add_patch(box)
        for i in range(1, rows):
            axis.plot((x, x + 1), (i / rows,) * 2, color=INK, lw=0.4, zorder=10)
        for j in range(1, columns):
            axis.plot((x + j / columns,) * 2, (0, 1), color=INK, lw=0.4, zorder=10)
        name = "frame 0" if k == 0 else f"frames {4 * k - 3} to {4 * k}"
        axis.text(x + 0.5, 1.5, name, ha="center", color=INK, fontsize=9)
    count = LATENT * rows * columns
    width = (strip[1] - strip[0]) / count
    for n in range(count):
        k, i, j = n // (rows * columns), n // columns % rows, n % columns
        told = k in chosen and (i, j) == (row, column)
        at = strip[0] + n * width
        colour = FIRST if told else LATER
        axis.add_patch(
            Rectangle((at, -0.95), 0.8 * width, 0.2, color=colour, alpha=1 if told else 0.55, lw=0)
        )
        if told:
            start = k * gap + (column + 0.5) / columns, 1 - (row + 1) / rows
            axis.plot(
                *zip(start, (at + 0.4 * width, -0.72), strict=True), color=FIRST, lw=1.2, zorder=11
            )
            label = f"({k}, {i}, {j})"
            axis.text(at, -1.2, label, ha="center", color=INK, fontsize=9)
    axis.set(xlim=(-0.1, 8.7), ylim=(-1.35, 1.75))
    axis.axis("off")
    _save(figure, "video-patches.png")


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


def seconds() -> None:
    """A clip's frames, when the tokens of both towers are, and the spectrogram, over one axis."""
    from eqxldm.audio import MelSpectrogram, Tones

    source = open_mnist("mnist", split="test")
    assert source.labels is not None
    digits, mel, fps = source.images[..., 0], MelSpectrogram(), 8.0
    clip = (made := MovingDigits(digits, source.labels, 30, count=1, tones=Tones())).clip(4)
    y = mel(made.wave(clip))
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9, 3.4), sharex=True, height_ratios=(1, 1.1, 1.6)
    )
    row = clip.frames[..., 0].transpose(1, 0, 2).reshape(64, -1)
    top.imshow(row, cmap="gray", extent=(0, FRAMES / fps, 0, 1), aspect="auto")
    for f in range(1, FRAMES):
        top.axvline(f / fps, color=INK, lw=0.6)
    # Where the towers' tokens are, as the network is told: see `make_towers` of the job.
    frames = np.array([0.0, *(4 * np.arange(1, LATENT) - 1.5)]) / fps
    steps = (np.arange(2 * FRAMES) + 0.5) / (2 * fps)
    for k, x in enumerate(frames):
        for j in range(16):
            at = x + 0.012 * (j % 4 - 1.5), 1 + 0.09 * (j // 4)
            middle.plot(*at, ".", ms=3.5, color=FIRST, clip_on=False)
        low = 0 if k == 0 else (4 * k - 3) / fps
        high = (4 * k + 1) / fps
        middle.plot(
            (low + 0.006, high - 0.006),
            (0.9, 0.9),
            color=FIRST,
            lw=2,
            solid_capstyle="butt",
            alpha=0.5,
        )
    middle.plot(steps, np.full(len(steps), 0.45), "|", ms=11, mew=2, color=LATER)
    middle.text(FRAMES / fps + 0.02, 1.1, "video", color=FIRST, va="center", fontsize=9)
    middle.text(FRAMES / fps + 0.02, 0.45, "sound", color=LATER, va="center", fontsize=9)
    middle.set(ylim=(0.1, 1.5))
    bottom.imshow(y.T, cmap="magma", origin="lower", extent=(0, FRAMES / fps, 0, 40), aspect="auto")
    for axis in (top, middle, bottom):
        for frame, _ in clip.bounces:
            axis.axvline(frame / fps, color=INK, lw=1, ls="--")
        axis.set(yticks=[])
        axis.tick_params(colors=INK)
        for spine in axis.spines.values():
            spine.set_visible(False)
    bottom.set(xlabel="seconds", ylabel="pitch", xlim=(0, FRAMES / fps))
    bottom.xaxis.label.set_color(INK)
    bottom.yaxis.label.set_color(INK)
    _save(figure, "video-seconds.png")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110, transparent=True)
    plt.close(figure)


if __name__ == "__main__":
    patches()
    causal()
    clock()
    seconds()
