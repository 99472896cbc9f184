"""`python tests/soak.py --kills 20`: kills a training run at random moments and compares bytes.

One run of all stages on images that it makes is left alone; others are killed with SIGKILL, at
random times, inside a checkpoint's write and inside the latent cache's, and started again until
they are through. All must end with the same arrays in every stage's last checkpoint, the same
autoencoder, cache and samples, to the byte.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SMALL = """--size 16 16 --checkpoint-every 15 --reference 40 --classifier.steps 60
    --classifier.batch-size 16 --classifier.channels 8 --classifier.features 16
    --autoencoder.steps 90 --autoencoder.batch-size 8 --autoencoder.gan-start 45
    --autoencoder.channels 8 8 --autoencoder.groups 4 --autoencoder.discriminator-channels 4
    --autoencoder.discriminator-layers 1 --latents.batch-size 10 --latents.images-per-shard 40
    --latents.statistics 64 --diffusion.steps 240 --diffusion.batch-size 16 --diffusion.warmup 10
    --diffusion.posthoc 0.1 --diffusion.snapshot-every 60 --dit.depth 2 --dit.width 32
    --dit.num-heads 2 --samples 24 --sampling.steps 3 --sampling-batch 8
    --eval-every 100 --eval-samples 10""".split()
STAGES = ("classifier", "autoencoder", "diffusion")


def start(run):
    command = [sys.executable, "-m", "experiments.train", "train", "--preset", "smoke"]
    return subprocess.Popen(
        [*command, *SMALL, "--run-dir", str(run)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}:\n{output[-3000:]}")


def writing_checkpoint(run):
    return [entry for stage in STAGES for entry in (run / "checkpoints" / stage).glob("*-tmp*")]


def writing_latents(run):
    return list((run / "latents").glob(".latents*"))


def wait(process, run, kind, rng):
    """Until the moment to kill has come, or the process has ended; says what moment it was."""
    seconds, sightings = rng.uniform(2, 25), rng.randint(1, 4)
    begin, seen = time.monotonic(), set()
    while process.poll() is None:
        if kind == "latents" and writing_latents(run):
            time.sleep(rng.uniform(0, 0.2))
            return "while a shard of latents was written"
        if kind == "checkpoint":
            seen |= {str(entry) for entry in writing_checkpoint(run)}
            if len(seen) >= sightings:
                time.sleep(rng.uniform(0, 0.02))
                return "while a checkpoint was written"
        if time.monotonic() - begin > (seconds if kind == "time" else 60):
            return "at a random moment"
        time.sleep(0.002)
    return None


def results(run):
    """What must not depend on having been killed."""
    found = {}
    for stage in STAGES:
        steps = [int(p.name) for p in (run / "checkpoints" / stage).iterdir() if p.name.isdigit()]
        folder = run / "checkpoints" / stage / str(max(steps))
        found[f"{stage} at step {max(steps)}"] = arrays(folder)
    for folder in (run / "snapshots" / "diffusion").iterdir():
        found[f"snapshot {folder.name}"] = arrays(folder)
    with np.load(run / "samples.npz") as samples:
        found["samples"] = {name: digest(samples[name].tobytes()) for name in samples}
    for path in (run / "autoencoder.safetensors", *(run / "latents").iterdir()):
        found[path.name] = digest(path.read_bytes())
    return found


def arrays(checkpoint):
    """The bytes of all files but the description, which has the seconds of the run."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "about.json")
    return {str(p.relative_to(checkpoint)): digest(p.read_bytes()) for p in files}


def digest(content):
    return hashlib.sha256(content).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        begin = time.monotonic()
        finish(start(base / "alone"))
        print(f"left alone: {time.monotonic() - begin:.0f} s", flush=True)
        expected, killed, runs = results(base / "alone"), 0, 0
        while killed < options.kills:
            run, runs = base / f"killed-{runs}", runs + 1
            while True:
                kind = ("checkpoint", "time", "latents")[killed % 3]
                process = start(run)
                moment = wait(process, run, kind, rng) if killed < options.kills else None
                if moment is None:
                    finish(process)
                    break
                process.kill()
                process.communicate()
                killed += 1
                stages = [s for s in STAGES if (run / "checkpoints" / s).exists()]
                where = stages[-1] if stages else "the beginning"
                print(f"kill {killed}: {moment}, in {where}", flush=True)
            found = results(run)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            if wrong or found.keys() != expected.keys():
                sys.exit(f"run {runs} ended otherwise: {', '.join(wrong) or 'other files'}")
            print(f"run {runs}: the same bytes", flush=True)


if __name__ == "__main__":
    main()
