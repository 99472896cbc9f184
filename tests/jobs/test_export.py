"""What is made of a finished run: bundles that JAX alone runs, and the tables of `compare`."""

import io
import json
import runpy
import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import SHAPE, Network, drawn, request, running

import eqxldm as ex
from eqxldm.data.pixels import to_uint8
from eqxldm.models import DiT
from eqxldm.quantization import quantize
from eqxldm.serving.bundled import from_bundle
from eqxldm.serving.export import BundleError, Exportable, load_bundle, save_bundle
from experiments.export import compare

from helpers import filled, relative_error

FLOW = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
TIMES = ex.uniform_times(4)


# What `make export` says of a run.
SAID = {
    "name": "dit", "path": "flow", "prediction": "velocity", "learned_range": False,
    "solver": "euler", "steps": 4, "guidance": 2.0, "size": [2, 2], "channels": 1,
    "condition": {"kind": "label", "classes": 3, "names": ["a", "b", "c"]},
    "stream": 11, "shift": 1.0,
}  # fmt: skip


class Gain(eqx.Module):
    """A decoder: the first channel, and a gain."""

    gain: jax.Array

    def __call__(self, z):
        return self.gain * z[:1]


def dit():
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    return DiT((2, 4, 4), **sizes, key=jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    network, gain = quantize(filled(dit)), Gain(jnp.array(0.5, jnp.bfloat16))
    # Weights in 8 bits, in bfloat16 and in float32: each has a way of its own into a file.
    arguments = FLOW, ex.Euler(), TIMES, (2, 4, 4), np.int32(0)
    return Exportable(network, gain, *arguments, null=np.int32(3), pad=1)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "dit.bundle"
    save_bundle(model, path, SAID, platforms=["cpu", "cuda", "tpu"])
    return path


def expected(model, key, label, scale):
    noise_key, key = jax.random.split(key)
    x = jax.random.normal(noise_key, (2, 4, 4))
    guided = ex.guide(model.network, model.null, scale)
    z = ex.sample(guided, FLOW, ex.Euler(), TIMES, x, jnp.int32(label), key=key)
    return to_uint8(model.decoder(z)[None], pad=1)[0]


def test_a_bundle_draws_what_the_model_draws(model, path):
    bundle = load_bundle(path)
    drawn = bundle.draw([5, 7, 9], jnp.array([0, 1, 2]), 2.0)
    assert drawn.shape == (3, 2, 2, 1) and drawn.dtype == jnp.uint8
    whole = eqx.filter_jit(expected)(model, jax.random.key(7), 1, jnp.array(2.0))
    assert np.max(np.abs(np.asarray(whole, int) - np.asarray(drawn[1], int))) <= 1
    assert len({bytes(np.asarray(image)) for image in drawn}) == 3
    x, t = jax.random.normal(jax.random.key(0), (2, 2, 4, 4)), jnp.array([0.2, 0.7])
    out = jax.vmap(model.network)(x, t, jnp.array([0, 3]))
    assert relative_error(bundle.denoiser(x, t, jnp.array([0, 3])), out) < 1e-5
    np.testing.assert_allclose(bundle.decoder(x), 0.5 * x[:, :1], rtol=1e-2)
    assert bundle.settings["name"] == "dit" and bundle.settings["guided"]
    assert set(bundle.programs["denoiser"].platforms) == {"cpu", "cuda", "tpu"}


def test_its_network_composes_with_samplers_and_guidance(model, path):
    """Batches in batches are one call: guidance asks for two of each."""
    bundle = load_bundle(path)
    x = jax.random.normal(jax.random.key(1), (3, 2, 4, 4))

    @eqx.filter_jit
    def run(network, x):
        guided = ex.guide(network, model.null, 2.0)
        one = lambda x, c: ex.sample(guided, FLOW, ex.Heun(), TIMES, x, c)
        return jax.vmap(one)(x, jnp.array([0, 1, 2]))

    assert relative_error(run(bundle.network, x), run(model.network, x)) < 1e-4
    assert jax.vmap(jax.vmap(bundle.picture))(x[None]).shape == (1, 3, 1, 4, 4)
    assert bundle.network(x[0], jnp.array(0.5), 1).shape == (2, 4, 4)


def test_the_server_draws_with_it(model, path):
    """Each picture is that of the library's own sampler, of the model that was exported."""
    generator = from_bundle(path)
    assert generator.labels == ("a", "b", "c") and generator.defaults.solver == "euler"
    assert {"ddim", "euler", "heun"} <= set(generator.solver_names)
    generator = generator.replace(solvers={"euler": ex.Euler()})
    with running(generator, slots=1) as engine:
        wanted = request("euler", 4, 2.0, seed=5, label=1, interval=(0.0, 1.0))
        (picture,) = drawn(engine, wanted)[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 11), 0)
    whole = eqx.filter_jit(expected)(model, key, 1, jnp.array(2.0))
    assert np.max(np.abs(np.asarray(whole, int)[..., 0] - picture.astype(int))) <= 1


