"""Meshes and partition rules."""

from functools import partial

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from eqxldm import models, nn, sharding, training

ONE = jax.devices()[:1]


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("", (-1, 1, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        (" tensor = 8 ", (1, 1, 8)),
        ("fsdp=-1,tensor=2", (1, -1, 2)),
    ],
)
def test_a_mesh_is_read_from_its_text(text, sizes):
    assert sharding.parse_mesh(text) == dict(zip(sharding.AXES, sizes, strict=True))


@pytest.mark.parametrize(
    "text, message",
    [
        ("model=2", "need each of data, fsdp, tensor at most once"),
        ("data=2,data=2", "got 'data=2'"),
        ("data", "got 'data'"),
        ("data=two", "got 'data=two'"),
        ("data=1.5", "got 'data=1.5'"),
        ("data=2,", "got ''"),
        ("fsdp=0", "fsdp must be a positive number"),
        ("fsdp=-2", "fsdp must be a positive number"),
        ("data=-1,fsdp=-1", "only one axis can be -1"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text)


def test_a_mesh_takes_all_devices_or_is_refused():
    assert dict(sharding.make_mesh().shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    rest = sharding.make_mesh(sharding.parse_mesh("tensor=-1"))
    assert dict(rest.shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert sharding.make_mesh({"fsdp": 1}, ONE).size == 1
    for text in ("data=3", "data=1", "fsdp=4,data=-1", "tensor=3,data=-1"):
        with pytest.raises(ValueError, match="must multiply to the 2 devices"):
            sharding.make_mesh(sharding.parse_mesh(text))


@pytest.mark.parametrize("batch, grad_accum_steps", [(0, 1), (3, 1), (2, 2), (6, 2)])
def test_a_batch_that_does_not_divide_is_refused(batch, grad_accum_steps):
    with pytest.raises(
        ValueError, match=f"batch of {batch} does not divide by {2 * grad_accum_steps}"
    ):
        sharding.check_batch(batch, sharding.make_mesh(), grad_accum_steps)
    sharding.check_batch(8, sharding.make_mesh(), grad_accum_steps)


XL = eqx.filter_eval_shape(models.dit_xl_2, (4, 32, 32), key=jax.random.key(0))
MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    "path, spec",
    [
        (
            "blocks.stacked.attention.qkv.weight",
            P(None, None, "tensor", "fsdp"),
        ),  # (28, 3, 1152, 1152)
        ("blocks.stacked.attention.qkv.bias", P(None, None, "tensor")),
        ("blocks.stacked.attention.proj.weight", P(None, "fsdp", "tensor")),
        ("blocks.stacked.attention.proj.bias", P()),
        ("blocks.stacked.fc1.weight", P(None, "tensor", "fsdp")),
        ("blocks.stacked.fc1.bias", P(None, "tensor")),
        ("blocks.stacked.fc2.weight", P(None, "fsdp", "tensor")),
        ("blocks.stacked.modulation.linear.weight", P(None, "fsdp")),  # (28, 6912, 1152)
        ("blocks.stacked.modulation.linear.bias", P()),  # small
        ("embed_cond.table", P(None, "fsdp")),  # (1001, 1152): 1001 does not divide
        ("patch_embedding.weight", P()),  # small
        ("final_modulation.linear.weight", P("fsdp")),
    ],
)
def test_the_rules_divide_the_layers_of_dit_xl_as_written(path, spec):
    leaf = XL
    for name in path.split("."):
        leaf = getattr(leaf, name)
    assert sharding.partition_spec(path, leaf.shape, MESH) == spec


def test_averages_and_the_optimizer_are_divided_like_the_parameters():
    optimizer = training.adamw(1e-4, clip_norm=1.0)
    state = eqx.filter_eval_shape(
        lambda k: training.init_state(models.dit_xl_2((4, 32, 32), key=k), optimizer, num_emas=2)[
            0
        ],
        jax.random.key(0),
    )
    specs = sharding.partition_specs(state, MESH)
    wanted = jax.tree.leaves(specs.params, is_leaf=lambda s: isinstance(s, P))
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, P))
    moments = optax.tree.get(specs.opt_state, "mu"), optax.tree.get(specs.opt_state, "nu")
    for tree in (*specs.ema, *moments):
        assert leaves(tree) == wanted


def test_rules_need_no_devices_and_nothing_is_divided_that_does_not_divide():
    for mesh in (MESH, {"fsdp": 7}, {"tensor": 5}, {"data": 64}):
        for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(XL, _is_shape)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            spec = sharding.partition_spec(name, leaf.shape, mesh)
            for size, axis in zip(leaf.shape, spec, strict=False):
                assert axis is None or size % mesh[axis] == 0
            if name.startswith("blocks."):
                assert not spec or spec[0] is None


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def parameter_names(model):
    shapes = eqx.filter(model, _is_shape)
    return [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]


def shipped():
    """Every model of the library, in each of the forms that have parameters of their own."""
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2)
    text = models.ByteTextConfig(16, 1, 2, 8)
    deep = dict(channels=(8, 8), blocks=1, groups=4, attention=True, attention_levels=(True, False))
    unet = dict(channels=(8, 8), blocks=1, attention_levels=(True, False), groups=4)
    conv = dict(conv=nn.SpectralConv, norm=eqx.nn.Identity)
    words = dict(depth=2, width=16, num_heads=2, max_length=8)
    makes = {
        "dit": partial(models.DiT, (3, 4, 8), **sizes, num_classes=5, qk_norm=nn.RMSNorm),
        "modern dit": partial(
            models.DiT, (3, 4, 8), **sizes, num_classes=5, norm=nn.RMSNorm, swiglu=True,
            modulated=False, condition_tokens=2, time_tokens=1, early_depth=1, early_head=True,
            patch_bottleneck=3,
        ),
        "early dit": partial(
            models.DiT, (3, 4, 8), **sizes, early_depth=1, early_head=True, norm=nn.RMSNorm,
            embed_cond=text, block=models.CrossAttentionDiTBlock,
        ),
        "aligned": partial(nn.Aligned, lambda x_t, t, cond, *, key=None: x_t, 8, 5, hidden=8),
        "caption dit": partial(
            models.DiT, (3, 4, 8), **sizes, embed_cond=models.CaptionEncoderConfig(16, 1, 2, 8, 99)
        ),
        "text dit": partial(
            models.DiT, (3, 4, 8), **sizes, embed_cond=text, block=models.CrossAttentionDiTBlock,
            step_embedding=nn.Sinusoid(1.0, 0.0), qk_norm=nn.LayerNorm,
        ),
        "flux": partial(
            models.Flux, 2, depth=1, single_depth=1, width=16, num_heads=2, context_size=6,
            pooled_size=5, guidance=True, rope=nn.RoPE((4, 2, 2)),
        ),
        "mmdit": partial(
            models.MMDiT, 2, depth=3, width=16, num_heads=2, context_size=6, pooled_size=5,
            dual_depth=1, qk_norm=nn.RMSNorm,
        ),
        "wan": partial(
            models.WanTransformer, 2, depth=2, width=16, num_heads=2, context_size=6
        ),
        "weighted": partial(nn.Weighted, lambda x_t, t, cond, *, key=None: x_t),
        "unet": partial(models.UNet, 3, **unet, num_classes=5),
        "text unet": partial(
            models.UNet, 3, **unet, context_size=6, linear_projection=True, added_size=9,
            number_size=2,
        ),
        "autoencoder": partial(models.AutoencoderKL, 3, 4, **deep),
        "quant": partial(models.AutoencoderKL, 3, 4, **deep, quant_convs=True),
        "video": partial(models.CausalVideoAutoencoder, 3, 4, channels=(8, 8), blocks=1),
        "sound": partial(models.SoundAutoencoder, 5, 4, width=8),
        "towers": partial(
            models.TwoTowers, (2, 1, 2, 2), (2, 2), video_seconds=(0.0,), sound_seconds=(0.0, 0.5),
            patch_size=1, depth=1, width=24, num_heads=2,
            embed_cond=models.ByteTextConfig(24, 1, 2, 8),
        ),
        "tiny": partial(models.TinyAutoencoder, 3, 4, width=8, pool=True),
        "discriminator": partial(models.PatchDiscriminator, 3, channels=8, layers=1, groups=4),
        "spectral": partial(models.PatchDiscriminator, 3, channels=8, layers=1, **conv),
        "dinov2": partial(models.DINOv2, 16, 2, 2, grid=3),
        "clip image": partial(models.CLIPImage, 16, 2, 2, 8, grid=3, patch_size=4),
        "inception": partial(models.Inception, divide=32),
        "alex": partial(models.AlexLPIPS, channels=(4,) * 5),
        "lpips": partial(models.LPIPS, channels=(4,) * 5),
        "t5": partial(models.T5Encoder, 8, 2, 2, 12, vocabulary=9),
        "umt5": partial(models.T5Encoder, 8, 2, 2, 12, vocabulary=9, shared_bias=False),
        "clip": partial(models.CLIPText, 8, 2, 2, projection=4, vocabulary=9, length=5),
        "bert": partial(models.BERT, 8, 2, 2, vocabulary=9, length=5),
        "sentences": partial(
            models.SentenceEncoder, models.BERTConfig(8, 2, 2, vocabulary=9, length=5), longest=5
        ),
        "encoded captions": partial(models.EncodedCaption, 5, 8),
        "tokens": partial(models.TokenTransformer, 5, **words),
        "timed tokens": partial(
            models.TokenTransformer, 5, **words, block=models.AdaptiveTokenBlock,
            time_embedding=nn.Sinusoid(),
        ),
    }  # fmt: skip
    key = jax.random.key(0)
    return {name: parameter_names(eqx.filter_eval_shape(m, key=key)) for name, m in makes.items()}


