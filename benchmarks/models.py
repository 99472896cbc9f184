"""`python benchmarks/models.py`: ours beside PyTorch, side by side in one run.

Each side is a process that stays alive and works only when asked, so that neither disturbs the
other. Per case: build, warm up, then A B A B ... with the same shapes, batch, float32 and threads;
the figure is the median of each and of the ratios of neighbours. Results also go to
benchmarks/results/models.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DIT = dict(
    model="dit", classes=10, batch=128, ours=dict(patch_size=2, depth=6, width=192, num_heads=6)
)
UNET = dict(
    model="unet", shape=[1, 32, 32], classes=10, batch=32,
    ours=dict(channels=[32, 64, 128], blocks=1, groups=8, attention_levels=[False, False, True]),
    theirs=dict(
        block_out_channels=[32, 64, 128], layers_per_block=1, norm_num_groups=8,
        attention_head_dim=None,
        down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    ),
)  # fmt: skip
S_2 = DIT | dict(
    shape=[4, 32, 32], batch=4, ours=dict(patch_size=2, depth=12, width=384, num_heads=6)
)
LATENT, PIXEL = DIT | dict(shape=[4, 8, 8]), DIT | dict(shape=[4, 14, 14])
AUTOENCODER = dict(shape=[1, 32, 32], batch=32, channels=[32, 64], patch_size=2)
TINY_SD = dict(
    family="Stable Diffusion", latent=32, steps=20, guidance=7.5, tokens=77, width=128,
    network=dict(
        block_out_channels=[64, 128], layers_per_block=1, attention_head_dim=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
)  # fmt: skip
TINY_SD3 = dict(
    family="Stable Diffusion 3", latent=32, steps=20, guidance=7.0, tokens=154, width=128,
    pooled=64,
    network=dict(
        num_layers=6, num_attention_heads=4, attention_head_dim=64, caption_projection_dim=256,
        patch_size=2, pos_embed_max_size=32, qk_norm="rms_norm",
    ),
)  # fmt: skip
# name, kind, case, the peers, the goal of ours against the faster peer
CASES = [
    ("DiT 6 x 192, 16 tokens, batch 128: forward", "forward", LATENT, "diffusers torch", None),
    ("DiT 6 x 192, 16 tokens, batch 128: training", "train", LATENT, "diffusers torch", 1.2),
    ("DiT 6 x 192, 49 tokens, batch 128: forward", "forward", PIXEL, "diffusers torch", None),
    ("DiT 6 x 192, 49 tokens, batch 128: training", "train", PIXEL, "diffusers torch", 1.2),
    ("DiT-S/2, 256 tokens, batch 4: forward", "forward", S_2, "diffusers torch", None),
    ("DiT-S/2, 256 tokens, batch 4: training", "train", S_2, "diffusers torch", 1.2),
    (
        "DiT 6 x 192, 16 tokens: 16 images, 50 DDIM steps, guidance", "sample",
        LATENT | dict(batch=16, steps=50), "diffusers torch", 1.4,
    ),
    ("MNIST autoencoder and discriminator: training", "autoencoder", AUTOENCODER, "diffusers", 1.0),
    ("U-Net 32, 64, 128 at 32 x 32, batch 32: forward", "forward", UNET, "diffusers", None),
    ("U-Net 32, 64, 128 at 32 x 32, batch 32: training", "train", UNET, "diffusers", 1.0),
    ("small Stable Diffusion, 20 DDIM steps, guidance", "pipeline", TINY_SD, "diffusers", 1.0),
    ("small SD3, 20 Euler steps, guidance", "pipeline", TINY_SD3, "diffusers", 1.0),
]  # fmt: skip


class Worker:
    """One side in a process of its own."""

    def __init__(self, side, python):
        command = [python, __file__, "--side", side]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("benchmarks/models.py: a worker has died; see above.")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def work(side):
    """Answers questions: `build` a case, `run` it for some seconds, `compile` a depth."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    if side == "ours":
        import ours

        make = lambda kind, case, library: ours.CASES[kind](case)
    else:
        import peers

        make = lambda kind, case, library: peers.CASES[kind](case, library)
    runs = {}
    for line in sys.stdin:
        question = json.loads(line)
        name, answer = question.get("name"), {}
        if question["do"] == "build":
            runs[name] = make(question["kind"], question["case"], question["library"])
            for _ in range(2):
                runs[name]()
        elif question["do"] == "run":
            times = []
            runs[name]()  # what the other side left behind: caches, threads still spinning
            while sum(times) < question["seconds"] or len(times) < 3:
                begin = time.perf_counter()
                runs[name]()
                times.append(time.perf_counter() - begin)
            answer = statistics.median(times)
        elif question["do"] == "drop":
            runs.clear()
        elif question["do"] == "version":
            answer = importlib.metadata.version("jax")
        else:
            answer = ours.compile_seconds(question["depth"])
        print(json.dumps(answer), file=answers, flush=True)


