"""The U-Nets that were published: Stable Diffusion 1, 2 and XL, and DDPM."""

from typing import Any

from ..nn.embeddings import Sinusoid
from .unet import UNet


def unet_sd1(in_channels: int = 4, context_size: int = 768, *, key, **options: Any) -> UNet:
    """Stable Diffusion 1.x's U-Net (Rombach et al. 2022): 859,520,964 parameters.

    There inputs are 4 x 64 x 64 and `cond`, the context, is `(77, 768)` from CLIP. `options` are
    further arguments of `UNet`.

    >>> import equinox as eqx, jax
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

    >>> import equinox as eqx, jax
    >>> unet = eqx.filter_eval_shape(unet_ddpm, key=jax.random.key(0))
    >>> unet.stem.weight.shape
    (3, 3, 3, 128)
    """
    sizes: dict[str, Any] = dict(channels=(128, 256, 256, 256), blocks=2, norm_eps=1e-6)
    sizes |= dict(attention_levels=(False, True, False, False), downsample_padding=(0, 1))
    sizes |= dict(time_embedding=Sinusoid(size=128, freq_shift=1, sin_first=True))
    return UNet(in_channels, **{**sizes, **options}, key=key)


def unet_sd2(in_channels: int = 4, context_size: int = 1024, *, key, **options: Any) -> UNet:
    """Stable Diffusion 2.x's U-Net: 865,910,724 parameters.

    There inputs are 4 x 64 x 64, or 4 x 96 x 96 where it predicts `v`, and `cond`, the context, is
    `(77, 1024)` from OpenCLIP. `options` are further arguments of `UNet`.

    >>> import equinox as eqx, jax
    >>> unet = eqx.filter_eval_shape(unet_sd2, key=jax.random.key(0))
    >>> unet.config.num_heads
    (5, 10, 20, 20)
    """
    sizes: dict[str, Any] = dict(num_heads=(5, 10, 20, 20), linear_projection=True)
    return unet_sd1(in_channels, context_size, **sizes | options, key=key)


def unet_sdxl(in_channels: int = 4, context_size: int = 2048, *, key, **options: Any) -> UNet:
    """Stable Diffusion XL's U-Net (Podell et al. 2023): 2,567,463,684 parameters.

    There inputs are 4 x 128 x 128 and `cond` is `nn.Conditioning` with `tokens` `(77, 2048)` and a
    `vector` `(1280,)` from two CLIPs, and six `numbers`: height and width of the original picture,
    top and left of the crop, height and width of what is wanted, all in pixels.

    >>> import equinox as eqx, jax
    >>> unet = eqx.filter_eval_shape(unet_sdxl, key=jax.random.key(0))
    >>> unet.config.transformer_depth
    (1, 2, 10)
    """
    sizes: dict[str, Any] = dict(channels=(320, 640, 1280), blocks=2, num_heads=(5, 10, 20))
    sizes |= dict(attention_levels=(False, True, True), transformer_depth=(1, 2, 10))
    sizes |= dict(linear_projection=True, context_size=context_size, added_size=2816)
    return UNet(in_channels, **{**sizes, **options}, key=key)
