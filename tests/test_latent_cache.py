"""The latent cache: what it holds, what it refuses, and that a killed writer loses nothing."""

import errno
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from eqxldm.data import (
    DataError,
    ImageRecord,
    flip_mask,
    latent_batches,
    latent_header,
    open_latents,
    write_latents,
)

N, SIZE, SHAPE, BATCH = 23, 8, (2, 4, 4), 4


class Pictures:
    """Record `i` is random pixels of seed `i`, with a header only where it is damaged."""

    class_names, has_captions = ("even", "odd"), False

    def __init__(self, n=N, damaged=()):
        self.n, self.damaged = n, set(damaged)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        file = io.BytesIO()
        Image.fromarray(pixels(i)).save(file, "PNG")
        content = file.getvalue()[:40] if i in self.damaged else file.getvalue()
        return ImageRecord(content, f"{i}.png", label=i % 2)

    def digest(self):
        return f"{self.n} pictures"


class Repainted(Pictures):
    """The same names and sizes; image 3 has the pixels of another."""

    def __getitem__(self, i):
        return super().__getitem__(i)._replace(image=super().__getitem__(i + (i == 3)).image)


def pixels(i):
    return np.random.default_rng(int(i)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def moments(images):
    """Not symmetric in the width, so that a mirror image differs."""
    x = images.astype(np.float32).reshape(len(images), 4, 2, 4, 2, 3).mean((2, 4)) / 127.5 - 1
    x = np.moveaxis(x, -1, 1)
    return x[:, :2] * np.arange(1, 5, dtype=np.float32), x[:, 1:] - 3


def header(source, **changes):
    options = dict(size=SIZE, shape=SHAPE, autoencoder="abc", shift=[0.1, 0.2], scale=[2.0, 3.0])
    return latent_header(source, **{**options, "images_per_shard": 5, **changes})


def write(folder, source=None, encode=moments, changes=None, **options):
    source = source or Pictures()
    made_from = header(source, **(changes or {}))
    write_latents(
        source, encode, folder, made_from, **{"batch_size": BATCH, "threads": 2, **options}
    )
    return made_from


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check(latents, indices, flipped, dtype=np.float16):
    batch = latents.read(np.asarray(indices), np.asarray(flipped))
    expected = np.stack(
        [
            pixels(i)[:, ::-1] if f else pixels(i)
            for i, f in zip(batch["index"], flipped, strict=True)
        ]
    )
    for name, values in zip(("mean", "logvar"), moments(expected), strict=True):
        assert batch[name].dtype == dtype and batch[name].flags.c_contiguous
        np.testing.assert_array_equal(batch[name], values.astype(dtype))
    np.testing.assert_array_equal(batch["cond"], batch["index"] % 2)
    return batch["index"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_orientations_come_back(tmp_path, dtype):
    made_from = write(tmp_path, changes={"dtype": dtype})
    latents = open_latents(tmp_path, made_from)
    assert len(latents) == N and latents.ids() == [f"{i}.png" for i in range(N)]
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    order = np.random.default_rng(0).permutation(N)
    for flipped in (order < 0, order >= 0, order % 3 == 0):
        np.testing.assert_array_equal(check(latents, order, flipped, kind), order)
    copy = pickle.loads(pickle.dumps(latents))
    check(copy, [22, 3, 3], [True, False, True], kind)
    assert json.loads((tmp_path / "skipped.json").read_text()) == {}
    names = [f"latents-0000{k}-of-00005.arrayrecord" for k in range(5)]
    assert sorted(files(tmp_path)) == ["header.json", *names, "skipped.json"]


def test_the_encoder_sees_one_shape_and_every_image_twice():
    """A jitted encoder compiles once, though shards don't divide into batches."""
    shapes, seen = [], []

    def encode(images):
        shapes.append((images.shape, images.dtype))
        seen.append(images[:, :, ::-1] if len(seen) % 2 else images)
        return moments(images)

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), encode=encode)
    assert set(shapes) == {((BATCH, SIZE, SIZE, 3), np.dtype("uint8"))}
    assert len(shapes) == 2 * (4 * 2 + 1)  # shards of 5, 5, 5, 5 and 3 images, batches of 4
    for image, mirrored in zip(seen[::2], seen[1::2], strict=True):
        np.testing.assert_array_equal(image, mirrored)


