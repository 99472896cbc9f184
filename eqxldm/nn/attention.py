"""Scaled dot-product attention and the multi-head layer around it."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .linear import Linear, xavier_uniform

# (n, heads, d), (m, heads, d), (m, heads, d) -> (n, heads, d)
Attention = Callable[[Any, Any, Any], Any]


def attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
) -> Float[Array, "n heads d"]:
    """`softmax(q k^T / sqrt(d)) v` for every head (Vaswani et al. 2017, eq. 1).

    The softmax is float32 whatever the inputs are.

    >>> attend(jnp.ones((4, 2, 8)), jnp.ones((6, 2, 8)), jnp.ones((6, 2, 8))).shape
    (4, 2, 8)
    """
    return jax.lax.platform_dependent(query, key, value, cpu=_attend_on_cpu, default=_attend)


def _attend(query: Array, key: Array, value: Array, fixed: Callable[[Array], Array] = lambda a: a):
    """Heads first, tokens second inside; `fixed` is applied to what is transposed.

    `(exp(s - m) v) / l` with the rows' maxima `m` and sums `l`: divided after the product, on `d`
    columns and not on `m`. Both are named, so that a remat policy can keep them
    (`models.save_narrow`): they are small, and dear to compute again.
    """
    q, k, v = (fixed(jnp.swapaxes(a, 0, 1)) for a in (query, key, value))
    scores = jnp.einsum("hnd,hmd->hnm", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - checkpoint_name(largest, "softmax"))
    total = checkpoint_name(jnp.sum(weights, axis=-1, keepdims=True), "softmax")
    out = jnp.einsum("hnm,hmd->hnd", weights.astype(v.dtype), v).astype(jnp.float32) / total
    return jnp.swapaxes(out.astype(v.dtype), 0, 1)


def _attend_on_cpu(query: Array, key: Array, value: Array) -> Array:
    """Without the barriers XLA:CPU moves the transposes into the matmuls, which then take two to
    three times as long."""
    return _attend(query, key, value, jax.lax.optimization_barrier)


def cudnn_attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
) -> Float[Array, "n heads d"]:
    """The same as `attend`, by cuDNN's fused kernel: no `(n, m)` array is ever in memory.

    For NVIDIA GPUs. A batch is made by `jax.vmap` over the leading axis, as everywhere.

    **Raises** `ValueError` unless the inputs are bfloat16 or float16 and `d` is a multiple of 8.

    >>> cudnn_attend(*3 * [jnp.ones((4, 2, 8))])
    Traceback (most recent call last):
    ValueError: cudnn_attend: needs bfloat16 or float16, got float32. Cast the input, or use attend.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cudnn_attend: needs bfloat16 or float16, got {query.dtype}. "
            "Cast the input, or use attend."
        )
    if query.shape[-1] % 8:
        raise ValueError(
            f"cudnn_attend: needs a head size that is a multiple of 8, got {query.shape[-1]}. "
            "Change width / heads, or use attend."
        )
    batched = query[None], key[None], value[None]  # cuDNN's layout: batch, tokens, heads, size
    return jax.nn.dot_product_attention(*batched, implementation="cudnn")[0]


class QKV(eqx.Module):
    """Queries, keys and values of tokens: `(n, in)` to three arrays `(n, heads, size)`.

    The weight is `(3, heads * size, in)` and not `(3 * heads * size, in)`: divided over devices
    along its second axis, each has the queries, keys and values of its own heads. It starts as
    one Xavier matrix, as in DiT.

    >>> q, k, v = QKV(8, num_heads=2, key=jax.random.key(0))(jnp.ones((5, 8)))
    >>> q.shape
    (5, 2, 4)
    """

    weight: Float[Array, "3 out in"]
    bias: Float[Array, "3 out"] | None
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, *, num_heads: int, use_bias: bool = True, key):
        check_heads(width, num_heads)
        self.weight = xavier_uniform(key, (3 * width, width)).reshape(3, width, width)
        self.bias = jnp.zeros((3, width)) if use_bias else None
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "n in"]) -> list[Float[Array, "n heads size"]]:
        # Three products, each with the heads first as attention wants them: of a single one TPUs
        # copy the parts out, and transpose them.
        weight = self.weight.astype(x.dtype).reshape(3, self.num_heads, -1, x.shape[-1])
        parts = [jnp.einsum("ni,hdi->hnd", x, w) for w in weight]
        if self.bias is not None:
            bias = self.bias.astype(x.dtype).reshape(3, self.num_heads, 1, -1)
            parts = [y + b for y, b in zip(parts, bias, strict=True)]
        return [jnp.swapaxes(y, 0, 1) for y in parts]


