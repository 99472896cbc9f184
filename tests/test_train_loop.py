"""The training loop, its hooks and its checkpoints."""

import json

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxldm.checkpoints import CheckpointError, Checkpoints
from eqxldm.data import DataError
from eqxldm.digests import digest
from eqxldm.sharding import make_mesh
from eqxldm.training import exponential, init_state, make_train_step
from experiments.train import loop
from experiments.train.hooks import Evaluate, LossNotFinite, Snapshot
from experiments.train.run import RunFolder
from experiments.train.telemetry import Telemetry
from experiments.train.terminal import Interrupted, Signals, UserError

X = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)


class Rows(grain.DatasetIterator):
    """Endless batches of four rows, with a position; `fails` is the read that raises."""

    def __init__(self, fails=None, error=None):
        super().__init__()
        self.taken, self.fails, self.error = 0, fails, error

    def __next__(self):
        self.taken += 1
        if self.taken == self.fails:
            raise self.error
        return {"x": X[np.arange(4 * self.taken, 4 * self.taken + 4) % len(X)]}

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


class Counted:
    """A train step that counts how often it is traced."""

    def __init__(self, static, optimizer, broken):
        self.traces, self.broken = 0, broken
        self._step = make_train_step(self._loss, static, optimizer, ema_decays=(exponential(0.9),))

    def _loss(self, model, batch, key, context=None):
        noise = jax.random.normal(key, ())
        loss = jnp.mean((batch["x"] @ model["w"] - 1 + 0.1 * noise) ** 2)
        return loss * jnp.where(self.broken(key), jnp.nan, 1), {"noise": noise}

    def __call__(self, state, batch, key):
        self.traces += 1
        return self._step(state, batch, key)


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Signals()


def train(
    folder, signals, phases=(6, 12), stop=None, devices=1, broken=lambda key: False, batches=None,
    hooks=lambda run, telemetry: (), width=2, **settings,
):  # fmt: skip
    optimizer = optax.adam(0.1)
    state, static = init_state({"w": jnp.ones(width)}, optimizer, num_emas=1)
    steps = [Counted(static, optimizer, broken) for _ in phases]
    run = RunFolder(folder)
    run.path.mkdir(exist_ok=True)
    functions = list(zip(phases, steps, strict=True))
    if stop is not None:
        functions = [(min(until, stop), step) for until, step in functions]
    telemetry = Telemetry(run)
    state, timings = loop.run_stage(
        "stage",
        functions,
        state,
        batches or Rows(),
        loop.Settings(4, **{"save_every": 5, "log_every": 3, "patience": 3, **settings}),
        key=jax.random.key(2),
        mesh=make_mesh(devices=jax.devices()[:devices]),
        run=run,
        signals=signals,
        telemetry=telemetry,
        hooks=hooks(run, telemetry),
    )
    return state, timings, [step.traces for step in steps]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps(folder):
    with Checkpoints(folder / "checkpoints" / "stage") as checkpoints:
        return checkpoints.steps()


# Training and resuming


def test_each_phase_is_compiled_once_and_a_finished_stage_runs_nothing(tmp_path, signals):
    first, before, traces = train(tmp_path, signals)
    assert traces == [1, 1] and before["seconds"] > 0 and before["images_per_second"] > 0
    again, after, traces = train(tmp_path, signals)
    assert traces == [0, 0] and digest(first) == digest(again)
    # Of the last checkpoint, which was begun before the stage ended.
    assert 0 < after["seconds"] <= before["seconds"]


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, signals, stop):
    whole, _, _ = train(tmp_path / "whole", signals)
    train(tmp_path / "cut", signals, stop=stop)
    resumed, _, _ = train(tmp_path / "cut", signals)
    assert digest(resumed) == digest(whole)
    logged = [row["step"] for row in log(tmp_path / "cut")]
    assert logged == sorted(set(logged)) and logged[-1] == 12
    if stop != 11:  # means of other steps
        assert log(tmp_path / "cut")[-1]["loss"] == log(tmp_path / "whole")[-1]["loss"]


