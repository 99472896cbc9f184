"""Weights in and out: parity with diffusers, round trips, names, and what goes wrong."""

import argparse
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from eqxldm import pretrained
from eqxldm.models import DiT, dit_xl_2, kl_f8
from eqxldm.nn import Linear, RMSNorm, patchify, sincos_positions
from eqxldm.pretrained.files import WEIGHTS, open_safetensors, write_safetensors
from eqxldm.pretrained.layout import array_leaves, own_layout, tensor_shapes

from helpers import perturbed, reference, relative_error, small_autoencoder

FIXTURE = Path(__file__).parent / "reference" / "dit_diffusers.safetensors"
FILE = f"{WEIGHTS}.safetensors"


def fixture():
    """`(config, weights, the rest)` of what diffusers has made."""
    with safetensors.safe_open(FIXTURE, framework="np") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    split = {n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")}
    return config, split, {n: t for n, t in tensors.items() if not n.startswith("weights/")}


CONFIG, WEIGHTS_OF_DIFFUSERS, VALUES = fixture()


def write_folder(folder, *, config=CONFIG, tensors=WEIGHTS_OF_DIFFUSERS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / FILE, tensors, {"format": "pt"})
    return folder


def changed(tensors, **changes):
    """The tensors with some replaced, or removed where None."""
    return {n: t for n, t in {**tensors, **changes}.items() if t is not None}


def tiny(**changes):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    return perturbed(DiT((3, 8, 8), **{**sizes, **changes}, key=jax.random.key(0)))


def equal(a, b):
    """The same module: structure, static fields, dtypes and every bit."""
    same = jax.tree.structure(a) == jax.tree.structure(b) and type(a) is type(b)
    bits = lambda m: [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(m)]
    return same and bits(a) == bits(b)


# What diffusers computes.


@eqx.filter_jit
def forward(model, x):
    t = jnp.asarray((VALUES["timestep"] + 1) / 1000, jnp.float32)
    return jax.vmap(model)(x, t, jnp.asarray(VALUES["label"], jnp.int32))


def test_forward_and_gradients_equal_those_of_diffusers(tmp_path):
    dit = pretrained.load(write_folder(tmp_path / "dit"))
    x = jnp.asarray(VALUES["x"])
    loss = lambda model_and_x: jnp.sum(forward(*model_and_x) * VALUES["probe"])
    assert relative_error(forward(dit, x), VALUES["out"]) < 2e-5
    gradient, gradient_x = eqx.filter_grad(loss)((dit, x))
    found = {"x": gradient_x, **pretrained.to_state(gradient, pretrained.diffusers_layout)}
    expected = {n.removeprefix("gradient/"): g for n, g in VALUES.items() if "gradient/" in n}
    assert len(expected) == 4
    for name, value in expected.items():
        assert relative_error(found[name], value) < 2e-5, name


def test_read_into_a_made_model_the_frequencies_are_the_official_ones(tmp_path):
    folder = write_folder(tmp_path / "dit")
    theirs = pretrained.load(folder)
    ours = pretrained.load_into(
        DiT((3, 8, 8), patch_size=2, depth=2, width=24, num_heads=3, num_classes=5,
            learn_sigma=True, key=jax.random.key(0)),
        folder,
    )  # fmt: skip
    assert ours.time_embedding.config.freq_shift == 0
    assert theirs.time_embedding.config.freq_shift == 1
    assert equal(pretrained.with_diffusers_time(ours), theirs)
    out = forward(ours, jnp.asarray(VALUES["x"]))
    assert relative_error(out, VALUES["official"]) < 2e-5
    assert relative_error(out, VALUES["out"]) > 1e-2


# Round trips.

MODELS = {
    "labels": dict(),
    "sigma": dict(learn_sigma=True, num_classes=1),
    "no labels": dict(num_classes=None),
    "options": dict(mlp_ratio=2.7, qk_norm=RMSNorm, remat=None, unroll=2, patch_size=4),
    "policy": dict(remat=jax.checkpoint_policies.nothing_saveable, unroll=True),
}
each_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


@each_model
def test_our_files_give_back_the_identical_module(changes, tmp_path):
    for model in (tiny(**changes), pretrained.with_diffusers_time(tiny(**changes))):
        pretrained.save(model, tmp_path / "a.safetensors")
        assert equal(pretrained.load(tmp_path / "a.safetensors"), model)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o400
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes(dtype, tmp_path):
    model = jax.tree.map(lambda x: x.astype(dtype), tiny())
    pretrained.save(model, tmp_path / "a.safetensors")
    assert equal(pretrained.load(tmp_path / "a.safetensors", dtype=None), model)
    assert equal(pretrained.load(tmp_path / "a.safetensors", dtype=dtype), model)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    assert equal(pretrained.load(tmp_path / "a.safetensors"), wide)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_diffusers_files_of_other_dtypes(dtype, tmp_path):
    tensors = {n: t.astype(dtype) for n, t in WEIGHTS_OF_DIFFUSERS.items()}
    dit = pretrained.load(write_folder(tmp_path / "dit", tensors=tensors))
    exact = {n: t.astype(np.float32) for n, t in tensors.items()}
    assert equal(dit, pretrained.load(write_folder(tmp_path / "exact", tensors=exact)))
    half = pretrained.load(tmp_path / "dit", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("layout", [pretrained.official_layout, pretrained.diffusers_layout])
def test_every_layout_uses_each_number_once(layout):
    """Every number of a model is different, and each is found once in the tensors, and back."""
    model = tiny(learn_sigma=True)
    leaves, treedef = jax.tree.flatten(model)
    sizes = np.cumsum([0] + [leaf.size for leaf in leaves])
    numbers = [np.arange(a, b, dtype=np.float32) for a, b in itertools.pairwise(sizes)]
    numbered = jax.tree.unflatten(
        treedef, [n.reshape(leaf.shape) for n, leaf in zip(numbers, leaves, strict=True)]
    )
    table = layout(numbered)
    state = pretrained.to_state(numbered, layout)
    copies = {c for parts in table.leaves.values() for p in parts for c in p.copies}
    once = [t.ravel() for n, t in state.items() if n not in copies and n not in table.fixed]
    assert Counter(np.concatenate(once).tolist()) == Counter(range(sizes[-1]))
    assert equal(pretrained.load_state(model, state), jax.tree.map(jnp.asarray, numbered))


def test_official_names_with_qk_norm_and_without_labels():
    for model in (tiny(qk_norm=RMSNorm), tiny(num_classes=None)):
        state = pretrained.to_state(model, pretrained.official_layout)
        assert ("blocks.1.attn.q_norm.weight" in state) != ("y_embedder" not in str(state.keys()))
        assert equal(pretrained.load_state(model, state), model)


def test_an_exported_folder_has_the_names_and_shapes_of_diffusers(tmp_path):
    config = {**CONFIG, "norm_eps": 1e-6}
    model = perturbed(pretrained.load(write_folder(tmp_path / "in")))
    pretrained.export(model, tmp_path / "out")
    tensors, header = open_safetensors(tmp_path / "out" / FILE)
    expected = {name: tensor.shape for name, tensor in WEIGHTS_OF_DIFFUSERS.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert header["format"] == "pt"  # without it diffusers refuses the file
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: config[k] for k in written} == written
    assert equal(pretrained.load(tmp_path / "out"), model)


def test_sharded_files(tmp_path):
    whole = pretrained.load(write_folder(tmp_path / "dit"))
    folder, names = tmp_path / "sharded", sorted(WEIGHTS_OF_DIFFUSERS)
    folder.mkdir()
    shutil.copy(tmp_path / "dit" / "config.json", folder)
    files = {f"part{i}.safetensors": names[i::3] for i in range(3)}
    for file, held in files.items():
        write_safetensors(folder / file, {n: WEIGHTS_OF_DIFFUSERS[n] for n in held}, {})
    index = {name: file for file, held in files.items() for name in held}
    where = folder / f"{WEIGHTS}.safetensors.index.json"
    where.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert equal(pretrained.load(folder), whole)
    (folder / "part1.safetensors").unlink()
    with pytest.raises(pretrained.WeightsError, match=r"files that are not there: part1\.safeten"):
        pretrained.load(folder)
    moved = {**index, names[0]: "part2.safetensors", names[1]: "part2.safetensors"}
    write_safetensors(
        folder / "part1.safetensors",
        {n: WEIGHTS_OF_DIFFUSERS[n] for n in files["part1.safetensors"]},
        {},
    )
    where.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(pretrained.WeightsError) as error:
        pretrained.load(folder)
    assert f"{names[0]} is not in part2" in str(error.value)
    assert f"{names[1]} is in part1.safetensors unnamed" in str(error.value)
    where.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(pretrained.WeightsError, match="outside its folder"):
        pretrained.load(folder)


def test_each_leaf_is_placed_with_its_sharding(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, asked = tiny(), {}

    def rule(path, shape):
        axes = ("data",) if shape[0] % 2 == 0 else ()
        asked[path] = jax.NamedSharding(mesh, jax.P(*axes))
        return asked[path]

    pretrained.save(model, tmp_path / "a.safetensors")
    loaded = pretrained.load(tmp_path / "a.safetensors", sharding=rule)
    leaves = array_leaves(loaded)
    assert asked.keys() == leaves.keys()
    assert all(leaf.sharding == asked[path] for path, leaf in leaves.items())
    assert equal(loaded, model)


# The published names.


def official_shapes(depth, width, patch_size, channels, classes, tokens):
    """The state dict of the official DiT with learned sigma, written out by its pattern."""
    pairs = {
        "x_embedder.proj": (width, channels, patch_size, patch_size),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch_size * patch_size * 2 * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        pairs |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes = {f"{name}.weight": shape for name, shape in pairs.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in pairs.items()}
    shapes["y_embedder.embedding_table.weight"] = (classes + 1, width)
    return shapes, {"pos_embed": (1, tokens, width)}


def test_every_name_of_the_full_dit_xl_2():
    dit = eqx.filter_eval_shape(dit_xl_2, (4, 32, 32), key=jax.random.key(0))
    layout = pretrained.official_layout(dit)
    trainable, fixed = official_shapes(28, 1152, 2, 4, 1000, 256)
    assert tensor_shapes(dit, layout) == trainable
    assert {name: value().shape for name, value in layout.fixed.items()} == fixed
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes.values())
    assert (count(trainable), count(trainable | fixed)) == (674_834_720, 675_129_632)
    assert len(trainable) + len(fixed) == 292
    assert len(tensor_shapes(dit, pretrained.diffusers_layout(dit))) == 28 * 19 + 6


def test_the_patch_embedding_is_the_published_convolution(key):
    model = tiny()
    state = pretrained.to_state(model, pretrained.official_layout)
    x = jax.random.normal(key, model.shape)
    conv = jax.lax.conv_general_dilated(
        x[None], state["x_embedder.proj.weight"], (2, 2), "VALID",
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )[0]  # fmt: skip
    tokens = conv.reshape(16, -1).T + state["x_embedder.proj.bias"]
    np.testing.assert_allclose(model.patch_embedding(patchify(x, 2)), tokens, atol=1e-5)


# The autoencoder; tests/test_autoencoder.py has its parity with diffusers.

SD_CONFIG = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    sample_size=256,
)


def levels(n):
    """The block types of `n` levels without attention."""
    return dict(
        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n
    )


TINY_SD = SD_CONFIG | dict(
    block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, **levels(2)
)


def state_of_diffusers(name):
    file = reference(f"autoencoder_{name}")
    return {k: file[k] for k in file.files if file[k].dtype == np.float16}


def tiny_autoencoder(**changes):
    return perturbed(
        pretrained.autoencoder.from_diffusers(TINY_SD | changes, key=jax.random.key(0))
    )


AUTOENCODERS = {
    "stable diffusion": dict(),
    "plain": dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    "attention": dict(
        down_block_types=["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    ),
    "shifted": dict(shift_factor=0.125, scaling_factor=0.25),
    "per channel": dict(latents_mean=[0.0, 1.0, 2.0, -1.0], latents_std=[1.0, 2.0, 0.5, 0.25]),
}
each_autoencoder = pytest.mark.parametrize(
    "changes", AUTOENCODERS.values(), ids=AUTOENCODERS.keys()
)


@each_autoencoder
def test_autoencoders_come_back_identical_from_both_formats(changes, tmp_path):
    ae = tiny_autoencoder(**changes)
    pretrained.save(ae, tmp_path / "a.safetensors")
    assert equal(pretrained.load(tmp_path / "a.safetensors"), ae)
    pretrained.export(ae, tmp_path / "out")
    if "latents_std" not in changes:
        assert equal(pretrained.load(tmp_path / "out"), ae)
    else:  # the scale is written as 1 / std
        again = pretrained.load(tmp_path / "out")
        np.testing.assert_allclose(again.scale, ae.scale)
        assert again.shift == ae.shift == (0.0, 1.0, 2.0, -1.0)


def test_attention_in_a_level_of_the_autoencoder_has_diffusers_names():
    ae = tiny_autoencoder(**AUTOENCODERS["attention"])
    names = tensor_shapes(ae, pretrained.autoencoder.diffusers_layout(ae))
    assert {n for n in names if "attentions" in n and n.endswith("group_norm.bias")} == {
        f"{half}.attentions.{i}.group_norm.bias"
        for half, n in [
            ("encoder.down_blocks.0", 1), ("encoder.mid_block", 1),
            ("decoder.up_blocks.1", 2), ("decoder.mid_block", 1),
        ]
        for i in range(n)
    }  # fmt: skip


def test_an_autoencoder_of_our_own_sizes(tmp_path):
    ae = small_autoencoder(patch_size=2, attention=True).with_latent_stats((0.1, 0.2), (3.0, 4.0))
    pretrained.save(ae, tmp_path / "a.safetensors")
    assert equal(pretrained.load(tmp_path / "a.safetensors"), ae)
    with pytest.raises(
        pretrained.WeightsError, match="patch_size is 2, not 1; its decoder has 1 blocks"
    ):
        pretrained.export(ae, tmp_path / "out")


@pytest.mark.parametrize("name, channels, blocks, groups, quant", [
    ("attention", (4, 8, 8), 1, 2, True), ("plain", (4, 8), 2, 2, False),
])  # fmt: skip
def test_autoencoder_weights_of_diffusers(name, channels, blocks, groups, quant, tmp_path):
    """Also under the names of 2022; and what is exported has the same names and values."""
    state = state_of_diffusers(name)
    config = TINY_SD | dict(
        in_channels=3 if quant else 1, out_channels=3 if quant else 1,
        latent_channels=4 if quant else 2, block_out_channels=channels, layers_per_block=blocks,
        norm_num_groups=groups, use_quant_conv=quant, use_post_quant_conv=quant,
        mid_block_add_attention=quant, **levels(len(channels)),
    )  # fmt: skip
    ae = pretrained.load(write_folder(tmp_path / "new", config=config, tensors=state))
    file = reference(f"autoencoder_{name}")
    posterior = eqx.filter_jit(lambda ae, x: ae.posterior(x))(ae, jnp.asarray(file["x"]))
    assert relative_error(posterior.mean, np.split(file["moments"], 2)[0]) < 2e-5
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, name_then in old.items():
            key = key.replace(new, name_then)
        renamed[key] = value
    assert (renamed.keys() != state.keys()) == quant
    assert equal(
        pretrained.load(write_folder(tmp_path / "old", config=config, tensors=renamed)), ae
    )
    pretrained.export(ae, tmp_path / "out")
    tensors, _ = open_safetensors(tmp_path / "out" / FILE)
    assert tensors.keys() == state.keys()
    assert all(np.array_equal(tensors[n].read(), state[n]) for n in state)
    if quant:  # both names of one tensor: one of them is too many
        both = state | {k: v for k, v in renamed.items() if "query.weight" in k}
        with pytest.raises(pretrained.WeightsError, match=r"unexpected: encoder.*query\.weight"):
            pretrained.load_state(ae, both)


def test_every_name_of_the_full_stable_diffusion_autoencoder():
    make = lambda key: pretrained.autoencoder.from_diffusers(SD_CONFIG, key=key)
    ae = eqx.filter_eval_shape(make, jax.random.key(0))
    assert jax.tree.structure(ae) == jax.tree.structure(
        eqx.filter_eval_shape(kl_f8, key=jax.random.key(0))
    )
    shapes = tensor_shapes(ae, pretrained.autoencoder.diffusers_layout(ae))
    assert len(shapes) == 248
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.conv_out.weight"] == (8, 512, 3, 3)
    assert shapes["post_quant_conv.weight"] == (4, 4, 1, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "relu"}, r"act_fn = 'relu' \('silu'\)"),
        ({"use_quant_conv": False}, r"use_post_quant_conv = True \(False\)"),
        (levels(1), r"down_block_types = \['DownEncoderBlock2D'\] \(2 of"),
        ({"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]}, "down_block_types = "),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            r"up_block_types = .* \(the mirror of down_block_types\)",
        ),
    ],
)
def test_autoencoder_options_that_the_network_does_not_have(change, message, tmp_path):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(write_folder(tmp_path / "ae", config=TINY_SD | change))


# What is not a parameter.


def test_a_position_table_is_compared_and_not_loaded(tmp_path):
    table = sincos_positions((4, 4), 24).astype(np.float32)[None]
    with_table = changed(WEIGHTS_OF_DIFFUSERS, **{"pos_embed.pos_embed": table})
    dit = pretrained.load(write_folder(tmp_path / "dit", tensors=with_table))
    assert equal(dit, pretrained.load(write_folder(tmp_path / "without")))
    wrong = changed(WEIGHTS_OF_DIFFUSERS, **{"pos_embed.pos_embed": table + 1e-3})
    with pytest.raises(pretrained.WeightsError, match=r"not the constant .* pos_embed.pos_embed"):
        pretrained.load(write_folder(tmp_path / "wrong", tensors=wrong))
    model = tiny()
    state = pretrained.to_state(model, pretrained.official_layout)
    assert equal(pretrained.load_state(model, changed(state, pos_embed=None)), model)
    with pytest.raises(pretrained.WeightsError, match=r"not the constant of .*: pos_embed"):
        pretrained.load_state(model, changed(state, pos_embed=state["pos_embed"][:, :-1]))


def test_copies_that_differ_are_all_listed(tmp_path):
    name = "transformer_blocks.1.norm1.emb.{}"
    one, two = (
        name.format("timestep_embedder.linear_1.bias"),
        name.format("class_embedder.embedding_table.weight"),
    )
    tensors = {n: t + 1 if n in (one, two) else t for n, t in WEIGHTS_OF_DIFFUSERS.items()}
    with pytest.raises(pretrained.WeightsError) as error:
        pretrained.load(write_folder(tmp_path / "dit", tensors=tensors))
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(f"must be equal: {n}" in str(error.value) for n in (one, two))


# What goes wrong.


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path, monkeypatch):
    broken = changed(
        WEIGHTS_OF_DIFFUSERS,
        **{
            "proj_out_1.bias": None,
            "transformer_blocks.1.ff.net.2.weight": None,
            "extra.weight": np.ones(3, np.float32),
            "proj_out_2.bias": np.ones(7, np.float32),
            "pos_embed.proj.bias": np.ones(24, np.int32),
        },
    )
    folder = write_folder(tmp_path / "dit", tensors=broken)
    # It is found out from the header, before anything is put on a device.
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("allocated"))
    with pytest.raises(pretrained.WeightsError) as error:
        pretrained.load(folder)
    assert str(error.value).splitlines() == [
        f"{folder} does not fit DiT:",
        "  missing: transformer_blocks.1.ff.net.2.weight (24, 96)",
        "  missing: proj_out_1.bias (48,)",
        "  unexpected: extra.weight (3,)",
        "  wrong dtype: pos_embed.proj.bias is not floating point",
        "  wrong shape: proj_out_2.bias is (7,), the model needs (24,)",
    ]


