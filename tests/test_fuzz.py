"""Readers of images, records, caches, weights and run folders, fed damaged and hostile bytes."""

import gzip
import io
import json
import shutil
import struct
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from eqxldm import pretrained
from eqxldm.checkpoints import Checkpoints
from eqxldm.data import (
    latent_header,
    open_images,
    open_latents,
    read_idx,
    write_array_record,
    write_latents,
)
from eqxldm.data.decode import decode_and_crop
from eqxldm.data.mnist import parse_idx
from eqxldm.data.sources.arrayrecord import RecordFiles, writing_records
from eqxldm.data.sources.arrays import ImageArrays
from eqxldm.models import AutoencoderKL, DiT
from eqxldm.pretrained.files import WEIGHTS
from experiments.train.config import Config
from experiments.train.job import read_data
from experiments.train.options import read_options
from experiments.train.presets import preset
from experiments.train.run import RunFolder, as_dict

from fuzzing import Reader, check_reader, damaged_config, damaged_json, damaged_safetensors, one

# What is read


def picture(kind="PNG", mode="RGB", size=(9, 7)):
    rng = np.random.default_rng(0)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (*size[::-1], channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(file, kind)
    return file.getvalue()


def source():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    return ImageArrays(images, np.array([0, 1] * 3), class_names=("a", "b"))


def read_source(path):
    images = open_images(path)
    images.digest()
    for i in range(min(len(images), 8)):
        images[i]


def read_folder(path):
    read_source(path.parent)


def decode(path):
    decode_and_crop(path.read_bytes(), 16, name=path.name)


def read_latents(path):
    latents = open_latents(path.parent)
    assert len(latents) < 1000
    latents.read(np.arange(len(latents)), np.zeros(len(latents), bool))
    latents.ids(), latents.skipped()


def load(path):
    pretrained.load(path)


def load_folder(path):
    pretrained.load(path.parent)


def read_checkpoint(path):
    with Checkpoints(path.parents[1]) as checkpoints:
        like = {"w": jax.ShapeDtypeStruct((3, 4), np.float32)}
        checkpoints.restore(7, like)


def read_run(path):
    run = RunFolder(path.parent)
    config = read_options(Config, run)
    run.metrics(), run.log_entries()
    run.file("x")
    read_data(run, config)


def tars(folder):
    for name in ("cat", "dog"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content := picture())
            tar.addfile(member, io.BytesIO(content))


def parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"bytes": picture(), "path": "x"}] * 4
    names = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [0, 1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pa.parquet.write_table(table, folder / "train.parquet")


def captions(folder):
    (folder / "a.png").write_bytes(picture())
    (folder / "b.png").write_bytes(picture())
    (folder / "captions.json").write_text(json.dumps({"a.png": "one", "b.png": "two"}))


def metadata(folder):
    (folder / "a.png").write_bytes(picture())
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')


def latents(folder):
    images = source()
    header = latent_header(
        images, size=8, shape=(2, 4, 4), autoencoder="x", shift=[0.0] * 2, scale=[1.0] * 2
    )
    encode = lambda x: (np.zeros((4, 2, 4, 4)), np.zeros((4, 2, 4, 4)))
    write_latents(images, encode, folder, header, batch_size=4, threads=1)


def weights(folder):
    sizes = dict(patch_size=2, depth=2, width=16, num_heads=2, num_classes=3)
    dit = DiT((3, 8, 8), **sizes, key=jax.random.key(0))
    pretrained.save(dit, folder / "dit.safetensors")
    pretrained.export(pretrained.with_diffusers_time(dit), folder)
    shutil.copy(folder / f"{WEIGHTS}.safetensors", folder / "part.safetensors")


def sharded(folder):
    weights(folder)
    (folder / f"{WEIGHTS}.safetensors").rename(folder / "1.safetensors")
    names = pretrained.files.open_safetensors(folder / "1.safetensors")[0]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "1.safetensors")}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))


def autoencoder(folder):
    model = AutoencoderKL(
        3, 4, channels=(8, 8), blocks=1, decoder_blocks=2, groups=4, key=jax.random.key(0)
    )
    pretrained.save(model, folder / "ae.safetensors")
    pretrained.export(model, folder)


def checkpoint(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, {"w": np.ones((3, 4), np.float32)}, info={"a": 1})
        checkpoints.wait()


def run(folder):
    config = preset("smoke").config
    about = {"source": "a", "images": 4, "class_names": ["a", "b"], "condition": "label"}
    about |= {"num_classes": 2, "lpips": None, "path": None}
    metrics = {"timings": {"x": {"seconds": 1.0}}, "diffusion": {}}
    log = {"stage": "diffusion", "step": 1, "loss": 0.5}
    for name, value in {
        "config.json": as_dict(config), "data.json": about, "metrics.json": metrics,
        "manifest.json": {"wrote": ["config.json"]}, "log.jsonl": log,
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(value) + "\n")


