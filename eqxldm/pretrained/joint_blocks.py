"""The blocks of MMDiT and FLUX: the table of a stack of `JointBlock`, by whatever names."""

from typing import NamedTuple

from ..models import JointStream
from ..nn import Stack
from .layout import identity
from .parts import (
    Leaves,
    join_thirds,
    split_thirds,
    stacked_linear,
    stacked_qkv,
    stacked_scales,
    swap_halves,
)


class StreamNames(NamedTuple):
    """What one stream's layers are called, with a place for the block's number.

    `qkv` is one layer or three; `norms` are the scales of those of queries and of keys.
    """

    modulation: str
    qkv: tuple[str, ...]
    norms: tuple[str, str]
    proj: str
    fc1: str
    fc2: str
    dual_qkv: tuple[str, ...] = ()
    dual_norms: tuple[str, str] = ("", "")
    dual_proj: str = ""


_BLOCK = "transformer_blocks.{}"
DIFFUSERS_IMAGE = StreamNames(
    modulation=f"{_BLOCK}.norm1.linear",
    qkv=(f"{_BLOCK}.attn.to_q", f"{_BLOCK}.attn.to_k", f"{_BLOCK}.attn.to_v"),
    norms=(f"{_BLOCK}.attn.norm_q.weight", f"{_BLOCK}.attn.norm_k.weight"),
    proj=f"{_BLOCK}.attn.to_out.0",
    fc1=f"{_BLOCK}.ff.net.0.proj",
    fc2=f"{_BLOCK}.ff.net.2",
    dual_qkv=(f"{_BLOCK}.attn2.to_q", f"{_BLOCK}.attn2.to_k", f"{_BLOCK}.attn2.to_v"),
    dual_norms=(f"{_BLOCK}.attn2.norm_q.weight", f"{_BLOCK}.attn2.norm_k.weight"),
    dual_proj=f"{_BLOCK}.attn2.to_out.0",
)
DIFFUSERS_TEXT = StreamNames(
    modulation=f"{_BLOCK}.norm1_context.linear",
    qkv=(f"{_BLOCK}.attn.add_q_proj", f"{_BLOCK}.attn.add_k_proj", f"{_BLOCK}.attn.add_v_proj"),
    norms=(f"{_BLOCK}.attn.norm_added_q.weight", f"{_BLOCK}.attn.norm_added_k.weight"),
    proj=f"{_BLOCK}.attn.to_add_out",
    fc1=f"{_BLOCK}.ff_context.net.0.proj",
    fc2=f"{_BLOCK}.ff_context.net.2",
)


def joint_stack(
    field: str,
    stack: Stack,
    first: int,
    names: dict[str, StreamNames],
    *,
    scale_first: bool,
) -> Leaves:
    """The table of the stack `field`, whose blocks are numbered from `first` in the file.

    `names` are those of the streams `text` and `image`. `scale_first`: the file has the scale
    before the shift where there are these two alone, in a text stream that only informs.

    >>> import jax
    >>> from eqxldm.models import JointBlock
    >>> make = lambda key: JointBlock(16, 2, 4.0, key=key)
    >>> stack = Stack(make, 2, key=jax.random.key(0))
    >>> names = dict(text=DIFFUSERS_TEXT, image=DIFFUSERS_IMAGE)
    >>> leaves = joint_stack("blocks", stack, 3, names, scale_first=True)
    >>> [part.name for part in leaves[".blocks.stacked.image.fc2.bias"]]
    ['transformer_blocks.3.ff.net.2.bias', 'transformer_blocks.4.ff.net.2.bias']
    """
    leaves: Leaves = {}
    blocks = range(first, first + stack.depth)
    for side, called in names.items():
        stream: JointStream = getattr(stack.stacked, side)
        ours = f"{field}.stacked.{side}"
        swap = swap_halves if scale_first and stream.fc1 is None else identity
        leaves |= stacked_linear(f"{ours}.modulation.linear", called.modulation, blocks, swap, swap)
        leaves |= _attention(stream.attention, f"{ours}.attention", called, blocks)
        if stream.fc1 is not None:
            leaves |= stacked_linear(f"{ours}.fc1", called.fc1, blocks)
            leaves |= stacked_linear(f"{ours}.fc2", called.fc2, blocks)
        if stream.dual_attention is not None:
            dual = called._replace(
                qkv=called.dual_qkv, norms=called.dual_norms, proj=called.dual_proj
            )
            leaves |= _attention(stream.dual_attention, f"{ours}.dual_attention", dual, blocks)
    return leaves


def _attention(layer, ours: str, called: StreamNames, blocks: range) -> Leaves:
    if len(called.qkv) == 1:
        leaves = stacked_linear(f"{ours}.qkv", called.qkv[0], blocks, split_thirds, join_thirds)
    else:
        q, k, v = called.qkv
        leaves = stacked_qkv(f"{ours}.qkv", (q, k, v), blocks)
    if layer.proj is not None:
        leaves |= stacked_linear(f"{ours}.proj", called.proj, blocks)
    if layer.query_norm is not None:
        for norm, name in zip(("query_norm", "key_norm"), called.norms, strict=True):
            leaves |= stacked_scales(f"{ours}.{norm}", name, blocks)
    return leaves