def versions():
    version = importlib.metadata.version
    found = {name: version(name) for name in ("equinox", "torch", "diffusers")}
    jax_version = workers()["ours"].ask(do="version")
    return found | {
        "jax": jax_version,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def measure(name, kind, case, libraries, rounds, seconds):
    """`{side: median seconds}` and the median of the ratios theirs / ours, round by round."""
    sides = {"ours": workers()["ours"]} | {lib: workers()["peers"] for lib in libraries.split()}
    case = case | {"folder": tempfile.mkdtemp()} if kind == "pipeline" else case
    for side, worker in reversed(sides.items()):  # ours reads the pipeline that diffusers saves
        worker.ask(do="build", name=side, kind=kind, case=case, library=side)
    times = {side: [] for side in sides}
    for _ in range(rounds):
        for side, worker in sides.items():
            times[side].append(worker.ask(do="run", name=side, seconds=seconds))
    for worker in sides.values():
        worker.ask(do="drop")
    ratios = {
        side: statistics.median(t / o for t, o in zip(times[side], times["ours"], strict=True))
        for side in libraries.split()
    }
    medians = {side: statistics.median(values) for side, values in times.items()}
    return dict(name=name, kind=kind, case=case, seconds=medians, ratios=ratios)


ALIVE = {}


def workers(ours=sys.executable):
    for side, python in (("ours", ours), ("peers", sys.executable)):
        ALIVE.setdefault(side, None)
        ALIVE[side] = ALIVE[side] or Worker(side, python)
    return ALIVE


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", help="used by the program itself")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--ours", default=sys.executable, help="the Python that runs our side")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compile times")
    options = parser.parse_args()
    if options.side:
        return work(options.side)
    # A compilation cache would hide what compiling costs.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax_version = workers(options.ours)["ours"].ask(do="version")
    print(f"jax {jax_version}\n")
    print("| case | ours | diffusers | torch | ours against the faster | goal |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, kind, case, libraries, goal in CASES:
        if options.only not in name:
            continue
        row = measure(name, kind, case, libraries, options.rounds, options.seconds)
        row |= dict(goal=goal, ratio=min(row["ratios"].values()))
        rows.append(row)
        show = lambda side, row=row: (
            f"{1e3 * row['seconds'][side]:.0f} ms" if side in row["seconds"] else ""
        )
        wanted = f"{goal}" if goal else ""
        print(
            f"| {name} | {show('ours')} | {show('diffusers')} | {show('torch')} "
            f"| {row['ratio']:.2f} | {wanted} |",
            flush=True,
        )
    compiled = {}
    if not options.no_compile:
        compiled = {d: workers()["ours"].ask(do="compile", depth=d) for d in (12, 28)}
        for depth, seconds in compiled.items():
            print(
                f"| compiling DiT-XL/2's training step, {depth} blocks | {seconds:.1f} s | | | | |"
            )
    for worker in filter(None, ALIVE.values()):
        worker.close()
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        found = dict(versions=versions(), rows=rows, compile_seconds=compiled)
        (RESULTS / "models.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
