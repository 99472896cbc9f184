"""`python benchmarks/scaling.py`: what a training of DiT needs, counted: memory, FLOPs, network.

Two tables for docs/scaling.md. The first: GiB a device of the training state, on many meshes; it
is float32 (parameters, one average, AdamW's two moments: 16 bytes a parameter) and follows from the
partition rules. The second: a step of DiT-XL/2 on some machines, its FLOPs and the bytes that cross
the network, and the times that these take at the devices' peak. Nothing here is measured and no
device is needed.
"""

import math

import equinox as eqx
import jax

from eqxldm import models, nn
from eqxldm.devices import peak_flops
from eqxldm.sharding import bytes_per_device, parse_mesh, partition_specs
from eqxldm.training import adamw, init_state

SIZES = [f"{size}_{patch_size}" for size in ("s", "b", "l", "xl") for patch_size in (2, 4, 8)]
# Newer forms: XL/2 as `MODERN=1` trains it, with an auxiliary head; and JiT over pixels.
MODERN = dict(norm=nn.RMSNorm, swiglu=True, qk_norm=nn.RMSNorm, rope=nn.RoPE((36, 36)))
NEWER = {
    "DiT-XL/2, modern": lambda key: models.dit_xl_2(
        (4, 32, 32), learn_sigma=False, early_depth=8, early_head=True, **MODERN, key=key
    ),
    "JiT-B/16": lambda key: models.jit_b_16(key=key),
    "JiT-L/16": lambda key: models.jit_l_16(key=key),
    "JiT-H/16": lambda key: models.jit_h_16(key=key),
}
MESHES = ["data=1", "fsdp=4", "fsdp=8", "fsdp=16", "fsdp=128", "tensor=4", "fsdp=4,tensor=2"]

# Bytes a second that a device can receive from all others: NVLink 4 (NVIDIA's H200 data sheet: 900
# GB/s both ways) and the links of a v5e (Google's documentation: 1,600 Gbit/s, both ways).
MACHINES = [
    ("one H200", "NVIDIA H200", math.inf, "data=1", 256),
    ("eight H200", "NVIDIA H200", 450e9, "fsdp=8", 256),
    ("eight H200", "NVIDIA H200", 450e9, "fsdp=8", 2048),
    ("v5e-256", "TPU v5 lite", 100e9, "data=16,fsdp=16", 256),
    ("v5e-256", "TPU v5 lite", 100e9, "data=16,fsdp=16", 4096),
]


def shapes(size):
    """The training state of a size, and its network, as shapes."""
    published = lambda key: getattr(models, f"dit_{size}")((4, 32, 32), key=key)
    make = NEWER.get(size, published)
    key = jax.random.key(0)
    state = eqx.filter_eval_shape(lambda k: init_state(make(k), adamw(1e-4), num_emas=1)[0], key)
    return state, eqx.filter_eval_shape(make, key)


def network_bytes(params, mesh):
    """What a device receives in a step, `(parameters, gradients)`.

    The least that is needed, in bfloat16. A divided parameter is gathered for the forward and
    again for the backward pass, its gradient is summed and scattered over `fsdp`; over what else
    shares the batch, as that of a copied parameter over all, it is summed by a ring: twice
    `(n - 1) / n` of its size.
    """
    is_spec = lambda s: isinstance(s, jax.P)
    gathered = summed = 0.0
    fsdp, data = mesh["fsdp"], mesh["data"]
    specs = jax.tree.leaves(partition_specs(params, mesh), is_leaf=is_spec)
    for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True):
        size = math.prod(leaf.shape) / (mesh["tensor"] if "tensor" in spec else 1)
        if "fsdp" in spec:
            gathered += 2 * 2 * size * (fsdp - 1) / fsdp
            summed += 2 * size * (fsdp - 1) / fsdp + 2 * 2 * size / fsdp * (data - 1) / data
        else:
            summed += 2 * 2 * size * (fsdp * data - 1) / (fsdp * data)
    return gathered, summed


def as_table(rows):
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def memory_table():
    rows = [["model", "parameters", *(f"`{mesh}`" for mesh in MESHES)]]
    for size in [*SIZES, *NEWER]:
        state, _ = shapes(size)
        millions = models.parameter_count(state.params) / 1e6
        shares = [bytes_per_device(state, parse_mesh(mesh)) / 2**30 for mesh in MESHES]
        name = size if size in NEWER else f"DiT-{size.upper().replace('_', '/')}"
        rows.append([name, f"{millions:.1f} M", *(f"{share:.2f}" for share in shares)])
    return as_table(rows)


def estimate_table():
    state, dit = shapes("xl_2")
    rows = [[
        "machine", "`--mesh`", "batch", "state, GiB", "TFLOP a device", "at the peak", "at half",
        "parameters in, GB", "gradients in, GB", "at the links' peak",
    ]]  # fmt: skip
    for name, kind, links, text, batch in MACHINES:
        mesh = parse_mesh(text)
        devices = math.prod(mesh.values())
        peak = peak_flops(kind)
        assert peak is not None
        flops = 6 * models.multiply_adds(dit) * batch / devices
        parameters, gradients = network_bytes(state.params, mesh)
        milliseconds = lambda seconds: f"{1000 * seconds:.1f} ms"
        rows.append([
            name, f"`{text}`", str(batch), f"{bytes_per_device(state, mesh) / 2**30:.2f}",
            f"{flops / 1e12:.2f}", milliseconds(flops / peak), milliseconds(2 * flops / peak),
            f"{parameters / 1e9:.2f}", f"{gradients / 1e9:.2f}",
            milliseconds((parameters + gradients) / links),
        ])  # fmt: skip
    return as_table(rows)


if __name__ == "__main__":
    print(memory_table(), estimate_table(), sep="\n\n")
