"""What a run compiles, for a mesh of any devices: the steps of `experiments/train`, the sampler.

The steps are made by the functions that the run itself calls, with its presets.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqxldm import models, sharding
from eqxldm.training import MeanDistance
from experiments.train import autoencoder, config as cfg, diffusion, methods
from experiments.train.conditions import Labels
from experiments.train.networks import make_denoiser
from experiments.train.presets import preset
from experiments.train.sampling import Sampler

from . import published
from .flops import count_flops

SIZES: dict[str, cfg.ModelName] = {
    "DiT-XL/2": "dit_xl_2",
    "DiT-L/2": "dit_l_2",
    "DiT-B/2": "dit_b_2",
    "Modern-XL/2": "dit_xl_2",
}
CLASSES = 1000
LATENT = (4, 32, 32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


class Program(NamedTuple):
    """A function to jit, its arguments as shapes with shardings, and what it holds.

    `flops` are those of the model, of all devices; `stacked` the shapes of the parameters that
    blocks share by a leading axis, `others` those of all others; `spans` the numbers of blocks of
    the parts that they run in, where an auxiliary head reads between two of them.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    donated: tuple[int, ...]
    flops: int
    stacked: list[tuple[int, ...]]
    others: list[tuple[int, ...]]
    spans: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        """To be called under `jax.set_mesh`, as the training loop does."""
        jitted = jax.jit(
            self.function, donate_argnums=self.donated, out_shardings=self.out_shardings
        )
        return jitted.lower(*self.arguments)


def build(name: str, mesh: Mesh, **options: Any) -> Program:
    """The program of a preset by name."""
    if name == "autoencoder":
        return autoencoder_step(mesh, **options)
    if name == "sampler":
        return sampler(mesh, **options)
    kind, _, network = name.partition(":")
    if network:
        return published_program(mesh, kind, network, **options)
    return diffusion_step(mesh, name, **options)


def diffusion_step(
    mesh: Mesh,
    size: str,
    *,
    batch: int,
    grad_accum_steps: int = 1,
    remat: Any = "narrow",
    attention: Any = "xla",
    depth: int | None = None,
) -> Program:
    """One training step of the published recipe, from a batch of cached posteriors."""
    config, condition = _config(size, depth), Labels(CLASSES, CLASSES)
    state, static, optimizer = eqx.filter_eval_shape(
        lambda: diffusion.diffusion_state(
            config, LATENT, condition, remat=remat, attention=attention
        )
    )
    space = eqx.filter_eval_shape(lambda: models.kl_f8(key=jax.random.key(0)))
    step = diffusion.diffusion_step(
        config, condition, space, static, optimizer, grad_accum_steps=grad_accum_steps
    )
    moments = jax.ShapeDtypeStruct((batch, *LATENT), jnp.float16)
    data = dict(mean=moments, logvar=moments, cond=_ints(batch), index=_ints(batch))
    network = eqx.combine(state.params, static)
    flops = 6 * batch * models.multiply_adds(network)
    program = _training(step, mesh, state, data, flops, state.params)
    early = network.config.early_depth
    spans = () if early is None else (early, network.config.depth - early)
    return program._replace(spans=spans)


def autoencoder_step(mesh: Mesh, *, batch: int) -> Program:
    """One adversarial step with LPIPS, from a batch of images larger than the crop."""
    config = preset("imagenet256").config
    config = replace(config, autoencoder=replace(config.autoencoder, dtype="bfloat16"))
    options = config.autoencoder
    state, statics, optimizers = eqx.filter_eval_shape(
        lambda: autoencoder.autoencoder_state(config)
    )
    phases = autoencoder.autoencoder_phases(config, statics, optimizers)
    lpips = eqx.filter_eval_shape(lambda: models.LPIPS(key=jax.random.key(0)))
    perceptual = MeanDistance(lpips, options.perceptual_weight)
    shape = (batch, *autoencoder.crop_size(config), config.pictures.channels)
    data = dict(image=jax.ShapeDtypeStruct(shape, jnp.uint8), index=_ints(batch))
    step = phases[-1][1]
    flops = count_flops(jax.make_jaxpr(step)(state, data, KEY, perceptual))
    return _training(step, mesh, state, data, flops, state.autoencoder.params, perceptual)


