"""The job over clips: it trains, measures and draws; what cannot be is one message."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import eqxldm as ex
from eqxldm.data import center_crop, loader, read_clips
from eqxldm.data.clips import Wanted
from experiments.train.autoencoder import Encoder
from experiments.train.run import RunFolder
from experiments.train.terminal import SIGNALS, UserError, run_main
from experiments.video.__main__ import main
from experiments.video.commands import check_network, load_trained, sample
from experiments.video.config import Config, Sample, Train, check_clips, preset
from experiments.video.data import (
    Part,
    open_clips_of,
    say_long_captions,
    some_clips,
)
from experiments.video.drawing import Drawing
from experiments.video.images import ReadBoth, open_captioned
from experiments.video.outcome import summary

from job_runs import interrupt

RNG = np.random.default_rng(0)
TINY = """--frames 5 --size 32 32 --count 10 --test 10 --classifier.steps 2
    --classifier.batch-size 4
    --classifier.channels 2 --classifier.features 4 --autoencoder.steps 2 --autoencoder.batch-size 4
    --autoencoder.crop 16 --autoencoder.crop-frames 5 --autoencoder.channels 4 4 4
    --autoencoder.latent-channels 2 --diffusion.steps 2 --diffusion.batch-size 4
    --diffusion.image-steps 2 --diffusion.image-batch-size 4
    --diffusion.depth 1 --diffusion.width 24 --diffusion.num-heads 2 --diffusion.warmup 1
    --diffusion.tokens bytes
    --sampling.solver euler --sampling.steps 2 --samples 10 --sampling-batch 10""".split()


def call(args):
    handlers = [signal.getsignal(s) for s in SIGNALS]
    try:
        return run_main(lambda: main(args))
    finally:
        for signum, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(signum, handler)


def idx(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    for split in ("train", "t10k"):
        images = RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)))
    return folder


@pytest.fixture(scope="module")
def run(mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "video"
    main(["train", "--mnist", str(mnist), "--run-dir", str(folder), *TINY])
    return folder


def test_a_run_leaves_numbers_animations_and_filmstrips(run, mnist, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["autoencoder"]["psnr_by_frame"]) == 5
    assert {"frechet_distance", "frechet_distance_real", "tracked"} <= metrics["diffusion"].keys()
    assert len(metrics["prediction"]["after_1"]["psnr_by_frame"]) == 4
    assert metrics["longer"]["frames"] == 9 and "seen" in metrics["longer"]["tracked"]
    assert "autoencoder: PSNR" in summary(metrics)
    with Image.open(run / "samples.png") as animation:
        animation.seek(4)
        assert animation.size[0] == 2 * (4 * 34 + 2)
    for name in (
        "samples-strip.png",
        "real-strip.png",
        "after-1-strip.png",
        "longer-strip.png",
        "denoiser.safetensors",
    ):
        assert (run / name).exists()
    # All is there: the same command trains nothing.
    main(["train", "--mnist", str(mnist), "--run-dir", str(run), *TINY])
    assert "resuming" not in capsys.readouterr().out
    with pytest.raises(UserError, match="--seed: the folder has 0, now 1"):
        main(["train", "--mnist", str(mnist), "--run-dir", str(run), *TINY, "--seed", "1"])


def test_a_finished_run_goes_on_from_a_picture_and_makes_long_clips(run, tmp_path, capsys):
    Image.fromarray(RNG.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "b.png"
    options = ["--run-dir", str(run), "--sampling.steps", "1", "--sampling.guidance", "2"]
    options = [o.replace("sampling.", "") for o in options]
    long = ["--first", str(tmp_path / "a.png"), "--frames", "8", "--overlap", "1", "--n", "2"]
    main(["sample", *options, *long, "--prompt", "a 3 moving upwards", "--out", str(out)])
    assert "this was cut off: rds\n" in capsys.readouterr().out
    (tmp_path / "b.apng").write_bytes(out.read_bytes())
    (clip,) = read_clips(tmp_path / "b.apng", Wanted(8, (64, 136), 1))
    given = read_clips(tmp_path / "b.apng", Wanted(1, (72, 140), 1))[0][0, 4:68:2, 4:68:2, 0]
    assert clip.shape[0] == 8
    with Image.open(tmp_path / "a.png") as picture:
        first = center_crop(np.asarray(picture)[..., None], (32, 32))[..., 0]
    assert np.abs(first.astype(int) - given).mean() < 1  # the given frame stays as it is


def test_stopped_in_each_stage_it_ends_with_the_same_bytes(run, mnist, tmp_path, monkeypatch):
    again = tmp_path / "run"
    ask = lambda: call(["train", "--mnist", str(mnist), "--run-dir", str(again), *TINY])
    moments = {
        "judges": (loader._ReadImages, "__call__", 5),
        "autoencoder": (loader._ReadImages, "__call__", 12),
        "latents": (Encoder, "__call__", 2),
        "pictures": (loader._ReadLatents, "__call__", 2),
        "clips": (loader._ReadLatents, "__call__", 8),
        "samples": (Drawing, "draw", 1),
    }
    for name, moment in moments.items():
        with monkeypatch.context() as patch:
            interrupt(patch, *moment)
            assert ask() == 143, name
        assert not (again / "metrics.json").exists()
    assert ask() == 0
    for name in ("autoencoder.safetensors", "denoiser.safetensors", "samples.png"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    scores = lambda folder: json.loads((folder / "metrics.json").read_text())["diffusion"]
    assert json.dumps(scores(again)) == json.dumps(scores(run))


def test_what_cannot_be_drawn_or_trained_is_said_at_once(run, tmp_path):
    ask = lambda **options: sample(Sample(run_dir=run, **options))
    with pytest.raises(UserError, match=r"--overlap 2: must be 4 k \+ 1"):
        ask(overlap=2)
    with pytest.raises(UserError, match=r"--overlap 5: .* less than the 5 frames of a window"):
        ask(frames=9)
    with pytest.raises(UserError, match=r"an animation ends with \.png"):
        ask(out=tmp_path / "a.txt")
    with pytest.raises(UserError, match="No such file"):
        ask(first=tmp_path / "none.png")
    with pytest.raises(UserError, match=r"--first-frames 3: must be 4 k \+ 1"):
        ask(first=tmp_path / "none.png", first_frames=3)
    with pytest.raises(UserError, match="no run in"):
        sample(Sample(run_dir=tmp_path / "none"))
    train = Train()
    assert "such as 13" in (check_clips(replace(train.clips, frames=16)) or "")
    assert "multiples of 16" in (check_clips(replace(train.clips, size=(24, 64))) or "")
    assert check_clips(preset("--smoke", train).clips) is None
    with pytest.raises(UserError, match="multiple of 6"):
        check_network(replace(train.config, diffusion=replace(train.diffusion, width=64)))
    with pytest.raises(UserError, match="crop must be"):
        check_network(replace(train.config, autoencoder=replace(train.autoencoder, crop=12)))
    for folder in ("d.png", "e-strip.png"):
        (tmp_path / folder).mkdir()
    for name in ("a.png/b.png", "d.png", "e.gif", "x" * 300 + ".gif"):
        path = tmp_path / name
        (tmp_path / "a.png").write_text("")
        with pytest.raises(UserError, match="--out"):
            ask(out=path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="pipe"):
        ask(first=tmp_path / "pipe.png")


def test_what_the_end_would_refuse_is_refused_at_the_start(mnist, tmp_path, capsys):
    """And a folder of clips that are too few is as it was."""
    run = tmp_path / "run"
    ask = lambda *options: call(["train", "--run-dir", str(run), *TINY, *options])
    given = ["--mnist", str(mnist)]
    for options, message in (
        (["--diffusion.patch-size", "1", "3", "3"], "patch"),
        (["--sampling.steps", "100000000"], "--sampling.steps must lie in"),
        (["--mnist", str(tmp_path / "no")], "no"),
    ):
        assert ask(*given, *options) == 2, options
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and not run.exists(), said
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = [Image.new("L", (32, 32), 9 * k) for k in range(5)]
    for i in range(3):
        frames[0].save(clips / f"{i}.gif", save_all=True, append_images=frames[1:])
    assert ask("--videos", str(clips), "--channels", "1") == 2
    assert "3 clips of 5 frames; needed are 20" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_options_that_follow_from_others(monkeypatch):
    """Files have colour, sound goes by the clock; pictures need tokens of their own."""
    seen = []
    monkeypatch.setattr("experiments.video.__main__.train", seen.append)
    for args in (["--videos", "a"], ["--videos=a"], ["--videos=a", "--channels", "1"], []):
        main(["train", *args])
    assert [command.clips.channels for command in seen] == [3, 3, 1, 1]
    clips = Train().clips
    assert clips.wanted(5).fps is None and replace(clips, sound=True).wanted(5).fps == clips.rate
    config = Config()
    assert config.pictures_first
    for other in (
        replace(config, diffusion=replace(config.diffusion, image_steps=0)),
        replace(config, diffusion=replace(config.diffusion, patch_size=(2, 2, 2))),
        replace(config, clips=replace(clips, sound=True)),
        replace(config, clips=replace(clips, frames=1)),
    ):
        assert not other.pictures_first


def test_networks_and_captions_of_a_run_that_are_not_what_was_written(run, tmp_path):
    for name, damage, message in (
        ("denoiser.safetensors", None, "not what was written"),
        ("autoencoder.safetensors", None, "not what was written"),
        ("texts.json", '{"texts": ["a", 5, "b"]}', "more than texts"),
        ("texts.json", "{", "is damaged"), ("config.json", "5", "is damaged"),
    ):  # fmt: skip
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content if damage is None else damage.encode())
        with pytest.raises(UserError, match=message):
            sample(Sample(run_dir=copy))
        shutil.rmtree(copy)


def test_a_run_of_made_clips_is_of_no_division(run, mnist, tmp_path, capsys):
    """That of an earlier version says nothing of it, and is the same run; one over files is not."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["clips"]["test_by"]
    (copy / "config.json").write_text(json.dumps(config))
    main(["train", "--mnist", str(mnist), "--run-dir", str(copy), *TINY])
    assert "is finished" in capsys.readouterr().out
    videos = tmp_path / "videos"
    videos.mkdir()
    frames = [Image.new("L", (32, 32), 9 * k) for k in range(5)]
    frames[0].save(videos / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="--test-by: the folder has clips, now files"):
        main(["train", "--videos", str(videos), "--run-dir", str(copy), *TINY, "--channels", "1"])


