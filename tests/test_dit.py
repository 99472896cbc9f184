"""DiT as published: sizes, counts, numbers, start, conditions and options."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import eqxldm
from eqxldm import nn
from eqxldm.models import DiT, parameter_count
from eqxldm.nn import RMSNorm, SelfAttention

from helpers import filled, named_leaves, relative_error, run, small_dit, value_and_gradient

pytestmark = pytest.mark.usefixtures("strict_dtypes")


T, LABEL = jnp.array(0.3), jnp.array(2)
LATENT = jax.random.normal(jax.random.key(7), (3, 4, 8))
BF16 = jnp.bfloat16


def numpy_dit(dit, x_t, t, label, p):
    """The published network in float64, from the paper's names: N tokens, D wide, H heads."""
    get = lambda layer, i=...: (np.float64(layer.weight)[i], np.float64(layer.bias)[i])
    apply = lambda x, wb: x @ wb[0].T + wb[1]
    silu = lambda x: x / (1 + np.exp(-x))
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    channels, height, width = x_t.shape
    h, w, d = height // p, width // p, dit.patch_embedding.weight.shape[0]

    kernel, bias = get(dit.patch_embedding)
    kernel = kernel.reshape(d, channels, p, p)  # a convolution with stride p
    x = np.empty((h * w, d))
    for i in range(h):
        for j in range(w):
            square = np.float64(x_t[:, p * i : p * i + p, p * j : p * j + p])
            x[i * w + j] = np.einsum("dcpq,cpq->d", kernel, square) + bias
    x = x + nn.sincos_positions((h, w), d)

    frequencies = 10_000.0 ** -(np.arange(128) / 128)
    angles = (1000 * float(t) - 1) * frequencies
    time = np.concatenate([np.cos(angles), np.sin(angles)])
    time = apply(
        silu(apply(time, get(dit.time_embedding.linear1))), get(dit.time_embedding.linear2)
    )
    c = silu(time + np.float64(dit.embed_cond.table)[label])

    num_heads = dit.blocks.stacked.attention.qkv.num_heads
    for k in range(len(dit.blocks.stacked.fc1.weight)):
        modulation = apply(c, get(dit.blocks.stacked.modulation.linear, k)).reshape(6, d)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = [
            apply(norm(x) * (1 + scale1) + shift1, get(dit.blocks.stacked.attention.qkv, (k, j)))
            for j in range(3)
        ]
        query, key, value = (a.reshape(-1, num_heads, d // num_heads).swapaxes(0, 1) for a in qkv)
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(d // num_heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ value
        y = y.transpose(1, 0, 2).reshape(-1, d)
        x = x + gate1 * apply(y, get(dit.blocks.stacked.attention.proj, k))
        y = apply(norm(x) * (1 + scale2) + shift2, get(dit.blocks.stacked.fc1, k))
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + gate2 * apply(y, get(dit.blocks.stacked.fc2, k))

    shift, scale = apply(c, get(dit.final_modulation.linear)).reshape(2, d)
    x = apply(norm(x) * (1 + scale) + shift, get(dit.final_linear))
    return np.einsum("hwpqc->chpwq", x.reshape(h, w, p, p, -1)).reshape(-1, height, width)


@pytest.mark.parametrize(
    "shape, patch_size, learn_sigma",
    [((3, 4, 8), 2, True), ((1, 12, 4), 4, False), ((5, 3, 2), 1, True)],
)
def test_dit_equals_the_published_network(shape, patch_size, learn_sigma):
    make = lambda: DiT(
        shape, patch_size=patch_size, depth=2, width=16, num_heads=2, num_classes=5,
        learn_sigma=learn_sigma, key=jax.random.key(0),
    )  # fmt: skip
    dit = filled(make)
    x = jax.random.normal(jax.random.key(1), shape)
    expected = numpy_dit(dit, x, T, 2, patch_size)
    assert expected.shape == ((1 + learn_sigma) * shape[0], *shape[1:])
    assert relative_error(run(dit, x, T, LABEL), expected) < 2e-5


def test_learned_sigma_puts_the_prediction_first_and_the_variance_after():
    dit = filled(lambda: small_dit(learn_sigma=True))
    bias = jnp.arange(2 * 2 * 6, dtype=jnp.float32)  # (p q c): six channels in every pixel
    where = lambda d: (d.final_linear.weight, d.final_linear.bias)
    dit = eqx.tree_at(where, dit, (jnp.zeros((24, 16)), bias))
    out = run(dit, LATENT, T, LABEL)
    for i in range(4):
        for j in range(8):
            pixel = 2 * (i % 2) + j % 2
            np.testing.assert_array_equal(out[:, i, j], 6 * pixel + np.arange(6))
    prediction = eqxldm.LearnedRange(eqxldm.predict_eps)
    eps, variance = eqxldm.predictions.split_output(prediction, LATENT, out)
    np.testing.assert_array_equal(eps[:, 0, 0], [0, 1, 2])
    np.testing.assert_array_equal(variance[:, 0, 0], [3, 4, 5])


@pytest.mark.parametrize("shape", [(1, 2, 6), (2, 6, 2)])
def test_any_latent_size_gives_its_own_shape_and_tells_places_apart(shape):
    size = dict(patch_size=2, depth=1, width=16, num_heads=2, num_classes=5)
    dit = filled(lambda: DiT(shape, **size, key=jax.random.key(0)))
    out = run(dit, jnp.ones(shape), T, LABEL)  # the same patch everywhere: only positions differ
    assert out.shape == shape
    patches = np.asarray(nn.patchify(out, 2))
    assert len(np.unique(patches.round(4), axis=0)) == len(patches)


# Conditions


EMBED = nn.Linear(5, 16, key=jax.random.key(4))


def vector_dit(embed_cond, **changes):
    return small_dit(num_classes=None, embed_cond=embed_cond, **changes)


def test_unconditional_dit_is_the_network_without_the_label():
    dit = filled(lambda: small_dit(num_classes=None))
    silent = filled(small_dit)
    silent = eqx.tree_at(lambda d: d.embed_cond.table, silent, jnp.zeros((6, 16)))
    rest = eqx.tree_at(lambda d: d.embed_cond, silent, None)
    assert named_leaves(rest).keys() == named_leaves(dit).keys()
    out = run(rest, LATENT, T)
    np.testing.assert_allclose(out, run(silent, LATENT, T, LABEL), atol=1e-6)
    np.testing.assert_array_equal(run(rest, LATENT, T, None), out)


def test_a_vector_condition_is_added_to_the_time():
    dit = filled(lambda: vector_dit(EMBED, depth=1))
    cond = jnp.linspace(-1, 1, 5)
    added = dit.embed_cond(cond)
    rest = eqx.tree_at(lambda d: d.embed_cond, dit, None)
    where = lambda d: d.time_embedding.linear2.bias
    moved = eqx.tree_at(where, rest, where(rest) + added)
    out = run(dit, LATENT, T, cond)
    np.testing.assert_allclose(out, run(moved, LATENT, T), atol=1e-5)
    assert jnp.max(jnp.abs(out - run(dit, LATENT, T, -cond))) > 1e-3


def test_a_condition_may_be_any_tree_and_its_embedding_a_function():
    embed = lambda cond: jnp.tile(cond["a"], 8) + cond["b"]
    dit = filled(lambda: vector_dit(embed))
    cond = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}
    out = run(dit, LATENT, T, cond)
    batch = jax.jit(jax.vmap(dit))(
        jnp.stack([LATENT, LATENT]),
        jnp.stack([T, T]),
        jax.tree.map(lambda x: jnp.stack([x, 2 * x]), cond),
    )
    np.testing.assert_allclose(batch[0], out, atol=1e-5)
    assert jnp.max(jnp.abs(batch[1] - out)) > 1e-3


def test_every_condition_runs_under_guidance_and_sampling():
    grid = eqxldm.uniform_times(2)
    for dit, cond, null in (
        (filled(small_dit), LABEL, jnp.array(5)),
        (filled(lambda: vector_dit(EMBED)), jnp.ones(5), jnp.zeros(5)),
    ):

        @jax.jit
        def draw(x_T, dit=dit, cond=cond, null=null):
            guided = eqxldm.guide(dit, null, 2.0)
            path, velocity = eqxldm.LinearFlow(), eqxldm.predict_velocity
            return eqxldm.sample(
                guided,
                eqxldm.Diffusion(path, velocity),
                eqxldm.Euler(),
                grid,
                x_T,
                cond,
                key=jax.random.key(0),
            )

        assert bool(jnp.all(jnp.isfinite(draw(LATENT))))


# Options


def test_the_tree_of_parameters():
    tree = eqx.filter(filled(small_dit), eqx.is_array)
    paths = jax.tree_util.tree_leaves_with_path(tree)
    linears = [
        "patch_embedding", "time_embedding.linear1", "time_embedding.linear2",
        "final_modulation.linear", "final_linear",
    ]  # fmt: skip
    blocks = ("attention.qkv", "attention.proj", "fc1", "fc2", "modulation.linear")
    linears += [f"blocks.stacked.{name}" for name in blocks]
    expected = {f".{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
    found = {jax.tree_util.keystr(path) for path, _ in paths}
    assert found == expected | {".embed_cond.table"}


def test_rms_norm_equals_its_formula():
    x = np.asarray(3 + 2 * jax.random.normal(jax.random.key(0), (5, 2, 8)), np.float64)
    scale = np.linspace(0.5, 2, 8)
    norm = eqx.tree_at(lambda n: n.scale, RMSNorm(8), jnp.asarray(scale, jnp.float32))
    expected = scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)
    assert norm(jnp.ones(8, BF16)).dtype == BF16
    # Sums in bfloat16 would miss by per cents: 4096 squares that are each below half a unit.
    many = RMSNorm(4096)(jnp.full(4096, 0.1, BF16))
    np.testing.assert_allclose(many.astype(jnp.float32), 1, rtol=2**-8)
    wide = RMSNorm(2, norm_eps=3.0)(jnp.ones(2))
    np.testing.assert_allclose(wide, 0.5, rtol=1e-6)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(key):
    layer = filled(lambda: SelfAttention(16, 2, qk_norm=RMSNorm, key=key))
    plain = filled(lambda: SelfAttention(16, 2, key=key))
    x = jax.random.normal(key, (5, 16))
    factors = jnp.array([[7.0], [3.0], [1.0]])  # of q, k, v
    where = lambda layer: (layer.qkv.weight, layer.qkv.bias)
    scaled = lambda m: eqx.tree_at(
        where, m, (m.qkv.weight * factors[..., None], m.qkv.bias * factors)
    )
    np.testing.assert_allclose(scaled(layer)(x), layer(x), atol=1e-5)
    assert jnp.max(jnp.abs(scaled(plain)(x) - plain(x))) > 1e-2


def test_qk_norm_of_queries_and_keys_is_applied_to_each_head(key):
    layer = filled(lambda: SelfAttention(16, 2, qk_norm=RMSNorm, key=key))
    x = jax.random.normal(key, (5, 16))
    q, k, v = map(np.asarray, layer.qkv(x))
    unit = lambda a, norm: np.asarray(norm.scale) * a / np.sqrt((a**2).mean(-1, keepdims=True))
    q, k = jnp.asarray(unit(q, layer.query_norm)), jnp.asarray(unit(k, layer.key_norm))
    expected = layer.proj(nn.attend(q, k, jnp.asarray(v)).reshape(5, 16))
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


def test_dit_with_qk_norm_trains_its_scales_and_takes_plain_functions():
    dit = filled(lambda: small_dit(qk_norm=RMSNorm))
    assert dit.blocks.stacked.attention.query_norm.scale.shape == (3, 8)
    out, gradient = value_and_gradient(dit, LATENT, T, LABEL)
    for norm in (
        gradient.blocks.stacked.attention.query_norm,
        gradient.blocks.stacked.attention.key_norm,
    ):
        assert jnp.all(jnp.max(jnp.abs(norm.scale), axis=-1) > 1e-5)
    plain = filled(lambda: small_dit(qk_norm=lambda size: nn.layer_norm))
    assert parameter_count(plain) == parameter_count(filled(small_dit))
    assert jnp.max(jnp.abs(run(plain, LATENT, T, LABEL) - out)) > 1e-3


def test_attention_is_the_function_that_was_given(key):
    x = jax.random.normal(key, (5, 8))
    blind = lambda query, key, value: value
    layer = SelfAttention(8, 2, attention=blind, key=key)
    np.testing.assert_allclose(layer(x), layer.proj(layer.qkv(x)[2].reshape(5, 8)), atol=1e-6)
    normed = SelfAttention(8, 2, qk_norm=RMSNorm, attention=blind, key=key)
    np.testing.assert_allclose(normed(x), layer(x), atol=1e-6)
    default, other = (filled(lambda c=c: small_dit(**c)) for c in ({}, {"attention": blind}))
    assert other.blocks.stacked.attention.attention is blind
    difference = run(default, LATENT, T, LABEL) - run(other, LATENT, T, LABEL)
    assert jnp.max(jnp.abs(difference)) > 1e-3


def published_start(d, hidden, token, out):
    """What every leaf starts as: a uniform's bound, a normal's standard deviation, or zero."""
    xavier = lambda *fans: ("uniform", np.sqrt(6 / sum(fans)))
    return {
        "patch_embedding.weight": xavier(token, d),  # flattened, not as a convolution
        "time_embedding.linear[12].weight": ("normal", 0.02),
        "embed_cond.table": ("normal", 0.02),
        "blocks.stacked.attention.qkv.weight": xavier(d, 3 * d),  # as one matrix
        "blocks.stacked.attention.proj.weight": xavier(d, d),
        "blocks.stacked.fc1.weight": xavier(d, hidden),
        "blocks.stacked.fc2.weight": xavier(hidden, d),
        "blocks.stacked.modulation.linear.weight": ("zero", 0),
        "final_modulation.linear.weight": ("zero", 0),
        "final_linear.weight": ("zero", 0),
        r".*\.bias": ("zero", 0),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_every_parameter_starts_as_published(seed):
    d, depth, token = 64, 3, 16
    dit = DiT(
        (4, 8, 8), patch_size=2, depth=depth, width=d, num_heads=4, num_classes=30,
        learn_sigma=True, key=jax.random.key(seed),
    )  # fmt: skip
    start = published_start(d, 4 * d, token, 2 * token)
    used = set()
    for path, leaf in named_leaves(dit).items():
        (pattern,) = [p for p in start if re.fullmatch(rf"\.{p}", path)]
        used.add(pattern)
        kind, size = start[pattern]
        layers = leaf if path.startswith(".blocks") else leaf[None]
        for layer in np.asarray(layers, np.float64):
            n = layer.size
            if kind == "zero":
                assert not layer.any(), path
                continue
            spread = size if kind == "normal" else size / np.sqrt(3)
            # Five standard errors; a uniform's variance has relative error sqrt(0.8 / n).
            error = 5 * np.sqrt((2 if kind == "normal" else 0.8) / n)
            assert abs(layer.mean()) < 5 * spread / np.sqrt(n), path
            assert abs(layer.var() / spread**2 - 1) < error, path
            if kind == "uniform":  # the largest of n lies within 20 / n but for e^-20
                assert 1 - 20 / n < np.abs(layer).max() / size <= 1 + 1e-6, path
        if kind != "zero" and len(layers) > 1:
            assert len({layer.tobytes() for layer in np.asarray(layers)}) == depth, path
    assert used == start.keys()
    assert not jnp.any(run(dit, jnp.ones((4, 8, 8)), T, LABEL))


# Wrong input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "DiT: 4 x 8 does not divide by the patch size 3"),
        ({"patch_size": 8}, "DiT: 4 x 8 does not divide by the patch size 8"),
        ({"num_heads": 3}, "width 16 does not divide into 3 heads"),
        ({"num_heads": 3, "qk_norm": RMSNorm}, "width 16 does not divide into 3 heads"),
        ({"num_heads": 0}, r"every size must be at least 1, got shape \(3, 4, 8\), .* num_heads 0"),
        ({"patch_size": 0}, "every size must be at least 1, .* patch_size 0"),
        ({"depth": 0}, "every size must be at least 1, .* depth 0"),
        ({"width": 2, "num_heads": 1}, "size must be even and at least 4 for 2 axes, got 2"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"embed_cond": jnp.ones_like}, "give num_classes or embed_cond, not both"),
    ],
)
def test_wrong_sizes_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        small_dit(**changes)


