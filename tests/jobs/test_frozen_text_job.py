"""The job with a frozen sentence encoder: captions encoded once, kept, and the same on resuming."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emoji_archives import write_archives
from tiny_sentences import write_folder

from eqxldm.data import open_emoji
from experiments.serve.generators import from_run
from experiments.train import frozen_text

from job_runs import call, said

SMALL = (
    "--size 16 16 --checkpoint-every 4 --classifier.steps 4 --classifier.batch-size 8 "
    "--classifier.channels 4 --classifier.features 8 --diffusion.steps 6 --diffusion.batch-size 8 "
    "--diffusion.warmup 2 --dit.depth 1 --dit.width 16 --dit.num-heads 2 --samples 12 "
    "--sampling.steps 2 --sampling-batch 12 --text.tokens frozen --text.max-length 8"
).split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    archives = write_archives(tmp_path_factory.mktemp("archives"))
    return archives, write_folder(tmp_path_factory.mktemp("encoder"))


def samples(run):
    with np.load(run / "samples.npz") as found:
        return found["arr_0"]


def test_a_run_with_a_frozen_encoder_needs_its_folder_once(folders, tmp_path, capsys):
    images, encoder = folders
    run = tmp_path / "run"
    where = ["--preset", "text", "--space", "pixel", "--run-dir", run]
    train = ["train", *where, "--images", images, *SMALL]
    moved = shutil.copytree(encoder, tmp_path / "moved")
    assert call(*train, "--text-encoder", moved) == 0
    first = samples(run)

    # What is kept: every caption of training and test, and the empty one, by the encoder itself.
    table = frozen_text.open_captions(run / "captions.safetensors")
    sources = [open_emoji(images, split=split) for split in ("train", "test")]
    assert set(table.rows) == {"", *(c for source in sources for c in source.captions)}
    for text, row in [*table.rows.items()][::7]:
        found = table.caption(row)
        kept = frozen_text.load_encoder(encoder)
        rows = kept.tokenizer([text], 8)
        out = kept.network(jnp.asarray(rows.ids[0]), jnp.asarray(rows.mask[0]))
        n = int(rows.mask.sum())
        assert found["mask"].tolist() == [True] * n + [False] * (8 - n)
        np.testing.assert_allclose(found["tokens"][:n], out.tokens[:n], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found["vector"], out.vector, rtol=1e-3, atol=1e-3)

    # Resumed from step 4 without the folder, which is gone: the same pictures.
    shutil.rmtree(moved)
    for name in ("metrics.json", "samples.npz"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "diffusion" / "6")
    written = (run / "captions.safetensors").read_bytes()
    assert call(*train) == 0
    assert "resuming at step 4 of 6" in said(capsys)
    assert np.array_equal(samples(run), first)
    assert (run / "captions.safetensors").read_bytes() == written

    # Prompts of one's own, also such that no image has; served as they are drawn.
    options = ["--prompt", "a fox a fox a fox a fox", "--steps", 2, "--n", 1]
    assert call("sample", *where, *options, "--out", tmp_path / "drawn.png") == 0
    assert (tmp_path / "drawn.png").exists() and "this was cut off: a fox" in said(capsys)
    served = from_run(run)
    cond = served.condition("a red fox", None)
    another = served.condition("noto thing 3", None)
    assert not np.array_equal(cond["tokens"], another["tokens"])
    assert served.takes_text and jax.tree.structure(cond) == jax.tree.structure(served.null)
    assert call("evaluate", *where, "--images", images, "--n", 12, "--steps", 2) == 0

    # Another encoder, another file, no file.
    other = write_folder(tmp_path / "other")
    config = json.loads((other / "1_Pooling" / "config.json").read_text())
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (other / "1_Pooling" / "config.json").write_text(json.dumps(config | flags))
    assert call(*train, "--text-encoder", other) == 2
    assert "is another one than the run's" in said(capsys)
    content = bytearray(written)
    content[-1] ^= 1
    (run / "captions.safetensors").write_bytes(content)
    (run / "metrics.json").unlink()
    assert call(*train) == 2
    assert "captions.safetensors is damaged: not what was written" in said(capsys)


def test_folders_that_are_no_encoders_are_refused_at_the_start(folders, tmp_path, capsys):
    images, encoder = folders
    copy = lambda name: shutil.copytree(encoder, tmp_path / name)
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (copy("mute") / "tokenizer.json").unlink()
    (copy("unknown") / "config.json").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    start = ["train", "--preset", "text", "--space", "pixel", "--images", images, *SMALL]
    for name, message in {
        "absent": "there is no folder",
        "empty": "has no config.json",
        "pickled": "pytorch_model.bin can hold code and is not read",
        "mute": "has no tokenizer.json",
        "unknown": "unknown architecture None",
    }.items():
        given = ["--text-encoder", tmp_path / name, "--run-dir", tmp_path / "run"]
        assert call(*start, *given) == 2, name
        found = said(capsys)
        assert message in found and f"--text-encoder {tmp_path / name}" in found
    assert call(*start, "--run-dir", tmp_path / "run") == 2
    assert "needs --text-encoder FOLDER" in said(capsys)
    long = [*start, "--run-dir", tmp_path / "run", "--text-encoder", encoder]
    assert call(*long, "--text.max-length", 13) == 2
    assert "--text.max-length 13: the encoder of" in (found := said(capsys))
    assert "reads 3 to 12 tokens" in found
    without = ["train", "--preset", "text", "--images", images, "--run-dir", tmp_path / "run"]
    assert call(*without, "--text-encoder", encoder) == 2
    assert "is for --text.tokens frozen" in said(capsys)
    assert not (tmp_path / "run").exists()
