"""CausalVideoAutoencoder: chunks as the whole clip, causality, sizes, files."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import models, pretrained
from eqxldm.models import CausalVideoAutoencoder, parameter_count

from helpers import filled

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)
SMALL = dict(channels=(4, 4, 4), blocks=1, decoder_blocks=1)
FORMS = {
    "wan 2.1": SMALL | dict(channels=(4, 6, 6)),
    "wan 2.2": SMALL | dict(patch_size=2, shortcuts=True),
    "cell map": SMALL | dict(cell_map=True, attention=False, quant_convs=False),
}


@pytest.fixture(scope="module", params=FORMS)
def ae(request):
    model = filled(partial(CausalVideoAutoencoder, 1, 2, **FORMS[request.param], key=KEY))
    return model.with_latent_stats((0.1, -0.2), (0.7, 1.3))


@pytest.fixture(scope="module")
def ways(ae):
    """Encoding and decoding of nine frames: whole, and in chunks."""
    encode = eqx.filter_jit(lambda x, chunked: ae.encode(x, chunked=chunked))
    decode = eqx.filter_jit(lambda z, chunked: ae.decode(z, chunked=chunked))
    return encode, decode


def clip(ae, frames=9):
    return jax.random.uniform(jax.random.key(1), (1, frames, 8, 8), minval=-1)


def test_chunks_give_the_whole_clip(ae, ways):
    encode, decode = ways
    assert ae.time_factor == 4 and ae.factor == 4 * ae.config.patch_size
    z = encode(clip(ae), False)
    assert z.shape == ae.latent_shape(9, 8, 8)
    np.testing.assert_allclose(encode(clip(ae), True), z, atol=1e-5)
    z = jax.random.normal(KEY, z.shape)
    x = decode(z, False)
    assert x.shape == (1, 9, 8, 8)
    np.testing.assert_allclose(decode(z, True), x, atol=1e-5)


def test_no_frame_sees_a_later_one_and_an_image_is_a_clip(ae, ways):
    encode, decode = ways
    x = clip(ae)
    z, later = encode(x, False), encode(x.at[:, 5:].set(0.5), False)
    np.testing.assert_array_equal(later[:, :2], z[:, :2])
    assert jnp.max(jnp.abs(later[:, 2] - z[:, 2])) > 1e-4
    out, changed = decode(z, False), decode(z.at[:, 2].set(1.0), False)
    np.testing.assert_array_equal(changed[:, :5], out[:, :5])
    for chunked in (False, True):
        np.testing.assert_allclose(encode(x[:, :1], chunked), z[:, :1], atol=1e-5)
        np.testing.assert_allclose(decode(z[:, :1], chunked), out[:, :1], atol=1e-5)


def test_files_give_back_the_same_model(ae, tmp_path):
    pretrained.save(ae, tmp_path / "ae.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "ae.safetensors"), ae)
    layouts = pretrained.video_autoencoder
    if ae.config.cell_map:
        with pytest.raises(pretrained.WeightsError, match="it has a cell_map"):
            pretrained.export(ae, tmp_path / "folder")
        return
    for layout in (layouts.original_layout, layouts.diffusers_layout):
        assert eqx.tree_equal(pretrained.load_state(ae, pretrained.to_state(ae, layout)), ae)
    with pytest.raises(pretrained.WeightsError, match="1 blocks a level, not 2"):
        pretrained.export(ae, tmp_path / "folder")


def test_a_cell_map_starts_as_a_projection_and_its_transpose():
    make = partial(CausalVideoAutoencoder, 1, 3, cell_map=True, quant_convs=False)
    ae = make(**SMALL, key=KEY)
    x = jax.random.normal(KEY, (1, 9, 8, 8))
    down, up = ae.encoder.cell_map, ae.decoder.cell_map
    np.testing.assert_array_equal(up.weight, down.weight[:3].T)
    np.testing.assert_allclose(up.weight.T @ up.weight, np.eye(3), atol=1e-5)
    cell = x[:, 5:, 4:8, :4].reshape(-1)  # of the last latent frame, second row, first column
    quiet = eqx.tree_at(
        lambda m: m.encoder.head, ae, replace_fn=lambda h: jax.tree.map(lambda a: a * 0, h)
    )
    posterior = quiet.posterior(x)
    np.testing.assert_allclose(posterior.mean[:, 2, 1, 0], down.weight[:3] @ cell, atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, -6.0)
    # The decoder's convolutions begin at nothing: of a latent a projection of the clip is left.
    again = quiet.decode(posterior.mean)
    np.testing.assert_allclose(
        again[:, 5:, 4:8, :4].reshape(-1), up.weight @ (up.weight.T @ cell), atol=1e-5
    )
    np.testing.assert_allclose(quiet.encode(again)[:, 1:], posterior.mean[:, 1:], atol=1e-5)


def test_the_published_sizes_have_the_published_counts():
    shapes = eqx.filter_eval_shape(models.wan21_autoencoder, key=KEY)
    assert parameter_count(shapes) == 126_892_531
    assert shapes.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    shapes = eqx.filter_eval_shape(models.wan22_autoencoder, key=KEY)
    assert parameter_count(shapes) == 704_688_668
    assert shapes.latent_shape(121, 704, 1280) == (48, 31, 44, 80)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ae: ae.encode(jnp.ones((1, 8, 8, 8))), r"1 \+ 4 k frames, such as 5 or 9; got 8"),
        (lambda ae: ae.encode(jnp.ones((1, 5, 8, 9))), "8 x 9 frame does not divide"),
        (lambda ae: ae.encode(jnp.ones((2, 5, 8, 8))), "need 1 channels, got 2"),
        (lambda ae: ae.decode(jnp.ones((3, 5, 8, 8))), "need 2 latent channels, got 3"),
        (lambda ae: ae.with_latent_stats(0.0, (1.0,)), "need 2 shifts and 2 positive scales"),
    ],
)
def test_wrong_clips_say_what_is_wrong(ae, call, message):
    with pytest.raises(ValueError, match=message):
        call(ae)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(time_levels=(True,)), "one of time_levels less"),
        (dict(channels=(4, 5, 4)), "must be even"),
        (dict(channels=(2, 4, 8), shortcuts=True), "width of level 2, 8, must divide the 4"),
    ],
)
def test_wrong_sizes_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(partial(CausalVideoAutoencoder, 1, 2, **SMALL | changes, key=KEY))


def test_a_configuration_that_is_another_network_is_refused():
    config = dict(dim_mult=[2, 2], temperal_downsample=[], attn_scales=[1.0], z_dim=3)
    with pytest.raises(pretrained.WeightsError) as error:
        pretrained.video_autoencoder.from_diffusers(config, key=KEY)
    for part in ("attn_scales = [1.0] ([])", "(1 first)", "one less than levels", "(3 numbers)"):
        assert part in str(error.value)


def test_memory_of_chunks_does_not_grow_with_the_clip(ae):
    """But for the clip itself, which is copied once or twice."""

    if ae.config.shortcuts:
        pytest.skip("one form is enough")

    def temporary(frames, chunked):
        run = jax.jit(lambda z: ae.decode(z, chunked=chunked))
        compiled = run.lower(jax.ShapeDtypeStruct((2, frames, 2, 2), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    clip = 4 * 4 * (2 * ae.factor) ** 2  # bytes for each latent frame more
    whole, chunked = (temporary(9, way) - temporary(5, way) for way in (False, True))
    assert chunked <= 4 * 4 * clip and whole >= 3 * chunked
