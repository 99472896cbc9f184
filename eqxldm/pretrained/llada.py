"""LLaDA: the names of its published files, and its configuration."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..models import TokenTransformer
from .files import open_index, open_safetensors, read_json
from .layout import Layout, Part, ShardingRule, Tensor, WeightsError, fill
from .limits import check_config, check_count
from .parts import Leaves, stacked_linear, stacked_qkv, stacked_scales

MASK, END, END_OF_TURN = 126_336, 126_081, 126_348  # LLaDA-8B's own tokens
DEFAULTS: dict[str, Any] = dict(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=None, mlp_hidden_size=12288,
    vocab_size=126_464, embedding_size=None, max_sequence_length=4096, rope_theta=500_000.0,
    rms_norm_eps=1e-5, weight_tying=False, include_bias=False, include_qkv_bias=False,
)  # fmt: skip
STACK, PREFIX = "blocks.stacked", "model.transformer"


def from_llada(config: dict[str, Any], *, key) -> TokenTransformer:
    """The network of LLaDA's `config.json`, with random weights.

    **Raises** `WeightsError` for an option that our network does not have.

    >>> config = dict(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=24, vocab_size=5)
    >>> from_llada(config, key=jax.random.key(0)).config.hidden
    24
    """
    given = DEFAULTS | config
    wrong = [n for n in ("include_bias", "include_qkv_bias") if given[n]]
    if given["n_kv_heads"] not in (None, given["n_heads"]):
        wrong.append("n_kv_heads")
    if wrong:
        found = ", ".join(f"{name} = {given[name]}" for name in wrong)
        raise WeightsError(f"TokenTransformer: config.json has what the network has not: {found}.")
    return TokenTransformer(
        given["embedding_size"] or given["vocab_size"],
        depth=given["n_layers"],
        width=given["d_model"],
        num_heads=given["n_heads"],
        hidden=given["mlp_hidden_size"],
        max_length=given["max_sequence_length"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        tied=given["weight_tying"],
        key=key,
    )


def llada_layout(network: TokenTransformer) -> Layout:
    """The names of LLaDA's tensors (Nie et al. 2025; those of OLMo, whose code it is).

    >>> network = TokenTransformer(5, depth=1, width=16, num_heads=2, max_length=8,
    ...                            key=jax.random.key(0))
    >>> llada_layout(network).leaves[".token_table"][0].name
    'model.transformer.wte.weight'
    """
    blocks = range(network.config.depth)
    name = f"{PREFIX}.blocks.{{}}"
    leaves: Leaves = {
        ".token_table": (Part(f"{PREFIX}.wte.weight"),),
        ".norm.scale": (Part(f"{PREFIX}.ln_f.weight"),),
    }
    if network.lm_head is not None:
        leaves[".lm_head.weight"] = (Part(f"{PREFIX}.ff_out.weight"),)
    for ours, theirs in (("norm1", "attn_norm"), ("norm2", "ff_norm")):
        leaves |= stacked_scales(f"{STACK}.{ours}", f"{name}.{theirs}.weight", blocks)
    q, k, v = (f"{name}.{letter}_proj" for letter in "qkv")
    leaves |= stacked_qkv(f"{STACK}.attention.qkv", (q, k, v), blocks)
    for ours, theirs in {
        "attention.proj": "attn_out",
        "gate": "ff_proj",
        "fc1": "up_proj",
        "fc2": "ff_out",
    }.items():
        leaves |= stacked_linear(f"{STACK}.{ours}", f"{name}.{theirs}", blocks)
    return Layout({path: parts for path, parts in leaves.items() if ".bias" not in path}, {})


def load_llada(
    folder: str | Path, *, dtype: Any = jnp.float32, sharding: ShardingRule | None = None
) -> TokenTransformer:
    """LLaDA's network from its published folder: `config.json` and `model*.safetensors`.

    Arguments as in `load`: `dtype=jnp.bfloat16` takes 16 GB for the 8B. Leaves are put together and
    placed one after the other; for several devices `sharding=eqxldm.sharding.leaf_sharding(mesh)`.

    **Raises** `FileNotFoundError` and `WeightsError`, as `load`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json, which says what the model is.")
    config, tensors = read_json(folder / "config.json"), _open(folder)
    kind = config.get("model_type")
    if kind != "llada":
        raise WeightsError(f"{folder}: model_type is {kind!r}, and llada is what is read here.")
    check_config(config, tensors, str(folder / "config.json"))
    try:
        network = eqx.filter_eval_shape(lambda: from_llada(config, key=jax.random.key(0)))
    except WeightsError:
        raise
    except Exception as error:  # whatever a constructor raises for a number that makes no sense
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{folder}: no network can be made of config.json: {reason}") from error
    check_count(network, tensors, str(folder))
    table = llada_layout(network)
    return fill(network, table, tensors, source=str(folder), dtype=dtype, sharding=sharding)


def _open(folder: Path) -> dict[str, Tensor]:
    for name, reader in (
        ("model.safetensors", lambda path: open_safetensors(path)[0]),
        ("model.safetensors.index.json", open_index),
    ):
        if (folder / name).exists():
            return reader(folder / name)
    raise WeightsError(
        f"{folder} holds no weights; looked for model.safetensors and model.safetensors.index.json."
    )
