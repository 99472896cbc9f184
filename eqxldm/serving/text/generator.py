"""What stands behind a server of text: a network, its tokens, and its samplers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...discrete import AbstractTokenSampler, Masking


@dataclass(frozen=True)
class TextDefaults:
    """What a request means that says nothing of it; of calls it is one for two tokens.

    >>> TextDefaults().sampler
    'random'
    """

    sampler: str = "random"
    block_size: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0


@dataclass(frozen=True)
class TextGenerator:
    """A model of masked tokens to serve, as the functions that the engine calls.

    **Arguments**:

    - `name`: what clients know it by.
    - `network`: `(ids, t, cond, *, key=None, mask=None) -> logits`, one text, as
      `models.TokenTransformer`: without time, and `mask` is true for the tokens that are there.
      A PyTree, whose arrays become arguments of the compiled programs.
    - `path`: which token is [MASK].
    - `vocabulary`: how many tokens there are, [MASK] among them.
    - `length`: of the window in tokens, prompt and all: the programs are compiled for it.
    - `encode`, `decode`: a text to ids and back, on the host; "_" is written where [MASK] stands.
      `encode` **raises** `ValueError`, which the client reads.
    - `sampler_names`: those that a request may name.
    - `sampler`: `(name, block_size=, start=) -> sampler`, one that carries nothing from call to
      call. Temperature and top-p are not the sampler's here, but numbers of each request.
    - `stream`: the key that texts are drawn from, of a seed's key.
    - `most_calls`: of a request.

    >>> from eqxldm.discrete import Ordered
    >>> generator = TextGenerator(
    ...     "ab", lambda ids, t, cond, key=None, mask=None: jnp.zeros((len(ids), 3)), Masking(2), 3,
    ...     8, lambda text: np.array(["ab".index(c) for c in text], np.int32),
    ...     lambda ids: "".join("ab_"[i] for i in ids), ("confidence",),
    ...     lambda name, block_size=16, start=0: Ordered())
    >>> generator.mask_id, generator.decode(generator.encode("ba"))
    (2, 'ba')
    """

    name: str
    network: Any
    path: Masking
    vocabulary: int
    length: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Any], str]
    sampler_names: tuple[str, ...]
    sampler: Callable[..., AbstractTokenSampler]
    defaults: TextDefaults | None = None
    stream: Callable[[Any], Any] = lambda key: key
    most_calls: int = 1000

    def __post_init__(self):
        if self.defaults is None:
            object.__setattr__(self, "defaults", TextDefaults(self.sampler_names[0]))
        if self.usual.sampler not in self.sampler_names:
            raise ValueError(
                f"TextGenerator: the default sampler {self.usual.sampler} is not one of "
                f"{', '.join(self.sampler_names)}."
            )
        for name in self.sampler_names:
            if self.sampler(name).init(jnp.zeros(self.length, jnp.int32)) is not None:
                raise ValueError(f"TextGenerator: the sampler {name} carries a state.")

    @property
    def usual(self) -> TextDefaults:
        """The defaults."""
        return TextDefaults() if self.defaults is None else self.defaults

    @property
    def mask_id(self) -> int:
        """The token that is [MASK]."""
        return self.path.mask_id
