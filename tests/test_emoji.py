"""Text to image on emoji: the pictures, the vocabulary, the encoder, and a tiny run of the job."""

import gzip
import hashlib
import json
import re
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emoji_archives import BYTE_PAIRS, COLOURS, OBJECTS, packed, write_archives

from eqxldm import data, text
from eqxldm.data import DataError, EmojiSet, archives, clip_vocabulary, emoji, open_emoji
from eqxldm.data.archives import NpmArchive, Wheel
from eqxldm.data.download import PublishedFile, fetch
from eqxldm.models import CaptionEncoder
from experiments.train import captions
from experiments.train.captions import CaptionTokens
from experiments.train.classifier import Described
from experiments.train.compare import VARIANTS, step_cost
from experiments.train.presets import preset
from experiments.train.scores import Comparison, accuracy_of_parts


def published(name, content):
    sums = [hashlib.new(kind, content).hexdigest() for kind in ("md5", "sha256")]
    return PublishedFile(name, "", *sums)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("archives"))


TWO = (emoji.EMOJI[0], emoji.EMOJI[2])


def test_emoji_have_captions_classes_and_pairs_that_are_held_out(folder):
    train, test = (open_emoji(folder, split=split, sets=TWO) for split in ("train", "test"))
    assert train.class_names == test.class_names
    assert train.class_names == tuple(
        f"{category}, {style}"
        for category in ("food & drink", "objects")
        for style in ("noto", "fluent")
    )
    assert train.captions and test.captions
    assert len(train) + len(test) == 2 * 39 and 0 < len(test) < 16
    assert not set(train.captions) & set(test.captions)
    # Each object and each style of a test caption is in the training, in other company.
    for caption in test.captions:
        style, name = caption.split(" ", 1)
        other = {"noto": "fluent", "fluent": "noto"}[style]
        assert f"{other} {name}" in train.captions
    for source in (train, test):
        for i in range(len(source)):
            record = source[i]
            style, name = record.caption.split(" ", 1)
            category = dict(OBJECTS)[name].lower()
            assert source.class_names[record.label] == f"{category}, {style}"
            assert record.image.shape == (64, 64, 3)
            np.testing.assert_array_equal(record.image[0, 0], COLOURS[style][:3])
            np.testing.assert_array_equal(record.image[-1, 0], (255, 255, 255))


def test_archives_that_are_missing_or_damaged(folder, tmp_path):
    with pytest.raises(DataError, match=r"noto|emoji-datasource-google.*cannot be read.*npm pack"):
        open_emoji(tmp_path, sets=TWO)
    for each in TWO:
        (tmp_path / each.file.name).write_bytes((folder / each.file.name).read_bytes())
    path = tmp_path / TWO[0].file.name
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=f"{TWO[0].file.name}: the archive is corrupt"):
        open_emoji(tmp_path, sets=TWO)
    for names in (b"[{", b"[1]", b'{"a": 1}', b""):
        path.write_bytes(packed({"package/emoji.json": names}))
        with pytest.raises(DataError, match=r"package/emoji\.json is damaged or missing"):
            open_emoji(tmp_path, sets=TWO)
    key = "1f000-fe0f"
    entry = dict(name="THING 0", unified=key.upper(), category="Objects")
    contents = {"package/emoji.json": json.dumps([entry]).encode()}
    path.write_bytes(packed(contents | {f"package/img/google/64/{key}.png": b"none"}))
    with pytest.raises(DataError, match="noto: thing 0: cannot be decoded"):
        open_emoji(tmp_path, sets=TWO)


