"""The training loop, the run folder and the data pipeline, on a model of two numbers."""

import json
import resource

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqxldm.checkpoints import CheckpointError, Checkpoints
from eqxldm.digests import digest
from eqxldm.sharding import make_mesh
from eqxldm.training import exponential, init_state, make_train_step
from experiments.common import loop
from experiments.common.run import RunFolder
from experiments.common.terminal import Interrupted, Signals, UserError, run_main

from helpers import array_batches

ARRAYS = {"x": np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)}


class Counted:
    """A train step that counts how often it is traced."""

    def __init__(self, static, optimizer, broken=lambda key: False):
        self.traces, self.broken = 0, broken
        self._step = make_train_step(self._loss, static, optimizer, ema_decays=(exponential(0.9),))

    def _loss(self, model, batch, key, context):
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
    tmp_path, signals, phases=(6, 12), stop=None, devices=1, broken=lambda key: False,
    log_every=3, patience=3, **keep,
):  # fmt: skip
    optimizer = optax.adam(0.1)
    state, static = init_state({"w": jnp.ones(2)}, optimizer, num_emas=1)
    steps = [Counted(static, optimizer, broken) for _ in phases]
    run = RunFolder(tmp_path)
    run.path.mkdir(exist_ok=True)
    functions = [(until, step) for until, step in zip(phases, steps, strict=True)]
    if stop is not None:
        functions = [(min(until, stop), step) for until, step in functions]
    state, timings = loop.train_stage(
        "stage",
        functions,
        state,
        array_batches(ARRAYS, 4, seed=1),
        batch_size=4,
        key=jax.random.key(2),
        mesh=make_mesh(devices=jax.devices()[:devices]),
        run=run,
        signals=signals,
        keep=loop.Keep(**{"save_every": 5, **keep}),
        log_every=log_every,
        patience=patience,
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
    broken, unbroken = (
        [{k: v for k, v in row.items() if k not in SPEED} for row in log(tmp_path / name)]
        for name in ("broken", "unbroken")
    )
    steps = [row["step"] for row in broken]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert broken[-1] == unbroken[-1] or stop in (11,)  # other means: a shorter row


SPEED = {"images_per_second", "step_seconds", "data_wait"}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_the_speed_and_the_share_of_waiting_for_data(tmp_path, signals):
    train(tmp_path, signals)
    row = log(tmp_path)[-1]
    assert {"stage", "step", "loss", "noise", "gradient_norm"} | SPEED == row.keys()
    assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1


def test_steps_that_are_not_finite_are_skipped_and_logged(tmp_path, signals, capsys):
    """Every third noise or so is negative enough: the parameters stay finite all the same."""
    broken = lambda key: jax.random.normal(key, ()) < -0.4
    state, _, _ = train(tmp_path, signals, broken=broken, patience=12)
    skipped = sum(row.get("skipped", 0) for row in log(tmp_path))
    assert 0 < skipped == int(state.skipped) < 12 and int(state.step) == 12
    assert np.isfinite(state.params["w"]).all()
    assert "they were skipped" in capsys.readouterr().out
    assert all(
        row["loss"] is None or np.isfinite(row["loss"]) for row in log(tmp_path) if "loss" in row
    )


def test_too_many_in_a_row_stop_the_run_with_the_norms_by_block(tmp_path, signals):
    train(tmp_path, signals, stop=5)
    with pytest.raises(loop.LossNotFinite) as error:
        train(tmp_path, signals, broken=lambda key: True, patience=3)
    message = str(error.value)
    assert "(3 steps in a row) is not finite at step 8" in message
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / 'stage' / '5'}" in message
    assert "w: nan" in message and "learning rate" in message
    with Checkpoints(tmp_path / "checkpoints" / "stage") as checkpoints:
        assert checkpoints.steps() == [5]


def with_updates(state):
    return state.ema, {"updates": int(state.step)}