def test_jax_arrays_are_taken(tmp_path):
    encode = jax.jit(lambda images: (jnp.ones((BATCH, *SHAPE)), jnp.zeros((BATCH, *SHAPE))))
    write(tmp_path, encode=encode)
    assert open_latents(tmp_path).read(np.arange(3), np.zeros(3, bool))["mean"].min() == 1


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    damaged = {0, 6, 7, 20, 21, 22}  # the last shard has none
    write(tmp_path, Pictures(damaged=damaged))
    latents = open_latents(tmp_path)
    kept = [i for i in range(N) if i not in damaged]
    assert latents.ids() == [f"{i}.png" for i in kept]
    found = check(latents, np.arange(len(kept)), np.arange(len(kept)) % 2 == 1)
    assert found.tolist() == kept
    skipped = json.loads((tmp_path / "skipped.json").read_text())
    assert skipped.keys() == {f"{i}.png" for i in damaged}
    assert all("cannot be decoded" in why for why in skipped.values())
    with pytest.raises(DataError, match=r"^6\.png: cannot be decoded"):
        write(tmp_path / "strict", Pictures(damaged={6}), strict=True)
    assert sorted(files(tmp_path / "strict")) == [
        "header.json",
        "latents-00000-of-00005.arrayrecord",
    ]


class OddNames(Pictures):
    """Names with bytes that are no UTF-8, as `os.fsdecode` gives them."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        return record._replace(id=f"c\udce9t/\udcff{record.id}")


def test_unreadable_images_may_have_names_that_are_not_utf8(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_latent_cache as t; "
        f"t.write({str(tmp_path)!r}, t.OddNames(damaged=[3]))"
    )
    strict = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": "."}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | strict, cwd=root)
    ((name, reason),) = open_latents(tmp_path).skipped().items()
    assert name == "c\udce9t/\udcff3.png" and reason.startswith(name)
    assert json.loads((tmp_path / "skipped.json").read_bytes()) == {name: reason}


def test_a_cache_of_an_earlier_version_is_read_and_gone_on_with(tmp_path):
    """Its header says nothing of the images' content."""
    made_from = header(Pictures())
    older = {name: value for name, value in made_from.items() if name != "content"}
    write_latents(Pictures(), moments, tmp_path, older, batch_size=BATCH, threads=2)
    before = files(tmp_path)
    assert len(open_latents(tmp_path, made_from)) == N
    (tmp_path / "latents-00001-of-00005.arrayrecord").unlink()
    assert write(tmp_path) == made_from
    assert files(tmp_path) == before


def test_another_cache_is_refused_with_every_difference(tmp_path):
    made_from = write(tmp_path)
    other = header(Pictures(24), scale=[2.0, 4.0], autoencoder="def", size=16)
    for attempt in (
        lambda: open_latents(tmp_path, other),
        lambda: write(
            tmp_path, Pictures(24), changes=dict(scale=[2.0, 4.0], autoencoder="def", size=16)
        ),
    ):
        with pytest.raises(DataError) as refusal:
            attempt()
        lines = str(refusal.value).splitlines()
        assert lines[1:-1] == [
            '  autoencoder: it has "abc", expected "def"',
            "  scale: it has [2.0, 3.0], expected [2.0, 4.0]",
            "  size: it has [8, 8], expected [16, 16]",
            '  source: it has "23 pictures", expected "24 pictures"',
            f'  content: it has "{made_from["content"]}", expected "{other["content"]}"',
            "  images: it has 23, expected 24",
        ]
    open_latents(tmp_path, {"autoencoder": "abc", "scale": (2.0, 3.0)})
    with pytest.raises(DataError, match=r"made otherwise:\n  content: it has") as refusal:
        open_latents(tmp_path, header(Repainted()))
    assert len(str(refusal.value).splitlines()) == 3
    with pytest.raises(DataError, match=r'crop: it has "ADM .*expected "other"'):
        open_latents(tmp_path, {"crop": "other"})
    (tmp_path / "header.json").write_text(json.dumps({**made_from, "format": 0}))
    with pytest.raises(DataError, match="format: it has 0, expected 2"):
        open_latents(tmp_path)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_latents(tmp_path)
    with pytest.raises(DataError, match=r"no header\.json"):
        open_latents(tmp_path / "nowhere")


