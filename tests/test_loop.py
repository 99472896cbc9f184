"""The training loop, the run folder and the data pipeline, on a model of two numbers."""

import gc
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxldm.checkpoints import CheckpointError, Checkpoints, digest
from eqxldm.data.pipelines import training_batches
from eqxldm.sharding import data_mesh, replicate, shard_batch
from eqxldm.training import init_state, make_train_step
from experiments.common import loop
from experiments.common.run import RunFolder, replacing
from experiments.common.terminal import Signals, UserError

ARRAYS = {"x": np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)}


class Counted:
    """A train step that counts how often it is traced."""

    def __init__(self, static, optimizer):
        self.traces = 0
        self._step = make_train_step(self._loss, static, optimizer, ema_decay=0.9)

    def _loss(self, model, batch, key):
        noise = jax.random.normal(key, ())
        return jnp.mean((batch["x"] @ model["w"] - 1 + 0.1 * noise) ** 2), {"noise": noise}

    def __call__(self, state, batch, key):
        self.traces += 1
        return self._step(state, batch, key)


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Signals()


def train(tmp_path, signals, phases=(6, 12), stop=None, devices=1, **options):
    optimizer = optax.adam(0.1)
    state, static = init_state({"w": jnp.ones(2)}, optimizer)
    steps = [Counted(static, optimizer) for _ in phases]
    run = RunFolder(tmp_path)
    run.path.mkdir(exist_ok=True)
    functions = [(until, step) for until, step in zip(phases, steps, strict=True)]
    if stop is not None:
        functions = [(min(until, stop), step) for until, step in functions]
    state, timings = loop.train_stage(
        "stage",
        functions,
        state,
        training_batches(ARRAYS, 4, seed=1),
        batch_size=4,
        key=jax.random.key(2),
        mesh=data_mesh(devices),
        run=run,
        signals=signals,
        save_every=options.get("save_every", 5),
        log_every=options.get("log_every", 3),
    )
    return state, timings, [step.traces for step in steps]


def test_each_phase_is_compiled_once(tmp_path, signals):
    _, timings, traces = train(tmp_path, signals)
    assert traces == [1, 1]
    assert timings["seconds"] > 0 and timings["images_per_second"] > 0


def test_a_finished_stage_runs_nothing(tmp_path, signals):
    first, before, _ = train(tmp_path, signals)
    again, after, traces = train(tmp_path, signals)
    assert traces == [0, 0]
    assert digest(first) == digest(again)
    assert before["seconds"] == pytest.approx(after["seconds"], abs=1.0)


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, signals, stop):
    unbroken, _, _ = train(tmp_path / "unbroken", signals)
    train(tmp_path / "broken", signals, stop=stop)
    resumed, _, _ = train(tmp_path / "broken", signals)
    assert digest(resumed) == digest(unbroken)
    rows = lambda name: [
        json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
    ]
    steps = [row["step"] for row in rows("broken")]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert rows("broken")[-1] == rows("unbroken")[-1] or stop in (11,)  # other means: a shorter row


def test_two_devices_give_the_same_parameters(tmp_path, signals):
    one, _, _ = train(tmp_path / "one", signals)
    two, _, _ = train(tmp_path / "two", signals, devices=2)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_newest_step_is_never_waited_for(tmp_path, signals, monkeypatch):
    """Between logs, the loop waits only for the step that is IN_FLIGHT behind."""
    dispatched, waited = [], []
    original = loop.jax.block_until_ready
    monkeypatch.setattr(
        loop.jax, "block_until_ready", lambda tree: waited.append(id(tree)) or original(tree)
    )
    step = Counted.__call__

    def call(self, state, batch, key):
        return step(self, state, batch, key)

    monkeypatch.setattr(Counted, "__call__", call)
    real_jit = jax.jit

    def jit(function, **options):
        compiled = real_jit(function, **options)

        def run(state, batch, key):
            state, metrics = compiled(state, batch, key)
            dispatched.append(metrics)
            return state, metrics

        return run

    monkeypatch.setattr(loop.jax, "jit", jit)
    train(tmp_path, signals, log_every=100, save_every=100)
    order = {id(metrics): k for k, metrics in enumerate(dispatched)}
    positions = [order[i] for i in waited]
    assert positions == list(range(len(dispatched) - loop.IN_FLIGHT))


