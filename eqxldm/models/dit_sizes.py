"""The published sizes of DiT and of JiT."""

from typing import Any

from ..nn.norms import RMSNorm
from ..nn.rope import RoPE
from .dit import UNSCALED_TIME, DiT


def _published(name: str, patch_size: int, *, depth: int, width: int, num_heads: int):
    """The constructor of one size of the paper (Peebles & Xie 2023, tables 1 and 4)."""

    def make(
        shape: tuple[int, ...],
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        *,
        key,
        **options: Any,
    ) -> DiT:
        size: dict[str, Any] = dict(
            patch_size=patch_size, depth=depth, width=width, num_heads=num_heads
        )
        size |= dict(num_classes=num_classes, learn_sigma=learn_sigma)
        return DiT(shape, **size, **options, key=key)

    make.__name__ = make.__qualname__ = f"dit_{name.lower()}_{patch_size}"
    make.__doc__ = f"""DiT-{name}/{patch_size}: {depth} blocks, {width} wide, {num_heads} heads.

    `shape` is the latent's, (4, 32, 32) in the paper (Peebles & Xie 2023). All other arguments are
    those of `DiT`; for another condition than a class, `num_classes=None, embed_cond=...`.

    >>> import equinox as eqx, jax
    >>> dit = eqx.filter_eval_shape({make.__name__}, (4, 32, 32), key=jax.random.key(0))
    >>> dit.patch_size, dit.blocks.stacked.fc1.weight.shape
    ({patch_size}, ({depth}, {4 * width}, {width}))
    """
    return make


dit_s_2 = _published("S", 2, depth=12, width=384, num_heads=6)
dit_s_4 = _published("S", 4, depth=12, width=384, num_heads=6)
dit_s_8 = _published("S", 8, depth=12, width=384, num_heads=6)
dit_b_2 = _published("B", 2, depth=12, width=768, num_heads=12)
dit_b_4 = _published("B", 4, depth=12, width=768, num_heads=12)
dit_b_8 = _published("B", 8, depth=12, width=768, num_heads=12)
dit_l_2 = _published("L", 2, depth=24, width=1024, num_heads=16)
dit_l_4 = _published("L", 4, depth=24, width=1024, num_heads=16)
dit_l_8 = _published("L", 8, depth=24, width=1024, num_heads=16)
dit_xl_2 = _published("XL", 2, depth=28, width=1152, num_heads=16)
dit_xl_4 = _published("XL", 4, depth=28, width=1152, num_heads=16)
dit_xl_8 = _published("XL", 8, depth=28, width=1152, num_heads=16)


def _jit(name: str, *, depth: int, width: int, num_heads: int, bottleneck: int, start: int):
    """The constructor of one size of JiT (Li & He 2025, table 9 and their code)."""

    def make(
        shape: tuple[int, ...] = (3, 256, 256),
        num_classes: int | None = 1000,
        *,
        patch_size: int = 16,
        key,
        **options: Any,
    ) -> DiT:
        part = width // num_heads // 4 * 2  # half of a head for each axis
        size: dict[str, Any] = dict(
            patch_size=patch_size, depth=depth, width=width, num_heads=num_heads
        )
        size |= dict(num_classes=num_classes, patch_bottleneck=bottleneck)
        form: dict[str, Any] = dict(norm=RMSNorm, swiglu=True, qk_norm=RMSNorm)
        form |= dict(rope=RoPE((part,) * (len(shape) - 1)), time_embedding=UNSCALED_TIME)
        form |= dict(condition_tokens=32, tokens_start=start)
        return DiT(shape, **size, **(form | options), key=key)

    make.__name__ = make.__qualname__ = f"jit_{name.lower()}_16"
    make.__doc__ = f"""JiT-{name}/16: {depth} blocks, {width} wide, {num_heads} heads, over pixels.

    A `DiT` with patches of 16 pixels that go through {bottleneck} numbers, RMSNorm, SwiGLU, RoPE,
    norms of queries and keys, and 32 tokens of the class from block {start} on (Li & He 2025,
    "Back to basics: let denoising generative models denoise"). It is meant to predict x0
    (`predict_x0`), with the loss in the velocity (`velocity_weight`).

    >>> import equinox as eqx, jax
    >>> jit = eqx.filter_eval_shape({make.__name__}, key=jax.random.key(0))
    >>> jit.patch_bottleneck.weight.shape
    ({bottleneck}, 768)
    """
    return make


jit_b_16 = _jit("B", depth=12, width=768, num_heads=12, bottleneck=128, start=4)
jit_l_16 = _jit("L", depth=24, width=1024, num_heads=16, bottleneck=128, start=8)
jit_h_16 = _jit("H", depth=32, width=1280, num_heads=16, bottleneck=256, start=10)
