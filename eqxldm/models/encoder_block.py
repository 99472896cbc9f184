"""The block of a text or image encoder: self-attention and an MLP, each behind a norm."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..nn.activations import gelu_tanh
from ..nn.attention import SelfAttention
from ..nn.linear import Linear
from ..nn.norms import LayerNorm


class EncoderBlock(eqx.Module):
    """`x += attention(norm(x), mask)`, `x += W2 f(W1 norm(x) + b1) + b2` (Vaswani et al. 2017).

    The norms stand before the layers (Xiong et al. 2020).

    With `layer_scale` each sum's new part is multiplied by a learned vector, 1 in the beginning
    (Touvron et al. 2021, section 2.1).

    **Arguments**: `hidden` is the number of hidden units of the MLP, None `4 width`; `activation`
    is `f`; `norm_eps` is that of the norms. In the call, `mask` is that of `nn.attend`.

    >>> EncoderBlock(8, 2, key=jax.random.key(0))(jnp.ones((5, 8)), jnp.ones(5, bool)).shape
    (5, 8)
    """

    norm1: LayerNorm
    attention: SelfAttention
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear
    layer_scale1: Float[Array, " d"] | None
    layer_scale2: Float[Array, " d"] | None
    activation: Callable[..., Any] = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        activation: Callable[..., Any] = gelu_tanh,
        norm_eps: float = 1e-5,
        layer_scale: bool = False,
        key,
    ):
        k1, k2, k3 = jax.random.split(key, 3)
        hidden = 4 * width if hidden is None else hidden
        self.norm1, self.norm2 = LayerNorm(width, norm_eps), LayerNorm(width, norm_eps)
        self.attention = SelfAttention(width, num_heads, key=k1)
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.layer_scale1, self.layer_scale2 = (
            jnp.ones(width) if layer_scale else None for _ in range(2)
        )
        self.activation = activation

    def __call__(
        self, x: Float[Array, "n d"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "n d"]:
        x = x + _scaled(self.attention(self.norm1(x), mask), self.layer_scale1)
        y = self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x + _scaled(y, self.layer_scale2)


def _scaled(x: Float[Array, "n d"], scale: Float[Array, " d"] | None) -> Float[Array, "n d"]:
    return x if scale is None else x * scale.astype(x.dtype)
