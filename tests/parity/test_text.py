"""Text encoders against transformers, both ways: hidden states, pooled, gradients, files."""

import copy

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from eqxldm import models, pretrained

from harness import (
    FORMS,
    Draw,
    Pair,
    check_dtypes,
    compare,
    compare_back,
    each_configuration,
    randomise,
)

SAFE_FORMS = [form for form in FORMS if form != "bin"]


class Prefixed(torch.nn.Module):
    """A module whose parameters are named as in its files, which have one part more."""

    def __init__(self, module):
        super().__init__()
        self.text_model = module

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, folder, **options):
        module, about = CLIPTextModel.from_pretrained(folder, **options)
        return cls(module), about


def read(kind, folder, **options):
    """What transformers makes of a folder, in float32."""
    options |= dict(dtype=torch.float32, output_loading_info=True)
    module, about = kind.from_pretrained(folder, **options)
    assert not any(about.values()), about
    return module.eval()


def save(module, folder, form):
    dtype, options = FORMS[form]
    copy.deepcopy(module).to(dtype).save_pretrained(folder, **options)


def written_as(way, folder):
    """The file with the names of other years: without a prefix, or with the positions' numbers."""
    path, prefix = folder / "model.safetensors", "text_model."
    tensors = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    if way == "with position_ids":
        length = len(tensors["embeddings.position_embedding.weight"])
        tensors["embeddings.position_ids"] = np.arange(length)[None]
    if way != "without prefix":
        project = "text_projection.weight"
        tensors = {n if n == project else prefix + n: value for n, value in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def of_clip(module, ids, mask=None):
    out = module(ids, attention_mask=mask, output_hidden_states=True)
    found = {"last": out.last_hidden_state, "hidden": torch.stack(out.hidden_states, 1)}
    if "pooler_output" in out:
        found["pooled"] = out.pooler_output
    if "text_embeds" in out:
        found["embeds"] = out.text_embeds
    return found


def our_clip(clip, ids, mask=None):
    out = jax.vmap(clip)(ids, mask) if mask is not None else jax.vmap(clip)(ids)
    found = {"last": out.last, "hidden": out.hidden}
    return found | ({"pooled": out.pooled} if out.embeds is None else {"embeds": out.embeds})


def clip_config(draw):
    num_heads = draw.between(1, 3)
    vocabulary = draw.one(20, 100)
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=num_heads * 4 * draw.between(4, 6),
        intermediate_size=draw.between(8, 60),
        projection_dim=draw.between(5, 40),
        num_hidden_layers=draw.between(1, 3),
        num_attention_heads=num_heads,
        max_position_embeddings=draw.between(4, 12),
        hidden_act=draw.one("quick_gelu", "gelu", "gelu_new"),
        layer_norm_eps=draw.one(1e-5, 1e-6),
        bos_token_id=0,
        eos_token_id=draw.one(2, 2, 3, vocabulary - 1),
    )


@each_configuration
def test_clip(number, tmp_path, record_property):
    draw = Draw("clip", number)
    config = clip_config(draw)
    kind = draw.one(CLIPTextModel, CLIPTextModelWithProjection)
    module, form = randomise(kind(config), draw), SAFE_FORMS[number % len(SAFE_FORMS)]
    save(module, tmp_path / "theirs", form)
    kind = Prefixed if kind is CLIPTextModel else kind
    module = read(kind, tmp_path / "theirs", variant=FORMS[form][1].get("variant"))
    check_dtypes(tmp_path / "theirs", form)
    if form in ("float32", "bf16"):
        ways = ["with prefix", "without prefix", "with position_ids"]
        written_as(ways[number // len(SAFE_FORMS) % 3], tmp_path / "theirs")
    clip = pretrained.load(tmp_path / "theirs")
    assert (clip.config.end_id is None) == (config.eos_token_id == 2)
    n = draw.between(2, config.max_position_embeddings)
    ids = draw.rng.integers(0, config.vocab_size, (3, n))
    if config.eos_token_id != 2:  # more than one, the first of which counts, and none at all
        ids[0, n // 2 :] = config.eos_token_id
    values = dict(ids=ids)
    if draw.one(False, True):
        values["mask"] = np.arange(n) < draw.rng.integers(1, n + 1, (3, 1))
    pair = Pair(of_clip, our_clip, pretrained.clip_text.transformers_layout, values)
    errors = compare(module, clip, pair)
    errors["exported"] = compare_back(kind, module, clip, tmp_path / "ours", pair, read=read)
    record_property("CLIP", errors)


def test_clip_with_the_names_of_open_clip(tmp_path):
    """By PyTorch's own layer, whose names OpenCLIP's are."""
    draw = Draw("open_clip", 0)
    clip = models.CLIPText(32, 2, 2, projection=8, vocabulary=50, length=9, key=jax.random.key(1))
    state = pretrained.to_state(clip, pretrained.clip_text.open_clip_layout)
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    prefix = "transformer.resblocks.1.attn."
    own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    layer.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in own.items()})
    x = draw.normal(9, 32)
    hidden = torch.triu(torch.ones(9, 9), 1).bool()
    with torch.no_grad():
        expected = layer(*3 * [torch.from_numpy(x)[None]], attn_mask=hidden)[0][0]
    block = jax.tree.map(lambda a: a[1], clip.blocks.stacked)
    found = block.attention(x, np.tril(np.ones((9, 9), bool)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert state["text_projection"].shape == (32, 8)
    again = pretrained.load_state(clip, state)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (again, clip)), strict=True))