def test_a_folder_without_config_and_unknown_architectures(tmp_path):
    folder = write_folder(tmp_path / "dit")
    with pytest.raises(pretrained.WeightsError, match=r"has no config.json.* its folders: dit"):
        pretrained.load(tmp_path)
    (folder / "config.json").write_text('{"_class_name": "HunyuanDiT2DModel"}')
    with pytest.raises(pretrained.WeightsError, match="unknown architecture 'HunyuanDiT2DModel'"):
        pretrained.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(pretrained.WeightsError, match=r"config\.json is not JSON"):
        pretrained.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(pretrained.WeightsError, match="must hold a JSON object"):
        pretrained.load(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / FILE).unlink()
    with pytest.raises(pretrained.WeightsError, match="holds no weights; looked for diffusion_py"):
        pretrained.load(folder)


def test_sizes_that_do_not_go_together(tmp_path):
    with pytest.raises(pretrained.WeightsError, match=r"no model can .* 9 x 9 does not divide"):
        pretrained.load(write_folder(tmp_path / "dit", config=CONFIG | {"sample_size": 9}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_fn": "geglu"}, r"activation_fn = 'geglu' \('gelu-approximate'\)"),
        ({"out_channels": 4}, r"out_channels = 4 \(3 or 6\)"),
        ({"norm_eps": 1e-3}, r"norm_eps = 0\.001 \(1e-05 or 1e-06\)"),
        ({"norm_type": "layer_norm", "attention_bias": False}, "attention_bias.*norm_type"),
    ],
)
def test_options_that_the_network_does_not_have(change, message, tmp_path):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(write_folder(tmp_path / "dit", config=CONFIG | change))


