"""The autoencoders that a run can be given, and guidance that changes over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eqxldm import pretrained
from eqxldm.data.pixels import to_float
from eqxldm.models import TinyAutoencoder
from experiments.train.autoencoder import Encoder, load_vae
from experiments.train.config import SamplingConfig
from experiments.train.methods import guidance_scale
from experiments.train.networks import GreyThroughColour
from experiments.train.terminal import UserError


@pytest.fixture(scope="module")
def tiny():
    return TinyAutoencoder(3, 4, width=8, key=jax.random.key(0))


@pytest.fixture
def halves(tiny, tmp_path):
    """TAESD's two files."""
    tensors = pretrained.to_state(tiny, pretrained.tiny_autoencoder.original_layout)
    for half in ("encoder", "decoder"):
        prefix = half + "."
        part = {n[len(prefix) :]: np.asarray(t) for n, t in tensors.items() if n.startswith(prefix)}
        save_file(part, tmp_path / f"taesd_{half}.safetensors")
    return tmp_path


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_either_of_the_two_files_names_both(halves, tiny, half):
    found = load_vae(halves / f"taesd_{half}.safetensors", 3)
    x = jnp.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16)
    np.testing.assert_array_equal(found.encode(x), tiny.encode(x))


def test_grey_images_go_through_an_autoencoder_of_colour(halves, tiny):
    grey = load_vae(halves / "taesd_encoder.safetensors", 1)
    assert isinstance(grey, GreyThroughColour) and grey.in_channels == 1
    assert grey.latent_shape(16, 24) == (4, 2, 3)
    x = jnp.linspace(-1, 1, 256).reshape(1, 16, 16)
    z = grey.encode(x)
    np.testing.assert_array_equal(z, tiny.encode(jnp.concatenate([x] * 3)))
    np.testing.assert_allclose(grey.decode(z)[0], tiny.decode(z).mean(0), atol=1e-6)
    images = np.full((2, 12, 12, 1), 128, np.uint8)
    mean, logvar = Encoder(grey, 2, lambda x: to_float(x, pad=2))(images)
    assert mean.shape == (2, 4, 2, 2) and float(jnp.exp(logvar).max()) < 1e-6


def test_a_run_keeps_the_autoencoder_of_colour(tiny, tmp_path):
    pretrained.save(tiny, tmp_path / "autoencoder.safetensors")
    z = jnp.ones((4, 2, 2))
    again = load_vae(tmp_path, 1)
    np.testing.assert_allclose(again.decode(z)[0], tiny.decode(z).mean(0), atol=1e-6)


def test_other_channels_and_half_of_the_files_are_refused(halves, tmp_path):
    with pytest.raises(UserError, match="is for 3 channels; the images have 4"):
        load_vae(halves / "taesd_encoder.safetensors", 4)
    (halves / "taesd_decoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no file .*taesd_decoder\.safetensors"):
        load_vae(halves / "taesd_encoder.safetensors", 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.5])
def test_schedules_of_guidance_have_the_fixed_scales_mean(schedule, scale):
    chosen = guidance_scale(SamplingConfig(guidance=scale, guidance_schedule=schedule))
    t = (np.arange(1000) + 0.5) / 1000
    values = np.array([float(chosen(x)) for x in t[::100]])
    assert np.mean([float(chosen(x)) for x in (0.25, 0.75)]) == pytest.approx(scale)
    assert (np.diff(values) <= 1e-6).all() == (scale >= 0.5)


def test_bounded_guidance_is_weaker_where_outputs_are_far_apart():
    chosen = guidance_scale(SamplingConfig(guidance=2.0, guidance_schedule="bounded"))
    near = chosen.function(0.5, jnp.full(4, 0.05), jnp.zeros(4))
    far = chosen.function(0.5, jnp.full(4, 1.0), jnp.zeros(4))
    assert float(near) == pytest.approx(3.0) and float(far) == pytest.approx(1.2)
