"""AutoencoderKL: the names of diffusers, and the configurations."""

from typing import Any

import numpy as np

from ..models import AutoencoderKL
from ..nn.conv import ConvPair
from ..nn.resnet import ResnetBlock
from .layout import Layout, Part, WeightsError

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"],
    up_block_types=["UpDecoderBlock2D"], block_out_channels=[64], layers_per_block=1,
    act_fn="silu", latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
    shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True,
)  # fmt: skip


def config(ae: AutoencoderKL) -> dict[str, Any]:
    """What `build` needs, as JSON: the arguments of `AutoencoderKL`, and shift and scale.

    >>> import jax
    >>> ae = AutoencoderKL(1, 4, channels=(8, 16), blocks=1, groups=4, key=jax.random.key(0))
    >>> config(ae)["channels"]
    [8, 16]
    """
    encoder, decoder = ae.encoder, ae.decoder
    return dict(
        in_channels=ae.in_channels,
        latent_channels=ae.latent_channels,
        channels=[level[-1].conv2.weight.shape[-1] for level in encoder.levels],
        blocks=len(encoder.levels[0]),
        decoder_blocks=len(decoder.levels[0]),
        patch=encoder.patch,
        groups=encoder.norm.groups,
        attention=len(encoder.middle) == 3,
        quant_convs=isinstance(encoder.head, ConvPair),
        shift=list(ae.shift),
        scale=list(ae.scale),
    )


def build(config: dict[str, Any], *, key) -> AutoencoderKL:
    """The module that `config` describes, with random weights.

    >>> import jax
    >>> ae = AutoencoderKL(1, 4, channels=(8, 16), blocks=1, groups=4, key=jax.random.key(0))
    >>> jax.tree.structure(build(config(ae), key=jax.random.key(0))) == jax.tree.structure(ae)
    True
    """
    options = dict(config)
    shift, scale = tuple(options.pop("shift")), tuple(options.pop("scale"))
    sizes = options.pop("in_channels"), options.pop("latent_channels")
    options["channels"] = tuple(options["channels"])
    return AutoencoderKL(*sizes, **options, key=key).with_latent_stats(shift, scale)


def from_diffusers(config: dict[str, Any], *, key) -> AutoencoderKL:
    """The module of a diffusers `config.json`, with random weights.

    Shift and scale are the configuration's: `z = (z_raw - shift_factor) scaling_factor`, or where
    it has them `z = (z_raw - latents_mean) scaling_factor / latents_std`.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> sizes = dict(block_out_channels=[8, 8], norm_num_groups=4)
    >>> from_diffusers(sizes, key=jax.random.key(0)).scale[0]
    0.18215
    """
    given = DIFFUSERS_DEFAULTS | config
    needed = dict(
        act_fn="silu",
        out_channels=given["in_channels"],
        use_post_quant_conv=given["use_quant_conv"],
    )
    wrong = [f"{k} = {given[k]!r} ({v!r})" for k, v in needed.items() if given[k] != v]
    for option in ("down_block_types", "up_block_types"):
        plain = DIFFUSERS_DEFAULTS[option]
        if set(given[option]) != set(plain):
            wrong.append(f"{option} = {given[option]!r} (all {plain[0]})")
    if wrong:
        raise WeightsError(
            "AutoencoderKL: config.json has what it has not (in brackets): " + ", ".join(wrong)
        )
    channels, factor = given["latent_channels"], given["scaling_factor"]
    ae = AutoencoderKL(
        given["in_channels"],
        channels,
        channels=tuple(given["block_out_channels"]),
        blocks=given["layers_per_block"],
        decoder_blocks=given["layers_per_block"] + 1,
        groups=given["norm_num_groups"],
        attention=given["mid_block_add_attention"],
        quant_convs=given["use_quant_conv"],
        key=key,
    )
    means = given["latents_mean"] or [given["shift_factor"] or 0.0] * channels
    stds = given["latents_std"] or [1.0] * channels
    return ae.with_latent_stats(tuple(means), tuple(factor / std for std in stds))