def test_snapshots_are_kept_for_good_and_not_written_twice(tmp_path, signals):
    kept = dict(snapshots=with_updates, snapshot_every=5)
    train(tmp_path / "broken", signals, stop=6, save_every=3, **kept)
    train(tmp_path / "broken", signals, save_every=3, **kept)
    train(tmp_path / "unbroken", signals, save_every=3, **kept)
    like = ({"w": np.zeros(2, np.float32)},)
    found = []
    for name in ("broken", "unbroken"):
        with Checkpoints(tmp_path / name / "snapshots" / "stage") as snapshots:
            assert snapshots.steps() == ([5, 6, 10, 12] if name == "broken" else [5, 10, 12])
            found.append([snapshots.restore(step, like)[0][0]["w"] for step in (5, 10, 12)])
            assert snapshots.info(10) == {"updates": 10}
    np.testing.assert_array_equal(*found)


def test_a_snapshot_that_cannot_be_written_is_reported_and_the_run_goes_on(
    tmp_path, signals, capsys
):
    (tmp_path / "snapshots").write_text("a file in the way")
    state, _, _ = train(tmp_path, signals, snapshots=with_updates, snapshot_every=6)
    assert int(state.step) == 12
    assert "going on without this snapshot" in capsys.readouterr().out


def test_a_failed_save_is_reported_and_the_run_goes_on(tmp_path, signals, monkeypatch, capsys):
    save = Checkpoints.save

    def full(self, step, *args, **options):
        if step == 5:
            raise CheckpointError(f"{self.folder / str(step)} was not saved: No space left.")
        save(self, step, *args, **options)

    monkeypatch.setattr(Checkpoints, "save", full)
    state, _, _ = train(tmp_path, signals)
    assert int(state.step) == 12
    assert "No space left.\nstage: going on without" in capsys.readouterr().out