def test_missing_and_damaged_shards_are_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "latents-00003-of-00005.arrayrecord"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="1 of 5 shards are missing, the first latents-00003"):
        open_latents(tmp_path)
    shard.write_bytes(content[:70_000])
    with pytest.raises(DataError, match=r"latents-00003.*damaged"):
        open_latents(tmp_path)
    at = content.index(moments(pixels(17)[None])[0].astype(np.float16).tobytes())
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"latents-00003.*damaged"):
        open_latents(tmp_path).read(np.array([2, 17]), np.zeros(2, bool))


def test_what_the_encoder_gives_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(4, 2, 4\), the header says \(4, 2, 4, 4\)"):
        write(tmp_path, encode=lambda x: tuple(m[..., 0] for m in moments(x)))
    large = lambda x: (moments(x)[0] * 1e6, moments(x)[1])
    with pytest.raises(DataError, match=r"^0\.png: its mean is not finite in float16"):
        write(tmp_path, encode=large)
    assert sorted(files(tmp_path)) == ["header.json"]
    write(tmp_path / "b", encode=large, changes={"dtype": "bfloat16"})
    for changes in ({"dtype": "float32"}, {"scale": [1.0]}, {"images_per_shard": 0}):
        with pytest.raises(ValueError, match="latent_header"):
            header(Pictures(), **changes)
    with pytest.raises(ValueError, match="for 23 images, got 24"):
        write_latents(Pictures(24), moments, tmp_path, header(Pictures()), batch_size=BATCH)


def test_finished_shards_are_not_written_again_and_processes_share_them(tmp_path):
    write(tmp_path / "one")
    together = tmp_path / "together"
    write(together, process_index=1, process_count=3)
    stamps = {path.name: path.stat().st_mtime_ns for path in together.glob("latents-*")}
    assert [name[8:13] for name in sorted(stamps)] == ["00001", "00004"]
    calls = []
    for p in (0, 2, 1):
        write(together, process_index=p, process_count=3, progress=lambda *a: calls.append(a))
    assert files(together) == files(tmp_path / "one")
    assert all((together / name).stat().st_mtime_ns == stamps[name] for name in stamps)
    assert calls[-1] == (8, 8) and (10, 10) in calls and (5, 5) in calls