def read_about_of_records(path):
    """The damaged bytes as the last record of a sound file."""
    target = path.with_name("b.arrayrecord")
    with writing_records(target) as write:
        write(struct.pack("<iii", 0, 1, -1) + b"a" + picture())
        write(path.read_bytes())
    read_source(target)


def read_record(path):
    target = path.with_name("b.arrayrecord")
    with writing_records(target) as write:
        write(path.read_bytes())
        write(json.dumps(ABOUT).encode())
    read_source(target)


def read_footer_of_latents(path):
    (shard,) = path.parent.glob("*.arrayrecord")
    records = RecordFiles([shard])
    rows = records.read(np.arange(len(records)))
    with writing_records(shard) as write:
        for row in rows:
            write(row)
        write(path.read_bytes())
    read_latents(shard)


def footer(folder):
    latents(folder)
    content = RecordFiles(list(folder.glob("*.arrayrecord"))).footer(0)
    (folder / "footer").write_bytes(content)


ABOUT = {
    "format": "eqxldm images 2",
    "class_names": ["a", "b"],
    "has_captions": False,
    "digest": "x",
}
IDX = b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 4) + bytes(24)


def outer_tar(folder):
    tars(folder)
    with tarfile.open(folder / "outer.tar", "w") as tar:
        for name in ("cat", "dog"):
            tar.add(folder / f"{name}.tar", f"{name}.tar")


READERS = {
    "idx": Reader(one(IDX), "file", lambda path: parse_idx(path.read_bytes())),
    "idx.gz": Reader(one(gzip.compress(IDX, mtime=0)), "file", read_idx),
    **{f"{kind} {mode}": Reader(one(picture(kind, mode)), "file", decode)
       for kind, mode in (("PNG", "RGB"), ("PNG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB"),
                          ("GIF", "L"), ("BMP", "RGB"), ("PPM", "RGB"), ("TIFF", "RGB"))},
    "tar": Reader(outer_tar, "outer.tar", read_source),
    "tars": Reader(tars, "dog.tar", read_folder),
    "parquet": Reader(parquet, "train.parquet", read_source),
    "arrayrecord": Reader(
        lambda folder: write_array_record(source(), folder / "a.arrayrecord"),
        "a.arrayrecord", read_source,
    ),
    "about of records": Reader(
        one(json.dumps(ABOUT).encode()), "file", read_about_of_records, damaged_json
    ),
    "record": Reader(
        one(struct.pack("<iii", 0, 1, -1) + b"a" + picture()), "file", read_record
    ),
    "footer of latents": Reader(footer, "footer", read_footer_of_latents, damaged_json),
    "captions": Reader(captions, "captions.json", read_folder, damaged_json),
    "metadata": Reader(metadata, "metadata.jsonl", read_folder, damaged_json),
    "latents": Reader(latents, "latents-00000-of-00001.arrayrecord", read_latents),
    "header": Reader(latents, "header.json", read_latents, damaged_json),
    "safetensors": Reader(weights, "dit.safetensors", load, damaged_safetensors),
    "config of ours": Reader(weights, "dit.safetensors", load, damaged_config),
    "autoencoder of ours": Reader(autoencoder, "ae.safetensors", load, damaged_config),
    "weights": Reader(weights, f"{WEIGHTS}.safetensors", load_folder, damaged_safetensors),
    "config.json": Reader(weights, "config.json", load_folder, damaged_json),
    "config.json of an autoencoder": Reader(autoencoder, "config.json", load_folder, damaged_json),
    "index": Reader(sharded, f"{WEIGHTS}.safetensors.index.json", load_folder, damaged_json),
    "about.json": Reader(checkpoint, "7/about.json", read_checkpoint, damaged_json),
    "run: config.json": Reader(run, "config.json", read_run, damaged_json),
    "run: data.json": Reader(run, "data.json", read_run, damaged_json),
    "run: metrics.json": Reader(run, "metrics.json", read_run, damaged_json),
    "run: manifest.json": Reader(run, "manifest.json", read_run, damaged_json),
    "run: log.jsonl": Reader(run, "log.jsonl", read_run, damaged_json),
}  # fmt: skip


@pytest.mark.filterwarnings("default::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_reader_ends_with_a_value_or_one_message(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EQXLDM_CACHE", str(tmp_path / "cache"))
    check_reader(READERS[name], tmp_path)