TRIG = ex.Diffusion(ex.CosineVP(), ex.predict_v)


def consistency(network):
    return ex.renoise(ex.consistency_function(network, TRIG), TRIG.path)


def few_steps(make, diffusion):
    """A model that is sampled by its map, in two steps."""
    network = Network(jax.random.key(1))
    return Exportable(
        network, Gain(jnp.array(0.5)), diffusion, None, ex.uniform_times(2), SHAPE, np.int32(0),
        flow_map=make,
    )  # fmt: skip


def by_map(model, key, label):
    noise_key, key = jax.random.split(key)
    x = jax.random.normal(noise_key, SHAPE)
    z = ex.sample_map(model.flow_map(model.network), model.times, x, jnp.int32(label), key=key)
    return np.asarray(to_uint8(model.decoder(z)[None])[0], int)


def test_a_flow_map_draws_from_its_bundle(tmp_path):
    """The map of a network of two times; its network goes on being one for solvers."""
    model = few_steps(ex.average_velocity_map, FLOW)
    save_bundle(model, tmp_path / "a", platforms=["cpu"])
    bundle = load_bundle(tmp_path / "a")
    drawn = np.asarray(bundle.draw([7, 8], jnp.array([1, 2])), int)
    assert np.abs(drawn[0] - by_map(model, jax.random.key(7), 1)).max() <= 1
    assert np.ptp(drawn) > 50 and np.any(drawn[0] != drawn[1])
    x, t, s = jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.array([1.0, 0.7]), jnp.zeros(2)
    want = jax.vmap(model.flow_map(model.network))(x, t, s, jnp.array([0, 1]))
    assert relative_error(jax.vmap(bundle.flow_map)(x, t, s, jnp.array([0, 1])), want) < 1e-5
    out = jax.vmap(lambda x, t: model.network(x, t, 1, h=0.0))(x, t)
    assert relative_error(bundle.denoiser(x, t, jnp.array([1, 1])), out) < 1e-5
    with pytest.raises(ValueError, match="neither a solver nor a flow map"):
        save_bundle(model._replace(flow_map=None), tmp_path / "b")


def test_the_server_draws_with_a_flow_map(tmp_path):
    """One that draws noise on the way, from the picture's own key."""
    model = few_steps(consistency, TRIG)
    said = SAID | {"path": "cosine", "prediction": "v", "solver": "map", "steps": 2, "null": 3}
    said |= {"map_alone": True, "guidance": 1.0, "size": [4, 4]}
    save_bundle(model, tmp_path / "a", said, platforms=["cpu"])
    generator = from_bundle(tmp_path / "a")
    assert generator.solver_names == ("map",) and generator.defaults.steps == 2
    with running(generator, slots=1) as engine:
        (picture,) = drawn(engine, request("map", 2, 1.0, seed=5, label=1))[0]
    want = by_map(model, jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 11), 0), 1)
    assert np.abs(want[..., 0] - picture.astype(int)).max() <= 1 and np.ptp(want) > 50


