"""Scaled dot-product attention and the multi-head layers around it."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..sharding import gather_params
from .dtypes import at_least_float32
from .linear import Linear, xavier_uniform, zeros
from .norms import GroupNorm
from .rope import Rotation

# (n, heads, d), (m, heads, d), (m, heads, d) -> (n, heads, d); also called with `mask=` and `bias=`
# where there are any.
Attention = Callable[..., Any]

# A score that gets no weight beside any other. Finite: differences of infinities are NaN.
LOWEST = -1e30
# On CPUs so many scores of an example, or more, are made in parts of so many queries. From jax 0.12
# on XLA does as well by itself (docs/benchmarks.md).
CPU_SCORES, CPU_BLOCK = 2**21 if jax.__version_info__ < (0, 12) else 2**62, 128


def attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
) -> Float[Array, "n heads d"]:
    """`softmax(q k^T / sqrt(d) + bias) v` for every head (Vaswani et al. 2017, eq. 1).

    **Arguments**: `mask` is true where a query may look at a key: `(m,)` for all queries alike,
    `(n, m)`, or `(heads, n, m)`. `bias` is added to the scores, of the same shapes; where it is
    minus infinity the key is masked. A query without any key gets zeros.

    The softmax is float32 whatever the inputs are. Values and gradients are finite under any mask.

    **Raises** `ValueError` for a mask or bias of another shape.

    >>> q, k = jnp.ones((4, 2, 8)), jnp.ones((6, 2, 8))
    >>> attend(q, k, k, mask=jnp.arange(6) < 3).shape
    (4, 2, 8)
    """
    shape = (query.shape[1], query.shape[0], key.shape[0])
    for name, given in (("mask", mask), ("bias", bias)):
        if given is not None and not _broadcasts(given.shape, shape):
            raise ValueError(
                f"attend: {name} must broadcast to (heads, queries, keys) = {shape}, such as "
                f"({shape[2]},) or {shape[1:]}; got {given.shape}."
            )
    given = query, key, value, mask, bias
    return jax.lax.platform_dependent(*given, cpu=_attend_on_cpu, default=attend_plainly)


def attend_plainly(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    fixed: Callable[[Array], Array] = lambda a: a,
) -> Array:
    """`attend` without a choice by platform, for what has none, such as ONNX.

    Heads first, tokens second inside; `fixed` is applied to what is transposed.

    `(exp(s - m) v) / l` with the rows' maxima `m` and sums `l`: divided after the product, on `d`
    columns and not on `m`. Both are named, so that a remat policy can keep them (`save_narrow`):
    they are small, and much work to compute again.
    """
    q, k, v = (fixed(jnp.swapaxes(a, 0, 1)) for a in (query, key, value))
    precise = at_least_float32(q.dtype)
    scores = jnp.einsum("hnd,hmd->hnm", q, k).astype(precise) / math.sqrt(q.shape[-1])
    if bias is not None:
        allowed = bias != -jnp.inf
        mask = allowed if mask is None else mask & allowed
        scores = scores + bias.astype(precise)
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - checkpoint_name(largest, "softmax"))
    if mask is not None:  # a row without a key has only LOWEST, and so a 1 everywhere
        weights = jnp.where(mask, weights, 0.0)
    total = checkpoint_name(jnp.sum(weights, axis=-1, keepdims=True), "softmax")
    if mask is not None:
        total = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("hnm,hmd->hnd", weights.astype(v.dtype), v).astype(precise) / total
    return jnp.swapaxes(out.astype(v.dtype), 0, 1)


def _attend_on_cpu(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
) -> Array:
    """Without the barriers XLA:CPU moves the transposes into the matmuls, which then take two to
    three times as long. Scores that no cache holds are made in parts, of some queries each."""
    n, heads, _ = query.shape
    if n % CPU_BLOCK or n * heads * len(key) < CPU_SCORES:
        return attend_plainly(query, key, value, mask, bias, jax.lax.optimization_barrier)

    def parts(x: Array | None) -> Array | None:
        """Of what has an axis of queries, the last but one; None for what all of them share."""
        if x is None or x.ndim < 2 or x.shape[-2] != n:
            return None
        split = x.reshape(*x.shape[:-2], n // CPU_BLOCK, CPU_BLOCK, x.shape[-1])
        return jnp.moveaxis(split, -3, 0)

    @jax.checkpoint
    def one(part: Any) -> Array:
        q, seen, added = part
        seen, added = mask if seen is None else seen, bias if added is None else added
        return attend_plainly(q, key, value, seen, added, jax.lax.optimization_barrier)

    queries = query.reshape(n // CPU_BLOCK, CPU_BLOCK, *query.shape[1:])
    out = jax.lax.map(one, (queries, parts(mask), parts(bias)))
    return out.reshape(n, *out.shape[2:])


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)


def attend_in_blocks(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    *,
    block: int = 1024,
) -> Float[Array, "n heads d"]:
    """The same as `attend`, with the scores of at most `block` queries in memory at a time.

    For the many tokens of a clip or a large image, on any device: one part of the queries after the
    other in a `jax.lax.map`, and again in the backward pass, which keeps no scores. Up to `2 block`
    queries it is `attend`. A part takes every `count`-th query, so that queries that are divided
    over a mesh stay where they are.

    >>> q, k = jnp.ones((5, 2, 8)), jnp.ones((6, 2, 8))
    >>> attend_in_blocks(q, k, k, jnp.arange(6) < 3, block=2).shape
    (5, 2, 8)
    """
    n = len(query)
    if n <= 2 * block:
        return attend(query, key, value, mask, bias)
    count = -(-n // block)

    def parts(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], block, count, *x.shape[axis + 1 :])
        pad = [(0, block * count - n if i == axis else 0) for i in range(x.ndim)]
        return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis + 1, 0)

    def own(x: Array | None) -> Array | None:
        if x is None or x.ndim < 2 or x.shape[-2] != n:
            return None
        return parts(x, x.ndim - 2)

    @jax.checkpoint
    def one(part: Any) -> Array:
        q, *given = part
        given = [a if b is None else b for a, b in zip((mask, bias), given, strict=True)]
        return attend(q, key, value, *given)

    y = jax.lax.map(one, (parts(query, 0), own(mask), own(bias)))
    return jnp.moveaxis(y, 0, 1).reshape(block * count, *y.shape[2:])[:n]


def cudnn_attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
) -> Float[Array, "n heads d"]:
    """The same as `attend`, by cuDNN's fused kernel: no `(n, m)` array is ever in memory.

    For NVIDIA GPUs. A batch is made by `jax.vmap` over the leading axis, as everywhere. It has no
    forward mode: objectives that take a `jax.jvp` of the network need `attend`.

    **Raises** `ValueError` unless the inputs are bfloat16 or float16 and `d` is a multiple of 8,
    and for a mask or a bias, which it does not have.

    >>> cudnn_attend(*3 * [jnp.ones((4, 2, 8))])
    Traceback (most recent call last):
    ValueError: cudnn_attend: needs bfloat16 or float16, got float32. Cast the input, or use attend.
    """
    if mask is not None or bias is not None:
        name = "bias" if mask is None else "mask"
        raise ValueError(f"cudnn_attend: takes no {name}. Use attend for this layer.")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cudnn_attend: needs bfloat16 or float16, got {query.dtype}. "
            "Cast the input, or use attend."
        )
    if query.shape[-1] % 8:
        raise ValueError(
            f"cudnn_attend: needs a head size that is a multiple of 8, got {query.shape[-1]}. "
            "Change width / num_heads, or use attend."
        )
    batched = query[None], key[None], value[None]  # cuDNN's layout: batch, tokens, heads, size
    return jax.nn.dot_product_attention(*batched, implementation="cudnn")[0]


class QKV(eqx.Module):
    """Queries, keys and values of tokens: `(n, in)` to three arrays `(n, heads, size)`.

    The weight is `(3, heads * size, in)` and not `(3 * heads * size, in)`: divided over devices
    along its second axis, each has the queries, keys and values of its own heads. It starts as
    one Xavier matrix, as in DiT. `head_size` is `width / num_heads` by default.

    >>> q, k, v = QKV(8, num_heads=2, key=jax.random.key(0))(jnp.ones((5, 8)))
    >>> q.shape
    (5, 2, 4)
    """

    weight: Float[Array, "3 out in"]
    bias: Float[Array, "3 out"] | None
    num_heads: int = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_size: int | None = None,
        use_bias: bool = True,
        key,
    ):
        if head_size is None:
            check_heads(width, num_heads)
        out = width if head_size is None else num_heads * head_size
        self.weight = xavier_uniform(key, (3 * out, width)).reshape(3, out, width)
        self.bias = jnp.zeros((3, out)) if use_bias else None
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


class SelfAttention(eqx.Module):
    """Multi-head self-attention over tokens `(n, d)`, with biases (Vaswani et al. 2017).

    **Arguments**:

    - `width` must be a multiple of `num_heads`, or `head_size` be given.
    - `attention`: `attend`, `cudnn_attend`, or any function of such arguments.
    - `qk_norm`: makes a norm of the queries, and one of the keys, from a size: `RMSNorm`. By
      default from the head size, one for all heads (Dehghani et al. 2023; SD3.5 and FLUX have
      it so); with `qk_norm_full_width` from the width, before the heads are split (Wan, LTX).
    - `qkv_bias`: whether queries, keys and values have one.
    - `use_proj`: whether a linear layer follows, `proj`, and `proj_bias` whether it has a bias.
      Without it the heads' outputs are what comes out.

    In the call, `mask` and `bias` are those of `attend`, and `rotation` turns queries and keys
    after their norms (`RoPE`). `heads` are the queries, keys and values alone, for attention over
    several sequences at once.

    >>> SelfAttention(8, 2, key=jax.random.key(0))(jnp.ones((5, 8))).shape
    (5, 8)
    """

    qkv: QKV
    proj: Linear | None
    query_norm: Callable[[Array], Array] | None
    key_norm: Callable[[Array], Array] | None
    qk_norm_full_width: bool = eqx.field(static=True)
    attention: Attention = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_size: int | None = None,
        qk_norm: Callable[[int], Any] | None = None,
        qk_norm_full_width: bool = False,
        qkv_bias: bool = True,
        use_proj: bool = True,
        proj_bias: bool = True,
        attention: Attention = attend,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.qkv = QKV(width, num_heads=num_heads, head_size=head_size, use_bias=qkv_bias, key=k1)
        out = self.qkv.weight.shape[1]
        self.proj = Linear(out, width, use_bias=proj_bias, key=k2) if use_proj else None
        self.query_norm, self.key_norm = _qk_norms(qk_norm, out, num_heads, qk_norm_full_width)
        self.qk_norm_full_width, self.attention = qk_norm_full_width, attention

    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        *,
        rotation: Rotation | None = None,
    ) -> Float[Array, "n d"]:
        q, k, v = self.heads(x, rotation=rotation)
        y = self.attention(q, k, v, **_present(mask, bias)).reshape(len(x), -1)
        y = checkpoint_name(y, "attention")
        return y if self.proj is None else self.proj(y)

    def heads(
        self, x: Float[Array, "n d"], *, rotation: Rotation | None = None
    ) -> list[Float[Array, "n heads size"]]:
        """Queries, keys and values, the first two normed and rotated.

        >>> len(SelfAttention(8, 2, key=jax.random.key(0)).heads(jnp.ones((5, 8))))
        3
        """
        q, k, v = self.qkv(x)
        q = _prepared(q, self.query_norm, self.qk_norm_full_width, rotation)
        k = _prepared(k, self.key_norm, self.qk_norm_full_width, rotation)
        return [q, k, v]


class CrossAttention(eqx.Module):
    """Multi-head attention of tokens `(n, d)` to a context `(m, context_size)`.

    Queries come from `x`, keys and values from the context, all without biases by default, as in
    latent diffusion (Rombach et al. 2022, section 3.3). Arguments as in `SelfAttention`; `rotation`
    turns the queries and `context_rotation` the keys.

    >>> layer = CrossAttention(8, 6, num_heads=2, key=jax.random.key(0))
    >>> layer(jnp.ones((5, 8)), jnp.ones((3, 6))).shape
    (5, 8)
    """

    query: Linear
    key: Linear
    value: Linear
    proj: Linear
    query_norm: Callable[[Array], Array] | None
    key_norm: Callable[[Array], Array] | None
    num_heads: int = eqx.field(static=True)
    qk_norm_full_width: bool = eqx.field(static=True)
    attention: Attention = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        context_size: int,
        *,
        num_heads: int,
        qk_norm: Callable[[int], Any] | None = None,
        qk_norm_full_width: bool = False,
        qkv_bias: bool = False,
        attention: Attention = attend,
        key,
    ):
        check_heads(width, num_heads)
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.query = Linear(width, width, use_bias=qkv_bias, key=kq)
        self.key = Linear(context_size, width, use_bias=qkv_bias, key=kk)
        self.value = Linear(context_size, width, use_bias=qkv_bias, key=kv)
        self.proj = Linear(width, width, key=ko)
        self.query_norm, self.key_norm = _qk_norms(qk_norm, width, num_heads, qk_norm_full_width)
        self.qk_norm_full_width = qk_norm_full_width
        self.num_heads, self.attention = num_heads, attention

    def __call__(
        self,
        x: Float[Array, "n d"],
        context: Float[Array, "m context_size"],
        mask: Bool[Array, "..."] | None = None,
        bias: Float[Array, "..."] | None = None,
        *,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Float[Array, "n d"]:
        split = lambda y: y.reshape(len(y), self.num_heads, -1)
        q, k, v = split(self.query(x)), split(self.key(context)), split(self.value(context))
        q = _prepared(q, self.query_norm, self.qk_norm_full_width, rotation)
        k = _prepared(k, self.key_norm, self.qk_norm_full_width, context_rotation)
        y = self.attention(q, k, v, **_present(mask, bias))
        return self.proj(y.reshape(x.shape))


class AttentionBlock(eqx.Module):
    """Self-attention over all positions of a feature map, with a residual.

    `channels` must divide by `num_heads`; the autoencoder and DDPM have one. `norm` makes the norm
    from their number, by default a `GroupNorm`.

    >>> import jax.numpy as jnp
    >>> AttentionBlock(8, groups=4, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 8)
    """

    norm: Callable[[Array], Array]
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    attention: Attention = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        groups: int = 32,
        norm_eps: float = 1e-6,
        norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        check_heads(channels, num_heads)
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.norm = GroupNorm(channels, groups, norm_eps) if norm is None else norm(channels)
        self.query = Linear(channels, channels, key=kq)
        self.key = Linear(channels, channels, key=kk)
        self.value = Linear(channels, channels, key=kv)
        self.out = Linear(channels, channels, init=zeros, key=ko)
        self.num_heads, self.attention = num_heads, attention

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        block = gather_params(self, x.dtype)
        tokens = self.norm(x).reshape(-1, x.shape[-1])
        split = lambda y: y.reshape(len(tokens), self.num_heads, -1)
        q, k, v = (split(layer(tokens)) for layer in (block.query, block.key, block.value))
        y = self.attention(q, k, v)
        return x + block.out(y.reshape(tokens.shape)).reshape(x.shape)


def _qk_norms(make: Any, width: int, num_heads: int, full_width: bool) -> tuple[Any, Any]:
    if make is None:
        return None, None
    size = width if full_width else width // num_heads
    return make(size), make(size)


def _prepared(
    x: Float[Array, "n heads size"], norm: Any, full_width: bool, rotation: Rotation | None
) -> Float[Array, "n heads size"]:
    """Queries or keys, normed and rotated."""
    if norm is not None:
        x = norm(x.reshape(len(x), -1)).reshape(x.shape) if full_width else norm(x)
    return x if rotation is None else rotation(x)


def _present(mask: Array | None, bias: Array | None) -> dict[str, Array]:
    """Only what there is: an `attention` of three arguments serves where there is neither."""
    return {k: v for k, v in (("mask", mask), ("bias", bias)) if v is not None}


def check_heads(width: int, num_heads: int) -> None:
    """`ValueError` unless the width divides into the heads.

    >>> check_heads(8, 3)
    Traceback (most recent call last):
    ValueError: attention: width 8 does not divide into 3 heads.
    """
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"attention: width {width} does not divide into {num_heads} heads.")
