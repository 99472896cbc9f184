"""Run by test_sharding.py on eight devices: each step on each mesh against one device, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import eqxldm as ex
from eqxldm import nn, sharding, training
from eqxldm.models import DiT
from eqxldm.training import AutoencoderState, adamw, constant, init_state, muon

from helpers import filled, small_autoencoder, small_discriminator

MIXED = "data=2,fsdp=2,tensor=2"
MESHES = {
    "diffusion": ["data=8", "fsdp=8", "tensor=2,data=4", MIXED],
    "autoencoder": ["fsdp=8", MIXED],
    "modern": [MIXED],
}
KEY = jax.random.key(3)


def diffusion():
    sizes = dict(patch_size=2, depth=2, width=32, num_heads=4, num_classes=5, learn_sigma=True)
    dit = filled(lambda: DiT((4, 8, 8), **sizes, key=KEY), size=0.1)
    optimizer = adamw(1e-4, clip_norm=1.0)
    state, static = init_state(dit, optimizer, num_emas=1)
    path = ex.DiscreteVP(ex.alpha_bar_from_betas(ex.linear_betas(1000)))
    objective = ex.Hybrid(ex.Diffusion(path, ex.LearnedRange(ex.predict_eps)))
    loss = training.make_loss(objective, null=5, cond_dropout=0.1)
    step = training.make_train_step(
        loss, static, optimizer, ema_decays=(constant(0.9),), grad_accum_steps=2
    )
    data = {"x0": jax.random.normal(KEY, (16, 4, 8, 8)), "cond": jnp.arange(16) % 5}
    return state, step, data


def modern():
    """The newer form and Muon, with a term that compares the examples of a batch."""
    dit = filled(
        lambda: DiT(
            (4, 8, 8), patch_size=2, depth=2, width=32, num_heads=4, num_classes=5,
            norm=nn.RMSNorm, swiglu=True, qk_norm=nn.RMSNorm, rope=nn.RoPE((4, 4)),
            condition_tokens=2, early_depth=1, early_head=True, patch_bottleneck=8, key=KEY,
        ),
        size=0.1,
    )  # fmt: skip
    optimizer = muon(1e-4, clip_norm=1.0)
    state, static = init_state(dit, optimizer, num_emas=1)
    flow = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
    objective = ex.Denoising(flow, cosine=0.5, early=0.5, dispersive=0.5)
    step = training.make_train_step(
        training.make_loss(objective), static, optimizer, ema_decays=(constant(0.9),)
    )
    data = {"x0": jax.random.normal(KEY, (16, 4, 8, 8)), "cond": jnp.arange(16) % 5}
    return state, step, data


def autoencoder():
    optimizer = adamw(1e-4)
    ae, disc = filled(small_autoencoder), filled(small_discriminator)
    ae_state, ae_static = init_state(ae, optimizer, num_emas=1)
    disc_state, disc_static = init_state(disc, optimizer)
    step = training.make_autoencoder_step(
        ae_static, disc_static, optimizer, optimizer, ema_decays=(constant(0.9),)
    )
    images = jax.random.uniform(KEY, (8, 1, 16, 16), minval=-1)
    return AutoencoderState(ae_state, disc_state), step, images


def error(actual, expected):
    """The largest difference of a tree, relative to its largest entry."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    differences = [np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in pairs]
    return float(max(differences) / max(np.max(np.abs(b)) for b in jax.tree.leaves(expected)))


def states(state):
    return [state.autoencoder, state.discriminator] if hasattr(state, "autoencoder") else [state]


def moments(state):
    arrays = [a for s in states(state) for a in jax.tree.leaves(s.opt_state)]
    return [a for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact)]


def parameters(state):
    return [(s.params, s.ema) for s in states(state)]


def boundary(mesh):
    """How the compiler divides what `replicate_activation` constrains in a vmap over a batch."""
    seen = []
    inspect = lambda x: jax.debug.inspect_array_sharding(x, callback=seen.append)

    def one(x):
        y = nn.replicate_activation(x * 2)
        return y

    def batch(x):
        y = sharding.batch_vmap(one)(x)
        inspect(y)
        return y

    with jax.set_mesh(mesh):
        jax.block_until_ready(jax.jit(batch)(jnp.ones((16, 8, 8))))
    wanted = jax.sharding.NamedSharding(mesh, P(sharding.BATCH_AXES))
    return "batch" if all(s.is_equivalent_to(wanted, 3) for s in seen) and seen else str(seen)


def compare(name, text, state, step, batch, expected, loss):
    mesh = sharding.make_mesh(sharding.parse_mesh(text))
    placed = sharding.shardings(state, mesh)
    own = sharding.place(state, mesh)
    here = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
        new, metrics = jitted(own, here, KEY)
        result = jax.device_get(new)
        arrays = [a for a in jax.tree.leaves(new)]
        measured = sum(a.addressable_shards[3].data.nbytes for a in arrays)
        jitted(new, here, KEY)
    return {
        "step": name,
        "mesh": text,
        "loss": abs(float(metrics["loss"]) / loss - 1),
        "moments": error(moments(result), moments(expected)),
        "parameters": error(parameters(result), parameters(expected)),
        "bytes": measured,
        "bytes_expected": sharding.bytes_per_device(state, mesh.shape),
        "bytes_whole": sum(a.nbytes for a in arrays),
        "second_compilation": jitted._cache_size() != 1,
        "boundary": boundary(mesh),
        "devices": np.vectorize(lambda device: device.id)(mesh.devices).tolist(),
    }


def main():
    sharding.SMALLEST_DIVIDED = 1  # the models here are small
    rows = []
    for make in (diffusion, autoencoder, modern):
        state, step, batch = make()
        state = jax.device_get(state)  # on no device: placing it copies, and donation frees copies
        expected, metrics = jax.jit(step)(state, batch, KEY)
        expected, loss = jax.device_get(expected), float(metrics["loss"])
        for text in MESHES[make.__name__]:
            rows.append(compare(make.__name__, text, state, step, batch, expected, loss))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
