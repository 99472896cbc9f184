"""Files appear whole or not at all, whoever else writes them."""

import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest

from eqxldm import pretrained
from eqxldm.data.sources.arrayrecord import writing_records
from eqxldm.durable import replacing
from experiments.train.figures import save_png
from experiments.train.run import write_json

from helpers import small_autoencoder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new, half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_what_a_killed_writer_left_goes_and_nothing_else_does(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as temporary:
        name = temporary.name
        raise RuntimeError
    others = [".b.txt-0123abcd.txt", ".a.txt-backup", "a.txt-0123abcd.txt", ".own-file"]
    for left in (name, *others):
        (tmp_path / left).write_text("")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("")
    assert names(tmp_path) == sorted(["a.txt", *others])


def test_writers_at_the_same_time_leave_each_other_alone(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_comes_between_opening_and_locking_takes_nothing_away(tmp_path, monkeypatch):
    """It sees a file that nobody has locked yet, as a killed writer leaves one."""
    path, flock, between = tmp_path / "a.txt", fcntl.flock, []

    def with_another_before(file, how):
        if not between:
            between.append(file.name)
            with replacing(path) as other:
                other.write_text("other")
            assert not os.path.exists(between[0])
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", with_another_before)
    with replacing(path) as temporary:
        temporary.write_text("own")
        with replacing(path) as third:  # it leaves alone what is locked
            third.write_text("third")
    assert between and path.read_text() == "own" and names(tmp_path) == ["a.txt"]


MANY = """
import sys
from eqxldm.durable import replacing
for k in range(100):
    with replacing(sys.argv[1]) as temporary:
        temporary.write_text("whole " * 1000)
"""


def test_many_processes_write_one_file(tmp_path):
    path = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", MANY, path]) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert path.read_text() == "whole " * 1000 and names(tmp_path) == ["a.txt"]


def libraries():
    """How the files of a run are written."""

    def arrayrecord(path):
        with writing_records(path) as write:
            write(b"footer")

    return {
        "a.safetensors": lambda path: pretrained.save(small_autoencoder(), path),
        "a.arrayrecord": arrayrecord,
        "a.png": lambda path: save_png(path, np.zeros((2, 2, 3), np.uint8)),
        "a.json": lambda path: write_json(path, {}),
    }


def test_a_file_may_be_read_by_those_that_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        for name, write in libraries().items():
            write(tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_libraries_write_into_the_file_that_is_locked(tmp_path, monkeypatch):
    """And not into one of their own, which they move there: another writer would remove it."""
    for name, write in libraries().items():
        written = []

        def replace(temporary, path, written=written, move=os.replace):
            with open(temporary, "rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            written.append(path)
            move(temporary, path)

        monkeypatch.setattr(os, "replace", replace)
        write(tmp_path / name)
        monkeypatch.undo()
        assert written == [tmp_path / name]
