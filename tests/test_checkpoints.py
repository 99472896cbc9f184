"""Checkpoints: what is saved comes back bit for bit or is refused, and a failure costs nothing."""

import contextlib
import errno
import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from eqxldm import checkpoints as module, fingerprints
from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.data.pipelines import training_batches
from eqxldm.fingerprints import digest, fingerprint

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "uint8", "bool"]
LIKE = {"w": np.zeros((4, 6), np.float32)}


def state(k):
    """A state that differs from step to step."""
    return {"w": np.random.default_rng(k).normal(size=(4, 6)).astype(np.float32)}


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def place(array, devices, spec):
    return jax.device_put(array, NamedSharding(mesh(devices), spec if array.ndim else P()))


def saved(folder, *steps, **options):
    with Checkpoints(folder, keep=100, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Fingerprints


def by_definition(words):
    def mix(x):
        x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
        x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
        return x ^ x >> 16

    sums = [
        sum(mix(int(word) ^ mix((i + seed) % 2**32)) for i, word in enumerate(words)) % 2**32
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]
    return f"{sums[0]:08x}{sums[1]:08x}"


def random_array(dtype, shape=(3, 4), seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    if dtype == "bool":
        return (bits[..., 0] % 2).astype(bool)
    return bits.astype(np.uint8).view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_fingerprints_are_as_defined_on_the_host_and_on_devices(dtype):
    array = random_array(dtype)
    unsigned = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    expected = by_definition(array.reshape(-1).view(unsigned))
    assert fingerprint({"a": array}) == {"['a']": expected}
    with jax.enable_x64(dtype == "float64"):
        assert fingerprint({"a": jnp.asarray(array)}) == {"['a']": expected}


def test_a_fingerprint_is_the_same_on_every_mesh():
    arrays = {dtype: random_array(dtype, (4, 6)) for dtype in DTYPES}
    arrays["scalar"] = np.array(3, np.float32)
    keys = jax.random.split(jax.random.key(3), 4)
    host = fingerprint(arrays | {"keys": np.asarray(jax.random.key_data(keys))})
    for devices, spec in [(1, P()), (2, P()), (2, P("data")), (2, P(None, "data"))]:
        placed = {name: place(array, devices, spec) for name, array in arrays.items()}
        placed["keys"] = place(keys, devices, P(*spec[:1]))
        assert fingerprint(placed) == host
    mixed = {"here": jnp.ones(3), "there": jax.device_put(np.ones(3), jax.devices()[1])}
    mixed["both"] = jax.device_put(np.ones(4), NamedSharding(mesh(2), P("data")))
    assert len(fingerprint(mixed)) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_changes_with_every_bit(dtype):
    array = random_array(dtype, (5,))
    found = {tuple(fingerprint(jnp.asarray(array)).values())}
    flips = 0
    for byte in range(array.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            other = array.copy()
            other.view(np.uint8)[byte] ^= 1 << bit
            found.add(tuple(fingerprint(jnp.asarray(other)).values()))
            flips += 1
    assert len(found) == flips + 1
    halves = [{value[:8] for (value,) in found}, {value[8:] for (value,) in found}]
    assert [len(half) for half in halves] == [flips + 1] * 2  # each sum alone sees it


def test_a_fingerprint_changes_with_the_order_of_elements_and_leaves():
    array = random_array("float32", (12,))
    before = fingerprint(jnp.asarray(array))
    for i in range(12):
        for j in range(i):
            other = array.copy()
            other[[i, j]] = other[[j, i]]
            assert fingerprint(jnp.asarray(other)) != before
    a, b = jnp.arange(3.0), jnp.arange(1.0, 4.0)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})
    # Flips that cancel in a plain sum: the highest bits of two elements.
    other = array.copy()
    other.view(np.uint32)[:2] ^= 1 << 31
    assert fingerprint(jnp.asarray(other)) != before


def test_a_fingerprint_is_compiled_once():
    traced = []
    original = fingerprints._device_words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "_device_words", lambda a: traced.append(a) or original(a))
        for k in range(3):
            fingerprint(jax.device_put(np.ones(7) * k, NamedSharding(mesh(2), P())))
    assert len(traced) == 1


