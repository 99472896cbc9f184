"""Consistency functions: sCM on the trigonometric path, and easy consistency tuning.

A consistency function gives of every point of a trajectory of the ODE its end, `f(x_t, t) = x0`.
The trigonometric path (TrigFlow) is `CosineVP()`: `x_t = cos(phi) x0 + sin(phi) z` with `phi = pi t
/ 2`. Data and noise have unit variance here; in the paper both are `sigma_d` times that.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..diffusion import Diffusion
from ..paths import CosineVP, at_least_float32
from ..predictions import predict_v
from ..times import TimeSampler, angle_time, logit_normal_time, time_at_angle
from .base import Aux, Context, OneTimeObjective

X = Float[Array, "*shape"]
T = Float[Array, ""]
TRIG = Diffusion(CosineVP(), predict_v)


def consistency_tangent(
    denoiser: Any, x_t: X, t: T, cond: PyTree, y: X, r: Any = 1.0, *, key: Any = None
) -> tuple[X, X]:
    """`F` and the tangent `g = -cos^2 (F - y) - r cos sin (x_t + dF/dphi)`, a constant.

    `y = dx_t/dphi` is the velocity and `dF/dphi` the derivative along it; the angle's sine and
    cosine stand inside the derivative, so that nothing is large (Lu & Song 2025, algorithm 1 and
    section 4.2). With `r = 1` it is `cos(phi) df/dphi`, which is 0 at the truth; tangent warm-up
    raises `r` from 0 to 1.

    >>> F = lambda x, t, cond, key=None: jnp.zeros_like(x)
    >>> _, g = consistency_tangent(F, jnp.ones(1), jnp.array(0.0), None, jnp.full(1, 2.0))
    >>> g
    Array([2.], dtype=float32)
    """
    work = at_least_float32(x_t.dtype)
    phi = jnp.asarray(t, work) * (math.pi / 2)
    cos, sin = jnp.cos(phi), jnp.sin(phi)
    both = cos * sin
    along = lambda x, t: denoiser(x, t, cond, key=key)
    dt = (both * 2 / math.pi).astype(t.dtype)
    F, J = jax.jvp(along, (x_t, t), ((both * y).astype(x_t.dtype), dt))
    F, J = F.astype(work), jax.lax.stop_gradient(J).astype(work)
    g = -(cos**2) * (F - y) - r * (both * x_t + J)
    return F, jax.lax.stop_gradient(g)


class SCM(OneTimeObjective):
    """sCM: continuous-time consistency on the trigonometric path, trained or distilled.

    `exp(w) / D |F - sg(F) - g|^2 - w` with `g` of `consistency_tangent`, normalised to
    `g / (|g| + c)`. The network is a v network of `CosineVP` (`F`) with one time, read unscaled
    (`nn.Sinusoid(scale=1.0, offset=0.0)`). `consistency_function`, `renoise` and `sample_map`
    sample it. `w` is the network's `log_weight(t)` if it has that (`nn.Weighted`), a weight that
    learns to make the loss of all times alike. Otherwise it is 0.

    **Arguments**:

    - `teacher`: a finished v network of `CosineVP`, `(x_t, t, cond, key=None)`, with its guidance:
      consistency distillation (sCD). None: training (sCT), with `y` of the data. No gradient flows
      into it.
    - `time_sampler`: by default `angle_time(-0.3, 1.4)`, CIFAR-10's for data of unit variance.
    - `warmup`: steps until `r` is 1. Without a context it is 1.
    - `norm_eps`: `c`. None leaves the tangent as it is.

    Logs `tangent`, the root mean square of `g` before it is normalised.

    (Lu & Song 2025, "Simplifying, stabilizing and scaling continuous-time consistency models")

    >>> SCM().times(jax.random.key(0), 3).shape
    (3,)
    """

    teacher: Any = None
    time_sampler: TimeSampler = eqx.field(static=True, default=angle_time(-0.3, 1.4))
    warmup: int = eqx.field(static=True, default=10_000)
    norm_eps: float | None = eqx.field(static=True, default=0.1)

    def loss(
        self,
        denoiser: Any,
        x0: X,
        times: T,
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[T, Aux]:
        eps_key, denoiser_key = jax.random.split(key)
        z = jax.random.normal(eps_key, x0.shape, x0.dtype)
        x_t, y = TRIG.noise(x0, times, z), TRIG.target(x0, times, z)
        if self.teacher is not None:
            y = jax.lax.stop_gradient(self.teacher(x_t, times, cond, key=None))
        r = 1.0
        if context is not None and self.warmup:
            r = jnp.minimum(1.0, context.step / self.warmup)
        F, g = consistency_tangent(denoiser, x_t, times, cond, y, r, key=denoiser_key)
        size = jnp.sqrt(jnp.sum(g * g))
        aux = {"tangent": size / math.sqrt(g.size)}
        if self.norm_eps is not None:
            g = g / (size + self.norm_eps)
        log_weight = getattr(denoiser, "log_weight", None)
        w = jnp.zeros_like(size) if log_weight is None else log_weight(times)
        square = jnp.mean((F - jax.lax.stop_gradient(F) - g) ** 2)
        return jnp.exp(w) * square - w, aux


class EasyConsistency(OneTimeObjective):
    """Easy consistency tuning: a finished denoiser becomes a consistency model step by step.

    `(sqrt(|f(x_t, t) - sg f(x_r, r)|^2 + c^2) - c) / (rho_t - rho_r)`, both states with one noise
    and both calls with one dropout. `rho = sigma / alpha`, and

        rho_r / rho_t = max(0, 1 - n(rho_t) / q^a),  n(rho) = 1 + k sigmoid(-b rho)

    with `a` one more after every `stage_steps`. At first `r = 0`, which is the denoiser's own loss;
    then `r` comes nearer and nearer to `t` (Geng et al. 2025, "Consistency models made easy").
    No derivative of the network: any kernel and bfloat16 will do. `consistency_function`,
    `renoise` and `sample_map` sample it.

    **Arguments**: `diffusion` is the denoiser's own, on any path. `stage` is the first `a`; `c` is
    the constant of the pseudo-Huber distance, by default `0.00054 sqrt(D)` (Song & Dhariwal 2024).

    >>> EasyConsistency(TRIG).times(jax.random.key(0), 3).shape
    (3,)
    """

    diffusion: Diffusion
    time_sampler: TimeSampler = eqx.field(static=True, default=logit_normal_time(0.0, 1.0))
    q: float = eqx.field(static=True, default=2.0)
    k: float = eqx.field(static=True, default=8.0)
    b: float = eqx.field(static=True, default=1.0)
    stage: int = eqx.field(static=True, default=1)
    stage_steps: int = eqx.field(static=True, default=10_000)
    c: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not (self.q > 1 and self.stage_steps > 0):
            raise ValueError(
                "EasyConsistency: need q > 1 and stage_steps > 0, got "
                f"{self.q} and {self.stage_steps}."
            )

    def loss(
        self,
        denoiser: Any,
        x0: X,
        times: T,
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[T, Aux]:
        eps_key, denoiser_key = jax.random.split(key)
        t, path = times, self.diffusion.path
        at = path.coefficients(t)
        rho_t = at.sigma / jnp.maximum(at.alpha, 1e-4)
        step = 0 if context is None else context.step
        a = self.stage + step // self.stage_steps
        n = 1 + self.k * jax.nn.sigmoid(-self.b * rho_t)
        ratio = jnp.maximum(0.0, 1 - n * jnp.asarray(self.q, t.dtype) ** -a)
        rho_r = ratio * rho_t
        r = time_at_angle(path, jnp.arctan(rho_r))
        eps = jax.random.normal(eps_key, x0.shape, x0.dtype)

        def f(t: T) -> X:
            x_t = self.diffusion.noise(x0, t, eps)
            out = denoiser(x_t, t, cond, key=denoiser_key)
            return self.diffusion.estimate(x_t, t, out).x0

        # At r = 0 the state is x0 itself, and some predictions say nothing there.
        asked = jnp.where(ratio > 0, r, t)
        end = jax.lax.stop_gradient(jnp.where(ratio > 0, f(asked), x0))
        difference = f(t) - end
        c = 0.00054 * math.sqrt(x0.size) if self.c is None else self.c
        # The square root has no derivative at 0 where c is 0.
        square = jnp.sum(difference * difference)
        root = jnp.sqrt(jnp.where(square + c * c > 0, square + c * c, 1.0))
        distance = jnp.where(square + c * c > 0, root - c, 0.0)
        return distance / (rho_t - rho_r), {"gap": jnp.sqrt(square / x0.size)}
