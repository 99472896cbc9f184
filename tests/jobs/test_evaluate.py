"""`make evaluate SAMPLES=... REFERENCE=...`: the whole way, resumed, and what it refuses."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eqxldm import metrics, pretrained
from eqxldm.data import DataError
from eqxldm.data.npz_images import NpzImages
from eqxldm.models import CLIPImage, DINOv2, Inception, clip_input, dinov2_input
from experiments.evaluate import networks, run as evaluating, store
from experiments.evaluate.networks import Extractor
from experiments.evaluate.options import Evaluate
from experiments.evaluate.pictures import label_balance, open_pictures
from experiments.train.terminal import UserError

RNG = np.random.default_rng(0)
SAMPLES = RNG.integers(0, 200, (41, 9, 7, 3), dtype=np.uint8)
REAL = RNG.integers(50, 256, (37, 9, 7, 3), dtype=np.uint8)
LABELS = np.arange(41) % 3
MATRIX = RNG.standard_normal((9 * 7 * 3, 6)).astype(np.float32)


def projection(model, images):
    """What stands for a network: a product for FID, another for sFID, logits."""
    flat = jnp.dot(images.reshape(len(images), -1) / 255.0, model, precision="highest")
    return {"pooled": flat[:, :4], "spatial": flat[:, 3:], "logits": flat}


class Counting(Extractor):
    """Counts the images, and stops after some."""

    def __init__(self, stop=None):
        super().__init__(projection, jnp.asarray(MATRIX), {"weights": "projection"})
        self.seen, self.stop = 0, stop

    def start(self, images, batch):
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(images)
        return super().start(images, batch)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "samples.npz", SAMPLES, LABELS)
    np.savez_compressed(tmp_path / "real.npz", REAL)
    (tmp_path / "weights.pth").write_bytes(b"")
    return tmp_path


def options(folder, **more):
    given = dict(samples="samples.npz", reference="real.npz", weights="weights.pth", cache="cache")
    paths = {name: folder / path for name, path in given.items()}
    values: dict[str, Any] = {**paths, "kid_subset": 20, "batch": 8, **more}
    return Evaluate(**values)


@pytest.fixture
def network(monkeypatch):
    def use(extractor):
        monkeypatch.setattr(evaluating, "make_extractor", lambda options: extractor)
        monkeypatch.setattr(evaluating, "Signals", lambda: None)
        return extractor

    return use


def features(images):
    return {k: np.asarray(v) for k, v in projection(jnp.asarray(MATRIX), images).items()}


def test_all_scores_are_those_of_the_features_and_the_protocol_is_written(files, network):
    network(Counting())
    found = evaluating.evaluate(options(files))
    ours, real = features(SAMPLES), features(REAL)
    expected = {
        "fid": metrics.frechet_distance(real["pooled"], ours["pooled"]),
        "sfid": metrics.frechet_distance(real["spatial"], ours["spatial"]),
        "inception_score": metrics.inception_score(ours["logits"]).mean,
        "kid": metrics.kid(real["pooled"], ours["pooled"], subset_size=20).mean,
        **metrics.manifold_scores(real["pooled"], ours["pooled"])._asdict(),
    }
    for name, value in expected.items():
        assert found["scores"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert found["notes"] == []
    written = json.loads((files / "samples.metrics.json").read_text())
    assert written["scores"] == found["scores"]
    counted = {"images": 41, "labels": {"classes": 3, "fewest": 13, "most": 14}}
    assert written["protocol"]["samples"] == counted
    assert written["protocol"]["weights"] == "projection" and written["protocol"]["batch"] == 8


def test_no_score_depends_on_the_batch_and_a_set_is_itself(files, network):
    network(Counting())
    one, other = (
        evaluating.evaluate(options(files, batch=b, cache=files / str(b)))["scores"]
        for b in (5, 41)
    )
    assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    same = evaluating.evaluate(options(files, reference=files / "samples.npz"))["scores"]
    assert same["fid"] < 1e-6 and same["sfid"] < 1e-6
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_an_interrupted_run_goes_on_and_a_second_computes_nothing(files, network, monkeypatch):
    monkeypatch.setattr(store, "EVERY", 1)
    expected = None
    for stop in (None, 24):
        cache = files / f"cache-{stop}"
        network(Counting(stop))
        if stop:
            with pytest.raises(KeyboardInterrupt):
                evaluating.evaluate(options(files, cache=cache))
        extractor = network(Counting())
        found = evaluating.evaluate(options(files, cache=cache))["scores"]
        assert extractor.seen == 41 + 37 - (16 if stop else 0)
        expected = expected or found
        assert found == expected
        extractor = network(Counting())
        assert evaluating.evaluate(options(files, cache=cache))["scores"] == expected
        assert extractor.seen == 0


def test_adms_files_are_written_and_read(files, network):
    network(Counting())
    path = files / "ref.npz"
    whole = evaluating.evaluate(options(files, save_reference=path))["scores"]
    found = evaluating.evaluate(options(files, reference=path))
    assert found["scores"]["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert found["scores"]["sfid"] == pytest.approx(whole["sfid"], rel=1e-9)
    assert "kid" not in found["scores"] and "moments alone" in found["notes"][0]
    # As in ADM's own: moments of the whole set, and some of its images for the rest.
    with np.load(path) as moments:
        np.savez(files / "both.npz", REAL[:30], **moments)
    both = evaluating.evaluate(options(files, reference=files / "both.npz"))
    assert both["scores"]["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    said = both["protocol"]["reference"]
    assert said["images"] == 30 and said["moments"]
    with pytest.raises(UserError, match="its moments are Inception's"):
        evaluating.evaluate(options(files, reference=path, features="dinov2"))


def test_too_few_samples_are_said(files, network):
    network(Counting())
    found = evaluating.evaluate(options(files, n=4))
    notes = " ".join(found["notes"])
    assert "classes" not in notes  # LABELS are mixed
    two = " ".join(evaluating.evaluate(options(files, n=2))["notes"])
    assert "--n 2: the first samples are of 2 of 3 classes" in two
    assert "4 samples and 4 features: their covariance is singular" in notes
    assert "precision and coverage need 6" in notes and "--kid-subset takes fewer" in notes
    assert all(np.isfinite(v) for v in found["scores"].values())


def test_folders_of_images(tmp_path):
    for i, image in enumerate(REAL[:5]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    pictures = open_pictures(tmp_path, None)
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(2))), REAL[:5])
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(2, start=3))), REAL[3:5])
    assert next(open_pictures(tmp_path, 8).batches(2)).shape == (2, 8, 8, 3)
    Image.fromarray(REAL[0][:8]).save(tmp_path / "9.png")
    with pytest.raises(UserError, match=r"9.png is 8 x 7, others are 9 x 7.*--size 256"):
        list(pictures_of(tmp_path).batches(3))


def test_folders_whose_files_have_equal_names_and_sizes_are_told_apart(tmp_path):
    for folder, images in (("one", SAMPLES), ("other", REAL)):
        for i in range(5):
            (tmp_path / folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(tmp_path / folder / str(i % 2) / f"{i}.bmp")
    one, other = pictures_of(tmp_path / "one"), pictures_of(tmp_path / "other")
    assert one.digest() != other.digest() == pictures_of(tmp_path / "other").digest()
    assert label_balance(one.labels) == {"classes": 2, "fewest": 2, "most": 3}
    assert label_balance(one.labels, 4) == {"classes": 2, "fewest": 1, "most": 3}


def pictures_of(folder):
    return open_pictures(folder, None)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(arr_0=SAMPLES.astype(np.float32)), "is float32"),
        (dict(arr_0=SAMPLES[..., 0]), r"uint8 \(41, 9, 7\); images must be uint8"),
        (dict(images=SAMPLES), "has no array arr_0; it has images.npy"),
        (dict(arr_0=np.asfortranarray(SAMPLES)), "Fortran's order"),
        (dict(arr_0=SAMPLES[:0]), "images must be uint8"),
    ],
)
def test_a_wrong_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        list(NpzImages(tmp_path / "a.npz").batches(8))


def test_an_npz_that_is_cut_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", SAMPLES)
    content = (tmp_path / "a.npz").read_bytes()
    for size in (0, 10, 2000, len(content) - 30):
        (tmp_path / "a.npz").write_bytes(content[:size])
        with pytest.raises(DataError):
            list(NpzImages(tmp_path / "a.npz").batches(8))


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(samples=None), "--samples (make: SAMPLES=...) is needed"),
        (dict(reference=Path("/nowhere.npz")), "there is no file or folder /nowhere.npz"),
        (dict(weights=None), "--weights (make: WEIGHTS=...) is needed: for inception, pt_incep"),
        (dict(n=100), "--n 100: there are 41 samples"),
        (dict(n=1), "--n must lie in"),
        (dict(side=64), "--side: inception has a side of its own"),
        (dict(features="dinov2", resizing="clean-fid"), "--resizing is for --features inception"),
        (
            dict(features="own", save_reference=Path("a.npz")),
            "ADM's file is of Inception's moments",
        ),
        (dict(size=64), "the images of an npz stay as they are"),
    ],
)
def test_what_cannot_be_is_refused(files, network, more, message):
    network(Counting())
    with pytest.raises(UserError) as error:
        evaluating.evaluate(options(files, **more))
    assert message in str(error.value)


def test_what_cannot_be_written_is_refused_before_anything_is_computed(files, network):
    used = network(Counting())
    (files / "file").write_text("")
    for name, message in (("out", "--out"), ("save_reference", "--save-reference")):
        for path in (files, files / "file" / "a.json", files / ("x" * 250 + ".json")):
            with pytest.raises(UserError, match=message):
                evaluating.evaluate(options(files, **{name: path}))
    with pytest.raises(UserError, match=r"--cache .*: (File exists|Not a directory)"):
        evaluating.evaluate(options(files, cache=files / "file"))
    assert used.seen == 0
    assert evaluating.beside(Path(".")).parent == Path.cwd().parent


def test_features_whose_notes_are_damaged_are_computed_again(files, network):
    expected = evaluating.evaluate(options(files) if network(Counting()) else None)["scores"]
    notes = list((files / "cache").glob("*/progress.json"))
    for damage in (
        b"{", b"5", b'{"done": 1}', b"\xff", b"[" * 9999, {"done": 10**5}, {"done": True},
        {"widths": {"../../x": 4}}, {"widths": 5}, {"widths": {"pooled": "4"}}, {"widths": {}},
    ):  # fmt: skip
        for path in notes:
            if isinstance(damage, bytes):
                path.write_bytes(damage)
            else:
                path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        assert evaluating.evaluate(options(files))["scores"] == expected


def test_two_that_compute_the_same_wait_for_each_other(files, network, capsys):
    """They would begin each other's files anew: rows of zeros in a finished array."""
    network(Counting())
    folder = files / "cache" / "key"
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with store._alone(folder):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with store._alone(folder):
        inside.set()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "another process computes these features" in capsys.readouterr().out


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(files, network, monkeypatch):
    """A page of a mapped file that finds no room is a SIGBUS."""
    network(Counting())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            evaluating.evaluate(options(files))
    assert evaluating.evaluate(options(files))["protocol"]["samples"]["images"] == len(SAMPLES)


