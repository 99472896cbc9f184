"""Blocks' outputs kept over steps: FORA's schedule, against a loop written out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqxldm as ex
from eqxldm import nn
from eqxldm.models import CrossAttentionDiTBlock, DiT
from eqxldm.quantization import quantize

from helpers import filled, relative_error

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
X = jax.random.normal(jax.random.key(2), (2, 4, 4))


def random_dit(**options):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2)
    return filled(lambda: DiT((2, 4, 4), **sizes, **options, key=jax.random.key(0)))


DIT = random_dit(num_classes=3)


@eqx.filter_jit
def cached(network, x, steps, every, **options):
    times = ex.uniform_times(steps)
    return ex.sample_cached(
        network, FLOW, ex.Euler(), times, x, jnp.array(1), every=every, **options
    )


def test_every_call_is_the_sampler_itself_guided_or_not():
    times = ex.uniform_times(4)
    plain = eqx.filter_jit(lambda d: ex.sample(d, FLOW, ex.Euler(), times, X, jnp.array(1)))
    assert relative_error(cached(DIT, X, 4, 1), plain(DIT)) < 1e-5
    found = cached(DIT, X, 4, 1, null=DIT.null, scale=2.0)
    assert relative_error(found, plain(ex.guide(DIT, DIT.null, 2.0))) < 1e-5


def test_calls_between_take_what_the_blocks_gave_before():
    """Euler's steps by hand: 5 calls, of which 1, 3 and 5 run the blocks."""
    t, x, label, kept = ex.uniform_times(5), X, jnp.array(1), None
    keep, reuse = eqx.filter_jit(DIT.keep), eqx.filter_jit(DIT.reuse)
    for i in range(5):
        time = jnp.asarray(t[i], jnp.float32)
        if i % 2 == 0:
            out, kept = keep(x, time, label)
        else:
            out = reuse(x, time, label, kept)
            assert relative_error(out, keep(x, time, label)[0]) > 1e-4
        x = x - jnp.float32(t[i] - t[i + 1]) * out
    batch = eqx.filter_vmap(lambda x: cached(DIT, x, 5, 2))(jnp.stack([X, -X]))
    assert relative_error(batch[0], x) < 1e-5


def test_what_was_kept_gives_the_call_itself_back():
    """Tokens of a condition, joined or attended to, and weights in 8 bits."""
    cond = nn.Conditioning(jnp.ones(16), jnp.ones((3, 16)))
    for options in ({}, dict(block=CrossAttentionDiTBlock)):
        network = quantize(random_dit(embed_cond=lambda c: c, **options))
        whole = eqx.filter_jit(network)(X, jnp.array(0.5), cond)
        out, kept = eqx.filter_jit(network.keep)(X, jnp.array(0.5), cond)
        again = eqx.filter_jit(network.reuse)(X, jnp.array(0.5), cond, kept)
        assert max(relative_error(a, whole) for a in (out, again)) < 1e-5


def test_the_blocks_are_not_computed_between():
    def multiplied(f, *a):
        return (jax.jit(f).lower(*a).cost_analysis() or {})["flops"]

    kept = eqx.filter_eval_shape(DIT.keep, X, jnp.array(0.5), jnp.array(1))[1]
    whole = multiplied(lambda x: DIT(x, jnp.array(0.5), jnp.array(1)), X)
    light = multiplied(lambda x, k: DIT.reuse(x, jnp.array(0.5), jnp.array(1), k), X, kept)
    assert light < 0.7 * whole


def test_refused():
    with pytest.raises(ValueError, match="every must be at least 1"):
        ex.sample_cached(DIT, FLOW, ex.Euler(), ex.uniform_times(2), X, jnp.array(1), every=0)
