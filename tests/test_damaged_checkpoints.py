"""Damaged checkpoints: every damage is found and named, and the newest good one is taken."""

import errno
import gc
import os

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqxldm.checkpoints import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    _about as description,
    folder as folders,
)
from eqxldm.fingerprints import digest

from checkpointing import LIKE, files, names, place, saved, state

# Damage


def damages(path):
    """Ways to damage a file, each with what the message says of it."""
    content = path.read_bytes()
    size = len(content)
    about = path.name == "about.json"
    for position in sorted({0, 1, size // 3, size // 2, 2 * size // 3, size - 2, size - 1}):
        for flip in (0x01, 0x80):
            other = bytearray(content)
            other[position] ^= flip
            yield bytes(other), "is damaged" if about else "has other bytes than were written"
    truncated = "is damaged" if about else "bytes, .* were written"
    yield b"", "is empty" if about else "has 0 bytes"
    yield content[: size // 2], truncated
    yield content[:-1], truncated
    yield content + b" ", truncated
    yield None, "is missing"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of several arrays over two devices."""
    folder = tmp_path_factory.mktemp("sharded")
    tree = {"a": state(0)["w"], "b": state(1)["w"], "step": np.array(3, np.int32)}
    tree = {name: place(array, 2, P("data")) for name, array in tree.items()}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree, info={"note": "é"}, metric=0.25)
    return folder / "1", tree


def test_no_damage_to_any_file_is_taken_for_good(sharded, capfd):
    folder, tree = sharded
    tried = 0
    with Checkpoints(folder.parent) as checkpoints:
        for path in files(folder):
            content = path.read_bytes()
            for damaged, message in damages(path):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                tried += 1
                if path.name in description._UNREAD:
                    assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
                    continue
                name = path.relative_to(folder).as_posix()
                with pytest.raises(CheckpointError, match=f"^{folder}: {name} .*{message}") as e:
                    checkpoints.restore(1, tree)
                assert e.type is CheckpointError and "\n" not in str(e.value)
            path.write_bytes(content)
        assert tried > 100
        assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
        with pytest.raises(CheckpointError, match=f"^{folder.parent}/2: there is no such check"):
            checkpoints.restore(2, tree)
    assert capfd.readouterr() == ("", "")


def seal_again(folder):
    """Makes the files count as written: what is left is orbax and the fingerprints."""
    about = description.read_about(folder)
    about["files"] = {name: description.described_files(folder)[name] for name in about["files"]}
    (folder / "about.json").write_text(description.sealed(about))


def test_damage_that_the_files_do_not_show_is_found_in_the_arrays(sharded, capfd):
    folder, tree = sharded
    refused = 0
    with Checkpoints(folder.parent) as checkpoints:
        largest = max(files(folder / "ocdbt.process_0"), key=lambda path: path.stat().st_size)
        for path in [*files(folder / "d"), largest, folder / "_METADATA"]:
            content = path.read_bytes()
            for position in range(3, len(content), len(content) // 6):
                other = bytearray(content)
                other[position] ^= 0x04
                path.write_bytes(bytes(other))
                seal_again(folder)
                try:
                    assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
                except CheckpointError as error:
                    assert str(error).startswith(f"{folder}: ") and "\n" not in str(error)
                    refused += 1
            path.write_bytes(content)
        seal_again(folder)
        about = description.read_about(folder)
        about["fingerprints"]["['b']"] = about["fingerprints"]["['a']"]
        text = (folder / "about.json").read_text()
        (folder / "about.json").write_text(description.sealed(about))
        with pytest.raises(CheckpointError, match=r"not what was saved: \['b'\]\.$"):
            checkpoints.restore(1, tree)
        (folder / "about.json").write_text(text)
    assert refused > 6
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_another_configuration_is_refused_by_name(sharded):
    folder, tree = sharded
    zeros = jnp.zeros
    for change, message in [
        ({"a": zeros((4, 7))}, r"\['a'\] was float32 \(4, 6\), is now float32 \(4, 7\)"),
        ({"a": zeros((4, 6), jnp.bfloat16)}, r"\['a'\] was float32 \(4, 6\), is now bfloat16"),
        ({"c": zeros(3)}, r"not in the checkpoint: \['c'\]\.$"),
        ({"a": None}, r"only in the checkpoint: \['a'\]\.$"),
        ({"a": {"w": tree["a"]}}, r"not in .*: \['a'\]\['w'\]; only in .*: \['a'\]\.$"),
        ({str(k): zeros(1) for k in range(5)}, r"\['0'\], \['1'\], \['2'\] and 2 more"),
    ]:
        with Checkpoints(folder.parent) as checkpoints:
            with pytest.raises(CheckpointMismatch, match=f"{folder} is of another.*{message}"):
                checkpoints.restore(1, tree | change)
            with pytest.raises(CheckpointMismatch):
                checkpoints.restore_newest(tree | change)
    assert names(folder.parent) == ["1"]


# The newest good one


def empty_largest(folder):
    max(files(folder), key=lambda path: path.stat().st_size).write_bytes(b"")


def test_the_newest_good_one_is_taken_and_the_damaged_do_not_count(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    empty_largest(tmp_path / "4")
    (tmp_path / "3" / "about.json").unlink()
    reports = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, restored, info = checkpoints.restore_newest(LIKE, report=reports.append)
        assert (step, info) == (2, {}) and digest(restored) == digest(state(2))
        assert names(tmp_path) == ["1", "2", "3.damaged", "4.damaged"]
        assert [report.split()[2] for report in reports] == [f"{tmp_path}/{k}:" for k in (4, 3)]
        assert reports[1].endswith("/3: about.json is missing. Renamed to 3.damaged.")
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        empty_largest(tmp_path / "3")
        assert checkpoints.restore_newest(LIKE, report=reports.append)[0] == 2
    assert names(tmp_path) == ["2", "3.damaged", "3.damaged-1", "4.damaged"]


def test_if_none_is_usable_all_are_listed_and_stay(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: there is no checkpoint"):
        Checkpoints(tmp_path).restore_newest(LIKE)
    saved(tmp_path, 1, 2)
    empty_largest(tmp_path / "1")
    (tmp_path / "2" / "about.json").write_text("{}")
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore_newest(LIKE, report=pytest.fail)
            lines = str(error.value).splitlines()
            assert lines[0] == f"{tmp_path}: no checkpoint is usable:"
            assert lines[1] == f"  {tmp_path}/2: about.json is damaged."
            assert lines[2].startswith(f"  {tmp_path}/1: ") and len(lines) == 3
    assert names(tmp_path) == ["1", "2"]


def test_a_damaged_one_that_cannot_be_renamed_does_not_count(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    empty_largest(tmp_path / "2")
    reports = []
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            refuse = OSError(errno.EROFS, os.strerror(errno.EROFS))
            patch.setattr(folders, "_set_aside", lambda *_: (_ for _ in ()).throw(refuse))
            assert checkpoints.restore_newest(LIKE, report=reports.append)[0] == 1
        assert "cannot be renamed: Read-only file system." in reports[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]
        assert digest(checkpoints.restore(2, LIKE)[0]) == digest(state(2))
    assert names(tmp_path) == ["2", "2.damaged"]
