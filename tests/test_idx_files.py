"""IDX files, and a folder of one's own with them."""

import gzip
import re

import numpy as np
import pytest

from eqxldm.data import (
    DataError,
    open_mnist,
    read_idx,
)

from mnist_files import (
    CONTENTS,
    NAMES,
    PACKED,
    arrays,
    check,
    fill,
    idx,
    mirrors,
    pack,
    spec,
    splits,
)

mirror = pytest.fixture(mirrors)

# IDX files


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_read_idx_returns_the_array_whatever_the_name(tmp_path, shape, packed):
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / ("a" if packed else "a.gz")
    path.write_bytes(pack(idx(array)) if packed else idx(array))
    got = read_idx(path)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == np.uint8 and got.shape == shape and got.flags.writeable


GOOD = idx(np.arange(12).reshape(3, 4))
NOISE = np.random.default_rng(2).integers(0, 256, 1000).astype(np.uint8)

# Stored without compression, so that a changed byte reaches the checksum.
STORED = gzip.compress(idx(NOISE), 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "starts with the bytes 00 00.* got an empty file"),
        (b"<html>", "got 3c 68 74 6d"),
        (GOOD[:7], "expected an IDX header.* got rank 2 in 7 bytes"),
        (bytes([0, 0, 8, 0]), "rank 1 or more, got rank 0"),
        (GOOD[:-1], r"truncated: expected 24 bytes for the shape \(3, 4\).* got 23"),
        (GOOD + b"!", "left over: expected 24 bytes .* got 25"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], r"0x08 \(uint8\), got 0x0d \(float32\)"),
        (GOOD[:2] + b"\x01" + GOOD[3:], r"got 0x01 \(unknown\)"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, r"truncated: expected 79228162458924105385300197391"),
        (bytes([0, 0, 8, 4]) + b"\0" * 4 + b"\xff" * 12, "a shape that NumPy can hold"),
        (pack(GOOD)[:-1], "complete gzip file.* the file is truncated"),
        (pack(GOOD)[:5], "complete gzip file, but its 5 bytes"),
        (STORED[:500] + bytes([STORED[500] ^ 1]) + STORED[501:], "corrupt.*CRC"),
        (pack(GOOD[:-1]), "expected 24 bytes .* got 23"),
        (pack(GOOD) + b"junk", "corrupt"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_damaged_idx_file_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)^{re.escape(str(path))}: .*{message}"):
        read_idx(path)


def test_idx_file_that_cannot_be_opened_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="nothing: cannot be read: No such file"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path)
    assert issubclass(DataError, ValueError)


# A user's folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_data_dir_takes_either_spelling_packed_or_not(tmp_path, packed, dotted):
    contents = {}
    for name, content in CONTENTS.items():
        name = name.replace("-idx", ".idx") if dotted else name
        contents[f"{name}.gz" if packed else name] = pack(content) if packed else content
    check(splits("mnist", fill(tmp_path / "data", contents), cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_data_dir_takes_any_size_and_a_string(tmp_path):
    folder = fill(tmp_path, {n: idx(a) for n, a in arrays(20, 11, 7).items()})
    train, test = splits("fashion-mnist", str(folder))
    assert train.images.shape == (20, 7, 7, 1) and test.images.shape == (11, 7, 7, 1)
    assert train.class_names == test.class_names and train.class_names[9] == "Ankle boot"
    record = test[3]
    np.testing.assert_array_equal(record.image, test.images[3])
    assert record[1:4] == ("fashion-mnist/test/3", 3, None)
    assert len({train.digest(), test.digest()}) == 2


def test_data_dir_without_the_files_says_which_and_never_falls_back(tmp_path, mirror):
    source, requests = mirror(PACKED)
    contents = {NAMES[0]: CONTENTS[NAMES[0]], "notes.txt": b""}
    with pytest.raises(DataError) as error:
        open_mnist(spec(source), fill(tmp_path / "data", contents), cache=tmp_path / "cache")
    message = str(error.value)
    assert f"lacks {NAMES[1]} (" in message
    assert f"it holds notes.txt, {NAMES[0]}." in message
    assert requests == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it holds nothing"):
        open_mnist("mnist", tmp_path / "empty")
    with pytest.raises(DataError, match="nowhere: expected a folder, but it does not exist"):
        open_mnist("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a folder, got a file"):
        open_mnist("mnist", tmp_path / "data" / "notes.txt")


@pytest.mark.parametrize(
    "which, array, message",
    [
        (1, np.zeros(5), f"{NAMES[1]}: expected 6 labels, one for each image of {NAMES[0]}, got"),
        (3, np.array([0, 10, 11]), "labels from 0 to 9, got 10 at index 1 \\(2 such labels\\)"),
        (3, np.zeros((3, 1)), r"expected 3 labels.* \(3, 1\)"),
        (0, np.zeros((6, 16)), r"shape \(count, height, width\).* got \(6, 16\)"),
        (2, np.zeros((0, 4, 4)), r"none of them 0, got \(0, 4, 4\)"),
    ],
)
def test_data_dir_whose_files_disagree_is_refused(tmp_path, which, array, message):
    contents = dict(CONTENTS)
    contents[NAMES[which]] = idx(array)
    with pytest.raises(DataError, match=message):
        splits("mnist", fill(tmp_path, contents))


def test_data_dir_with_a_truncated_file_is_refused(tmp_path):
    packed = PACKED[f"{NAMES[0]}.gz"]
    contents = {**PACKED, f"{NAMES[0]}.gz": packed[: len(packed) // 2]}
    with pytest.raises(DataError, match=f"{NAMES[0]}.gz: .*truncated"):
        open_mnist("mnist", fill(tmp_path, contents))


def test_unknown_dataset_names_the_known_ones():
    with pytest.raises(DataError, match="unknown dataset 'cifar': known are fashion-mnist, mnist"):
        open_mnist("cifar")
    with pytest.raises(DataError, match="mnist: unknown split 'val': known are train, test"):
        open_mnist("mnist", split="val")
