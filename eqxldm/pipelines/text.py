"""Prompts to conditions, as each family of published pipelines reads its text encoders."""

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..nn.conditioning import Conditioning
from .errors import PipelineError


class TextPart(NamedTuple):
    """A tokenizer and the encoder that reads its ids; both None where a folder has none."""

    tokenizer: Any
    encoder: Any


class Encoding(NamedTuple):
    """Conditions of some prompts, and what of each prompt found no room in each tokenizer."""

    cond: Any
    cut: tuple[tuple[str, ...], ...]


class TextSizes(NamedTuple):
    """How wide the network's tokens are, how many T5 gives, and how many of CLIP's last layers are
    left out."""

    width: int = 4096
    length: int = 256
    clip_skip: int = 0


# (parts, prompts, sizes) -> conditions with a leading axis, and what was cut
Encode = Callable[[Sequence[TextPart], Sequence[str], TextSizes], Encoding]


def encode_clip(parts: Sequence[TextPart], prompts: Sequence[str], sizes: TextSizes) -> Encoding:
    """Stable Diffusion 1 and 2: the last hidden states, after the final norm.

    Stable Diffusion 2's file has 23 of OpenCLIP's 24 layers, so these are its penultimate ones.
    """
    if not sizes.clip_skip:
        out, cut = _clip(parts[0], prompts, layer=None)
        return Encoding(Conditioning(tokens=out.last), (cut,))
    out, cut = _clip(parts[0], prompts, layer=-1 - sizes.clip_skip)
    norm = jax.vmap(parts[0].encoder.norm)  # the last one, though of another layer
    return Encoding(Conditioning(tokens=norm(out.hidden)), (cut,))


def encode_two_clips(
    parts: Sequence[TextPart], prompts: Sequence[str], sizes: TextSizes
) -> Encoding:
    """SDXL: both encoders' penultimate states side by side, and the second one's projection."""
    layer = -2 - sizes.clip_skip
    outs, cuts = zip(*(_clip(part, prompts, layer) for part in parts), strict=True)
    tokens = jnp.concatenate([out.hidden for out in outs], axis=-1)
    return Encoding(Conditioning(vector=outs[1].embeds, tokens=tokens), cuts)


def encode_clips_and_t5(
    parts: Sequence[TextPart], prompts: Sequence[str], sizes: TextSizes
) -> Encoding:
    """Stable Diffusion 3: the two CLIPs' penultimate states side by side, then T5's tokens.

    CLIP's are filled up with zeros to T5's width and come first; the vector is both projections.
    Without T5, zeros stand for its tokens.
    """
    layer = -2 - sizes.clip_skip
    outs, cuts = zip(*(_clip(part, prompts, layer) for part in parts[:2]), strict=True)
    clip = jnp.concatenate([out.hidden for out in outs], axis=-1)
    if parts[2].encoder is None:
        t5, cut = (
            jnp.zeros((len(prompts), sizes.length, sizes.width), clip.dtype),
            ("",) * len(prompts),
        )
    else:
        t5, cut = _t5(parts[2], prompts, sizes.length)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    tokens = jnp.concatenate([clip.astype(t5.dtype), t5], axis=1)
    vector = jnp.concatenate([out.embeds for out in outs], axis=-1)
    return Encoding(Conditioning(vector=vector, tokens=tokens), (*cuts, cut))


def encode_clip_and_t5(
    parts: Sequence[TextPart], prompts: Sequence[str], sizes: TextSizes
) -> Encoding:
    """FLUX.1: T5's tokens, and CLIP's pooled state without a projection as the vector."""
    out, cut = _clip(parts[0], prompts, layer=None)
    tokens, t5_cut = _t5(parts[1], prompts, sizes.length)
    return Encoding(Conditioning(vector=out.pooled, tokens=tokens), (cut, t5_cut))


def encode_umt5(parts: Sequence[TextPart], prompts: Sequence[str], sizes: TextSizes) -> Encoding:
    """Wan: umT5's tokens, which do not see the padding, and zeros behind the text's end.

    Entities of HTML and runs of blanks are cleaned from prompts first, as Wan does (its repair of
    wrongly decoded characters, by the package ftfy, is left out).
    """
    clean = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
    tokens = parts[0].tokenizer(clean, sizes.length)
    _check_vocabulary(parts[0], tokens.ids)
    ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    out = _run_masked_t5(parts[0].encoder, ids, mask)
    return Encoding(Conditioning(tokens=jnp.where(mask[..., None], out, 0)), (tokens.cut,))


def _clip(part: TextPart, prompts: Sequence[str], layer: int | None) -> tuple[Any, tuple]:
    depth = part.encoder.config.depth
    if layer is not None and depth + layer < 0:
        raise PipelineError(
            f"clip_skip: a text encoder of this model has {depth} layers only. Leave out fewer."
        )
    tokens = part.tokenizer(list(prompts))
    _check_vocabulary(part, tokens.ids)
    return _run_clip(part.encoder, jnp.asarray(tokens.ids), layer), tokens.cut


def _t5(part: TextPart, prompts: Sequence[str], length: int) -> tuple[Any, tuple]:
    tokens = part.tokenizer(list(prompts), length)
    _check_vocabulary(part, tokens.ids)
    # These pipelines were trained with the padding attended to: no mask.
    return _run_t5(part.encoder, jnp.asarray(tokens.ids)), tokens.cut


def _check_vocabulary(part: TextPart, ids: np.ndarray) -> None:
    """An id without a row in the table means a tokenizer that is not the encoder's."""
    rows, largest = part.encoder.config.vocabulary, int(np.max(ids))
    if largest >= rows:
        raise PipelineError(
            f"the tokenizer gives ids up to {largest}, and the text encoder knows {rows}: they do "
            "not belong together. Fetch the tokenizer of this model."
        )


@eqx.filter_jit
def _run_clip(encoder, ids, layer):
    options = {} if layer is None else {"layer": layer}
    return jax.vmap(lambda row: encoder(row, **options))(ids)


@eqx.filter_jit
def _run_masked_t5(encoder, ids, mask):
    return jax.vmap(encoder)(ids, mask)


@eqx.filter_jit
def _run_t5(encoder, ids):
    return jax.vmap(encoder)(ids)