def test_what_cannot_be_served_is_one_message(path, tmp_path, capsys, monkeypatch):
    other = rewritten(path, tmp_path / "other", other_settings(prediction="odd"))
    monkeypatch.setattr("eqxldm._leaving.leave", sys.exit)  # which would end the tests
    for args, message in (
        (["--bundle", str(tmp_path / "none")], "there is no file"),
        (["--bundle", str(other)], "does not say what it is of (KeyError: 'odd')"),
        (["--bundle", str(path), "--slots", "0"], "must lie in 1 .. 256, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["serving", *args])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("eqxldm.serving", run_name="__main__")
        shown = capsys.readouterr().err
        assert message in shown and shown.count("error:") == 1

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("eqxldm.serving.command.from_bundle", stopped)
    monkeypatch.setattr(sys, "argv", ["serving", "--bundle", str(path)])
    with pytest.raises(SystemExit, match="130"):
        runpy.run_module("eqxldm.serving", run_name="__main__")
    assert capsys.readouterr().err == "stopped by SIGINT.\n"


ALONE = """
import json, sys, zipfile
for name in ("eqxldm", "equinox", "jaxtyping"):
    sys.modules[name] = None
import jax, numpy as np
from jax import export

with zipfile.ZipFile(sys.argv[1]) as file:
    settings = json.loads(file.read("settings.json"))
    sampler = export.deserialize(bytearray(file.read("sampler.bin")))
    weights = [
        jax.numpy.asarray(np.load(file.open(f"weights/{i:05d}.npy")).view(jax.numpy.dtype(dtype)))
        for i, dtype in enumerate(settings["weights"])
    ]
keys, labels = np.array([[0, 7]], np.uint32), np.array([1], np.int32)
images = sampler.call(weights, keys, labels, np.array([2.0], np.float32))
print(json.dumps(np.asarray(images).tolist()))
"""


def test_jax_alone_runs_a_bundle(path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    drawn = np.asarray(load_bundle(path).draw([7], jnp.array([1]), 2.0), int)
    assert np.max(np.abs(np.array(json.loads(done.stdout)) - drawn)) <= 1


def rewritten(path, other, change, compression=zipfile.ZIP_STORED):
    """The bundle with other entries: `change(name, bytes)` gives each."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, change(entry, old.read(entry)))
    return other


def other_settings(**changes):
    def change(name, data):
        return json.dumps(json.loads(data) | changes) if name == "settings.json" else data

    return change


def test_weights_and_settings_of_another_bundle_are_refused(path, tmp_path):
    other = tmp_path / "other"
    for changes in ({"shape": [2, 4, 8]}, {"cond": ["float32"]}, {"weights": []}):
        with pytest.raises(BundleError, match="damaged or no bundle"):
            load_bundle(rewritten(path, other, other_settings(**changes)))
    npy = io.BytesIO()
    np.save(npy, np.zeros((2, 3), np.float32))
    given = lambda name, data: npy.getvalue() if name == "weights/00000.npy" else data
    with pytest.raises(BundleError, match="the weights are not those that denoiser takes"):
        load_bundle(rewritten(path, other, given))
    with pytest.raises(BundleError, match="is compressed"):
        load_bundle(rewritten(path, other, other_settings(), zipfile.ZIP_DEFLATED))
    for changes in (
        {"steps": 0}, {"guidance": float("nan")}, {"shift": -1.0}, {"size": [4, 4]}, {"pad": 2},
        {"null": [1, 2]}, {"stream": 2**32}, {"condition": {"kind": "label", "names": [1]}},
    ):  # fmt: skip
        with pytest.raises(BundleError, match="does not say what it is of"):
            from_bundle(rewritten(path, other, other_settings(**changes)))


def test_what_is_no_bundle_is_refused(path, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        load_bundle(tmp_path / "none")
    (tmp_path / "text").write_text("no zip")
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-1000])
    other = tmp_path / "other"
    for name, changed in (("format", 2), ("weights", ["int3"])):
        with pytest.raises(BundleError, match=r"format 2, not 1|damaged or no bundle"):
            load_bundle(rewritten(path, other, other_settings(**{name: changed})))
    for damaged in ("text", "cut"):
        with pytest.raises(BundleError, match="damaged or no bundle"):
            load_bundle(tmp_path / damaged)
    monkeypatch.setattr(jax, "default_backend", lambda: "metal")
    with pytest.raises(BundleError, match="is for cpu, cuda, tpu, and this machine has metal"):
        load_bundle(path)


def test_a_table_has_the_columns_that_say_something():
    row = {"variant": "float32", "bytes": 4_000, "eps 0.5": 0.0, "fd": 2.25, "call of 1, ms": 1.5}
    quantized = compare.table([row, row | {"variant": "int8", "bytes": 1_000}], "quantized")
    assert quantized.splitlines()[0] == "| variant | bytes | eps 0.5 | fd | call of 1, ms |"
    assert quantized.splitlines()[3] == "| int8 | 1,000 | 0 | 2.25 | 1.5 |"
    assert compare.table([row], "faster").splitlines()[0] == "| variant | fd |"