# What a checkpoint holds


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    params = eqx.filter(linear, eqx.is_array)
    tree = {
        "params": params,
        "ema": tuple(jax.tree.map(lambda a, k=k: k * a, params) for k in (1, 2)),
        "optimizer": optax.adam(0.1).init(params),
        "arrays": {dtype: jnp.asarray(random_array(dtype)) for dtype in DTYPES},
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "host": np.arange(3.0),
        "a/b": [jnp.ones(()), np.int64(3)],
    }
    expected = jax.tree.map(lambda a: a + 0 if a.dtype == jnp.float32 else a, tree)
    donate = jax.jit(lambda a: jax.tree.map(lambda x: 3 * x - 1, a), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, tree, info={"seconds": 1.5, "steps": {1: 2}})
        donate((tree["params"], tree["ema"]))
        tree["host"][:] = 0
        checkpoints.wait()
        for like in [
            expected,
            eqx.filter_eval_shape(lambda: expected | {"host": 0, "a/b": 0})
            | {"host": np.zeros(3), "a/b": [jnp.ones(()), np.int64(3)]},
        ]:
            place = lambda a: (
                jax.ShapeDtypeStruct(
                    a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
                )
                if isinstance(a, jax.ShapeDtypeStruct)
                else a
            )
            restored, info = checkpoints.restore(3, jax.tree.map(place, like))
            expected["host"] = np.arange(3.0)
            assert jax.tree.structure(restored) == jax.tree.structure(expected)
            assert fingerprint(restored) == fingerprint(expected)
            assert info == {"seconds": 1.5, "steps": {"1": 2}}
            assert jax.random.key_impl(restored["keys"]) == "rbg"
            assert isinstance(restored["host"], np.ndarray)


def test_a_state_moves_to_any_mesh(tmp_path):
    array, step = np.arange(24, dtype=np.float32).reshape(4, 6), np.int32(5)
    tree = {"w": array, "step": step, "key": jax.random.key(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {name: place(leaf, 2, P("data")) for name, leaf in tree.items()})
        checkpoints.wait()
        for devices, spec in [(1, P()), (2, P()), (2, P(None, "data")), (1, P("data"))]:
            placed = {name: place(leaf, devices, spec) for name, leaf in tree.items()}
            like = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in placed.items()
            }
            restored, _ = checkpoints.restore(1, like)
            np.testing.assert_array_equal(restored["w"], array)
            assert restored["w"].sharding == like["w"].sharding
            assert restored["step"] == step and restored["key"] == jax.random.key(1)
        host, _ = checkpoints.restore(1, {"w": array, "step": step, "key": jax.random.key(0)})
        assert isinstance(host["w"], np.ndarray)


def test_the_data_position_is_plain_json(tmp_path):
    arrays = {"i": np.arange(10)}
    batches = training_batches(arrays, 4, seed=0)
    next(batches)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), batches)
        expected = [next(batches)["i"] for _ in range(3)]
        fresh = training_batches(arrays, 4, seed=0)
        checkpoints.wait()
        checkpoints.restore(1, LIKE, fresh)
        for batch in expected:
            np.testing.assert_array_equal(next(fresh)["i"], batch)
        checkpoints.save(2, state(2))
        checkpoints.wait()
        with pytest.raises(CheckpointMismatch, match="saved without a data position"):
            checkpoints.restore(2, LIKE, fresh)

        class Refuses:
            def get_state(self): ...
            def set_state(self, state):
                raise ValueError("another order of records")

        with pytest.raises(CheckpointMismatch, match="data position: another order of records"):
            checkpoints.restore(1, LIKE, Refuses())
    about = json.loads((tmp_path / "1" / "about.json").read_text())
    assert about["data"] is not None and about["step"] == 1


def test_a_part_of_a_state_can_be_read(tmp_path):
    tree = {"params": jnp.ones(3), "ema": (jnp.zeros(3), {"w": jnp.arange(4.0)})}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        like = {"params": None, "ema": (None, {"w": jnp.zeros(4)})}
        restored, _ = checkpoints.restore(1, like, part=True)
        assert restored["params"] is None
        np.testing.assert_array_equal(restored["ema"][1]["w"], np.arange(4.0))
        with pytest.raises(CheckpointMismatch, match="only in the checkpoint"):
            checkpoints.restore(1, like)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 3},), r"\['a'\] is a int, not an array"),
        (({"a": jnp.ones(2, jnp.complex64)},), r"\['a'\] is complex64, needed are real"),
        (({},), "no array with elements"),
        (({"a": np.zeros(0)},), "no array with elements"),
        ((LIKE, None, {"f": np.float32(1)}), "info and the data position must be JSON-able"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, arguments, message):
    with Checkpoints(tmp_path / "new") as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, *arguments)
        assert checkpoints.steps() == []
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


