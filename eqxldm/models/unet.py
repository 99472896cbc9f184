"""UNet: the convolutional denoiser of DDPM (Ho et al. 2020) and of Stable Diffusion 1, 2, XL."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import Attention, AttentionBlock, attend
from ..nn.conditioning import Conditioning, embed_condition, embed_times
from ..nn.conv import Conv, upsample_nearest
from ..nn.embeddings import LabelEmbedding, Sinusoid, VectorEmbedding
from ..nn.linear import xavier_uniform
from ..nn.norms import GroupNorm
from ..nn.resnet import ConditionedResnetBlock
from ..nn.spatial_transformer import SpatialTransformer
from .config import arguments, build_part, make_record

Block = AttentionBlock | SpatialTransformer


class UNetLevel(eqx.Module):
    """One resolution: residual blocks, an attention after each or none, and a resampling."""

    resnets: list[ConditionedResnetBlock]
    attentions: list[Block]
    resample: Conv | None


@dataclass(frozen=True)
class UNetConfig:
    """How a `UNet` was made: the arguments of its constructor, all of them explained there.

    `num_heads` and `transformer_depth` have an entry a level.

    >>> config = UNetConfig(1, (8, 16), 1, (False, True), groups=4)
    >>> config.build(key=jax.random.key(0)).config.num_heads
    (1, 1)
    """

    in_channels: int
    channels: tuple[int, ...]
    blocks: int
    attention_levels: tuple[bool, ...]
    num_classes: int | None = None
    context_size: int | None = None
    embed_cond: Any = None
    out_channels: int | None = None
    middle_attention: bool = True
    num_heads: int | tuple[int, ...] = 1
    transformer_depth: int | tuple[int, ...] = 1
    linear_projection: bool = False
    added_size: int | None = None
    number_size: int = 256
    groups: int = 32
    norm_eps: float = 1e-5
    time_width: int | None = None
    time_embedding: Any = None
    step_embedding: Any = None
    downsample_padding: tuple[int, int] = (1, 1)
    attention: Attention = attend
    remat: Callable[..., Any] | None = None

    def build(self, *, key) -> "UNet":
        """The network, with random weights."""
        return UNet(**arguments(self), key=key)


class UNet(eqx.Module):
    """A U-Net `(x_t, t, cond) -> out`, one example at a time; called as `DiT` is.

    **Arguments**:

    - `in_channels`: of the input, whose height and width are any that divide by
      `2^(len(channels) - 1)`.
    - `channels`: the width of each level; every further level halves the resolution.
    - `blocks`: residual blocks a level on the way down, one more on the way up.
    - `attention_levels`: for each level, whether an attention follows each of its residual blocks.
    - `num_classes`: a label, whose vector is added to the embedding of the time as in `DiT`.
    - `context_size`: None: attentions are self-attention (`nn.AttentionBlock`). A number: they are
      transformers (`nn.SpatialTransformer`) with cross-attention to the condition's tokens, of so
      many numbers each.
    - `embed_cond`: any other condition, as in `DiT`, with tokens where there is a `context_size`.

    `options`, the other fields of `UNetConfig`:

    - `out_channels`: None means `in_channels`; `2 in_channels` holds the prediction and then the
      variance's part, as `eqxldm.LearnedRange` reads it.
    - `middle_attention`: whether there is one in the middle too. `num_heads`: of every attention,
      or one number a level. `transformer_depth`: blocks in each `nn.SpatialTransformer`, alike;
      `linear_projection`: see there.
    - `added_size`: of what is told with the time, through an MLP: the `vector` of the condition,
      then the waves of each of its `numbers`, `number_size` of them (Podell et al. 2023, section
      2.2). SDXL has 2816: the pooled text's 1280 and six numbers of 256, the height and width of
      the original picture, top and left of the crop, height and width of what is wanted.
    - `groups`, `norm_eps`: of every GroupNorm; `groups` divides every width.
    - `time_width`: of the embedding of the time; None means `4 channels[0]`. `time_embedding` and
      `step_embedding` are those of `DiT`; None is `nn.Sinusoid(size=channels[0])` for the time.
    - `downsample_padding`: zeros (before, after) each side at the stride-2 convolutions.
    - `attention`: `nn.attend`; `nn.cudnn_attend` for bfloat16 on a GPU, `nn.flash_attend` for many
      tokens on a TPU.
    - `remat`: a `jax.checkpoint` policy for every residual block with its attention; None keeps
      all their activations.

    `cond` is what the network was made for: a label (`num_classes`), what `embed_cond` takes, or
    None. With a `context_size` and without `embed_cond` it is the context: an array `(tokens,
    context_size)`, or `nn.Conditioning` with a mask; with labels it is the pair `(label, context)`.
    With an `added_size` the context is `nn.Conditioning` with `vector`, `tokens` and `numbers`.

    On the way down the stem's output and that of every block and downsampling is kept; on the way
    up each block sees one of them, last one first, concatenated to its input. The second
    convolution of a residual block, the last map of an attention and the head start at zero, so
    the untrained network outputs 0; labels start as `N(0, 1)`. Dropout is left out. The network
    computes in the dtype of `x_t`; the time, the norms' statistics and the softmax are float32.
    `config` is its `UNetConfig`.

    **Raises** `ValueError` for sizes that do not divide or lists of another length, on
    construction, and for an `x_t` that does not fit, a `cond` or an `h` that it was not made for.

    >>> unet = UNet(1, channels=(8, 16), blocks=1, attention_levels=(False, True),
    ...             num_classes=10, groups=4, key=jax.random.key(0))
    >>> unet(jnp.ones((1, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
    (1, 8, 8)
    """

    stem: Conv
    time_embedding: Callable[..., Any]
    step_embedding: Callable[..., Any] | None
    embed_cond: Callable[..., Any] | None  # a table of labels, or the argument
    added_embedding: VectorEmbedding | None
    downs: list[UNetLevel]
    middle: UNetLevel
    ups: list[UNetLevel]
    norm: GroupNorm
    head: Conv
    config: UNetConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        channels: tuple[int, ...],
        blocks: int,
        attention_levels: tuple[bool, ...],
        num_classes: int | None = None,
        context_size: int | None = None,
        embed_cond: Callable[..., Any] | Any = None,
        key,
        **options: Any,
    ):
        sizes = dict(in_channels=in_channels, channels=channels, blocks=blocks)
        sizes |= dict(attention_levels=attention_levels, num_classes=num_classes)
        sizes |= dict(context_size=context_size, embed_cond=embed_cond)
        config = _completed(make_record(UNetConfig, "UNet", sizes | options))
        levels, groups, norm_eps = len(channels), config.groups, config.norm_eps
        # One a level, and a width: `_completed` saw to it.
        num_heads: Any = config.num_heads
        depths: Any = config.transformer_depth
        d: Any = config.time_width
        keys = iter(jax.random.split(key, 16 + 4 * levels * (blocks + 2)))

        def resnet(width: int, out: int) -> ConditionedResnetBlock:
            return ConditionedResnetBlock(
                width, out, d, groups=groups, norm_eps=norm_eps, key=next(keys)
            )

        def attend_at(width: int, i: int) -> Block:
            common: dict[str, Any] = dict(num_heads=num_heads[i], groups=groups)
            common |= dict(attention=config.attention)
            if context_size is None:
                return AttentionBlock(width, norm_eps=norm_eps, **common, key=next(keys))
            common |= dict(depth=depths[i], linear=config.linear_projection)
            return SpatialTransformer(width, context_size, **common, key=next(keys))

        def make_level(widths: list[tuple[int, int]], i: int, resample: Conv | None) -> UNetLevel:
            attentions = [attend_at(b, i) for _, b in widths if attention_levels[i]]
            return UNetLevel([resnet(a, b) for a, b in widths], attentions, resample)

        self.stem = Conv(in_channels, channels[0], 3, key=next(keys))
        time_key = next(keys)
        # A part that was given as a module is used as it is; the record only describes it.
        time = options.get("time_embedding") or config.time_embedding
        step = options.get("step_embedding")
        self.time_embedding = _times(time, d, time_key)
        self.step_embedding = _times(step, d, jax.random.fold_in(time_key, 1))
        if num_classes is not None:
            self.embed_cond = LabelEmbedding(num_classes, d, stddev=1.0, key=next(keys))
        else:
            self.embed_cond = build_part(embed_cond, key=jax.random.fold_in(time_key, 2))
        self.added_embedding = None
        if config.added_size is not None:
            k = jax.random.fold_in(time_key, 3)
            self.added_embedding = VectorEmbedding(config.added_size, d, init=xavier_uniform, key=k)
        self.downs, skips, width, side = [], [channels[0]], channels[0], config.downsample_padding
        for i, out in enumerate(channels):
            down = None
            if i < levels - 1:
                down = Conv(out, out, 3, stride=2, padding=(side, side), key=next(keys))
            widths = list(pairwise([width] + [out] * blocks))
            self.downs.append(make_level(widths, i, down))
            skips += [out] * (blocks + (down is not None))
            width = out
        self.middle = UNetLevel(
            [resnet(width, width), resnet(width, width)],
            [attend_at(width, -1)] if config.middle_attention else [],
            None,
        )
        self.ups = []
        for i in reversed(range(levels)):
            out, widths = channels[i], []
            for _ in range(blocks + 1):
                widths.append((width + skips.pop(), out))
                width = out
            up = Conv(out, out, 3, key=next(keys)) if i > 0 else None
            self.ups.append(make_level(widths, i, up))
        self.norm = GroupNorm(width, groups, norm_eps)
        self.head = Conv(width, config.out_channels, 3, gain=0.0, key=next(keys))
        self.config = config

    @property
    def null(self) -> Int[Array, ""]:
        """The label that means "no label"; a `ValueError` if the network has no such label.

        Where `cond` is a pair `(label, context)`, the null condition is a pair too: this label and
        the context of "no text".
        """
        if not isinstance(self.embed_cond, LabelEmbedding):
            raise ValueError("UNet: only a network with num_classes has a null label.")
        return self.embed_cond.null

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
        h: Float[Array, ""] | float | None = None,
        key: PyTree | None = None,
    ) -> Float[Array, "c_out h w"]:
        channels, factor = self.stem.weight.shape[2], 2 ** (len(self.downs) - 1)
        if x_t.shape[0] != channels:
            raise ValueError(f"UNet: need {channels} channels, got {x_t.shape[0]}.")
        if x_t.shape[1] % factor or x_t.shape[2] % factor:
            raise ValueError(
                f"UNet: a {x_t.shape[1]} x {x_t.shape[2]} input does not divide by {factor}, as "
                f"{len(self.downs)} levels need."
            )
        time = embed_times("UNet", self.time_embedding, self.step_embedding, t, h)
        conditioning = self._embedded(time, cond)
        c: Any = conditioning.vector
        c, tokens = c.astype(x_t.dtype), conditioning.tokens
        context = (None if tokens is None else tokens.astype(x_t.dtype), conditioning.mask)

        x = self.stem(jnp.moveaxis(x_t, 0, -1))
        skips = [x]
        for level in self.downs:
            for resnet, attention in _pairs(level):
                x = self._apply(resnet, attention, x, c, context)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        first, last = self.middle.resnets
        for resnet, attention in ((first, self.middle.attentions), (last, [])):
            x = self._apply(resnet, attention, x, c, context)
        for level in self.ups:
            for resnet, attention in _pairs(level):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._apply(resnet, attention, x, c, context)
            if level.resample is not None:
                x = level.resample(upsample_nearest(x))
        return jnp.moveaxis(self.head(jax.nn.silu(self.norm(x))), -1, 0)

    def _embedded(self, time: Float[Array, " d"], cond: PyTree) -> Conditioning:
        """The condition as the blocks take it: the time's vector with what is added, the tokens."""
        if self.config.context_size is None:
            found = embed_condition("UNet", time, self.embed_cond, cond)
            if found.tokens is not None:
                raise ValueError(
                    "UNet: embed_cond gives tokens, but the network has no cross-attention. Make "
                    f"it with context_size={found.tokens.shape[-1]}."
                )
            return found
        labels = self.embed_cond if isinstance(self.embed_cond, LabelEmbedding) else None
        if self.embed_cond is not labels and self.added_embedding is None:
            found = embed_condition("UNet", time, self.embed_cond, cond)
            self._check_context(found.tokens)
            return found
        label, context = None, cond
        if labels is not None:
            if not isinstance(cond, tuple) or len(cond) != 2:
                raise ValueError("UNet: cond must be a pair (label, context).")
            label, context = cond
        elif self.embed_cond is not None:
            context = self.embed_cond(cond)
        vector: Any = embed_condition("UNet", time, labels, label).vector
        if not isinstance(context, Conditioning):
            self._check_context(context)
            context = Conditioning(tokens=context)
        self._check_context(context.tokens)
        vector = vector + self._added(context, vector.dtype)
        return Conditioning(vector, context.tokens, context.mask)

    def _added(self, context: Conditioning, dtype: Any) -> Array | float:
        """What the vector and the numbers of the condition add to the embedding of the time."""
        vector, numbers, ours = context.vector, context.numbers, self.config
        counts = [0 if part is None else part.shape[-1] for part in (vector, numbers)]
        if self.added_embedding is None:
            if any(counts):
                raise ValueError(
                    "UNet: cond has a vector or numbers, and the network takes tokens alone. Leave "
                    "them at None, or make it with added_size."
                )
            return 0.0
        if counts[0] + ours.number_size * counts[1] != ours.added_size:
            raise ValueError(
                f"UNet: cond must be nn.Conditioning with a vector and numbers, together "
                f"{ours.added_size} features, {ours.number_size} a number; got {counts[0]} in the "
                f"vector and {counts[1]} numbers."
            )
        time = ours.time_embedding if isinstance(ours.time_embedding, Sinusoid) else Sinusoid()
        waves = replace(time, scale=1.0, offset=0.0, size=ours.number_size)
        parts = [] if vector is None else [vector.astype(dtype)]
        parts += [] if numbers is None else [waves(number.astype(dtype)) for number in numbers]
        return self.added_embedding(jnp.concatenate(parts))

    def _check_context(self, context: Any) -> None:
        shape, size = getattr(context, "shape", None), self.config.context_size
        if shape is None or len(shape) != 2 or shape[1] != size:
            raise ValueError(
                f"UNet: the context must be an array (tokens, {size}), got "
                f"{type(context).__name__ if shape is None else shape}."
            )

    def _apply(self, resnet, attentions, x, c, context) -> Float[Array, "h w c"]:
        """A residual block and the attention after it, if there is one."""

        def run(blocks, x):
            resnet, attentions = blocks
            x = resnet(x, c)
            for block in attentions:
                x = block(x) if context[0] is None else block(x, *context)
            return x

        if self.config.remat is not None:
            run = eqx.filter_checkpoint(run, policy=self.config.remat)
        return run((resnet, attentions), x)


def _pairs(level: UNetLevel) -> list[tuple[ConditionedResnetBlock, list[Block]]]:
    """Each residual block with the attention after it, as a list of none or one."""
    after = [[block] for block in level.attentions] or [[]] * len(level.resnets)
    return list(zip(level.resnets, after, strict=True))


def _times(part: Any, width: int, key: Any) -> Any:
    return part.build(width, init=xavier_uniform, key=key) if isinstance(part, Sinusoid) else part


def _completed(config: UNetConfig) -> UNetConfig:
    """The configuration without a default left open, checked."""
    channels, levels = config.channels, len(config.channels)
    each = lambda value: (value,) * levels if isinstance(value, int) else value
    num_heads, depths = each(config.num_heads), each(config.transformer_depth)
    config = replace(
        config,
        num_heads=num_heads,
        transformer_depth=depths,
        out_channels=config.in_channels if config.out_channels is None else config.out_channels,
    )
    sizes: dict[str, Any] = dict(
        in_channels=(config.in_channels,),
        out_channels=(config.out_channels,),
        channels=channels,
        blocks=(config.blocks,),
        num_heads=num_heads,
        transformer_depth=depths,
        context_size=() if config.context_size is None else (config.context_size,),
    )
    if not channels or min(size for group in sizes.values() for size in group) < 1:
        listed = ", ".join(f"{name} {group}" for name, group in sizes.items())
        raise ValueError(f"UNet: need at least one level and sizes of at least 1, got {listed}.")
    for name in ("attention_levels", "num_heads", "transformer_depth"):
        if len(getattr(config, name)) != levels:
            raise ValueError(
                f"UNet: {name} needs one entry for each of the {levels} levels of channels, "
                f"got {getattr(config, name)}."
            )
    if config.added_size is not None and (config.added_size < 1 or config.context_size is None):
        raise ValueError(
            f"UNet: added_size must be positive and needs a context_size; got "
            f"{config.added_size} and {config.context_size}."
        )
    if config.num_classes is not None and config.embed_cond is not None:
        raise ValueError("UNet: give num_classes or embed_cond, not both.")
    time = Sinusoid(size=channels[0]) if config.time_embedding is None else config.time_embedding
    width = 4 * channels[0] if config.time_width is None else config.time_width
    return replace(config, time_embedding=time, time_width=width)
