"""Folders: flat, by class, with captions; links that lead back, and what would go missing."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from eqxldm.data import DataError, ImageArrays, open_images, write_array_record


def folder_of(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def ids(source):
    return [record.id for record in source]


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


def refused(root, match):
    with pytest.raises(DataError, match=match):
        open_images(root)


@pytest.mark.parametrize("below", ["", "cat/"])
def test_a_flat_folder_or_a_single_class_has_no_labels(tmp_path, below):
    root = folder_of(tmp_path / "root", f"{below}b.png", f"{below}a.jpg", "notes.txt", ".x/c.png")
    source = open_images(root)
    assert source.class_names == () and not source.has_captions
    assert ids(source) == [f"{below}a.jpg", f"{below}b.png"]
    assert all(record.label is None and record.caption is None for record in source)
    other = open_images(folder_of(tmp_path / "other", f"{below}b.png", f"{below}a.jpg"))
    assert other.digest() == source.digest()


CAPTIONS = {"b.png": "two dogs", "in/deep/a.png": "eine Kätzin, 猫", "in/c.png": ""}


def captioned(root, kind, captions=CAPTIONS):
    folder_of(root, *CAPTIONS)
    if kind == "captions.json":
        (root / kind).write_text(json.dumps(captions), encoding="utf-8")
    else:
        rows = [json.dumps({"file_name": n, "text": t, "width": 3}) for n, t in captions.items()]
        (root / kind).write_text("\n".join([*rows, "", ""]), encoding="utf-8")
    return root


BOTH = pytest.mark.parametrize("kind", ["captions.json", "metadata.jsonl"])


@BOTH
def test_captions_beside_the_images(tmp_path, kind):
    source = open_images(captioned(tmp_path / "root", kind))
    assert source.has_captions and source.class_names == ()
    assert {r.id: r.caption for r in source} == CAPTIONS
    assert ids(source) == ["b.png", "in/c.png", "in/deep/a.png"]
    write_array_record(source, tmp_path / "a.arrayrecord")
    copy = open_images(tmp_path / "a.arrayrecord")
    assert list(copy) == list(source) and copy.has_captions and copy.digest() == source.digest()
    changed = captioned(tmp_path / "changed", kind, {**CAPTIONS, "b.png": "two cats"})
    assert open_images(changed).digest() != source.digest()


@BOTH
def test_captions_that_are_missing_or_of_no_image_are_named(tmp_path, kind):
    captions = {"in/c.png": "x", "b.png": "x", "in/d.png": "y"}
    refused(
        captioned(tmp_path / "a", kind, captions),
        r"1 of 3 images have no caption: in/deep/a\.png; 1 captions are of no image there: in/d",
    )
    refused(captioned(tmp_path / "b", kind, {**CAPTIONS, "b.png": ["x", "y"]}), "list of captions")
    refused(captioned(tmp_path / "c", kind, {**CAPTIONS, "b.png": 3}), "must be a text, got 3")
    refused(captioned(tmp_path / "d", kind, {**CAPTIONS, "./b.png": "x"}), "two captions of b.png")
    refused(captioned(tmp_path / "e", kind, {**CAPTIONS, "b.png": "\ud800"}), "must be a text")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("captions.json", "[1]", "expected an object"),
        ("captions.json", '{"b.png": "x", "b.png": "y"}', "two captions of b.png"),
        ("captions.json", '{"b.png": "x"', "is no JSON"),
        ("captions.json", "[" * 100_000, "is no JSON"),
        (
            "metadata.jsonl",
            '{"file_name": "b.png", "text": "x"}\n{"file_name"',
            "line 2 is no JSON",
        ),
        ("metadata.jsonl", '{"file_name": "b.png", "label": 1}', "line 1: .* got file_name, label"),
        ("metadata.jsonl", '{"file_name": 1, "text": "x"}', "file_name must be a text"),
        ("metadata.jsonl", "3", "got int"),
    ],
)
def test_damaged_captions(tmp_path, name, content, match):
    root = folder_of(tmp_path / "root", "b.png")
    (root / name).write_text(content)
    refused(root, match)
    other = {"captions.json": "metadata.jsonl", "metadata.jsonl": "captions.json"}[name]
    (root / other).write_text("{}")
    refused(root, "has both captions.json and metadata.jsonl")


def test_captions_that_are_not_utf8(tmp_path):
    root = folder_of(tmp_path / "root", "b.png")
    (root / "captions.json").write_bytes(b'{"b.png": "\xff"}')
    refused(root, "cannot be read")


# Links


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_links_that_lead_back_add_nothing(tmp_path, target, caplog):
    root = folder_of(tmp_path / "up" / "root", "cat/1.png", "dog/1.png", "../other/2.png")
    link(root / "cat" / "again", target)
    link(root / "dog" / "dogs", "../dog")
    with caplog.at_level(logging.WARNING):
        source = open_images(root)
    assert ids(source) == ["cat/1.png", "dog/1.png"]
    assert "again: passed over" in caplog.text and "dogs: passed over" in caplog.text


def test_three_links_to_the_root_end(tmp_path):
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    for name in ("cat/a", "cat/b", "dog/c"):
        link(root / name, root)
    assert ids(open_images(root)) == ["cat/1.png", "dog/1.png"]


def test_links_to_elsewhere_are_read_once(tmp_path, caplog):
    folder_of(tmp_path, "store/x.png", "store/deep/y.png", "files/z.png", "files/w.bin")
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    link(root / "emu", tmp_path / "store")
    for name in ("cat/a.png", "cat/b.png"):
        (root / name).symlink_to(tmp_path / "files" / "z.png")
    (root / "dog/k.png").symlink_to(tmp_path / "files" / "w.bin")  # named as an image here
    (root / "dog/l.png").symlink_to("1.png")
    source = open_images(root)
    assert source.class_names == ("cat", "dog", "emu")
    assert ids(source) == [
        "cat/1.png", "cat/a.png", "dog/1.png", "dog/k.png", "emu/x.png", "emu/deep/y.png",
    ]  # fmt: skip
    assert source[1].image == b"files/z.png"
    assert caplog.text.count("passed over") == 2


@pytest.mark.parametrize("target", ["cat", "..", "../root"])
def test_a_class_that_is_a_link_back_is_refused(tmp_path, target):
    """Passed over, it would shift the labels of the classes behind it."""
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    link(root / "bird", target)
    refused(root, "bird: is a link to images that are read as")


def test_a_file_of_two_classes_is_refused(tmp_path):
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    (root / "dog" / "2.png").symlink_to(root / "cat" / "1.png")
    refused(root, r"dog/2\.png: is the same file as .*cat/1\.png")
    (root / "dog" / "2.png").unlink()
    link(root / "dog" / "cats", "../cat")
    refused(root, "dog/cats: is a link to images that are read as .*cat: they would be of two")
    (root / "dog" / "cats").unlink()
    folder_of(tmp_path, "store/a.png", "store/in/b.png")
    link(root / "cat" / "x", tmp_path / "store" / "in")
    link(root / "dog" / "y", tmp_path / "store")
    refused(root, "dog/y: is a link to a folder around .*cat/x")


@pytest.mark.parametrize("name", ["cow", "cat/2.png", "cat/deep"])
def test_links_to_nothing_are_refused(tmp_path, name):
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    link(root / name, "gone")
    refused(root, f"{name}: is a link to nothing")
    (root / name).unlink()
    link(root / name, (root / name).name)  # to itself
    refused(root, f"{name}: is a link to nothing")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png", "dog/in/2.png")
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    refused(root, "dog/in: cannot be listed: Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_named_like_an_image_is_refused(tmp_path):
    root = folder_of(tmp_path / "root", "cat/1.png", "dog/1.png")
    os.mkfifo(root / "dog" / "2.png")
    refused(root, r"dog/2\.png: is named like an image and is no file")


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    try:
        (root / os.fsdecode(b"\xff.png")).write_bytes(b"?")
    except OSError:
        pytest.skip("the file system has UTF-8 names alone")
    source = open_images(root)
    assert source[0].image == b"?" and os.fsencode(source[0].id) == b"\xff.png"
    assert len(source.digest()) == 64


ASCII = """
import sys
from eqxldm.data import open_images

