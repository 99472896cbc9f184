"""TinyAutoencoder: the names of TAESD's files and of diffusers' AutoencoderTiny."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..models import TinyAutoencoder
from .files import open_pt, open_safetensors
from .layout import Layout, ShardingRule, Tensor, WeightsError, fill
from .parts import Leaves, conv, norm
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    in_channels=3, out_channels=3, encoder_block_out_channels=[64] * 4,
    decoder_block_out_channels=[64] * 4, act_fn="relu", upsample_fn="nearest", latent_channels=4,
    upsampling_scaling_factor=2, num_encoder_blocks=[1, 3, 3, 3], num_decoder_blocks=[3, 3, 3, 1],
    scaling_factor=1.0, shift_factor=0.0,
)  # fmt: skip
# What our network can be; any other value is refused.
ONLY = dict(
    act_fn="relu",
    upsample_fn="nearest",
    upsampling_scaling_factor=2,
    scaling_factor=1.0,
    shift_factor=0.0,
)


def load_tiny_autoencoder(
    encoder: str | Path,
    decoder: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: ShardingRule | None = None,
) -> TinyAutoencoder:
    """The tiny autoencoder of TAESD's two files, `.safetensors` or `.pth` (which needs torch).

    Which form it is, SD's, SDXL's, SD3's, FLUX.1's or FLUX.2's, their tensors say. `dtype` and
    `sharding` are those of `load`. Folders of diffusers' AutoencoderTiny are read by `load`.

    **Raises** `FileNotFoundError`; `WeightsError` for files of anything else.

    >>> load_tiny_autoencoder("taesd_encoder.safetensors", "taesd_decoder.safetensors")
    Traceback (most recent call last):
    ...
    FileNotFoundError: weights: there is no file taesd_encoder.safetensors.
    """
    tensors: dict[str, Tensor] = {}
    for half, given in (("encoder", encoder), ("decoder", decoder)):
        path = Path(given)
        found = open_safetensors(path)[0] if path.suffix == ".safetensors" else open_pt(path)
        tensors |= {f"{half}.{name}": tensor for name, tensor in found.items()}
    source = f"{encoder} with {decoder}"
    sizes = _sizes(tensors, source)
    make = lambda: TinyAutoencoder(**sizes, key=jax.random.key(0))
    model = eqx.filter_eval_shape(make)
    layout = original_layout(model)
    return fill(model, layout, tensors, source=source, dtype=dtype, sharding=sharding)


def from_diffusers(config: dict[str, Any], *, key) -> TinyAutoencoder:
    """The module of a diffusers `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> from_diffusers(dict(latent_channels=16), key=jax.random.key(0)).latent_channels
    16
    """
    given = DIFFUSERS_DEFAULTS | config
    wrong = []
    if given["out_channels"] != given["in_channels"]:
        wrong.append(f"out_channels = {given['out_channels']} ({given['in_channels']})")
    widths = {*given["encoder_block_out_channels"], *given["decoder_block_out_channels"]}
    if len(widths) != 1:
        wrong.append(f"block_out_channels = {sorted(widths)} (one width)")
    refuse_options("TinyAutoencoder", given, ONLY, wrong)
    return TinyAutoencoder(
        given["in_channels"],
        given["latent_channels"],
        width=widths.pop(),
        encoder_blocks=tuple(given["num_encoder_blocks"]),
        decoder_blocks=tuple(given["num_decoder_blocks"]),
        key=key,
    )


def diffusers_config(ae: TinyAutoencoder) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message says why.

    >>> ae = TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))
    >>> diffusers_config(ae)["latent_channels"]
    4
    """
    ours = ae.config
    pooled = "its blocks have a pool, as those for FLUX.2 have"
    refuse_network("TinyAutoencoder", "diffusers", {pooled: ours.pool})
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="AutoencoderTiny",
        in_channels=ours.in_channels,
        out_channels=ours.in_channels,
        latent_channels=ours.latent_channels,
        encoder_block_out_channels=[ours.width] * len(ours.encoder_blocks),
        decoder_block_out_channels=[ours.width] * len(ours.decoder_blocks),
        num_encoder_blocks=list(ours.encoder_blocks),
        num_decoder_blocks=list(ours.decoder_blocks),
    )


def original_layout(ae: TinyAutoencoder) -> Layout:
    """The names of TAESD's two files, with `encoder.` and `decoder.` before them.

    They are numbers of a sequence, in which activations, enlargements and the decoder's first
    bound count as well.

    >>> ae = TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))
    >>> original_layout(ae).leaves[".decoder.stem.bias"][0].name
    'decoder.1.bias'
    """
    return Layout(_half(ae, "encoder", "encoder.{}", 0) | _half(ae, "decoder", "decoder.{}", 1), {})


def diffusers_layout(ae: TinyAutoencoder) -> Layout:
    """The names of diffusers' AutoencoderTiny.

    >>> ae = TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))
    >>> diffusers_layout(ae).leaves[".decoder.stem.bias"][0].name
    'decoder.layers.0.bias'
    """
    leaves = _half(ae, "encoder", "encoder.layers.{}", 0)
    return Layout(leaves | _half(ae, "decoder", "decoder.layers.{}", 0), {})


def _half(ae: TinyAutoencoder, half: str, theirs: str, first: int) -> Leaves:
    """One half, whose first convolution has the number `first` in the sequence."""
    model, number = getattr(ae, half), first
    leaves = conv(f"{half}.stem", theirs.format(number))
    number += 1 if half == "encoder" else 2  # the decoder's is followed by an activation
    for i, level in enumerate(model.levels):
        if i > 0:
            number += half == "decoder"  # what enlarges
            name = f"{half}.resample[{i - 1}]"
            leaves |= conv(name, theirs.format(number), bias=False)
            number += 1
        for j, block in enumerate(level):
            ours, there = f"{half}.levels[{i}][{j}]", theirs.format(number)
            for k in range(3):
                leaves |= conv(f"{ours}.convs[{k}]", f"{there}.conv.{2 * k}")
            if block.pool is not None:
                leaves |= conv(f"{ours}.pool.conv1", f"{there}.pool.0", bias=False)
                leaves |= norm(f"{ours}.pool.norm", f"{there}.pool.1")
                leaves |= conv(f"{ours}.pool.conv2", f"{there}.pool.3", bias=False)
            number += 1
    return leaves | conv(f"{half}.head", theirs.format(number))


def _sizes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The arguments of a `TinyAutoencoder` from the shapes of the two files."""
    first, last = tensors.get("encoder.0.weight"), tensors.get("decoder.1.weight")
    if first is None or last is None or len(first.shape) != 4 or len(last.shape) != 4:
        raise WeightsError(
            f"{source}: these are not the encoder and the decoder of a TAESD, whose first "
            "convolutions are 0.weight and 1.weight."
        )
    return dict(
        in_channels=first.shape[1],
        latent_channels=last.shape[1],
        width=first.shape[0],
        pool=any(".pool." in name for name in tensors),
    )
