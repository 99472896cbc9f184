"""Weights in and out: parity with diffusers, round trips and names."""

import itertools
import json
import shutil
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.models import DiT, dit_xl_2
from eqxldm.nn import RMSNorm, patchify, sincos_positions
from eqxldm.pretrained.files import WEIGHTS, open_safetensors, write_safetensors
from eqxldm.pretrained.layout import array_leaves, tensor_shapes

from helpers import perturbed, relative_error
from pretrained_files import (
    CONFIG,
    FILE,
    VALUES,
    WEIGHTS_OF_DIFFUSERS,
    changed,
    equal,
    tiny,
    write_folder,
)

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
