"""Files appear whole or not at all, whoever else writes them."""

import os

import pytest

from eqxldm.durable import replacing


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
    others = [".b.txt-0123abcd.txt", ".own-file", "a.txt-0123abcd.txt"]
    for name in (".a.txt-0123abcd.txt", *others):
        (tmp_path / name).write_text("")
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


def test_a_file_may_be_read_by_those_that_the_umask_says(tmp_path):
    def by_itself(temporary):  # as libraries do that write a file of their own and rename it
        other = tmp_path / "other"
        other.touch(mode=0o600)
        os.replace(other, temporary)

    old = os.umask(0o027)
    try:
        for name, write in (("a", lambda path: path.write_text("")), ("b", by_itself)):
            with replacing(tmp_path / name) as temporary:
                write(temporary)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
