"""TinyAutoencoder: its forms, what comes in and out, and its files."""

from collections import Counter
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.models import TinyAutoencoder, parameter_count
from eqxldm.pretrained import load_tiny_autoencoder, tiny_autoencoder
from eqxldm.pretrained.files import write_safetensors

from helpers import filled, numbered

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)
SMALL = dict(width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1))


def make(*args, **changes):
    return partial(TinyAutoencoder, *args, **{**SMALL, **changes}, key=KEY)


@pytest.fixture(scope="module")
def ae():
    return filled(make(3, 2, pool=True))


@pytest.mark.parametrize(
    "latent, pool, encoder, decoder",
    [
        (4, False, 1_222_532, 1_222_531),  # SD, SDXL
        (16, False, 1_229_456, 1_229_443),  # SD3, FLUX.1
        (32, True, 1_338_528, 1_338_499),  # FLUX.2
    ],
)
def test_the_published_forms_have_the_published_counts(latent, pool, encoder, decoder):
    make = partial(TinyAutoencoder, 3, latent, pool=pool, key=KEY)
    shapes = eqx.filter_eval_shape(make)
    assert (parameter_count(shapes.encoder), parameter_count(shapes.decoder)) == (encoder, decoder)
    assert shapes.factor == 8 and shapes.latent_shape(64, 96) == (latent, 8, 12)


def test_pictures_and_latents_have_their_ranges(ae):
    """Black is -1 outside and 0 inside; latents beyond 3 are bent back."""
    zero = jax.tree.map(jnp.zeros_like, eqx.filter(ae, eqx.is_array))
    still = eqx.combine(zero, eqx.filter(ae, eqx.is_array, inverse=True))
    np.testing.assert_array_equal(still.decode(jnp.ones((2, 1, 1))), -jnp.ones((3, 2, 2)))
    far = [ae.decode(jnp.full((2, 1, 1), value)) for value in (30.0, 300.0, 1.0)]
    np.testing.assert_allclose(far[0], far[1], rtol=1e-5)
    assert jnp.max(jnp.abs(far[0] - far[2])) > 1e-3


def test_a_posterior_is_the_latent_itself(ae):
    x = jax.random.normal(KEY, (3, 2, 4))
    posterior = ae.normalise(ae.posterior(x))
    z = ae.encode(x, key=KEY)
    np.testing.assert_array_equal(posterior.mean, z)
    np.testing.assert_allclose(posterior.sample(KEY), z, atol=1e-5)
    half = ae.encode(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and z.dtype == jnp.float32


def test_what_does_not_fit_is_refused(ae):
    with pytest.raises(ValueError, match="need 3 channels, got 4"):
        ae.encode(jnp.ones((4, 2, 2)))
    with pytest.raises(ValueError, match="need 2 latent channels, got 3"):
        ae.decode(jnp.ones((3, 2, 2)))
    with pytest.raises(ValueError, match=r"a 3 x 2 picture does not divide by .* factor 2"):
        ae.encode(jnp.ones((3, 3, 2)))
    for changes in (dict(encoder_blocks=(1,)), dict(width=0), dict(decoder_blocks=(1, 0))):
        with pytest.raises(ValueError, match="as many levels in the decoder as in the encoder"):
            make(**changes)()


def test_every_layout_uses_each_number_once(ae):
    model, count = numbered(ae)
    for layout in (tiny_autoencoder.original_layout, tiny_autoencoder.diffusers_layout):
        state = pretrained.to_state(model, layout)
        once = np.concatenate([value.ravel() for value in state.values()])
        assert Counter(once.tolist()) == Counter(range(count))
        assert eqx.tree_equal(pretrained.load_state(model, state), jax.tree.map(jnp.asarray, model))


def halves(ae, folder):
    state = pretrained.to_state(ae, tiny_autoencoder.original_layout)
    paths = []
    for half in ("encoder", "decoder"):
        start = f"{half}."
        paths.append(folder / f"{half}.safetensors")
        tensors = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
        write_safetensors(paths[-1], tensors, {})
    return paths


@pytest.mark.parametrize("pool", [False, True])
def test_two_files_say_which_form_it_is(pool, tmp_path):
    sizes = dict(encoder_blocks=(1, 3, 3, 3), decoder_blocks=(3, 3, 3, 1))
    ae = filled(make(3, 5, width=2, pool=pool, **sizes))
    encoder, decoder = halves(ae, tmp_path)
    assert eqx.tree_equal(load_tiny_autoencoder(encoder, decoder), ae)
    half = load_tiny_autoencoder(encoder, decoder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(pretrained.WeightsError, match="not the encoder and the decoder of a TAESD"):
        load_tiny_autoencoder(decoder, encoder)


def test_folders_and_our_files_keep_it(ae, tmp_path):
    pretrained.save(ae, tmp_path / "a.safetensors")
    assert eqx.tree_equal(pretrained.load(tmp_path / "a.safetensors"), ae)
    with pytest.raises(pretrained.WeightsError, match="blocks have a pool"):
        pretrained.export(ae, tmp_path / "folder")
    plain = filled(make(3, 2))
    pretrained.export(plain, tmp_path / "folder")
    assert eqx.tree_equal(pretrained.load(tmp_path / "folder"), plain)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(act_fn="silu"), r"act_fn = 'silu' \('relu'\)"),
        (dict(scaling_factor=0.18215), r"scaling_factor = 0\.18215 \(1\.0\)"),
        (dict(out_channels=4), r"out_channels = 4 \(3\)"),
        (dict(encoder_block_out_channels=[32] * 4), r"= \[32, 64\] \(one width\)"),
    ],
)
def test_an_option_that_it_has_not_is_named(options, message):
    with pytest.raises(pretrained.WeightsError, match=message):
        tiny_autoencoder.from_diffusers(options, key=KEY)