def test_the_log_has_the_losses_and_the_speed(tmp_path, signals):
    train(tmp_path, signals)
    row = log(tmp_path)[-1]
    assert {"stage", "step", "loss", "noise", "gradient_norm"} <= row.keys()
    assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1


def test_two_devices_give_the_same_parameters(tmp_path, signals):
    one, _, _ = train(tmp_path / "one", signals)
    two, _, _ = train(tmp_path / "two", signals, devices=2)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_newest_step_is_never_waited_for(tmp_path, signals, monkeypatch):
    waited, started = [], []
    block = jax.block_until_ready

    def noted(tree):
        if isinstance(tree, dict) and "loss" in tree:
            waited.append(len(started))
        return block(tree)

    class Noted(Rows):
        def __next__(self):
            started.append(1)
            return super().__next__()

    monkeypatch.setattr(loop.jax, "block_until_ready", noted)
    train(tmp_path, signals, phases=(12,), batches=Noted(), save_every=100)
    assert len(waited) == 12 - loop.IN_FLIGHT


# Losses that are not finite


def test_steps_that_are_not_finite_are_skipped_and_logged(tmp_path, signals, capsys):
    broken = lambda key: jax.random.normal(key, ()) < -0.4
    state, _, _ = train(tmp_path, signals, broken=broken, patience=12)
    skipped = sum(row.get("skipped", 0) for row in log(tmp_path))
    assert 0 < skipped == int(state.skipped) < 12 and int(state.step) == 12
    assert np.isfinite(state.params["w"]).all()
    assert "they were skipped" in capsys.readouterr().out


def test_too_many_in_a_row_stop_the_run_with_the_norms_by_block(tmp_path, signals):
    train(tmp_path, signals, stop=5)
    with pytest.raises(LossNotFinite) as error:
        train(tmp_path, signals, broken=lambda key: True)
    message = str(error.value)
    assert "(3 steps in a row) is not finite at step 8" in message
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / 'stage' / '5'}" in message
    assert "w: nan" in message and "learning rate" in message
    assert steps(tmp_path) == [5]


# Hooks


def with_updates(state):
    return state.ema, {"updates": int(state.step)}


def test_snapshots_stay_and_are_not_written_twice(tmp_path, signals):
    hooks = lambda run, _: [Snapshot(run, "stage", with_updates, every=5)]
    train(tmp_path / "cut", signals, stop=6, save_every=3, hooks=hooks)
    train(tmp_path / "cut", signals, save_every=3, hooks=hooks)
    train(tmp_path / "whole", signals, save_every=3, hooks=hooks)
    like, found = ({"w": np.zeros(2, np.float32)},), []
    for name, expected in (("cut", [5, 6, 10, 12]), ("whole", [5, 10, 12])):
        with Checkpoints(tmp_path / name / "snapshots" / "stage", keep=100) as snapshots:
            assert snapshots.steps() == expected
            found.append([snapshots.restore(step, like)[0][0]["w"] for step in (5, 10, 12)])
            assert snapshots.info(10) == {"updates": 10}
    np.testing.assert_array_equal(*found)


def test_a_snapshot_that_cannot_be_written_is_reported_and_the_run_goes_on(
    tmp_path, signals, capsys
):
    (tmp_path / "snapshots").write_text("a file in the way")
    hooks = lambda run, _: [Snapshot(run, "stage", with_updates, every=6)]
    state, _, _ = train(tmp_path, signals, hooks=hooks)
    assert int(state.step) == 12
    assert "going on without this snapshot" in capsys.readouterr().out


def test_measuring_changes_nothing_and_a_resumed_run_logs_each_step_once(tmp_path, signals):
    def hooks(run, telemetry):
        measure = lambda state, step: (
            {"w": float(state.params["w"][0])},
            np.zeros((2, 2, 1), "u1"),
        )
        return [Evaluate(measure, run, telemetry, every=4)]

    plain, _, _ = train(tmp_path / "plain", signals)
    train(tmp_path / "cut", signals, stop=9, hooks=hooks)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:  # of a run that was killed later
        file.write('{"stage": "evaluation", "step": 12}\n{"sta')
    measured, _, _ = train(tmp_path / "cut", signals, hooks=hooks)
    assert digest(plain) == digest(measured)
    rows = [row for row in log(tmp_path / "cut") if row["stage"] == "evaluation"]
    assert [row["step"] for row in rows] == [4, 8, 9, 12] and all("w" in row for row in rows)


