"""AutoencoderKL: the names of diffusers, and the configurations."""

from collections.abc import Iterator
from typing import Any

from ..models import AutoencoderKL
from ..nn.attention import AttentionBlock
from ..nn.conv import ConvPair
from ..nn.resnet import ResnetBlock
from .layout import Layout, WeightsError
from .parts import Leaves, attention_block, conv, norm, old_attention_names, resnet
from .refusals import refuse_network, refuse_options

# What diffusers assumes where a configuration is silent.
DIFFUSERS_DEFAULTS: dict[str, Any] = dict(
    in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"],
    up_block_types=["UpDecoderBlock2D"], block_out_channels=[64], layers_per_block=1,
    act_fn="silu", latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
    shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True,
)  # fmt: skip

# Without and with attention.
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def from_diffusers(config: dict[str, Any], *, key) -> AutoencoderKL:
    """The module of a diffusers `config.json`, with random weights.

    Shift and scale are the configuration's: `z = (z_raw - shift_factor) scaling_factor`, or where
    it has them `z = (z_raw - latents_mean) scaling_factor / latents_std`.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> import jax
    >>> from_diffusers(dict(block_out_channels=[32]), key=jax.random.key(0)).scale[0]
    0.18215
    """
    given = DIFFUSERS_DEFAULTS | config
    levels = len(given["block_out_channels"])
    needed = dict(
        act_fn="silu",
        out_channels=given["in_channels"],
        use_post_quant_conv=given["use_quant_conv"],
    )
    wrong = []
    downs, ups = given["down_block_types"], given["up_block_types"]
    for option, types, known in (("down", downs, DOWN_BLOCKS), ("up", ups, UP_BLOCKS)):
        if not set(types) <= set(known) or len(types) != levels:
            wrong.append(f"{option}_block_types = {types!r} ({levels} of {list(known)})")
    attention = tuple(name == DOWN_BLOCKS[1] for name in downs)
    if attention != tuple(name == UP_BLOCKS[1] for name in reversed(ups)):
        wrong.append(f"up_block_types = {ups!r} (the mirror of down_block_types)")
    refuse_options("AutoencoderKL", given, needed, wrong)
    channels, factor = given["latent_channels"], given["scaling_factor"]
    ae = AutoencoderKL(
        given["in_channels"],
        channels,
        channels=tuple(given["block_out_channels"]),
        blocks=given["layers_per_block"],
        decoder_blocks=given["layers_per_block"] + 1,
        groups=given["norm_num_groups"],
        attention=given["mid_block_add_attention"],
        attention_levels=attention,
        quant_convs=given["use_quant_conv"],
        key=key,
    )
    means = given["latents_mean"] or [given["shift_factor"] or 0.0] * channels
    stds = given["latents_std"] or [1.0] * channels
    for name, values, least in (("latents_mean", means, None), ("latents_std", stds, 0)):
        numbers = all(isinstance(value, int | float) for value in values)
        positive = least is None or (numbers and min(values, default=1) > least)
        if len(values) != channels or not numbers or not positive:
            of = "numbers" if least is None else "positive numbers"
            raise WeightsError(f"AutoencoderKL: {name} = {values!r}: needed are {channels} {of}.")
    return ae.with_latent_stats(tuple(means), tuple(factor / std for std in stds))


def diffusers_config(ae: AutoencoderKL) -> dict[str, Any]:
    """The `config.json` with which diffusers makes the same network.

    **Raises** `WeightsError` if diffusers has no such network; the message lists why.

    >>> import jax
    >>> ae = from_diffusers(dict(block_out_channels=[32]), key=jax.random.key(0))
    >>> diffusers_config(ae)["block_out_channels"]
    [32]
    """
    ours = ae.config
    blocks, decoder_blocks = ours.blocks, ours.decoder_blocks
    reasons = {
        f"its patch_size is {ours.patch_size}, not 1": ours.patch_size != 1,
        f"its decoder has {decoder_blocks} blocks a level, not {blocks + 1}": (
            decoder_blocks != blocks + 1
        ),
    }
    refuse_network("AutoencoderKL", "diffusers", reasons)
    if len({*ae.shift}) == len({*ae.scale}) == 1:
        latents = dict(scaling_factor=ae.scale[0], shift_factor=ae.shift[0] or None)
    else:
        stds = [1 / scale for scale in ae.scale]
        latents = dict(scaling_factor=1.0, latents_mean=list(ae.shift), latents_std=stds)
    return DIFFUSERS_DEFAULTS | dict(
        _class_name="AutoencoderKL",
        in_channels=ours.in_channels,
        out_channels=ours.in_channels,
        down_block_types=[DOWN_BLOCKS[at] for at in ours.attention_levels],
        up_block_types=[UP_BLOCKS[at] for at in reversed(ours.attention_levels)],
        block_out_channels=list(ours.channels),
        layers_per_block=blocks,
        latent_channels=ours.latent_channels,
        norm_num_groups=ours.groups,
        mid_block_add_attention=ours.attention,
        use_quant_conv=ours.quant_convs,
        use_post_quant_conv=ours.quant_convs,
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
        **conv("encoder.stem", "encoder.conv_in"),
        **conv(f"encoder.head{first}", "encoder.conv_out"),
        **conv(f"decoder.stem{second}", "decoder.conv_in"),
        **conv("decoder.head", "decoder.conv_out"),
    }
    if first:
        leaves |= conv("encoder.head.second", "quant_conv")
    if second:
        leaves |= conv("decoder.stem.first", "post_quant_conv")
    leaves |= _half("encoder", encoder, "downs", "encoder.down_blocks.{}.downsamplers.0.conv")
    leaves |= _half("decoder", decoder, "ups", "decoder.up_blocks.{}.upsamplers.0.conv")
    aliases: dict[str, str] = {}
    for name, half in (("encoder", encoder), ("decoder", decoder)):
        for _, theirs, block in _blocks(name, half):
            aliases |= old_attention_names(theirs) if isinstance(block, AttentionBlock) else {}
    return Layout(leaves, {}, aliases)


def _blocks(half: str, model: Any) -> Iterator[tuple[str, str, ResnetBlock | AttentionBlock]]:
    """`(ours, theirs, block)` of every block; there they are numbered by kind."""
    side = "down" if half == "encoder" else "up"
    parts = [(f"levels[{i}]", f"{side}_blocks.{i}", level) for i, level in enumerate(model.levels)]
    for ours, theirs, blocks in [*parts, ("middle", "mid_block", model.middle)]:
        counts = {"resnets": 0, "attentions": 0}
        for k, block in enumerate(blocks):
            kind = "resnets" if isinstance(block, ResnetBlock) else "attentions"
            yield f"{half}.{ours}[{k}]", f"{half}.{theirs}.{kind}.{counts[kind]}", block
            counts[kind] += 1


def _half(half: str, model: Any, resampling: str, resampler: str) -> Leaves:
    """Levels, resampling convolutions, middle and norm of the encoder or the decoder."""
    leaves = norm(f"{half}.norm", f"{half}.conv_norm_out")
    for ours, theirs, block in _blocks(half, model):
        if isinstance(block, ResnetBlock):
            leaves |= resnet(block, ours, theirs)
        else:
            leaves |= attention_block(ours, theirs)
    for i in range(len(model.levels) - 1):
        leaves |= conv(f"{half}.{resampling}[{i}]", resampler.format(i))
    return leaves
