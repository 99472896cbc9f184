"""`python -m benchmarks.aot.pieces`: pieces of the models, forward and backward, for TPUs.

A piece compiles in seconds, a whole step in minutes: to judge a change, before `make tpu-check`.
Prints for each what the compiler says of a chip: estimated cycles, temporaries, bytes of memory
that are read and written, bytes sent. Kernels written in Pallas have no estimate: their cycles are
missing, and their bytes are those that they say themselves.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import hlo, targets
from .compile import devices, prepare

DEPTH = 2  # blocks of DiT, in a scan: what a loop's round costs is counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", default="v5e:2x2")
    parser.add_argument("--mesh", help="over the whole slice; by default one chip of it")
    parser.add_argument("--images", type=int, help="a chip; by default 32 of DiT, else 8")
    parser.add_argument("--only", default="", help="pieces whose names contain this")
    args = parser.parse_args()
    prepare("tpu")
    mesh = make_mesh(args.slice, args.mesh)
    print("| piece | images | cycles | temporaries | accessed | sent | compile |")
    print("|---|---|---|---|---|---|---|")
    for name, (images, build) in pieces().items():
        if args.only in name:
            images = args.images or images
            cells = measured(*build(mesh, images * mesh.size))
            print(f"| {name} | {images} | {cells} |", flush=True)


def make_mesh(where: str, axes: str | None) -> Any:
    from eqxldm import sharding

    case = targets.case("", where, axes or "data=1")
    found = devices("tpu", case)
    return sharding.make_mesh(case.mesh, found if axes else found[:1])


def pieces() -> dict[str, tuple[int, Callable[[Any, int], tuple[Any, int]]]]:
    """Name: examples a chip, and what lowers the piece, with how often its blocks run."""
    import jax

    from eqxldm.nn import Conv, ResnetBlock, attend, flash_attend, upsample_nearest

    key = jax.random.key(0)
    block = lambda width, out: ResnetBlock(width, out, key=key)
    pair = lambda width: [block(width, width), block(width, width)]
    level = lambda: [upsample_nearest, Conv(256, 256, 3, key=key), block(256, 128), block(128, 128)]
    chain = lambda make, *shape: (8, partial(layers, make, shape))
    heads = lambda attend, images, *shape: (images, partial(attention, attend, shape))
    return {
        "attention, 256 tokens": heads(attend, 32, 256, 16, 72),
        "attention, 256 tokens, flash_attend": heads(flash_attend, 32, 256, 16, 72),
        "attention, 1024 tokens": heads(attend, 8, 1024, 16, 64),
        "attention, 1024 tokens, flash_attend": heads(flash_attend, 8, 1024, 16, 64),
        "attention, 4096 tokens": heads(attend, 1, 4096, 16, 64),
        "attention, 4096 tokens, flash_attend": heads(flash_attend, 1, 4096, 16, 64),
        "a block of DiT-XL/2": (32, dit_block),
        "two residual blocks, 64 x 64 x 512": chain(lambda: pair(512), 64, 64, 512),
        "two residual blocks, 256 x 256 x 128": chain(lambda: pair(128), 256, 256, 128),
        "the decoder's last upsampling, two blocks": chain(level, 128, 128, 256),
    }


def dit_block(mesh: Any, images: int) -> tuple[Any, int]:
    """A training step of DEPTH blocks, of which one round of the loops is measured."""
    import jax

    from . import presets

    with jax.set_mesh(mesh):
        return presets.build("DiT-XL/2", mesh, batch=images, depth=DEPTH).lower(), DEPTH


def attention(
    attend: Callable[..., Any], shape: tuple[int, ...], mesh: Any, images: int
) -> tuple[Any, int]:
    """The gradient of attention by queries, keys and values, `(tokens, heads, size)` each."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from eqxldm import sharding

    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None, "tensor"))
    x = jax.ShapeDtypeStruct((images, *shape), jnp.bfloat16, sharding=where)

    def loss(*qkv):
        return jnp.sum(sharding.batch_vmap(attend)(*qkv).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x), 1


def layers(
    make: Callable[[], list[Any]], shape: tuple[int, ...], mesh: Any, images: int
) -> tuple[Any, int]:
    """The gradient of a chain of layers by its parameters and its input, in bfloat16."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from eqxldm import sharding

    params, static = eqx.filter_eval_shape(lambda: eqx.partition(make(), eqx.is_inexact_array))
    places = sharding.shardings(params, mesh), sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((images, *shape), jnp.bfloat16)
    arguments = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        (params, x), places,
    )  # fmt: skip

    def loss(params, x):
        for layer in eqx.combine(params, static):
            x = sharding.batch_vmap(layer)(x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=places)
        return gradient.lower(*arguments), 1


def measured(lowered: Any, rounds: int) -> str:
    """The cells of a piece's row; the cycles of one round of what runs `rounds` times."""
    begin = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - begin
    module = hlo.parse(program.as_text() or "")
    cycles = sum(
        count // rounds * (one.cycles or 0)
        for one, _, count in hlo.walk(module, into_estimates=False)
    )
    made = program.memory_analysis().temp_size_in_bytes / 2**20
    sent = hlo.sent_bytes(hlo.collectives(module)) / 1e6
    accessed = (program.cost_analysis() or {}).get("bytes accessed", 0.0) / 1e6
    cells = f"{cycles / 1e6:.1f} M | {made:.0f} MiB | {accessed:.0f} MB | {sent:.0f} MB"
    return f"{cells} | {seconds:.0f} s"


if __name__ == "__main__":
    main()