# Retention


def test_the_newest_the_best_and_every_kth_stay(tmp_path):
    metrics = {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: float("nan"), 6: 0.2, 7: -float("inf")}
    with Checkpoints(tmp_path, keep=2, every=4) as checkpoints:
        assert checkpoints.best() is None
        for step, metric in metrics.items():
            checkpoints.save(step, state(step), metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6, 7] and checkpoints.best() == 2
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # best is known from the files
        assert checkpoints.best() == 2
        checkpoints.save(8, state(8), metric=0.1)
        checkpoints.wait()
        assert checkpoints.steps() == [8]
    assert names(tmp_path) == ["8"]


def test_an_older_checkpoint_goes_after_the_newer_is_complete(tmp_path, monkeypatch):
    go_on = threading.Event()
    original = module._files
    saved(tmp_path, 1)
    monkeypatch.setattr(module, "_files", lambda folder: go_on.wait(30) and original(folder))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state(2))  # returns though the write waits
        assert checkpoints.steps() == [1]
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_steps_are_complete_checkpoints_only(tmp_path):
    saved(tmp_path, 0, 10, 9)
    for name in ("7.damaged", "8.orbax-checkpoint-tmp", "007", "notes"):
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [0, 9, 10]
    assert len(names(tmp_path)) == 7  # opening a folder changes nothing


def test_a_step_is_saved_once(tmp_path):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        message = f"{tmp_path}/1 was not saved: there is one of this step already"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(1, state(2))
        assert digest(checkpoints.restore(1, LIKE)[0]) == digest(state(1))
    assert names(tmp_path) == ["1"]