def test_wrong_inputs_say_what_is_wrong():
    labelled, free = filled(small_dit), filled(lambda: small_dit(num_classes=None))
    vector = filled(lambda: vector_dit(nn.Linear(5, 8, key=jax.random.key(4))))
    for shape in ((4, 4, 8), (3, 8, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=rf"x_t must have shape \(3, 4, 8\), got \({shape[0]}"):
            labelled(jnp.ones(shape), T, LABEL)
    with pytest.raises(ValueError, match="the network is unconditional, so cond must be None"):
        free(LATENT, T, LABEL)
    for dit in (labelled, vector):
        with pytest.raises(ValueError, match="the network is conditional, but cond is None"):
            dit(LATENT, T)
    with pytest.raises(ValueError, match=r"must give a vector of shape \(16,\), got \(8,\)"):
        vector(LATENT, T, jnp.ones(5))
    for dit in (free, vector):
        with pytest.raises(ValueError, match="only a network with num_classes has a null label"):
            _ = dit.null
    with pytest.raises(TypeCheckError, match="parameter 'label'"):
        labelled(LATENT, T, jnp.array(1.0))


# `eqx.filter_jit` raises `EquinoxRuntimeError`, `jax.jit` JAX's own: both are RuntimeErrors.
@pytest.mark.parametrize("jit", [eqx.filter_jit, jax.jit], ids=["equinox", "jax"])
@pytest.mark.parametrize("label", [-1, 6, [0, 5, 7], [2, -3]])
def test_a_label_outside_stops_the_program_if_checked(jit, label):
    message = "label must lie in 0 .. 5, where 5 means no label"
    with pytest.raises(RuntimeError, match=message):
        jit(lambda label: nn.check_label(label, 5))(jnp.array(label))


def test_labels_inside_pass_the_check_unchanged():
    labels = jnp.arange(6)
    checked = eqx.filter_jit(lambda label: nn.check_label(label, 5))(labels)
    assert checked.dtype == labels.dtype and jnp.array_equal(checked, labels)
    dit = filled(small_dit)
    guarded = lambda dit, x, t, y: dit(x, t, nn.check_label(y, 5))
    out = eqx.filter_jit(guarded)(dit, LATENT, T, LABEL)
    np.testing.assert_array_equal(out, run(dit, LATENT, T, LABEL))
    with pytest.raises(RuntimeError, match=r"label must lie in 0 \.\. 5"):
        eqx.filter_jit(guarded)(dit, LATENT, T, jnp.array(9))


def test_a_network_takes_latents_of_another_size_with_the_same_weights():
    options = dict(patch_size=(1, 2, 2), depth=1, width=24, num_heads=2, rope=nn.RoPE((4, 4, 4)))
    dit = filled(lambda: DiT((3, 4, 4, 4), **options, key=jax.random.key(0)))
    image = dit.with_spatial((1, 4, 8))
    assert image.shape == (3, 1, 4, 8) and dit.shape == (3, 4, 4, 4)
    x = jax.random.normal(jax.random.key(1), (3, 1, 4, 8))
    of_that_size = DiT((3, 1, 4, 8), **options, key=jax.random.key(2))
    other = eqx.combine(
        jax.tree.unflatten(
            jax.tree.structure(eqx.filter(of_that_size, eqx.is_array)),
            jax.tree.leaves(eqx.filter(dit, eqx.is_array)),
        ),
        eqx.filter(of_that_size, eqx.is_array, inverse=True),
    )
    np.testing.assert_array_equal(run(image, x, T), run(other, x, T))
    with pytest.raises(ValueError, match="DiT: x_t must have shape"):
        image(jnp.ones((3, 4, 4, 4)), T)
    with pytest.raises(ValueError, match="divi"):
        dit.with_spatial((1, 4, 7))
