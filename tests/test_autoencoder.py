"""AutoencoderKL against diffusers, its published sizes, and slices and tiles of it."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm.models import (
    AutoencoderKL,
    decode_sliced,
    decode_tiled,
    encode_sliced,
    encode_tiled,
    kl_f4,
    kl_f8,
    kl_f16,
)
from eqxldm.models.tiling import tile_starts, tile_weights
from eqxldm.nn import GroupNorm, upsample_nearest

from helpers import named_leaves, perturbed, reference, relative_error, small_autoencoder

SD_SIZES = dict(quant_convs=True, attention=True)


def diffusers_names(autoencoder):
    """`{our path: (diffusers' name, transform of diffusers' array to ours)}`, one a parameter.

    Of an `AutoencoderKL` with `DownEncoderBlock2D` and `UpDecoderBlock2D`.
    """
    same = lambda a: a
    hwio = lambda a: a.transpose(2, 3, 1, 0)
    names = {}

    def norm(ours, theirs):
        names[f"{ours}.scale"] = f"{theirs}.weight", same
        names[f"{ours}.bias"] = f"{theirs}.bias", same

    def conv(ours, theirs):
        names[f"{ours}.weight"] = f"{theirs}.weight", hwio
        names[f"{ours}.bias"] = f"{theirs}.bias", same

    def linear(ours, theirs):
        names[f"{ours}.weight"] = f"{theirs}.weight", same
        names[f"{ours}.bias"] = f"{theirs}.bias", same

    def resnet(block, ours, theirs):
        for part in ("1", "2"):
            norm(f"{ours}.norm{part}", f"{theirs}.norm{part}")
            conv(f"{ours}.conv{part}", f"{theirs}.conv{part}")
        if block.shortcut is not None:
            conv(f"{ours}.shortcut", f"{theirs}.conv_shortcut")

    def attention(ours, theirs):
        norm(f"{ours}.norm", f"{theirs}.group_norm")
        for part, name in {"query": "q", "key": "k", "value": "v"}.items():
            linear(f"{ours}.{part}", f"{theirs}.to_{name}")
        linear(f"{ours}.out", f"{theirs}.to_out.0")

    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    quant_convs = not hasattr(encoder.head, "weight")  # then head and stem are pairs
    conv(".encoder.stem", "encoder.conv_in")
    conv(".encoder.head" + ".first" * quant_convs, "encoder.conv_out")
    conv(".decoder.stem" + ".second" * quant_convs, "decoder.conv_in")
    conv(".decoder.head", "decoder.conv_out")
    if quant_convs:
        conv(".encoder.head.second", "quant_conv")
        conv(".decoder.stem.first", "post_quant_conv")
    for half, model, theirs, resampling in (
        ("encoder", encoder, "down_blocks", "downsamplers"),
        ("decoder", decoder, "up_blocks", "upsamplers"),
    ):
        norm(f".{half}.norm", f"{half}.conv_norm_out")
        for i, level in enumerate(model.levels):
            for j, block in enumerate(level):
                resnet(block, f".{half}.levels[{i}][{j}]", f"{half}.{theirs}.{i}.resnets.{j}")
        for i in range(len(model.levels) - 1):
            ours = f".{half}.{'downs' if half == 'encoder' else 'ups'}[{i}]"
            conv(ours, f"{half}.{theirs}.{i}.{resampling}.0.conv")
        last = len(model.middle) - 1
        for j, at in enumerate((0, last)):
            resnet(model.middle[at], f".{half}.middle[{at}]", f"{half}.mid_block.resnets.{j}")
        if last == 2:
            attention(f".{half}.middle[1]", f"{half}.mid_block.attentions.0")
    return names


def filled(autoencoder, arrays):
    """The autoencoder with the parameters of diffusers' `{name: array}`."""
    names = diffusers_names(autoencoder)

    def take(path, leaf):
        name, transform = names[jax.tree_util.keystr(path)]
        new = jnp.asarray(transform(arrays[name]), jnp.float32)
        assert new.shape == leaf.shape, name
        return new

    params, static = eqx.partition(autoencoder, eqx.is_inexact_array)
    return eqx.combine(jax.tree_util.tree_map_with_path(take, params), static)


