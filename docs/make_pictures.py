"""Makes the pictures of the front page, from a distribution whose denoiser is exact: no training.

    .venv/bin/python docs/make_pictures.py      # writes docs/images/{process,solvers}.png

The data are points inside of letters. Each letter's points are the centres of small Gaussians, so
`E[x0 | x_t]` is a mean over the centres, and what a picture shows is the solver's work alone.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

import eqxldm as ex

LINES, SPREAD, POINTS, CENTRES = ("eqx", "ldm"), 0.03, 5000, 1500
IMAGES = Path(__file__).parent / "images"
FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
INK, NOISE = "#7d8590", "#6690ea"  # read on white and on black


def letters(count: int) -> np.ndarray:
    """Points `(count, 2)` inside of the letters, evenly spread, about as large as the noise."""
    write = lambda i, line: TextPath((0, -0.95 * i), line, size=1, prop={"weight": "bold"})
    outline = Outline.make_compound_path(*(write(i, line) for i, line in enumerate(LINES)))
    low, high = outline.get_extents().get_points()
    rng, found = np.random.default_rng(0), np.zeros((0, 2))
    shapes = [Outline(polygon) for polygon in outline.to_polygons()]
    while len(found) < count:
        points = rng.uniform(low, high, (4 * count, 2))
        # Inside of an odd number of outlines: the holes of letters are not.
        inside = np.sum([shape.contains_points(points) for shape in shapes], axis=0) % 2 == 1
        found = np.concatenate([found, points[inside]])[:count]
    middle = (low + high) / 2
    return (found - middle) * (3.4 / (high - low)[0])


def denoiser(centres: np.ndarray):
    """`E[velocity | x_t]` for data `x0 ~ mean of N(centre, SPREAD^2)`."""
    m = jnp.asarray(centres, jnp.float32)

    def exact(x_t, t, cond=None, *, key=None):
        at = FLOW.path.coefficients(t)
        variance = at.alpha**2 * SPREAD**2 + at.sigma**2
        r = jax.nn.softmax(-jnp.sum((x_t - at.alpha * m) ** 2, axis=1) / (2 * variance))
        off = (x_t - at.alpha * (r @ m)) / variance
        x0, eps = r @ m + at.alpha * SPREAD**2 * off, at.sigma * off
        return at.dalpha * x0 + at.dsigma * eps

    return exact


def show(ax, points, title=None, reach=2.7):
    ax.scatter(*np.asarray(points).T, s=1.2, lw=0, alpha=0.8, color=NOISE)
    ax.set(xlim=(-reach, reach), ylim=(-0.78 * reach, 0.78 * reach), aspect="equal")
    ax.axis("off")
    if title:
        ax.set_title(title, fontsize=9, color=INK)


def process(x0, eps, exact):
    """Above from data to noise, below back."""
    shown, steps = (0.0, 0.1, 0.2, 0.35, 0.6, 1.0), 40
    times = ex.uniform_times(steps)
    run = jax.vmap(lambda x: ex.sample_trajectory(exact, FLOW, ex.Heun(), times, x))
    states = jax.jit(run)(eps).states
    fig, axes = plt.subplots(2, len(shown), figsize=(10.5, 3.2))
    for i, t in enumerate(shown):
        show(axes[0, i], FLOW.noise(x0, t, eps), f"t = {t:g}")
        show(axes[1, -1 - i], states[:, round((1 - t) * steps)], f"t = {t:g}")
    for row, text in enumerate(("noising", "sampling")):
        axes[row, 0].text(-3.1, 0, text, rotation=90, va="center", ha="center", color=INK)
    save(fig, "process.png")


def solvers(eps, exact):
    """A row a solver, a column a number of steps."""
    rows = {
        "DDIM": ex.DDIM(),
        "DPM-Solver++": ex.DPMSolverPP2M(),
        "Heun": ex.Heun(),
        "DDPM": ex.DDPM(),
    }
    steps = (4, 8, 16, 32)
    keys = jax.random.split(jax.random.key(2), len(eps))
    fig, axes = plt.subplots(len(rows), len(steps), figsize=(8.4, 6.4))
    for i, (name, solver) in enumerate(rows.items()):
        for j, n in enumerate(steps):
            times = ex.uniform_times(n)
            draw = lambda x, k, solver=solver, times=times: ex.sample(
                exact, FLOW, solver, times, x, key=k
            )
            points = jax.jit(jax.vmap(draw))(eps, keys)
            show(axes[i, j], points, f"{n} steps" if i == 0 else None, reach=2.0)
        axes[i, 0].text(
            -2.25, 0, name, rotation=90, va="center", ha="center", color=INK, fontsize=9
        )
    save(fig, "solvers.png")


def save(fig, name):
    fig.subplots_adjust(left=0.04, right=1, top=0.92, bottom=0, wspace=0.02, hspace=0.12)
    fig.savefig(IMAGES / name, dpi=170, transparent=True, pil_kwargs={"optimize": True})
    print(IMAGES / name)


def main():
    plt.switch_backend("agg")
    exact = denoiser(letters(CENTRES))
    rng = np.random.default_rng(1)
    centres = letters(CENTRES)[rng.integers(0, CENTRES, POINTS)]
    x0 = jnp.asarray(centres + SPREAD * rng.standard_normal((POINTS, 2)), jnp.float32)
    eps = jax.random.normal(jax.random.key(1), x0.shape)
    process(x0, eps, exact)
    solvers(eps, exact)


if __name__ == "__main__":
    main()
