"""`make bench-data`: examples a second from the latent cache, and of decoding beside Pillow alone.

Latents of 4 x 32 x 32 in float16 come from the page cache, in shuffled batches of 256 out of 256
shards, as many as ImageNet has, one orientation each. JPEG files of ImageNet's usual size,
500 x 375, are decoded and cropped to 256 by the pipeline, and by Pillow in a plain loop that does
the same, taking turns, one thread each. The results go to benchmarks/results/data.json, with the
machine's load average, because the first goal is one of time: it holds for cores that are free. The
processor's time a latent hardly depends on the load.
"""

import io
import json
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from eqxldm.data import (
    ImageRecord,
    image_batches,
    latent_batches,
    latent_header,
    open_latents,
    write_latents,
)

GOALS = {"latents_per_second": 20_000, "decoding_of_pillow": 0.9}
SHAPE, LATENTS, SHARDS, BATCH = (4, 32, 32), 16_384, 256, 256
IMAGES, SIZE, ROUNDS = 64, 256, 9


class Pictures:
    """`length` records of a few JPEG files, smooth with some noise as photographs are."""

    class_names, has_captions = ("one", "other"), False

    def __init__(self, length: int, width: int, height: int, files: int):
        rng = np.random.default_rng(0)
        self.length, self.files = length, []
        for _ in range(files):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            noisy = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(noisy).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index) -> ImageRecord:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return ImageRecord(self.files[index % len(self.files)], f"{index}.jpg", label=index % 2)

    def digest(self) -> str:
        return "made here"


def with_pillow(content: bytes) -> np.ndarray:
    """The same pixels by Pillow alone."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    while min(image.size) >= 2 * SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    array = np.array(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - SIZE) // 2, (array.shape[1] - SIZE) // 2
    return array[top : top + SIZE, left : left + SIZE]


def read_latents(folder: str) -> tuple[float, float]:
    """Latents a second, the median of some epochs, and microseconds of the processor a latent."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((BATCH, *SHAPE), np.float32)
    source = Pictures(LATENTS, 8, 8, 4)
    header = latent_header(
        source,
        size=8,
        shape=SHAPE,
        autoencoder="none",
        shift=[0.0] * 4,
        scale=[1.0] * 4,
        images_per_shard=LATENTS // SHARDS,
    )
    write_latents(source, lambda images: (moments, moments), folder, header, batch_size=BATCH)
    batches = latent_batches(open_latents(folder, header), BATCH, seed=0)
    rates = []
    for _ in islice(batches, LATENTS // BATCH):  # into the page cache, if it is not there
        pass
    processor = time.process_time()
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in islice(batches, LATENTS // BATCH):
            pass
        rates.append(LATENTS / (time.perf_counter() - begin))
    batches.close()
    processor = time.process_time() - processor
    return statistics.median(rates), 1e6 * processor / ROUNDS / LATENTS


def decoding() -> tuple[float, float]:
    """Images a second, of the pipeline and of Pillow alone: medians."""
    source = Pictures(4096, 500, 375, IMAGES)
    batches = image_batches(source, IMAGES, size=SIZE, seed=0, flip=False, threads=0)
    found = next(batches)
    for image, index in zip(found["image"], found["index"], strict=True):
        assert np.array_equal(image, with_pillow(source[index].image))
    ours, pillow = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        found = next(batches)
        ours.append(IMAGES / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for index in found["index"]:
            with_pillow(source[index].image)
        pillow.append(IMAGES / (time.perf_counter() - begin))
    return statistics.median(ours), statistics.median(pillow)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        latents, microseconds = read_latents(folder)
    ours, pillow = decoding()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, one process; load average {load:.1f}, this process included")
    print(f"{'':<28}{'measured':>12}{'goal':>12}")
    print(f"{'latents a second':<28}{latents:>12,.0f}{GOALS['latents_per_second']:>12,}")
    print(f"{'processor us a latent':<28}{microseconds:>12.1f}")
    print(f"{'images decoded a second':<28}{ours:>12.1f}{'':>12}")
    print(f"{'by Pillow alone':<28}{pillow:>12.1f}{'':>12}")
    print(f"{'ratio':<28}{ours / pillow:>12.2f}{GOALS['decoding_of_pillow']:>12}")
    results = {
        "cores": os.cpu_count(),
        "load_average": round(load, 1),
        "latents_per_second": round(latents),
        "processor_microseconds_per_latent": round(microseconds, 1),
        "images_per_second": round(ours, 1),
        "pillow_images_per_second": round(pillow, 1),
        "decoding_of_pillow": round(ours / pillow, 3),
        "goals": GOALS,
    }
    path = Path(__file__).parent / "results" / "data.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if any(results[name] < goal for name, goal in GOALS.items()):
        raise SystemExit("Below a goal.")


if __name__ == "__main__":
    main()
