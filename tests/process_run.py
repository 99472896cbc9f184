"""Run by test_processes.py, once a process: some steps of training in a run folder."""

import argparse
import json
import os
import signal
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqxldm as ex
from eqxldm import sharding, training
from eqxldm.data import Batches
from eqxldm.nn import Linear
from experiments.train.loop import Settings, run_stage
from experiments.train.run import RunFolder
from experiments.train.telemetry import Telemetry
from experiments.train.terminal import Interrupted, Signals

from helpers import filled

RECORDS, BATCH = 20, 8  # an epoch is two and a half batches


class Network(eqx.Module):
    """One hidden layer, with a row for each label: quickly compiled, and divided by every axis."""

    fc1: Linear
    fc2: Linear
    table: jax.Array

    def __init__(self, size, *, key):
        self.fc1, self.fc2 = Linear(size, size, key=key), Linear(size, size, key=key)
        self.table = jnp.zeros((4, size))

    def __call__(self, x_t, t, cond, *, key=None):
        hidden = self.fc1(x_t.ravel()) + t + self.table[cond]
        return self.fc2(jnp.tanh(hidden)).reshape(x_t.shape)


class Reader:
    """Latents of a record are noise of its number; what was read is noted.

    At read number `kill_at` it sends its process SIGTERM, as a scheduler does.
    """

    def __init__(self, kill_at):
        self.seen, self.kill_at = [], kill_at

    def __call__(self, indices, epochs):
        self.seen.append(indices.tolist())
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x0 = [np.random.default_rng(i).normal(size=(2, 4, 4)).astype(np.float32) for i in indices]
        return {"x0": np.stack(x0), "cond": (indices % 3).astype(np.int32)}, {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh", default="")
    parser.add_argument("--until", type=int)
    parser.add_argument("--process", type=int, nargs=3, help="port, count, index")
    parser.add_argument("--kill-at", type=int)
    options = parser.parse_args()
    if options.process:
        port, count, index = options.process
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    index = jax.process_index()
    # Devices of the processes in turn, as the wiring of a slice may have them.
    own = [[d for d in jax.devices() if d.process_index == i] for i in range(jax.process_count())]
    devices = [device for each in zip(*own, strict=True) for device in each]
    mesh = sharding.make_mesh(sharding.parse_mesh(options.mesh), devices)
    sharding.SMALLEST_DIVIDED = 1
    network = filled(lambda: Network(32, key=jax.random.key(0)))
    # Not Adam, which makes a whole step of the rounding of a gradient that is zero.
    optimizer = optax.sgd(0.05, momentum=0.9)
    state, static = training.init_state(network, optimizer, num_emas=1)
    objective = ex.Denoising(
        ex.Diffusion(ex.LinearFlow(), ex.predict_velocity), time_sampler=ex.logit_normal_time()
    )
    loss = training.make_loss(
        objective,
        null=3,
        cond_dropout=0.1,
        prepare=lambda batch, key: {"x0": batch["x0"], "cond": batch["cond"]},
    )
    step = training.make_train_step(loss, static, optimizer, ema_decays=(training.constant(0.9),))
    reader = Reader(options.kill_at if index == 1 else None)
    batches = Batches(
        RECORDS, BATCH, reader, seed=1, rows=sharding.own_rows(BATCH, mesh), workers=0,
        threads=1, prefetch=1,
    )  # fmt: skip
    run = RunFolder(options.folder, primary=index == 0)
    run.path.mkdir(parents=True, exist_ok=True)
    signals = Signals()
    try:
        state, _ = run_stage(
            "stage", [(options.until, step)], jax.device_get(state), batches,
            Settings(BATCH, save_every=100, log_every=2),
            key=jax.random.key(2), mesh=mesh, run=run, signals=signals, telemetry=Telemetry(run),
        )  # fmt: skip
    except Interrupted as stop:
        print(json.dumps({"stopped": stop.signum, "seen": reader.seen}), flush=True)
        return
    whole = jax.jit(lambda t: t, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(state)
    leaves = [np.asarray(a.addressable_data(0)).ravel() for a in jax.tree.leaves(whole)]
    parameters = np.concatenate([leaf.astype(np.float64) for leaf in leaves])
    if index == 0:
        np.save(options.folder / "final.npy", parameters)
    print(json.dumps({"seen": reader.seen}), flush=True)


if __name__ == "__main__":
    main()
