"""Image folders, tars, parquet and ArrayRecord files: the same records, and clear refusals."""

import io
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from eqxldm.data import DataError, ImageRecord, ImageSource, open_images, write_array_record
from eqxldm.data.sources.arrayrecord import ImageArrayRecord, RecordFiles, writing_records
from eqxldm.data.sources.folder import ImageFolder
from eqxldm.data.sources.parquet import ImageParquet
from eqxldm.data.sources.tar import ImageTars


def picture(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


# Names in the order of torchvision's ImageFolder: by class, then by folder, then by name.
CONTENTS = {
    "cat/b.JPEG": picture(0, "JPEG"),
    "cat/c.png": picture(1),
    "cat/ä.WebP": picture(2, "WEBP"),
    "cat/a/z.png": picture(3),
    "dog/10.png": picture(4),
    "dog/9.png": picture(5),
    "emu/x.jpg": picture(6, "JPEG"),
}
LABELS = [0, 0, 0, 0, 1, 1, 2]


def folder_of(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tar_of(path, contents, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def class_tars(root, contents):
    """Each class's tar; members in another order than sorted, and one that is no image."""
    for label in {name.split("/")[0] for name in contents}:
        inner = {n[len(label) + 1 :]: c for n, c in contents.items() if n.startswith(f"{label}/")}
        tar_of(root / f"{label}.tar", {"readme.txt": b"?", **dict(reversed(inner.items()))})
    return root


def outer_tar(path, contents):
    tars = class_tars(path.parent / "tars", contents)
    return tar_of(path, {p.name: p.read_bytes() for p in sorted(tars.iterdir(), reverse=True)})


FLAT = {name: content for name, content in CONTENTS.items() if name.count("/") == 1}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EQXLDM_CACHE", str(tmp_path / "cache"))


def test_a_folder_lists_as_torchvision_does(tmp_path):
    root = folder_of(tmp_path / "root", CONTENTS)
    folder_of(root, {"cat/notes.txt": b"?", ".hidden/a.png": b"?", "cat/._c.png": b"?"})
    source = open_images(root)
    assert isinstance(source, ImageFolder) and isinstance(source, ImageSource)
    assert source.class_names == ("cat", "dog", "emu") and len(source) == 7
    found = zip(CONTENTS, CONTENTS.values(), LABELS, strict=True)
    assert list(source) == [ImageRecord(image, id, label) for id, image, label in found]
    assert not source.has_captions


def test_the_digest_covers_names_sizes_and_labels(tmp_path):
    digests = {open_images(folder_of(tmp_path / "a", CONTENTS)).digest()}
    assert open_images(folder_of(tmp_path / "b", CONTENTS)).digest() in digests
    renamed = {name.replace("x.jpg", "y.jpg"): content for name, content in CONTENTS.items()}
    moved = {name.replace("emu/x", "fox/x"): content for name, content in CONTENTS.items()}
    longer = {**CONTENTS, "emu/x.jpg": CONTENTS["emu/x.jpg"] + b"\0"}
    for k, contents in enumerate((renamed, moved, longer)):
        digests.add(open_images(folder_of(tmp_path / f"c{k}", contents)).digest())
    assert len(digests) == 4


@pytest.mark.parametrize("kind", ["folder of tars", "outer tar", "array record", "two files"])
def test_every_container_gives_the_records_of_the_folder(tmp_path, kind):
    folder = open_images(folder_of(tmp_path / "root", FLAT))
    if kind == "folder of tars":
        source = open_images(class_tars(tmp_path / "tars", FLAT))
    elif kind == "outer tar":
        source = open_images(outer_tar(tmp_path / "ILSVRC2012_img_train.tar", FLAT))
    elif kind == "array record":
        write_array_record(folder, tmp_path / "images.arrayrecord")
        source = open_images(tmp_path / "images.arrayrecord")
    else:
        for k, part in enumerate((range(3), range(3, len(folder)))):
            write_array_record(folder, tmp_path / "ar" / f"{k}.arrayrecord", indices=part)
        source = open_images(tmp_path / "ar")
    assert list(source) == list(folder)
    assert source.class_names == folder.class_names
    assert (source.digest() == folder.digest()) == (kind != "two files")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[np.int64(4)] == folder[4]
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("kind", ["folder", "file", "plain bytes"])
def test_parquet_gives_the_same_images(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as pq

    names = list(CONTENTS)
    feature = {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}

    def write(path, chosen):
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [CONTENTS[names[i]] for i in chosen]
        column = images if kind == "plain bytes" else [{"bytes": b, "path": "x"} for b in images]
        table = pa.table({"image": column, "label": pa.array([LABELS[i] for i in chosen])})
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)

    if kind == "file":
        write(tmp_path / "all.parquet", range(7))
        source = open_images(tmp_path / "all.parquet")
    else:
        write(tmp_path / "hub/data/train-00000-of-00002.parquet", range(3))
        write(tmp_path / "hub/data/train-00001-of-00002.parquet", range(3, 7))
        write(tmp_path / "hub/data/test-00000-of-00001.parquet", range(2))
        source = open_images(tmp_path / "hub")
        assert source[5].id == "train-00001-of-00002.parquet:2"
    assert isinstance(source, ImageParquet) and source.class_names == ("cat", "dog", "emu")
    assert [r.image for r in source] == list(CONTENTS.values())
    assert [r.label for r in source] == LABELS
    copy = pickle.loads(pickle.dumps(source))
    assert copy[6] == source[6] and copy.digest() == source.digest()


def test_parquet_refusals(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def refused(match, **columns):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=match):
            list(open_images(tmp_path / "a.parquet"))

    image = {"bytes": b"...", "path": None}
    refused("columns image, label, got picture, label", picture=[image], label=[1])
    refused("got int64 or -1", image=[image] * 2, label=[0, -1])
    refused("with nulls", image=[image] * 2, label=[0, None])
    refused("label 4294967296 among 2 images", image=[image] * 2, label=[0, 2**32])
    refused("label 1999999999 among 2 images", image=[image] * 2, label=[0, 1_999_999_999])
    unsigned = pa.array([0, 2**64 - 1], pa.uint64())
    refused("label 18446744073709551615 among 2 images", image=[image] * 2, label=unsigned)
    refused("row 1: expected a text in the column text", image=[image] * 2, text=["x", None])
    refused("classes have no image: 0, 2", image=[image] * 2, label=[1, 3])
    refused(":1: .*only a path", image=[image, {"bytes": None, "path": "x"}], label=[0, 1])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_images(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'eqxldm\[parquet\]'"):
        open_images(tmp_path / "a.parquet")


def test_folders_that_are_refused(tmp_path):
    def refused(name, contents, match):
        root = tmp_path / name
        root.mkdir()
        with pytest.raises(DataError, match=match):
            open_images(folder_of(root, contents))

    refused("splits", {"train/cat/a.png": b"?", "val/cat/a.png": b"?"}, "are splits.*splits/train")
    refused("none", {"a.txt": b"?", "x/b.txt": b"?"}, "expected images in it or in class folders")
    refused("empty", {}, "is empty")
    refused("texts", {"cat/a.txt": b"?", "dog/b.png": b"?"}, "1 of 2 classes have no image: cat")
    refused("mixed", {"a.png": b"?", "x/b.png": b"?"}, "1 images lie beside folders .* .x")
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(DataError, match="none of the known kinds"):
        open_images(tmp_path / "notes.txt")


def test_an_image_that_went_away_is_named(tmp_path):
    source = open_images(folder_of(tmp_path / "root", CONTENTS))
    (tmp_path / "root/dog/10.png").unlink()
    with pytest.raises(DataError, match=r"10\.png: cannot be read: No such file"):
        source[4]
    with pytest.raises(DataError, match="changed while listed"):
        source.digest()


def test_the_index_of_tars_is_kept_and_follows_the_tars(tmp_path, monkeypatch):
    tars = class_tars(tmp_path / "tars", FLAT)
    expected = list(open_images(tars))
    (kept,) = (tmp_path / "cache" / "tars").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # the second time no tar is opened
        assert list(open_images(tars)) == expected
    kept.write_bytes(kept.read_bytes()[:100])
    assert list(open_images(tars)) == expected
    tar_of(tars / "emu.tar", {"new.png": b"new"})
    os.utime(tars / "emu.tar", (1, 1))
    assert open_images(tars)[5][:4] == (b"new", "emu/new.png", 2, None)
    monkeypatch.setenv("EQXLDM_CACHE", str(kept / "below a file"))
    assert len(open_images(tars)) == 6


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
    ("cut", "match"),
    [
        (300, "truncated"),  # in the first header
        (700, "truncated"),  # in the padding of the text file
        (1500, "truncated"),  # in the header of an image
        (1800, "is truncated: .* ends at byte"),  # in the image
        (3712, "truncated"),  # after it
    ],
)
def test_truncated_tars_are_refused(tmp_path, outer, cut, match):
    contents = {f"cat/{k}.png": bytes(600) for k in range(2)} | {"dog/1.png": b"?"}
    tars = class_tars(tmp_path / "tars", contents)
    if outer:
        path = outer_tar(tmp_path / "outer.tar", contents)
        with tarfile.open(path) as tar:
            cut += tar.getmember("cat.tar").offset_data
    else:
        path = tars / "cat.tar"
    os.truncate(path, cut)
    with pytest.raises(DataError, match=match):
        open_images(path if outer else tars)


def test_damaged_and_compressed_tars_are_refused(tmp_path):
    contents = {"cat/0.png": bytes(600), "cat/1.png": b"?", "dog/1.png": b"?"}
    tars = class_tars(tmp_path / "tars", contents)
    content = bytearray((tars / "cat.tar").read_bytes())
    with tarfile.open(tars / "cat.tar") as tar:
        content[tar.getmember("0.png").offset] ^= 1  # tarfile takes that header for the end
    (tars / "cat.tar").write_bytes(content)
    with pytest.raises(DataError, match="truncated or damaged at byte"):
        open_images(tars)
    tar_of(tars / "cat.tar", {"a.png": b"?"}, "w:gz")
    with pytest.raises(DataError, match="decompress it first"):
        open_images(tars)
    tar_of(tmp_path / "images.tar", {"a.png": b"?"})
    with pytest.raises(DataError, match=r"expected a tar of class tars .* got 1 other files"):
        open_images(tmp_path / "images.tar")


def test_parquet_without_labels_or_with_captions(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": b"%d" % k, "path": None} for k in range(3)]
    texts = ["ä", "", "c"]

    def opened(**columns):
        pq.write_table(pa.table({"image": images, **columns}), tmp_path / "a.parquet")
        return open_images(tmp_path / "a.parquet")

    plain, one = opened(), opened(label=[0, 0, 0])
    for source in (plain, one):
        assert source.class_names == () and source[2][2:4] == (None, None)
    for column in ("text", "caption"):
        source = opened(**{column: texts}, label=[1, 0, 1])
        assert source.has_captions and [r.caption for r in source] == texts
        assert source.class_names == ("0", "1") and source[0].label == 1
    assert len({plain.digest(), source.digest(), opened(text=["a", "", "c"]).digest()}) == 3


def test_a_single_class_tar_has_no_labels(tmp_path):
    source = open_images(class_tars(tmp_path / "tars", {"cat/1.png": b"?", "cat/2.png": b"!"}))
    again = open_images(tmp_path / "tars")  # from the index
    for found in (source, again):
        assert found.class_names == () and found[1][:4] == (b"!", "cat/2.png", None, None)


class Mislabelled:
    class_names, has_captions = ("cat", "dog"), False

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return ImageRecord(b"?", "a.png", label=self.label)

    def digest(self):
        return ""


@pytest.mark.parametrize("label", [2, 2**31 - 1, -7, None])
def test_labels_of_an_array_record_have_names(tmp_path, label):
    path = tmp_path / "a.arrayrecord"
    write_array_record(Mislabelled(label), path)
    with pytest.raises(DataError, match=r"a\.png: its label is -?\d+, but .* names 2 cl"):
        open_images(path)[0]


def test_array_record_refusals(tmp_path):
    folder = open_images(folder_of(tmp_path / "root", FLAT))
    path = tmp_path / "ar" / "0.arrayrecord"
    write_array_record(folder, path)
    content = path.read_bytes()
    other = open_images(folder_of(tmp_path / "other", {"a/1.png": b"?", "b/1.png": b"?"}))
    write_array_record(other, path.with_name("1.arrayrecord"))
    with pytest.raises(DataError, match=r"1\.arrayrecord: its class names differ"):
        ImageArrayRecord(path.parent)
    path.with_name("1.arrayrecord").unlink()
    with writing_records(path) as write:
        write(b"of someone else")
    with pytest.raises(DataError, match="expected an ArrayRecord file of images"):
        open_images(path)
    for damaged in (b"", content[:100], content[: len(content) // 2], bytes(4096)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as an ArrayRecord file"):
            open_images(path.parent)


def test_flipped_bytes_in_an_array_record_are_found(tmp_path):
    """Whatever byte is wrong: reading raises, or gives the right records."""
    folder = open_images(folder_of(tmp_path / "root", FLAT))
    path = tmp_path / "0.arrayrecord"
    write_array_record(folder, path)
    content, expected, found = path.read_bytes(), list(folder), 0
    at = content.index(FLAT["dog/9.png"])
    for position in (at, at + 40, *range(3, len(content), len(content) // 15)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        try:
            assert list(open_images(path)) == expected
        except DataError:
            found += 1
    assert found >= 2


def test_an_array_record_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.arrayrecord"
    with pytest.raises(RuntimeError), writing_records(path) as write:
        write(b"x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with writing_records(path) as write:
        for k in range(5):
            write(b"%d" % k)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    files = RecordFiles([path, path])
    assert len(files) == 8 and files.read([7, 0, 4, 3]) == [b"3", b"0", b"0", b"3"]
    assert files.footer(1) == b"4" and files.read([]) == []
    with pytest.raises(IndexError):
        files.read([8])


def test_threads_read_the_same_files(tmp_path):
    """A reader has one position: reads of several threads must not part a seek from its read."""
    with writing_records(tmp_path / "a") as write:
        for k in range(401):
            write(b"%d" % k)
    files = RecordFiles([tmp_path / "a"])
    orders = [np.random.default_rng(k).permutation(400) for k in range(64)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for order, found in zip(orders, pool.map(files.read, orders), strict=True):
                assert found == [b"%d" % k for k in order]
    finally:
        sys.setswitchinterval(interval)


def test_tars_are_recognised_and_read_where_they_lie(tmp_path):
    source = open_images(outer_tar(tmp_path / "outer.tar", FLAT))
    assert isinstance(source, ImageTars)
    os.truncate(tmp_path / "outer.tar", 100)
    with pytest.raises(DataError, match="ends after 0 of"):
        source[0]
