"""What few-step training adds to a network: guidance as a condition, and a learned weight."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .conditioning import Conditioning
from .embeddings import Sinusoid, TimeEmbedding
from .linear import Linear, zeros

UNSCALED = Sinusoid(scale=1.0, offset=0.0)  # a number in [0, 1], read as it is


@dataclass(frozen=True)
class Guided:
    """How a `GuidanceEmbedding` was made: its arguments, the first by its own record.

    >>> from eqxldm.nn import Labels
    >>> Guided(Labels(10, 8), 8).build(key=jax.random.key(0)).config.width
    8
    """

    embed_cond: Any
    width: int

    def build(self, *, key: Any) -> "GuidanceEmbedding":
        """The embedding, with random weights."""
        return GuidanceEmbedding(self.embed_cond, self.width, key=key)


class GuidanceEmbedding(eqx.Module):
    """Embeds the pair `(cond, (strength, low, high))`: the `embed_cond` of a guided network.

    The condition as `embed_cond` has it, and to its vector are added embeddings of the guidance's
    strength `1 - 1/w` and of its interval's ends (Geng et al. 2025b, section 4). Those start at 0,
    so that a network that had learned `cond` alone begins as it was. `eqxldm.ConditionedGuidance`
    trains it and `eqxldm.guided_condition` makes its conditions.

    **Arguments**: `embed_cond` is a module or its record, such as `nn.Labels(10, width)`; `width`
    that of the network. `config` is its `Guided`.

    >>> from eqxldm.nn import Labels
    >>> embedding = GuidanceEmbedding(Labels(10, 8), 8, key=jax.random.key(0))
    >>> embedding((jnp.array(3), jnp.array([0.5, 0.0, 1.0]))).vector.shape
    (8,)
    """

    embed_cond: Any
    strength_embedding: TimeEmbedding
    low_embedding: TimeEmbedding
    high_embedding: TimeEmbedding
    config: Guided = eqx.field(static=True)

    def __init__(self, embed_cond: Any, width: int, *, key):
        k1, *keys = jax.random.split(key, 4)
        built = hasattr(embed_cond, "build")
        self.embed_cond = embed_cond.build(key=k1) if built else embed_cond
        last = lambda e: e.linear2.weight
        parts = [UNSCALED.build(width, key=k) for k in keys]
        parts = [eqx.tree_at(last, part, jnp.zeros_like(last(part))) for part in parts]
        self.strength_embedding, self.low_embedding, self.high_embedding = parts
        record = embed_cond if built else getattr(embed_cond, "config", None)
        self.config = Guided(record, width)

    def __call__(self, cond: tuple[PyTree, Float[Array, " 3"]]) -> Conditioning:
        plain, guidance = cond
        found = self.embed_cond(plain)
        if not isinstance(found, Conditioning):
            found = Conditioning(found)
        parts = (self.strength_embedding, self.low_embedding, self.high_embedding)
        vectors = [part(number) for part, number in zip(parts, guidance, strict=True)]
        vector = vectors[0] + vectors[1] + vectors[2]
        if found.vector is not None:
            vector = vector + found.vector
        return Conditioning(vector, found.tokens, found.mask)


class Weighted(eqx.Module):
    """A network, and beside it a scalar of the time: the learned weight of sCM's loss.

    `log_weight(t)` is linear in sinusoids of `t` and starts at 0; `exp(w) l - w` has its minimum
    where `exp(-w)` is the loss at `t` (Karras et al. 2024, section 2; Lu & Song 2025, eq. 8).
    Called it is the network.

    >>> network = Weighted(lambda x_t, t, cond, *, key=None: x_t, key=jax.random.key(0))
    >>> float(network.log_weight(jnp.array(0.5)))
    0.0
    """

    denoiser: Any
    weight_head: Linear
    features: Sinusoid = eqx.field(static=True)

    def __init__(self, denoiser: Any, *, key):
        self.denoiser, self.features = denoiser, UNSCALED
        self.weight_head = Linear(UNSCALED.size, 1, init=zeros, key=key)

    def __call__(self, x_t: Any, t: Any, cond: Any = None, *, key: Any = None, **options: Any):
        return self.denoiser(x_t, t, cond, key=key, **options)

    def log_weight(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return self.weight_head(self.features(t))[0]
