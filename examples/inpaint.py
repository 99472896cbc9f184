"""Inpainting: half of a digit is given, a diffusion model that never saw such a task adds the rest.

    python examples/inpaint.py                    # writes inpaint.png

An unconditional DiT on MNIST's pixels, then two ways to fill in with it. "Replaced": at every step
the estimate of the clean picture gets the known pixels. "RePaint": the same, and the grid goes back
up again and again, so that what is filled in meets what is known (Lugmayr et al. 2022).
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import eqxldm as ex
from eqxldm.data import open_mnist, to_float
from eqxldm.models import DiT
from eqxldm.training import adamw, exponential, init_state, make_loss, make_train_step

DIFFUSION = ex.Diffusion(ex.CosineVP(), ex.predict_v)


def train(images, steps, key, batch_size=64):
    """The averaged network; no condition, so none is dropped."""
    dit = DiT((1, 28, 28), patch_size=4, depth=6, width=128, num_heads=4, key=key)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, max(steps, 101))
    optimizer = adamw(rate, b2=0.99, clip_norm=1.0)
    state, static = init_state(dit, optimizer, num_emas=1)
    objective = ex.Denoising(DIFFUSION, time_sampler=ex.stratified_time)
    loss = make_loss(objective, prepare=lambda image, key: {"x0": to_float(image)})
    step = make_train_step(loss, static, optimizer, ema_decays=(exponential(0.999),))
    step, rng = jax.jit(step, donate_argnums=0), np.random.default_rng(0)
    for i in range(1, steps + 1):
        state, metrics = step(state, images[rng.integers(0, len(images), batch_size)], key)
        if i % 200 == 0 or i == steps:
            print(f"step {i} of {steps}: loss {float(metrics['loss']):.4f}")
    return eqx.combine(state.ema[0], static)


def inpaint(network, pictures, known, times, key):
    """Each picture with the pixels outside of `known` (a mask) filled in."""

    @jax.jit
    @jax.vmap
    def one(picture, key):
        prior_key, solver_key = jax.random.split(key)
        x_T = DIFFUSION.sample_prior(picture.shape, key=prior_key)
        keep = lambda x0, x_t, t: jnp.where(known, picture, jnp.clip(x0, -1, 1))
        return ex.sample(
            network, DIFFUSION, ex.DDPM(), times, x_T, key=solver_key, denoised_fn=keep
        )

    return np.asarray(one(pictures, jax.random.split(key, len(pictures))))


def seam(pictures, known):
    """How much neighbours differ across the border of what is known; inside, for comparison."""
    row = int(np.argmin(known[0, :, 0]))  # the first row that is not known
    step = lambda r: float(np.mean(np.abs(pictures[:, 0, r] - pictures[:, 0, r - 1])))
    return step(row), (step(row - 1) + step(row + 1)) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--resamplings", type=int, default=4, help="RePaint's passes of each jump")
    parser.add_argument("--data", default=None, help="a folder with MNIST's files; else fetched")
    parser.add_argument("--out", default="inpaint.png", help="the picture")
    options = parser.parse_args()
    key = jax.random.key(0)
    network = train(open_mnist("mnist", options.data, log=print).images, options.steps, key)

    test = open_mnist("mnist", options.data, split="test")
    firsts = [int(np.flatnonzero(test.labels == label)[0]) for label in np.unique(test.labels)]
    pictures = to_float(jnp.asarray(test.images[firsts]))
    known = np.zeros((1, 28, 28), bool)
    known[:, :14] = True  # the upper half
    n, jump = options.sampling_steps, max(1, options.sampling_steps // 10)
    ways = {
        "replaced": ex.uniform_times(n),
        "RePaint": ex.repaint_times(n, jump=jump, resamplings=options.resamplings),
    }
    rows = {"picture": np.asarray(pictures), "given": np.where(known, pictures, -0.3)}
    for name, times in ways.items():
        for i in range(2):
            filled = inpaint(network, pictures, known, times, jax.random.fold_in(key, i))
            rows[f"{name} {i + 1}"] = filled
        across, inside = seam(filled, known)
        print(f"{name}: {ex.nfe(DIFFUSION.path, ex.DDPM(), times)} calls, "
              f"step across the border {across:.3f}, beside it {inside:.3f}")  # fmt: skip

    figure, axes = plt.subplots(len(rows), len(firsts), figsize=(len(firsts), len(rows)))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(options.out, dpi=120)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