FIXTURES = {
    "attention": (
        (3, 4),
        dict(channels=(4, 8, 8), blocks=1, decoder_blocks=2, groups=2, **SD_SIZES),
    ),
    "plain": ((1, 2), dict(channels=(4, 8), blocks=2, decoder_blocks=3, groups=2)),
}
each_fixture = pytest.mark.parametrize("name", FIXTURES)


def fixture(name):
    """Our autoencoder with the file's weights, the file, and its weights and gradients by name."""
    sizes, options = FIXTURES[name]
    file = reference(f"autoencoder_{name}")
    weights = {k: file[k] for k in file.files if file[k].dtype == np.float16}
    ends = np.cumsum([w.size for w in weights.values()])[:-1]
    flat = np.split(file["grad"], ends)
    gradients = {k: g.reshape(w.shape) for (k, w), g in zip(weights.items(), flat, strict=True)}
    ae = AutoencoderKL(*sizes, **options, key=jax.random.key(0))
    return filled(ae, weights), file, weights, gradients


@each_fixture
def test_every_tensor_of_diffusers_is_used_once(name):
    ae, _, weights, _ = fixture(name)
    names = diffusers_names(ae)
    assert set(names) == set(named_leaves(ae))
    assert sorted(theirs for theirs, _ in names.values()) == sorted(weights)


@each_fixture
def test_parity_with_diffusers(name, x64):
    """Computed in float64, so that what is left is the rounding of the file's own float32."""
    ae, file, _, expected = fixture(name)
    ae = jax.tree.map(lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, ae)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(ae_and_x):
        ae, x = ae_and_x
        posterior = ae.posterior(x)
        moments = jnp.concatenate([posterior.mean, posterior.logvar])
        image = ae.decode(posterior.mean)
        probe = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        return probe(image) + probe(moments), (moments, image)

    (_, (moments, image)), (gradient, x_gradient) = run((ae, jnp.asarray(file["x"], jnp.float64)))
    errors = {
        "moments": relative_error(moments, file["moments"]),
        "image": relative_error(image, file["image"]),
        "grad.x": relative_error(x_gradient, file["grad.x"]),
    }
    # A constant on all keys of a query drops out of the softmax: that gradient is rounding.
    scale = max(np.max(np.abs(g)) for g in expected.values())
    names, ours = diffusers_names(ae), named_leaves(gradient)
    for path, (theirs, transform) in names.items():
        if "to_k.bias" not in theirs:
            errors[theirs] = relative_error(ours[path], transform(expected[theirs]))
        assert np.max(np.abs(ours[path] - transform(expected[theirs]))) <= 2e-5 * scale, theirs
    assert {k: e for k, e in errors.items() if not e <= 2e-5} == {}


