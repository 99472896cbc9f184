import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from eqxldm import nn
from eqxldm.nn import attention

pytestmark = pytest.mark.usefixtures("strict_dtypes")

FLOATS = [jnp.float32, jnp.bfloat16]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_linear_is_the_affine_map_over_leading_axes(key):
    layer = nn.Linear(3, 5, key=key)
    layer_bias = normal(5, seed=1)
    object.__setattr__(layer, "bias", layer_bias)
    x = normal(2, 4, 3)
    expected = np.einsum("oi,abi->abo", layer.weight, x) + np.asarray(layer_bias)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_compute_in_the_dtype_of_their_input(dtype, key):
    tokens, image = normal(5, 8).astype(dtype), normal(4, 6, 8).astype(dtype)
    for layer, x in (
        (nn.Linear(8, 4, key=key), tokens),
        (nn.SelfAttention(8, 2, key=key), tokens),
        (nn.Conv(8, 4, 3, key=key), image),
        (nn.GroupNorm(8, 4), image),
        (nn.ResnetBlock(8, 16, groups=4, key=key), image),
        (nn.AttentionBlock(8, groups=4, key=key), image),
        (nn.layer_norm, tokens),
        (nn.upsample_nearest, image),
    ):
        assert layer(x).dtype == dtype


def test_initial_weights_have_the_documented_spread(key):
    shape = (400, 200)
    n, bound = 400 * 200, np.sqrt(6 / 600)
    uniform = nn.xavier_uniform(key, shape)
    # Uniform on [-a, a] has variance a^2 / 3, whose estimate has relative error sqrt(4 / 5 n).
    assert float(jnp.max(jnp.abs(uniform))) <= bound
    assert float(jnp.var(uniform)) == pytest.approx(bound**2 / 3, rel=5 * np.sqrt(0.8 / n))
    gaussian = nn.normal(0.02)(key, shape)
    assert float(jnp.std(gaussian)) == pytest.approx(0.02, rel=5 / np.sqrt(2 * n))
    assert not jnp.any(nn.zeros(key, shape))


