"""Networks are as large a program at any depth, and need as much memory beside their parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, nn

from helpers import filled

KEY = jax.random.key(0)
SIZES: dict[str, Any] = dict(width=24, num_heads=2, key=KEY)
CLIP, SOUND = (2, 3, 4, 4), (3, 6)
TEXT = nn.Conditioning(tokens=jnp.ones((5, 8)))
X, T = jnp.ones(CLIP), jnp.array(0.3)
BOTH = {"video": X, "sound": jnp.ones(SOUND)}


def clips(depth):
    text = models.ByteTextConfig(24, 1, 2, 8)
    given: Any = dict(patch_size=(1, 2, 2), block=models.CrossAttentionDiTBlock, embed_cond=text)
    return models.DiT(CLIP, depth=depth, rope=nn.RoPE((4, 4, 4)), **given, **SIZES)


def clips_with_sound(depth):
    seconds: Any = dict(video_seconds=(0.0, 0.3, 0.6), sound_seconds=tuple(np.arange(6) / 8))
    return models.TwoTowers(CLIP, SOUND, patch_size=(1, 2, 2), depth=depth, **seconds, **SIZES)


def wan(depth):
    return models.WanTransformer(2, depth=depth, context_size=8, hidden=8, **SIZES)


def mmdit(depth):
    return models.MMDiT(2, depth=depth, context_size=8, max_grid=4, base_grid=2, **SIZES)


NETWORKS = {
    clips: (X, T, jnp.arange(8)),
    clips_with_sound: (BOTH, dict.fromkeys(BOTH, T)),
    wan: (X, T, TEXT),
    mmdit: (X[:, 0], T, TEXT),
}


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_programs_and_their_memory_do_not_grow_with_depth(make):
    def size(depth):
        params, static = eqx.partition(filled(lambda: make(depth)), eqx.is_array)
        run = lambda p, *args: eqx.combine(p, static)(*args)
        lowered = jax.jit(run).lower(params, *NETWORKS[make])
        total = lambda p, *args: sum(map(jnp.sum, jax.tree.leaves(run(p, *args))))
        trained = jax.jit(jax.grad(total)).lower(params, *NETWORKS[make])
        lines = [len(stage.as_text().splitlines()) for stage in (lowered, trained)]
        return *lines, lowered.compile().memory_analysis().temp_size_in_bytes

    assert size(4) == size(9)
