"""FLUX.1: blocks of two streams, then blocks of one, with rotary positions (Labs et al. 2025)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PyTree

from ..nn.attention import Attention, SelfAttention, attend, check_heads
from ..nn.conditioning import embed_times
from ..nn.constraints import fusion_barrier
from ..nn.embeddings import VectorEmbedding
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import RMSNorm, layer_norm
from ..nn.patchify import patch_grid, patchify, unpatchify
from ..nn.rope import RoPE, Rotation, grid_positions
from ..nn.stack import Stack, save_matmuls
from .config import arguments, build_part, make_record
from .joint_blocks import JointBlock
from .mmdit import FLOW_TIME, check_conditioning

FLUX_ROPE = RoPE((16, 56, 56))


class SingleBlock(eqx.Module):
    """A block whose attention and MLP see the same input, side by side (Dehghani et al. 2023).

    `h = norm(x) (1 + scale) + shift`, `x += gate (proj(attention(h)) + fc2(gelu(fc1(h))))` with
    `(shift, scale, gate) = W silu(c)`. Both last layers together have one bias, that of `fc2`.

    >>> block = SingleBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> block(jnp.ones((5, 16)), jnp.ones(16)).shape
    (5, 16)
    """

    attention: SelfAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        hidden = int(width * mlp_ratio)
        layer = SelfAttention(width, num_heads, qk_norm=RMSNorm, attention=attention, key=k1)
        proj = Linear(width, width, use_bias=False, key=k5)
        self.attention = eqx.tree_at(lambda layer: layer.proj, layer, proj)
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.modulation = Modulation(width, 3, key=k4)

    def __call__(
        self,
        x: Float[Array, "n d"],
        c: Float[Array, " d"],
        mask: Bool[Array, " n"] | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Array, "n d"]:
        shift, scale, gate = self.modulation(c)
        normed = modulate(layer_norm(x), shift, scale)
        hidden = jax.nn.gelu(self.fc1(normed), approximate=True)
        y = checkpoint_name(self.fc2(fusion_barrier(hidden)), "mlp")
        return x + gate * (self.attention(normed, mask, rotation=rotation) + y)


@dataclass(frozen=True)
class FluxConfig:
    """How a `Flux` was made: the arguments of its constructor, all of them explained there.

    >>> config = FluxConfig(4, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
    ...                     pooled_size=5, rope=RoPE((4, 2, 2)))
    >>> config.build(key=jax.random.key(0)).config.out_channels
    4
    """

    in_channels: int
    depth: int
    single_depth: int
    width: int
    num_heads: int
    context_size: int
    pooled_size: int
    guidance: bool = False
    patch_size: int = 2
    out_channels: int | None = None
    mlp_ratio: float = 4.0
    embed_cond: Any = None
    rope: RoPE = FLUX_ROPE
    time_embedding: Any = FLOW_TIME
    step_embedding: Any = None
    attention: Attention = attend
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1

    def build(self, *, key) -> "Flux":
        """The network, with random weights."""
        return Flux(**arguments(self), key=key)


class Flux(eqx.Module):
    """FLUX.1's transformer `(x_t, t, cond) -> out`, one example at a time.

    `cond` is `nn.Conditioning`: `tokens` `(m, context_size)` of the text, a `vector`
    `(pooled_size,)`, a `mask` of the tokens or None (the published networks were trained without),
    and for a network with `guidance` the scale as `numbers`, `jnp.array([3.5])`: it was distilled
    from classifier-free guidance, and needs no second call. `t` in [0, 1] is read as `1000 t`, and
    so is the scale.

    **Arguments**:

    - `in_channels`: of the latent, whose height and width divide by `patch_size`.
    - `depth`, `single_depth`: how many `JointBlock`s, and how many `SingleBlock`s after them, on
      text and image as one sequence. `width`, `num_heads`: their sizes.
    - `context_size`, `pooled_size`: of a token and of the vector of the condition.

    `options`, the other fields of `FluxConfig`:

    - `guidance`: whether the network is told a guidance scale.
    - `patch_size`; `out_channels`, None means `in_channels`; `mlp_ratio`, the hidden units of the
      MLPs in widths; `embed_cond`, a function or module from another condition to
      `nn.Conditioning`.
    - `rope`: rotary positions of three axes, whose sizes add up to at most the head size: one that
      is 0 for all tokens, the row, and the column. Text lies at 0.
    - `time_embedding`, `step_embedding`, `attention`, `remat`, `unroll`: as in `DiT`.

    Every modulation and the last layer start at zero, so the untrained network outputs 0. It
    computes in the dtype of `x_t`; time, guidance, the pooled vector, the norms' statistics, the
    rotations and the softmax are float32. `config` is its `FluxConfig`.

    **Raises** `ValueError` for sizes that do not fit, on construction, and for an `x_t`, a `cond`
    or an `h` that the network was not made for.

    >>> from eqxldm.nn import Conditioning
    >>> flux = Flux(4, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
    ...             pooled_size=5, guidance=True, rope=RoPE((4, 2, 2)), key=jax.random.key(0))
    >>> cond = Conditioning(jnp.ones(5), jnp.ones((3, 6)), numbers=jnp.array([3.5]))
    >>> flux(jnp.ones((4, 8, 12)), jnp.array(0.5), cond).shape
    (4, 8, 12)
    """

    patch_embedding: Linear
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    guidance_embedding: Callable[..., Any] | None
    pooled_embedding: VectorEmbedding
    context_embedding: Linear
    embed_cond: Callable[..., Any] | None
    blocks: Stack
    single_blocks: Stack
    final_modulation: Modulation
    final_linear: Linear
    config: FluxConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        depth: int,
        single_depth: int,
        width: int,
        num_heads: int,
        context_size: int,
        pooled_size: int,
        key,
        **options: Any,
    ):
        sizes = dict(in_channels=in_channels, depth=depth, single_depth=single_depth, width=width)
        sizes |= dict(num_heads=num_heads, context_size=context_size, pooled_size=pooled_size)
        config = _completed(make_record(FluxConfig, "Flux", sizes | options))
        ks = jax.random.split(key, 10)
        area = config.patch_size**2
        self.patch_embedding = Linear(in_channels * area, width, key=ks[0])
        # A part that was given as a module is used as it is; the record only describes it.
        part = lambda name: options.get(name, getattr(config, name))
        self.time_embedding = build_part(part("time_embedding"), width, key=ks[1])
        self.step_embedding = build_part(part("step_embedding"), width, key=ks[2])
        scale = FLOW_TIME.build(width, key=ks[3]) if config.guidance else None
        self.guidance_embedding = scale
        self.pooled_embedding = VectorEmbedding(pooled_size, width, key=ks[4])
        self.context_embedding = Linear(context_size, width, key=ks[5])
        self.embed_cond = build_part(part("embed_cond"), key=ks[6])
        block = width, num_heads, config.mlp_ratio
        joint = lambda k: JointBlock(*block, qk_norm=RMSNorm, attention=config.attention, key=k)
        single = lambda k: SingleBlock(*block, attention=config.attention, key=k)
        repeat: dict[str, Any] = dict(remat=config.remat, unroll=config.unroll)
        self.blocks = Stack(joint, depth, **repeat, key=ks[7])
        self.single_blocks = Stack(single, single_depth, **repeat, key=ks[8])
        self.final_modulation = Modulation(width, 2, key=ks[9])
        out: Any = config.out_channels
        self.final_linear = Linear(width, out * area, init=zeros, key=ks[9])
        self.config = config

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        cond: PyTree,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out h w"]:
        ours = self.config
        if x_t.shape[0] != ours.in_channels:
            raise ValueError(f"Flux: need {ours.in_channels} channels, got {x_t.shape[0]}.")
        grid, _ = patch_grid(x_t.shape[1:], ours.patch_size, "Flux")
        cond = cond if self.embed_cond is None else self.embed_cond(cond)
        check_conditioning("Flux", cond, ours.context_size, ours.pooled_size)
        self._check_guidance(cond.numbers)
        time = embed_times("Flux", self.time_embedding, self.step_embedding, t, h)
        if self.guidance_embedding is not None:
            time = time + self.guidance_embedding(cond.numbers[0])
        c = time + self.pooled_embedding(cond.vector.astype(time.dtype))
        c, text = c.astype(x_t.dtype), self.context_embedding(cond.tokens.astype(x_t.dtype))
        image, before, mask = self.patch_embedding(patchify(x_t, ours.patch_size)), len(text), None
        if cond.mask is not None:
            mask = jnp.concatenate([cond.mask, jnp.ones(len(image), bool)])
        rotation = ours.rope(flux_positions(before, grid))
        text, image = self.blocks((text, image), c, mask, rotation)
        x = self.single_blocks(jnp.concatenate([text, image]), c, mask, rotation)[before:]
        shift, scale = self.final_modulation(c)
        out = self.final_linear(modulate(layer_norm(x), shift, scale))
        return unpatchify(out, x_t.shape[1:], ours.patch_size, channels_first=True)

    def _check_guidance(self, numbers: Any) -> None:
        needed = self.guidance_embedding is not None
        if needed and (numbers is None or numbers.shape != (1,)):
            shape = None if numbers is None else numbers.shape
            raise ValueError(
                "Flux: the network is told the guidance scale: cond must have it as numbers, "
                f"jnp.array([3.5]); got numbers of shape {shape}."
            )
        if not needed and numbers is not None:
            raise ValueError(
                "Flux: the network takes no guidance scale: leave numbers of cond at None, or make "
                "it with guidance=True."
            )


def flux_positions(before: int, grid: tuple[int, ...]) -> Float[np.ndarray, "n 3"]:
    """The three positions of `before` tokens of text, all 0, and of an image's: `(0, row, column)`.

    >>> flux_positions(1, (1, 2)).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    places = grid_positions(grid)
    places = np.concatenate([np.zeros((len(places), 1)), places], axis=1)
    return np.concatenate([np.zeros((before, 3)), places])


