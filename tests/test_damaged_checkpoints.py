"""Damaged checkpoints: every damage is found and named, and the newest good one is taken."""

import errno
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.digests import digest

from checkpointing import LIKE, files, names, place, saved, state

# Damage


def damages(path):
    """Ways to damage a file of a few bytes, each with what the message says of it."""
    content = path.read_bytes()
    size = len(content)
    about = path.name == "about.json"
    changed = "is damaged" if about else "is not the file that was written"
    for position in sorted({0, 1, size // 3, size // 2, 2 * size // 3, size - 2, size - 1}):
        for flip in (0x01, 0x80):
            other = bytearray(content)
            other[position] ^= flip
            yield bytes(other), changed
    for other in (b"", content[: size // 2], content[:-1], content + b" "):
        yield other, changed
    yield None, "is missing" if about else "No such file"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of several arrays over two devices."""
    folder = tmp_path_factory.mktemp("sharded")
    tree = {"a": state(0)["w"], "b": state(1)["w"], "step": np.array(3, np.int32)}
    tree = {name: place(array, 2, P("data")) for name, array in tree.items()}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree, info={"note": "é"})
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
                name = path.relative_to(folder).as_posix()
                with pytest.raises(CheckpointError, match=f"^{folder}: {name}:? .*{message}") as e:
                    checkpoints.restore(1, tree)
                assert e.type is CheckpointError and "\n" not in str(e.value)
            path.write_bytes(content)
        assert tried > 100
        assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
        with pytest.raises(CheckpointError, match=f"^{folder.parent}/2: there is no such check"):
            checkpoints.restore(2, tree)
    assert capfd.readouterr() == ("", "")


def test_a_flipped_bit_anywhere_in_a_large_array_is_found(tmp_path):
    """Also where only tensorstore looks, far from the end of the file."""
    array = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": array})
        checkpoints.wait()
        path = max(files(tmp_path), key=lambda path: path.stat().st_size)
        content = path.read_bytes()
        for position in range(0, len(content), len(content) // 20):
            other = bytearray(content)
            other[position] ^= 0x10
            path.write_bytes(other)
            with pytest.raises(CheckpointError, match=f"^{tmp_path}/1: ") as error:
                checkpoints.restore(1, {"w": array})
            assert "0/c/0/0" in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)
        np.testing.assert_array_equal(checkpoints.restore(1, {"w": array})[0]["w"], array)


def exchange(a, b):
    """Two files or folders change their places."""
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def test_what_is_whole_but_belongs_elsewhere_is_found(tmp_path):
    saved(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(3, {"a": state(0)["w"], "b": state(1)["w"]})
        checkpoints.wait()
        exchange(tmp_path / "1", tmp_path / "2")
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=f"{step}: it is the checkpoint of step"):
                checkpoints.restore(step, LIKE)
            with pytest.raises(CheckpointError, match="it is the checkpoint of step"):
                checkpoints.info(step)
        (a,), (b,) = ((tmp_path / "3").glob(f"{folder}/c") for folder in ("0", "1"))
        exchange(a, b)
        with pytest.raises(CheckpointError, match="is not the file that was written"):
            checkpoints.restore(3, {"a": LIKE["w"], "b": LIKE["w"]})
        exchange(a, b)
        assert digest(checkpoints.restore(3, {"a": LIKE["w"], "b": LIKE["w"]})[0]["a"]) == digest(
            state(0)["w"]
        )


def test_another_configuration_is_refused_by_name(sharded):
    folder, tree = sharded
    zeros = jnp.zeros
    for change, message in [
        ({"a": zeros((4, 7))}, r"\['a'\] was float32 \(4, 6\), is now float32 \(4, 7\)"),
        ({"a": zeros((4, 6), jnp.bfloat16)}, r"\['a'\] was float32 \(4, 6\), is now bfloat16"),
        ({"c": zeros(3)}, r"\['c'\] was not there, is now float32 \(3,\)\.$"),
        ({"a": None}, r"\['a'\] was float32 \(4, 6\), is now not asked for\.$"),
        ({"a": {"w": tree["a"]}}, r"\['a'\]\['w'\] was not there.*; \['a'\] was .* not asked for"),
        ({str(k): zeros(1) for k in range(5)}, r"\['0'\] .*\['1'\] .*\['2'\] .* and 2 more\.$"),
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


def test_a_damaged_one_that_cannot_be_renamed_is_stepped_past(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    saved(tmp_path, 1, 2)
    empty_largest(tmp_path / "2")
    monkeypatch.setattr(Path, "rename", refuse)
    reports = []
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest(LIKE, report=reports.append)[0] == 1
    assert "It cannot be renamed: Read-only file system." in reports[0]