def test_a_signal_saves_at_the_step_and_stops(tmp_path, signals):
    signals.pending = 15
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, signals)
    assert stop.value.signum == 15 and steps(tmp_path) == [1]


def test_a_signal_with_the_last_checkpoint_stops_after_it(tmp_path, signals, monkeypatch):
    wait = Checkpoints.wait

    def signalled(self):
        wait(self)
        if 12 in self.steps():
            signals.pending = 15

    monkeypatch.setattr(Checkpoints, "wait", signalled)
    with pytest.raises(Interrupted):
        train(tmp_path, signals)
    assert steps(tmp_path)[-1] == 12


@pytest.mark.parametrize("error", [DataError("its disk is gone"), RuntimeError("worker died")])
def test_when_reading_fails_the_steps_before_are_saved(tmp_path, signals, error):
    whole, _, _ = train(tmp_path / "whole", signals)
    with pytest.raises((DataError, UserError), match=str(error)):
        train(tmp_path / "cut", signals, batches=Rows(9, error))
    assert steps(tmp_path / "cut") == [5, 8]
    resumed, _, _ = train(tmp_path / "cut", signals)
    assert digest(resumed) == digest(whole)


# Checkpoints


def test_a_failed_save_is_reported_and_the_run_goes_on_but_not_the_last(
    tmp_path, signals, monkeypatch, capsys
):
    save, failing = Checkpoints.save, [5]

    def full(self, step, *args, **options):
        if step in failing:
            raise CheckpointError(f"{self.folder / str(step)} was not saved: No space left.")
        save(self, step, *args, **options)

    monkeypatch.setattr(Checkpoints, "save", full)
    state, _, _ = train(tmp_path / "a", signals)
    assert int(state.step) == 12
    assert "No space left.\nstage: going on without" in capsys.readouterr().out
    failing.append(12)
    with pytest.raises(CheckpointError, match="No space left"):
        train(tmp_path / "b", signals)


def test_a_damaged_newest_checkpoint_is_renamed_and_the_one_before_goes_on(
    tmp_path, signals, capsys
):
    whole, _, _ = train(tmp_path / "whole", signals)
    train(tmp_path / "cut", signals, stop=9, save_every=3)
    folder = tmp_path / "cut" / "checkpoints" / "stage"
    files = [p for p in (folder / "9").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    resumed, _, _ = train(tmp_path / "cut", signals, save_every=3)
    assert digest(resumed) == digest(whole)
    assert "damaged checkpoint" in capsys.readouterr().out and (folder / "9.damaged").exists()


def test_a_checkpoint_says_how_it_was_made_and_the_newest_stay(tmp_path, signals):
    run = RunFolder(tmp_path)
    run.open({"seed": 7}, overwrite=False)
    train(tmp_path, signals, save_every=1, keep=2)
    assert steps(tmp_path) == [11, 12]
    with Checkpoints(tmp_path / "checkpoints" / "stage") as checkpoints:
        info = checkpoints.info(12)
    assert info["config"] == {"seed": 7} and "jax" in info["versions"]


def test_another_model_is_refused_and_its_checkpoints_stay(tmp_path, signals):
    train(tmp_path, signals)
    with pytest.raises(UserError, match=r"of another configuration.*\n.*--overwrite"):
        train(tmp_path, signals, width=3)
    assert (tmp_path / "checkpoints" / "stage" / "12").exists()


def test_model_leaves_survive_a_checkpoint_bit_for_bit(tmp_path):
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    state, _ = init_state(linear, optax.adam(0.1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, info={"seconds": 1.5})
        checkpoints.wait()
        restored, info = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))
    assert digest(restored) == digest(state) and info == {"seconds": 1.5}
