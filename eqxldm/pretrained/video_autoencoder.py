"""CausalVideoAutoencoder: the names of diffusers' AutoencoderKLWan and of Wan's own files."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..models import CausalVideoAutoencoder
from ..models.video_autoencoder_sizes import WAN21_MEAN, WAN21_STD
from ..nn import AttentionBlock, CausalResnetBlock
from .layout import Layout, Part
from .parts import Leaves, conv, linear
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    base_dim=96, decoder_base_dim=None, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
    attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0,
    latents_mean=list(WAN21_MEAN), latents_std=list(WAN21_STD), is_residual=False, in_channels=3,
    out_channels=3, patch_size=None, scale_factor_temporal=4, scale_factor_spatial=8,
)  # fmt: skip
# The layers of a residual block, ours to theirs; norms have a `gamma`.
DIFFUSERS_RESNET = dict(
    norm1="norm1", conv1="conv1", norm2="norm2", conv2="conv2", shortcut="conv_shortcut"
)
ORIGINAL_RESNET = dict(
    norm1="residual.0", conv1="residual.2", norm2="residual.3", conv2="residual.6",
    shortcut="shortcut",
)  # fmt: skip


def from_diffusers(config: dict[str, Any], *, key) -> CausalVideoAutoencoder:
    """The module of a diffusers `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(base_dim=8, dim_mult=[1, 2], temperal_downsample=[True])
    >>> from_diffusers(sizes, key=jax.random.key(0)).config.channels
    (8, 16)
    """
    given = DIFFUSERS_DEFAULTS | config
    base, mult, latent = given["base_dim"], list(given["dim_mult"]), given["z_dim"]
    patch = given["patch_size"] or 1
    needed = dict(attn_scales=[], out_channels=given["in_channels"])
    wrong = []
    if mult[:1] != [1]:
        wrong.append(f"dim_mult = {mult} (1 first)")
    if len(given["temperal_downsample"]) != len(mult) - 1:
        wrong.append(f"temperal_downsample = {given['temperal_downsample']} (one less than levels)")
    if given["in_channels"] % patch**2:
        wrong.append(f"in_channels = {given['in_channels']} (a multiple of patch_size^2)")
    for name in ("latents_mean", "latents_std"):
        values = given[name]
        if not isinstance(values, list | tuple) or len(values) != latent:
            wrong.append(f"{name} = {values!r} ({latent} numbers)")
    if not wrong and min(given["latents_std"]) <= 0:
        wrong.append(f"latents_std = {given['latents_std']!r} (positive numbers)")
    refuse_options("CausalVideoAutoencoder", given, needed, wrong)
    return CausalVideoAutoencoder(
        given["in_channels"] // patch**2,
        latent,
        channels=tuple(base * m for m in mult),
        blocks=given["num_res_blocks"],
        decoder_channels=tuple((given["decoder_base_dim"] or base) * m for m in mult),
        decoder_blocks=given["num_res_blocks"] + 1,
        time_levels=tuple(given["temperal_downsample"]),
        patch_size=patch,
        shortcuts=given["is_residual"],
        shift=tuple(given["latents_mean"]),
        scale=tuple(1 / std for std in given["latents_std"]),
        key=key,
    )


def diffusers_config(ae: CausalVideoAutoencoder) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> sizes = dict(base_dim=8, dim_mult=[1, 2], temperal_downsample=[True])
    >>> diffusers_config(from_diffusers(sizes, key=jax.random.key(0)))["dim_mult"]
    [1, 2]
    """
    ours, channels = ae.config, ae.config.channels
    decoder: Any = ours.decoder_channels
    mult = [width // channels[0] for width in channels]
    multiples = all(w % channels[0] == 0 for w in channels)
    reasons = {
        f"its decoder has {ours.decoder_blocks} blocks a level, not {ours.blocks + 1}": (
            ours.decoder_blocks != ours.blocks + 1
        ),
        "it has no attention": not ours.attention,
        "it has no quant_convs": not ours.quant_convs,
        "it has a cell_map": ours.cell_map,
        f"its widths {channels} are no multiples of the first": not multiples,
        f"its decoder's widths {decoder} are not the encoder's times a number": (
            [decoder[0] * m for m in mult] != list(decoder)
        ),
    }
    refuse_network("CausalVideoAutoencoder", "diffusers", reasons)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="AutoencoderKLWan",
        base_dim=channels[0],
        decoder_base_dim=None if decoder == channels else decoder[0],
        z_dim=ours.latent_channels,
        dim_mult=mult,
        num_res_blocks=ours.blocks,
        temperal_downsample=list(ours.time_levels or ()),
        latents_mean=list(ae.shift),
        latents_std=[1 / scale for scale in ae.scale],
        is_residual=ours.shortcuts,
        in_channels=ours.in_channels * ours.patch_size**2,
        out_channels=ours.in_channels * ours.patch_size**2,
        patch_size=None if ours.patch_size == 1 else ours.patch_size,
        scale_factor_temporal=ae.time_factor,
        scale_factor_spatial=ae.factor,
    )


def diffusers_layout(ae: CausalVideoAutoencoder) -> Layout:
    """The names of diffusers' AutoencoderKLWan.

    >>> import jax
    >>> ae = CausalVideoAutoencoder(1, 2, channels=(4,), blocks=1, key=jax.random.key(0))
    >>> diffusers_layout(ae).leaves[".encoder.stem.weight"][0].name
    'encoder.conv_in.weight'
    """
    names = dict(stem="conv_in", norm="norm_out", head="conv_out")
    quants = dict(encoder="quant_conv", decoder="post_quant_conv")
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    return _layout(ae, names, quants, middle, DIFFUSERS_RESNET, _diffusers_levels)


def original_layout(ae: CausalVideoAutoencoder) -> Layout:
    """The names of Wan's own files, `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth`.

    >>> import jax
    >>> ae = CausalVideoAutoencoder(1, 2, channels=(4,), blocks=1, key=jax.random.key(0))
    >>> original_layout(ae).leaves[".encoder.stem.weight"][0].name
    'encoder.conv1.weight'
    """
    names = dict(stem="conv1", norm="head.0", head="head.2")
    quants = dict(encoder="conv1", decoder="conv2")
    middle = ("middle.0", "middle.1", "middle.2")
    return _layout(ae, names, quants, middle, ORIGINAL_RESNET, _original_levels)


Levels = Callable[[str, CausalVideoAutoencoder], Iterator[tuple[str, str, Any]]]


def _layout(
    ae: CausalVideoAutoencoder,
    names: dict[str, str],
    quants: dict[str, str],
    middle: tuple[str, str, str],
    resnet: dict[str, str],
    levels: Levels,
) -> Layout:
    leaves: Leaves = {}
    patch = _patch_order(ae.config.in_channels, ae.config.patch_size)
    for half, quant in quants.items():
        model = getattr(ae, half)
        outside = "stem" if half == "encoder" else "head"  # what sees the pixels
        for field in ("stem", "head"):
            order = patch if field == outside else None
            leaves |= _conv3d(f"{half}.{field}", f"{half}.{names[field]}", field, order)
        leaves |= _gamma(f"{half}.norm", f"{half}.{names['norm']}", 3)
        if model.quant is not None:
            leaves |= _conv3d(f"{half}.quant", quant)
        kept = middle if len(model.middle) == 3 else middle[::2]
        blocks = [
            (f"{half}.middle[{k}]", f"{half}.{kept[k]}", block)
            for k, block in enumerate(model.middle)
        ]
        for ours, theirs, block in [*blocks, *levels(half, ae)]:
            if isinstance(block, CausalResnetBlock):
                leaves |= _resnet(block, ours, theirs, resnet)
            elif isinstance(block, AttentionBlock):
                leaves |= _attention(block, ours, theirs)
            else:
                leaves |= conv(f"{ours}.resample", f"{theirs}.resample.1")
                if block.time is not None:
                    leaves |= _conv3d(f"{ours}.time.conv", f"{theirs}.time_conv")
    return Layout(leaves, {})


def _walk(half: str, ae: CausalVideoAutoencoder) -> Iterator[tuple[str, Any, int, int | None, int]]:
    """`(ours, module, level, place, number)` of each block and resampling, in order; the place in
    the level is None for a resampling."""
    model = getattr(ae, half)
    field, between = ("downs", model.downs) if half == "encoder" else ("ups", model.ups)
    number = 0
    for i, level in enumerate(model.levels):
        for k, block in enumerate(level):
            yield f"{half}.levels[{i}][{k}]", block, i, k, number
            number += 1
        if i < len(between):
            yield f"{half}.{field}[{i}]", between[i], i, None, number
            number += 1


def _original_levels(half: str, ae: CausalVideoAutoencoder) -> Iterator[tuple[str, str, Any]]:
    group = "downsamples" if half == "encoder" else "upsamples"
    for ours, module, i, k, number in _walk(half, ae):
        place = len(getattr(ae, half).levels[i]) if k is None else k
        inside = f"{i}.{group}.{place}" if ae.config.shortcuts else str(number)
        yield ours, f"{half}.{group}.{inside}", module


def _diffusers_levels(half: str, ae: CausalVideoAutoencoder) -> Iterator[tuple[str, str, Any]]:
    side = "down" if half == "encoder" else "up"
    sampler = f"{side}sampler" if ae.config.shortcuts else f"{side}samplers.0"
    for ours, module, i, k, number in _walk(half, ae):
        flat = half == "encoder" and not ae.config.shortcuts
        inside = number if flat else f"{i}.{sampler if k is None else f'resnets.{k}'}"
        yield ours, f"{half}.{side}_blocks.{inside}", module


def _resnet(block: CausalResnetBlock, ours: str, theirs: str, names: dict[str, str]) -> Leaves:
    leaves: Leaves = {}
    for field, name in names.items():
        if getattr(block, field) is None:
            continue
        layer = _gamma if field.startswith("norm") else _conv3d
        leaves |= layer(f"{ours}.{field}", f"{theirs}.{name}")
    return leaves


def _attention(block: AttentionBlock, ours: str, theirs: str) -> Leaves:
    """Queries, keys and values are one 1 x 1 convolution there."""
    width = block.out.weight.shape[0]
    leaves = _gamma(f"{ours}.norm", f"{theirs}.norm", 2)
    for k, field in enumerate(("query", "key", "value")):
        own = slice(k * width, (k + 1) * width)
        parts = {
            "weight": (lambda t, own=own: t[own, :, 0, 0], lambda m: m[:, :, None, None]),
            "bias": (lambda t, own=own: t[own], lambda v: v),
        }
        for kind, (read, write) in parts.items():
            part = Part(f"{theirs}.to_qkv.{kind}", (), read, write, joined=(0, k))
            leaves[f".{ours}.{field}.{kind}"] = (part,)
    matrix = (lambda t: t[:, :, 0, 0], lambda m: m[:, :, None, None])
    return leaves | linear(f"{ours}.out", f"{theirs}.proj", matrix)


def _gamma(ours: str, theirs: str, axes: int = 3) -> Leaves:
    """The scale of an `RMSNorm`, with `axes` of size 1 behind it there."""
    write = lambda v: v.reshape(-1, *axes * [1])
    return {f".{ours}.scale": (Part(f"{theirs}.gamma", (), lambda t: t.reshape(-1), write),)}


def _conv3d(
    ours: str, theirs: str, field: str = "", order: tuple[np.ndarray, np.ndarray] | None = None
) -> Leaves:
    """A `CausalConv3d`: `(t, h, w, in, out)` here and `(out, in, t, h, w)` there.

    With an `order` (and its inverse) of the channels that come in (`stem`) or go out (`head`).
    """
    there, back = (np.arange(0), np.arange(0)) if order is None else order
    axis = 1 if field == "stem" else 0  # of the tensor

    def read(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor if order is None else np.take(tensor, there, axis)
        return tensor.transpose(2, 3, 4, 1, 0)

    def write(kernel: np.ndarray) -> np.ndarray:
        tensor = kernel.transpose(4, 3, 0, 1, 2)
        return tensor if order is None else np.take(tensor, back, axis)

    leaves = linear(ours, theirs, (read, write))
    if order is not None and field == "head":
        part = Part(f"{theirs}.bias", (), lambda v: v[there], lambda v: v[back])
        leaves[f".{ours}.bias"] = (part,)
    return leaves


def _patch_order(channels: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Where our channels of a patch, `(row, column, c)`, lie in theirs, `(c, column, row)`."""
    theirs = np.arange(channels * patch**2).reshape(channels, patch, patch)
    order = theirs.transpose(2, 1, 0).reshape(-1)
    return order, np.argsort(order)
