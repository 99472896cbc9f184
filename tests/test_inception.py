"""Inception: the sizes of what it says, the resizes, the published file's names."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqxldm import nn, pretrained
from eqxldm.models import Inception, inception_input
from eqxldm.pretrained import WeightsError
from eqxldm.pretrained.inception import published_layout, read_inception
from eqxldm.pretrained.layout import tensor_shapes

WHOLE = eqx.filter_eval_shape(Inception, key=jax.random.key(0))
RNG = np.random.default_rng(0)


def image(*shape):
    return RNG.integers(0, 256, shape).astype(np.float32)


def test_the_published_file_has_its_472_tensors():
    shapes = tensor_shapes(WHOLE, published_layout(WHOLE))
    assert len(shapes) == 472
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7c.branch3x3_2a.conv.weight"] == (384, 384, 1, 3)
    assert shapes["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)
    assert shapes["Mixed_7a.branch7x7x3_4.bn.running_var"] == (192,)
    assert shapes["fc.weight"] == (1008, 2048) and shapes["fc.bias"] == (1008,)
    # Without the norms' moments, which are no parameters there, and their 94 counters.
    total = sum(int(np.prod(s)) for n, s in shapes.items() if "running" not in n)
    assert total == 23_834_568 + 8 * 2049  # torchvision's 1000 classes without its other head


@pytest.mark.parametrize("size, out", [(32, 299), (299, 299), (301, 299), (5, 3), (1, 4)])
def test_tf1_resize_is_its_closed_form(size, out):
    x, found = image(3, size, size), np.zeros((3, out, out))
    for i in range(out):
        for j in range(0, out, 7):
            y, z = (np.float32(k) * (np.float32(size) / np.float32(out)) for k in (i, j))
            top, left = int(y), int(z)
            below, right = min(top + 1, size - 1), min(left + 1, size - 1)
            a, b = float(y - top), float(z - left)
            upper = x[:, top, left] + b * (x[:, top, right] - x[:, top, left])
            lower = x[:, below, left] + b * (x[:, below, right] - x[:, below, left])
            found[:, i, j] = upper + a * (lower - upper)
    ours = np.asarray(nn.resize(jnp.asarray(x), (out, out), nn.tf1_matrix))
    np.testing.assert_allclose(ours[:, :, ::7], found[:, :, ::7], rtol=0, atol=255e-6)


@pytest.mark.parametrize("size", [(32, 20), (299, 299), (64, 400)])
def test_clean_fids_resize_is_pillows_of_floats(size):
    x = image(3, *size)
    pillow = [
        np.asarray(Image.fromarray(c, mode=None).resize((299, 299), Image.Resampling.BICUBIC))
        for c in x
    ]
    found = nn.resize(jnp.asarray(x), (299, 299))
    np.testing.assert_allclose(found, np.stack(pillow), rtol=0, atol=255e-6)
    clipped = inception_input(jnp.asarray(x), "clean-fid")
    expected = (np.clip(pillow, 0, 255) - 128) / 128
    np.testing.assert_allclose(clipped, expected, rtol=0, atol=2e-6)


def test_the_middle_square_is_cut_after_the_resize():
    x = jnp.broadcast_to(jnp.arange(12.0), (3, 4, 12))
    assert nn.resize_and_crop(x, 4).tolist() == x[:, :, 4:8].tolist()
    assert nn.resize_and_crop(x, 8).shape == (3, 8, 8)


@pytest.fixture(scope="module")
def narrow():
    network = Inception(divide=16, key=jax.random.key(0))
    spread = lambda a: a + 0.1 * jnp.asarray(RNG.standard_normal(a.shape), a.dtype)
    return jax.tree.map(lambda a: spread(a) if eqx.is_array(a) and a.ndim == 1 else a, network)


def test_a_batch_says_what_each_image_does(narrow):
    x = jnp.asarray(RNG.standard_normal((3, 3, 80, 80)), jnp.float32)
    run = eqx.filter_jit(lambda network, x: jax.vmap(network)(x))
    out = run(narrow, x)
    assert out.pooled.shape == (3, 128) and out.spatial.shape == (3, 3, 3, 7)
    np.testing.assert_allclose(out.logits, out.pooled @ narrow.fc.weight.T, rtol=1e-4, atol=1e-5)
    turned = run(narrow, x[::-1])
    for a, b in zip(out, turned, strict=True):
        np.testing.assert_allclose(a, b[::-1], rtol=1e-5, atol=1e-6)
    assert all(bool(jnp.all(a >= 0)) for a in (out.pooled, out.spatial))
    assert float(jnp.std(out.pooled, 0).max()) > 1e-4
    with pytest.raises(ValueError, match=r"3 channels and 75 pixels a side, got \(3, 60, 80\)"):
        narrow(x[0, :, :60])


def test_files_are_read_and_another_one_is_refused(narrow, tmp_path):
    path = tmp_path / "ours.safetensors"
    pretrained.save(narrow, path)
    assert eqx.tree_equal(read_inception(path, narrow), narrow)
    assert eqx.tree_equal(pretrained.load(path), narrow)
    state = pretrained.to_state(narrow, published_layout)
    assert eqx.tree_equal(pretrained.load_state(narrow, state), narrow)
    (tmp_path / "a.pth").write_bytes(b"another")
    with pytest.raises(WeightsError, match="that of the published one begins with 6726825d"):
        pretrained.load_inception(tmp_path / "a.pth")
