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
from jax.sharding import PartitionSpec as P

from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.digests import digest
from experiments.train.run import RunFolder

from checkpointing import DTYPES, LIKE, names, place, random_array, saved, state
from helpers import array_batches

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
            assert digest(restored) == digest(expected)
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
    batches = array_batches(arrays, 4, seed=0)
    next(batches)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), batches)
        expected = [next(batches)["i"] for _ in range(3)]
        fresh = array_batches(arrays, 4, seed=0)
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
        with pytest.raises(CheckpointMismatch, match="is now not asked for"):
            checkpoints.restore(1, like)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 3},), r"\['a'\] is a int, not an array"),
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


def test_the_newest_and_every_kth_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2, every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(8, state(8))
    assert names(tmp_path) == ["8"]


def test_an_older_checkpoint_goes_after_the_newer_is_complete(tmp_path, monkeypatch):
    go_on, sync = threading.Event(), os.fsync
    saved(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda file: go_on.wait(30) and sync(file))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state(2))  # returns though the write waits
        assert checkpoints.steps() == [1]
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_steps_are_complete_checkpoints_only(tmp_path):
    saved(tmp_path, 0, 10, 9)
    for name in ("7.damaged", "8.checkpoint-tmp", "007", "notes"):
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
    """The arrays are written; the system refuses the rest."""

    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "about.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
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
    sync, calls = os.fsync, []

    def fail_once(file):
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fail_once)
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
        from eqxldm.checkpoints import Checkpoints
        with Checkpoints(Path(sys.argv[1])) as checkpoints:
            checkpoints.save(1, {"w": np.zeros((4, 6), np.float32)})
            checkpoints.wait()
            os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(2, {"w": np.ones((4, 6), np.float32)})
        """,
        tmp_path,
    )
    output, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL and output == ""
    (tmp_path / "0.checkpoint-tmp-deleted").mkdir()  # killed while it deleted
    assert any("2.checkpoint-tmp" in name for name in names(tmp_path))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        assert digest(checkpoints.restore(1, LIKE)[0]) == digest(LIKE)
        assert len(names(tmp_path)) == 3
        checkpoints.save(2, state(2))
    assert names(tmp_path) == ["2"]


# Several processes

TWO = """
    import os, resource, sys
    from pathlib import Path
    import jax, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    folder, port, own = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, own, local_device_ids=[0])
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jax.experimental import multihost_utils
    from eqxldm.checkpoints import Checkpoints, CheckpointError
    from eqxldm.digests import digest

    def place(array, spec):
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    number = lambda k: place(np.array(k, np.int32), P())
    tree = {"w": place(whole, P("data")), "step": number(3)}
    other = {"w": place(whole * 0, P(None, "data")), "step": number(0)}
    reports = []
    assert digest(tree) == digest({"w": whole, "step": np.int32(3)})
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        assert checkpoints.steps() == [1], checkpoints.steps()
        def fail(*_):
            raise OSError(28, "No space left on device")

        # Process 0 fails when all is written; process 1 fails to write its own part.
        original, limits = os.fsync, resource.getrlimit(resource.RLIMIT_FSIZE)
        for step, failing in ((20, 0), (21, 1)):
            if own == failing == 0:
                os.fsync = fail
            if own == failing == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
            checkpoints.save(step, tree)
            try:
                checkpoints.wait()
                raise SystemExit("no error")
            except CheckpointError as error:
                print(own, error)
            os.fsync = original
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.save(3, tree)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3], checkpoints.steps()
        checkpoints.save(4, tree)
    with Checkpoints(folder, keep=2) as checkpoints:
        if own == 0:
            (folder / "4" / "about.json").unlink()
        multihost_utils.sync_global_devices("damaged")
        step, state, _ = checkpoints.restore_newest(other, report=reports.append)
        assert step == 3 and digest(state) == digest(tree)
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
    for step, failing, reason in [(20, 0, "No space left on device"), (21, 1, "File too large")]:
        for own in (0, 1):
            line = f"{own} {tmp_path}/{step} was not saved: {reason}. (process {failing})"
            assert line in outputs[own]
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    like = {"w": jnp.zeros((4, 6)), "step": np.array(0, np.int32)}
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore_newest(like)
    assert step == 3
    np.testing.assert_array_equal(restored["w"], whole)
    assert names(tmp_path) == ["3", "4.damaged"]


@pytest.mark.parametrize("name", ["../x", "a/../b", "a b\nc", "a%2e", "a]?#"])
def test_any_folder_that_the_system_has_holds_checkpoints(tmp_path, monkeypatch, name):
    (tmp_path / "in" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    with Checkpoints(Path(name)) as checkpoints:
        checkpoints.save(3, {"w": np.ones(2)}, info={})
        checkpoints.wait()
        assert checkpoints.restore(3, {"w": np.zeros(2)})[0]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["a\\b", "a\udcff"])
def test_a_folder_whose_name_tensorstore_cannot_take_is_refused(tmp_path, name):
    """A backslash would be a slash: the arrays would be written into another folder."""
    checkpoints = Checkpoints(tmp_path / name)
    with pytest.raises(CheckpointError, match="no checkpoint can be kept there"):
        checkpoints.save(3, {"w": np.ones(2)}, info={})
        checkpoints.wait()
    assert not (tmp_path / "a").exists()
    run = RunFolder(tmp_path / "runs" / name)
    with pytest.raises(CheckpointError, match="no checkpoint can be kept there"), run.locked():
        pass
    assert not run.path.exists()
