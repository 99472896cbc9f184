"""DiT's attention kernels, rematerialisation and dtypes: what computes, not what is computed."""

from collections import Counter
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn
from eqxldm.models import save_matmuls, save_narrow
from eqxldm.nn import RMSNorm, cudnn_attend

from helpers import filled, relative_error, run, small_dit, tree_error, value_and_gradient

pytestmark = pytest.mark.usefixtures("strict_dtypes")


T, LABEL = jnp.array(0.3), jnp.array(2)
LATENT = jax.random.normal(jax.random.key(7), (3, 4, 8))
BF16 = jnp.bfloat16
EMBED = nn.Linear(5, 16, key=jax.random.key(4))


def heads_like(*shape, dtype=BF16):
    return tuple(jax.random.normal(jax.random.key(s), shape).astype(dtype) for s in range(3))


def test_cudnn_attend_hands_over_the_layout_and_takes_the_batch_axis_off():
    original, seen = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, *, implementation):
        seen.append((query.shape, implementation))
        with jax.numpy_dtype_promotion("standard"):
            return original(query, key, value, implementation="xla")

    q, k, v = heads_like(4, 6, 2, 8)
    with mock.patch("jax.nn.dot_product_attention", stand_in):
        out = jax.vmap(cudnn_attend)(q, k, v)
    assert seen == [((1, 6, 2, 8), "cudnn")]  # batch, tokens, heads, head size
    expected = jax.vmap(nn.attend)(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert out.dtype == BF16
    assert relative_error(out.astype(jnp.float32), expected) < 2**-6


def test_cudnn_attend_lowers_to_the_fused_kernel_for_a_batched_training_step():
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    checks = {"check_cudnn_version": lambda: 91000, "check_compute_capability": lambda c: True}
    if not all(hasattr(module, name) for name in checks):
        pytest.skip("this version of JAX looks for cuDNN elsewhere")
    dit = filled(lambda: small_dit(attention=cudnn_attend, qk_norm=RMSNorm))
    loss = lambda dit, x, t, y: jnp.sum(jax.vmap(dit)(x, t, y).astype(jnp.float32))
    args = dit, jnp.zeros((2, 3, 4, 8), BF16), jnp.zeros(2), jnp.zeros(2, int)
    with mock.patch.multiple(module, **checks):
        params, static = eqx.partition(dit, eqx.is_array)
        step = jax.jit(jax.grad(lambda p, *a: loss(eqx.combine(p, static), *a)))
        text = step.trace(params, *args[1:]).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize(
    "dtype, size, message",
    [
        (jnp.float32, 8, "needs bfloat16 or float16, got float32. Cast the input, or use attend"),
        (BF16, 12, r"head size that is a multiple of 8, got 12. Change width / num_heads, or use"),
    ],
)
def test_cudnn_attend_says_what_it_cannot_do(dtype, size, message):
    with pytest.raises(ValueError, match=message):
        cudnn_attend(*heads_like(4, 2, size, dtype=dtype))
    dit = filled(lambda: small_dit(width=2 * size, attention=cudnn_attend))
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(dit, LATENT.astype(dtype), T, LABEL)


def arrays_in(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


NOTHING = jax.checkpoint_policies.nothing_saveable


@pytest.mark.parametrize(
    "qk_norm, variants",
    [
        (
            None,
            [
                {"remat": save_matmuls},
                {"remat": save_narrow},
                {"remat": NOTHING},
                {"remat": None, "unroll": True},
            ],
        ),
        (RMSNorm, [{"remat": NOTHING, "unroll": 2}]),
    ],
    ids=["plain", "qk_norm"],
)
def test_remat_and_unrolling_change_no_gradient(qk_norm, variants):
    make = lambda **changes: filled(lambda: small_dit(depth=2, qk_norm=qk_norm, **changes))
    expected, reference = value_and_gradient(make(remat=None), LATENT, T, LABEL)
    for changes in variants:
        out, gradient = value_and_gradient(make(**changes), LATENT, T, LABEL)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        assert tree_error(arrays_in(gradient), arrays_in(reference)) < 1e-5, changes


def test_gradients_are_finite_from_the_start_and_with_bfloat16():
    start = small_dit(depth=1)
    later = filled(lambda: small_dit(num_classes=None, embed_cond=EMBED, depth=1, qk_norm=RMSNorm))
    gradients = []
    for dit, dtype, cond in ((start, jnp.float32, LABEL), (later, BF16, jnp.ones(5))):
        out, gradient = value_and_gradient(dit, LATENT.astype(dtype), T, cond)
        assert out.dtype == dtype
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in arrays_in(gradient))
        assert all(g.dtype == jnp.float32 for g in arrays_in(gradient))
        gradients.append(gradient)
    assert jnp.any(gradients[0].final_linear.weight != 0)  # zero at the start, but it learns
    assert jnp.any(gradients[1].embed_cond.weight != 0)


def equations(jaxpr):
    """All equations, those inside of scans and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("qk_norm", [None, RMSNorm])
def test_bfloat16_has_islands_of_float32_and_its_matmuls_outside_of_them(qk_norm):
    dit = filled(lambda: small_dit(qk_norm=qk_norm, learn_sigma=True))
    jaxpr = jax.make_jaxpr(dit)(LATENT.astype(BF16), T, LABEL).jaxpr
    assert [v.aval.dtype for v in jaxpr.outvars] == [BF16]
    seen = {}
    for equation in (e for e in equations(jaxpr) if e.invars):
        seen.setdefault(equation.primitive.name, []).append(equation.invars[0].aval.dtype)
    for name in ("exp", "rsqrt", "cos", "sin", "reduce_sum"):  # softmax, norms, time
        assert set(seen[name]) == {jnp.dtype("float32")}, name
    # Time 2; patch, q, k, v, proj, q k^T, attn v, fc1, fc2, 2 modulations, last: 12 in bfloat16, of
    # which attention's two are there once for CPUs and once for all else.
    assert sorted(map(str, seen["dot_general"])) == 14 * ["bfloat16"] + 2 * ["float32"]


def test_a_remat_policy_keeps_what_it_says():
    """`save_narrow`: of a block attention's output, maxima and sums, the MLP's output; no more."""

    def kept(policy):
        dit = filled(lambda: small_dit(remat=policy))
        params, static = eqx.partition(dit, eqx.is_inexact_array)
        run = lambda p: jnp.sum(eqx.combine(p, static)(LATENT, T, LABEL))
        _, pull = jax.vjp(run, params)
        depth = len(dit.blocks.stacked.fc1.weight)
        return Counter(a.shape for a in jax.tree.leaves(pull) if a.shape[:1] == (depth,))

    dit = filled(small_dit)
    depth, width = dit.blocks.stacked.fc1.weight.shape[0], dit.patch_embedding.weight.shape[0]
    num_heads = dit.blocks.stacked.attention.qkv.num_heads
    tokens = LATENT.shape[1] * LATENT.shape[2] // dit.patch_size**2
    more = kept(save_narrow) - kept(NOTHING)
    assert more == {(depth, tokens, width): 2, (depth, num_heads, tokens, 1): 2}


def test_the_float32_vector_of_time_and_condition_is_rounded_once():
    dit = filled(lambda: small_dit(num_classes=None, embed_cond=EMBED))
    cond = jnp.linspace(-1, 1, 5)
    time, embed = dit.time_embedding(T), dit.embed_cond
    for c in (cond, cond.astype(BF16)):
        assert nn.embed_condition("DiT", time, embed, c).vector.dtype == jnp.float32
    out = run(dit, LATENT.astype(BF16), T, cond.astype(BF16))
    exact = run(dit, LATENT, T, cond)
    error = jnp.sqrt(jnp.mean((out.astype(jnp.float32) - exact) ** 2) / jnp.mean(exact**2))
    assert error < 10 * 2**-8


# The start
