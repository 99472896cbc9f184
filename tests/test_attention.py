"""Masks and biases of attention, rotary positions, norms of queries and keys, and stacks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn
from eqxldm.nn import attention

from helpers import filled, relative_error, tree_error

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def naive(q, k, v, mask=None, bias=None):
    """In float64, one query at a time; a query without a key gives zeros."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    n, heads, d = q.shape
    shape = (heads, n, len(k))
    allowed = np.broadcast_to(True if mask is None else np.asarray(mask), shape)
    extra = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), shape)
    out = np.zeros((n, heads, v.shape[-1]))
    for h in range(heads):
        for i in range(n):
            there = allowed[h, i] & np.isfinite(extra[h, i])
            if there.any():
                scores = k[there, h] @ q[i, h] / np.sqrt(d) + extra[h, i, there]
                weights = np.exp(scores - scores.max())
                out[i, h] = weights @ v[there, h] / weights.sum()
    return out


Q, K, V = normal(5, 2, 4), normal(7, 2, 4, seed=1), normal(7, 2, 4, seed=2)
RNG = np.random.default_rng(0)
MASKS = {shape: jnp.asarray(RNG.random(shape) < 0.5) for shape in [(7,), (5, 7), (2, 5, 7)]}
MASKS[5, 7] = MASKS[5, 7].at[2].set(False)  # one query has no key
MASKS["none"] = jnp.zeros(7, bool)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_leaves_keys_out_and_an_empty_row_gives_zeros(name):
    mask = MASKS[name]
    out = nn.attend(Q, K, V, mask)
    np.testing.assert_allclose(out, naive(Q, K, V, mask), atol=1e-6)
    loss = lambda *a: jnp.sum(jnp.cos(nn.attend(*a, mask)))
    for gradient in jax.grad(loss, (0, 1, 2))(Q, K, V):
        assert jnp.all(jnp.isfinite(gradient))
    tangents = jax.jvp(lambda *a: nn.attend(*a, mask), (Q, K, V), (Q, K, V))[1]
    assert jnp.all(jnp.isfinite(tangents))


def test_masked_keys_have_no_gradient_and_change_nothing():
    mask = jnp.arange(7) < 4
    loss = lambda k, v: jnp.sum(jnp.cos(nn.attend(Q, k, v, mask)))
    for gradient in jax.grad(loss, (0, 1))(K, V):
        assert not jnp.any(gradient[4:]) and jnp.all(jnp.any(gradient[:4] != 0, (1, 2)))
    other = lambda a: a.at[4:].set(100.0)
    np.testing.assert_array_equal(nn.attend(Q, other(K), other(V), mask), nn.attend(Q, K, V, mask))
    np.testing.assert_allclose(nn.attend(Q, K, V, mask), nn.attend(Q, K[:4], V[:4]), atol=1e-6)


def test_many_scores_are_made_in_parts_on_cpus(monkeypatch):
    """The same numbers and gradients, under masks and biases of every shape."""
    q, rows = normal(6, 2, 4), normal(2, 6, 7, seed=3) > 0
    masks, biases = (None, rows[0, 0], rows[0], rows), (None, normal(6, 7, seed=4))

    def all_of(q):
        attend = attention._attend_on_cpu
        outs = [attend(q, K, V, a, b) for a in masks for b in biases]
        return jnp.stack(outs), jax.grad(lambda q: jnp.sum(attend(q, K, V, rows, None) ** 2))(q)

    whole = jax.jit(all_of)(q)
    monkeypatch.setattr(attention, "CPU_SCORES", 6 * 2 * 7)
    monkeypatch.setattr(attention, "CPU_BLOCK", 2)
    parts = jax.jit(lambda q: all_of(q))
    assert "while" in parts.lower(q).as_text()
    np.testing.assert_allclose(parts(q)[0], whole[0], atol=2e-6)
    np.testing.assert_allclose(parts(q)[1], whole[1], atol=2e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 1, 1)])
def test_a_bias_is_added_to_the_scores_and_minus_infinity_is_a_mask(shape):
    bias = np.asarray(RNG.normal(size=shape), np.float32)
    np.testing.assert_allclose(
        nn.attend(Q, K, V, bias=jnp.asarray(bias)), naive(Q, K, V, bias=bias), atol=1e-6
    )
    if shape == (5, 7):
        bias[1, 3] = bias[2] = -np.inf
        given = jnp.asarray(bias)
        np.testing.assert_allclose(
            nn.attend(Q, K, V, bias=given), naive(Q, K, V, bias=bias), atol=1e-6
        )
        gradient = jax.grad(lambda b: jnp.sum(jnp.cos(nn.attend(Q, K, V, bias=b))))(given)
        assert jnp.all(jnp.isfinite(gradient)) and not jnp.any(gradient[2])
        both = naive(Q, K, V, MASKS[7,], bias)
        np.testing.assert_allclose(nn.attend(Q, K, V, MASKS[7,], given), both, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 5, 7), (1, 2, 5, 7)])
