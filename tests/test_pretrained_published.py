"""The full published networks against the lists of their tensors, in shapes only.

`tests/reference/make_names.py` writes the lists. Nothing here takes memory: every network is made
under `eqx.filter_eval_shape`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import pytest

from eqxldm import models, pretrained
from eqxldm.pretrained.layout import tensor_shapes


class Published(NamedTuple):
    """A network, how its tensors are named, its list, and its number of parameters."""

    make: Callable
    layout: Callable
    names: str
    count: int


PUBLISHED = {
    "dit_xl_2": Published(
        lambda key: models.dit_xl_2((4, 32, 32), key=key),
        pretrained.diffusers_layout,
        "dit_xl_2",
        674_834_720,
    ),
    "sd_vae": Published(
        lambda key: models.kl_f8(key=key),
        pretrained.autoencoder.diffusers_layout,
        "sd_vae",
        83_653_863,
    ),
    "sd_unet": Published(
        lambda key: models.unet_sd1(key=key),
        pretrained.unet.diffusers_layout,
        "sd_unet",
        859_520_964,
    ),
    "clip_l": Published(
        lambda key: models.clip_text_l(key=key),
        pretrained.clip_text.transformers_layout,
        "clip_l",
        123_060_480,
    ),
    "clip_h": Published(
        lambda key: models.clip_text_h(key=key),
        pretrained.clip_text.transformers_layout,
        "clip_h",
        340_387_840,
    ),
    "t5_xxl": Published(
        lambda key: models.t5_xxl(key=key),
        pretrained.t5.transformers_layout,
        "t5_xxl",
        4_762_310_656,
    ),
    "umt5_xxl": Published(
        lambda key: models.umt5_xxl(key=key),
        pretrained.t5.transformers_layout,
        "umt5_xxl",
        5_680_910_336,
    ),
    "minilm_l6": Published(
        lambda key: models.minilm_l6(key=key),
        pretrained.bert.transformers_layout,
        "minilm_l6",
        22_713_216,
    ),
    "clip_bigg": Published(
        lambda key: models.clip_text_bigg(key=key),
        pretrained.clip_text.transformers_layout,
        "clip_bigg",
        694_659_840,
    ),
}
each_network = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


def listed(name):
    """`{tensor: shape}` of a list: a line `name size size ...` each."""
    lines = (Path(__file__).parent / "reference" / f"names_{name}.txt").read_text().splitlines()
    split = [line.split(" ") for line in lines]
    return {name: tuple(map(int, sizes)) for name, *sizes in split}


def shapes_of(published):
    return eqx.filter_eval_shape(published.make, jax.random.key(0))


@each_network
def test_every_name_shape_and_the_count(published):
    model = shapes_of(published)
    assert tensor_shapes(model, published.layout(model)) == listed(published.names)
    assert models.parameter_count(model) == published.count


@each_network
def test_no_memory_is_used(published):
    before = {id(array) for array in jax.live_arrays()}
    model = shapes_of(published)
    shapes = tensor_shapes(model, published.layout(model))
    arrays = [leaf for leaf in jax.tree.leaves(model) if not isinstance(leaf, jax.ShapeDtypeStruct)]
    assert not [leaf for leaf in arrays if eqx.is_array_like(leaf)]
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in made) < 1000 < sum(map(math.prod, shapes.values()))


def test_the_official_names_of_dit_xl_2():
    """What `DiT-XL-2-256x256.pt` holds: 292 tensors with the fixed table of positions."""
    width, mlp = 1152, 4608
    layers = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (2 * 2 * 8, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(28):
        block = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (mlp, width),
            "mlp.fc2": (width, mlp),
            "adaLN_modulation.1": (6 * width, width),
        }
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    expected["y_embedder.embedding_table.weight"] = (1001, width)
    model = shapes_of(PUBLISHED["dit_xl_2"])
    layout = pretrained.official_layout(model)
    assert tensor_shapes(model, layout) == expected
    fixed = {name: value().shape for name, value in layout.fixed.items()}
    assert fixed == {"pos_embed": (1, 256, width)}
    assert len(expected | fixed) == 292


@pytest.mark.parametrize(
    "make, count",
    [
        (models.t5_small, 35_332_800),
        (models.t5_base, 109_628_544),
        (models.t5_large, 341_231_104),
        (models.t5_xl, 1_223_527_424),
    ],
)
def test_the_smaller_t5_have_the_published_counts(make, count):
    model = eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))
    assert models.parameter_count(model) == count
