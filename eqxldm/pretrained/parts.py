"""Tables of the layers that several models share: ours on the left, diffusers' on the right."""

from collections.abc import Callable

import numpy as np

from ..nn.conv import Conv
from ..nn.linear import Linear
from ..nn.resnet import ResnetBlock
from .layout import Part, identity

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


def conv(ours: str, theirs: str) -> Leaves:
    """A `Conv`: kernels are `(h, w, in, out)` here and `(out, in, h, w)` there.

    >>> conv("stem", "conv_in")[".stem.weight"][0].read(np.ones((5, 4, 3, 2))).shape
    (3, 2, 4, 5)
    """
    return linear(ours, theirs, (_to_hwio, _to_oihw))


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
