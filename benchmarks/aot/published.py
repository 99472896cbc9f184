"""Published networks with random weights: their samplers, and a step that trains them further.

What `make generate` runs, whole trajectories in one program with guidance by two calls, without the
text encoders, which are let go of before; and a step of the published objective with AdamW, one
average, and activations in bfloat16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import eqxldm as ex
from eqxldm import discrete, models, nn, pipelines, sharding, training
from eqxldm.pipelines.grids import FlowGrid, MultistepFlowGrid

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)


class Network(NamedTuple):
    """A network, its text's tokens and vector, its grid and solver, and an autoencoder's latent.

    `latent(size)` is the shape of the latent of a picture `(height, width)`, or of a clip
    `(frames, height, width)`.
    """

    make: Callable[..., Any]
    tokens: int
    pooled: int | None
    grid: Any
    solver: Any
    autoencoder: Callable[..., Any]
    size: tuple[int, ...]
    guidance: float | None = None

    def latent(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return eqx.filter_eval_shape(self.autoencoder, key=jax.random.key(0)).latent_shape(*size)

    def cond(self, batch: int | None = None) -> Any:
        """The text of one example, or of a batch, as shapes."""
        lead = () if batch is None else (batch,)

        def make() -> nn.Conditioning:
            vector = None if self.pooled is None else jnp.zeros((*lead, self.pooled))
            numbers = None if self.guidance is None else jnp.zeros((*lead, 1))
            return nn.Conditioning(vector, jnp.zeros((*lead, self.tokens, 4096)), None, numbers)

        return jax.eval_shape(make)


def _kl_f8(*, key: Any) -> Any:
    return models.kl_f8(3, 16, quant_convs=False, key=key)


NETWORKS: dict[str, Network] = {
    "SD3-medium": Network(
        models.mmdit_sd3_medium, 333, 2048, FlowGrid(3.0), ex.Euler(), _kl_f8, (1024, 1024)
    ),
    "FLUX.1-dev": Network(
        models.flux1_dev, 512, 768, FlowGrid(3.0, every_nth=True), ex.Euler(), _kl_f8,
        (1024, 1024), guidance=3.5,
    ),
    "Wan-1.3B": Network(
        models.wan_t2v_1_3b, 512, None, MultistepFlowGrid(3.0), ex.UniPC(),
        models.wan21_autoencoder, (81, 480, 832),
    ),
}  # fmt: skip


ATTENTION = dict(xla=nn.attend, blocks=nn.attend_in_blocks, flash=nn.flash_attend)


def training_program(
    mesh: Mesh,
    name: str,
    *,
    batch: int,
    size: tuple[int, ...] | None = None,
    attention: str = "flash",
    **options: Any,
) -> tuple[Any, Any, Any, int]:
    """`step, state, data, flops` of one training step; `options` are of the network."""
    network = NETWORKS[name]
    options |= dict(remat=nn.save_narrow, attention=ATTENTION[attention])
    make = lambda: network.make(**options, key=jax.random.key(0))
    optimizer = training.adamw(1e-5, clip_norm=1.0)

    def first() -> Any:
        return training.init_state(make(), optimizer, num_emas=1)

    state, static = eqx.filter_eval_shape(first)
    loss = training.make_loss(ex.Denoising(FLOW), dtype=jnp.bfloat16)
    step = training.make_train_step(
        loss, static, optimizer, ema_decays=(training.constant(0.9999),)
    )
    latent = network.latent(size or network.size)
    x0 = jax.ShapeDtypeStruct((batch, *latent), jnp.float32)
    flops = 3 * batch * _flops(network, x0)
    return step, state, dict(x0=x0, cond=network.cond(batch)), flops


def sampling_program(
    mesh: Mesh,
    name: str,
    *,
    batch: int,
    steps: int,
    size: tuple[int, ...] | None = None,
    attention: str = "flash",
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...], Any, int]:
    """`function, arguments, parameters, flops` of a sampler: noise and texts to latents.

    The weights are bfloat16 and divided as `sharding.partition_spec` says; so is the batch, over
    `data` and `fsdp`. Guidance calls the network twice but where it is told the scale.
    """
    network = NETWORKS[name]
    options |= dict(remat=None, attention=ATTENTION[attention])
    make = lambda: network.make(**options, key=jax.random.key(0))
    params, static = _half(make)
    times, latent = network.grid.times(steps), network.latent(size or network.size)
    x = jax.ShapeDtypeStruct((batch, *latent), jnp.float32)
    calls = len(times) - 1

    def function(params: Any, x: Any, cond: Any, null: Any) -> Any:
        denoiser: Any = pipelines.NetworkDenoiser(eqx.combine(params, static))
        if network.guidance is None:
            denoiser = pipelines.GuidedDenoiser(denoiser, null, jnp.asarray(5.0))
        one = lambda x, cond: ex.sample(denoiser, FLOW, network.solver, times, x, cond)
        return sharding.batch_vmap(one)(x, cond)

    flops = batch * calls * _flops(network, x) * (1 if network.guidance else 2)
    return function, (x, network.cond(batch), network.cond()), params, flops


def text_program(
    mesh: Mesh, *, batch: int, length: int, steps: int
) -> tuple[Callable[..., Any], tuple[Any, ...], Any, int]:
    """LLaDA-8B filling `length` masked tokens in `steps` calls, by confidence."""
    make = lambda: models.llada_8b(remat=None, key=jax.random.key(0))
    params, static = _half(make)
    mask_id = 126_336
    path, sampler = discrete.Masking(mask_id=mask_id), discrete.Ordered(temperature=0.0)

    def function(params: Any, x: Any, key: Any) -> Any:
        network = eqx.combine(params, static)
        return discrete.sample_tokens(network, path, sampler, steps, x, key=key).tokens

    x = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    call = lambda network, x: network(x, jnp.array(0.5), None)
    flops = _count(call, eqx.filter_eval_shape(make), jax.ShapeDtypeStruct((length,), jnp.int32))
    return function, (x, jax.eval_shape(lambda: jax.random.key(0))), params, batch * steps * flops


def _half(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A network's parameters in bfloat16, as shapes, and its static part."""
    params, static = eqx.filter_eval_shape(lambda: eqx.partition(make(), eqx.is_inexact_array))
    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    return jax.tree.map(half, params), static


def _flops(network: Network, x: Any) -> int:
    """Of one call for one example, with the plain attention: the kernel's are not counted."""
    make = lambda: network.make(attention=nn.attend, remat=None, key=jax.random.key(0))
    call = lambda network, x, cond: network(x, jnp.array(0.5), cond)
    one = jax.ShapeDtypeStruct(x.shape[1:], jnp.bfloat16)
    return _count(call, eqx.filter_eval_shape(make), one, network.cond())


def _count(call: Callable[..., Any], network: Any, *arguments: Any) -> int:
    from .flops import count_flops

    params, static = eqx.partition(network, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    whole = lambda params, *given: call(eqx.combine(params, static), *given)
    return count_flops(jax.make_jaxpr(whole)(params, *arguments))