def diffusers_config(ae: AutoencoderKL) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> sizes = dict(block_out_channels=[8, 8], norm_num_groups=4)
    >>> ae = from_diffusers(sizes, key=jax.random.key(0))
    >>> diffusers_config(ae)["block_out_channels"]
    [8, 8]
    """
    ours = config(ae)
    blocks, decoder_blocks, levels = ours["blocks"], ours["decoder_blocks"], len(ours["channels"])
    reasons = {
        f"its patch is {ours['patch']}, not 1": ours["patch"] != 1,
        f"its decoder has {decoder_blocks} blocks a level, not {blocks + 1}": (
            decoder_blocks != blocks + 1
        ),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        raise WeightsError(
            "AutoencoderKL: diffusers cannot hold this network: " + "; ".join(why) + "."
        )
    if len({*ae.shift}) == len({*ae.scale}) == 1:
        latents = dict(scaling_factor=ae.scale[0], shift_factor=ae.shift[0] or None)
    else:
        stds = [1 / scale for scale in ae.scale]
        latents = dict(scaling_factor=1.0, latents_mean=list(ae.shift), latents_std=stds)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="AutoencoderKL",
        in_channels=ours["in_channels"],
        out_channels=ours["in_channels"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=ours["channels"],
        layers_per_block=blocks,
        latent_channels=ours["latent_channels"],
        norm_num_groups=ours["groups"],
        mid_block_add_attention=ours["attention"],
        use_quant_conv=ours["quant_convs"],
        use_post_quant_conv=ours["quant_convs"],
        **latents,
    )


def diffusers_layout(ae: AutoencoderKL) -> Layout:
    """The names of diffusers' AutoencoderKL, those of its old versions as well.

    >>> import jax
    >>> ae = AutoencoderKL(1, 4, channels=(8,), blocks=1, groups=4, key=jax.random.key(0))
    >>> diffusers_layout(ae).leaves[".encoder.stem.weight"][0].name
    'encoder.conv_in.weight'
    """
    encoder, decoder = ae.encoder, ae.decoder
    first = ".first" if isinstance(encoder.head, ConvPair) else ""
    second = ".second" if isinstance(decoder.stem, ConvPair) else ""
    leaves = {
        **_conv("encoder.stem", "encoder.conv_in"),
        **_conv(f"encoder.head{first}", "encoder.conv_out"),
        **_conv(f"decoder.stem{second}", "decoder.conv_in"),
        **_conv("decoder.head", "decoder.conv_out"),
    }
    if first:
        leaves |= _conv("encoder.head.second", "quant_conv")
    if second:
        leaves |= _conv("decoder.stem.first", "post_quant_conv")
    leaves |= _half("encoder", encoder, "downs", "encoder.down_blocks.{}.downsamplers.0.conv")
    leaves |= _half("decoder", decoder, "ups", "decoder.up_blocks.{}.upsamplers.0.conv")
    aliases = {
        f"{half}.mid_block.attentions.0.{old}.{kind}": f"{half}.mid_block.attentions.0.{new}.{kind}"
        for half in ("encoder", "decoder")
        for old, new in OLD_ATTENTION.items()
        for kind in ("weight", "bias")
    }
    return Layout(leaves, {}, aliases)


# Most published files still have the names of 2022.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _half(half: str, model: Any, resampling: str, resampler: str) -> dict[str, tuple[Part, ...]]:
    """Levels, resampling convolutions, middle and norm of the encoder or the decoder."""
    leaves = _norm(f"{half}.norm", f"{half}.conv_norm_out")
    side = resampler.split(".")[1]
    for i, level in enumerate(model.levels):
        for j, block in enumerate(level):
            leaves |= _resnet(block, f"{half}.levels[{i}][{j}]", f"{half}.{side}.{i}.resnets.{j}")
    for i in range(len(model.levels) - 1):
        leaves |= _conv(f"{half}.{resampling}[{i}]", resampler.format(i))
    resnets = attentions = 0
    for i, block in enumerate(model.middle):
        ours = f"{half}.middle[{i}]"
        if isinstance(block, ResnetBlock):
            leaves |= _resnet(block, ours, f"{half}.mid_block.resnets.{resnets}")
            resnets += 1
        else:
            leaves |= _attention(ours, f"{half}.mid_block.attentions.{attentions}")
            attentions += 1
    return leaves


def _resnet(block: ResnetBlock, ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    leaves = {}
    for n in (1, 2):
        leaves |= _norm(f"{ours}.norm{n}", f"{theirs}.norm{n}")
        leaves |= _conv(f"{ours}.conv{n}", f"{theirs}.conv{n}")
    if block.shortcut is not None:
        leaves |= _conv(f"{ours}.shortcut", f"{theirs}.conv_shortcut")
    return leaves


def _attention(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    leaves = _norm(f"{ours}.norm", f"{theirs}.group_norm")
    for layer, name in {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}.items():
        for kind in ("weight", "bias"):
            leaves[f".{ours}.{layer}.{kind}"] = (Part(f"{theirs}.{name}.{kind}"),)
    return leaves


def _norm(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        f".{ours}.scale": (Part(f"{theirs}.weight"),),
        f".{ours}.bias": (Part(f"{theirs}.bias"),),
    }


def _conv(ours: str, theirs: str) -> dict[str, tuple[Part, ...]]:
    return {
        f".{ours}.weight": (Part(f"{theirs}.weight", (), _to_hwio, _to_oihw),),
        f".{ours}.bias": (Part(f"{theirs}.bias"),),
    }


def _to_hwio(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0)


def _to_oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)