def test_the_archives_of_npm_are_kept_and_their_sums_compared(folder, tmp_path, monkeypatch):
    """Once for both splits; another content than the published one is refused."""
    calls = []

    def pack(command, scratch):
        calls.append(command[:3])
        name = {"first@1.0.0": TWO[0], "second@2.0.0": TWO[1]}[command[2]].file.name
        (scratch / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(archives, "run_command", pack)
    sets: list[EmojiSet] = []
    for each, package in zip(TWO, ("first@1.0.0", "second@2.0.0"), strict=True):
        file = published(each.file.name, (folder / each.file.name).read_bytes())
        sets.append(replace(each, file=file, source=NpmArchive(package)))
    lines: list[str] = []
    for split in ("train", "test"):
        found = open_emoji(split=split, sets=sets, cache=tmp_path, log=lines.append)
        assert found.captions == open_emoji(folder, split=split, sets=TWO).captions
    assert calls == [["npm", "pack", "first@1.0.0"], ["npm", "pack", "second@2.0.0"]]
    assert "Apache-2.0" in lines[-1] and "MIT" in lines[-1]
    wrong = [replace(sets[0], file=replace(sets[0].file, sha256="0" * 64)), sets[1]]
    with pytest.raises(DataError, match="expected the sha256 0000"):
        open_emoji(sets=wrong, cache=tmp_path / "other")


def test_a_file_of_a_wheel(tmp_path, monkeypatch):
    contents = {"open_clip/list.txt.gz": gzip.compress(b"packed"), "open_clip/plain": b"plain"}

    def download(command, scratch):
        assert command[2:4] == ["pip", "download"] and command[-1] == "tiny==1.0.0"
        with zipfile.ZipFile(scratch / "tiny-1.0.0-py3-none-any.whl", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)

    monkeypatch.setattr(archives, "run_command", download)
    files = [published("list.txt", b"packed"), published("plain", b"plain")]
    source = Wheel("tiny==1.0.0", "open_clip")
    found = fetch(files, [source], tmp_path / "cache", lambda line: None)
    assert found == {"list.txt": b"packed", "plain": b"plain"}
    with pytest.raises(DataError, match="its archive lacks open_clip/other"):
        fetch([published("other", b"")], [source], tmp_path / "cache", lambda line: None)
    contents["open_clip/list.txt.gz"] = gzip.compress(b"packed")[:-9]
    with pytest.raises(DataError, match="truncated"):
        fetch(files[:1], [source], tmp_path / "third", lambda line: None)
    with pytest.raises(DataError, match="unpacks to more than 5 bytes"):
        archives.unpacked(gzip.compress(b"packed"), "a", 5)


def test_what_is_published():
    for each in emoji.EMOJI:
        assert re.fullmatch("[0-9a-f]{64}", each.file.sha256) and each.file.name.endswith(".tgz")
    assert clip_vocabulary.FILE.name == "bpe_simple_vocab_16e6.txt"


def test_a_part_of_the_byte_pairs_is_a_vocabulary():
    vocabulary, merges = text.byte_pairs(BYTE_PAIRS, 8)
    assert len(vocabulary) == text.vocabulary_size(8) == 522
    assert vocabulary["!"] == 0 and vocabulary["thing</w>"] == 515
    assert vocabulary["<|endoftext|>"] == 521
    tokenizer = text.clip_tokenizer(vocabulary, merges)
    whole = tokenizer(["noto thing"], 6)
    assert whole.ids.tolist() == [[520, vocabulary["noto</w>"], 515, 521, 521, 521]]
    fewer = text.clip_tokenizer(*text.byte_pairs(BYTE_PAIRS, 2))
    ids = {i: token for token, i in text.byte_pairs(BYTE_PAIRS, 2)[0].items()}
    assert [ids[i] for i in fewer(["thing"], 6).ids[0].tolist()] == [
        "<|startoftext|>", "thi", "n", "g</w>", "<|endoftext|>", "<|endoftext|>",
    ]  # fmt: skip
    with pytest.raises(text.TokenizerError, match="the list is cut or damaged"):
        text.byte_pairs(BYTE_PAIRS, 20)
    with pytest.raises(ValueError, match=r"0 \.\. 48894, got -1"):
        text.byte_pairs(BYTE_PAIRS, -1)


def test_a_caption_encoder_ignores_padding_and_order_matters():
    encoder = CaptionEncoder(16, 1, 2, 8, 99, key=jax.random.key(0))
    ids = jnp.array([97, 5, 7, 98, 98, 98])
    found = encoder(ids)
    assert found.mask.tolist() == [True] * 4 + [False] * 2
    short = encoder(ids[:4])
    np.testing.assert_allclose(found.vector, short.vector, atol=1e-5)
    np.testing.assert_allclose(found.tokens[:4], short.tokens, atol=1e-5)
    other = encoder(jnp.array([97, 7, 5, 98]))
    assert jnp.max(jnp.abs(other.vector - found.vector)) > 1e-4


def test_accuracy_of_both_parts_of_a_class():
    names = ("food, noto", "food, fluent", "objects, noto", "objects, fluent")
    found = Described(np.zeros((4, 2)), np.array([0, 1, 2, 3]))
    c = Comparison(found, found, np.array([0, 0, 0, 0]), names)
    assert accuracy_of_parts(c) == {"accuracy_part_1": 0.5, "accuracy_part_2": 0.5}
    c = Comparison(found, found, np.array([0, 1, 1, 3]), names)
    assert accuracy_of_parts(c) == {"accuracy_part_1": 0.75, "accuracy_part_2": 0.75}
    assert accuracy_of_parts(c._replace(labels=None)) == {}
    assert accuracy_of_parts(c._replace(class_names=("a", "b", "c", "d"))) == {}


def test_both_ways_to_look_at_a_caption_get_as_many_multiply_adds():
    config = preset("text").config
    joint, cross, frozen = (variant(config) for variant in VARIANTS["text"].values())
    assert not joint.text.cross_attention and cross.text.cross_attention
    budgets = [each.diffusion.steps * step_cost(each) for each in (joint, cross)]
    assert budgets[0] == pytest.approx(budgets[1], rel=1e-3)
    assert frozen.text.tokens == "frozen" and frozen.diffusion == cross.diffusion


def test_the_tokens_of_a_caption(monkeypatch):
    monkeypatch.setattr(captions, "fetch_clip_vocabulary", lambda log: BYTE_PAIRS)
    captions.caption_tokenizer.cache_clear()
    condition = CaptionTokens(6, 8)
    record = data.ImageRecord(b"", "a.png", caption="Noto  thing")
    assert condition(record).tolist() == condition.tokens("noto thing").tolist()
    assert condition.tokens("").tolist() == [520] + [521] * 5
    assert condition.cut("noto thing") == ""
    with pytest.raises(DataError, match=r"a\.png: has no caption"):
        condition(record._replace(caption=None))
    captions.caption_tokenizer.cache_clear()