def test_a_pending_signal_saves_at_the_step_and_stops(tmp_path, signals):
    signals.pending = 15
    with pytest.raises(loop.Interrupted) as stop:
        train(tmp_path, signals)
    assert stop.value.signum == 15
    with Checkpoints(tmp_path / "checkpoints" / "stage") as checkpoints:
        assert checkpoints.steps() == [1]


def test_the_newest_checkpoints_stay(tmp_path, signals):
    train(tmp_path, signals, save_every=1)
    with Checkpoints(tmp_path / "checkpoints" / "stage") as checkpoints:
        assert checkpoints.steps() == [11, 12]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    """Orbax writes under a temporary name: what a killed write leaves is no checkpoint."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(2)})
        checkpoints.wait()
    (tmp_path / "2.orbax-checkpoint-tmp-0").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(1, {"w": np.zeros(2)})[0]["w"].tolist() == [1.0, 1.0]


def test_a_damaged_checkpoint_says_so_once(tmp_path):
    """Orbax abandons the other reads when one fails; none of them may end up on the terminal.

    What Python would print of them, pytest turns into an error of this test.
    """
    tree = {f"w{i}": np.random.default_rng(i).normal(size=(32, 32)) for i in range(60)}
    for trial in range(4):
        with Checkpoints(tmp_path / str(trial)) as checkpoints:
            checkpoints.save(1, tree)
            checkpoints.wait()
            files = [p for p in (tmp_path / str(trial) / "1").rglob("*") if p.is_file()]
            max(files, key=lambda p: p.stat().st_size).unlink()
            with pytest.raises(CheckpointError, match=f"{trial}/1: "):
                checkpoints.restore(1, tree)
        gc.collect()


def test_batches_cover_every_epoch_and_resume_at_the_next(tmp_path):
    arrays = {"i": np.arange(10)}
    batches = training_batches(arrays, 5, seed=0)
    epochs = [np.concatenate([next(batches)["i"] for _ in range(2)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(1)}, batches)
        checkpoints.wait()
        following = [next(batches)["i"] for _ in range(3)]
        fresh = training_batches(arrays, 5, seed=0)
        checkpoints.restore(1, {"w": np.ones(1)}, fresh)
    for expected in following:
        np.testing.assert_array_equal(next(fresh)["i"], expected)


@pytest.mark.parametrize(
    ("arrays", "batch", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, 2, "equally long"),
        ({"a": np.zeros(3)}, 4, "batch_size must lie in 1 .. 3, got 4"),
        ({"a": np.zeros(3)}, 0, "batch_size must lie in 1 .. 3, got 0"),
    ],
)
def test_bad_batches_are_refused(arrays, batch, message):
    with pytest.raises(ValueError, match=message):
        training_batches(arrays, batch, seed=0)


def test_sharding_divides_batches_and_copies_states():
    mesh = data_mesh(2)
    batch = shard_batch({"x": np.zeros((4, 3))}, mesh)["x"]
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}
    state = replicate({"w": np.zeros((4, 3))}, mesh)["w"]
    assert {s.data.shape for s in state.addressable_shards} == {(4, 3)}
    with pytest.raises(ValueError, match="a batch of 3 does not divide over 2 devices"):
        shard_batch({"x": np.zeros((3, 3))}, mesh)
    with pytest.raises(ValueError, match="asked for 9 devices, 2 are there"):
        data_mesh(9)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new, half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a run folder"):
            RunFolder(tmp_path).open({"a": 1}, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    RunFolder(tmp_path).open({"a": 1}, overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "checkpoints" / "stage").mkdir(parents=True)
    with pytest.raises(UserError, match="--a: the folder has 1, now 2"):
        RunFolder(tmp_path).open({"a": 2}, overwrite=False)
    RunFolder(tmp_path).open({"a": 2}, overwrite=True)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"config.json", "notes.txt"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


def test_model_leaves_survive_a_checkpoint_bit_for_bit(tmp_path):
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    state, _ = init_state(linear, optax.adam(0.1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, info={"seconds": 1.5})
        checkpoints.wait()
        restored, info = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))
    assert digest(restored) == digest(state)
    assert info == {"seconds": 1.5}
