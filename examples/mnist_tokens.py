"""Masked diffusion on MNIST as tokens: digits of 16 greys written in any order, and filled in.

    python examples/mnist_tokens.py                 # writes mnist_tokens.png
    python examples/mnist_tokens.py --steps 6000    # trains longer

A picture of 14 x 14 pixels, each one of 16 greys, is a text of 196 tokens. The network is the one
that writes words in `make train-text-diffusion`. The picture shows digits from nothing, then upper
halves of test digits, each with four lower halves that the network puts under it.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from eqxldm import discrete
from eqxldm.data import open_mnist
from eqxldm.models import TokenTransformer
from eqxldm.training import adamw, exponential, init_state, make_loss, make_train_step

SIDE, GREYS = 14, 16
MASK = GREYS  # the seventeenth token
PATH = discrete.Masking(MASK)


def to_tokens(images):
    """Uint8 `(n, 28, 28, 1)` to greys `(n, 196)`: means of four pixels, four bits of each."""
    small = images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4))
    return (small * GREYS / 256).astype(np.int32).reshape(-1, SIDE * SIDE)


def train(tokens, *, width, depth, steps, batch_size, seed=0):
    """The averaged network, which has no time: what is visible says how much is masked."""
    key = jax.random.key(seed)
    network = TokenTransformer(
        GREYS + 1,
        depth=depth,
        width=width,
        num_heads=4,
        max_length=SIDE * SIDE,
        key=key,
    )
    optimizer = adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, max(steps, 51)))
    state, static = init_state(network, optimizer, num_emas=1)
    loss = make_loss(discrete.MaskedCount(PATH))  # the bound of the likelihood, in nats a pixel
    step = make_train_step(loss, static, optimizer, ema_decays=(exponential(0.99),))
    step = jax.jit(step, donate_argnums=0)
    rng, began = np.random.default_rng(seed), time.monotonic()
    for i in range(1, steps + 1):
        rows = rng.integers(0, len(tokens), batch_size)
        state, metrics = step(state, {"x0": tokens[rows]}, key)
        if i % 100 == 0 or i == steps:
            bits, rate = float(metrics["loss"]) / np.log(2), i / (time.monotonic() - began)
            print(f"step {i} of {steps}: {bits:.3f} bits a pixel, {rate:.1f} steps/s")
    return eqx.combine(state.ema[0], static)


def draw(network, x, *, calls, seed=1):
    """Every masked token of `x` replaced, as many at each call, in random order."""

    @jax.jit
    def fill(x, key):
        sampler = discrete.Ordered(discrete.at_random)
        return discrete.sample_tokens(network, PATH, sampler, calls, x, key=key).tokens

    return np.asarray(fill(jnp.asarray(x), jax.random.key(seed)))


def save_grid(tokens, columns, path):
    """Pictures side by side; [MASK] is drawn in blue."""
    tokens = tokens.reshape(-1, columns, SIDE, SIDE).transpose(0, 2, 1, 3)
    tokens = tokens.reshape(-1, columns * SIDE)
    grey = np.minimum(tokens, GREYS - 1)[..., None] * np.full(3, 255 // (GREYS - 1))
    blue = np.where((tokens == MASK)[..., None], [40, 60, 160], grey).astype(np.uint8)
    Image.fromarray(blue).resize((4 * blue.shape[1], 4 * blue.shape[0]), 0).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=96, help="numbers in a token")
    parser.add_argument("--depth", type=int, default=3, help="blocks of the transformer")
    parser.add_argument("--calls", type=int, default=98, help="network calls a picture")
    parser.add_argument("--columns", type=int, default=10, help="pictures in a row")
    parser.add_argument("--data", default=None, help="a folder with MNIST's files; else fetched")
    parser.add_argument("--out", default="mnist_tokens.png", help="the picture")
    options = parser.parse_args()
    tokens = to_tokens(open_mnist("mnist", options.data, log=print).images)
    sizes = dict(width=options.width, depth=options.depth)
    network = train(tokens, **sizes, steps=options.steps, batch_size=options.batch_size)
    columns, half = options.columns, SIDE * SIDE // 2
    nothing = np.full((2 * columns, SIDE * SIDE), MASK, np.int32)
    test = to_tokens(open_mnist("mnist", options.data, split="test", log=print).images)[:columns]
    upper = np.where(np.arange(SIDE * SIDE) < half, test, MASK)
    # One batch for all, so that one program is compiled.
    filled = draw(network, np.concatenate([nothing, *[upper] * 4]), calls=options.calls)
    written, rest = filled[: 2 * columns], filled[2 * columns :]
    save_grid(np.concatenate([written, test, upper, rest]), columns, options.out)
    print(f"wrote {options.out}: two rows from nothing; test digits, halves, four ways to go on")


if __name__ == "__main__":
    main()