def test_a_run_of_an_earlier_version_predicts_what_it_learned(run, tmp_path):
    assert load_trained(run)[0].denoiser.diffusion.prediction is ex.predict_v
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    for name in ("prediction", "tokens", "merges"):
        del config["diffusion"][name]
    (copy / "config.json").write_text(json.dumps(config))
    trained = load_trained(copy)[0]
    assert trained.denoiser.diffusion.prediction is ex.predict_velocity
    assert trained.config.diffusion.tokens == "bytes"


def test_a_folder_of_clips_is_divided_into_those_that_teach_and_those_that_measure(
    tmp_path, capsys
):
    folder = tmp_path / "videos"
    folder.mkdir()
    for k in range(24):
        pictures = [Image.new("RGB", (20, 20), (10 * k, f, 0)) for f in range(5)]
        pictures[0].save(
            folder / f"{k}.webp", save_all=True, append_images=pictures[1:], lossless=True
        )
    clips = replace(Train().clips, frames=5, size=(16, 16), channels=3)
    command = replace(Train(), videos=folder, clips=clips)
    found = open_clips_of(command, RunFolder(tmp_path))
    assert len(found.train) == 14 and len(found.test) == 10 and not found.captioned
    frames, texts = some_clips(found.test, 99, clips)
    assert frames.shape == (10, 5, 16, 16, 3) and set(texts) == {""}
    captions = {f"{k}.webp": "a square" if k % 2 else "a square of 20 pixels" for k in range(24)}
    (folder / "captions.json").write_text(json.dumps(captions))
    config = replace(command, diffusion=replace(command.diffusion, tokens="bytes")).config
    say_long_captions(config, open_clips_of(command, RunFolder(tmp_path / "other")))
    assert re.search(
        r"[1-9] of 10 are longer than .* 16, .* the first: a square of", capsys.readouterr().out
    )
    # Of longer files, none but the one that is cut in two both teaches and measures.
    short = replace(command, clips=replace(clips, frames=1, test=12))
    found = open_clips_of(short, RunFolder(tmp_path / "short"))
    older = replace(short, clips=replace(short.clips, test_by="clips"))
    kept = open_clips_of(older, RunFolder(tmp_path / "short")).test
    expected = np.random.default_rng(0).permutation(120)[:12]  # as versions before drew it
    assert isinstance(kept, Part) and kept.chosen == tuple(sorted(expected.tolist()))
    files = [
        {part[i].id.partition("#")[0] for i in range(len(part))}
        for part in (found.train, found.test)
    ]
    assert len(found.test) == 12 and len(files[1]) == 3 and len(files[0] & files[1]) == 1
    with pytest.raises(UserError, match=r"\d+ clips of 5 frames; needed are 20"):
        for file in sorted(folder.iterdir())[6:]:
            file.unlink()
        open_clips_of(command, RunFolder(tmp_path))


