"""Damaged and hostile bytes, and what a reader that is fed them must do.

Whatever comes, a reader ends with a value or with the package's own error and one message: no other
exception, no long wait, no memory out of proportion. `make fuzz CASES=10000` tries as many inputs
for each reader; the suite tries a few, always the same.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import struct
import tempfile
import time
import zipfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings, strategies as st

from eqxldm.checkpoints import CheckpointError
from eqxldm.data import DataError
from eqxldm.pipelines import PipelineError
from eqxldm.pretrained import WeightsError
from eqxldm.pretrained.files import SEAL
from eqxldm.serving import BundleError
from eqxldm.text import TokenizerError
from experiments.train.terminal import UserError

CASES = int(os.environ.get("EQXLDM_FUZZ_CASES", "0"))
SECONDS, BYTES = 20, 600_000_000
ERRORS = (
    DataError, WeightsError, CheckpointError, UserError, TokenizerError, PipelineError, BundleError,
)  # fmt: skip

# Changes of bytes


HOSTILE = (
    None, True, False, 0, -1, 5, 2**31, 2**32 + 1, 2**63, 2**200, -(2**63), 1e9, 1e308, 0.5,
    float("nan"), float("inf"), "", "x", "\ud800", "../../etc/passwd", "a\0b", [], {}, [[]], [None],
    {"": {}}, [0] * 3, ["x"] * 1000, "x" * 10_000,
)  # fmt: skip
NUMBERS = [struct.pack(form, n) for form in "<>" for form in (f"{form}I", f"{form}Q")
           for n in (0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1)]  # fmt: skip
NUMBERS += [bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f"]

place = st.floats(0, 1, exclude_max=True)
edit = st.tuples(
    st.sampled_from(["flip", "write", "insert", "delete", "cut", "repeat", "number"]),
    place,
    place,
    st.binary(min_size=1, max_size=24),
)


def edited(content, edits):
    for kind, at, other, payload in edits:
        i, n = int(at * len(content)), int(other**4 * len(content))
        if kind == "flip" and content:
            bits = bytes([content[i] ^ 1 << int(8 * other)])
            content = content[:i] + bits + content[i + 1 :]
        elif kind == "write":
            content = content[:i] + payload + content[i + len(payload) :]
        elif kind == "insert":
            content = content[:i] + payload + content[i:]
        elif kind == "delete":
            content = content[:i] + content[i + n + 1 :]
        elif kind == "cut":
            content = content[:i]
        elif kind == "repeat":
            content = content[:i] + content[i : i + n] * 3 + content[i + n :]
        elif kind == "number":
            value = NUMBERS[int(other * len(NUMBERS))]
            content = content[:i] + value + content[i + len(value) :]
    return content


@st.composite
def damaged_json(draw, text):
    """JSON with some values replaced by hostile ones, then perhaps damaged as text."""
    tree = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        tree = _replaced(draw, tree)
    content = json.dumps(tree).encode()
    if draw(st.integers(0, 4)) == 0:
        content = edited(content, draw(st.lists(edit, min_size=1, max_size=3)))
    if draw(st.integers(0, 30)) == 0:
        content = draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff", b"5"]))
    return content


def _replaced(draw, tree):
    if not isinstance(tree, (dict, list)) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(HOSTILE))
    child = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
    tree = tree.copy()
    if isinstance(tree, dict) and draw(st.integers(0, 5)) == 0:
        del tree[child]
    else:
        tree[child] = _replaced(draw, tree[child])
    return tree


def damaged(content):
    """Some edits of the bytes, or other bytes altogether."""
    edits = st.lists(edit, min_size=1, max_size=6)
    return edits.map(lambda e: edited(content, e)) | st.binary(max_size=300)


def unsealed(content):
    """A file of ours without its checksum, which would be all that is found wrong."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.get("__metadata__", {}).pop(SEAL, None)
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def damaged_safetensors(draw, content):
    """Damage to the header as JSON, or anywhere."""
    content = unsealed(content)
    length = int.from_bytes(content[:8], "little")
    if draw(st.booleans()):
        return draw(damaged(content))
    header = draw(damaged_json(content[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def damaged_config(draw, content):
    """Damage to the configuration of ours in a safetensors header."""
    content = unsealed(content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config = draw(damaged_json(header["__metadata__"]["eqxldm"]))
    header["__metadata__"]["eqxldm"] = config.decode("utf-8", "replace")
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def damaged_bundle(draw, content):
    """An archive whose record or weights are damaged, their checksums right; or any damage."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(content))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name = draw(st.sampled_from([n for n in entries if not n.endswith(".bin")]))
    change = damaged_json if name.endswith(".json") else damaged
    entries[name] = draw(change(entries[name]))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return written.getvalue()


# What is read


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes sound files in a folder, and reads them; `file` is the one that is damaged."""

    make: object
    file: str
    read: object
    damage: object = damaged


def one(content):
    """Makes one file, called `file`."""
    return lambda folder: (folder / "file").write_bytes(content)


@contextlib.contextmanager
def bounded():
    """Fails where it takes too long, or too much memory."""

    def late(*_):
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < BYTES, f"{grown} bytes more"
    assert time.monotonic() - begin < SECONDS


def check_pipe(reader, tmp_path):
    """Puts a pipe that nobody writes to in the place of the file."""
    reader.make(tmp_path)
    (tmp_path / reader.file).unlink()
    os.mkfifo(tmp_path / reader.file)
    with bounded():
        try:
            reader.read(tmp_path / reader.file)
        except (*ERRORS, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
        else:
            raise AssertionError("a pipe was read")


def check_reader(reader, tmp_path, *, cases=8):
    """Feeds it what is sound, then damaged inputs, each in a copy of the folder: in the suite
    `cases` of them."""
    sound = tmp_path / "sound"
    sound.mkdir()
    reader.make(sound)
    reader.read(sound / reader.file)  # what is sound is read
    content = (sound / reader.file).read_bytes()

    @settings(
        max_examples=CASES or cases,
        deadline=None,
        derandomize=not CASES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.damage(content))
    def check(damage):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            copy = Path(folder, "copy")
            shutil.copytree(sound, copy)
            (copy / reader.file).write_bytes(damage)
            with bounded():
                try:
                    reader.read(copy / reader.file)
                except ERRORS as error:
                    assert str(error) and len(str(error)) < 20_000

    check()