# Imports once, then forks a writer for every kill.
KILLING = """
import os, random, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import test_latent_cache as t
from pathlib import Path
folder, rng = Path(sys.argv[3]), random.Random(0)
def slow(images):
    time.sleep(0.002)
    return t.moments(images)
for kills in range(1000):
    writer = os.fork()
    if not writer:
        t.write(folder, t.Pictures(120, damaged={11, 60}), slow)
        os._exit(0)
    time.sleep(rng.uniform(0.01, 0.05 + 0.02 * kills))  # so that it ends on any machine
    os.kill(writer, signal.SIGKILL)
    if not os.waitpid(writer, 0)[1]:
        break
    print(len(list(folder.glob("latents-*"))), len(list(folder.glob(".latents-*"))), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """SIGKILL after random times, again and again, until a writer ends by itself."""
    source = Pictures(120, damaged={11, 60})
    write(tmp_path / "whole", source)
    tests = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", KILLING, tests, tests.parent, tmp_path / "k"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    after_kills = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(after_kills) >= 5
    assert any(shards for shards, _ in after_kills) and any(half for _, half in after_kills)
    assert files(tmp_path / "k") == files(tmp_path / "whole")


def test_a_full_disk_is_the_systems_error_and_the_writer_goes_on(tmp_path):
    """What the writer in C++ raises is a RuntimeError; it is to be told from an error of ours."""
    write(tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (300, 2000, 66_000):  # the header, the first block, the end of a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(OSError, match=r"header\.json|latents-0.*arrayrecord") as error:
                write(tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.errno == errno.EFBIG
        assert (most == 300) == error.value.filename.endswith("header.json")
        assert not list((tmp_path / "full").glob("*.arrayrecord"))
    write(tmp_path / "full")
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_batches_draw_orientations_and_span_epochs(tmp_path):
    write(tmp_path, Pictures(damaged={4}))
    latents = open_latents(tmp_path)
    n = len(latents)
    batches = latent_batches(latents, 8, seed=5)
    found = [next(batches) for _ in range(3 * n // 8 + 1)]
    state = batches.get_state()
    index = np.concatenate([b["index"] for b in found])
    position = index - (index > 4)  # in the cache
    epochs = np.arange(len(index)) // n
    flipped = flip_mask(5, epochs, position)
    expected = np.stack(
        [pixels(i)[:, ::-1] if f else pixels(i) for i, f in zip(index, flipped, strict=True)]
    )
    mean = np.concatenate([b["mean"] for b in found])
    np.testing.assert_array_equal(mean, moments(expected)[0].astype(np.float16))
    assert sorted(position[:n]) == sorted(position[n : 2 * n]) == list(range(n))
    following = next(batches)
    batches.close()
    parts = [latent_batches(latents, 8, seed=5, rows=rows) for rows in (range(4), range(4, 8))]
    for part in parts:
        part.set_state(state)
    both = [next(part) for part in parts]
    for name in following:
        np.testing.assert_array_equal(np.concatenate([b[name] for b in both]), following[name])
    for part in parts:
        part.close()


def test_shards_of_another_cache_or_exchanged_are_refused(tmp_path):
    """Every shard says of which cache it is which one, whatever lies beside it."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    made_from = write(ours)
    write(theirs, changes={"autoencoder": "def"})
    first, second = (f"latents-0000{k}-of-00005.arrayrecord" for k in (1, 2))
    kept = files(ours)

    def refused(match):
        for attempt in (lambda: open_latents(ours, made_from), lambda: write(ours)):
            with pytest.raises(DataError, match=match):
                attempt()

    (ours / first).write_bytes((theirs / first).read_bytes())
    refused(f"{first}: is no shard of the cache of header.json")
    (ours / first).write_bytes(kept[second])
    refused(f"{first}: is shard 2, and named as shard 1")
    (ours / first).unlink()
    write(ours)  # which writes it again
    assert files(ours) == kept


def test_without_its_header_a_cache_is_taken_up_or_refused(tmp_path):
    write(tmp_path)
    kept = files(tmp_path)
    (tmp_path / "header.json").unlink()
    with pytest.raises(DataError, match="is no shard of the cache"):
        write(tmp_path, changes={"autoencoder": "def"})
    with pytest.raises(DataError, match=r"latents-00000-of-00005.* is of another cache"):
        write(tmp_path, changes={"images_per_shard": 6})
    assert not (tmp_path / "header.json").exists()
    write(tmp_path)
    assert files(tmp_path) == kept


def test_a_cache_without_mirror_images_encodes_each_image_once(tmp_path):
    seen = []

    def counting(images):
        seen.append(len(images))
        return moments(images)

    write(tmp_path / "one", encode=counting, changes={"mirrored": False})
    write(tmp_path / "two")
    one, two = open_latents(tmp_path / "one"), open_latents(tmp_path / "two")
    assert len(one) == len(two) == N and len(seen) == 2 + 2 + 2 + 2 + 1  # batches of a shard
    indices, plain = np.arange(N), np.zeros(N, bool)
    for name, values in one.read(indices, plain).items():
        np.testing.assert_array_equal(values, two.read(indices, plain)[name])
    with pytest.raises(ValueError, match="has no mirror images"):
        one.read(indices, ~plain)
