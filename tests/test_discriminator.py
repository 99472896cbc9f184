"""The PatchGAN discriminator, its norms, and the spectral norm."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

from eqxldm.models import PatchDiscriminator, patch_layers
from eqxldm.nn import Conv, SpectralConv, spectral_norm

from helpers import named_leaves, perturbed, small_discriminator

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SPECTRAL = dict(conv=SpectralConv, norm=eqx.nn.Identity)


def field_of(layers):
    """By the recursion from the last layer back: `field = stride * (field - 1) + 4`."""
    field = 1
    for stride in (1, 1, *([2] * layers)):
        field = stride * (field - 1) + 4
    return field


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_of_the_discriminator(layers, field, key):
    # The norms look at the whole image; the field is that of the convolutions.
    disc = PatchDiscriminator(1, channels=2, layers=layers, norm=eqx.nn.Identity, key=key)
    size = 2 * field
    x = jax.random.normal(key, (1, size, size))
    logits = eqx.filter_eval_shape(disc, x).shape
    middle = logits[0] // 2
    gradient = jax.jit(jax.grad(lambda x: disc(x)[middle, middle]))(x)[0]
    for axis in (0, 1):
        seen = np.flatnonzero(jnp.any(gradient != 0, axis=axis))
        assert seen[-1] - seen[0] + 1 == field == field_of(layers)


@given(height=st.integers(16, 600), width=st.integers(16, 600))
def test_the_depth_is_the_largest_whose_patch_fits(height, width):
    layers, small = patch_layers(height, width), min(height, width)
    assert field_of(layers) <= small
    assert layers == 3 or field_of(layers + 1) > small
    make = lambda: PatchDiscriminator(
        1, channels=1, layers=None, image_size=(height, width), groups=1, key=jax.random.key(0)
    )
    logits = eqx.filter_eval_shape(lambda: make()(jnp.zeros((1, height, width)))).shape
    assert logits == (height // 2**layers - 2, width // 2**layers - 2) and min(logits) >= 6


def test_the_depth_of_an_image_that_is_too_small(key):
    with pytest.raises(ValueError, match="16 x 16 pixels and does not fit into a 15 x 99 image"):
        patch_layers(15, 99)
    with pytest.raises(ValueError, match=r"layers=None .* pass its size as image_size"):
        PatchDiscriminator(1, layers=None, key=key)


def test_discriminator_judges_patches_of_any_size():
    disc = small_discriminator()
    for height, width in ((16, 16), (16, 24)):
        logits = eqx.filter_eval_shape(disc, jnp.zeros((1, height, width)))
        assert logits.shape == (height // 2 - 2, width // 2 - 2)


def test_discriminator_refuses_wrong_arguments(key):
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        PatchDiscriminator(1, layers=0, key=key)
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        small_discriminator()(jnp.zeros((16, 16)))


def test_the_parameters_are_where_checkpoints_have_them(key):
    disc = small_discriminator()
    convs = [f".{c}.{kind}" for c in ("convs[0]", "convs[1]") for kind in ("weight", "bias")]
    norms = [".norms[0].scale", ".norms[0].bias"]
    assert [*named_leaves(disc)] == [*convs, *norms, ".head.weight", ".head.bias"]
    full = eqx.filter_eval_shape(PatchDiscriminator, 3, key=key)
    assert [c.weight.shape[-1] for c in [*full.convs, full.head]] == [64, 128, 256, 512, 1]
    assert sum(leaf.size for leaf in jax.tree.leaves(full)) == 2_766_529


@pytest.mark.parametrize("options", [dict(groups=4), SPECTRAL], ids=["groups", "spectral"])
def test_every_parameter_gets_a_gradient_and_a_batch_is_a_loop(options, key):
    disc = perturbed(PatchDiscriminator(1, channels=8, layers=1, **options, key=key))
    images = jax.random.normal(key, (2, 1, 12, 16))

    @eqx.filter_jit
    def logits_and_gradient(disc):
        def loss(disc):
            logits = jax.vmap(disc)(images)
            return jnp.sum(logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))), logits

        gradient, logits = eqx.filter_grad(loss, has_aux=True)(disc)
        return logits, gradient

    logits, gradient = logits_and_gradient(disc)
    leaves = named_leaves(gradient)
    assert leaves.keys() == named_leaves(disc).keys()
    assert all(float(jnp.max(jnp.abs(leaf))) > 1e-5 for leaf in leaves.values())
    for i in range(2):  # outside jit
        np.testing.assert_allclose(disc(images[i]), logits[i], atol=1e-4)


def test_norm_makes_every_norm(key):
    widths = []

    def norm(width):
        widths.append(width)
        return eqx.nn.Identity()

    disc = PatchDiscriminator(1, channels=2, layers=4, norm=norm, key=key)
    assert widths == [4, 8, 16, 16] and len(disc.norms) == 4


# The spectral norm.


def matrix_of(shape, values, seed=0):
    """A matrix with these singular values, the others 0."""
    rng = np.random.default_rng(seed)
    k = len(values)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0][:, :k] for n in shape)
    return (left * np.asarray(values)) @ right.T


norm_and_gradient = jax.jit(jax.value_and_grad(lambda w: spectral_norm(w)))


@given(
    shape=st.sampled_from([(48, 8), (8, 48), (16, 16), (9, 1)]),
    rest=st.lists(st.floats(0, 1), max_size=7),
    scale=st.integers(-30, 30).map(lambda k: 10.0**k),
    seed=st.integers(0, 99),
)
def test_spectral_norm_is_the_largest_singular_value(shape, rest, scale, seed):
    values = [1.0, *rest][: min(shape)]
    w = scale * matrix_of(shape, values, seed)
    sigma, gradient = norm_and_gradient(jnp.asarray(w, jnp.float32))
    assert -1e-3 < float(sigma) / scale - 1 < 1e-5
    # u v^T with unit vectors, and sigma is homogeneous: sigma = <W, d sigma / dW>.
    assert float(jnp.linalg.norm(gradient)) == pytest.approx(1, rel=1e-5)
    assert np.sum(w * np.asarray(gradient)) == pytest.approx(float(sigma), rel=1e-4)


@pytest.mark.parametrize("n", [64, 256])
def test_spectral_norm_with_the_worst_gaps(n):
    """All other singular values alike and close, and the first vector far from every axis."""
    first = np.concatenate([np.ones((n, 1)), np.eye(n)[:, 1:]], 1)
    basis = np.linalg.qr(first)[0]
    for gap in 10.0 ** np.arange(-5, 0, 0.25):
        w = (basis * np.array([1.0] + [1 - gap] * (n - 1))) @ basis.T
        assert -1e-3 < float(norm_and_gradient(jnp.asarray(w, jnp.float32))[0]) - 1 < 1e-5


@pytest.mark.parametrize("where", range(3))
def test_spectral_norm_of_axes(where):
    """Singular vectors that all but one first vector are orthogonal to."""
    values = np.ones(3, np.float32)
    values[where] = -2
    assert float(norm_and_gradient(jnp.diag(jnp.asarray(values)))[0]) == 2


def test_gradient_of_the_spectral_norm_is_that_of_the_svd(key):
    w = jax.random.normal(key, (48, 8))
    expected = jax.grad(lambda w: jnp.linalg.svd(w, compute_uv=False)[0])(w)
    np.testing.assert_allclose(norm_and_gradient(w)[1], expected, atol=1e-4)


def test_spectral_norm_of_zero_is_zero_and_so_is_its_gradient():
    sigma, gradient = norm_and_gradient(jnp.zeros((48, 8)))
    assert float(sigma) == 0 and not jnp.any(gradient)


@pytest.mark.parametrize("stride, padding", [(1, None), (2, ((1, 1), (1, 1)))])
def test_spectral_convolution_is_the_convolution_by_a_normalised_kernel(stride, padding, key):
    options = dict(stride=stride, padding=padding, key=key)
    spectral = perturbed(SpectralConv(3, 8, 4, **options))
    weight = np.asarray(spectral.conv.weight, np.float64)
    weight = weight / np.linalg.norm(weight.reshape(-1, 8), 2)
    where = lambda c: (c.weight, c.bias)
    plain = eqx.tree_at(
        where, Conv(3, 8, 4, **options), (jnp.asarray(weight, jnp.float32), spectral.conv.bias)
    )
    x = jax.random.normal(key, (8, 10, 3))
    call = eqx.filter_jit(lambda conv, x: conv(x))
    out = call(spectral, x)
    np.testing.assert_allclose(out, plain(x), rtol=1e-3, atol=1e-3)
    larger = eqx.tree_at(lambda c: c.conv.weight, spectral, 1e6 * spectral.conv.weight)
    np.testing.assert_allclose(call(larger, x), out, atol=1e-4)
    half = call(spectral, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), out, atol=0.05)


def test_spectral_convolution_with_zero_weights(key):
    conv = SpectralConv(3, 8, 4, key=key)
    conv = eqx.tree_at(lambda c: c.conv.weight, conv, jnp.zeros_like(conv.conv.weight))
    loss = lambda conv: jnp.sum(conv(jnp.ones((8, 8, 3))))
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(conv)
    assert float(value) == 0
    for leaf in jax.tree.leaves(gradient):
        assert bool(jnp.isfinite(leaf).all() & jnp.any(leaf != 0)) and float(jnp.max(leaf)) < 1e3