def test_every_parameter_of_every_model_is_named_by_a_rule():
    for model, names in shipped().items():
        assert names
        assert [n for n in names if sharding.parameter_rule(n) is None] == [], model


@pytest.mark.parametrize("field", ["fc1", "qkv", "conv1", "stem", "modulation", "table", "norm2"])
def test_a_parameter_of_a_renamed_field_has_no_rule(field):
    """So the test above would fail: no rule takes whatever comes."""
    paths = [n for names in shipped().values() for n in names if field in n.split(".")]
    renamed = [n.replace(field, "other") for n in paths]
    assert paths and all(sharding.parameter_rule(n) is None for n in renamed)


def test_every_rule_is_of_a_parameter_of_a_model():
    used = {sharding.parameter_rule(n) for names in shipped().values() for n in names}
    used |= {sharding.parameter_rule("attention.query.bias")}  # of CrossAttention(qkv_bias=True)
    # Weights in 8 bits (`quantization`).
    for names in shipped().values():
        used |= {
            sharding.parameter_rule(f"{n}.{part}") for n in names for part in ("values", "scale")
        }
    assert [rule for rule in sharding.RULES if rule not in used] == []


def test_bytes_a_device_are_those_of_the_placed_shards():
    tree = {"fc1": {"weight": np.zeros((512, 256), np.float32)}, "b": np.zeros(5, np.float16)}
    for text in ("data=2", "fsdp=2", "tensor=2"):
        mesh = sharding.make_mesh(sharding.parse_mesh(text))
        placed = jax.tree.leaves(sharding.place(tree, mesh))
        measured = sum(leaf.addressable_shards[1].data.nbytes for leaf in placed)
        assert measured == sharding.bytes_per_device(tree, mesh.shape)
        assert measured == (524288 if text == "data=2" else 262144) + 10


def test_a_state_that_is_built_on_a_mesh_is_that_built_and_placed():
    build = lambda: models.PatchDiscriminator(3, channels=64, layers=1, key=jax.random.key(1))
    mesh = sharding.make_mesh({"fsdp": 2})
    built = sharding.build_placed(build, mesh)
    placed = sharding.place(eqx.filter(build(), eqx.is_array), mesh)
    arrays = jax.tree.leaves(eqx.filter(built, eqx.is_array))
    for a, b in zip(arrays, jax.tree.leaves(placed), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert built.convs[1].stride == build().convs[1].stride
    assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(placed))
