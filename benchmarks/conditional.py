"""`python benchmarks/conditional.py`: a convolution's gradient, plain and inside `lax.cond`.

The reason why the adversarial phase of the autoencoder is a second step and not a branch.
"""

import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp

from eqxldm.models import PatchDiscriminator


def milliseconds(function, *args, repeats: int = 7) -> float:
    """The median time of a call after compilation, waiting for the device."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main() -> None:
    key = jax.random.key(0)
    discriminator = PatchDiscriminator(1, channels=32, layers=2, groups=8, key=key)
    params, static = eqx.partition(discriminator, eqx.is_array)
    images = jax.random.normal(key, (32, 1, 32, 32))

    def gradient(params, images):
        loss = lambda params: jnp.sum(jax.vmap(eqx.combine(params, static))(images))
        return jax.grad(loss)(params)

    def branch(params, images, active):
        return jax.lax.cond(active, lambda p: gradient(p, images), lambda p: p, params)

    plain = milliseconds(jax.jit(gradient), params, images)
    inside = milliseconds(jax.jit(branch), params, images, jnp.array(True))
    print(f"{jax.devices()[0].device_kind}: plain {plain:.1f} ms, in lax.cond {inside:.1f} ms")


if __name__ == "__main__":
    main()
