"""Linear layers in 8 bits beside bfloat16's: the time of one product, and its error.

    python benchmarks/quantized_layers.py

The sizes are those of the MLP of DiT-XL/2 and of FLUX.1 for one batch of tokens; smaller on a CPU.
The activations are rounded inside the time that is measured, as they are in use.
"""

import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp

from eqxldm.nn import Conv, Linear
from eqxldm.quantization import MODES, quantize

CALLS = 20
ON_CPU, ON_DEVICE = ((256, 384, 1536),), ((8192, 1152, 4608), (16384, 3072, 12288))


def median_seconds(function, *args):
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def row(what, name, layer, x, exact, multiply_adds):
    call = eqx.filter_jit(lambda layer, x: jax.vmap(layer)(x))
    try:
        seconds = median_seconds(call, layer, x)
    except Exception as error:  # what a device's compiler has not
        print(f"| {what} | {name} | not on this device: {str(error).splitlines()[0][:80]} | | |")
        return
    y = call(layer, x).astype(jnp.float32)
    error = jnp.sqrt(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))
    rate = 2 * multiply_adds / seconds / 1e12
    print(f"| {what} | {name} | {1e3 * seconds:.3f} | {rate:.2f} | {float(error):.4f} |")


def main():
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    print("| layer | weights | ms | TFLOP/s | relative error |")
    print("|---|---|---|---|---|")
    layers = []
    for n, width, out in ON_CPU if on_cpu else ON_DEVICE:
        linear = Linear(width, out, key=jax.random.key(0))
        layers.append((f"{n} tokens, {width} to {out}", linear, (n, width), n * width * out))
    n, side, c = (1, 16, 64) if on_cpu else (8, 64, 320)
    conv = Conv(c, c, 3, key=jax.random.key(0))
    work = n * side * side * 9 * c * c
    layers.append((f"3 x 3, {c} channels, {n} x {side} x {side}", conv, (n, side, side, c), work))
    for what, layer, shape, work in layers:
        x = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
        exact = eqx.filter_jit(lambda layer, x: jax.vmap(layer)(x))(layer, x.astype(jnp.float32))
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer)
        row(what, "bfloat16", half, x, exact, work)
        for mode in MODES:
            row(what, mode, quantize(layer, mode), x, exact, work)


if __name__ == "__main__":
    main()
