"""The newer options of DiT and of the denoising loss: their equations, and what needs what."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxldm as ex
from eqxldm import models, nn, training
from eqxldm.models import DiT, DiTBlock, multiply_adds, parameter_count
from eqxldm.objectives import alignment_loss, cosine_loss, dispersive_loss

from helpers import perturbed

KEY = jax.random.key(0)
SIZES = dict(patch_size=2, depth=3, width=16, num_heads=2, remat=None)
EARLY = dict(early_depth=2, early_head=True)
MODERN = dict(norm=nn.RMSNorm, swiglu=True, qk_norm=nn.RMSNorm, rope=nn.RoPE((4, 4)))
SHAPE = (3, 4, 8)
T, LABEL = jnp.array(0.3), jnp.array(2)
X = jax.random.normal(jax.random.key(1), SHAPE)
FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)


def make(**options):
    return perturbed(DiT(SHAPE, **{**SIZES, "num_classes": 5, **options}, key=KEY))


@eqx.filter_jit
def run(network, *args):
    return network(*args)


@eqx.filter_jit
def outputs(network, *args):
    return network.outputs(*args)


# The blocks and what stands around them


@pytest.mark.parametrize("modulated", [True, False])
def test_a_block_of_rms_norm_and_swiglu_equals_its_formula(modulated):
    block = DiTBlock(8, 2, 3.0, norm=nn.RMSNorm, swiglu=True, modulated=modulated, key=KEY)
    block = perturbed(block)
    x, c = jax.random.normal(KEY, (5, 8)), jax.random.normal(jax.random.key(2), (8,))
    f = lambda a: np.asarray(a, np.float64)
    rms = lambda x, norm: f(norm.scale) * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    affine = lambda layer, x: x @ f(layer.weight).T + f(layer.bias)
    if modulated:
        b1, a1, g1, b2, a2, g2 = f(block.modulation(c))
    else:
        (g1, g2), b1, a1, b2, a2 = f(block.gates), 0, 0, 0, 0
    y = f(x)
    normed = rms(y, block.norm1) * (1 + a1) + b1
    y = y + g1 * f(block.attention(jnp.asarray(normed, jnp.float32)))
    normed = rms(y, block.norm2) * (1 + a2) + b2
    gate = affine(block.gate, normed)
    y = y + g2 * affine(block.fc2, gate / (1 + np.exp(-gate)) * affine(block.fc1, normed))
    np.testing.assert_allclose(block(x, c), y, atol=1e-5)
    assert block.fc1.weight.shape == (16, 8)  # two thirds of 24


def test_a_gated_mlp_is_as_large_as_a_plain_one():
    of = lambda **options: parameter_count(DiTBlock(96, 2, 4.0, **options, key=KEY))
    assert 1 < of(swiglu=True) / of() < 1.01
    assert of(modulated=False) == of() - 6 * 96 * 97 + 2 * 96


def test_the_early_head_is_the_last_layer_of_a_shallower_network():
    dit = make(**MODERN, **EARLY)
    shallow = make(**MODERN, depth=2)
    head = dit.early_head
    early = jax.tree.map(lambda a: a[:2] if eqx.is_array(a) else a, dit.blocks.stacked)
    of = lambda n: (
        n.patch_embedding, n.time_embedding, n.embed_cond, n.blocks.stacked, n.final_norm,
        n.final_modulation, n.final_linear,
    )  # fmt: skip
    parts = (dit.patch_embedding, dit.time_embedding, dit.embed_cond, early)
    shallow = eqx.tree_at(of, shallow, (*parts, head.norm, head.modulation, head.final_linear))
    made = outputs(dit, X, T, LABEL)
    np.testing.assert_allclose(made.early, run(shallow, X, T, LABEL), atol=1e-5)
    np.testing.assert_allclose(made.out, run(dit, X, T, LABEL), atol=1e-5)
    assert made.tokens.shape == (8, 16)
    without = make(**MODERN)
    assert without.outputs(X, T, LABEL)[1:] == (None, None)


def test_tokens_of_condition_and_time_stand_before_the_patches():
    """They are those that a condition of tokens would have given."""
    dit = make(**MODERN, condition_tokens=2, time_tokens=1)

    class Told(eqx.Module):
        def __call__(self, label):
            own = dit.embed_cond(label)
            tokens = jnp.stack([own, own, dit.time_embedding(T)]) + dit.context_positions
            return nn.Conditioning(own, tokens)

    told = make(**MODERN, num_classes=None, embed_cond=Told())
    names = (
        "patch_embedding", "time_embedding", "blocks", "final_norm", "final_modulation",
        "final_linear",
    )  # fmt: skip
    of = lambda n: [getattr(n, name) for name in names]
    told = eqx.tree_at(of, told, of(dit))
    np.testing.assert_allclose(run(dit, X, T, LABEL), run(told, X, T, LABEL), atol=1e-5)


def test_without_modulation_the_network_is_told_by_tokens_alone():
    dit = make(modulated=False, condition_tokens=1, time_tokens=1, tokens_start=1)
    out = run(dit, X, T, LABEL)
    for other in ((X, T, jnp.array(3)), (X, jnp.array(0.6), LABEL)):
        assert float(jnp.max(jnp.abs(run(dit, *other) - out))) > 1e-3
    assert parameter_count(dit) < parameter_count(make()) - 3 * 6 * 16**2


def test_a_bottleneck_is_a_patch_embedding_of_low_rank():
    dit = make(patch_bottleneck=2, norm=nn.RMSNorm)
    product = dit.patch_embedding.weight @ dit.patch_bottleneck.weight
    where = lambda n: (n.patch_bottleneck, n.patch_embedding.weight)
    whole = eqx.tree_at(where, dit, (None, product), is_leaf=lambda leaf: leaf is None)
    np.testing.assert_allclose(run(dit, X, T, LABEL), run(whole, X, T, LABEL), atol=1e-5)


@pytest.mark.parametrize("size, millions", [("b", 131), ("l", 459), ("h", 953)])
def test_jit_has_the_published_counts(size, millions):
    jit = eqx.filter_eval_shape(getattr(models, f"jit_{size}_16"), key=KEY)
    assert round(parameter_count(jit) / 1e6) == millions
    assert jit.config.rope.sizes == (jit.config.width // jit.config.num_heads // 2,) * 2


def test_multiply_adds_of_the_modern_form_are_half_of_the_flops_that_xla_counts():
    make = lambda: DiT(
        (8, 8, 8), patch_size=1, depth=3, width=128, num_heads=4, num_classes=5, unroll=3,
        remat=None, norm=nn.RMSNorm, swiglu=True, modulated=False, condition_tokens=3,
        time_tokens=1, tokens_start=1, patch_bottleneck=4, **EARLY, key=KEY,
    )  # fmt: skip
    dit = eqx.filter_eval_shape(make)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    args = jax.ShapeDtypeStruct((8, 8, 8), jnp.float32), scalar(jnp.float32), scalar(jnp.int32)
    cost = jax.jit(lambda dit, *args: dit(*args)).lower(dit, *args).compile().cost_analysis()
    assert multiply_adds(dit) < cost["flops"] / 2 < 1.05 * multiply_adds(dit)


def test_the_modern_form_starts_at_zero_and_every_parameter_learns():
    dit = DiT(SHAPE, **SIZES, num_classes=5, **MODERN, **EARLY, condition_tokens=1, key=KEY)
    made = outputs(dit, X, T, LABEL)
    assert not np.any(made.out) and not np.any(made.early)

    @eqx.filter_jit
    def gradient(dit):
        def loss(dit):
            made = training.in_dtype(dit, jnp.bfloat16).outputs(X, T, LABEL)
            assert made.out.dtype == made.early.dtype == made.tokens.dtype == jnp.float32
            weights = jnp.cos(jnp.arange(X.size)).reshape(X.shape)
            return jnp.sum((made.out + made.early) * weights)

        return eqx.filter_grad(loss)(dit)

    for leaf in jax.tree.leaves(gradient(perturbed(dit))):
        assert np.all(np.isfinite(leaf)) and float(jnp.max(jnp.abs(leaf))) > 1e-6


# The losses


def test_the_velocity_weight_is_the_loss_of_the_velocity_but_near_the_data():
    x0, eps, wrong = jax.random.normal(KEY, (3, 4, 2, 2))
    path = ex.LinearFlow()
    weight = ex.velocity_weight(ex.predict_x0)
    for t in (0.05, 0.4, 1.0):
        at = path.coefficients(jnp.array(t))
        x_t = ex.q_sample(path, x0, jnp.array(t), eps)
        velocity = ex.convert(ex.predict_x0, ex.predict_velocity, at, x_t, wrong)
        expected = jnp.mean((velocity - (eps - x0)) ** 2)
        found = weight(at) * jnp.mean((wrong - x0) ** 2)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(weight(path.coefficients(jnp.array(0.001)))) == pytest.approx(400)
    v = ex.velocity_weight(ex.predict_velocity)(path.coefficients(jnp.array(0.3)))
    assert float(v) == pytest.approx(1)
    with pytest.raises(ValueError, match="clip must be positive"):
        ex.velocity_weight(ex.predict_x0, 0.0)


def test_terms_equal_their_formulas():
    a, b = jax.random.normal(KEY, (2, 5, 3, 4))
    f = lambda a: np.asarray(a, np.float64)
    size = lambda a, axis: np.sqrt((f(a) ** 2).sum(axis))
    cosine = lambda axis: (f(a) * f(b)).sum(axis) / size(a, axis) / size(b, axis)
    np.testing.assert_allclose(cosine_loss(a, b), 1 - cosine(0).mean(), rtol=1e-5)
    found = alignment_loss(a.reshape(15, 4), b.reshape(15, 4))
    np.testing.assert_allclose(found, -cosine(2).mean(), rtol=1e-5)
    z = f(a).reshape(5, 12)
    pairs = ((z[:, None] - z) ** 2).sum(-1) / 12 / 0.5
    np.testing.assert_allclose(dispersive_loss(a, 0.5), np.log(np.exp(-pairs).mean()), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(cosine_loss)(jnp.zeros_like(a), b)))
    # Apart is better, and the gradient of tokens that are all alike is finite.
    assert dispersive_loss(2 * a) < dispersive_loss(a) < dispersive_loss(0 * a)
    assert np.all(np.isfinite(jax.grad(dispersive_loss)(0 * a)))


def test_denoising_adds_its_terms_over_the_batch():
    network = nn.Aligned(make(**MODERN, **EARLY), 16, 6, hidden=8, key=KEY)
    n = 4
    x0 = jax.random.normal(KEY, (n, *SHAPE))
    features = jax.random.normal(jax.random.key(3), (n, 8, 6))
    batch = {"x0": x0, "cond": jnp.arange(n), "features": features}
    weights = dict(cosine=0.3, early=0.5, dispersive=0.2, alignment=0.7)
    objective = ex.Denoising(FLOW, ex.constant_weight, ex.uniform_time, **weights)
    loss, terms = eqx.filter_jit(training.make_loss(objective))(network, batch, KEY, None)
    total = terms["error"] + sum(w * terms[name] for name, w in weights.items())
    np.testing.assert_allclose(loss, total, rtol=1e-5)

    # The same by hand, of what make_loss draws.
    _, time_key, _, loss_key = jax.random.split(KEY, 4)
    times, keys = ex.uniform_time(time_key, n), jax.random.split(loss_key, n)

    def one(x0, t, cond, key):
        eps = jax.random.normal(jax.random.split(key)[0], SHAPE)
        return network.outputs(FLOW.noise(x0, t, eps), t, cond), eps - x0

    made, v = eqx.filter_jit(jax.vmap(one))(x0, times, batch["cond"], keys)
    square = lambda out: jnp.mean((out - v) ** 2)
    projected = jax.vmap(network.project)(made.tokens)
    by_hand = {
        "error": square(made.out),
        "early": square(made.early),
        "cosine": jnp.mean(jax.vmap(cosine_loss)(made.out, v)),
        "dispersive": dispersive_loss(made.tokens),
        "alignment": jnp.mean(jax.vmap(alignment_loss)(projected, features)),
    }
    assert terms.keys() == by_hand.keys()
    for name, value in by_hand.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)


def test_the_cosine_term_is_of_velocities_whatever_is_predicted():
    x0, t = X, jnp.array(0.7)
    truth = ex.GaussianMixture([1.0], [0.3], [0.5])
    path, found = ex.CosineVP(), []
    for prediction in (ex.predict_v, ex.predict_x0, ex.predict_eps, ex.predict_velocity):
        objective = ex.Denoising(ex.Diffusion(path, prediction), cosine=1.0)
        denoiser = truth.denoiser(path, prediction)
        found.append(objective.loss(denoiser, x0, t, None, key=KEY)[1]["cosine"])
    np.testing.assert_allclose(found, found[0] * np.ones(4), rtol=1e-4)


# Guidance and times


def test_internal_guidance_extrapolates_from_the_early_head():
    dit = make(**EARLY)
    made = outputs(dit, X, T, LABEL)
    guided = ex.internal_guide(dit, 1.7, interval=(0.2, 1.0))
    np.testing.assert_allclose(
        run(guided, X, T, LABEL), made.early + 1.7 * (made.out - made.early), atol=1e-5
    )
    np.testing.assert_allclose(
        run(guided, X, jnp.array(0.1), LABEL), run(dit, X, jnp.array(0.1), LABEL), atol=1e-6
    )


def test_times_are_shifted_by_the_number_of_dimensions():
    assert ex.dimension_shift((3, 256, 256)) == pytest.approx(48**0.5)
    shift = ex.dimension_shift((16, 64, 64))
    plain, shifted = ex.logit_normal_time(), ex.shifted_time(ex.logit_normal_time(), shift)
    np.testing.assert_allclose(shifted(KEY, 8), ex.shift_time(plain(KEY, 8), 4.0), rtol=1e-6)
    assert ex.shifted_time(plain, 1.0) is plain


# What is refused


REFUSED = {
    "early": (lambda: make(early_depth=3), "early_depth must lie in 1 .. 2"),
    "head": (lambda: make(early_head=True), "early_head needs early_depth"),
    "narrow": (lambda: make(patch_bottleneck=0), "patch_bottleneck must be at least 1"),
    "start": (lambda: make(condition_tokens=1, tokens_start=3), "tokens_start in 0 .. 2"),
    "time": (lambda: make(modulated=False, condition_tokens=1), "give time_tokens"),
    "span": (lambda: make().blocks(X, span=(2, 4)), "no blocks 2 .. 3 among 3"),
    "guide": (lambda: ex.internal_guide(lambda *a, key=None: a[0], 2.0), "has no outputs"),
    "no head": (lambda: ex.internal_guide(make(), 2.0)(X, T, LABEL), "has no early_head"),
    "shift": (lambda: ex.shifted_time(ex.uniform_time, 0.0), "shift must be positive"),
    "base": (lambda: ex.dimension_shift((3,), 0), "need positive sizes"),
    "weight": (lambda: ex.Denoising(FLOW, cosine=-1.0), "cosine is the weight of a term"),
    "features": (
        lambda: alignment_loss(jnp.ones((2, 3)), jnp.ones((3, 3))), "Resize the features"
    ),
}  # fmt: skip
LOST = {
    "early": (dict(early=1.0), dict(early_depth=1), "early_head=True"),
    "dispersive": (dict(dispersive=1.0), {}, "made with early_depth"),
    "alone": (dict(dispersive=1.0), dict(early_depth=1), "no loss of one alone"),
    "alignment": (dict(alignment=1.0), dict(early_depth=1), "nn.Aligned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", LOST)
def test_a_term_that_cannot_be_had_is_refused(name):
    weights, options, message = LOST[name]
    shapes = eqx.filter_eval_shape(lambda: make(**options))
    objective = ex.Denoising(FLOW, **weights)
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(lambda n: objective.loss(n, X, T, LABEL, key=KEY), shapes)


def test_a_network_without_outputs_has_no_early_terms():
    objective = ex.Denoising(FLOW, early=1.0)
    with pytest.raises(ValueError, match="has no outputs"):
        objective.loss(lambda x_t, t, cond, *, key=None: x_t, X, T, None, key=KEY)
