"""A network and a projector of its tokens, which learns to say what another encoder sees."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .linear import Linear


class Aligned(eqx.Module):
    """A network, and beside it an MLP from its early tokens to an encoder's features.

    `project(tokens) = W3 silu(W2 silu(W1 tokens))`, with biases (Yu et al. 2024, REPA: three
    layers, 2048 hidden units). For `Denoising(alignment=)`; called it is the network, which is
    `denoiser` when training is done.

    **Arguments**: `denoiser` has `outputs`, such as a `models.DiT` with `early_depth`; `width` is
    that of its tokens, `size` that of the features.

    >>> from eqxldm.models import DiT
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> dit = DiT((4, 8, 8), patch_size=2, depth=2, width=16, num_heads=2, early_depth=1, key=k1)
    >>> network = Aligned(dit, 16, 5, hidden=32, key=k2)
    >>> network.project(jax.numpy.ones((16, 16))).shape
    (16, 5)
    """

    denoiser: Any
    fc1: Linear
    project_layer: Linear
    fc2: Linear

    def __init__(self, denoiser: Any, width: int, size: int, *, hidden: int = 2048, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.denoiser = denoiser
        self.fc1 = Linear(width, hidden, key=k1)
        self.project_layer = Linear(hidden, hidden, key=k2)
        self.fc2 = Linear(hidden, size, key=k3)

    def __call__(self, x_t: Any, t: Any, cond: Any = None, *, key: Any = None, **options: Any):
        return self.denoiser(x_t, t, cond, key=key, **options)

    def outputs(self, x_t: Any, t: Any, cond: Any = None, *, key: Any = None, **options: Any):
        return self.denoiser.outputs(x_t, t, cond, key=key, **options)

    def project(self, tokens: Float[Array, "n d"]) -> Float[Array, "n f"]:
        """What the tokens say of the features."""
        y = jax.nn.silu(self.project_layer(jax.nn.silu(self.fc1(tokens))))
        return self.fc2(y)