def test_a_last_save_that_fails_is_an_error(tmp_path, signals, monkeypatch):
    def full(self, step, *args, **options):
        raise CheckpointError("No space left.")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(tmp_path, signals)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(
    tmp_path, signals, capsys
):
    unbroken, _, _ = train(tmp_path / "unbroken", signals)
    train(tmp_path / "broken", signals, stop=9, save_every=3)
    folder = tmp_path / "broken" / "checkpoints" / "stage"
    largest = max(
        (p for p in (folder / "9").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    resumed, _, _ = train(tmp_path / "broken", signals, save_every=3)
    assert digest(resumed) == digest(unbroken)
    assert "damaged checkpoint" in capsys.readouterr().out and (folder / "9.damaged").exists()


def test_a_checkpoint_says_how_it_was_made(tmp_path, signals):
    RunFolder(tmp_path).open({"seed": 7}, overwrite=False)
    train(tmp_path, signals)
    with Checkpoints(tmp_path / "checkpoints" / "stage") as checkpoints:
        state, _ = init_state({"w": jnp.ones(2)}, optax.adam(0.1), num_emas=1)
        info = checkpoints.restore(12, state)[1]
    assert info["config"] == {"seed": 7} and "jax" in info["versions"]


def test_another_model_is_refused_and_its_checkpoints_stay(tmp_path, signals, monkeypatch):
    train(tmp_path, signals)
    other = init_state({"w": jnp.ones(3)}, optax.adam(0.1), num_emas=1)
    monkeypatch.setattr("test_loop.init_state", lambda *_, **__: other)
    with pytest.raises(UserError, match=r"of another configuration.*\n.*--overwrite"):
        train(tmp_path, signals)
    assert (tmp_path / "checkpoints" / "stage" / "12").exists()


def test_two_devices_give_the_same_parameters(tmp_path, signals):
    one, _, _ = train(tmp_path / "one", signals)
    two, _, _ = train(tmp_path / "two", signals, devices=2)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_newest_step_is_never_waited_for(tmp_path, signals, monkeypatch):
    """The loop waits only for the step that is IN_FLIGHT behind, and logs only older ones."""
    dispatched, waited, fetched = [], [], []
    block, get, real_jit = jax.block_until_ready, jax.device_get, jax.jit

    def numbers(trees):  # those that are metrics of a step; checkpoints wait for other things
        return [k for tree in trees for k, metrics in enumerate(dispatched) if metrics is tree]

    def noted_block(tree):
        waited.extend(numbers([tree]))
        return block(tree)

    def noted_get(tree):
        fetched.extend((k, len(dispatched)) for k in numbers(tree if type(tree) is list else []))
        return get(tree)

    def noted_jit(function, **options):
        compiled = real_jit(function, **options)
        if "donate_argnums" not in options:
            return compiled

        def run(state, batch, key):
            state, metrics = compiled(state, batch, key)
            dispatched.append(metrics)
            return state, metrics

        return run

    monkeypatch.setattr(loop.jax, "block_until_ready", noted_block)
    monkeypatch.setattr(loop.jax, "device_get", noted_get)
    monkeypatch.setattr(loop.jax, "jit", noted_jit)
    train(tmp_path, signals, log_every=3, save_every=100)
    steps = len(dispatched)
    assert waited == list(range(steps - loop.IN_FLIGHT))
    assert [k for k, _ in fetched] == list(range(steps))
    assert all(k + loop.IN_FLIGHT < count for k, count in fetched if count < steps)
    assert [e["step"] for e in RunFolder(tmp_path).log_entries()] == [3, 6, 9, 12]


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


def test_batches_cover_every_epoch_and_resume_at_the_next(tmp_path):
    arrays = {"i": np.arange(10)}
    batches = array_batches(arrays, 5, seed=0)
    epochs = [np.concatenate([next(batches)["i"] for _ in range(2)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(1)}, batches)
        checkpoints.wait()
        following = [next(batches)["i"] for _ in range(3)]
        fresh = array_batches(arrays, 5, seed=0)
        checkpoints.restore(1, {"w": np.ones(1)}, fresh)
    for expected in following:
        np.testing.assert_array_equal(next(fresh)["i"], expected)


@pytest.mark.parametrize(
    ("arrays", "batch", "message"),
    [
        ({"a": np.zeros(3)}, 4, "batch_size must lie in 1 .. 3, got 4"),
        ({"a": np.zeros(3)}, 0, "batch_size must lie in 1 .. 3, got 0"),
    ],
)
def test_bad_batches_are_refused(arrays, batch, message):
    with pytest.raises(ValueError, match=message):
        array_batches(arrays, batch, seed=0)


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
    elsewhere = tmp_path.parent / f"{tmp_path.name}-disk"
    (elsewhere / "of-a-run").mkdir(parents=True)
    (tmp_path / "latents").symlink_to(elsewhere)
    with pytest.raises(UserError, match="--a: the folder has 1, now 2"):
        RunFolder(tmp_path).open({"a": 2}, overwrite=False)
    RunFolder(tmp_path).open({"a": 2}, overwrite=True)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"config.json", "notes.txt", "latents"}
    assert list(elsewhere.iterdir()) == [] and (tmp_path / "latents").is_symlink()
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


def test_a_signal_that_comes_with_the_last_checkpoint_stops_after_it(
    tmp_path, signals, monkeypatch
):
    save = Checkpoints.save

    def signalled(self, step, *args):
        save(self, step, *args)
        signals.pending = 15 if step == 12 else None

    monkeypatch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, signals)
    assert stop.value.signum == 15
    assert Checkpoints(tmp_path / "checkpoints" / "stage").steps()[-1] == 12


def test_a_log_that_cannot_be_written_is_said_once_and_goes_on_later(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.log(step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # in the middle of the next line
    try:
        run.log(step=2)
        run.log(step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.log(step=4)
    assert [entry["step"] for entry in run.log_entries()] == [1, 4]
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path}/log.jsonl: File too large. Going on without") == 1


def test_a_run_killed_before_it_had_a_configuration_is_begun_anew(tmp_path):
    (tmp_path / ".config.json-0123abcd.json").write_text("{")
    RunFolder(tmp_path).open({"a": 1}, overwrite=False)
    assert (tmp_path / "config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / ".samples.npz-0123abcd.npz").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(other).open({"a": 1}, overwrite=False)


def test_a_full_disk_is_one_message(capsys):
    def full():
        raise OSError(28, "No space left on device", "metrics.json")

    assert run_main(full) == 2
    assert capsys.readouterr().err == "error: metrics.json: No space left on device.\n"

    def broken():
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        run_main(broken)