def test_the_old_class_name_of_diffusers(tmp_path):
    old = write_folder(tmp_path / "old", config=CONFIG | {"_class_name": "Transformer2DModel"})
    assert equal(pretrained.load(old), pretrained.load(write_folder(tmp_path / "new")))


def damage_truncated(data):
    return data[:-100]


def damage_header(data):
    return data[:20] + b"\xff" * 8 + data[28:]


def damage_other(data):
    return b"not a safetensors file, but long enough to have a header in it"


def damage_empty(data):
    return b""


def damage_pointer(data):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_header, damage_other, damage_empty, damage_pointer]
)
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    pretrained.save(tiny(), path)
    path.write_bytes(damage(path.read_bytes()))
    message = r"a\.safetensors is truncated or not a safetensors file"
    for call in (pretrained.load, lambda path: pretrained.load_into(tiny(), path)):
        with pytest.raises(pretrained.WeightsError, match=message) as error:
            call(path)
    assert ("Git LFS" in str(error.value)) == (damage is damage_pointer)


def test_paths_that_are_not_there(tmp_path):
    for name in ("none", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            pretrained.load(tmp_path / name)
    for name in ("none.safetensors", "none.pt", "none"):
        with pytest.raises(FileNotFoundError, match=name):
            pretrained.load_into(tiny(), tmp_path / name)


def test_a_pt_file_without_torch_and_without_a_model(tmp_path, monkeypatch):
    path = tmp_path / "DiT.pt"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        pretrained.WeightsError, match=r"torch is not installed. Run `pip install tor"
    ):
        pretrained.load_into(tiny(), path)
    with pytest.raises(pretrained.WeightsError, match="does not say what the model is"):
        pretrained.load(path)


