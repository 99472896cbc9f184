"""UNet: the convolutional denoiser of DDPM (Ho et al. 2020) and of Stable Diffusion 1."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..nn.attention import Attention, attend
from ..nn.conv import Conv, upsample_nearest
from ..nn.embeddings import LabelEmbedding, TimeEmbedding, condition_vector
from ..nn.linear import xavier_uniform
from ..nn.norms import GroupNorm
from ..nn.resnet import AttentionBlock, ConditionedResnetBlock
from ..nn.spatial_transformer import SpatialTransformer

Block = AttentionBlock | SpatialTransformer


class UNetLevel(eqx.Module):
    """One resolution: residual blocks, an attention after each or none, and a resampling."""

    resnets: list[ConditionedResnetBlock]
    attentions: list[Block]
    resample: Conv | None


class UNet(eqx.Module):
    """A U-Net `(x_t, t, cond) -> out`, one example at a time; called as `DiT` is.

    **Arguments**:

    - `in_channels`: of the input, whose height and width are any that divide by
      `2^(len(channels) - 1)`.
    - `out_channels`: None means `in_channels`; `2 in_channels` holds the prediction and then the
      variance's part, as `eqxldm.LearnedRange` reads it.
    - `channels`: the width of each level; every further level halves the resolution.
    - `blocks`: residual blocks a level on the way down, one more on the way up.
    - `attention_levels`: for each level, whether an attention follows each of its residual blocks.
      `middle_attention`: the same for the one in the middle.
    - `context_size`: None: attentions are self-attention (`nn.AttentionBlock`). A number: they are
      transformers (`nn.SpatialTransformer`) with cross-attention to a context, an array
      `(tokens, context_size)`. `transformer_depth`: blocks in each; `linear_projection`: see there.
    - `num_heads`: of every attention, or one number a level.
    - `num_classes` or `embed_cond`: a label or any other condition, added to the embedding of the
      time as in `DiT`. `has_null=False` leaves out the row for "no label".
    - `groups`, `norm_eps`: of every GroupNorm; `groups` divides every width.
    - `time_width`: of the embedding of the time; None means `4 channels[0]`. `freq_shift` and
      `sin_first` are those of `nn.sinusoidal`.
    - `downsample_padding`: zeros (before, after) each side at the stride-2 convolutions.
    - `attention`: `nn.attend`, or `nn.cudnn_attend` for bfloat16 on a GPU.
    - `remat`: a `jax.checkpoint` policy for every residual block with its attention; None keeps
      all their activations.

    `cond` is what the network was made for: a label (`num_classes`), what `embed_cond` takes, a
    context (`context_size`), the pair `(label, context)` for both, or None for neither.

    On the way down the stem's output and that of every block and downsampling is kept; on the way
    up each block sees one of them, last one first, concatenated to its input. The second
    convolution of a residual block, the last map of an attention and the head start at zero, so
    the untrained network outputs 0; labels start as `N(0, 1)`. Dropout is left out. The network
    computes in the dtype of `x_t`; the time, the norms' statistics and the softmax are float32.

    **Raises** `ValueError` for sizes that do not divide or lists of another length, on
    construction, and for an `x_t` that does not fit or a `cond` that it was not made for.

    >>> unet = UNet(1, channels=(8, 16), blocks=1, attention_levels=(False, True),
    ...             num_classes=10, groups=4, key=jax.random.key(0))
    >>> unet(jnp.ones((1, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
    (1, 8, 8)
    """

    stem: Conv
    time_embedding: TimeEmbedding
    label_embedding: Callable[..., Any] | None  # or `embed_cond`; None: no such condition
    downs: list[UNetLevel]
    middle: UNetLevel
    ups: list[UNetLevel]
    norm: GroupNorm
    head: Conv
    context_size: int | None = eqx.field(static=True)
    remat: Callable[..., Any] | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        channels: tuple[int, ...],
        blocks: int,
        attention_levels: tuple[bool, ...],
        middle_attention: bool = True,
        context_size: int | None = None,
        num_heads: int | tuple[int, ...] = 1,
        transformer_depth: int = 1,
        linear_projection: bool = False,
        num_classes: int | None = None,
        has_null: bool = True,
        embed_cond: Callable[..., Any] | None = None,
        groups: int = 32,
        norm_eps: float = 1e-5,
        time_width: int | None = None,
        freq_shift: int = 0,
        sin_first: bool = False,
        downsample_padding: tuple[int, int] = (1, 1),
        attention: Attention = attend,
        remat: Callable[..., Any] | None = None,
        key,
    ):
        levels = len(channels)
        num_heads = (num_heads,) * levels if isinstance(num_heads, int) else num_heads
        out_channels = in_channels if out_channels is None else out_channels
        _check(
            in_channels, out_channels, channels, blocks, attention_levels, num_heads, context_size
        )
        if num_classes is not None and embed_cond is not None:
            raise ValueError("UNet: give num_classes or embed_cond, not both.")
        d = 4 * channels[0] if time_width is None else time_width
        keys = iter(jax.random.split(key, 16 + 4 * levels * (blocks + 2)))

        def resnet(width: int, out: int) -> ConditionedResnetBlock:
            return ConditionedResnetBlock(
                width, out, d, groups=groups, norm_eps=norm_eps, key=next(keys)
            )

        def attend_at(width: int, n: int) -> Block:
            common: dict[str, Any] = dict(num_heads=n, groups=groups, attention=attention)
            if context_size is None:
                return AttentionBlock(width, norm_eps=norm_eps, **common, key=next(keys))
            common |= dict(depth=transformer_depth, linear=linear_projection)
            return SpatialTransformer(width, context_size, **common, key=next(keys))

        def make_level(widths: list[tuple[int, int]], i: int, resample: Conv | None) -> UNetLevel:
            attentions = [attend_at(b, num_heads[i]) for _, b in widths if attention_levels[i]]
            return UNetLevel([resnet(a, b) for a, b in widths], attentions, resample)

        self.stem = Conv(in_channels, channels[0], 3, key=next(keys))
        self.time_embedding = TimeEmbedding(
            d,
            frequencies=channels[0],
            freq_shift=freq_shift,
            sin_first=sin_first,
            init=xavier_uniform,
            key=next(keys),
        )
        self.label_embedding = embed_cond
        if num_classes is not None:
            self.label_embedding = LabelEmbedding(
                num_classes, d, has_null=has_null, stddev=1.0, key=next(keys)
            )
        self.downs, skips, width, side = [], [channels[0]], channels[0], downsample_padding
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
            [attend_at(width, num_heads[-1])] if middle_attention else [],
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
        self.head = Conv(width, out_channels, 3, gain=0.0, key=next(keys))
        self.context_size, self.remat = context_size, remat

    @property
    def null(self) -> Int[Array, ""]:
        """The label that means "no label"; a `ValueError` if the network has no such label.

        Where `cond` is a pair `(label, context)`, the null condition is a pair too: this label and
        the context of "no text".
        """
        if not isinstance(self.label_embedding, LabelEmbedding):
            raise ValueError("UNet: only a network with num_classes has a null label.")
        return self.label_embedding.null

    def __call__(
        self,
        x_t: Float[Array, "c h w"],
        t: Float[Array, ""],
        cond: PyTree = None,
        *,
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
        label, context = self._split(cond)
        c = condition_vector("UNet", self.time_embedding(t), self.label_embedding, label)
        c = c.astype(x_t.dtype)
        context = None if context is None else context.astype(x_t.dtype)

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

    def _split(self, cond: PyTree) -> tuple[PyTree, Any]:
        """The condition that is added to the time, and the context."""
        if self.context_size is None:
            return cond, None
        label, context = None, cond
        if self.label_embedding is not None:
            if not isinstance(cond, tuple) or len(cond) != 2:
                raise ValueError("UNet: cond must be a pair (label, context).")
            label, context = cond
        shape = getattr(context, "shape", None)
        if shape is None or len(shape) != 2 or shape[1] != self.context_size:
            raise ValueError(
                f"UNet: the context must be an array (tokens, {self.context_size}), got "
                f"{type(context).__name__ if shape is None else shape}."
            )
        return label, context

    def _apply(self, resnet, attentions, x, c, context) -> Float[Array, "h w c"]:
        """A residual block and the attention after it, if there is one."""

        def run(blocks, x):
            resnet, attentions = blocks
            x = resnet(x, c)
            for block in attentions:
                x = block(x) if context is None else block(x, context)
            return x

        if self.remat is not None:
            run = eqx.filter_checkpoint(run, policy=self.remat)
        return run((resnet, attentions), x)


def _pairs(level: UNetLevel) -> list[tuple[ConditionedResnetBlock, list[Block]]]:
    """Each residual block with the attention after it, as a list of none or one."""
    after = [[block] for block in level.attentions] or [[]] * len(level.resnets)
    return list(zip(level.resnets, after, strict=True))


def _check(
    in_channels, out_channels, channels, blocks, attention_levels, num_heads, context_size
) -> None:
    sizes = dict(
        in_channels=(in_channels,),
        out_channels=(out_channels,),
        channels=channels,
        blocks=(blocks,),
        num_heads=num_heads,
        context_size=() if context_size is None else (context_size,),
    )
    if not channels or min(size for group in sizes.values() for size in group) < 1:
        listed = ", ".join(f"{name} {group}" for name, group in sizes.items())
        raise ValueError(f"UNet: need at least one level and sizes of at least 1, got {listed}.")
    for name, values in (("attention_levels", attention_levels), ("num_heads", num_heads)):
        if len(values) != len(channels):
            raise ValueError(
                f"UNet: {name} needs one entry for each of the {len(channels)} levels of channels, "
                f"got {values}."
            )


def unet_sd1(in_channels: int = 4, context_size: int = 768, *, key, **options: Any) -> UNet:
    """Stable Diffusion 1.x's U-Net (Rombach et al. 2022): 859,520,964 parameters.

    There inputs are 4 x 64 x 64 and `cond`, the context, is `(77, 768)` from CLIP. `options` are
    further arguments of `UNet`.

    >>> unet = eqx.filter_eval_shape(unet_sd1, key=jax.random.key(0))
    >>> unet.downs[0].resnets[0].block.conv1.weight.shape
    (3, 3, 320, 320)
    """
    sizes: dict[str, Any] = dict(channels=(320, 640, 1280, 1280), blocks=2, num_heads=8)
    sizes |= dict(attention_levels=(True, True, True, False), context_size=context_size)
    return UNet(in_channels, **{**sizes, **options}, key=key)


def unet_ddpm(in_channels: int = 3, *, key, **options: Any) -> UNet:
    """DDPM's U-Net for 32 x 32 pixels (Ho et al. 2020, appendix B): 35,746,307 parameters.

    `options` are further arguments of `UNet`.

    >>> unet = eqx.filter_eval_shape(unet_ddpm, key=jax.random.key(0))
    >>> unet.stem.weight.shape
    (3, 3, 3, 128)
    """
    sizes: dict[str, Any] = dict(channels=(128, 256, 256, 256), blocks=2, norm_eps=1e-6)
    sizes |= dict(attention_levels=(False, True, False, False), downsample_padding=(0, 1))
    sizes |= dict(freq_shift=1, sin_first=True)
    return UNet(in_channels, **{**sizes, **options}, key=key)
