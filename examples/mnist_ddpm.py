"""DDPM on MNIST's pixels with a U-Net, as in a blog post: from the data to a picture of digits.

    python examples/mnist_ddpm.py                 # writes mnist_ddpm.png
    python examples/mnist_ddpm.py --steps 6000    # trains longer

The recipe of Ho et al. 2020 at a small size: a table of 1000 noise levels, a network that predicts
the noise, the mean square error, ancestral sampling. The digits wanted are given as labels.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import eqxldm as ex
from eqxldm.data import open_mnist, to_float, to_uint8
from eqxldm.models import UNet
from eqxldm.training import adamw, exponential, init_state, make_loss, make_train_step

TIMESTEPS = 1000
PATH = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(TIMESTEPS)))
DDPM = ex.Diffusion(PATH, ex.predict_eps)


def make_network(width, key):
    """A U-Net for 28 x 28 pixels: 28, 14 and 7, with attention over the 49 deepest positions."""
    return UNet(
        1,
        channels=(width, 2 * width, 2 * width),
        blocks=1,
        attention_levels=(False, False, True),
        num_classes=10,
        groups=8,
        key=key,
    )


def train(images, labels, *, width, steps, batch_size, seed=0):
    """The averaged network."""
    key = jax.random.key(seed)
    network = make_network(width, key)
    optimizer = adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, max(steps, 51)))
    state, static = init_state(network, optimizer, num_emas=1)
    loss = make_loss(
        ex.Denoising(DDPM, time_sampler=ex.discrete_time(TIMESTEPS)),
        null=network.null,  # one label in ten is left out, so that guidance has what to guide by
        cond_dropout=0.1,
        prepare=lambda batch, key: {"x0": to_float(batch["image"]), "cond": batch["label"]},
    )
    step = make_train_step(loss, static, optimizer, ema_decays=(exponential(0.999),))
    step = jax.jit(step, donate_argnums=0)
    rng, began = np.random.default_rng(seed), time.monotonic()
    for i in range(1, steps + 1):
        rows = rng.integers(0, len(images), batch_size)
        state, metrics = step(state, {"image": images[rows], "label": labels[rows]}, key)
        if i % 100 == 0 or i == steps:  # reading a loss waits for the device: not at every step
            rate = i * batch_size / (time.monotonic() - began)
            print(f"step {i} of {steps}: loss {float(metrics['loss']):.4f}, {rate:.0f} images/s")
    return eqx.combine(state.ema[0], static)


def draw(network, labels, *, steps, guidance, seed=1):
    """A digit for each label, uint8 `(n, 28, 28, 1)`."""
    times = ex.timestep_times(TIMESTEPS, ex.respace(TIMESTEPS, [steps]))
    denoiser = ex.guide(network, network.null, guidance)
    clip = lambda x0, x_t, t: jnp.clip(x0, -1, 1)  # pixels lie in [-1, 1], so estimates should

    @jax.jit
    @jax.vmap
    def one(label, key):
        prior_key, solver_key = jax.random.split(key)
        x_T = DDPM.sample_prior((1, 28, 28), key=prior_key)
        return ex.sample(
            denoiser, DDPM, ex.DDPM(), times, x_T, label, key=solver_key, denoised_fn=clip
        )

    keys = jax.random.split(jax.random.key(seed), len(labels))
    return np.asarray(to_uint8(one(jnp.asarray(labels), keys)))


def save_grid(images, columns, path):
    n, height, width, _ = images.shape
    grid = images[..., 0].reshape(n // columns, columns, height, width)
    grid = grid.transpose(0, 2, 1, 3).reshape(n // columns * height, columns * width)
    Image.fromarray(grid).resize((3 * grid.shape[1], 3 * grid.shape[0]), 0).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="channels of the first level")
    parser.add_argument("--sampling-steps", type=int, default=100, help="network calls a sample")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 is the network alone")
    parser.add_argument("--columns", type=int, default=10, help="samples of each digit")
    parser.add_argument("--data", default=None, help="a folder with MNIST's files; else fetched")
    parser.add_argument("--out", default="mnist_ddpm.png", help="the picture")
    options = parser.parse_args()
    mnist = open_mnist("mnist", options.data, log=print)
    sizes = dict(width=options.width, steps=options.steps, batch_size=options.batch_size)
    network = train(mnist.images, mnist.labels, **sizes)
    labels = np.repeat(np.arange(10), options.columns)
    images = draw(network, labels, steps=options.sampling_steps, guidance=options.guidance)
    save_grid(images, options.columns, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
