"""What the job refuses at its start, and what it takes from damaged files, without training."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import pytest

from eqxldm.data import DataError, ImageArrays
from eqxldm.telemetry import MissingPackage
from experiments.train import telemetry
from experiments.train.__main__ import given
from experiments.train.autoencoder import load_vae
from experiments.train.checks import check_out, check_readable, check_writable
from experiments.train.commands import Evaluate, Sample, Train
from experiments.train.conditions import Captions, Labels, Nothing
from experiments.train.config import Config
from experiments.train.evaluate import summary, write_curves
from experiments.train.job import read_data
from experiments.train.options import check, range_of, read_options
from experiments.train.presets import preset
from experiments.train.reference import LEAST, Reference
from experiments.train.run import RunFolder, as_dict
from experiments.train.telemetry import LogOptions, check_packages
from experiments.train.terminal import UserError

ROOT = Path(__file__).parents[1]
CONFIG = preset("smoke").config

# Ranges


def ranged(kind, path=()):
    """The fields that have a range, by their place."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, plain in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(plain):
            yield from ranged(plain, (*path, name))
        elif (allowed := range_of(hints[name])) is not None:
            yield (*path, name), allowed, "tuple" in str(plain)


def replaced(options, path, value):
    name, *below = path
    value = replaced(getattr(options, name), below, value) if below else value
    return dataclasses.replace(options, **{name: value})


@pytest.mark.parametrize("kind", [Train, Sample, Evaluate])
def test_no_number_outside_its_range_is_taken(kind):
    options, fields = kind(), list(ranged(kind))
    check(options)
    assert len(fields) > 5
    for path, allowed, several in fields:
        low, high = allowed.low, allowed.high
        beyond = [low - 1, high + 1 if high < 2**53 else 2 * high, np.inf, -np.inf, np.nan]
        beyond += [low] * (allowed.ends[0] == "(") + [high] * (allowed.ends[1] == ")")
        for number in beyond:
            value = (number, number) if several else number
            with pytest.raises(UserError, match=rf"^--.*{path[-1].replace('_', '-')} must lie in"):
                check(replaced(options, path, value))


@pytest.mark.parametrize("channels", [[8, "8"], [8, 8.5], [8, None], [[8], 8], [8, -1], []])
def test_every_entry_of_a_list_in_a_configuration_is_looked_at(tmp_path, channels):
    config = as_dict(CONFIG)
    config["autoencoder"]["channels"] = channels
    (tmp_path / "config.json").write_text(json.dumps(config))
    for _ in range(8):  # a look at one entry, chosen at random, would miss some
        with pytest.raises(UserError, match=r"config\.json .*damaged"):
            read_options(Config, RunFolder(tmp_path))


