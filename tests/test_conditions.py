"""Conditions from the record to the batch, and images of any channels and shape."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from eqxldm.data import (
    DataError,
    ImageArrays,
    ImageRecord,
    caption_bytes,
    image_batches,
    latent_batches,
    latent_header,
    no_condition,
    open_images,
    open_latents,
    write_latents,
)
from eqxldm.data.conditions import stack_conditions

N, HEIGHT, WIDTH = 7, 4, 6
TEXTS = ["a", "zwei Käfer", "", "猫が三匹います", "x" * 40, "six", "seven"]


def arrays(channels=3, **options):
    images = np.random.default_rng(0).integers(0, 256, (N, HEIGHT, WIDTH, channels), np.uint8)
    return ImageArrays(images, **options)


def take(source, count=1, **options):
    defaults = dict(size=(HEIGHT, WIDTH), seed=0, flip=False)
    batches = image_batches(source, N, **{**defaults, **options})
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


class Rich:
    """A condition of several arrays, of numbers of Python and of nothing."""

    def __call__(self, record):
        return {
            "size": (len(record.caption), 0.5),
            "ids": np.arange(3) + len(record.id),
            "no": None,
        }


def test_a_batch_has_the_conditions_of_its_images():
    source = arrays(captions=TEXTS)
    (batch,) = take(source, condition=Rich())
    cond, index = batch["cond"], batch["index"]
    assert cond["size"][0].dtype == np.int32 and cond["size"][1].dtype == np.float32
    assert cond["size"][0].tolist() == [len(TEXTS[i]) for i in index]
    assert cond["ids"].shape == (N, 3) and cond["ids"].dtype == np.int32 and cond["no"] is None
    np.testing.assert_array_equal(batch["image"], source.images[index])


def test_unconditional_batches_have_no_condition():
    assert take(arrays(), condition=no_condition)[0]["cond"] is None
    with pytest.raises(DataError, match="image/0: has no label, which label_condition needs"):
        take(arrays())
    with pytest.raises(DataError, match="image/0: has no caption, which caption_bytes needs"):
        take(arrays(), condition=caption_bytes(8))


@pytest.mark.parametrize("length", range(2, 24))
def test_caption_bytes_are_utf8_cut_between_characters(length):
    for text in [*TEXTS, "a\0b"]:
        ids = caption_bytes(length)(ImageRecord(b"", "x", caption=text))
        assert ids.shape == (length,) and ids.dtype == np.int32 and ids[0] == 256
        content = bytes(ids[1:][ids[1:] > 0].astype(np.uint8))
        whole = text.replace("\0", " ")
        assert whole.startswith(content.decode())  # valid UTF-8
        assert len(content) > min(len(whole.encode()), length - 1) - 4
        assert not ids[1 + len(content) :].any()
    assert caption_bytes(length).tokens("")[1:].max() == 0
    with pytest.raises(ValueError, match="at least 2"):
        caption_bytes(1)


@pytest.mark.parametrize(
    ("conditions", "match"),
    [
        ([np.zeros(2), np.zeros(3)], r"b: its condition has an array float32\[3\], that of a"),
        ([np.zeros(2), np.zeros(2, int)], r"int32\[2\], that of a has float32"),
        ([{"x": 1}, {"y": 1}], "b: its condition is"),
        ([1, None], "b: its condition is"),
        ([1, "text"], "b: .*type str"),
        ([1, 2**31], "b: .*int32 cannot hold"),
    ],
)
def test_conditions_that_differ_are_named(conditions, match):
    with pytest.raises(DataError, match=match):
        stack_conditions(conditions, ["a", "b"])


def captioned_folder(root):
    root.mkdir()
    rng = np.random.default_rng(0)
    for k, text in enumerate(TEXTS):
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(root / f"{k}.png")
        with open(root / "metadata.jsonl", "a", encoding="utf-8") as file:
            file.write(f'{{"file_name": "{k}.png", "text": "{text}"}}\n')
    return open_images(root)


def test_captions_go_from_a_folder_through_workers(tmp_path):
    source, condition = captioned_folder(tmp_path / "root"), caption_bytes(16)
    here = take(source, 3, condition=condition, flip=True)
    there = take(source, 3, condition=condition, flip=True, workers=2)
    for a, b in zip(here, there, strict=True):
        for name in ("image", "cond", "index"):
            np.testing.assert_array_equal(a[name], b[name])
        expected = [condition.tokens(TEXTS[i]) for i in a["index"]]
        np.testing.assert_array_equal(a["cond"], expected)
    assert take(source, 1, condition=no_condition, workers=1)[0]["cond"] is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_files_give_the_channels_asked_for(channels):
    rng = np.random.default_rng(1)
    rgba = Image.fromarray(rng.integers(0, 256, (8, 12, 4), np.uint8))
    file = io.BytesIO()
    rgba.save(file, "PNG")

    class One:
        class_names, has_captions = (), False
        __len__ = lambda self: N
        __getitem__ = lambda self, i: ImageRecord(file.getvalue(), f"{i}")
        digest = lambda self: ""

    (batch,) = take(One(), size=(8, 12), channels=channels, condition=no_condition)
    expected = np.array(rgba.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    np.testing.assert_array_equal(batch["image"][0], expected.reshape(8, 12, channels))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_pixels_in_memory_have_any_channels(channels):
    source = arrays(channels)
    (batch,) = take(source, channels=channels, condition=no_condition)
    np.testing.assert_array_equal(batch["image"], source.images[batch["index"]])
    (batch,) = take(source, size=(2, 3), channels=channels, condition=no_condition)
    assert batch["image"].shape == (N, 2, 3, channels)
    means = source.images.reshape(N, 2, 2, 3, 2, channels).mean((2, 4))
    if channels in (1, 3, 7):  # with opacity Pillow weighs colours by it
        assert np.abs(batch["image"] - means[batch["index"]]).max() <= 1
    if channels == 7:
        with pytest.raises(DataError, match="has 7 channels, asked for are 3"):
            take(source, channels=3, condition=no_condition)


# The latent cache


def encode(images):
    x = images.astype(np.float32).mean((2, 3)) / 255  # (n, height)
    return np.stack([x, -x], 1), np.stack([x - 3, x], 1)  # (n, 2, height): one axis of space


def cached(folder, source, condition, **changes):
    options = dict(size=(HEIGHT, WIDTH), shape=(2, HEIGHT), autoencoder="abc", shift=[0.0] * 2)
    options |= dict(scale=[1.0] * 2, images_per_shard=3, condition=condition) | changes
    header = latent_header(source, **options)
    write_latents(source, encode, Path(folder), header, batch_size=2, condition=condition)
    return open_latents(folder, header)


@pytest.mark.parametrize("condition", [Rich(), caption_bytes(12), no_condition])
def test_the_cache_keeps_conditions_and_latents_of_any_rank(tmp_path, condition):
    source = arrays(captions=TEXTS)
    latents = cached(tmp_path, source, condition)
    batches = latent_batches(latents, N, seed=0)
    batch = next(batches)
    batches.close()
    assert batch["mean"].shape == batch["logvar"].shape == (N, 2, HEIGHT)
    mean, _ = encode(source.images[batch["index"]])
    np.testing.assert_array_equal(batch["mean"], mean.astype(np.float16))
    (plain,) = take(source, condition=condition)
    order = np.argsort(plain["index"])[batch["index"]]
    import jax

    jax.tree.map(
        np.testing.assert_array_equal,
        batch["cond"],
        jax.tree.map(lambda leaf: leaf[order], plain["cond"]),
    )


class Pair(NamedTuple):
    a: int


def test_conditions_that_a_cache_cannot_keep_are_refused(tmp_path):
    source = arrays(captions=TEXTS)
    with pytest.raises(DataError, match="dicts with texts as names, lists, tuples and arrays"):
        cached(tmp_path, source, lambda record: Pair(1))
    uneven = lambda record: np.zeros(2 + record.id.endswith("5"))
    with pytest.raises(DataError, match="image/5: its condition"):
        cached(tmp_path / "b", source, uneven)
    header = latent_header(
        source, size=4, shape=(2, 4), autoencoder="", shift=[0, 0], scale=[1, 1],
        condition=caption_bytes(4),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the header is for another condition"):
        write_latents(source, encode, tmp_path, header, batch_size=2, condition=caption_bytes(5))


class Shouting:
    """Another tokenizer with the same shapes."""

    def __call__(self, record):
        return caption_bytes(12).tokens(record.caption.upper())


def test_a_cache_of_another_tokenizer_is_refused(tmp_path):
    source = arrays(captions=TEXTS)
    cached(tmp_path, source, caption_bytes(12))
    with pytest.raises(DataError, match="first_condition"):
        cached(tmp_path, source, Shouting())