def sampler(
    mesh: Mesh, *, batch: int, size: str = "DiT-XL/2", steps: int | None = None,
    attention: Any = "xla",
) -> Program:  # fmt: skip
    """The preset's sampler and the autoencoder's decoder: labels to images.

    Each device has a copy of the models and draws its part of the batch.
    """
    config, found, condition = _config(size), preset("imagenet256"), Labels(CLASSES, CLASSES)
    sampling = replace(found.sampling, steps=steps or found.sampling.steps)
    method = methods.make_method(config)
    dtype = methods.DTYPES[config.diffusion.dtype]
    draw = Sampler(method, sampling, dtype=dtype).function(LATENT, condition.null)
    ae, ae_static = _weights(lambda: models.kl_f8(key=jax.random.key(0)))
    dit, dit_static = _weights(
        lambda: make_denoiser(config, LATENT, condition, remat="nothing", attention=attention)
    )

    def function(params, labels, key):
        space, network = eqx.combine(params[0], ae_static), eqx.combine(params[1], dit_static)
        return draw(space, network, labels, jax.random.split(key, batch))

    decode = lambda params, z: eqx.combine(params, ae_static).decode(z)
    z = jax.ShapeDtypeStruct(LATENT, jnp.float32)
    calls = 2 * methods.check_sampling(method, sampling)  # with guidance, two of the network each
    flops = 2 * calls * models.multiply_adds(eqx.combine(dit, dit_static))
    flops = batch * (flops + count_flops(jax.make_jaxpr(decode)(ae, z)))
    labels = _placed(_ints(batch), sharding.batch_sharding(mesh))
    arguments = _copied((ae, dit), mesh), labels, _copied(KEY, mesh)
    kinds = _kinds(dit)
    return Program(function, arguments, sharding.batch_sharding(mesh), (), flops, *kinds)


def published_program(mesh: Mesh, kind: str, network: str, **options: Any) -> Program:
    """`train:` or `sample:` and a network of `published.py`."""
    if kind == "train":
        step, state, data, flops = published.training_program(mesh, network, **options)
        return _training(step, mesh, state, data, flops, state.params)
    if network == "LLaDA-8B":
        found = published.text_program(mesh, **options)
    else:
        found = published.sampling_program(mesh, network, **options)
    function, (x, *rest), params, flops = found
    batch = sharding.batch_sharding(mesh)
    over_batch = lambda tree: jax.tree.map(lambda a: _placed(a, batch), tree)
    weights = jax.tree.map(_placed, params, sharding.shardings(params, mesh))
    divided = [over_batch(rest[0]), *rest[1:]] if len(rest) > 1 else rest
    divided = [*divided[:-1], _copied(divided[-1], mesh)]
    arguments = weights, over_batch(x), *divided
    return Program(function, arguments, batch, (), flops, *_kinds(params))


def _config(size: str, depth: int | None = None) -> cfg.Config:
    found = preset("imagenet256", form="modern" if size.startswith("Modern") else "published")
    return replace(found.config, dit=replace(found.dit, model=SIZES[size], depth=depth))


def _training(step, mesh, state, data, flops, params, *constants) -> Program:
    placed = sharding.shardings(state, mesh)
    batch = jax.tree.map(lambda a: _placed(a, sharding.batch_sharding(mesh)), data)
    copies = (_copied(tree, mesh) for tree in (KEY, *constants))
    arguments = jax.tree.map(_placed, state, placed), batch, *copies
    return Program(step, arguments, (placed, None), (0,), flops, *_kinds(params))


def _weights(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model's parameters as shapes, and its static part."""
    return eqx.filter_eval_shape(lambda: eqx.partition(make(), eqx.is_inexact_array))


def _ints(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.int32)


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _copied(tree: Any, mesh: Mesh) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    put = lambda leaf: _placed(leaf, whole) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.tree.map(put, tree)


def _kinds(params: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the parameters of scanned blocks, and of all others.

    Those of a stack of one block, MMDiT's last, are others: its loop is none.
    """
    stacked, others = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        alone = sharding.stack_name(name) is None or leaf.shape[0] == 1
        (others if alone else stacked).append(tuple(leaf.shape))
    return stacked, others