def test_images_are_learned_with_the_clips(tmp_path, capsys, monkeypatch):
    """With captions of their own or of their class; each step has as many as clips."""
    videos, images = tmp_path / "videos", tmp_path / "images"
    videos.mkdir()
    pixels = lambda *size: RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    for k in range(22):
        frames = [Image.fromarray(pixels(32, 32)) for _ in range(5)]
        frames[0].save(videos / f"{k}.webp", save_all=True, append_images=frames[1:])
    captions = {f"{k}.webp": "noise" for k in range(22)}
    (videos / "captions.json").write_text(json.dumps(captions))
    for k in range(6):
        (images / ("a_cat", "dog")[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(40, 50)).save(images / ("a_cat", "dog")[k % 2] / f"{k}.png")
    found = open_captioned(images)
    assert [found[i].caption for i in (0, 5)] == ["a cat", "dog"] and found.has_captions
    run, given = tmp_path / "run", ["--videos", str(videos), "--images", str(images)]
    ask = lambda *more: call(["train", "--run-dir", str(run), *TINY, *given, *more])
    for more, message in (
        (["--diffusion.patch-size", "2", "2", "2", "--frames", "13"], "tokens of its own"),
        (["--diffusion.batch-size", "8"], "a batch of 8 is more than the 6 images"),
    ):
        assert ask(*more) == 2 and message in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt(patch, ReadBoth, "__call__", 2)
        assert ask() == 143
    assert ask() == 0
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == "diffusion"][-1]
    assert last["images"] > 0
    Image.fromarray(pixels(40, 50)).save(images / "dog" / "new.png")
    videos_missing = [*TINY, "--run-dir", str(run), "--images", str(images)]
    assert call(["train", *videos_missing]) == 2
    assert "beside the clips of --videos" in capsys.readouterr().err
    assert ask() == 2 and "the data are not those that it was made of" in capsys.readouterr().err
