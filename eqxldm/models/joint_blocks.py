"""The blocks of MMDiT: two streams, each with its own weights, and one attention over both."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..nn.attention import Attention, SelfAttention, attend
from ..nn.constraints import fusion_barrier
from ..nn.linear import Linear
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.rope import Rotation


class JointStream(eqx.Module):
    """What one stream of a `JointBlock` has of its own: modulation, projections and MLP.

    A stream that `only_informs` gives queries, keys and values and stays as it is: its modulation
    is a shift and a scale. One with `dual_attention` also attends to itself alone.
    """

    attention: SelfAttention
    dual_attention: SelfAttention | None
    fc1: Linear | None
    fc2: Linear | None
    modulation: Modulation

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        only_informs: bool = False,
        dual_attention: bool = False,
        qk_norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        options: dict[str, Any] = dict(qk_norm=qk_norm, attention=attention)
        use_proj, hidden = not only_informs, int(width * mlp_ratio)
        self.attention = SelfAttention(width, num_heads, use_proj=use_proj, **options, key=k1)
        self.dual_attention = None
        if dual_attention:
            self.dual_attention = SelfAttention(width, num_heads, **options, key=k5)
        self.fc1 = None if only_informs else Linear(width, hidden, key=k2)
        self.fc2 = None if only_informs else Linear(hidden, width, key=k3)
        count = 2 if only_informs else 9 if dual_attention else 6
        self.modulation = Modulation(width, count, key=k4)

    def finish(
        self, x: Float[Array, "n d"], y: Float[Array, "n d"], m: Float[Array, "count d"]
    ) -> Float[Array, "n d"]:
        """The stream after the block: `y` is its part of the attention, `m` its modulation.

        >>> stream = JointStream(8, 2, 4.0, key=jax.random.key(0))
        >>> x = jnp.ones((5, 8))
        >>> bool((stream.finish(x, x, stream.modulation(jnp.ones(8))) == x).all())
        True
        """
        if self.attention.proj is None or self.fc1 is None or self.fc2 is None:
            return x
        normed = layer_norm(x)
        x = x + m[2] * self.attention.proj(checkpoint_name(y, "attention"))
        if self.dual_attention is not None:
            x = x + m[8] * self.dual_attention(modulate(normed, m[6], m[7]))
        hidden = jax.nn.gelu(self.fc1(modulate(layer_norm(x), m[3], m[4])), approximate=True)
        return x + m[5] * checkpoint_name(self.fc2(fusion_barrier(hidden)), "mlp")


class JointBlock(eqx.Module):
    """One block of MMDiT (Esser et al. 2024, figure 2b): text and image, joined in attention.

    For each stream `s`, `(b1, a1, g1, b2, a2, g2) = W_s silu(c)`; queries, keys and values come
    from `modulate(norm(x_s), b1, a1)` by the stream's own weights; one attention runs over the
    tokens of both; then `x_s += g1 proj_s(y_s)`, `x_s += g2 mlp_s(modulate(norm(x_s), b2, a2))`.

    **Arguments**, besides those of a `DiTBlock`:

    - `last`: the text only gives queries, keys and values, and comes out as it came in.
    - `dual_attention`: the image also attends to itself alone, `x += g3 attention(modulate(norm(x),
      b3, a3))`, from the same `x` (MMDiT-X, in Stable Diffusion 3.5 medium).

    Called with the pair `(text, image)` of token sequences, which it gives back; `mask` is true for
    the tokens of both, text first, that are attended to, `rotation` is of both too.

    >>> block = JointBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> text, image = block((jnp.ones((3, 16)), jnp.ones((5, 16))), jnp.ones(16))
    >>> text.shape, image.shape
    ((3, 16), (5, 16))
    """

    text: JointStream
    image: JointStream

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        last: bool = False,
        dual_attention: bool = False,
        qk_norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        k1, k2 = jax.random.split(key)
        sizes = width, num_heads, mlp_ratio
        options: dict[str, Any] = dict(qk_norm=qk_norm, attention=attention)
        self.text = JointStream(*sizes, only_informs=last, **options, key=k1)
        self.image = JointStream(*sizes, dual_attention=dual_attention, **options, key=k2)

    def __call__(
        self,
        streams: tuple[Float[Array, "m d"], Float[Array, "n d"]],
        c: Float[Array, " d"],
        mask: Bool[Array, " k"] | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "m d"], Float[Array, "n d"]]:
        text, image = streams
        m_text, m_image = self.text.modulation(c), self.image.modulation(c)
        of_text = self.text.attention.heads(modulate(layer_norm(text), m_text[0], m_text[1]))
        of_image = self.image.attention.heads(modulate(layer_norm(image), m_image[0], m_image[1]))
        q, k, v = (jnp.concatenate(parts) for parts in zip(of_text, of_image, strict=True))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        masked = {} if mask is None else {"mask": mask}
        y = self.image.attention.attention(q, k, v, **masked).reshape(len(q), -1)
        before = len(text)
        return (
            self.text.finish(text, y[:before], m_text),
            self.image.finish(image, y[before:], m_image),
        )