def _completed(config: FluxConfig) -> FluxConfig:
    """The configuration without a default left open, checked."""
    out = config.in_channels if config.out_channels is None else config.out_channels
    numbers = dict(in_channels=config.in_channels, out_channels=out, patch_size=config.patch_size)
    numbers |= dict(depth=config.depth, single_depth=config.single_depth, width=config.width)
    numbers |= dict(context_size=config.context_size, pooled_size=config.pooled_size)
    if min(numbers.values()) < 1:
        shown = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ValueError(f"Flux: every size must be at least 1, got {shown}.")
    check_heads(config.width, config.num_heads)
    sizes, head = config.rope.sizes, config.width // config.num_heads
    if len(sizes) != 3 or sum(sizes) > head:
        raise ValueError(
            f"Flux: rope needs three sizes that add up to at most the head size {head}, got "
            f"{sizes}."
        )
    return replace(config, out_channels=out)


def _published(name: str, guidance: bool, what: str):
    """The constructor of a published network: both have the same sizes."""

    def make(*, key, **options: Any) -> Flux:
        sizes: dict[str, Any] = dict(depth=19, single_depth=38, width=3072, num_heads=24)
        sizes |= dict(context_size=4096, pooled_size=768, guidance=guidance) | options
        return Flux(16, **sizes, key=key)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""{what}: 19 blocks of two streams, 38 of one, 3072 wide.

    Latents have 16 channels; tokens are (512, 4096) of T5, the vector (768,) of CLIP. `options` are
    further arguments of `Flux`.

    >>> flux = eqx.filter_eval_shape({name}, key=jax.random.key(0))
    >>> flux.final_linear.weight.shape
    (64, 3072)
    """
    return make


flux1_dev = _published("flux1_dev", True, "FLUX.1 dev, which is told a guidance scale")
flux1_schnell = _published("flux1_schnell", False, "FLUX.1 schnell, for four steps")
