"""Tables of the layers that several models share: ours on the left, diffusers' on the right."""

from collections.abc import Callable

import numpy as np

from ..nn.conv import Conv
from ..nn.linear import Linear
from ..nn.patchify import patch_sizes
from ..nn.resnet import ResnetBlock
from .layout import Part, Transform, identity

Leaves = dict[str, tuple[Part, ...]]

# Most published files still have the names of 2022.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def linear(
    ours: str,
    theirs: str,
    weight: tuple[Callable, Callable] = (identity, identity),
    *,
    bias: bool = True,
) -> Leaves:
    """A `Linear`; `weight` reads and writes another form of its matrix.

    >>> list(linear("fc", "proj"))
    ['.fc.weight', '.fc.bias']
    """
    leaves = {f".{ours}.weight": (Part(f"{theirs}.weight", (), *weight),)}
    return leaves | ({f".{ours}.bias": (Part(f"{theirs}.bias"),)} if bias else {})


def stacked_linear(
    ours: str,
    theirs: str,
    blocks: range,
    read: Transform = identity,
    write: Transform = identity,
) -> Leaves:
    """A linear layer of every block of a stack; `theirs` has a place for the block's number.

    `read` and `write` are of weights and biases alike.

    >>> parts = stacked_linear("blocks.stacked.fc1", "layers.{}.mlp", range(3, 5))
    >>> [part.name for part in parts[".blocks.stacked.fc1.bias"]]
    ['layers.3.mlp.bias', 'layers.4.mlp.bias']
    """
    return {
        f".{ours}.{kind}": tuple(
            Part(f"{theirs.format(number)}.{kind}", (i,), read, write)
            for i, number in enumerate(blocks)
        )
        for kind in ("weight", "bias")
    }


def stacked_qkv(ours: str, theirs: tuple[str, str, str], blocks: range) -> Leaves:
    """An `nn.QKV` of every block, in three linear layers there.

    >>> parts = stacked_qkv("blocks.stacked.qkv", ("{}.q", "{}.k", "{}.v"), range(1))
    >>> [part.name for part in parts[".blocks.stacked.qkv.bias"]]
    ['0.q.bias', '0.k.bias', '0.v.bias']
    """
    return {
        f".{ours}.{kind}": tuple(
            Part(f"{name.format(number)}.{kind}", (i, k))
            for i, number in enumerate(blocks)
            for k, name in enumerate(theirs)
        )
        for kind in ("weight", "bias")
    }


def stacked_scales(ours: str, theirs: str, blocks: range) -> Leaves:
    """The scale of a norm of every block, by its whole name there.

    >>> list(stacked_scales("blocks.stacked.norm", "{}.norm.weight", range(2)))
    ['.blocks.stacked.norm.scale']
    """
    parts = (Part(theirs.format(number), (i,)) for i, number in enumerate(blocks))
    return {f".{ours}.scale": tuple(parts)}


def split_thirds(array: np.ndarray) -> np.ndarray:
    """Queries, keys and values of one matrix or vector, on an axis of their own.

    >>> split_thirds(np.ones((6, 4))).shape
    (3, 2, 4)
    """
    return array.reshape(3, -1, *array.shape[1:])


def join_thirds(array: np.ndarray) -> np.ndarray:
    """The inverse of `split_thirds`.

    >>> join_thirds(np.ones((3, 2, 4))).shape
    (6, 4)
    """
    return array.reshape(-1, *array.shape[2:])


def swap_halves(array: np.ndarray) -> np.ndarray:
    """Its second half first: diffusers has some modulations as scale and shift, we as the original.

    >>> swap_halves(np.arange(4)).tolist()
    [2, 3, 0, 1]
    """
    return np.roll(array, len(array) // 2, axis=0)


def conv(ours: str, theirs: str, *, bias: bool = True) -> Leaves:
    """A `Conv`: kernels are `(h, w, in, out)` here and `(out, in, h, w)` there.

    >>> conv("stem", "conv_in")[".stem.weight"][0].read(np.ones((5, 4, 3, 2))).shape
    (3, 2, 4, 5)
    """
    return linear(ours, theirs, (_to_hwio, _to_oihw), bias=bias)


def patch_conv(
    channels: int, patch_size: int | tuple[int, ...], axes: int = 2
) -> tuple[Callable, Callable]:
    """A strided convolution `(d, c, p, q)` to the matrix on patchify's `(c p q)` and back.

    >>> read, write = patch_conv(4, 2)
    >>> write(read(np.ones((6, 4, 2, 2)))).shape
    (6, 4, 2, 2)
    """
    inside = (channels, *patch_sizes(patch_size, axes))
    return (
        lambda conv: conv.reshape(conv.shape[0], -1),
        lambda matrix: matrix.reshape(-1, *inside),
    )


def conv_or_linear(layer: Conv | Linear, ours: str, theirs: str) -> Leaves:
    """Whichever it is.

    >>> import jax
    >>> list(conv_or_linear(Linear(1, 1, key=jax.random.key(0)), "fc", "proj"))
    ['.fc.weight', '.fc.bias']
    """
    return conv(ours, theirs) if isinstance(layer, Conv) else linear(ours, theirs)


def norm(ours: str, theirs: str) -> Leaves:
    """A norm with affine parameters.

    >>> list(norm("norm", "conv_norm_out"))
    ['.norm.scale', '.norm.bias']
    """
    return {
        f".{ours}.scale": (Part(f"{theirs}.weight"),),
        f".{ours}.bias": (Part(f"{theirs}.bias"),),
    }


def stacked(leaves: Leaves, depth: int, ours: str = "blocks") -> Leaves:
    """The table of one block for all blocks of a `Stack`; `{}` in a name is the block's number.

    >>> table = stacked(linear("fc1", "layers.{}.fc1", bias=False), 2)
    >>> [part.name for part in table[".blocks.stacked.fc1.weight"]]
    ['layers.0.fc1.weight', 'layers.1.fc1.weight']
    """
    return {
        f".{ours}.stacked{path}": tuple(
            part._replace(name=part.name.format(i), where=(i, *part.where))
            for i in range(depth)
            for part in parts
        )
        for path, parts in leaves.items()
    }


def resnet(block: ResnetBlock, ours: str, theirs: str) -> Leaves:
    """A `ResnetBlock`.

    >>> import jax
    >>> len(resnet(ResnetBlock(4, 4, groups=2, key=jax.random.key(0)), "a", "b"))
    8
    """
    leaves: Leaves = {}
    for n in (1, 2):
        leaves |= norm(f"{ours}.norm{n}", f"{theirs}.norm{n}")
        leaves |= conv(f"{ours}.conv{n}", f"{theirs}.conv{n}")
    if block.shortcut is not None:
        leaves |= conv(f"{ours}.shortcut", f"{theirs}.conv_shortcut")
    return leaves


def attention_block(ours: str, theirs: str) -> Leaves:
    """An `AttentionBlock`.

    >>> len(attention_block("a", "b"))
    10
    """
    leaves = norm(f"{ours}.norm", f"{theirs}.group_norm")
    for layer, name in {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}.items():
        leaves |= linear(f"{ours}.{layer}", f"{theirs}.{name}")
    return leaves


def old_attention_names(theirs: str) -> dict[str, str]:
    """The aliases of an `AttentionBlock` in files of 2022.

    >>> old_attention_names("b")["b.query.weight"]
    'b.to_q.weight'
    """
    return {
        f"{theirs}.{old}.{kind}": f"{theirs}.{new}.{kind}"
        for old, new in OLD_ATTENTION.items()
        for kind in ("weight", "bias")
    }


def _to_hwio(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0)


def _to_oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)
