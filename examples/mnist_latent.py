"""Latent diffusion on MNIST: a VAE with its discriminator, then a DiT by flow matching.

    python examples/mnist_latent.py               # writes mnist_latent.png
    python examples/mnist_latent.py --steps 6000  # trains the DiT longer

Digits of 32 x 32 become latents of 4 x 8 x 8: the transformer sees 16 tokens, and is trained and
sampled some ten times as fast as on pixels. The picture has ten digits, their reconstructions, and
below them the samples, a row for each digit.
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
from eqxldm.models import AutoencoderKL, DiT, PatchDiscriminator, Posterior
from eqxldm.training import (
    AutoencoderState,
    adamw,
    exponential,
    init_state,
    l2_distance,
    make_autoencoder_step,
    make_loss,
    make_train_step,
    measure_latents,
)

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
PAD = 2  # 28 x 28 to 32 x 32, which halves


def loop(name, step, state, batches, steps, key):
    """The state after `steps` steps. Reading a loss waits for the device, so few are read."""
    began = time.monotonic()
    for i in range(1, steps + 1):
        state, metrics = step(state, next(batches), key)
        if i % 100 == 0 or i == steps:
            seconds = (time.monotonic() - began) / i
            print(
                f"{name}: step {i} of {steps}, loss {float(metrics['loss']):.4f}, {seconds:.3f} s"
            )
    return state


def batches_of(arrays, batch_size, seed):
    rng, n = np.random.default_rng(seed), len(next(iter(arrays.values())))
    while True:
        rows = rng.integers(0, n, batch_size)
        yield {name: array[rows] for name, array in arrays.items()}


def train_autoencoder(images, steps, channels, key):
    """The averaged autoencoder: reconstruction and KL, and a discriminator for the last third."""
    sizes = dict(channels=(channels, 2 * channels), blocks=1, patch_size=2, groups=8)
    ae = AutoencoderKL(1, 4, **sizes, key=key)
    disc = PatchDiscriminator(1, channels=channels, layers=2, groups=8, key=key)
    optimizers = adamw(optax.cosine_decay_schedule(3e-3, max(steps, 1))), adamw(1e-3, b1=0.5)
    (ae_state, ae_static), (disc_state, disc_static) = (
        init_state(ae, optimizers[0], num_emas=1),
        init_state(disc, optimizers[1]),
    )
    state = AutoencoderState(ae_state, disc_state)

    def phase(adversarial):
        step = make_autoencoder_step(
            ae_static, disc_static, *optimizers, distance=l2_distance, kl_weight=1e-3,
            gan_weight=0.1, adversarial=adversarial, ema_decays=(exponential(0.99),),
        )  # fmt: skip
        on_bytes = lambda state, batch, key: step(state, to_float(batch["image"], pad=PAD), key)
        return jax.jit(on_bytes, donate_argnums=0)

    batches, alone = batches_of({"image": images}, 32, seed=0), 2 * steps // 3
    state = loop("autoencoder", phase(False), state, batches, alone, key)
    state = loop("with discriminator", phase(True), state, batches, steps - alone, key)
    return eqx.combine(state.autoencoder.ema[0], ae_static)


def encode(ae, images, batch_size=250):
    """The posteriors of all images, and the autoencoder that gives latents of unit variance."""
    run = jax.jit(lambda x: jax.vmap(ae.posterior)(to_float(x, pad=PAD)))
    parts = [run(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    mean, logvar = (np.concatenate([np.asarray(getattr(p, f)) for p in parts])
                    for f in ("mean", "logvar"))  # fmt: skip
    return {"mean": mean, "logvar": logvar}, ae.with_latent_stats(*measure_latents(mean, logvar))


def train_dit(ae, posteriors, labels, steps, width, key):
    """The averaged transformer, on fresh samples of the posteriors."""
    shape = ae.latent_shape(28 + 2 * PAD, 28 + 2 * PAD)
    dit = DiT(shape, patch_size=2, depth=6, width=width, num_heads=4, num_classes=10, key=key)
    optimizer = adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, max(steps, 101)),
                      b2=0.99, clip_norm=1.0)  # fmt: skip
    state, static = init_state(dit, optimizer, num_emas=1)

    def prepare(batch, key):
        keys = jax.random.split(key, len(batch["label"]))
        draw = lambda mean, logvar, key: ae.normalise(Posterior(mean, logvar)).sample(key)
        x0 = jax.vmap(draw)(batch["mean"], batch["logvar"], keys)
        return {"x0": x0, "cond": batch["label"]}

    objective = ex.Denoising(FLOW, time_sampler=ex.logit_normal_time())
    loss = make_loss(objective, null=dit.null, cond_dropout=0.1, prepare=prepare)
    step = make_train_step(loss, static, optimizer, ema_decays=(exponential(0.999),))
    step = jax.jit(step, donate_argnums=0)
    batches = batches_of({**posteriors, "label": labels}, 128, seed=1)
    return eqx.combine(loop("DiT", step, state, batches, steps, key).ema[0], static)


def draw(ae, dit, labels, guidance, key):
    """An image for each label."""
    # Guidance where it helps: in the noisiest steps it costs variety (Kynkäänniemi et al. 2024).
    denoiser = ex.guide(dit, dit.null, guidance, interval=(0.0, 0.8))

    @jax.jit
    @jax.vmap
    def one(label, key):
        z = FLOW.sample_prior(dit.shape, key=key)
        return ae.decode(ex.sample(denoiser, FLOW, ex.Heun(), ex.uniform_times(12), z, label))

    return to_uint8(one(jnp.asarray(labels), jax.random.split(key, len(labels))), pad=PAD)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the DiT")
    parser.add_argument("--channels", type=int, default=32, help="of the autoencoder, at its edge")
    parser.add_argument("--width", type=int, default=128, help="of the DiT")
    parser.add_argument("--guidance", type=float, default=1.6, help="1 is the network alone")
    parser.add_argument("--images", type=int, default=60_000, help="how many are trained on")
    parser.add_argument("--data", default=None, help="a folder with MNIST's files; else fetched")
    parser.add_argument("--out", default="mnist_latent.png", help="the picture")
    options = parser.parse_args()
    mnist, key = open_mnist("mnist", options.data, log=print), jax.random.key(0)
    images, labels = mnist.images[: options.images], mnist.labels[: options.images]

    ae = train_autoencoder(images, options.autoencoder_steps, options.channels, key)
    posteriors, ae = encode(ae, images)
    dit = train_dit(ae, posteriors, labels, options.steps, options.width, key)

    originals = images[[np.argmax(labels == digit) for digit in range(10)]]
    through = jax.vmap(lambda x: ae.decode(ae.encode(x)))(to_float(originals, pad=PAD))
    samples = draw(ae, dit, np.repeat(np.arange(10), 10), options.guidance, key)
    rows = np.concatenate([originals, to_uint8(through, pad=PAD), samples])[..., 0]
    grid = rows.reshape(-1, 10, 28, 28).transpose(0, 2, 1, 3).reshape(-1, 280)
    Image.fromarray(grid).resize((3 * grid.shape[1], 3 * grid.shape[0]), 0).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
