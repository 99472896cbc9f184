"""T5's and umT5's encoders: the names of transformers, and the configurations."""

from typing import Any

from ..models import T5Encoder
from .layout import Layout, Part, WeightsError
from .parts import Leaves, linear, stacked

# What transformers assumes where a configuration is silent.
DEFAULTS: dict[str, Any] = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
    relative_attention_num_buckets=32, relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6, feed_forward_proj="relu",
)  # fmt: skip
UMT5_DEFAULTS: dict[str, Any] = DEFAULTS | dict(
    vocab_size=250112, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"
)
T5, UMT5, GATED = "T5EncoderModel", "UMT5EncoderModel", "gated-gelu"


def from_transformers(config: dict[str, Any], *, key) -> T5Encoder:
    """The module of a transformers `config.json`, with random weights.

    Dropout is left out: it is off when an encoder is used.

    **Raises** `WeightsError` for the MLPs of the first T5, which are not gated.

    >>> import jax
    >>> sizes = dict(vocab_size=99, d_model=16, d_ff=32, num_layers=1, feed_forward_proj=GATED)
    >>> from_transformers(sizes, key=jax.random.key(0)).config.num_heads
    8
    """
    own = UMT5 in (config.get("architectures") or ())
    given = (UMT5_DEFAULTS if own else DEFAULTS) | config
    if given["feed_forward_proj"] != GATED:
        raise WeightsError(
            f"T5Encoder: config.json has feed_forward_proj = {given['feed_forward_proj']!r}; only "
            f"{GATED!r} is known, that of T5 v1.1 and umT5."
        )
    return T5Encoder(
        given["d_model"],
        given["num_layers"],
        given["num_heads"],
        given["d_ff"],
        head_size=given["d_kv"],
        shared_bias=not own,
        buckets=given["relative_attention_num_buckets"],
        max_distance=given["relative_attention_max_distance"],
        vocabulary=given["vocab_size"],
        norm_eps=given["layer_norm_epsilon"],
        key=key,
    )


def transformers_config(t5: T5Encoder) -> dict[str, Any]:
    """The `config.json` with which transformers makes the same network.

    >>> import jax
    >>> t5 = T5Encoder(16, 1, 2, 32, shared_bias=False, vocabulary=99, key=jax.random.key(0))
    >>> transformers_config(t5)["architectures"]
    ['UMT5EncoderModel']
    """
    ours = t5.config
    return DEFAULTS | dict(
        architectures=[T5 if ours.shared_bias else UMT5],
        model_type="t5" if ours.shared_bias else "umt5",
        vocab_size=ours.vocabulary,
        d_model=ours.width,
        d_kv=ours.head_size,
        d_ff=ours.hidden,
        num_layers=ours.depth,
        num_heads=ours.num_heads,
        relative_attention_num_buckets=ours.buckets,
        relative_attention_max_distance=ours.max_distance,
        layer_norm_epsilon=ours.norm_eps,
        feed_forward_proj=GATED,
        is_encoder_decoder=False,
        use_cache=False,
    )


def transformers_layout(t5: T5Encoder) -> Layout:
    """The names of transformers' files. Some hold the embeddings twice.

    >>> import jax
    >>> t5 = T5Encoder(16, 1, 2, 32, vocabulary=99, key=jax.random.key(0))
    >>> layout = transformers_layout(t5)
    >>> layout.leaves[".blocks.stacked.gate_fc1.weight"][0].name
    'encoder.block.0.layer.1.DenseReluDense.wi_0.weight'
    >>> dict(layout.ties)
    {'encoder.embed_tokens.weight': 'shared.weight'}
    """
    depth, attention = t5.config.depth, "encoder.block.{}.layer.0.SelfAttention"
    leaves: Leaves = {".table": (Part("shared.weight"),)}
    for n in (1, 2):
        scale = Part(f"encoder.block.{{}}.layer.{n - 1}.layer_norm.weight")
        leaves |= stacked({f".norm{n}.scale": (scale,)}, depth)
    for ours, theirs in {"gate_fc1": "wi_0", "fc1": "wi_1", "fc2": "wo"}.items():
        there = f"encoder.block.{{}}.layer.1.DenseReluDense.{theirs}"
        leaves |= stacked(linear(ours, there, bias=False), depth)
    leaves |= stacked(linear("attention.proj", f"{attention}.o", bias=False), depth)
    leaves[".blocks.stacked.attention.qkv.weight"] = tuple(
        Part(f"{attention.format(i)}.{letter}.weight", (i, k))
        for i in range(depth)
        for k, letter in enumerate("qkv")
    )
    positions = Part(f"{attention}.relative_attention_bias.weight")
    if t5.config.shared_bias:
        leaves[".bias_table"] = (positions._replace(name=positions.name.format(0)),)
    else:
        leaves |= stacked({".bias_table": (positions,)}, depth)
    leaves[".norm.scale"] = (Part("encoder.final_layer_norm.weight"),)
    return Layout(leaves, {}, ties={"encoder.embed_tokens.weight": "shared.weight"})
