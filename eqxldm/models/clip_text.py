"""CLIP's text encoder (Radford et al. 2021), in the sizes that image generators use."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..nn.activations import gelu, quick_gelu
from ..nn.linear import Linear, normal
from ..nn.norms import LayerNorm
from ..nn.stack import Stack, save_matmuls
from .config import arguments, make_record
from .encoder_block import EncoderBlock

VOCABULARY, LENGTH = 49408, 77


@dataclass(frozen=True)
class CLIPTextConfig:
    """How a `CLIPText` was made: the arguments of its constructor, explained there.

    >>> CLIPTextConfig(16, 2, 2, vocabulary=99).build(key=jax.random.key(0)).config.depth
    2
    """

    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    activation: Callable[..., Any] = quick_gelu
    projection: int | None = None
    end_id: int | None = None
    vocabulary: int = VOCABULARY
    length: int = LENGTH
    norm_eps: float = 1e-5
    remat: Callable[..., Any] | None = save_matmuls

    def build(self, *, key) -> "CLIPText":
        """The encoder, with random weights."""
        return CLIPText(**arguments(self), key=key)


class CLIPOutput(NamedTuple):
    """What a `CLIPText` says of one text of `n` tokens.

    `last`: the last block's output after the final norm. `hidden`: the hidden state that was asked
    for, or all of them, `depth + 1`, of which 0 is the sum of the embeddings and `i` the output of
    block `i`, before any final norm. `pooled`: `last` at the end token. `embeds`: its projection,
    None where the model has none.
    """

    last: Float[Array, "n d"]
    hidden: Float[Array, "*states n d"]
    pooled: Float[Array, " d"]
    embeds: Float[Array, " p"] | None


class CLIPText(eqx.Module):
    """CLIP's text encoder: a transformer in which each token sees those before it.

        x = table[ids] + positions
        x = block(x), depth times, masked causally
        last = norm(x),  pooled = last[end],  embeds = W pooled

    **Arguments**:

    - `width`, `depth`, `num_heads`: the transformer's size; `hidden`: the units of the MLPs, None
      is `4 width`.
    - `activation`: `nn.quick_gelu` in OpenAI's weights, `nn.gelu` in OpenCLIP's.
    - `projection`: the size of `embeds`; None has none.
    - `end_id`: the token that `pooled` is taken at, the first such; None is the largest id of the
      text, the first such. The two are the same with CLIP's own vocabulary, whose end token is its
      last, but not when tokens were added to it. Files that say `eos_token_id: 2` mean the second.
    - `vocabulary`, `length`: the numbers of token ids and of positions.
    - `norm_eps`: of all norms. `remat`: that of `nn.Stack`.

    `config` is its `CLIPTextConfig`. In the call:

    - `ids` of one text, at most `length`; an id outside of the vocabulary gives NaNs.
    - `mask`: false where a token is not to be seen. Image generators give none: their padding is
      seen, and has outputs.
    - `layer`: the hidden state that `hidden` is, such as -2, as one counts in a list of
      `depth + 1`; None gives all.

    **Raises** `ValueError` for a size below 1, more ids than `length`, and a `layer` that there is
    not.

    >>> clip = CLIPText(16, 2, 2, projection=8, vocabulary=99, key=jax.random.key(0))
    >>> out = clip(jnp.array([97, 5, 98, 98]), layer=-2)
    >>> out.last.shape, out.hidden.shape, out.pooled.shape, out.embeds.shape
    ((4, 16), (4, 16), (16,), (8,))
    >>> bool((out.pooled == out.last[2]).all())
    True
    """

    table: Float[Array, "vocabulary d"]
    positions: Float[Array, "length d"]
    blocks: Stack
    norm: LayerNorm
    project: Linear | None
    config: CLIPTextConfig = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, *, key, **options):
        sizes = dict(width=width, depth=depth, num_heads=num_heads)
        config = make_record(CLIPTextConfig, "CLIPText", sizes | options)
        self.config = config if config.hidden else replace(config, hidden=4 * width)
        counted = sizes | dict(vocabulary=config.vocabulary, length=config.length)
        if min(counted.values()) < 1:
            raise ValueError(f"CLIPText: every size must be at least 1, got {counted}.")
        k1, k2, k3, k4 = jax.random.split(key, 4)
        block: dict[str, Any] = dict(hidden=self.config.hidden, activation=config.activation)
        block |= dict(norm_eps=config.norm_eps)
        make = lambda k: EncoderBlock(width, num_heads, **block, key=k)
        self.table = normal(0.02)(k1, (config.vocabulary, width))
        self.positions = normal(0.01)(k2, (config.length, width))
        self.blocks = Stack(make, depth, remat=config.remat, key=k3)
        self.norm = LayerNorm(width, config.norm_eps)
        size = config.projection
        self.project = None if size is None else Linear(width, size, use_bias=False, key=k4)

    def __call__(
        self,
        ids: Int[Array, " n"],
        mask: Bool[Array, " n"] | None = None,
        *,
        layer: int | None = None,
    ) -> CLIPOutput:
        n, states = len(ids), self.config.depth + 1
        if n > self.config.length:
            raise ValueError(
                f"CLIPText: at most {self.config.length} ids, got {n}. Cut the text, as "
                "text.load_tokenizer does."
            )
        if layer is not None and not -states <= layer < states:
            raise ValueError(
                f"CLIPText: layer must lie in {-states} .. {states - 1}, as there are {states} "
                f"hidden states; got {layer}."
            )
        seen = jnp.tril(jnp.ones((n, n), bool))
        seen = seen if mask is None else seen & mask
        known = jnp.where(ids < 0, self.config.vocabulary, ids)  # -1 must not wrap around
        x = self.table.at[known].get(mode="fill", fill_value=jnp.nan) + self.positions[:n]
        hidden = jnp.concatenate([x[None], self.blocks.outputs(x, seen)])
        last = self.norm(hidden[-1])
        end = jnp.argmax(ids if self.config.end_id is None else ids == self.config.end_id)
        pooled = last[end]
        embeds = None if self.project is None else self.project(pooled)
        return CLIPOutput(last, hidden if layer is None else hidden[layer], pooled, embeds)


def clip_text_l(*, key, **options) -> CLIPText:
    """That of CLIP ViT-L/14: of Stable Diffusion 1, and the first of SDXL, SD3 and FLUX.1.

    SD3's has a `projection` of 768.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_text_l, key=jax.random.key(0)))
    123060480
    """
    return CLIPText(768, 12, 12, **options, key=key)


def clip_text_h(*, key, **options) -> CLIPText:
    """That of OpenCLIP ViT-H/14 without its last block: of Stable Diffusion 2.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_text_h, key=jax.random.key(0)))
    340387840
    """
    return CLIPText(1024, 23, 16, **dict(activation=gelu) | options, key=key)


def clip_text_bigg(*, key, **options) -> CLIPText:
    """That of OpenCLIP ViT-bigG/14: the second of SDXL and SD3.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(clip_text_bigg, key=jax.random.key(0)))
    694659840
    """
    return CLIPText(1280, 32, 20, **dict(activation=gelu, projection=1280) | options, key=key)
