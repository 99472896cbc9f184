"""Attention by JAX's own Pallas kernel for TPUs, which keeps the scores in the chip's memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from jaxtyping import Array, Bool, Float

_LANES = 128  # a TPU's; tokens come in as many
_LONGEST = 512  # a block of queries, and of keys


def flash_attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
) -> Float[Array, "n heads d"]:
    """The same as `attend`, by a TPU's kernel: no `(n, m)` array is ever in memory.

    For TPUs (Dao et al. 2022; JAX's `pallas.ops.tpu.flash_attention`). Tokens are padded to a
    multiple of 128. On a mesh (`jax.set_mesh`) each device computes the heads that are its part of
    `tensor`; a batch is made by `sharding.batch_vmap`, over `data` and `fsdp`. It has no forward
    mode: objectives that take a `jax.jvp` of the network need `attend`.

    **Arguments**: `mask`, of the keys alone, `(m,)`. A query without any key gets zeros.

    **Raises** `ValueError` for a mask of another shape, and for a bias, which it does not have.

    >>> flash_attend(*3 * [jnp.ones((4, 2, 8))], bias=jnp.ones(4))
    Traceback (most recent call last):
    ValueError: flash_attend: takes no bias. Use attend for this layer.
    """
    if bias is not None:
        raise ValueError("flash_attend: takes no bias. Use attend for this layer.")
    if mask is not None and mask.shape != key.shape[:1]:
        raise ValueError(
            f"flash_attend: a mask must be of the {len(key)} keys alone, ({len(key)},), got "
            f"{mask.shape}. Use attend for this layer."
        )
    given = (query, key, value) if mask is None else (query, key, value, mask)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return _flash(*given)
    # The compiler cannot divide a kernel, so that it is told what each device computes.
    tensor = dict(mesh.shape).get("tensor", 1)
    heads = P(None, "tensor") if tensor > 1 and query.shape[1] % tensor == 0 else P()
    specs = (heads, heads, heads, P())[: len(given)]
    return jax.shard_map(_flash, in_specs=specs, out_specs=heads, check_vma=False)(*given)


def _flash(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """On one device."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    n, m = len(query), len(key)
    q, k, v = (_padded(jnp.swapaxes(a, 0, 1), 1)[None] for a in (query, key, value))
    segments = None
    if mask is not None or k.shape[2] != m:  # queries look at the keys of their own segment
        kept = jnp.ones(m, jnp.int32) if mask is None else mask.astype(jnp.int32)
        segments = flash.SegmentIds(jnp.ones((1, q.shape[2]), jnp.int32), _padded(kept, 0)[None])
    out = flash.flash_attention(
        q, k, v, segment_ids=segments, sm_scale=1 / math.sqrt(query.shape[-1]),
        block_sizes=_blocks(flash, q.shape[2], k.shape[2]),
    )[0, :, :n]  # fmt: skip
    if mask is not None:
        out = jnp.where(jnp.any(mask), out, 0)
    return jnp.swapaxes(out, 0, 1).astype(value.dtype)


def _padded(x: Array, axis: int) -> Array:
    short = -x.shape[axis] % _LANES
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if short else x


def _blocks(flash: Any, n: int, m: int) -> Any:
    """Blocks of as many tokens as fit, and divide."""
    q, k = (max(b for b in (128, 256, _LONGEST) if size % b == 0) for size in (n, m))
    return flash.BlockSizes(
        block_b=1, block_q=q, block_k_major=k, block_k=k,
        block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q,
        block_k_major_dq=k, block_k_dq=k, block_q_dq=q,
    )  # fmt: skip
