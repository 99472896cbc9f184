"""The networks of a run, as its configuration describes them."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqxldm import models, nn
from eqxldm.models import AutoencoderKL, DiT, PatchDiscriminator, Posterior, TinyAutoencoder, UNet
from eqxldm.text import vocabulary_size

from .conditions import Captions, Condition, FrozenCaptions, Labels
from .config import AttentionName, Config, RematName
from .few_steps import TWO_TIMES, UNSCALED
from .methods import ATTENTIONS
from .streams import stream_key

Shape = tuple[int, int, int]


class GreyThroughColour(eqx.Module):
    """An autoencoder of colour images for grey ones: in as three equal channels, out as their mean.

    >>> colour = models.TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))
    >>> grey = GreyThroughColour(colour)
    >>> grey.decode(grey.encode(jnp.zeros((1, 16, 16)))).shape
    (1, 16, 16)
    """

    colour: AutoencoderKL | TinyAutoencoder

    in_channels = 1

    @property
    def shift(self) -> tuple[float, ...]:
        return self.colour.shift

    @property
    def scale(self) -> tuple[float, ...]:
        return self.colour.scale

    def latent_shape(self, height: int, width: int) -> Shape:
        return self.colour.latent_shape(height, width)

    def posterior(self, x: Float[Array, "1 h w"]) -> Posterior:
        return self.colour.posterior(jnp.repeat(x, 3, axis=0))

    def normalise(self, posterior: Posterior) -> Posterior:
        return self.colour.normalise(posterior)

    def encode(self, x: Float[Array, "1 h w"], *, key: Any = None) -> Float[Array, "zc zh zw"]:
        return self.colour.encode(jnp.repeat(x, 3, axis=0), key=key)

    def decode(self, z: Float[Array, "zc zh zw"]) -> Float[Array, "1 h w"]:
        return jnp.mean(self.colour.decode(z), axis=0, keepdims=True)


class LPIPSOfGrey(eqx.Module):
    """LPIPS of grey images, `(1, h, w)`, as three equal channels.

    >>> lpips = LPIPSOfGrey(models.LPIPS(channels=(4, 4, 4, 4, 4), key=jax.random.key(0)))
    >>> float(lpips(jnp.zeros((1, 16, 16)), jnp.zeros((1, 16, 16))))
    0.0
    """

    colour: models.LPIPS

    def __call__(self, x: Float[Array, "1 h w"], y: Float[Array, "1 h w"]) -> Float[Array, ""]:
        return self.colour(jnp.repeat(x, 3, axis=0), jnp.repeat(y, 3, axis=0))


def lpips_of(lpips: models.LPIPS, channels: int) -> models.LPIPS | LPIPSOfGrey:
    """LPIPS of images with 1 channel or 3."""
    return LPIPSOfGrey(lpips) if channels == 1 else lpips


class Pixels(eqx.Module):
    """The image itself, in place of an autoencoder's latent."""

    in_channels: int = eqx.field(static=True)

    def latent_shape(self, height: int, width: int) -> Shape:
        return self.in_channels, height, width

    def encode(self, x: Float[Array, "c h w"], *, key: Any = None) -> Float[Array, "c h w"]:
        return x

    def decode(self, z: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        return z


Autoencoder = AutoencoderKL | TinyAutoencoder | GreyThroughColour
Space = Autoencoder | Pixels


def make_autoencoder(config: Config) -> AutoencoderKL:
    options = config.autoencoder
    return AutoencoderKL(
        config.pictures.channels,
        options.latent_channels,
        channels=options.channels,
        blocks=options.blocks,
        patch_size=options.patch_size,
        groups=options.groups,
        attention=options.attention,
        key=stream_key(config.seed, "autoencoder/model"),
    )


def make_discriminator(config: Config) -> PatchDiscriminator:
    return PatchDiscriminator(
        config.pictures.channels,
        channels=config.autoencoder.discriminator_channels,
        layers=config.autoencoder.discriminator_layers,
        groups=config.autoencoder.groups,
        key=stream_key(config.seed, "discriminator/model"),
    )


def make_denoiser(
    config: Config,
    shape: Shape,
    condition: Condition,
    *,
    remat: RematName = "narrow",
    attention: AttentionName = "xla",
) -> DiT | UNet:
    """The denoiser for latents or images of this shape, with what the condition needs."""
    key, text_key = jax.random.split(stream_key(config.seed, "diffusion/model"))
    attend = ATTENTIONS[attention]
    policy = {
        "everything": jax.checkpoint_policies.nothing_saveable,
        "narrow": models.save_narrow,
        "matmuls": models.save_matmuls,
        "nothing": None,
    }[remat]
    if config.denoiser == "unet":
        return _unet(config, shape, condition, attention=attend, remat=policy, key=key)
    sizes = dit_sizes(config)
    options: dict[str, Any] = _form(config, sizes) | dict(
        learn_sigma=config.diffusion.learned_range,
        attention=attend,
        remat=policy,
        **_times(config),
    )
    if config.few.conditioned:
        if not isinstance(condition, Labels):
            raise ValueError("--few.conditioned needs images with classes, --condition label.")
        labels = nn.Labels(condition.num_classes, sizes["width"])
        options |= dict(embed_cond=nn.GuidanceEmbedding(labels, sizes["width"], key=text_key))
    elif isinstance(condition, Labels):
        options |= dict(num_classes=condition.num_classes)
    elif isinstance(condition, Captions):
        text = config.text
        size = text.width or sizes["width"], text.depth, text.num_heads, text.max_length
        encoder: Any = models.ByteTextEncoder
        if isinstance(condition, FrozenCaptions):
            encoder, size = models.EncodedCaption, (condition.size, sizes["width"])
        elif condition.merges is not None:
            encoder = partial(models.CaptionEncoder, vocabulary=vocabulary_size(condition.merges))
        options |= dict(
            embed_cond=encoder(*size, key=text_key),
            block=models.CrossAttentionDiTBlock if text.cross_attention else models.DiTBlock,
        )
    return DiT(shape, **sizes, **options, key=key)


def _form(config: Config, sizes: dict[str, Any]) -> dict[str, Any]:
    """What a DiT has besides the published form."""
    dit, half = config.dit, sizes["width"] // sizes["num_heads"] // 4 * 2
    if dit.rope and not half:
        raise ValueError("--dit.rope needs heads of at least 4; lower --dit.num-heads.")
    return dict(
        qk_norm=nn.RMSNorm if dit.qk_norm else None,
        norm=nn.RMSNorm if dit.norm == "rms" else None,
        swiglu=dit.swiglu,
        rope=nn.RoPE((half, half)) if dit.rope else None,  # half of a head for each axis
        modulated=dit.modulated,
        condition_tokens=dit.condition_tokens,
        time_tokens=dit.time_tokens,
        tokens_start=dit.tokens_start,
        early_depth=dit.early_depth,
        early_head=config.diffusion.early > 0,
        patch_bottleneck=dit.bottleneck,
    )


def _times(config: Config) -> dict[str, Any]:
    """How the network reads its time, and whether it has two."""
    if config.objective == "denoising":
        return {"time_embedding": UNSCALED} if config.form == "jit" else {}
    two = config.objective in TWO_TIMES
    return {"time_embedding": UNSCALED} | ({"step_embedding": UNSCALED} if two else {})


def _unet(config: Config, shape: Shape, condition: Condition, **options: Any) -> UNet:
    unet, deepest = config.unet, len(config.unet.channels) - 1
    return UNet(
        shape[0],
        out_channels=shape[0] * (2 if config.diffusion.learned_range else 1),
        channels=unet.channels,
        blocks=unet.blocks,
        attention_levels=tuple(i == deepest for i in range(deepest + 1)),
        num_heads=unet.num_heads,
        groups=unet.groups,
        num_classes=condition.num_classes if isinstance(condition, Labels) else None,
        **_times(config),
        **options,
    )


def dit_sizes(config: Config) -> dict[str, Any]:
    """The published size's depth, width, heads and patch, or what was given instead."""
    make = getattr(models, config.dit.model)
    published = eqx.filter_eval_shape(make, (4, 32, 32), key=jax.random.key(0))
    names = ("depth", "width", "num_heads", "patch_size")
    given = {name: getattr(config.dit, name) for name in names}
    return {n: getattr(published.config, n) if v is None else v for n, v in given.items()}
