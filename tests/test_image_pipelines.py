"""Pipelines: one global order for any number of processes and workers, positions that are exact."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from eqxldm.checkpoints import Checkpoints
from eqxldm.data import (
    DataError,
    ImageRecord,
    flip_mask,
    image_batches,
    open_images,
    prefetch_to_device,
    write_array_record,
)
from eqxldm.sharding import batch_sharding, make_mesh

from helpers import array_batches

N, SIZE, SEED = 22, 4, 3  # 22 records divide by no batch size below


class Numbered:
    """Record `i` is an image whose left half has the value `i`, the right one 200 + i % 50."""

    class_names, has_captions = ("even", "odd"), False

    def __init__(self, damaged=()):
        self.damaged = set(damaged)

    def __len__(self):
        return N

    def __getitem__(self, i):
        if not 0 <= i < N:
            raise IndexError(i)
        pixels = np.full((SIZE, SIZE, 3), i, np.uint8)
        pixels[:, SIZE // 2 :] = 200 + i % 50
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        content = file.getvalue()[:50] if i in self.damaged else file.getvalue()
        return ImageRecord(content, f"{i}.png", label=i % 2)

    def digest(self):
        return "numbered"


def batches(batch_size=6, source=None, **options):
    return image_batches(
        source or Numbered(), batch_size, **{"size": SIZE, "seed": SEED, **options}
    )


def take(iterator, count):
    with_close = [next(iterator) for _ in range(count)]
    iterator.close()
    return with_close


def joined(parts):
    """The global batches of several processes' parts."""
    return [
        {k: np.concatenate([p[k] for p in rows]) for k in rows[0]}
        for rows in zip(*parts, strict=True)
    ]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_record_comes_once_an_epoch():
    """A batch that spans two epochs is divided between them; none is dropped or repeated."""
    epochs = 12
    found = np.concatenate([b["index"] for b in take(batches(8), N * epochs // 8)])
    by_epoch = found.reshape(epochs, N)
    np.testing.assert_array_equal(np.sort(by_epoch), np.tile(np.arange(N), (epochs, 1)))
    assert len({tuple(order) for order in by_epoch}) == epochs


def test_batches_hold_what_they_say():
    for batch in take(batches(), 3):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "image": ((6, SIZE, SIZE, 3), np.dtype("uint8")),
            "cond": ((6,), np.dtype("int32")),
            "index": ((6,), np.dtype("int32")),
        }
        np.testing.assert_array_equal(batch["cond"], batch["index"] % 2)
        left, right = batch["image"][:, 0, 0, 0], batch["image"][:, 0, -1, 0]
        np.testing.assert_array_equal(np.minimum(left, right), batch["index"])


def test_flips_are_those_of_epoch_and_record():
    found = take(batches(), 11)
    index = np.concatenate([b["index"] for b in found])
    flipped = np.concatenate([b["image"][:, 0, 0, 0] for b in found]) >= 200
    epochs = np.arange(len(index)) // N
    np.testing.assert_array_equal(flipped, flip_mask(SEED, epochs, index))
    assert not any((b["image"][:, 0, 0, 0] >= 200).any() for b in take(batches(flip=False), 11))
    both = [set(flipped[index == i]) for i in range(N)]
    assert sum(len(s) == 2 for s in both) > N // 3  # a record isn't flipped in every epoch


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_global_batches_are_those_of_one_process(count):
    parts = [take(batches(rows=np.arange(6).reshape(count, -1)[p]), 9) for p in range(count)]
    same(joined(parts), take(batches(), 9))


def test_a_position_is_exact_and_belongs_to_any_number_of_processes():
    whole = take(batches(), 12)
    first = batches()
    same([next(first) for _ in range(5)], whole[:5])
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"batches": 5, "records": N, "batch_size": 6, "seed": SEED}
    first.close()
    parts = []
    for p in range(3):
        later = batches(rows=(2 * p, 2 * p + 1))
        next(later)
        later.set_state(state)
        parts.append(take(later, 7))
    same(joined(parts), whole[5:])


def test_worker_processes_give_the_same_batches(tmp_path):
    whole = take(batches(), 9)
    write_array_record(Numbered(), tmp_path / "n.arrayrecord")
    started = batches(source=open_images(tmp_path / "n.arrayrecord"), workers=2)
    started.set_state({**started.get_state(), "batches": 4})
    same([next(started) for _ in range(5)], whole[4:])
    assert started.get_state()["batches"] == 9
    started.close()


READER = """
import multiprocessing, sys
from eqxldm.data import Batches

batches = Batches(10, 4, lambda indices, epochs: ({"x": indices}, {}), seed=0, workers=1)
for line in sys.stdin:
    batch = next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
"""


def test_workers_are_told_by_their_parent_alone_when_to_end():
    """A terminal sends Ctrl-C and its own end to all of them; a parent may be killed."""
    with subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdin and parent.stdout and parent.stderr

        def worker():
            print(file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        first = worker()
        for signum in (signal.SIGINT, signal.SIGHUP):
            os.kill(first, signum)
        assert {worker() for _ in range(6)} == {first}  # of which some had been read before
        parent.kill()
        stat, deadline = Path(f"/proc/{first}/stat"), time.monotonic() + 10
        while stat.exists() and stat.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "Traceback" not in parent.stderr.read()


KILLED = """
import multiprocessing, threading
import numpy as np
from eqxldm.data import Batches

x = np.zeros(10**6)  # more than a pipe holds
batches = Batches(10, 4, lambda indices, epochs: ({"x": x[indices]}, {}), seed=0, workers=1)

def kill():
    while not (started := multiprocessing.active_children()):
        pass
    started[0].kill()

threading.Thread(target=kill).start()
try:
    next(batches)
except RuntimeError as error:
    print(error)
batches.close()
"""


def test_a_worker_that_is_killed_while_it_starts_is_an_error(tmp_path):
    """Python would wait for ever for it to read what it begins with."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Worker process was terminated unexpectedly")
    assert not list(tmp_path.iterdir())


def test_what_ends_at_once_leaves_no_shared_memory_behind():
    """Python's tracker of it would complain."""
    script = f"{READER}\nfrom eqxldm._leaving import leave\nbatches.close()\nleave(3)"
    ended = subprocess.run(
        [sys.executable, "-c", script], input="\n" * 5, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (3, "")


def test_checkpoints_hold_the_position(tmp_path):
    whole = take(batches(), 6)
    with Checkpoints(tmp_path) as checkpoints:
        iterator = batches()
        for _ in range(4):
            next(iterator)
        checkpoints.save(4, {"w": np.ones(1)}, iterator)
        checkpoints.wait()
        other = batches()
        checkpoints.restore(4, {"w": np.ones(1)}, other)
    assert isinstance(other, grain.DatasetIterator)
    same(take(other, 2), whole[4:])


def test_the_position_of_another_order_is_refused():
    state = batches().get_state()
    with pytest.raises(DataError, match=r"batch_size: 6, now 11\n  seed: 3, now 4"):
        batches(11, seed=4).set_state(state)


@pytest.mark.parametrize(
    ("batch_size", "options", "match"),
    [
        (N + 1, {}, "must lie in 1 .. 22, got 23"),
        (0, {}, "must lie in 1"),
        (6, {"rows": [2, 6]}, r"rows must be some of 0 .. 5 in ascending order, got \[2, 6\]"),
        (6, {"rows": [3, 2]}, "in ascending order"),
        (6, {"rows": []}, "in ascending order"),
    ],
)
def test_wrong_numbers_are_refused(batch_size, options, match):
    with pytest.raises(ValueError, match=match):
        batches(batch_size, **options)


def test_an_unreadable_image_is_named():
    with pytest.raises(DataError, match=r"7\.png: cannot be decoded"):
        take(batches(source=Numbered({7})), 4)


def test_unreadable_images_are_skipped_and_listed():
    whole = take(batches(), 8)
    damaged = {7, 8, 21}
    iterator = batches(source=Numbered(damaged), skip_unreadable=True)
    found = take(iterator, 8)
    assert iterator.skipped.keys() == {"7.png", "8.png", "21.png"}
    assert all("cannot be decoded" in why for why in iterator.skipped.values())
    substitutes = {7: 9, 8: 9, 21: 0}
    for a, b in zip(found, whole, strict=True):
        assert a["index"].tolist() == [substitutes.get(i, i) for i in b["index"].tolist()]
        np.testing.assert_array_equal(np.minimum(*a["image"][:, 0, [0, -1], 0].T), a["index"])
    hopeless = batches(source=Numbered(range(N)), skip_unreadable=True)
    with pytest.raises(DataError, match="cannot be decoded"):
        next(hopeless)


def spec(devices=2):
    return batch_sharding(make_mesh(devices=jax.devices()[:devices]))


def test_prefetched_batches_lie_on_the_devices_and_positions_are_those_consumed():
    whole = take(batches(), 9)
    ahead = prefetch_to_device(batches(), spec(), depth=3)
    for k in range(4):
        assert ahead.get_state()["batches"] == k
        time.sleep(0.02)  # it reads ahead
        batch = next(ahead)
        assert batch["image"].sharding == spec()
        assert batch["image"].addressable_shards[1].data.shape == (3, SIZE, SIZE, 3)
        same([jax.device_get(batch)], whole[k : k + 1])
    assert ahead.get_state()["batches"] == ahead.taken == 4
    ahead.set_state({**ahead.get_state(), "batches": 2})
    same(jax.device_get([next(ahead), next(ahead)]), whole[2:4])
    assert ahead.get_state()["batches"] == 4
    ahead.close()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


class Slow(grain.DatasetIterator):
    """Numbers, each after some seconds; an error at 5."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.at = seconds, 0

    def __next__(self):
        time.sleep(self.seconds)
        self.at += 1
        if self.at == 5:
            raise DataError("the fifth")
        return np.full(2, self.at)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def test_prefetching_reads_no_further_than_its_depth_and_raises_in_order():
    slow = Slow(0.0)
    ahead = prefetch_to_device(slow, spec(), depth=2)
    next(ahead)
    time.sleep(0.1)
    assert slow.at == 3
    assert [int(next(ahead)[0]) for _ in range(3)] == [2, 3, 4]
    for _ in range(2):
        with pytest.raises(DataError, match="the fifth"):
            next(ahead)
    assert ahead.get_state() == {"at": 4}
    ahead.close()
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch_to_device(slow, spec(), depth=0)


def test_the_time_waited_is_that_of_the_data():
    """0.05 s a batch: waited for by a step that takes none, hidden behind one that takes 0.1 s."""
    eager = prefetch_to_device(Slow(0.05), spec(), depth=1)
    for _ in range(4):
        next(eager)
    assert eager.wait_seconds > 0.15
    eager.close()
    busy = prefetch_to_device(Slow(0.05), spec(), depth=1)
    next(busy)
    before = busy.wait_seconds
    for _ in range(3):
        time.sleep(0.1)
        next(busy)
    assert busy.wait_seconds - before < 0.1
    busy.close()


def test_a_forgotten_prefetcher_ends_its_thread():
    before = threading.active_count()
    ahead = prefetch_to_device(Slow(0.0), spec(), depth=2)
    next(ahead)
    assert threading.active_count() > before
    del ahead
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_prefetching_takes_any_grain_iterator():
    arrays = {"x": np.arange(10), "y": np.arange(10) % 3}
    plain = array_batches(arrays, 4, seed=0)
    ahead = prefetch_to_device(array_batches(arrays, 4, seed=0), spec())
    for _ in range(4):
        same([jax.device_get(next(ahead))], [next(plain)])
        assert ahead.get_state() == plain.get_state()
    ahead.close()


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    arrays = {"x": np.arange(12)}
    mesh = make_mesh({"data": 2})
    ahead = prefetch_to_device(array_batches(arrays, 5, seed=0), batch_sharding(mesh))
    with pytest.raises(ValueError, match="5 rows do not divide by the 2 parts"):
        next(ahead)
    ahead.close()
