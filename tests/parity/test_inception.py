"""Inception against torch-fidelity's network of the same random weights, and torch's resizes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from test_statistics import fidelity

from eqxldm import nn
from eqxldm.models import Inception, inception_input
from eqxldm.pretrained.inception import read_inception

from harness import Draw, each_configuration
from helpers import relative_error


def twin(draw):
    """Random weights such that activations stay near 1, as a published file would have them."""
    shapes = eqx.filter_eval_shape(Inception, key=jax.random.key(0))
    state = {}
    for name, unit in shapes.units.items():
        kh, kw, into, out = unit.weight.shape
        weight = draw.normal(out, into, kh, kw) * np.sqrt(2 / (kh * kw * into))
        state[f"{name}.conv.weight"] = weight
        for kind, centre in dict(weight=1, bias=0, running_mean=0).items():
            state[f"{name}.bn.{kind}"] = centre + 0.1 * draw.normal(out)
        state[f"{name}.bn.running_var"] = np.exp(0.2 * draw.normal(out))
    state["fc.weight"], state["fc.bias"] = draw.normal(1008, 2048) / 45, draw.normal(1008)
    state = {name: torch.from_numpy(a.astype(np.float32)) for name, a in state.items()}
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in state
        if name.endswith("running_var")
    }
    return shapes, state, counters


def test_features_of_the_same_weights(tmp_path, record_property):
    draw = Draw("inception", 0)
    shapes, state, counters = twin(draw)
    torch.save(state, tmp_path / "published.pth")
    torch.save(state | counters, tmp_path / "theirs.pth")
    module = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "twin", ["2048", "logits_unbiased"], str(tmp_path / "theirs.pth")
    )
    spatial = []
    module.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: spatial.append(y))
    network = read_inception(tmp_path / "published.pth", shapes)
    images = draw.rng.integers(0, 256, (2, 3, 50, 70), dtype=np.uint8)
    expected = module(torch.from_numpy(images))

    @eqx.filter_jit
    def run(network, images):
        return jax.vmap(lambda x: network(inception_input(x)))(images)

    found = run(network, jnp.asarray(images, jnp.float32))
    expected = dict(
        pooled=expected[0],
        logits=expected[1],
        spatial=spatial[0][:, :7].permute(0, 2, 3, 1).contiguous(),
    )
    errors = {
        name: float(relative_error(getattr(found, name), value)) for name, value in expected.items()
    }
    record_property("inception", errors)
    assert max(errors.values()) <= 1e-4, errors


@each_configuration
def test_resizes(number, record_property):
    draw = Draw("resize", number)
    h, w = draw.between(1, 400), draw.between(1, 400)
    if number == 0:
        h = w = 299
    x = draw.rng.integers(0, 256, (3, h, w)).astype(np.float32)
    tf1 = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    tensor = torch.from_numpy(x)[None]
    expected = {
        "tf1": tf1(tensor, size=(299, 299), align_corners=False),
        "half pixels": torch.nn.functional.interpolate(
            tensor, (299, 299), mode="bilinear", align_corners=False
        ),
    }
    matrices = {"tf1": nn.tf1_matrix, "half pixels": nn.bilinear_matrix}
    errors = {}
    for name, matrix in matrices.items():
        found = nn.resize(jnp.asarray(x), (299, 299), matrix)
        errors[name] = float(np.max(np.abs(found - expected[name][0].numpy()))) / 255
    record_property("resize", errors)
    assert max(errors.values()) <= 1e-6, errors
    ours = inception_input(jnp.asarray(x), "pytorch-fid")
    np.testing.assert_allclose(ours, 2 * expected["half pixels"][0] / 255 - 1, atol=5e-6)