# Failed saves


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 64 bytes: the system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder):
    """Permission bits bind everyone but root, who is somebody else for this long."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@contextlib.contextmanager
def no_space_at_the_end():
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "about.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_files", fail)
        yield


FAILURES = {
    "full": (full_disk, "File too large"),
    "end": (no_space_at_the_end, r"No space left on device \(about.json\)"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_write_costs_nothing(tmp_path, failure, capfd):
    context, reason = FAILURES[failure]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()
        message = rf"{tmp_path}/2 was not saved: {reason}\.$"
        with context(), pytest.raises(CheckpointError, match=message) as failed:
            checkpoints.save(2, state(2))
            checkpoints.wait()
        assert "\n" not in str(failed.value)
        checkpoints.wait()  # it is raised once
        assert names(tmp_path) == ["1"]
        assert digest(checkpoints.restore(1, LIKE)[0]) == digest(state(1))
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [3] and names(tmp_path) == ["3"]
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_the_save_after_a_failed_one_is_made_and_then_raises(tmp_path, monkeypatch):
    original, calls = module._files, []

    def fail_once(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(folder)

    monkeypatch.setattr(module, "_files", fail_once)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        with pytest.raises(CheckpointError, match=r"/1 was not saved: No space left on device\.$"):
            checkpoints.save(2, state(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_leaving_by_an_error_notes_a_failed_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with no_space_at_the_end(), pytest.raises(KeyError) as error, checkpoints:
        checkpoints.save(1, state(1))
        raise KeyError
    assert error.value.__notes__[0].startswith(f"{tmp_path}/1 was not saved: No space left")
    failed = pytest.raises(CheckpointError, match="2 was not saved")
    with no_space_at_the_end(), failed, checkpoints:
        checkpoints.save(2, state(2))


def test_a_folder_turned_read_only_is_named(tmp_path, capfd):
    folder = Path(tempfile.mkdtemp())  # tmp_path lies in a folder that is closed to others
    try:
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, state(1))
            checkpoints.wait()
            message = rf"{folder}/2 was not saved: Permission denied"
            with read_only(folder), pytest.raises(CheckpointError, match=message):
                checkpoints.save(2, state(2))
                checkpoints.wait()
            assert checkpoints.steps() == [1]
            checkpoints.save(3, state(3))
        assert names(folder) == ["3"]
    finally:
        shutil.rmtree(folder)
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with Checkpoints(folder) as checkpoints:
            with pytest.raises(CheckpointError, match=rf"{folder}/1 was not saved: .*\(/.*\)"):
                checkpoints.save(1, state(1))
            with pytest.raises(CheckpointError, match=f"{folder}: Not a directory"):
                checkpoints.steps()


def python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
    )


def test_a_killed_write_leaves_nothing_that_counts(tmp_path):
    child = python(
        """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from eqxldm import checkpoints as module, fingerprints
        with module.Checkpoints(Path(sys.argv[1])) as checkpoints:
            checkpoints.save(1, {"w": np.zeros((4, 6), np.float32)})
            checkpoints.wait()
            module._files = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(2, {"w": np.ones((4, 6), np.float32)})
        """,
        tmp_path,
    )
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL and output == ""
    (tmp_path / "0.orbax-checkpoint-tmp-deleted").mkdir()  # killed while it deleted
    assert any("2.orbax" in name for name in names(tmp_path))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        assert digest(checkpoints.restore(1, LIKE)[0]) == digest(LIKE)
        assert len(names(tmp_path)) == 3
        checkpoints.save(2, state(2))
    assert names(tmp_path) == ["2"]


# Damage


def damages(path):
    """Ways to damage a file, each with what the message says of it."""
    content = path.read_bytes()
    size = len(content)
    about = path.name == "about.json"
    for position in sorted({0, 1, size // 3, size // 2, 2 * size // 3, size - 2, size - 1}):
        for flip in (0x01, 0x80):
            other = bytearray(content)
            other[position] ^= flip
            yield bytes(other), "is damaged" if about else "has other bytes than were written"
    truncated = "is damaged" if about else "bytes, .* were written"
    yield b"", "is empty" if about else "has 0 bytes"
    yield content[: size // 2], truncated
    yield content[:-1], truncated
    yield content + b" ", truncated
    yield None, "is missing"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of several arrays over two devices."""
    folder = tmp_path_factory.mktemp("sharded")
    tree = {"a": state(0)["w"], "b": state(1)["w"], "step": np.array(3, np.int32)}
    tree = {name: place(array, 2, P("data")) for name, array in tree.items()}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree, info={"note": "é"}, metric=0.25)
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
                if path.name in module._UNREAD:
                    assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
                    continue
                name = path.relative_to(folder).as_posix()
                with pytest.raises(CheckpointError, match=f"^{folder}: {name} .*{message}") as e:
                    checkpoints.restore(1, tree)
                assert e.type is CheckpointError and "\n" not in str(e.value)
            path.write_bytes(content)
        assert tried > 100
        assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
        with pytest.raises(CheckpointError, match=f"^{folder.parent}/2: there is no such check"):
            checkpoints.restore(2, tree)
    assert capfd.readouterr() == ("", "")


def seal_again(folder):
    """Makes the files count as written: what is left is orbax and the fingerprints."""
    about = module._read_about(folder)
    about["files"] = {name: module._files(folder)[name] for name in about["files"]}
    (folder / "about.json").write_text(module._sealed(about))