def sizes_of(tree):
    """`{path: size}` of an autoencoder of shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves}


def test_published_sizes():
    key = jax.random.key(0)
    ae = eqx.filter_eval_shape(kl_f8, key=key)
    assert sum(sizes_of(ae).values()) == 83_653_863
    assert set(ae.scale) == {0.18215} and set(ae.shift) == {0.0}
    names = [theirs for theirs, _ in diffusers_names(ae).values()]
    assert set(diffusers_names(ae)) == set(sizes_of(ae))
    assert len(set(names)) == len(names) == 248
    for make, shape in ((kl_f4, (3, 64, 96)), (kl_f8, (4, 32, 48)), (kl_f16, (16, 16, 24))):
        ae = eqx.filter_eval_shape(make, key=key)
        z = eqx.filter_eval_shape(lambda ae: ae.encode(jnp.zeros((3, 256, 384))), ae)
        assert z.shape == ae.latent_shape(256, 384) == shape
        image = eqx.filter_eval_shape(lambda ae, z=z: ae.decode(jnp.zeros(z.shape)), ae)
        assert image.shape == (3, 256, 384)


def test_latent_stats_may_be_numbers():
    ae = small_autoencoder()
    x = jnp.ones((1, 8, 12))
    both = ae.with_latent_stats(1, 0.5), ae.with_latent_stats((1.0, 1.0), 0.5)
    assert both[0].shift == both[1].shift == (1.0, 1.0)
    assert both[0].scale == both[1].scale == (0.5, 0.5)
    np.testing.assert_allclose(both[0].encode(x), (ae.encode(x) - 1) * 0.5, atol=1e-6)


def test_slices_equal_the_batch(key):
    ae = perturbed(small_autoencoder()).with_latent_stats(0.3, 2)
    x = jax.random.normal(key, (5, 1, 8, 12))
    encode = eqx.filter_jit(lambda ae, x: jax.vmap(ae.encode)(x))
    draw = lambda ae, x, key: jax.vmap(lambda x, k: ae.encode(x, key=k))(x, key)
    z, drawn = encode(ae, x), eqx.filter_jit(draw)(ae, x, jax.random.split(key, 5))
    images = eqx.filter_jit(lambda ae, z: jax.vmap(ae.decode)(z))(ae, z)
    for size in (2, 7):
        np.testing.assert_allclose(encode_sliced(ae, x, size), z, atol=2e-5)
        np.testing.assert_allclose(decode_sliced(ae, z, size), images, atol=2e-5)
    np.testing.assert_allclose(encode_sliced(ae, x, 2, key=key), drawn, atol=2e-5)


@pytest.mark.parametrize("tile, overlap", [(1, 0), (7, 0), (8, 2), (8, 4), (9, 7)])
def test_tiles_cover_overlap_and_sum_to_one(tile, overlap):
    for size in range(1, 40):
        starts, side = tile_starts(size, tile, overlap), min(size, tile)
        assert starts[0] == 0 and starts[-1] + side == size
        if len(starts) > 1:
            assert min(np.diff(starts)) >= 1 and max(np.diff(starts)) <= side - overlap
            one_less = (len(starts) - 2) * (side - overlap) + side
            assert one_less < size  # too few
        weights = tile_weights(starts, side)
        total = np.zeros(size)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + side] += weight
        np.testing.assert_allclose(total, 1, rtol=1e-12)
        assert np.all(weights > 0)


def local(factor=2):
    """An autoencoder whose halves look at one cell: its tiles must give what the whole gives."""
    ae = small_autoencoder(latent_channels=1)
    assert ae.factor == factor
    pool = lambda x: x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 1).mean((1, 3))
    encoder = lambda x: jnp.concatenate([pool(x), pool(x) ** 2], -1)
    halves = lambda m: (m.encoder, m.decoder)
    return eqx.tree_at(halves, ae, (encoder, upsample_nearest)).with_latent_stats(0.5, 2.0)


@pytest.mark.parametrize(
    "height, width, tile, overlap",
    [(40, 26, 16, 4), (16, 40, 16, 8), (10, 50, 16, 0), (26, 26, 16, 14), (18, 24, 16, 2)],
)
def test_tiles_of_a_local_function_equal_the_whole(height, width, tile, overlap):
    ae, sizes = local(), dict(tile=tile, overlap=overlap)
    x = jax.random.normal(jax.random.key(0), (1, height, width))
    z = ae.encode(x)
    np.testing.assert_allclose(encode_tiled(ae, x, **sizes), z, atol=1e-5)
    np.testing.assert_allclose(decode_tiled(ae, z, **sizes), ae.decode(z), atol=1e-5)
    key = jax.random.key(1)
    drawn = encode_tiled(ae, x, **sizes, key=key)
    np.testing.assert_allclose(drawn, ae.encode(x, key=key), atol=1e-5)


def test_a_tile_that_covers_the_image_changes_nothing():
    ae = perturbed(small_autoencoder())
    x = jax.random.normal(jax.random.key(0), (1, 8, 12))
    z = ae.encode(x)
    np.testing.assert_array_equal(encode_tiled(ae, x, tile=12, overlap=4), z)
    np.testing.assert_array_equal(decode_tiled(ae, z, tile=12, overlap=4), ae.decode(z))


def smooth(shape, seed=0, wave=40.0):
    """A random image of a few long waves with values in [-1, 1]."""
    rng = np.random.default_rng(seed)
    _, h, w = shape
    y, x = np.mgrid[:h, :w]
    image = np.zeros(shape)
    for channel in image:
        for _ in range(8):
            ky, kx = rng.normal(size=2) * 2 * np.pi / wave
            channel += np.cos(ky * y + kx * x + rng.uniform(0, 2 * np.pi))
    return jnp.asarray(image / np.abs(image).max(), jnp.float32)


HEIGHT, WIDTH = 128, 192
TILES = dict(tile=64, overlap=32)


def tiles_of(size, overlap=TILES["overlap"]):
    """The first pixel of every tile along one axis."""
    return [2 * s for s in tile_starts(size // 2, TILES["tile"] // 2, overlap // 2)]


def without_norms(ae):
    norms = lambda m: [
        n for n in jax.tree.leaves(m, is_leaf=lambda n: isinstance(n, GroupNorm))
        if isinstance(n, GroupNorm)
    ]  # fmt: skip
    return eqx.tree_at(norms, ae, [lambda x: x] * len(norms(ae)))


encode = eqx.filter_jit(lambda ae, x: ae.encode(x))
whole = eqx.filter_jit(lambda ae, z: ae.decode(z))
tiled = eqx.filter_jit(lambda ae, z: decode_tiled(ae, z, **TILES))
cut = eqx.filter_jit(lambda ae, z: decode_tiled(ae, z, tile=TILES["tile"], overlap=0))


def edge_error(ae, z, full):
    """The largest difference between a tile decoded alone and the same place of the whole."""
    error, side = 0.0, TILES["tile"]
    for top in tiles_of(HEIGHT):
        for left in tiles_of(WIDTH):
            alone = whole(ae, z[:, top // 2 : (top + side) // 2, left // 2 : (left + side) // 2])
            there = full[:, top : top + side, left : left + side]
            error = max(error, float(jnp.max(jnp.abs(alone - there))))
    return error


def test_without_norms_tiles_differ_near_their_borders_and_by_a_bounded_amount():
    """`|y - full|(p) <= sum_i w_i(p) [p sees a border of tile i] max_i |y_i - full|`."""
    ae = without_norms(perturbed(small_autoencoder()))
    z = encode(ae, smooth((1, HEIGHT, WIDTH)))
    full, blended = whole(ae, z), tiled(ae, z)
    # Convolutions from the latent to the pixel: stem, middle and first level on cells of 2 x 2,
    # then one after the upsampling, the second level and the head.
    reach = 2 * (1 + 4 + 2) + (1 + 2 + 1)
    near = []
    for size in (HEIGHT, WIDTH):
        starts, at, weight = tiles_of(size), np.arange(size), np.zeros(size)
        shared = TILES["tile"] - np.diff(starts)
        for start, width in zip(starts[1:], shared, strict=True):
            weight += ((at >= start) & (at < start + reach)) * (at - start + 0.5) / width
        for start, width in zip(starts[:-1], shared, strict=True):
            end = start + TILES["tile"]
            weight += ((at < end) & (at >= end - reach)) * (end - at - 0.5) / width
        near.append(weight)
    error, rounding = edge_error(ae, z, full), 1e-5 * float(jnp.max(jnp.abs(full)))
    bound = error * (near[0][:, None] + near[1])
    assert np.any(bound == 0) and error > 100 * rounding
    assert np.all(np.abs(blended - full)[0] <= bound + rounding)


def jumps(image, axis, overlap):
    """The mean jump from row to row (axis 1) or column to column, at tile borders and elsewhere.

    Elsewhere: between latent cells like the borders, and out of sight of the image's own border.
    """
    across = np.abs(np.diff(np.asarray(image), axis=axis)).mean(axis=(0, 3 - axis))
    starts, size, side = tiles_of(image.shape[axis], overlap), image.shape[axis], TILES["tile"]
    borders = sorted({s - 1 for s in starts[1:]} | {s + side - 1 for s in starts[:-1]})
    rest = [p for p in range(19, size - 18, 2) if p not in borders]
    return across[borders], across[rest]


@pytest.mark.parametrize("attention", [False, True])
def test_tiles_show_no_seams(attention):
    ae = perturbed(small_autoencoder(attention=attention), size=0.02)
    z = encode(ae, smooth((1, HEIGHT, WIDTH)))
    full, blended, hard = whole(ae, z), tiled(ae, z), cut(ae, z)
    # A blend is between its tiles. Measured: 0.21 of the standard deviation, 0.40 with attention;
    # a random network depends on its norms and on the border much more than a trained one (0.08).
    difference = np.asarray(blended - full)
    assert np.max(np.abs(difference)) <= 1.0001 * edge_error(ae, z, full)
    assert np.sqrt(np.mean(difference**2)) < 0.5 * np.std(full)
    for axis in (1, 2):
        for image in (blended, blended - full):
            border, rest = jumps(image, axis, TILES["overlap"])
            assert border.mean() < 1.15 * rest.mean() and border.max() <= rest.max()
        # The measure sees the seams that are there without blending.
        border, rest = jumps(hard - full, axis, 0)
        assert border.mean() > 3 * rest.mean()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ae: encode_tiled(ae, jnp.zeros((1, 9, 12)), tile=8, overlap=4), "9 x 12 image"),
        (lambda ae: encode_tiled(ae, jnp.zeros((2, 16, 12)), tile=8, overlap=4), "1 channels"),
        (lambda ae: decode_tiled(ae, jnp.zeros((1, 8, 8)), tile=8, overlap=4), "2 latent channels"),
        (lambda ae: encode_tiled(ae, jnp.zeros((1, 8, 12)), tile=7, overlap=4), "tile 7 and"),
        (
            lambda ae: decode_tiled(ae, jnp.zeros((2, 8, 8)), tile=8, overlap=3),
            "overlap 3 .* factor 2",
        ),
        (lambda ae: decode_tiled(ae, jnp.zeros((2, 8, 8)), tile=0, overlap=0), "tile 0"),
        (lambda ae: decode_tiled(ae, jnp.zeros((2, 8, 8)), tile=8, overlap=-2), "overlap -2"),
        (lambda ae: decode_tiled(ae, jnp.zeros((2, 8, 8)), tile=8, overlap=8), "smaller than tile"),
        (lambda ae: decode_sliced(ae, jnp.zeros((2, 2, 8, 8)), 0), "at least 1 example, got 0"),
        (lambda ae: encode_sliced(ae, jnp.zeros((2, 1, 8, 8)), -1), "got -1"),
        (lambda ae: ae.with_latent_stats(0.0, 0.0), "positive scales"),
        (lambda ae: ae.with_latent_stats(0.0, (1.0,)), "need 2 shifts and 2 positive"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_autoencoder())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(groups=3), "8 channels do not divide into 3 groups; choose"),
        (dict(groups=0), "groups=0"),
        (dict(blocks=0), "blocks=0"),
        (dict(decoder_blocks=0), "decoder_blocks=0"),
        (dict(channels=()), "at least one level"),
        (dict(channels=(8, 0)), re.escape("channels=(8, 0)")),
        (dict(patch_size=0), "patch_size=0"),
        (dict(latent_channels=0), "latent_channels=0"),
        (dict(attention_levels=(True,) * 3), "attention_levels needs one entry for each of the 2"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_autoencoder(**changes)
