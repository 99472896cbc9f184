"""The job on captions: emoji in three styles, of which some are held out."""

import json

import numpy as np
import pytest
from emoji_archives import BYTE_PAIRS, write_archives
from PIL import Image

from eqxldm import text
from eqxldm.data import open_emoji
from experiments.train import captions

from job_runs import call

SMALL = (
    "--size 16 16 --checkpoint-every 4 --classifier.steps 4 --classifier.batch-size 8 "
    "--classifier.channels 4 --classifier.features 8 --diffusion.steps 6 --diffusion.batch-size 8 "
    "--diffusion.warmup 2 --dit.depth 1 --dit.width 16 --dit.num-heads 2 --samples 12 "
    "--sampling.steps 2 --sampling-batch 12 --text.depth 1 --text.num-heads 2 --text.merges 8 "
    "--text.max-length 12"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("archives"))


def test_the_job_trains_on_captions_and_draws_what_was_held_out(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(captions, "fetch_clip_vocabulary", lambda log: BYTE_PAIRS)
    captions.caption_tokenizer.cache_clear()
    run = tmp_path / "run"
    where = ["--preset", "text", "--space", "pixel", "--run-dir", run]
    assert call("train", *where, "--images", folder, *SMALL) == 0
    test = open_emoji(folder, split="test")
    metrics = json.loads((run / "metrics.json").read_text())["diffusion"]
    parts = ("accuracy", "accuracy_part_1", "accuracy_part_2")
    assert {f"{name}{end}" for name in parts for end in ("", "_known")} <= metrics.keys()
    with np.load(run / "samples.npz") as samples:
        assert test.captions and set(samples["texts"].tolist()) <= set(test.captions)
        for words, label in zip(samples["texts"].tolist(), samples["arr_1"], strict=True):
            assert test.labels is not None
            assert test.labels[test.captions.index(words)] == label
    capsys.readouterr()
    pictures = []
    for prompt in ("noto thing 3", "fluent thing 3", "noto thing 3 and much more of it"):
        out = tmp_path / "drawn.png"
        options = ["--steps", 2, "--n", 1, "--guidance", 3, "--out", out]
        assert call("sample", *where, "--prompt", prompt, *options) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert not np.array_equal(pictures[0], pictures[1])
    said = capsys.readouterr().out
    assert said.count("was cut off") == 1 and "of it" in said
    monkeypatch.setattr(text.clip, "library", _absent)
    captions.caption_tokenizer.cache_clear()
    assert call("sample", *where, "--prompt", "noto thing 3") == 2
    assert "captions in CLIP's tokens: no library" in capsys.readouterr().err
    captions.caption_tokenizer.cache_clear()


def _absent(name):
    raise text.TokenizerError("no library")