def test_damage_that_the_files_do_not_show_is_found_in_the_arrays(sharded, capfd):
    folder, tree = sharded
    refused = 0
    with Checkpoints(folder.parent) as checkpoints:
        largest = max(files(folder / "ocdbt.process_0"), key=lambda path: path.stat().st_size)
        for path in [*files(folder / "d"), largest, folder / "_METADATA"]:
            content = path.read_bytes()
            for position in range(3, len(content), len(content) // 6):
                other = bytearray(content)
                other[position] ^= 0x04
                path.write_bytes(bytes(other))
                seal_again(folder)
                try:
                    assert digest(checkpoints.restore(1, tree)[0]) == digest(tree)
                except CheckpointError as error:
                    assert str(error).startswith(f"{folder}: ") and "\n" not in str(error)
                    refused += 1
            path.write_bytes(content)
        seal_again(folder)
        about = module._read_about(folder)
        about["fingerprints"]["['b']"] = about["fingerprints"]["['a']"]
        text = (folder / "about.json").read_text()
        (folder / "about.json").write_text(module._sealed(about))
        with pytest.raises(CheckpointError, match=r"not what was saved: \['b'\]\.$"):
            checkpoints.restore(1, tree)
        (folder / "about.json").write_text(text)
    assert refused > 6
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_another_configuration_is_refused_by_name(sharded):
    folder, tree = sharded
    zeros = jnp.zeros
    for change, message in [
        ({"a": zeros((4, 7))}, r"\['a'\] was float32 \(4, 6\), is now float32 \(4, 7\)"),
        ({"a": zeros((4, 6), jnp.bfloat16)}, r"\['a'\] was float32 \(4, 6\), is now bfloat16"),
        ({"c": zeros(3)}, r"not in the checkpoint: \['c'\]\.$"),
        ({"a": None}, r"only in the checkpoint: \['a'\]\.$"),
        ({"a": {"w": tree["a"]}}, r"not in .*: \['a'\]\['w'\]; only in .*: \['a'\]\.$"),
        ({str(k): zeros(1) for k in range(5)}, r"\['0'\], \['1'\], \['2'\] and 2 more"),
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


def test_a_damaged_one_that_cannot_be_renamed_does_not_count(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    empty_largest(tmp_path / "2")
    reports = []
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            refuse = OSError(errno.EROFS, os.strerror(errno.EROFS))
            patch.setattr(module, "_set_aside", lambda *_: (_ for _ in ()).throw(refuse))
            assert checkpoints.restore_newest(LIKE, report=reports.append)[0] == 1
        assert "cannot be renamed: Read-only file system." in reports[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]
        assert digest(checkpoints.restore(2, LIKE)[0]) == digest(state(2))
    assert names(tmp_path) == ["2", "2.damaged"]


# Several processes

TWO = """
    import resource, sys
    from pathlib import Path
    import jax, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    folder, port, own = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, own, local_device_ids=[0])
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from eqxldm import checkpoints as module, fingerprints
    from eqxldm.checkpoints import Checkpoints, CheckpointError
    from eqxldm.fingerprints import fingerprint

    def place(array, spec):
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    number = lambda k: place(np.array(k, np.int32), P())
    tree = {"w": place(whole, P("data")), "step": number(3)}
    other = {"w": place(whole * 0, P(None, "data")), "step": number(0)}
    reports = []
    module._GRACE = 2
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        assert checkpoints.steps() == [1], checkpoints.steps()
        def fail(*_):
            raise OSError(28, "No space left on device")

        # Process 0 fails when all is written; process 1 fails to write its own part.
        original, limits = module._files, resource.getrlimit(resource.RLIMIT_FSIZE)
        for step, failing in ((20, 0), (21, 1)):
            if own == failing == 0:
                module._files = fail
            if own == failing == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            checkpoints.save(step, tree)
            try:
                checkpoints.wait()
                raise SystemExit("no error")
            except CheckpointError as error:
                print(own, error)
            module._files = original
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.save(3, tree)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3], checkpoints.steps()
        checkpoints.save(4, tree)
    with Checkpoints(folder, keep=2) as checkpoints:
        if own == 0:
            (folder / "4" / "_METADATA").unlink()
        module.multihost_utils.sync_global_devices("damaged")
        step, state, _ = checkpoints.restore_newest(other, report=reports.append)
        assert step == 3 and fingerprint(state) == fingerprint(tree)
        assert state["w"].sharding.spec == P(None, "data")
        assert len(reports) == 1 - own, reports
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_save_fail_fall_back_and_one_goes_on(tmp_path):
    port = free_port()
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    children = [python(TWO, tmp_path, port, own, **flags) for own in (0, 1)]
    try:
        outputs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    other = "another process failed or did not answer"
    for step, own, reason in [
        (20, 0, "No space left on device"),
        (20, 1, other),
        (21, 0, other),
        (21, 1, "File too large"),
    ]:
        assert f"{own} {tmp_path}/{step} was not saved: {reason}." in outputs[own]
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    like = {"w": jnp.zeros((4, 6)), "step": np.array(0, np.int32)}
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore_newest(like)
    assert step == 3
    np.testing.assert_array_equal(restored["w"], whole)
    assert names(tmp_path) == ["3", "4.damaged"]