def test_a_mask_or_bias_of_another_shape_is_refused(shape):
    message = r"must broadcast to \(heads, queries, keys\) = \(2, 5, 7\)"
    with pytest.raises(ValueError, match=f"attend: mask {message}"):
        nn.attend(Q, K, V, jnp.ones(shape, bool))
    with pytest.raises(ValueError, match=f"attend: bias {message}"):
        nn.attend(Q, K, V, bias=jnp.ones(shape))


def test_flash_attend_refuses_what_it_has_not():
    with pytest.raises(ValueError, match="flash_attend: takes no bias"):
        nn.flash_attend(Q, K, V, bias=jnp.zeros(7))
    with pytest.raises(ValueError, match=r"of the 7 keys alone, \(7,\), got \(5, 7\)"):
        nn.flash_attend(Q, K, V, jnp.ones((5, 7), bool))


def test_cudnn_attend_refuses_masks():
    half = [a.astype(jnp.bfloat16) for a in (Q, K, V)]
    with pytest.raises(ValueError, match="cudnn_attend: takes no mask"):
        nn.cudnn_attend(*half, MASKS[7,])
    with pytest.raises(ValueError, match="cudnn_attend: takes no bias"):
        nn.cudnn_attend(*half, bias=jnp.zeros(7))


def test_layers_hand_the_mask_on():
    mask = jnp.array([True, True, False, True, False])
    layer = nn.SelfAttention(8, 2, key=KEY)
    x = normal(5, 8)
    np.testing.assert_allclose(layer(x, mask)[mask], layer(x[mask]), atol=1e-6)
    cross = nn.CrossAttention(8, 6, num_heads=2, key=KEY)
    context = normal(5, 6, seed=3)
    np.testing.assert_allclose(cross(x, context, mask), cross(x, context[mask]), atol=1e-6)
    assert not jnp.any(cross(x, context, jnp.zeros(5, bool)))


# Rotary positions


def test_a_rotation_turns_neighbours_by_the_written_angles():
    rotation = nn.RoPE((4, 2), theta=100.0)(np.array([[3.0, 5.0]]))
    x = normal(1, 1, 8)
    z = np.asarray(x[0, 0, :6], np.float64).reshape(3, 2) @ np.array([1, 1j])
    turned = z * np.exp(1j * np.array([3 * 1.0, 3 * 0.1, 5 * 1.0]))
    expected = np.stack([turned.real, turned.imag], -1).reshape(-1)
    np.testing.assert_allclose(rotation(x)[0, 0, :6], expected, atol=1e-6)
    np.testing.assert_array_equal(rotation(x)[0, 0, 6:], x[0, 0, 6:])  # what no axis has


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_scores_depend_on_relative_positions_alone(halves, on_host):
    rope = nn.RoPE((4, 4), halves=halves)
    q, k = normal(1, 2, 8), normal(1, 2, 8, seed=1)
    at = (lambda *p: np.array([p])) if on_host else (lambda *p: jnp.array([p], jnp.float32))
    score = lambda a, b: jnp.sum(rope(at(*a))(q) * rope(at(*b))(k), -1)
    near = score((2.0, 3.0), (1.0, 5.0))
    np.testing.assert_allclose(near, score((12.0, 0.0), (11.0, 2.0)), atol=1e-5)
    assert jnp.max(jnp.abs(near - score((2.0, 3.0), (1.0, 6.0)))) > 1e-2
    assert jnp.max(jnp.abs(near - score((2.0, 3.0), (0.0, 5.0)))) > 1e-2


def test_both_layouts_are_one_function_of_permuted_features():
    positions = nn.grid_positions((2, 3))
    x = normal(6, 2, 8)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # firsts of the pairs, then seconds
    neighbours, halves = (nn.RoPE((4, 4), halves=h)(positions) for h in (False, True))
    np.testing.assert_allclose(halves(x[..., order]), neighbours(x)[..., order], atol=1e-6)