def test_an_npz_of_odd_kinds_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)  # in the middle of what is compressed
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        list(NpzImages(path).batches(2))
    monkeypatch.setattr(metrics.reference, "MOST_BYTES", 10**5)
    np.savez_compressed(path, mu=np.zeros(200), sigma=np.zeros((200, 200)))
    with pytest.raises(ValueError, match="sigma has more than 100000 bytes"):
        metrics.read_reference(path)


def test_a_networks_features_and_a_users_function(files, monkeypatch):
    network = Inception(divide=64, key=jax.random.key(0))
    pretrained.save(network, files / "inception.safetensors")
    monkeypatch.setattr(networks.pretrained, "load_inception", pretrained.load)
    given = options(files, weights=files / "inception.safetensors")
    about = networks.make_extractor(given).about
    assert about["features"] == "inception" and len(about["weights"]) == 64
    code = "def features(images):\n    return images.reshape(len(images), -1)[:, :3] / 255\n"
    (files / "own.py").write_text(code)
    own = networks.make_extractor(options(files, features="own", weights=files / "own.py"))
    found = own.finish(own.start(SAMPLES[:4], 8), 4)
    np.testing.assert_allclose(found["pooled"], SAMPLES[:4, 0, 0] / 255, rtol=1e-6)
    (files / "own.py").write_text("")
    with pytest.raises(UserError, match="has no function features"):
        networks.make_extractor(options(files, features="own", weights=files / "own.py"))
    with pytest.raises(UserError, match=r"--weights: .*weights.pth is not the published file"):
        monkeypatch.undo()
        networks.make_extractor(options(files))