class Code:
    def __reduce__(self):
        return pytest.fail, ("the file's code was run",)


def test_pt_files_are_read_and_their_code_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    model, path = tiny(), tmp_path / "DiT.pt"
    state = pretrained.to_state(model, pretrained.official_layout)
    state = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    options = argparse.Namespace(lr=1e-4)
    other = {name: tensor + 1 for name, tensor in state.items()}
    for content in (state, {"ema": state, "model": other, "opt": {}, "args": options}):
        torch.save(content, path)
        assert equal(pretrained.load_into(model, path), model)
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, path)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert equal(pretrained.load_into(model, path, dtype=None), half)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(pretrained.WeightsError, match="is truncated, or holds something else"):
        pretrained.load_into(model, path)
    torch.save({**state, "more": Code()}, path)
    with pytest.raises(pretrained.WeightsError, match="none of it was run"):
        pretrained.load_into(model, path)
    torch.save([1, 2], path)
    with pytest.raises(pretrained.WeightsError, match="holds no state dict"):
        pretrained.load_into(model, path)


def test_a_file_without_our_header(tmp_path):
    model, path = tiny(), tmp_path / "a.safetensors"
    write_safetensors(
        path, pretrained.to_state(model, pretrained.official_layout), {"format": "pt"}
    )
    with pytest.raises(pretrained.WeightsError, match="no configuration of ours in its header"):
        pretrained.load(path)
    assert equal(pretrained.load_into(eqx.filter_eval_shape(lambda: model), path), model)
    write_safetensors(path, pretrained.to_state(model), {"eqxldm": '{"class": "Net"}'})
    with pytest.raises(pretrained.WeightsError, match="unknown configuration 'Net'"):
        pretrained.load(path)
    for config in ("", ', "depth": 2', ', "width": []'):
        write_safetensors(path, {}, {"eqxldm": f'{{"class": "DiTConfig"{config}}}'})
        with pytest.raises(pretrained.WeightsError, match="no DiTConfig can be made"):
            pretrained.load(path)
    write_safetensors(path, {}, {"eqxldm": "{"})
    with pytest.raises(pretrained.WeightsError, match="configuration in its header is damaged"):
        pretrained.load(path)