for root in sys.argv[1:]:
    source = open_images(root)
    print(ascii([source[i].caption or source[i].image.decode() for i in range(len(source))]))
    print(source.digest())
"""


def test_names_mean_the_same_in_every_locale(tmp_path):
    plain, told = (folder_of(tmp_path / name, "é/中.png", "ü/b.png") for name in ("a", "b"))
    captions = {"é/中.png": "one", "ü/b.png": "two"}
    (told / "captions.json").write_text(json.dumps(captions))
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = [
        subprocess.run(
            [sys.executable, "-c", ASCII, plain, told], env=os.environ | locale,
            capture_output=True, text=True, check=True,
        ).stdout
        for locale in (strict, {"PYTHONUTF8": "1"})
    ]  # fmt: skip
    assert said[0] == said[1] and "['one', 'two']" in said[0]


# Arrays


def test_arrays_are_a_source():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 2), np.uint8)
    plain = ImageArrays(images)
    assert plain.class_names == () and plain[2][1:] == ("image/2", None, None, None)
    captioned = ImageArrays(images, captions=list("abcd"))
    assert captioned.has_captions and captioned[3].caption == "d"
    labelled = ImageArrays(images, np.array([0, 2, 1, 2], np.uint8), name="x")
    assert labelled.class_names == ("0", "1", "2") and labelled[1].label == 2
    digests = [s.digest() for s in (plain, captioned, labelled, ImageArrays(images + 1))]
    digests.append(ImageArrays(images, np.array([0, 2, 1, 1])).digest())
    assert len(set(digests)) == 5 and ImageArrays(images.copy()).digest() == plain.digest()
    for labels in ([0, 1, 2, 3], [0, -1, 0, 0]):
        with pytest.raises(DataError, match="expected labels from 0 to 2, got"):
            ImageArrays(images, np.array(labels), class_names=("a", "b", "c"))
    with pytest.raises(DataError, match="a caption for each of 4 images, got 1"):
        ImageArrays(images, captions=["a"])


def test_arrays_go_into_array_records(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 1), np.uint8)
    write_array_record(ImageArrays(images, np.array([0, 1, 1])), tmp_path / "a.arrayrecord")
    source = open_images(tmp_path / "a.arrayrecord")
    from eqxldm.data import decode_image

    for record, image, label in zip(source, images, [0, 1, 1], strict=True):
        np.testing.assert_array_equal(decode_image(record.image, 1), image)
        assert record.label == label