def test_a_rotation_keeps_lengths_and_the_dtype():
    rotation = nn.RoPE((8,))(np.arange(5) * 1000)
    x = normal(5, 2, 8)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotation(x), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    assert rotation(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sizes must be even and at least 2, got \(4, 3\)"):
        nn.RoPE((4, 3))
    with pytest.raises(ValueError, match="positions must have 2 axes"):
        nn.RoPE((4, 4))(np.arange(5))
    with pytest.raises(ValueError, match="it turns 8 features, but heads have 4"):
        nn.RoPE((8,))(np.arange(5))(normal(5, 2, 4))


def test_attention_rotates_after_the_norms():
    rotation = nn.RoPE((4,))(np.arange(5))
    layer = filled(lambda: nn.SelfAttention(8, 2, qk_norm=nn.RMSNorm, key=KEY))
    x = normal(5, 8)
    q, k, v = layer.qkv(x)
    q, k = rotation(layer.query_norm(q)), rotation(layer.key_norm(k))
    expected = layer.proj(nn.attend(q, k, v).reshape(5, 8))
    np.testing.assert_allclose(layer(x, rotation=rotation), expected, atol=1e-6)


def test_a_norm_over_the_full_width_sees_all_heads():
    make = lambda: nn.SelfAttention(8, 2, qk_norm=nn.RMSNorm, qk_norm_full_width=True, key=KEY)
    layer, x = filled(make), normal(5, 8)
    assert layer.query_norm.scale.shape == (8,)
    q, k, v = layer.qkv(x)
    unit = lambda a, norm: norm(a.reshape(5, 8)).reshape(5, 2, 4)
    expected = nn.attend(unit(q, layer.query_norm), unit(k, layer.key_norm), v).reshape(5, 8)
    np.testing.assert_allclose(layer(x), layer.proj(expected), atol=1e-5)


def test_cross_attention_has_norms_and_biases_if_asked_for():
    make = lambda: nn.CrossAttention(8, 6, num_heads=2, qk_norm=nn.RMSNorm, qkv_bias=True, key=KEY)
    layer, x, context = filled(make), normal(5, 8), normal(3, 6)
    scaled = eqx.tree_at(
        lambda m: (m.query.weight, m.query.bias), layer, replace_fn=lambda a: 7 * a
    )
    np.testing.assert_allclose(scaled(x, context), layer(x, context), atol=1e-5)
    assert layer.query.bias is not None and layer.query_norm.scale.shape == (4,)


# Stacks


class Pair(eqx.Module):
    """A block of two streams that sees a mask and a vector."""

    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.fc1, self.fc2 = nn.Linear(4, 4, key=k1), nn.Linear(4, 4, key=k2)

    def __call__(self, streams, c, mask):
        a, b = streams
        mixed = jnp.tanh(self.fc1(a) + c)
        return mixed + self.fc2(b), jnp.where(mask[:, None], b, self.fc2(b))


NOTHING = jax.checkpoint_policies.nothing_saveable
STREAMS = (normal(5, 4), normal(5, 4, seed=1))
SHARED = (normal(4, seed=2), jnp.array([True, False, True, True, False]))


def loop(stack, x, *shared):
    for i in range(stack.depth):
        x = jax.tree.map(lambda a, i=i: a[i], stack.stacked)(x, *shared)
    return x


OPTIONS = {
    "default": {},
    "no remat": {"remat": None},
    "narrow": {"remat": nn.save_narrow},
    "two": {"remat": NOTHING, "unroll": 2},
    "all": {"unroll": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stack_equals_a_loop_over_its_blocks(options):
    stack = nn.Stack(Pair, 3, **options, key=KEY)
    loss = lambda run: lambda stack, x: sum(map(jnp.sum, run(stack, x)))
    ours = eqx.filter_value_and_grad(loss(lambda stack, x: stack(x, *SHARED)))
    theirs = eqx.filter_value_and_grad(loss(lambda stack, x: loop(stack, x, *SHARED)))
    (value, gradient), (expected, reference) = (
        eqx.filter_jit(f)(stack, STREAMS) for f in (ours, theirs)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    assert tree_error(arrays(gradient), arrays(reference)) < 1e-5


def test_a_stack_gives_the_outputs_of_every_block():
    stack = nn.Stack(Pair, 3, key=KEY)
    a, b = stack.outputs(STREAMS, *SHARED)
    assert a.shape == b.shape == (3, 5, 4)
    first = jax.tree.map(lambda leaf: leaf[0], stack.stacked)(STREAMS, *SHARED)
    assert relative_error(a[0], first[0]) < 1e-6
    assert relative_error(a[2], stack(STREAMS, *SHARED)[0]) < 1e-6


def test_a_stack_computes_in_the_dtype_of_its_input():
    stack = nn.Stack(lambda key: nn.Linear(4, 4, key=key), 2, key=KEY)
    assert stack(normal(5, 4).astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="Stack: depth must be at least 1, got 0"):
        nn.Stack(Pair, 0, key=KEY)
