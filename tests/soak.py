"""`python tests/soak.py --kills 20 --faults 10`: kills runs, fills their disk, compares bytes.

One run of all stages on images that it makes is left alone; others are killed with SIGKILL, at
random times, inside a checkpoint's write and inside the latent cache's, and started again until
they are through. All must end with the same arrays in every stage's last checkpoint, the same
autoencoder, cache and samples, to the byte.

Others write to a disk that is full, or fails once, after a random number of bytes (`fault_io.c`,
which needs Linux and a C compiler). Each ends as if nothing had been, or with one message and exit
code 2; started again on a sound disk it must end with the same bytes.
"""

import argparse
import errno
import hashlib
import os
import random
import shutil
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


def start(run, **environment):
    command = [sys.executable, "-m", "experiments.train", "train", "--preset", "smoke"]
    return subprocess.Popen(
        [*command, *SMALL, "--run-dir", str(run)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
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


def build_faults(folder):
    """The library of the faulty disk; None where it cannot be built."""
    compiler, library = shutil.which("cc"), folder / "fault_io.so"
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_name("fault_io.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def run_on_faulty_disk(run, library, rng, written):
    """Runs until it ends, and says how; exits unless it ends well or with one message and 2."""
    full = rng.random() < 0.5
    number, after = (errno.ENOSPC if full else errno.EIO), int(rng.uniform(0, written))
    report = run.with_suffix(".report")
    process = start(
        run, LD_PRELOAD=str(library), FAULT_DIR=str(run), FAULT_ERRNO=str(number),
        FAULT_BYTES=str(after), FAULT_TIMES=str(10**9 if full else 1), FAULT_REPORT=str(report),
    )  # fmt: skip
    output, _ = process.communicate()
    what = f"disk {'full' if full else 'failed once'} after {after} bytes: {process.returncode}"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    right = (process.returncode == 0 and not errors) or (process.returncode == 2 and errors)
    if not right or len(errors) > 1 or "Traceback" in output:
        sys.exit(f"{what}:\n{output[-4000:]}")
    return f"{what} {errors[0][:100] if errors else ''}"


def soak_faults(base, expected, count, rng):
    library = build_faults(base)
    if library is None:
        print("no faults: they need Linux and a C compiler")
        return
    report = base / "written"
    faults = {"LD_PRELOAD": str(library), "FAULT_REPORT": str(report)}
    finish(start(base / "counted", **faults, FAULT_DIR=str(base / "counted")))
    written = int(report.read_text().split()[0]) if report.exists() else 0
    if not written:
        sys.exit("no write was seen: the library of the faulty disk was not heard")
    print(f"a run writes {written} bytes", flush=True)
    for k in range(count):
        run = base / f"faulty-{k}"
        print(f"fault {k + 1}: {run_on_faulty_disk(run, library, rng, written)}", flush=True)
        finish(start(run))
        compare(results(run), expected, f"after fault {k + 1} the run")


def compare(found, expected, which):
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong or found.keys() != expected.keys():
        sys.exit(f"{which} ended otherwise: {', '.join(wrong) or 'other files'}")
    print(f"{which}: the same bytes", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=0)
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
            compare(results(run), expected, f"run {runs}")
        if options.faults:
            soak_faults(base, expected, options.faults, rng)


if __name__ == "__main__":
    main()
