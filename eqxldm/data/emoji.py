"""Emoji in three styles, with captions: the same objects, each drawn by three hands."""

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from .archives import NpmArchive
from .download import (
    Log,
    PublishedFile,
    cache_dir,
    fetch,
    member_content,
    regular_members,
)
from .errors import DataError
from .sources.arrays import ImageArrays

SPLITS = ("train", "test")
SIDE = 64
NAMES = "package/emoji.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmojiSet:
    """One style: its word in a caption, its archive, the folder of the pictures, its licence."""

    style: str
    file: PublishedFile
    source: NpmArchive
    folder: str
    licence: str


EMOJI = (
    EmojiSet(
        "noto",
        PublishedFile(
            "emoji-datasource-google-16.0.0.tgz",
            "",
            "afdb2b1eb6e038ffd8c59dd6f654720f",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
        NpmArchive("emoji-datasource-google@16.0.0"),
        "package/img/google/64/",
        "Noto Emoji, Google, Apache-2.0",
    ),
    EmojiSet(
        "twemoji",
        PublishedFile(
            "emoji-datasource-twitter-16.0.0.tgz",
            "",
            "19fb55ef34e83997e985f687762798eb",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ),
        NpmArchive("emoji-datasource-twitter@16.0.0"),
        "package/img/twitter/64/",
        "Twemoji, Twitter and contributors, CC BY 4.0",
    ),
    EmojiSet(
        "fluent",
        PublishedFile(
            "lobehub-fluent-emoji-3d-1.1.0.tgz",
            "",
            "e9817e218acff93c6e209758a3024a40",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        NpmArchive("@lobehub/fluent-emoji-3d@1.1.0"),
        "package/assets/",
        "Fluent Emoji 3D, Microsoft, MIT",
    ),
)


def open_emoji(
    data_dir: str | Path | None = None,
    *,
    split: str = "train",
    sets: Sequence[EmojiSet] = EMOJI,
    cache: str | Path | None = None,
    log: Log = _logger.info,
) -> ImageArrays:
    """A split of the emoji that every set has, 64 x 64 on white, as an image source with captions.

    A caption is the style and the name, such as "noto red apple". The class is category and
    style, such as "food & drink, noto". Of every tenth object, chosen by a hash of its name, one
    style is left out of "train": those pictures are "test". So each word of a test caption is in
    captions of the training, but never these words together.

    **Arguments**:

    - `data_dir`: a folder with the sets' archives; nothing is fetched then, nor are checksums
      compared.
    - `split`: "train" or "test".
    - `sets`: the styles. The first archive also has the names, as `package/emoji.json`.
    - `cache`: the folder in which `emoji/` keeps the archives, 152 MB, `cache_dir()` unless given.
    - `log`: called with a line on each source tried, and on the licences.

    **Raises** `DataError` for an unknown split, archives that are missing or damaged, and if no
    source has them.

    >>> open_emoji(split="all")
    Traceback (most recent call last):
        ...
    eqxldm.data.errors.DataError: emoji: unknown split 'all': known are train, test.
    """
    if split not in SPLITS:
        raise DataError(f"emoji: unknown split {split!r}: known are {', '.join(SPLITS)}.")
    if data_dir is None:
        folder = (cache_dir() if cache is None else Path(cache).expanduser()) / "emoji"
        contents: dict[str, bytes] = {}
        for each in sets:
            contents |= fetch([each.file], [each.source], folder, log)
        log(f"Emoji: {'; '.join(each.licence for each in sets)}.")
    else:
        contents = {each.file.name: _read(Path(data_dir), each.file.name) for each in sets}
    objects, pictures = _read_archives(sets, contents)
    styles = [each.style for each in sets]
    categories = sorted({x["category"].lower() for x in objects})
    class_names = [f"{category}, {style}" for category in categories for style in styles]
    images, labels, captions = [], [], []
    for x in objects:
        name = x["name"].lower()
        for i, style in enumerate(styles):
            if (held_out(name, len(styles)) == i) == (split == "test"):
                images.append(_picture(pictures[style][_key(x)], f"{style}: {name}"))
                labels.append(class_names.index(f"{x['category'].lower()}, {style}"))
                captions.append(f"{style} {name}")
    if not images:
        raise DataError(f"emoji: the archives have no pictures for the split {split}.")
    return ImageArrays(
        np.stack(images),
        np.array(labels),
        class_names=class_names,
        captions=captions,
        name=f"emoji/{split}",
    )


def held_out(name: str, styles: int) -> int | None:
    """The style in which an object is left out of the training; None for nine objects of ten.

    >>> [held_out(name, 3) for name in ("cook", "rose", "ship", "red apple")]
    [None, None, None, None]
    """
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return number // 10 % styles if number % 10 == 0 else None


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder.expanduser() / name).read_bytes()
    except OSError as error:
        raise DataError(
            f"data_dir {folder}: {name} cannot be read: {error.strerror or error}. It needs the "
            "archives that `npm pack` gives of the packages in eqxldm.data.EMOJI."
        ) from error


def _read_archives(
    sets: Sequence[EmojiSet], contents: Mapping[str, bytes]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, bytes]]]:
    """What is known of the objects that all sets have, and each style's files by code points."""
    pictures: dict[str, dict[str, bytes]] = {}
    names = b""
    for each in sets:
        pictures[each.style] = found = {}
        wanted: Callable[[str], bool] = lambda name, each=each: name.startswith(each.folder)
        try:
            with tarfile.open(fileobj=io.BytesIO(contents[each.file.name])) as archive:
                for member in regular_members(archive):
                    if member.name == NAMES and each is sets[0]:
                        names = member_content(archive, member)
                    elif wanted(member.name):
                        key = member.name[len(each.folder) :].rsplit(".", 1)[0]
                        found[key] = member_content(archive, member)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"{each.file.name}: the archive is corrupt: {error}.") from error
    try:
        listed = json.loads(names)
        there = [x for x in listed if all(_key(x) in found for found in pictures.values())]
        valid = all(isinstance(x[k], str) for x in there for k in ("name", "category"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{sets[0].file.name}: its {NAMES} is damaged or missing.") from error
    if not valid:
        raise DataError(f"{sets[0].file.name}: its {NAMES} lacks names.")
    # Parts of others, such as a skin tone, are no objects.
    return [x for x in there if x["category"] != "Component"], pictures


def _key(x: Mapping[str, Any]) -> str:
    return x["unified"].lower()


def _picture(content: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """On white, as large as `SIDE`: colours are weighted by their opacity while it is shrunk."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as file:
            picture = file.convert("RGBA").convert("RGBa")  # opacity is in palettes too
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot be decoded: {error}.") from error
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(picture).astype(np.int32)
    return np.minimum(pixels[..., :3] + 255 - pixels[..., 3:], 255).astype(np.uint8)
