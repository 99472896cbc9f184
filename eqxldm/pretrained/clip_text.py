"""CLIP's text encoder: the names of transformers and of OpenCLIP, and the configurations."""

from typing import Any

import numpy as np

from ..models import CLIPText
from .activations import ACTIVATIONS, NAMES, foreign_activation, wrong_activation
from .layout import Layout, Part
from .parts import Leaves, linear, norm, stacked
from .refusals import refuse_network, refuse_options

# What transformers assumes where a configuration is silent.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, projection_dim=512,
    num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77,
    hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407,
)  # fmt: skip
PROJECTED = "CLIPTextModelWithProjection"
# What configurations of before 2023 say the end token is. It never was: the largest id is taken.
LARGEST_ID = 2


def from_transformers(config: dict[str, Any], *, key) -> CLIPText:
    """The module of a transformers `config.json`, with random weights.

    Dropout is left out: it is off when an encoder is used.

    **Raises** `WeightsError` for an activation or an end token that it cannot have.

    >>> import jax
    >>> sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> clip = from_transformers(sizes | {"num_hidden_layers": 1}, key=jax.random.key(0))
    >>> clip.config.hidden, clip.config.end_id
    (32, 49407)
    """
    given = DEFAULTS | config
    end, wrong = given["eos_token_id"], wrong_activation(given)
    if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
        wrong.append(f"eos_token_id = {end!r} (one number)")
    refuse_options("CLIPText", given, {}, wrong)
    return CLIPText(
        given["hidden_size"],
        given["num_hidden_layers"],
        given["num_attention_heads"],
        hidden=given["intermediate_size"],
        activation=ACTIVATIONS[given["hidden_act"]],
        projection=given["projection_dim"] if PROJECTED in given.get("architectures", ()) else None,
        end_id=None if end == LARGEST_ID else end,
        vocabulary=given["vocab_size"],
        length=given["max_position_embeddings"],
        norm_eps=given["layer_norm_eps"],
        key=key,
    )


def transformers_config(clip: CLIPText) -> dict[str, Any]:
    """The `config.json` with which transformers makes the same network.

    **Raises** `WeightsError` if transformers has no such network.

    >>> import jax
    >>> clip = CLIPText(16, 1, 2, projection=8, vocabulary=99, key=jax.random.key(0))
    >>> config = transformers_config(clip)
    >>> config["architectures"], config["eos_token_id"]
    (['CLIPTextModelWithProjection'], 2)
    """
    ours = clip.config
    reasons = foreign_activation(ours.activation)
    reasons[f"its end_id is {ours.end_id}"] = ours.end_id == LARGEST_ID
    refuse_network("CLIPText", "transformers", reasons)
    return DEFAULTS | dict(
        architectures=["CLIPTextModel" if ours.projection is None else PROJECTED],
        model_type="clip_text_model",
        vocab_size=ours.vocabulary,
        hidden_size=ours.width,
        intermediate_size=ours.hidden,
        projection_dim=ours.width if ours.projection is None else ours.projection,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        max_position_embeddings=ours.length,
        hidden_act=NAMES[ours.activation],
        layer_norm_eps=ours.norm_eps,
        eos_token_id=LARGEST_ID if ours.end_id is None else ours.end_id,
    )


def transformers_layout(clip: CLIPText) -> Layout:
    """The names of transformers' files, and those without their `text_model.`.

    >>> import jax
    >>> clip = CLIPText(16, 1, 2, vocabulary=99, key=jax.random.key(0))
    >>> layout = transformers_layout(clip)
    >>> layout.leaves[".blocks.stacked.fc1.weight"][0].name
    'text_model.encoder.layers.0.mlp.fc1.weight'
    >>> layout.aliases["encoder.layers.0.mlp.fc1.weight"]
    'text_model.encoder.layers.0.mlp.fc1.weight'
    """
    prefix = "text_model."
    leaves: Leaves = {
        ".table": (Part(f"{prefix}embeddings.token_embedding.weight"),),
        ".positions": (Part(f"{prefix}embeddings.position_embedding.weight"),),
    }
    depth, there = clip.config.depth, f"{prefix}encoder.layers.{{}}"
    for n in (1, 2):
        leaves |= stacked(norm(f"norm{n}", f"{there}.layer_norm{n}"), depth)
        leaves |= stacked(linear(f"fc{n}", f"{there}.mlp.fc{n}"), depth)
    leaves |= stacked(linear("attention.proj", f"{there}.self_attn.out_proj"), depth)
    for kind in ("weight", "bias"):
        leaves[f".blocks.stacked.attention.qkv.{kind}"] = tuple(
            Part(f"{there.format(i)}.self_attn.{letter}_proj.{kind}", (i, k))
            for i in range(depth)
            for k, letter in enumerate("qkv")
        )
    leaves |= norm("norm", f"{prefix}final_layer_norm")
    aliases = {
        part.name.removeprefix(prefix): part.name for parts in leaves.values() for part in parts
    }
    if clip.project is not None:
        leaves |= linear("project", "text_projection", bias=False)
    # Files of 2022 and 2023 hold the numbers of the positions.
    numbers = "embeddings.position_ids"
    length = clip.config.length
    fixed = {name: lambda: np.arange(length)[None] for name in (numbers, prefix + numbers)}
    return Layout(leaves, fixed, aliases)


def open_clip_layout(clip: CLIPText) -> Layout:
    """OpenCLIP's names, as in the original files of Stable Diffusion 2 and SDXL.

    The three projections of the attention are one matrix there, and the last one is transposed.

    >>> import jax
    >>> clip = CLIPText(16, 1, 2, projection=8, vocabulary=99, key=jax.random.key(0))
    >>> [part.name for part in open_clip_layout(clip).leaves[".project.weight"]]
    ['text_projection']
    """
    leaves: Leaves = {
        ".table": (Part("token_embedding.weight"),),
        ".positions": (Part("positional_embedding"),),
    }
    depth, there = clip.config.depth, "transformer.resblocks.{}"
    for n, name in ((1, "c_fc"), (2, "c_proj")):
        leaves |= stacked(norm(f"norm{n}", f"{there}.ln_{n}"), depth)
        leaves |= stacked(linear(f"fc{n}", f"{there}.mlp.{name}"), depth)
    leaves |= stacked(linear("attention.proj", f"{there}.attn.out_proj"), depth)
    three, one = lambda a: a.reshape(3, -1, *a.shape[1:]), lambda a: a.reshape(-1, *a.shape[2:])
    for kind in ("weight", "bias"):
        leaves[f".blocks.stacked.attention.qkv.{kind}"] = tuple(
            Part(f"{there.format(i)}.attn.in_proj_{kind}", (i,), three, one) for i in range(depth)
        )
    leaves |= norm("norm", "ln_final")
    if clip.project is not None:
        turned = (np.transpose, np.transpose)
        leaves[".project.weight"] = (Part("text_projection", (), *turned),)
    return Layout(leaves, {})
