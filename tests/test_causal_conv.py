"""Causal layers of clips: their formulas, nothing from later frames, chunks as the whole clip."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqxldm import nn
from eqxldm.nn.causal_conv import _convolve, _on_cpu

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)
LAYERS = {
    "conv": partial(nn.CausalConv3d, 2, 3, 3),
    "resnet": partial(nn.CausalResnetBlock, 2, 3, gain=1.0),
    "down": partial(nn.ClipDownsample, 2, time=True),
    "up": partial(nn.ClipUpsample, 2, 3, time=True),
}


def clip(frames=5, channels=2):
    return jax.random.normal(jax.random.key(1), (frames, 4, 4, channels))


def test_a_causal_convolution_equals_its_formula():
    layer, x = nn.CausalConv3d(2, 3, 3, key=KEY), np.asarray(clip())
    layer = eqx.tree_at(lambda m: m.bias, layer, jnp.arange(3.0))
    padded, w = np.pad(x, ((2, 0), (1, 1), (1, 1), (0, 0))), np.asarray(layer.weight)
    expected = np.zeros((5, 4, 4, 3)) + np.arange(3.0)
    for t, i, j in np.ndindex(5, 4, 4):
        expected[t, i, j] += np.tensordot(padded[t : t + 3, i : i + 3, j : j + 3], w, 4)
    np.testing.assert_allclose(layer(clip()), expected, atol=1e-5)


@pytest.mark.parametrize("size, stride", [(3, 1), (1, 1), (1, 2), (3, 2)])
def test_a_causal_convolution_is_the_same_function_on_every_platform(size, stride):
    x, w = clip(7), jax.random.normal(KEY, (3, size, size, 2, 3))
    np.testing.assert_allclose(_on_cpu(x, w, stride), _convolve(x, w, stride), atol=1e-5)


def test_time_is_halved_and_doubled_around_the_first_frame():
    x = clip(5)
    down, up = nn.TimeDownsample(2, key=KEY), nn.TimeUpsample(2, key=KEY)
    w = down.conv.weight[:, 0, 0]
    later = [sum(x[t + k] @ w[k] for k in range(3)) for t in (0, 2)]
    np.testing.assert_allclose(down(x), jnp.stack([x[0], *later]), atol=1e-5)
    w, before = up.conv.weight[:, 0, 0], jnp.zeros_like(x[:2])
    seen = jnp.concatenate([before, x[1:]])  # the first frame is not among them
    both = [jnp.stack([seen[t + k] @ w[k] for k in range(3)]).sum(0) for t in range(4)]
    halves = [half for y in both for half in (y[..., :2], y[..., 2:])]
    np.testing.assert_allclose(up(x), jnp.stack([x[0], *halves]), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_give_the_whole_clip_and_no_frame_sees_a_later_one(name):
    layer, x = LAYERS[name](key=KEY), clip(9)
    whole, cache, parts = layer(x), None, []
    for chunk in (x[:1], x[1:5], x[5:]):
        cache = nn.FrameCache(None if cache is None else cache.frames)
        parts.append(layer(chunk, cache))
    np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-5)
    changed = layer(x.at[5:].add(1.0))
    kept = sum(len(part) for part in parts[:2])
    np.testing.assert_array_equal(changed[:kept], whole[:kept])
    assert jnp.max(jnp.abs(changed[kept:] - whole[kept:])) > 0.1
    np.testing.assert_allclose(layer(x[:1]), whole[:1], atol=1e-5)  # an image is a clip


def test_shortcuts_keep_means_and_the_first_frame():
    x = clip(5, 4)
    down = nn.average_down(x, 2, 2, 2)
    np.testing.assert_allclose(down[1:].mean(), x[1:].mean(), rtol=1e-5)
    np.testing.assert_allclose(down[0].mean(), x[0].mean() / 2, rtol=1e-5)  # beside zeros
    up = nn.repeat_up(down, 4, 2, 2)
    np.testing.assert_allclose(nn.average_down(up, 2, 2, 2)[1:], down[1:], rtol=1e-5)
    with pytest.raises(ValueError, match="8 numbers in a cell do not divide into 3"):
        nn.average_down(clip(5, 1), 3, 2, 2)
    with pytest.raises(ValueError, match="no multiple of 3 channels"):
        nn.repeat_up(clip(5, 3), 1, 2, 2)
