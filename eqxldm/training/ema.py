"""Averages of the parameters: exponential, and by power functions, of any length after training.

A decay function says how much of an average an update keeps: `decay(step)`, with `step` the number
of updates made before this one, an array inside jit. Updates that were skipped do not count.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

# step -> d in [0, 1): a number, an array, or a Complement; only `1 - d` is asked of it
Decay = Callable[[Int[Array, ""]], Any]
Snapshots = Sequence[tuple[int, float]]  # (updates, sigma_rel)
WIDEST = 12**-0.5  # sigma_rel of the flat profile, gamma = 0


class Complement(eqx.Module):
    """A decay held as `1 - decay`: float32 keeps three digits of 1e-5, but not of 1 - 0.99999.

    >>> float(1 - Complement(jnp.float32(1e-9)))
    9.999999717180685e-10
    """

    value: Float[Array, ""]

    def __rsub__(self, other):
        return (other - 1) + self.value


def update_ema(ema: PyTree, params: PyTree, decay: Any) -> PyTree:
    """`ema + (1 - d)(params - ema)`, in float32: at d = 0.9999 a bfloat16 average never moves.

    >>> float(update_ema(jnp.array(0.0), jnp.array(1.0), 0.75))
    0.25
    """
    rate = jnp.asarray(1 - decay, jnp.float32)
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), ema, params)


def constant(decay: float) -> Decay:
    """The same decay at every update.

    The average starts from the initial weights and forgets them as `d^t`; DiT's recipe is 0.9999.

    >>> constant(0.9999)(jnp.array(0))
    0.9999
    """
    _check_decay("constant", decay)
    return lambda step: decay


def exponential(decay: float) -> Decay:
    """`min(decay, (1 + step) / (10 + step))`: a short warm-up lets it forget the random start.

    >>> float(exponential(0.999)(jnp.array(0)))
    0.10000000149011612
    """
    _check_decay("exponential", decay)
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)


def power_function(sigma_rel: float) -> Decay:
    """`d = (1 - 1/t)^(gamma + 1)` at update `t = step + 1`: the average over the power function.

    After `t` updates the parameters of update `i` have the weight `(i^g - (i-1)^g) / t^g`, with
    `g = gamma + 1`: the integral of the profile `g tau^gamma / t^g` over `(i - 1, i]` (Karras et
    al. 2024, appendix C). Its width is `sigma_rel t`, the same share of the training at all
    times, and it holds nothing of the start: at the first update `d = 0`.

    **Raises** `ValueError` unless `0 < sigma_rel < 12^-0.5 = 0.2887`.

    >>> decay = power_function(0.1)
    >>> [round(float(1 - decay(jnp.array(step))), 6) for step in (0, 1, 10**6)]
    [1.0, 0.99592, 8e-06]
    """
    power = gamma_of(sigma_rel) + 1

    def decay(step: Int[Array, ""]) -> Complement:
        t = (step + 1).astype(jnp.float32)
        return Complement(-jnp.expm1(power * jnp.log1p(-1 / t)))

    return decay


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose width is `sigma_rel`: the inverse of `sigma_of`.

    The root of `gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s = 0` with `s = sigma_rel^-2` and
    `gamma > 0` (Karras et al. 2024, algorithm 2).

    **Raises** `ValueError` unless `0 < sigma_rel < 12^-0.5 = 0.2887`.

    >>> round(gamma_of(0.05), 4), round(gamma_of(0.1), 4)
    (16.9722, 6.9372)
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(
            f"sigma_rel must lie between 0 and {WIDEST:.4f} (all updates weighted alike), got "
            f"{sigma_rel}. It is the width of the average as a share of the training: 0.05, say."
        )
    s = float(sigma_rel) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def sigma_of(gamma: float) -> float:
    """`sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))`: the profile's standard deviation over t.

    (Karras et al. 2024, appendix C)

    >>> round(sigma_of(6.94), 4)
    0.1
    """
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def posthoc_weights(
    snapshots: Snapshots,
    target_updates: int,
    target_sigma_rel: float,
    *,
    largest_error: float = 0.3,
) -> Float[np.ndarray, " n"]:
    """The weights with which stored averages come nearest to another one, in float64.

    Minimises `|p - sum_i w_i p_i|` over the profiles in L2, subject to `sum_i w_i = 1`
    (Karras et al. 2024, appendix C and algorithm 3).

    **Args**: `snapshots`: `(updates, sigma_rel)` of each stored average, where `updates` counts
    those made, not those skipped. `target_updates`: when training would have ended; at most the
    last snapshot's. `largest_error`: the relative error of the profile that is still accepted.

    **Raises** `ValueError` for a target beyond the last snapshot, or that the snapshots do not
    describe to `largest_error`.

    >>> posthoc_weights([(1000, 0.05), (1000, 0.1)], 1000, 0.07).round(3)
    array([0.481, 0.519])
    """
    if not len(snapshots):
        raise ValueError("posthoc_weights: no snapshots; give (updates, sigma_rel) of each.")
    last = max(updates for updates, _ in snapshots)
    if min(updates for updates, _ in snapshots) < 1 or target_updates < 1:
        raise ValueError(
            "posthoc_weights: an average exists after 1 update; got snapshots at "
            f"{[updates for updates, _ in snapshots]} and a target at {target_updates}."
        )
    if target_updates > last:
        raise ValueError(
            f"posthoc_weights: the target is at update {target_updates}, but the last snapshot is "
            f"of update {last}: no snapshot knows later weights. Ask for {last} or less."
        )
    gram, cross, norm = _inner_products(snapshots, target_updates, target_sigma_rel)
    n = len(snapshots)
    # Lagrange: [gram 1; 1' 0] [w; multiplier] = [cross; 1], in units of the target's norm.
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram / norm
    system[:n, n] = system[n, :n] = 1
    weights = np.linalg.lstsq(system, np.append(cross / norm, 1.0), rcond=None)[0][:n]
    error = _profile_error(weights, gram, cross, norm)
    if not error <= largest_error:
        raise ValueError(
            f"posthoc_weights: {n} snapshots describe sigma_rel {target_sigma_rel} at update "
            f"{target_updates} only to {error:.0%} of its profile; {largest_error:.0%} is allowed. "
            "Ask for a width nearer to the stored ones, at an update that has a snapshot, or store "
            "snapshots more often."
        )
    return weights


def posthoc_error(
    snapshots: Snapshots,
    weights: Float[np.ndarray, " n"],
    target_updates: int,
    target_sigma_rel: float,
) -> float:
    """`|p - sum_i w_i p_i| / |p|` in L2: how far the combined profile is from the one asked for.

    With weights that sum to 1, the average of parameters `theta_i` is off by at most this times
    `|p| sqrt(sum_i |theta_i - c|^2)`, for any `c` (Cauchy-Schwarz).

    >>> snapshots = [(1000, 0.05), (1000, 0.1)]
    >>> round(posthoc_error(snapshots, posthoc_weights(snapshots, 1000, 0.07), 1000, 0.07), 3)
    0.051
    """
    return _profile_error(weights, *_inner_products(snapshots, target_updates, target_sigma_rel))


def posthoc_ema(trees: Iterable[PyTree], weights: Float[np.ndarray, " n"]) -> PyTree:
    """`sum_i w_i tree_i` as float32 NumPy arrays, summed in float64: some weights are large.

    `trees` may be an iterator that loads one snapshot after the other; one at a time is held.

    >>> posthoc_ema(iter([{"w": np.ones(2)}, {"w": np.zeros(2)}]), np.array([0.75, 0.25]))
    {'w': array([0.75, 0.75], dtype=float32)}
    """
    total: list[np.ndarray] = []
    form, count = None, 0
    for tree in trees:
        leaves, structure = jax.tree.flatten(tree)
        shapes = [np.shape(leaf) for leaf in leaves]
        if form is None:
            form, total = (structure, shapes), [np.zeros(shape) for shape in shapes]
        if (structure, shapes) != form:
            raise ValueError(f"posthoc_ema: tree {count} has other parameters than the first.")
        if count < len(weights):
            total = [
                a + weights[count] * np.asarray(b, np.float64)
                for a, b in zip(total, leaves, strict=True)
            ]
        count += 1
    if form is None or count != len(weights):
        raise ValueError(f"posthoc_ema: got {count} trees for {len(weights)} weights.")
    return jax.tree.unflatten(form[0], [a.astype(np.float32) for a in total])


def _check_decay(name: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{name}: decay must lie in [0, 1), got {decay}; 0.9999 is usual.")


def _inner_products(snapshots: Snapshots, updates: int, sigma_rel: float):
    """`<p_i, p_j>`, `<p_i, p>` and `<p, p>` over tau, of the snapshots' profiles and the target's.

    `<p_a, p_b> = (a + 1)(b + 1) / (a + b + 1) (t_min / t_max)^gamma / t_max`, with `a`, `b` the
    exponents and `gamma` that of the profile which ends at `t_max`.
    """
    t = np.array([n for n, _ in snapshots] + [updates], np.float64)
    gamma = np.array([gamma_of(s) for _, s in snapshots] + [gamma_of(sigma_rel)])
    a, b = gamma[:, None], gamma[None, :]
    ratio = t[:, None] / t[None, :]
    power = np.where(ratio < 1, b, -a)
    products = (a + 1) * (b + 1) / (a + b + 1) * ratio**power / np.maximum(t[:, None], t)
    return products[:-1, :-1], products[:-1, -1], products[-1, -1]


def _profile_error(weights: np.ndarray, gram: np.ndarray, cross: np.ndarray, norm: float) -> float:
    square = norm - 2 * weights @ cross + weights @ gram @ weights
    return float(np.sqrt(max(square, 0.0) / norm))