def test_an_option_that_an_earlier_version_did_not_have_is_read_as_its_default(tmp_path, capsys):
    run, config = RunFolder(tmp_path), Config()
    with run.locked():
        run.open(as_dict(config), overwrite=False)
    written = as_dict(config)
    del written["form"], written["dit"]["norm"], written["few"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_options(Config, run) == config
    said = " ".join(capsys.readouterr().out.split())
    assert "of an earlier version; form, few, dit.norm are taken by default." in said
    run.open(as_dict(config), overwrite=False, defaults=as_dict(config))  # goes on
    other = dataclasses.replace(config, form="modern")
    with pytest.raises(UserError, match="--form: the folder has published, now modern"):
        run.open(as_dict(other), overwrite=False, defaults=as_dict(config))
    (tmp_path / "config.json").write_text(json.dumps(written | {"later": 1}))
    with pytest.raises(UserError, match="another version"):
        read_options(Config, run)


def test_of_an_option_that_comes_twice_the_last_one_counts():
    args = ["train", "--images", "a", "--preset=mnist", "--images", "b", "--preset", "smoke"]
    assert given(args, "--images") == ["b"] and given(args, "--preset") == ["smoke"]


# What the end needs


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("name", "a picture's name ends with"), ("a.webm", "a picture's name ends with"),
        (".png", "a picture's name ends with"), ("folder.png", "is a folder"),
        ("file/a.png", "is no folder"), ("file/below/a.png", "is no folder"),
        ("x" * 240 + ".png", "name too long"), ("x" * 300 + ".png", "name too long"),
        ("/proc/a.png", "No such file"), ("/proc/below/a.png", "No such file"),
        ("a.jpg", "4 channels cannot be written as .jpg"),
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(tmp_path, name, reason):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"(?i)^--out .*{reason}"):
        check_out(tmp_path / name, np.zeros((4, 4, 4), np.uint8))
    assert len(list(tmp_path.iterdir())) == 2


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path):
    for name in ("a.png", "b/c/a.PNG", "a.webp", "a.tiff", "a.bmp"):
        for channels in (1, 3):
            check_out(tmp_path / name, np.zeros((4, 4, channels), np.uint8))
    check_writable(tmp_path / "new" / "header.json", "--latents")
    with pytest.raises(UserError, match=r"20000 pixels .* cannot be written as \.webp"):
        check_out(tmp_path / "a.webp", np.zeros((1, 20_000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


class Broken(ImageArrays):
    """The last `broken` ones are no pictures."""

    broken = 0

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record._replace(image=b"no image") if index >= len(self) - self.broken else record


def source(readable, broken=0, captions=False):
    images = np.random.default_rng(0).integers(0, 256, (readable + broken, 12, 12, 3), np.uint8)
    texts = ["text"] * len(images) if captions else None
    found = Broken(images, np.zeros(len(images), int), class_names=("a",), captions=texts)
    found.broken = broken
    return found


def test_images_that_cannot_be_read_do_not_count_as_a_reference():
    make = lambda *args: Reference(CONFIG, *args, Nothing(), strict=False)
    make(source(40, 40), None)
    make(source(LEAST, 300), source(LEAST))
    with pytest.raises(UserError, match=r"measured against only 0 can be read: at least 5"):
        make(source(20), source(0, 20))
    with pytest.raises(UserError, match=r"compared with only 4 can be read"):
        make(source(LEAST - 1, 20), source(20))
    with pytest.raises(UserError, match="at least 5 are needed there and 5 others"):
        make(source(20), source(2))
    with pytest.raises(DataError, match="cannot be decoded"):
        Reference(CONFIG, source(20), source(0, 20), Nothing(), strict=True)


def test_a_batch_of_latents_needs_as_many_images_that_can_be_read():
    options = dataclasses.replace(CONFIG.diffusion, batch_size=16)
    config = dataclasses.replace(CONFIG, diffusion=options)
    check_readable(config, source(16, 30), strict=False)
    with pytest.raises(UserError, match="batch-size 16 is more than the 15 training images that"):
        check_readable(config, source(15, 30), strict=False)


def test_test_images_have_captions_where_samples_are_drawn_for_them():
    plain, captioned = source(20), source(20, captions=True)
    make = lambda test, condition: Reference(CONFIG, captioned, test, condition, strict=False)
    make(captioned, Captions(8)), make(plain, Labels(1, 1)), make(None, Captions(8))
    with pytest.raises(UserError, match="--test-images: they have no captions"):
        make(plain, Captions(8))


def test_a_log_whose_package_is_missing_is_refused(monkeypatch):
    def missing(package):
        raise MissingPackage(f"{package} is not installed.")

    check_packages(LogOptions())
    monkeypatch.setattr(telemetry, "require", missing)
    check_packages(LogOptions())
    for options in (LogOptions(tensorboard=True), LogOptions(wandb="project")):
        with pytest.raises(UserError, match=r"--log: .* is not installed"):
            check_packages(options)


# Damaged files of a run


def finished(folder, **files):
    """A run's files; those named have other content."""
    about = {"source": "x", "condition": "label", "class_names": ["a", "b"], "path": None}
    found = {"config": as_dict(CONFIG), "data": about, "metrics": {"timings": {}}} | files
    for name, content in found.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return RunFolder(folder)


@pytest.mark.parametrize(
    "change",
    [{"class_names": 5}, {"condition": "foo"}, {"condition": None}, {"path": 5}, {"path": ["a"]}],
)
def test_descriptions_of_the_images_of_other_types_are_damaged(tmp_path, change):
    run = finished(tmp_path)
    condition, about = read_data(run, CONFIG)
    assert condition == Labels(2, 2) and about["path"] is None
    run = finished(tmp_path, data=about | change)
    with pytest.raises(UserError, match=rf"data\.json is damaged \({next(iter(change))} is"):
        read_data(run, CONFIG)


@pytest.mark.parametrize(
    "metrics", [{}, {"timings": 5}, {"timings": {}, "diffusion": 5}, {"timings": None}]
)
def test_metrics_of_other_types_are_damaged(tmp_path, metrics):
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        finished(tmp_path, metrics=metrics).metrics()


def test_a_summary_says_what_is_there(tmp_path):
    odd = {"timings": {}, "diffusion": {"fd": 1.5, "samples": [1]}, "autoencoder": None}
    found = finished(tmp_path, metrics=odd).metrics()
    assert found is not None and summary(found, tmp_path).startswith("samples: fd 1.5\n")


def test_an_autoencoder_whose_description_is_of_another_type_is_named(tmp_path):
    (tmp_path / "autoencoder.safetensors").write_bytes(b"")
    for content in ('{"sha256": 5}', "{}", "[]", '{"sha256": null}'):
        (tmp_path / "autoencoder.json").write_text(content)
        with pytest.raises(UserError, match=r"autoencoder\.json is damaged"):
            load_vae(tmp_path, 3)


def test_curves_are_drawn_of_a_log_with_odd_values(tmp_path):
    run = RunFolder(tmp_path)
    rows = [{"step": 1, "loss": 2.0}, {"step": "x", "loss": 1.0}, {"step": 2, "loss": "x"}]
    rows += [{"step": 3, "loss": None}, {"step": 4, "loss": 2**2000}, {"step": [5], "loss": [1]}]
    for row in rows:
        run.log(stage="diffusion", **row)
    write_curves(run)
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, ".", "", "/a", "a/../../b", 5])
def test_a_manifest_of_names_that_are_none_is_refused(tmp_path, name):
    finished(tmp_path, manifest={"wrote": [name]})
    with pytest.raises((UserError, OSError)) as error:
        RunFolder(tmp_path).open({"a": 2}, overwrite=True)
    assert isinstance(error.value, UserError) or error.value.errno == errno.ENAMETOOLONG
    assert (tmp_path / "config.json").exists()


# One run at a time


def test_of_runs_that_start_together_one_has_the_folder(tmp_path):
    for number in range(20):
        folder, together = tmp_path / str(number), threading.Barrier(3)
        said, inside = [], []

        def begin(folder=folder, together=together, said=said, inside=inside):
            run = RunFolder(folder)
            together.wait()
            try:
                with run.locked():
                    run.open({"a": 1}, overwrite=False)
                    inside.append(run)
                    together.wait()
            except UserError as error:
                said.append(str(error))
                together.wait()

        threads = [threading.Thread(target=begin) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join(timeout=30) for thread in threads]
        assert len(inside) == 1
        assert said == [f"{folder} is in use by another process."] * 2


def test_a_run_that_begins_while_another_looks_is_no_foreign_folder(tmp_path, monkeypatch):
    """The folder has a configuration by the time that its entries are listed."""
    (tmp_path / ".lock").write_text("")
    listing = Path.iterdir

    def begun_before(path):
        (tmp_path / "config.json").write_text("{}")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", begun_before)
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_not_one_in_use(tmp_path, monkeypatch, capsys, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(tmp_path).locked():
        RunFolder(tmp_path).open({"a": 1}, overwrite=False)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert "its file system has no locks" in capsys.readouterr().out


# Output that cannot be written

FULL = """
import sys
from experiments.train.terminal import UserError, run_main, say

def main():
    for _ in range(3):
        say("x" * 10_000)
    raise UserError("the end")

sys.exit(run_main(main))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("both", [False, True])
def test_a_full_disk_behind_the_output_stops_nothing(both):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", FULL], cwd=ROOT, stdout=full, text=True,
            stderr=full if both else subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 2
    assert both or done.stderr == "error: the end\n"
