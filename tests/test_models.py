import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from eqxldm.models import AutoencoderKL, DiT, Posterior
from eqxldm.models.dit import DiTBlock
from experiments.train.classifier import ConvClassifier

from helpers import (
    named_leaves,
    perturbed,
    small_autoencoder,
    small_discriminator,
    small_dit,
    tree_error,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

T, LABEL = jnp.array(0.3), jnp.array(2)
LATENT = jax.random.normal(jax.random.key(7), (3, 4, 8))
IMAGE = jax.random.uniform(jax.random.key(8), (1, 8, 12), minval=-1.0)


@eqx.filter_jit
def run(model, *args):
    return model(*args)


@eqx.filter_jit
def reconstruct(ae, x):
    return ae.decode(ae.encode(x))


@eqx.filter_jit
def run_and_gradient(model, *args):
    def loss(model):
        out = model(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    gradient, out = eqx.filter_grad(loss, has_aux=True)(model)
    return out, gradient


def classify(net, x):
    return net(x)[1]


def judge_and_rebuild(ae, x):
    posterior = ae.posterior(x)
    return jnp.concatenate([ae.decode(posterior.mean).ravel(), posterior.logvar.ravel()])


def test_dit_starts_at_zero():
    assert not jnp.any(run(small_dit(), LATENT, T, LABEL))


def test_dit_depends_on_every_input():
    dit = perturbed(small_dit())
    out = run(dit, LATENT, T, LABEL)
    assert out.shape == LATENT.shape
    others = [(LATENT + 0.1, T, LABEL), (LATENT, T + 0.1, LABEL), (LATENT, T, dit.null)]
    for other in others:
        assert jnp.max(jnp.abs(run(dit, *other) - out)) > 1e-3
    moved = run(dit, jnp.roll(LATENT, 2, axis=2), T, LABEL)  # positions tell tokens apart
    assert jnp.max(jnp.abs(jnp.roll(moved, -2, axis=2) - out)) > 1e-3


def test_dit_block_equals_its_formula(key):
    block = perturbed(DiTBlock(16, 2, 2.0, key=key))
    x, c = jax.random.normal(key, (5, 16)), jnp.linspace(-1, 1, 16)
    vectors = block.modulation.linear(c / (1 + jnp.exp(-c))).reshape(6, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = np.asarray(vectors, np.float64)

    def normed(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    y = np.asarray(x, np.float64)
    attended = block.attention(jnp.asarray(normed(y) * (1 + scale1) + shift1, jnp.float32))
    y = y + gate1 * np.asarray(attended)
    h = (normed(y) * (1 + scale2) + shift2) @ block.fc1.weight.T + np.asarray(block.fc1.bias)
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # GELU-tanh
    y = y + gate2 * (h @ block.fc2.weight.T + np.asarray(block.fc2.bias))
    np.testing.assert_allclose(block(x, c), y, atol=1e-5)


def dit_block_by_block(dit, x_t, t, label):
    """The same network with a Python loop over its blocks."""
    from eqxldm import nn

    _, height, width = dit.shape
    c = dit.time_embedding(t) + dit.embed_cond(label)
    x = dit.patch_embedding(nn.patchify(x_t, dit.patch_size))
    x = x + nn.sincos_positions(
        (height // dit.patch_size, width // dit.patch_size), x.shape[-1]
    ).astype(x.dtype)
    params, static = eqx.partition(dit.blocks.stacked, eqx.is_array)
    for i in range(dit.config.depth):
        x = eqx.combine(jax.tree.map(operator.itemgetter(i), params), static)(x, c)
    shift, scale = dit.final_modulation(c)
    x = dit.final_linear(nn.modulate(nn.layer_norm(x), shift, scale))
    return nn.unpatchify(x, (height, width), dit.patch_size)


@pytest.mark.parametrize(
    "changes", [{}, {"unroll": 3}, {"remat": None}], ids=["scan", "unroll", "keep"]
)
def test_scanned_blocks_equal_a_loop_and_remat_changes_nothing(changes):
    expected = perturbed(small_dit(remat=None))
    plain = lambda *args: dit_block_by_block(*args)
    out, gradient = run_and_gradient(perturbed(small_dit(**changes)), LATENT, T, LABEL)
    np.testing.assert_allclose(out, eqx.filter_jit(plain)(expected, LATENT, T, LABEL), atol=2e-5)
    _, reference = run_and_gradient(expected, LATENT, T, LABEL)
    leaves = lambda g: jax.tree.leaves(eqx.filter(g, eqx.is_array))
    assert tree_error(leaves(gradient), leaves(reference)) < 1e-5


MODELS = {
    "dit": (lambda: small_dit(), lambda m: m(LATENT, T, LABEL)),
    "autoencoder": (
        lambda: small_autoencoder(attention=True, patch_size=2, channels=(8, 16)),
        lambda m: judge_and_rebuild(m, IMAGE),
    ),
    "discriminator": (
        lambda: small_discriminator(layers=2),
        lambda m: m(jnp.tile(IMAGE, (1, 4, 2))),
    ),
    "classifier": (
        lambda: ConvClassifier((1, 8, 12), 5, channels=4, features=8, key=jax.random.key(0)),
        lambda m: m(IMAGE)[1],
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
# A constant added to all keys of a query drops out of the softmax.
UNSEEN = {".encoder.middle[1].key.bias", ".decoder.middle[1].key.bias"}


@each_model
def test_every_inexact_leaf_is_trainable_and_gets_a_gradient(name):
    make, call = MODELS[name]
    model = perturbed(make())

    @eqx.filter_jit
    def gradient(model):
        def loss(model):
            out = call(model)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

        return eqx.filter_grad(loss)(model)

    leaves = named_leaves(gradient(model))
    assert leaves.keys() == named_leaves(model).keys()
    silent = {path for path, leaf in leaves.items() if float(jnp.max(jnp.abs(leaf))) < 1e-5}
    assert silent == (UNSEEN if name == "autoencoder" else set())
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())


@each_model
def test_seeds_differ_and_repeat(name):
    make, _ = MODELS[name]
    first, again = named_leaves(make()), named_leaves(make())
    assert all(jnp.array_equal(first[path], again[path]) for path in first)
    weights = [leaf for leaf in first.values() if leaf.ndim > 1 and jnp.any(leaf)]
    flat = [np.asarray(w).ravel()[:8].tobytes() for w in weights]
    assert len(set(flat)) == len(flat)  # no key is used twice


def test_dit_jit_equals_eager_and_vmap_equals_a_loop():
    dit = perturbed(small_dit())
    x, t = jnp.stack([LATENT, 2 * LATENT, -LATENT]), jnp.array([0.1, 0.5, 1.0])
    label = jnp.array([0, 5, 3])
    batch = jax.jit(jax.vmap(dit))(x, t, label)
    for i in range(3):
        np.testing.assert_allclose(batch[i], run(dit, x[i], t[i], label[i]), atol=2e-5)
    np.testing.assert_allclose(dit(x[1], t[1], label[1]), batch[1], atol=2e-5)


def test_dit_in_bfloat16_is_close_to_float32():
    dit = perturbed(small_dit())
    out = run(dit, LATENT.astype(jnp.bfloat16), T, LABEL)
    exact = run(dit, LATENT, T, LABEL)
    assert out.dtype == jnp.bfloat16
    # 2^-8 a rounding; about ten of them one after the other in two sublayers a block.
    error = jnp.sqrt(jnp.mean((out.astype(jnp.float32) - exact) ** 2) / jnp.mean(exact**2))
    assert error < 10 * 2**-8


@pytest.mark.parametrize("label", [-1, 6])
def test_dit_with_a_label_outside_gives_nan(label):
    assert jnp.all(jnp.isnan(run(perturbed(small_dit()), LATENT, T, jnp.array(label))))


def test_dit_null_is_the_row_after_the_classes():
    assert int(small_dit().null) == 5


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        ((3, 5, 8), {}, "DiT: 5 x 8 does not divide by the patch size 2"),
        ((3, 4, 8), {"width": 2, "num_heads": 1}, "must be even and at least 4 for 2 axes"),
        ((3, 4, 8), {"num_heads": 3}, "width 16 does not divide into 3 heads"),
    ],
)
def test_dit_of_wrong_sizes_says_what_is_wrong(shape, changes, message, key):
    sizes = dict(patch_size=2, depth=1, width=16, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match=message):
        DiT(shape, **{**sizes, **changes}, key=key)


def test_dit_refuses_wrong_inputs_by_name():
    dit = small_dit()
    with pytest.raises(ValueError, match=r"x_t must have shape \(3, 4, 8\), got \(3, 8, 4\)"):
        dit(jnp.ones((3, 8, 4)), T, LABEL)
    with pytest.raises(ValueError, match=r"is a batch .* one example: jax\.vmap"):
        dit(LATENT[None], T, LABEL)
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        dit(LATENT, jnp.ones(2), LABEL)
    with pytest.raises(TypeCheckError, match="parameter 'label'"):
        dit(LATENT, T, jnp.array(1.0))


@pytest.mark.parametrize("latent_channels", [1, 2, 5])
@pytest.mark.parametrize("in_channels, patch_size", [(1, 1), (3, 2)])
def test_autoencoder_shapes(latent_channels, in_channels, patch_size):
    ae = small_autoencoder(
        in_channels=in_channels, latent_channels=latent_channels, patch_size=patch_size
    )
    x = jnp.zeros((in_channels, 8, 12))
    shape = (latent_channels, 4 // patch_size, 6 // patch_size)
    assert ae.factor == 2 * patch_size and ae.latent_shape(8, 12) == shape
    z = eqx.filter_eval_shape(lambda ae: ae.encode(x), ae)
    assert z.shape == shape and z.dtype == jnp.float32
    assert eqx.filter_eval_shape(lambda ae: ae.decode(jnp.zeros(shape)), ae).shape == x.shape


STATS = ((0.5, -1.0), (2.0, 0.25))


def test_autoencoder_normalises_and_inverts():
    ae = perturbed(small_autoencoder())
    shifted = ae.with_latent_stats(*STATS)
    shift, scale = (np.array(s)[:, None, None] for s in STATS)
    raw = ae.posterior(IMAGE)
    posterior = shifted.normalise(shifted.posterior(IMAGE))
    np.testing.assert_allclose(shifted.encode(IMAGE), (raw.mean - shift) * scale, atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, raw.logvar + 2 * np.log(scale), atol=1e-5)
    np.testing.assert_allclose(reconstruct(shifted, IMAGE), reconstruct(ae, IMAGE), atol=1e-5)
    assert shifted.shift == STATS[0] and ae.shift == (0.0, 0.0)
    assert jax.tree.structure(shifted) != jax.tree.structure(ae)  # jit sees the difference


def test_measured_stats_give_unit_variance():
    ae = perturbed(small_autoencoder())
    images = jax.random.uniform(jax.random.key(1), (32, 1, 8, 12), minval=-1.0)
    encode = lambda ae: jax.jit(jax.vmap(ae.encode))(images)
    raw = encode(ae)
    mean, std = jnp.mean(raw, (0, 2, 3)), jnp.std(raw, (0, 2, 3))
    stats = tuple(map(float, mean)), tuple(map(float, 1 / std))
    z = encode(ae.with_latent_stats(*stats))
    np.testing.assert_allclose(jnp.mean(z, (0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(z, (0, 2, 3)), 1, atol=1e-4)


def test_encoding_with_a_key_draws_from_the_normalised_posterior():
    ae = perturbed(small_autoencoder()).with_latent_stats(*STATS)
    posterior = ae.normalise(ae.posterior(IMAGE))
    n = 2000
    keys = jax.random.split(jax.random.key(1), n)
    z = jax.jit(jax.vmap(lambda k: ae.encode(IMAGE, key=k)))(keys)
    std = jnp.exp(0.5 * posterior.logvar)
    # 5 standard errors, for each of 48 latents.
    assert jnp.all(jnp.abs(jnp.mean(z, 0) - posterior.mean) < 5 * std / np.sqrt(n))
    np.testing.assert_allclose(jnp.std(z, 0) / std, 1, atol=5 / np.sqrt(2 * n))


def test_posterior_logvar_is_clamped():
    ae = small_autoencoder()
    where = lambda m: m.encoder.head.bias
    for value, expected in ((1e3, 20.0), (-1e3, -30.0)):
        far = eqx.tree_at(where, ae, jnp.full(4, value))
        np.testing.assert_array_equal(far.posterior(IMAGE).logvar, expected)


def test_posterior_sample_is_mean_plus_noise(key):
    mean, logvar = jnp.full((1, 2, 2), 3.0), jnp.full((1, 2, 2), 2 * np.log(0.1))
    noise = jax.random.normal(key, (1, 2, 2))
    np.testing.assert_allclose(Posterior(mean, logvar).sample(key), 3 + 0.1 * noise, rtol=1e-6)


def test_autoencoder_jit_equals_eager_and_vmap_equals_a_loop():
    ae = perturbed(small_autoencoder(attention=True))
    images = jnp.stack([IMAGE, -IMAGE])
    batch = jax.jit(jax.vmap(lambda x: ae.decode(ae.encode(x))))(images)
    for i in range(2):
        np.testing.assert_allclose(batch[i], reconstruct(ae, images[i]), atol=2e-5)
    np.testing.assert_allclose(ae.decode(ae.encode(IMAGE)), batch[0], atol=2e-5)


def test_decoder_ends_in_its_head():
    decoder = perturbed(small_autoencoder(patch_size=2)).decoder
    z = jax.random.normal(jax.random.key(0), (2, 3, 2))
    head = decoder.head(decoder.features(z))
    assert head.shape == (4, 6, 4)  # the patch's pixels are channels
    np.testing.assert_allclose(decoder(z)[0:2, 2:4, 0].reshape(-1), head[0, 1], atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ae: ae.encode(jnp.zeros((1, 7, 12))), "a 7 x 12 image does not divide by the .* 2"),
        (lambda ae: ae.encode(jnp.zeros((3, 8, 12))), "need 1 channels, got 3"),
        (lambda ae: ae.decode(jnp.zeros((1, 4, 6))), "need 2 latent channels, got 1"),
        (lambda ae: ae.decode(jnp.zeros((4, 4, 6))), "need 2 latent channels, got 4"),
        (
            lambda ae: ae.with_latent_stats((0.0,), (1.0, 1.0)),
            "need 2 shifts and 2 positive scales",
        ),
        (lambda ae: ae.with_latent_stats((0.0, 0.0), (1.0, 0.0)), "positive scales"),
    ],
)
def test_autoencoder_refuses_wrong_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_autoencoder())


def test_autoencoder_refuses_wrong_ranks_and_groups(key):
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        small_autoencoder().encode(jnp.zeros((2, 1, 8, 12)))
    with pytest.raises(ValueError, match="8 channels do not divide into 32 groups"):
        AutoencoderKL(1, 4, channels=(8, 8), blocks=1, key=key)


def test_classifier_jit_equals_eager_and_vmap_equals_a_loop(key):
    images = jax.random.normal(key, (2, 1, 16, 16))
    classifier = ConvClassifier((1, 16, 16), 5, channels=4, features=8, key=key)
    model = lambda x: classifier(x)[1]
    batch = jax.jit(jax.vmap(model))(images)
    for i in range(2):
        np.testing.assert_allclose(model(images[i]), batch[i], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_classifier_shapes(shape, key):
    net = ConvClassifier(shape, 5, channels=4, features=8, key=key)
    features, logits = net(jnp.ones(shape))
    assert features.shape == (8,) and logits.shape == (5,) and jnp.all(features >= 0)
    np.testing.assert_allclose(logits, net.head(features), rtol=1e-6)
