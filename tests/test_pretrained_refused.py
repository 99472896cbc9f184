"""What goes wrong with files of weights, and how it is said."""

import argparse
import json
import re
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.models import DiT
from eqxldm.nn import Linear, RMSNorm
from eqxldm.pretrained.files import check_seal, open_safetensors, write_safetensors
from eqxldm.pretrained.layout import own_layout, tensor_shapes

from pretrained_files import (
    CONFIG,
    FILE,
    TINY_SD,
    WEIGHTS_OF_DIFFUSERS,
    changed,
    equal,
    tiny,
    write_folder,
)

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


def test_a_file_of_ours_has_the_same_bytes_each_time(tmp_path):
    """The library orders the strings of a header by chance."""
    path, contents = tmp_path / "a.safetensors", set()
    for _ in range(12):
        write_safetensors(
            path, {"w": np.ones(2), "v": np.ones(3)}, {"b": "1", "a": "é"}, sealed=True
        )
        contents.add(path.read_bytes())
    assert len(contents) == 1
    tensors, header = open_safetensors(path)
    check_seal(path, header)
    assert tensors["v"].read().tolist() == [1] * 3


def test_a_file_of_ours_that_is_not_what_was_written_is_refused(tmp_path):
    """A flipped bit of any tensor, a digit of the configuration; files without a checksum pass."""
    path = tmp_path / "a.safetensors"
    pretrained.save(tiny(), path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    places = np.linspace(start, len(content) - 1, 7).astype(int).tolist()
    found = re.search(rb"num_classes\D+(\d)", content)
    assert found
    for place in [*places, found.start(1)]:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        for call in (pretrained.load, lambda path: pretrained.load_into(tiny(), path)):
            with pytest.raises(pretrained.WeightsError, match="damaged: not what was written"):
                call(path)
    write_safetensors(path, pretrained.to_state(tiny()), {})
    assert equal(pretrained.load_into(tiny(), path), tiny())


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