def test_what_cannot_be_written_is_refused(tmp_path, key):
    path = tmp_path / "a.safetensors"
    with pytest.raises(pretrained.WeightsError, match=r"remat = .* cannot be written down"):
        pretrained.save(tiny(remat=lambda *_, **__: True), path)
    with pytest.raises(pretrained.WeightsError, match=r"embed_cond = .* cannot be written down"):
        pretrained.save(tiny(num_classes=None, embed_cond=Linear(2, 16, key=key)), path)
    wider = eqx.tree_at(lambda dit: dit.time_embedding.linear1.bias, tiny(), jnp.ones(17))
    with pytest.raises(pretrained.WeightsError, match="does not describe this one"):
        pretrained.save(wider, path)
    with pytest.raises(pretrained.WeightsError, match="unknown model Linear"):
        pretrained.save(Linear(1, 2, key=key), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "its timestep frequencies are the official ones"),
        ({"num_classes": None}, "it has no labels"),
        ({"qk_norm": RMSNorm}, "it has a QK-norm"),
        ({"mlp_ratio": 2.0}, "its mlp_ratio is 2.0, not 4"),
    ],
)
def test_what_diffusers_cannot_hold_is_not_exported(changes, message, tmp_path):
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.export(tiny(**changes), tmp_path / "out")
    oblong = DiT(
        (3, 4, 8),
        patch_size=2,
        depth=1,
        width=16,
        num_heads=2,
        num_classes=3,
        key=jax.random.key(0),
    )
    with pytest.raises(pretrained.WeightsError, match="not square; its timestep"):
        pretrained.export(oblong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_table_is_refused():
    model = tiny()
    table = own_layout(model)
    path, parts = next(iter(table.leaves.items()))
    part = parts[0]
    wrong = {
        "not in both": {},
        "uses .* twice": {path: (part, part)},
        "do not add up": {path: (part._replace(where=(0,)),)},
    }
    for message, entry in wrong.items():
        rest = {p: parts for p, parts in table.leaves.items() if p != path}
        with pytest.raises(pretrained.WeightsError, match=message):
            tensor_shapes(model, pretrained.Layout(rest | entry, {}))


# What would take minutes, or all memory, or is no number.

NUMBERS = {
    "layers": ({"num_layers": 10**7}, "config.json: num_layers = 10000000 is too much"),
    "widths": ({"attention_head_dim": 2**40}, "attention_head_dim = 1099511627776 is too much"),
    "many": ({"attention_head_dim": 2**18}, r"of a model with \d+ numbers, the file has \d+"),
    "classes": ({"num_embeds_ada_norm": 10**7}, "num_embeds_ada_norm = 10000000 is too much"),
    "infinite": ({"norm_eps": float("inf")}, "norm_eps = inf is too much"),
    "text": ({"num_layers": "two"}, "no model can be made of its configuration"),
    "truth": ({"in_channels": True}, "out_channels = 6"),
    "fraction": ({"patch_size": 0.5}, "no model can be made of its configuration"),
    "none": ({"patch_size": 0}, "no model can be made of its configuration"),
    "negative": ({"num_layers": -3}, "no model can be made of its configuration"),
    "list": ({"sample_size": [8]}, "no model can be made of its configuration"),
    "class": ({"_class_name": ["DiT"]}, r"unknown architecture \['DiT'\]"),
}


@pytest.mark.parametrize("change, message", NUMBERS.values(), ids=NUMBERS)
def test_absurd_configurations_are_refused_quickly(change, message, tmp_path):
    folder = write_folder(tmp_path / "dit", config=CONFIG | change)
    begin = time.monotonic()
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(folder)
    assert time.monotonic() - begin < 5


LEVELS = dict(
    block_out_channels=[8] * 60,
    down_block_types=["DownEncoderBlock2D"] * 60,
    up_block_types=["UpDecoderBlock2D"] * 60,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers_per_block": 10**7}, "layers_per_block = 10000000 is too much"),
        (LEVELS | {"layers_per_block": 60}, "layers_per_block = 60 is too much"),
        ({"block_out_channels": [8] * 10**4}, "block_out_channels has 10000 entries"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, r"latents_std .* 4 positive numbers"),
        ({"latents_std": [1.0]}, r"latents_std = \[1.0\]: needed are 4"),
        ({"latents_mean": ["0"] * 4}, "needed are 4 numbers"),
        ({"latents_mean": 7}, "no model can be made"),
        ({"scaling_factor": None}, "no model can be made"),
        ({"block_out_channels": [[8], [8]]}, "no model can be made"),
    ],
)
def test_absurd_autoencoders_are_refused_by_name(change, message, tmp_path):
    config = TINY_SD | change
    with pytest.raises(pretrained.WeightsError, match=message):
        pretrained.load(write_folder(tmp_path / "ae", config=config, tensors={}))


