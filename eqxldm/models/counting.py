"""How large a model is, and how much work."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..nn.embeddings import TimeEmbedding
from ..nn.patchify import patch_grid
from .dit import DiT
from .dit_blocks import CrossAttentionDiTBlock, DiTBlock


def parameter_count(model: PyTree) -> int:
    """The number of trainable parameters: the sizes of all inexact arrays of a model.

    Shapes are enough, so a model too large for the memory can be counted under
    `eqx.filter_eval_shape`.

    >>> from eqxldm.models import dit_xl_2
    >>> from eqxldm.nn import Linear
    >>> parameter_count(Linear(3, 2, key=jax.random.key(0)))
    8
    >>> parameter_count(eqx.filter_eval_shape(dit_xl_2, (4, 32, 32), key=jax.random.key(0)))
    674834720
    """
    leaves = jax.tree.leaves(eqx.filter(model, _is_inexact))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _is_inexact(leaf: Any) -> bool:
    described = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return described or eqx.is_inexact_array(leaf)


def multiply_adds(dit: DiT, context_tokens: int = 0) -> int:
    """The multiply-adds of one forward pass of one example; twice as many FLOPs.

    With `n` tokens of width `d` in `L` blocks, an MLP of `4 d`, `k` numbers in a token that comes
    in and `k'` in one that goes out:

    `L (12 n d^2 + 2 n^2 d + 6 d^2 + 2 n d) + n d (k + k') + 256 d + d^2 + 2 d^2`

    A gated MLP has three matrices; `condition_tokens` and `time_tokens` are joined to the `n` from
    their block on; without modulation `6 d^2` and `2 d^2` fall away. An auxiliary head is not
    counted: sampling leaves it out. In the blocks: the linear layers, the two matmuls of
    attention, adaLN, and one for each number that a layer norm sees. Around them: the patch
    embedding and the last layer, the MLP of the time, the last adaLN. `context_tokens` of the
    condition are joined to the `n` in the blocks, or, in a `CrossAttentionDiTBlock`, are what `2 n
    d^2` and `2 m d^2` and two matmuls of `n m d` more attend to. Left out: softmax, activations,
    biases, gates, sums, `qk_norm`, `rope`, the lookup of the label, `embed_cond` and time
    embeddings of your own. A training step is three times as many, four if everything is
    recomputed.

    This is the convention of the "Gflops" in the paper of DiT (Peebles & Xie 2023, table 4). All
    twelve sizes at 256 x 256 and XL/2 at 512 x 512 come out to the last digit, except B/4: 5.57
    against the 5.56 printed there, which no choice of terms gives together with the others.

    **Raises** `ValueError` for blocks of another kind, whose work is not known here.

    >>> from eqxldm.models import dit_xl_2
    >>> dit = eqx.filter_eval_shape(dit_xl_2, (4, 32, 32), key=jax.random.key(0))
    >>> print(f"{multiply_adds(dit) / 1e9:.2f} G")
    118.64 G
    """
    block, d, config = dit.blocks.stacked, dit.config.width, dit.config
    if not isinstance(block, DiTBlock | CrossAttentionDiTBlock):
        raise ValueError(f"multiply_adds: the work of a {type(block).__name__} is not known.")
    patches = math.prod(patch_grid(dit.shape[1:], dit.patch_size)[0])
    tokens = patches + context_tokens if isinstance(block, DiTBlock) else patches
    size = lambda *layers: sum(math.prod(w.weight.shape[-2:]) for w in layers if w is not None)
    linear = lambda modulation: None if modulation is None else modulation.linear

    def per_block(n: int) -> int:
        layers = (block.attention.proj, block.fc1, block.fc2, block.gate)
        found = n * (3 * size(block.attention.qkv) + size(*layers))
        found += 2 * n * n * d + size(linear(block.modulation)) + 2 * n * d
        if isinstance(block, CrossAttentionDiTBlock):
            cross = block.cross_attention
            found += n * size(cross.query, cross.proj) + n * d
            found += context_tokens * size(cross.key, cross.value) + 2 * n * context_tokens * d
        return found

    joined = tokens + config.condition_tokens + config.time_tokens
    start = config.tokens_start
    blocks = start * per_block(tokens) + (config.depth - start) * per_block(joined)
    ends = patches * size(dit.patch_bottleneck, dit.patch_embedding, dit.final_linear)
    vectors = size(linear(dit.final_modulation))
    for times in (dit.time_embedding, dit.step_embedding):
        if isinstance(times, TimeEmbedding):
            vectors += size(times.linear1, times.linear2)
    return blocks + ends + vectors
