"""Guidance: functions from a denoiser to a denoiser.

A mix of two outputs at the same `x_t` is linear, so it means the same for eps, x0, v, velocity and
the score; what is not linear (rescaling) says so. Where a network outputs a learned variance, or
anything else beyond the channels of `x_t`, that part is the conditional network's own.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .paths import at_least_float32
from .predictions import Denoiser

Output = Float[Array, "*out"]


class AdaptiveScale(eqx.Module):
    """A guidance scale that looks at both outputs: `function(t, out, out_without) -> w`.

    `out` is the conditional (or the better) network's output, `out_without` the other's.

    >>> scale = AdaptiveScale(lambda t, out, without: 1 + jnp.mean(jnp.abs(out - without)))
    >>> float(scale.function(0.5, jnp.ones(2), jnp.zeros(2)))
    2.0
    """

    function: Callable[[Any, Output, Output], Float[Array, ""]] = eqx.field(static=True)


Scale = float | Float[Array, ""] | Callable[[Float[Array, ""]], Float[Array, ""]] | AdaptiveScale


def linear_scale(noise: float, data: float) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """`w(t) = data + (noise - data) t`: from `noise` at t = 1 to `data` at t = 0.

    A scale that grows as sampling goes on, `noise < data`, is what Wang et al. 2024 (analysis of
    guidance weight schedulers) found best among simple ones.

    >>> float(linear_scale(1.0, 5.0)(jnp.array(0.25)))
    4.0
    """
    _check_scales("linear_scale", noise, data)
    return lambda t: data + (noise - data) * t


def cosine_scale(noise: float, data: float) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """`w(t) = data + (noise - data) (1 - cos(pi t)) / 2`: flat at both ends.

    (Wang et al. 2024; half a period between the two values)

    >>> float(cosine_scale(1.0, 5.0)(jnp.array(1.0)))
    1.0
    """
    _check_scales("cosine_scale", noise, data)
    return lambda t: data + (noise - data) * (1 - jnp.cos(math.pi * t)) / 2


def bounded_scale(scale: float, bound: float) -> AdaptiveScale:
    """`w = 1 + (scale - 1) min(1, bound / rms(out - out_without))`: the update's size is bounded.

    The root mean square of what guidance adds never exceeds `(scale - 1) bound` (the rescaling
    of adaptive projected guidance, Sadat et al. 2024).

    >>> scale = bounded_scale(3.0, 0.5)
    >>> float(scale.function(0.5, jnp.ones(2), jnp.zeros(2)))
    2.0
    """
    _check_scales("bounded_scale", scale)
    if not bound > 0:
        raise ValueError(f"bounded_scale: bound must be positive, got {bound}.")

    def function(t: Any, out: Output, without: Output) -> Float[Array, ""]:
        difference = (out - without).astype(at_least_float32(out.dtype))
        mean_square = jnp.mean(difference * difference)
        size = jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1.0))  # no difference, any scale
        return 1 + (scale - 1) * jnp.minimum(1.0, bound / size)

    return AdaptiveScale(function)


def guide(
    denoiser: Denoiser,
    null: Any,
    scale: Scale,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """Classifier-free guidance: `out_u + w (out_c - out_u)` (Ho & Salimans 2022, eq. 6).

    `w`, theirs plus 1: 1 is the conditional network, 0 the unconditional one. Both branches run as
    one batch of two.

    **Arguments**:

    - `null`: the condition that means "none", a PyTree like `cond` (for a DiT, `dit.null`).
    - `scale`: a number; a function of `t`, such as `linear_scale(1, 5)`; or an `AdaptiveScale`.
    - `interval`: `(t_low, t_high)`, closed; outside of it only the conditional network is called
      (Kynkäänniemi et al. 2024).
    - `rescale`: `phi` in [0, 1]: `phi out std(out_c) / std(out) + (1 - phi) out`, the standard
      deviation over all guided channels of the example (Lin et al. 2023, eq. 15 and 16, who use
      0.7). Not linear: meant for v and eps networks, as published.
    - `channels`: guide only the first so many, the others stay conditional. The official DiT
      guides 3 of its 4 (Peebles & Xie 2023, their code).

    **Raises** `ValueError` for an interval, a rescale or channels out of range.

    >>> denoiser = lambda x_t, t, cond, key=None: cond * x_t
    >>> guided = guide(denoiser, jnp.array(1.0), 3.0)
    >>> guided(jnp.ones(2), jnp.array(0.5), jnp.array(2.0))
    Array([4., 4.], dtype=float32)
    """
    _check_arguments("guide", scale, interval, rescale, channels)

    def guided(x_t, t, cond, *, key=None, **options):
        def both(_):
            pair = stack_conditions(null, cond)
            out_u, out_c = jax.vmap(lambda c: denoiser(x_t, t, c, key=key, **options))(pair)
            return extrapolate(x_t, t, out_c, out_u, scale, rescale, channels)

        return _within(interval, t, both, lambda _: denoiser(x_t, t, cond, key=key, **options))

    return guided


def autoguide(
    denoiser: Denoiser,
    weak: Denoiser,
    scale: Scale,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """Autoguidance: `out_weak + w (out - out_weak)`, with a weaker model under the same condition.

    The weaker one is smaller or trained less, on the same data (Karras et al. 2024); both
    are called with `cond`. The other arguments are those of `guide`.

    >>> strong = lambda x_t, t, cond, key=None: 2 * x_t
    >>> weak = lambda x_t, t, cond, key=None: x_t
    >>> autoguide(strong, weak, 3.0)(jnp.ones(2), jnp.array(0.5), None)
    Array([4., 4.], dtype=float32)
    """
    _check_arguments("autoguide", scale, interval, rescale, channels)

    def guided(x_t, t, cond, *, key=None, **options):
        def both(_):
            out = denoiser(x_t, t, cond, key=key, **options)
            out_weak = weak(x_t, t, cond, key=key, **options)
            return extrapolate(x_t, t, out, out_weak, scale, rescale, channels)

        return _within(interval, t, both, lambda _: denoiser(x_t, t, cond, key=key, **options))

    return guided


def internal_guide(
    denoiser: Any, scale: Scale, *, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoiser:
    """Internal guidance: `out_early + w (out - out_early)`, both of one pass of one network.

    The weaker prediction is that of an auxiliary head after some of the blocks, so that guidance
    costs no second pass (Zhou et al. 2025, "Guiding a diffusion transformer with the internal
    dynamics of itself", who use it for `t >= 0.3`). 1 is the network itself. What comes out is a
    denoiser, which `guide` takes.

    **Arguments**: `denoiser` has `outputs`, as a `models.DiT` with `early_head` does; `scale` and
    `interval` are those of `guide`.

    **Raises** `ValueError` for a network without such a head.

    >>> from eqxldm.models import DiTOutputs
    >>> class Network:
    ...     def outputs(self, x_t, t, cond, *, key=None):
    ...         return DiTOutputs(2 * x_t, x_t)
    >>> internal_guide(Network(), 3.0)(jnp.ones(2), jnp.array(0.5), None)
    Array([4., 4.], dtype=float32)
    """
    _check_arguments("internal_guide", scale, interval, 0.0, None)
    if getattr(denoiser, "outputs", None) is None:
        raise ValueError(
            f"internal_guide: {type(denoiser).__name__} has no outputs(). It needs a DiT with "
            "early_depth and early_head=True."
        )

    def guided(x_t, t, cond, *, key=None, **options):
        def both(_):
            made = denoiser.outputs(x_t, t, cond, key=key, **options)
            if made.early is None:
                raise ValueError("internal_guide: the network has no early_head.")
            return extrapolate(x_t, t, made.out, made.early, scale, 0.0, None)

        return _within(interval, t, both, lambda _: denoiser(x_t, t, cond, key=key, **options))

    return guided


def stack_conditions(null: Any, cond: Any) -> Any:
    """The two conditions as a batch of two, the null one first.

    **Raises** `ValueError` if they are not alike.

    >>> stack_conditions(jnp.array(10), jnp.array(3)).tolist()
    [10, 3]
    """
    if jax.tree.structure(null) != jax.tree.structure(cond):
        raise ValueError(
            f"guide: null and cond must be alike, got {null} and {cond}. Was cond forgotten?"
        )

    def stack(n: Any, c: Any) -> Array:
        n, c = jnp.asarray(n), jnp.asarray(c)
        if n.shape != c.shape:
            raise ValueError(
                f"guide: null has the shape {n.shape} and cond {c.shape}. Both are of one "
                "example; jax.vmap makes the batch."
            )
        if jnp.issubdtype(n.dtype, jnp.inexact) != jnp.issubdtype(c.dtype, jnp.inexact):
            raise ValueError(f"guide: null is {n.dtype} and cond {c.dtype}; labels are integers.")
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(n.dtype, c.dtype)  # a null of 256 must not become a uint8
        return jnp.stack([n.astype(dtype), c.astype(dtype)])

    return jax.tree.map(stack, null, cond)


def _within(interval, t, both, alone):
    low, high = interval
    if (low, high) == (0.0, 1.0):
        return both(None)
    return jax.lax.cond((t >= low) & (t <= high), both, alone, None)


def extrapolate(
    x_t: Float[Array, "*shape"],
    t: Any,
    out: Output,
    without: Output,
    scale: Scale,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Output:
    """`without + w (out - without)` on the guided channels, `out` on the others.

    Arguments as in `guide`, which calls it with the network's two outputs.

    >>> extrapolate(jnp.ones(2), 0.5, jnp.ones(2), jnp.zeros(2), 3.0)
    Array([3., 3.], dtype=float32)
    """
    if channels is None and out.shape != x_t.shape:
        channels = x_t.shape[0]
    if channels is not None and channels > x_t.shape[0]:
        raise ValueError(f"channels = {channels}, but x_t has the shape {x_t.shape}.")
    own, without = out[:channels] if channels else out, without[:channels] if channels else without
    if isinstance(scale, AdaptiveScale):
        w = scale.function(t, own, without)
    else:
        w = scale(t) if callable(scale) else scale
    guided = without + jnp.asarray(w, out.dtype) * (own - without)
    if rescale:
        wide = [o.astype(jnp.float32) for o in (own, guided)]
        ratio = jnp.std(wide[0]) / jnp.maximum(jnp.std(wide[1]), 1e-12)
        guided = (rescale * ratio + (1 - rescale)).astype(out.dtype) * guided
    return jnp.concatenate([guided, out[channels:]]) if channels else guided


def _check_arguments(name, scale, interval, rescale, channels) -> None:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name}: interval must satisfy 0 <= low < high <= 1, got {interval}.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"{name}: rescale must lie in [0, 1], got {rescale}.")
    if channels is not None and channels < 1:
        raise ValueError(f"{name}: channels must be at least 1, got {channels}.")
    if isinstance(scale, int | float):
        _check_scales(name, scale)


def _check_scales(name: str, *scales: float) -> None:
    if not all(math.isfinite(s) for s in scales):
        raise ValueError(f"{name}: the scale must be finite, got {scales}.")
