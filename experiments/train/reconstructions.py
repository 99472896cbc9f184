"""What an autoencoder makes of images, and how far that is from them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqxldm.data.pixels import to_float, to_uint8
from eqxldm.distributed import local_mesh, replicate
from eqxldm.metrics import psnr, ssim
from eqxldm.models import LPIPS
from eqxldm.sharding import batch_sharding

from .classifier import VALUES, Images, map_images
from .networks import Autoencoder, lpips_of


def reconstruct(autoencoder: Autoencoder, images: Images, pad: int, batch: int = 64) -> Images:
    """Decodes the posterior's mode of each image, on all devices of this process."""

    @eqx.filter_jit
    def through(autoencoder, images):
        x = to_float(images, pad=pad)
        return to_uint8(jax.vmap(lambda x: autoencoder.decode(autoencoder.encode(x)))(x), pad=pad)

    return on_devices(through, autoencoder, images, batch)


def on_devices(function: Callable[[Any, Any], Any], model: Any, images: Images, batch: int) -> Any:
    """`map_images`, each batch divided over the devices of this process."""
    mesh = local_mesh()
    size = -(-min(batch, len(images)) // mesh.size) * mesh.size
    put = lambda part: jax.device_put(part, batch_sharding(mesh))
    return map_images(function, replicate(model, mesh), images, size, put)


def pixel_scores(originals: Images, rebuilt: Images) -> dict[str, float]:
    """The means of PSNR and SSIM."""
    as_unit = lambda u: jnp.asarray(np.moveaxis(u, -1, 1), jnp.float32) / 255
    size = max(1, 2 * VALUES // originals[0].size)
    scores = []
    for i in range(0, len(originals), size):
        x, y = as_unit(originals[i : i + size]), as_unit(rebuilt[i : i + size])
        scores.append((psnr(x, y), ssim(x, y)))
    of_each = [jnp.concatenate(parts) for parts in zip(*scores, strict=True)]
    return {"psnr_db": float(jnp.mean(of_each[0])), "ssim": float(jnp.mean(of_each[1]))}


def lpips_score(
    originals: Images, rebuilt: Images, lpips: LPIPS, batch: int = 64
) -> dict[str, float]:
    """The mean of LPIPS over pairs of images, grey ones as three equal channels."""

    @eqx.filter_jit
    def distances(distance, pairs):
        x, y = (to_float(part) for part in jnp.split(pairs, 2, axis=-1))
        return jax.vmap(distance)(x, y)

    distance = lpips_of(lpips, originals.shape[-1])
    pairs = np.concatenate([originals, rebuilt], axis=-1)
    found = on_devices(distances, distance, pairs, batch)
    return {"lpips": float(np.mean(found))}