def test_layer_norm_equals_numpy():
    x = np.asarray(3 + 2 * normal(2, 5, 8), np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(nn.layer_norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    wide = nn.layer_norm(jnp.asarray(x, jnp.float32), norm_eps=10.0)
    np.testing.assert_allclose(wide, expected * np.sqrt(1 / (1 + 10 / x.var(-1, keepdims=True))),
                               atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("layer, shape, axes", [
    (nn.layer_norm, (8, 16, 576), (-1,)),
    (nn.GroupNorm(16, groups=2), (64, 64, 2, 8), (0, 1, 3)),
], ids=["layer", "group"])  # fmt: skip
def test_a_norm_of_bfloat16_loses_less_than_the_rounding_of_its_input(layer, shape, axes, offset):
    """E[x^2] - mean^2 cancels where the mean is large, but there x has been rounded more."""
    x = jnp.asarray(np.random.default_rng(0).normal(offset, 1.0, shape), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(axes, keepdims=True)
    exact /= np.sqrt(np.mean(exact**2, axes, keepdims=True) + 1e-6)
    written = 2**-8 * np.maximum(np.abs(exact), 2**-8)  # rounding of the result
    read = 2**-9 * offset  # of x, whose deviation is 1
    result = np.asarray(layer(x.reshape(*shape[:2], -1)), np.float64).reshape(shape)
    assert (np.abs(result - exact) <= written + read / 16).all()


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_equals_numpy(groups, offset):
    x = np.asarray(offset + normal(4, 6, 8), np.float64)
    grouped = x.reshape(4, 6, groups, 8 // groups)
    mean, variance = (f(grouped, axis=(0, 1, 3), keepdims=True) for f in (np.mean, np.var))
    scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    norm = nn.GroupNorm(8, groups)
    object.__setattr__(norm, "scale", jnp.asarray(scale, jnp.float32))
    object.__setattr__(norm, "bias", jnp.asarray(bias, jnp.float32))
    # A mean of 100 is represented to 100 * 2^-24 = 6e-6.
    np.testing.assert_allclose(
        norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-5 + 4e-7 * offset
    )


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2), (4, 2), (5, 1)])
@pytest.mark.parametrize("padding", [None, ((1, 0), (2, 1))])
def test_conv_equals_its_formula(size, stride, padding, key):
    conv = nn.Conv(2, 3, size, stride=stride, padding=padding, key=key)
    object.__setattr__(conv, "bias", jnp.array([0.5, -1.0, 2.0]))
    x = normal(6, 8, 2, seed=1)
    padded = np.pad(np.asarray(x, np.float64), (*conv.padding, (0, 0)))
    height, width = ((n - size) // stride + 1 for n in padded.shape[:2])
    expected = np.empty((height, width, 3))
    for i in range(height):
        for j in range(width):
            patch_size = padded[stride * i : stride * i + size, stride * j : stride * j + size]
            expected[i, j] = np.einsum("pqc,pqco->o", patch_size, conv.weight) + np.asarray(
                conv.bias
            )
    if padding is None:
        assert (height, width) == (6 // stride, 8 // stride)
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


def test_conv_keeps_unit_variance(key):
    conv = nn.Conv(64, 64, 3, gain=0.5, key=key)
    x = normal(32, 32, 64, seed=1)
    inner = conv(x)[1:-1, 1:-1]  # away from the padding
    # Given the weights, an output channel's variance is their sum of squares: 576 squared
    # uniforms, each of relative spread sqrt(4 / 5); 64 channels average it further.
    weights = np.sqrt(0.8 / (576 * 64))
    pixels = np.sqrt(2 / (32 * 32))
    assert float(jnp.var(inner)) == pytest.approx(0.25, rel=5 * (weights + pixels))


def test_space_and_depth_are_inverse_and_laid_out_row_by_row():
    x = normal(4, 6, 3)
    folded = nn.space_to_depth(x, 2)
    assert folded.shape == (2, 3, 12)
    np.testing.assert_array_equal(folded[1, 2], x[2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(nn.depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(nn.space_to_depth(x, 1), x)


def test_upsampling_repeats_pixels():
    x = normal(2, 3, 2)
    y = nn.upsample_nearest(x)
    for i in range(2):
        for j in range(2):
            np.testing.assert_array_equal(y[i::2, j::2], x)


def test_patchify_takes_channels_first_and_unpatchify_channels_last():
    x = normal(3, 4, 8)
    tokens = nn.patchify(x, 2)
    assert tokens.shape == (8, 12)
    np.testing.assert_array_equal(tokens[5], x[:, 2:4, 2:4].reshape(-1))  # row 1, column 1
    tokens = normal(8, 12, seed=1)
    image = nn.unpatchify(tokens, (4, 8), 2)
    patch_size = np.moveaxis(tokens[5].reshape(2, 2, 3), -1, 0)
    np.testing.assert_array_equal(image[:, 2:4, 2:4], patch_size)


def test_sinusoidal_equals_its_formula():
    w = 10_000.0 ** -(np.arange(4) / 4)
    found = nn.sinusoidal(jnp.array(3.5), 8)
    np.testing.assert_allclose(found, np.concatenate([np.cos(3.5 * w), np.sin(3.5 * w)]), atol=1e-6)
    assert found.dtype == jnp.float32
    near, far = (nn.sinusoidal(jnp.array(p), 8) for p in (998.0, 999.0))
    assert jnp.max(jnp.abs(near - far)) > 0.1


def test_positions_equal_their_formula():
    positions = nn.sincos_positions((2, 3), 8)
    w = np.array([1.0, 10_000.0**-0.5])
    for row in range(2):
        for column in range(3):
            parts = [f(p * w) for p in (column, row) for f in (np.sin, np.cos)]
            np.testing.assert_allclose(
                positions[3 * row + column], np.concatenate(parts), atol=1e-14
            )
    assert len(np.unique(positions.round(8), axis=0)) == 6


def test_time_embedding_tells_neighbouring_timesteps_apart(key):
    embedding = nn.TimeEmbedding(16, key=key)
    s = nn.sinusoidal(jnp.array(499.0), 256)  # the timestep at t = 0.5 of a table of 1000
    hidden = jax.nn.silu(embedding.linear1.weight @ s)
    np.testing.assert_allclose(
        embedding(jnp.array(0.5)), embedding.linear2.weight @ hidden, atol=1e-6
    )
    assert not np.allclose(embedding(jnp.array(0.998)), embedding(jnp.array(0.999)), atol=1e-6)


@pytest.mark.parametrize("label", [-1, -7, 6, 100])
def test_a_label_outside_gives_nan(label, key):
    embedding = nn.LabelEmbedding(5, 8, key=key)
    assert jnp.all(jnp.isnan(jax.jit(embedding.__call__)(jnp.array(label))))


def test_label_rows(key):
    embedding = nn.LabelEmbedding(5, 8, key=key)
    assert embedding.table.shape == (6, 8) and int(embedding.null) == 5
    for label in range(6):
        np.testing.assert_array_equal(embedding(jnp.array(label)), embedding.table[label])


def naive_attention(q, k, v):
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h]
    return out


def test_attention_equals_its_formula():
    q, k, v = (normal(n, 2, 4, seed=s) for s, n in enumerate((5, 7, 7)))
    expected = naive_attention(*(np.asarray(a, np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(nn.attend(q, k, v), expected, atol=1e-6)


def test_self_attention_is_equivariant_to_the_order_of_tokens_and_splits_heads(key):
    layer = nn.SelfAttention(8, 2, key=key)
    x = normal(5, 8)
    order = jnp.array([3, 1, 4, 0, 2])
    np.testing.assert_allclose(layer(x[order]), layer(x)[order], atol=1e-5)
    q, k, v = (np.asarray(x @ weight.T) for weight in layer.qkv.weight)
    num_heads = naive_attention(*(a.reshape(5, 2, 4) for a in (q, k, v))).reshape(5, 8)
    np.testing.assert_allclose(layer(x), num_heads @ layer.proj.weight.T, atol=1e-5)


def test_attention_is_the_same_function_on_every_platform():
    """XLA:CPU gets other transposes; here both run, values and gradients."""
    q, k, v = normal(5, 2, 8), normal(7, 2, 8, seed=1), normal(7, 2, 8, seed=2)
    both = [
        jax.jit(jax.value_and_grad(lambda a, f=f: jnp.sum(f(*a) ** 2)))((q, k, v))
        for f in (nn.attend, attention.attend_plainly)
    ]
    for here, elsewhere in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(here, elsewhere, rtol=1e-5, atol=1e-5)


def test_frequencies_of_other_networks():
    i = np.arange(4)
    angles = 37.0 * 10_000.0 ** (-i / 3)
    found = nn.sinusoidal(jnp.array(37.0), 8, freq_shift=1, sin_first=True)  # DDPM's
    np.testing.assert_allclose(found, [*np.sin(angles), *np.cos(angles)], atol=4e-6)


def test_attention_block_starts_as_the_identity(key):
    x = normal(4, 6, 8)
    np.testing.assert_array_equal(nn.AttentionBlock(8, groups=4, key=key)(x), x)


def test_modulation_starts_at_zero_and_modulate_is_affine(key):
    assert not jnp.any(nn.Modulation(8, 6, key=key)(normal(8)))
    x, shift, scale = normal(5, 8), normal(8, seed=1), normal(8, seed=2)
    np.testing.assert_allclose(nn.modulate(x, shift, scale), x * (1 + scale) + shift, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda k: nn.SelfAttention(8, 3, key=k), "width 8 does not divide into 3 heads"),
        (lambda k: nn.GroupNorm(8, 3), "8 channels do not divide into 3 groups"),
        (lambda k: nn.sinusoidal(jnp.array(0.0), 7), "size must be even, got 7"),
        (lambda k: nn.sinusoidal(jnp.array(0.0), 2, freq_shift=1), "size must be above 2 with fre"),
        (lambda k: nn.with_fields(nn.GroupNorm(8, 4), eps=1.0), "GroupNorm has no field eps"),
        (
            lambda k: nn.sincos_positions((2, 2), 2),
            "size must be even and at least 4 for 2 axes, got 2",
        ),
        (lambda k: nn.space_to_depth(jnp.ones((3, 4, 1)), 2), "3 x 4 does not divide by 2"),
        (lambda k: nn.depth_to_space(jnp.ones((3, 4, 6)), 2), "6 channels do not divide by 4"),
        (
            lambda k: nn.patchify(jnp.ones((1, 4, 5)), 2),
            "4 x 5 does not divide by the patch size 2",
        ),
    ],
)
def test_wrong_sizes_say_what_is_wrong(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)


@pytest.mark.parametrize(
    "call, parameter",
    [
        (
            lambda k: nn.attend(jnp.ones((4, 2, 8)), jnp.ones((6, 2, 8)), jnp.ones((5, 2, 8))),
            "value",
        ),
        (lambda k: nn.modulate(jnp.ones((4, 8)), jnp.ones(8), jnp.ones(4)), "scale"),
        (lambda k: nn.patchify(jnp.ones((4, 8), int), 2), "x"),
        (lambda k: nn.GroupNorm(8, 4)(jnp.ones((4, 8))), "x"),
        (lambda k: nn.Conv(3, 4, 3, key=k)(jnp.ones((1, 4, 4, 3))), "x"),
        (lambda k: nn.LabelEmbedding(5, 8, key=k)(jnp.array(1.0)), "label"),
        (lambda k: nn.TimeEmbedding(8, key=k)(jnp.ones(3)), "t"),
        (lambda k: nn.SelfAttention(8, 2, key=k)(jnp.ones((2, 5, 8))), "x"),
    ],
)
def test_wrong_shapes_name_the_argument(call, parameter, key):
    with pytest.raises(TypeCheckError, match=f"parameter '{parameter}'"):
        call(key)
