"""DiT's sizes: parameters and multiply-adds as published."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from eqxldm import models, nn
from eqxldm.models import DiT, multiply_adds, parameter_count
from eqxldm.nn import RMSNorm

from helpers import filled, named_leaves, small_dit

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# Table 4 of the paper: multiply-adds in G and trainable parameters in M.
PUBLISHED = {
    "s_8": (0.36, 33), "s_4": (1.41, 33), "s_2": (6.06, 33),
    "b_8": (1.42, 131), "b_4": (5.57, 130), "b_2": (23.01, 130),  # b_4: 5.56 in the paper
    "l_8": (5.01, 459), "l_4": (19.70, 458), "l_2": (80.71, 458),
    "xl_8": (7.39, 676), "xl_4": (29.05, 675), "xl_2": (118.64, 675),
}  # fmt: skip
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def described(name, shape=(4, 32, 32), **options):
    """A published size as shapes only."""
    make = getattr(models, f"dit_{name}")
    return eqx.filter_eval_shape(make, shape, **options, key=jax.random.key(0))


def linear(size_in, size_out):
    return size_in * size_out + size_out


def parameters_of_the_paper(depth, d, patch_size, classes=1000, channels=4, outputs=8):
    block = linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    block += linear(d, 6 * d)
    time, labels = linear(256, d) + linear(d, d), (classes + 1) * d
    ends = (
        linear(channels * patch_size**2, d) + linear(d, outputs * patch_size**2) + linear(d, 2 * d)
    )
    return depth * block + time + labels + ends


# Sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_counts(name):
    (depth, width, num_heads), patch_size = SIZES[name[:-2]], int(name[-1])
    dit = described(name)
    gflops, millions = PUBLISHED[name]
    assert dit.patch_size == patch_size and dit.blocks.stacked.attention.qkv.num_heads == num_heads
    assert parameter_count(dit) == parameters_of_the_paper(depth, width, patch_size)
    assert round(parameter_count(dit) / 1e6) == millions
    assert round(multiply_adds(dit) / 1e9, 2) == gflops
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays_of(dit))


def arrays_of(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if not callable(leaf)]


def test_xl_2_counts_to_the_last_unit():
    dit = described("xl_2")
    assert parameter_count(dit) == 674_834_720
    assert parameter_count(dit) + 256 * 1152 == 675_129_632
    assert multiply_adds(dit) == 118_637_936_640
    assert round(multiply_adds(described("xl_2", (4, 64, 64))) / 1e9, 2) == 524.60


def test_sizes_take_the_options_of_dit():
    base = parameter_count(described("s_2"))
    width = 384
    fewer = described("s_2", num_classes=10, learn_sigma=False)
    assert base - parameter_count(fewer) == 990 * width + linear(width, 16)
    none = described("s_2", num_classes=None)
    assert base - parameter_count(none) == 1001 * width
    cond = nn.Linear(5, width, key=jax.random.key(0))
    vector = described("s_2", num_classes=None, embed_cond=cond)
    assert parameter_count(vector) - parameter_count(none) == linear(5, width)
    normed = described("s_2", qk_norm=RMSNorm, remat=None, unroll=2)
    assert parameter_count(normed) - base == 12 * 2 * 64 and normed.blocks.unroll == 2
    tall = described("s_2", (16, 64, 16))
    assert tall.patch_embedding.weight.shape == (width, 64)


def test_parameter_count_takes_arrays_or_shapes_and_only_trainable_ones():
    dit, shapes = filled(small_dit), eqx.filter_eval_shape(small_dit)
    assert parameter_count(dit) == parameter_count(shapes)
    assert parameter_count(dit) == sum(leaf.size for leaf in named_leaves(dit).values())
    assert parameter_count({"a": jnp.ones(3), "b": jnp.arange(5), "c": None, "d": 1.0}) == 3


def test_counts_do_not_depend_on_how_the_blocks_run():
    changes = [{}, {"unroll": 3}, {"remat": None}, {"qk_norm": RMSNorm}, {"num_classes": None}]
    shapes = [eqx.filter_eval_shape(lambda c=c: small_dit(**c)) for c in changes]
    assert len(set(map(multiply_adds, shapes))) == 1


@pytest.mark.parametrize("shape, patch_size", [((4, 16, 16), 2), ((3, 8, 24), 2), ((8, 8, 8), 1)])
def test_multiply_adds_are_half_of_the_flops_that_xla_counts(shape, patch_size):
    # XLA counts the body of a loop once, so the blocks are unrolled.
    make = lambda: DiT(
        shape, patch_size=patch_size, depth=2, width=256, num_heads=4, num_classes=5,
        learn_sigma=True, unroll=2, remat=None, key=jax.random.key(0),
    )  # fmt: skip
    dit = eqx.filter_eval_shape(make)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    args = (dit, x, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    cost = jax.jit(lambda dit, *args: dit(*args)).lower(*args).compile().cost_analysis()
    # GELU, softmax, norms and gates, which we leave out: about 60 operations for each number of a
    # token and block, next to 24 d = 6144.
    assert multiply_adds(dit) < cost["flops"] / 2 < 1.03 * multiply_adds(dit)


# Numbers
