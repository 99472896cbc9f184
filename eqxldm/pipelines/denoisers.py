"""Published networks as denoisers, with their guidance, all of them PyTrees.

A module and not a closure: `jax.jit` is then given the weights as arguments, and a program that
was compiled for one prompt and guidance scale serves all others.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..guidance import guide


class NetworkDenoiser(eqx.Module):
    """A network that computes in its weights' dtype, its output in float32.

    **Arguments**:

    - `network`: `(x_t, t, cond) -> out`.
    - `timesteps`: of the table that it was trained with. Networks read `1000 t - 1`; where the
      table has another length, they are told the time at which that is its timestep.
    - `whole`: of a flow; the network is told `floor(1000 t)` thousandths, as by schedulers of
      diffusers whose timesteps are integers.

    >>> denoiser = NetworkDenoiser(lambda x_t, t, cond, key=None: t * x_t, timesteps=500)
    >>> denoiser(jnp.ones(2), jnp.array(0.5), None)
    Array([0.25, 0.25], dtype=float32)
    """

    network: Any
    timesteps: int = eqx.field(static=True, default=1000)
    whole: bool = eqx.field(static=True, default=False)

    def __call__(self, x_t, t, cond, *, key=None, **options):
        weights = jax.tree.leaves(eqx.filter(self.network, eqx.is_inexact_array))
        dtype = weights[0].dtype if weights else x_t.dtype
        t = t if self.timesteps == 1000 else t * (self.timesteps / 1000)
        t = jnp.floor(1000 * t) / 1000 if self.whole else t
        out = self.network(x_t.astype(dtype), t, cond, key=key, **options)
        return out.astype(x_t.dtype)


class ExtraChannels(eqx.Module):
    """The denoiser of a network that is given more channels than those of `x_t`, after them.

    Inpainting networks take the mask and the encoded picture behind it so: 4 + 1 + 4 channels.

    >>> denoiser = ExtraChannels(lambda x_t, t, cond, key=None: x_t[:1], jnp.zeros((1, 2, 2)))
    >>> denoiser(jnp.ones((1, 2, 2)), jnp.array(0.5), None).shape
    (1, 2, 2)
    """

    denoiser: Any
    channels: Float[Array, "c h w"]

    def __call__(self, x_t, t, cond, *, key=None, **options):
        both = jnp.concatenate([x_t, self.channels.astype(x_t.dtype)])
        return self.denoiser(both, t, cond, key=key, **options)


class SkipLayers(eqx.Module):
    """How skip-layer guidance is done: `out + scale (out_c - out_skip)` at times low <= t <= high.

    `out_skip` is the network without the blocks `layers` (Stability AI's program for Stable
    Diffusion 3.5 medium: 7, 8 and 9 with scale 2.5, from 1 % to 20 % of the steps).

    >>> SkipLayers((7, 8, 9), jnp.array(2.5), jnp.array(0.9), jnp.array(1.0)).layers
    (7, 8, 9)
    """

    layers: tuple[int, ...] = eqx.field(static=True)
    scale: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]


def skip_layers(
    times: Any, layers: tuple[int, ...], scale: float, start: float = 0.01, stop: float = 0.2
) -> SkipLayers:
    """`SkipLayers` from a share of the steps: those i with `n start < i < n stop`.

    >>> import numpy as np
    >>> skip = skip_layers(np.linspace(1, 0, 11), (7, 8, 9), 2.5, stop=0.35)
    >>> round(float(skip.low), 3), round(float(skip.high), 3)
    (0.7, 0.9)
    """
    n = len(times) - 1
    inside = [float(times[i]) for i in range(n) if n * start < i < n * stop]
    low, high = (min(inside), max(inside)) if inside else (2.0, -1.0)  # at no time
    slack = 1e-6  # the time that the denoiser sees is float32
    return SkipLayers(layers, *(jnp.asarray(v) for v in (scale, low - slack, high + slack)))


class GuidedDenoiser(eqx.Module):
    """Classifier-free guidance by a negative or an empty prompt: `guidance.guide`, as a PyTree.

    **Arguments**:

    - `null`: the condition to lead away from, of one example.
    - `scale`: its weight; a traced number, so that no other value compiles anew.
    - `rescale`: of `guide`; 0.7 goes with zero terminal SNR.
    - `skip`: skip-layer guidance on top.

    >>> network = lambda x_t, t, cond, key=None: cond * x_t
    >>> guided = GuidedDenoiser(network, jnp.array(1.0), jnp.array(3.0))
    >>> guided(jnp.ones(2), jnp.array(0.5), jnp.array(2.0))
    Array([4., 4.], dtype=float32)
    """

    denoiser: Any
    null: PyTree
    scale: Float[Array, ""]
    rescale: float = eqx.field(static=True, default=0.0)
    skip: SkipLayers | None = None

    def __call__(self, x_t, t, cond, *, key=None, **options):
        denoiser = guide(self.denoiser, self.null, self.scale, rescale=self.rescale)
        out = denoiser(x_t, t, cond, key=key, **options)
        skip = self.skip
        if skip is None:
            return out
        layers, inside = skip.layers, (t >= skip.low) & (t <= skip.high)

        def away_from_the_skipped(out):
            whole = self.denoiser(x_t, t, cond, key=key, **options)
            part = self.denoiser(x_t, t, cond, key=key, skip=layers, **options)
            return out + skip.scale.astype(out.dtype) * (whole - part)

        return jax.lax.cond(inside, away_from_the_skipped, lambda out: out, out)