def test_nested_json_and_fields_of_the_wrong_type(tmp_path):
    folder = write_folder(tmp_path / "dit")
    config = folder / "config.json"
    for text in ("[" * 10**5, '{"a":' * 10**5, "\udcff", '{"_class_name": 1' + "0" * 5000 + "}"):
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(pretrained.WeightsError, match=r"config\.json is not JSON"):
            pretrained.load(folder)
    deep = json.dumps(CONFIG)[:-1] + ', "a": ' + "[" * 100 + "]" * 100 + "}"
    config.write_text(deep)
    with pytest.raises(pretrained.WeightsError, match="nested deeper than"):
        pretrained.load(folder)
    path = tmp_path / "a.safetensors"
    for header in ('{"class": ["DiTConfig"]}', '{"class": {}}', "5", "[" * 10**5, '{"class": 1e9}'):
        write_safetensors(path, {}, {"eqxldm": header})
        with pytest.raises(pretrained.WeightsError):
            pretrained.load(path)
    (folder / FILE).unlink()
    config.write_text(json.dumps(CONFIG))
    for index in ('{"weight_map": {"w": 5}}', '{"weight_map": {"w": ["x"], "v": "y"}}'):
        (folder / f"{FILE}.index.json").write_text(index)
        with pytest.raises(pretrained.WeightsError, match="names files outside its folder"):
            pretrained.load(folder)
    for name in ("", "..", "a\0b", "x" * 5000):
        index = json.dumps({"weight_map": {"w": name}})
        (folder / f"{FILE}.index.json").write_text(index)
        with pytest.raises(pretrained.WeightsError, match="names files"):
            pretrained.load(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_floats_of_few_bits_are_refused_by_name(dtype, tmp_path):
    header = json.dumps({"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    if dtype == "F4":
        header = header.replace(b"[0, 8]", b"[0, 4]")
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 if dtype == "F4" else 8))
    with pytest.raises(pretrained.WeightsError, match=rf"w \({dtype}\)"):
        pretrained.load_into(tiny(), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, None])