def test_labels_are_counted():
    assert label_balance(None) is None
    assert label_balance(LABELS) == {"classes": 3, "fewest": 13, "most": 14}


def test_the_command_ends_with_2_and_one_message(tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate", "--samples", str(tmp_path / "a.npz")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines() == [
        f"error: --samples: there is no file or folder {tmp_path / 'a.npz'}."
    ]


def test_the_encoders_of_images_give_features(files):
    """DINOv2 and CLIP, from transformers' folders, through the command's own way."""
    keys = jax.random.split(jax.random.key(0))
    dinov2 = DINOv2(8, 1, 2, grid=2, patch_size=4, key=keys[0])
    clip = CLIPImage(8, 1, 2, 5, grid=2, patch_size=4, key=keys[1])
    for name, network, side, width in (("dinov2", dinov2, 8, 8), ("clip", clip, None, 5)):
        pretrained.export(network, files / name)
        given = options(files, features=name, weights=files / name, side=side)
        made = networks.make_extractor(given)
        found = made.finish(made.start(SAMPLES[:3], 4), 3)["pooled"]
        prepare = dinov2_input if name == "dinov2" else clip_input
        image = jnp.asarray(np.moveaxis(SAMPLES[2], -1, 0), jnp.float32)
        expected = network(prepare(image, 8)).features
        assert found.shape == (3, width)
        np.testing.assert_allclose(found[2], expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match="--side"):
            networks.make_extractor(options(files, features=name, weights=files / name, side=9))
    with pytest.raises(UserError, match="is a CLIPImage, not a DINOv2"):
        networks.make_extractor(options(files, features="dinov2", weights=files / "clip", side=8))