def of_t5(module, ids, mask=None):
    return {"out": module(ids, attention_mask=mask).last_hidden_state}


def our_t5(t5, ids, mask=None):
    return {"out": jax.vmap(t5)(ids, mask) if mask is not None else jax.vmap(t5)(ids)}


def t5_pair(draw, umt5):
    sizes = dict(
        vocab_size=draw.one(20, 100),
        d_model=draw.between(16, 30),
        d_kv=draw.between(4, 12),
        d_ff=draw.between(8, 60),
        num_layers=draw.between(1, 3),
        num_heads=draw.between(1, 3),
        relative_attention_num_buckets=draw.one(8, 16, 32, 32),
        relative_attention_max_distance=draw.one(20, 128, 128),
        feed_forward_proj="gated-gelu",
    )
    if umt5:
        return UMT5EncoderModel(UMT5Config(**sizes))
    return T5EncoderModel(T5Config(**sizes))


def t5_written_as(way, folder):
    """The embeddings by their other name, or twice."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if way != "as it is":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if way == "the other name":
        del tensors["shared.weight"]
    save_file(tensors, path, {"format": "pt"})


def check_t5(name, umt5, number, folder, record_property):
    draw = Draw(name, number)
    module, form = t5_pair(draw, umt5), SAFE_FORMS[number % len(SAFE_FORMS)]
    randomise(module, draw)
    with torch.no_grad():  # T5 divides no scores, but starts with smaller queries
        for block in module.encoder.block:
            block.layer[0].SelfAttention.q.weight.div_(module.config.d_kv**0.5)
    save(module, folder / "theirs", form)
    module = read(type(module), folder / "theirs", variant=FORMS[form][1].get("variant"))
    check_dtypes(folder / "theirs", form)
    if form in ("float32", "bf16"):
        ways = ["as it is", "the other name", "twice"]
        t5_written_as(ways[number // len(SAFE_FORMS) % 3], folder / "theirs")
    t5 = pretrained.load(folder / "theirs")
    assert t5.config.shared_bias is not umt5
    n = draw.one(1, 5, 40)
    values = dict(ids=draw.rng.integers(0, module.config.vocab_size, (3, n)))
    if draw.one(False, True):
        values["mask"] = np.arange(n) < draw.rng.integers(1, n + 1, (3, 1))
    pair = Pair(of_t5, our_t5, pretrained.t5.transformers_layout, values)
    errors = compare(module, t5, pair)
    errors["exported"] = compare_back(type(module), module, t5, folder / "ours", pair, read=read)
    record_property("umT5" if umt5 else "T5", errors)


@each_configuration
def test_t5(number, tmp_path, record_property):
    check_t5("t5", False, number, tmp_path, record_property)


@each_configuration
def test_umt5(number, tmp_path, record_property):
    check_t5("umt5", True, number, tmp_path, record_property)


def test_the_buckets_of_all_distances():
    """The floor is taken of numbers that are whole but for rounding."""
    for buckets, distance in ((32, 128), (16, 64), (8, 20), (64, 512)):
        config = UMT5Config(
            relative_attention_num_buckets=buckets, relative_attention_max_distance=distance,
            d_model=8, num_heads=1, d_kv=8, num_layers=1, vocab_size=9, d_ff=8,
        )  # fmt: skip
        layer = UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
        n = 600
        way = torch.arange(n)[None] - torch.arange(n)[:, None]
        expected = layer._relative_position_bucket(way).numpy()
        np.testing.assert_array_equal(models.relative_buckets(n, buckets, distance), expected)