def test_weights_that_are_no_numbers_are_refused(value, dtype):
    model = tiny(depth=1)
    state = pretrained.to_state(model)
    name = "blocks.stacked.fc1.bias"
    state[name] = state[name].astype(np.float64)
    state[name].flat[-1] = value
    message = "beyond the range of float" if np.isfinite(value) else "not finite"
    with pytest.raises(pretrained.WeightsError, match=rf"{message}.*: {name}"):
        pretrained.load_state(model, state, dtype=dtype)


def test_a_table_of_positions_of_an_absurd_size_is_not_computed(tmp_path):
    tensors = WEIGHTS_OF_DIFFUSERS | {"pos_embed.pos_embed": np.zeros((1, 16, 24), np.float32)}
    folder = write_folder(tmp_path, config=CONFIG | {"sample_size": 2**16}, tensors=tensors)
    with pytest.raises(pretrained.WeightsError, match="no file has a table of positions"):
        pretrained.load(folder)


def test_a_fixed_table_of_integers_is_refused():
    state = pretrained.to_state(tiny(), pretrained.official_layout)
    state["pos_embed"] = state["pos_embed"].astype(np.int32)
    with pytest.raises(pretrained.WeightsError, match=r"not the constant of .*: pos_embed"):
        pretrained.load_state(tiny(), state)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt"])
def test_what_load_could_not_read_is_not_written(name, tmp_path):
    with pytest.raises(pretrained.WeightsError, match=r"name it x\.safetensors"):
        pretrained.save(tiny(), tmp_path / name)
    assert not list(tmp_path.iterdir())