class RMSNorm(eqx.Module):
    """`scale x / sqrt(mean(x^2) + norm_eps)` over the last axis (Zhang & Sennrich 2019).

    `scale` is learned and starts at 1; the statistics are float32. As `qk_norm` of the attention
    it bounds the scores, which otherwise grow in long bfloat16 runs (Dehghani et al. 2023).

    >>> RMSNorm(2)(jnp.array([3.0, 3.0]))
    Array([0.99999994, 0.99999994], dtype=float32)
    """

    scale: Float[Array, " d"]
    norm_eps: float = eqx.field(static=True)

    def __init__(self, size: int, norm_eps: float = 1e-6):
        self.scale = jnp.ones(size)
        self.norm_eps = norm_eps

    def __call__(self, x: Float[Array, "*leading d"]) -> Float[Array, "*leading d"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, -1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.norm_eps) * self.scale).astype(x.dtype)


class SelfAttention(eqx.Module):
    """Multi-head self-attention over tokens `(n, d)`, with biases (Vaswani et al. 2017).

    **Arguments**: `width` must be a multiple of `num_heads`. `attention` is `attend`,
    `cudnn_attend`, or any function of such arguments. `qkv_bias`: whether queries, keys
    and values have one.

    >>> SelfAttention(8, 2, key=jax.random.key(0))(jnp.ones((5, 8))).shape
    (5, 8)
    """

    qkv: QKV
    proj: Linear
    attention: Attention = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        attention: Attention = attend,
        qkv_bias: bool = True,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.qkv = QKV(width, num_heads=num_heads, use_bias=qkv_bias, key=k1)
        self.proj = Linear(width, width, key=k2)
        self.attention = attention

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        q, k, v = self.qkv(x)
        y = self.attention(q, k, v).reshape(x.shape)
        return self.proj(checkpoint_name(y, "attention"))


class NormedSelfAttention(eqx.Module):
    """`SelfAttention` with a norm of the queries and one of the keys before they meet.

    **Arguments**: `qk_norm` makes such a norm from the head size: a module such as `RMSNorm`,
    shared by the heads. The others are those of `SelfAttention`.

    Its own class, so that a network without these norms has the same tree of parameters as ever:
    an optional field would be an empty node in its checkpoints.

    >>> layer = NormedSelfAttention(8, 2, qk_norm=RMSNorm, key=jax.random.key(0))
    >>> layer(jnp.ones((5, 8))).shape
    (5, 8)
    """

    qkv: QKV
    proj: Linear
    query_norm: Callable[[Array], Array]
    key_norm: Callable[[Array], Array]
    attention: Attention = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: Callable[[int], Any],
        attention: Attention = attend,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.qkv, self.proj = QKV(width, num_heads=num_heads, key=k1), Linear(width, width, key=k2)
        self.query_norm, self.key_norm = qk_norm(width // num_heads), qk_norm(width // num_heads)
        self.attention = attention

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        q, k, v = self.qkv(x)
        y = self.attention(self.query_norm(q), self.key_norm(k), v).reshape(x.shape)
        return self.proj(checkpoint_name(y, "attention"))


class CrossAttention(eqx.Module):
    """Multi-head attention of tokens `(n, d)` to a context `(m, context_size)`.

    Queries come from `x`, keys and values from the context, all without biases, as in latent
    diffusion (Rombach et al. 2022, section 3.3). Arguments as in `SelfAttention`.

    >>> layer = CrossAttention(8, 6, num_heads=2, key=jax.random.key(0))
    >>> layer(jnp.ones((5, 8)), jnp.ones((3, 6))).shape
    (5, 8)
    """

    query: Linear
    key: Linear
    value: Linear
    proj: Linear
    num_heads: int = eqx.field(static=True)
    attention: Attention = eqx.field(static=True)

    def __init__(
        self, width: int, context_size: int, *, num_heads: int, attention: Attention = attend, key
    ):
        check_heads(width, num_heads)
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.query = Linear(width, width, use_bias=False, key=kq)
        self.key = Linear(context_size, width, use_bias=False, key=kk)
        self.value = Linear(context_size, width, use_bias=False, key=kv)
        self.proj = Linear(width, width, key=ko)
        self.num_heads, self.attention = num_heads, attention

    def __call__(
        self, x: Float[Array, "n d"], context: Float[Array, "m context_size"]
    ) -> Float[Array, "n d"]:
        split = lambda y: y.reshape(len(y), self.num_heads, -1)
        q, k, v = split(self.query(x)), split(self.key(context)), split(self.value(context))
        return self.proj(self.attention(q, k, v).reshape(x.shape))


def check_heads(width: int, num_heads: int) -> None:
    """`ValueError` unless the width divides into the heads.

    >>> check_heads(8, 3)
    Traceback (most recent call last):
    ValueError: attention: width 8 does not divide into 3 heads.
    """
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"attention: width {width} does not divide into {num_heads} heads.")
