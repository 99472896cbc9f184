"""Image folders: flat, a folder for each class, or files with their captions beside them."""

import json
import logging
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex

from ...durable import read_file
from .._entries import kind_of, listed
from ..errors import DataError, reading
from ..image_source import ImageRecord, Listing, check_classes, checked_index, is_image, shown

_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_logger = logging.getLogger(__name__)


class ImageFolder:
    """A folder of images; opening lists the names, and what lies beside them decides:

    - `captions.json`, `{file: caption}`, or `metadata.jsonl`, a line `{"file_name": ..., "text":
      ...}` for each image, in the folder: all images in it and below have captions and no labels.
      Files are named from the folder, with slashes. One caption for each image: a list is refused,
      as a cache can store only one.
    - Two folders or more with images: classes, `root/dog/xx.jpg`, nested or not. Labels count the
      folders in sorted order.
    - Images in the folder itself, or in a single folder in it: no labels.

    The images of a class are sorted by folder, then by name, as in torchvision. Hidden files and
    folders are left out. Links are followed, and each file is read once: a link to what is read
    anyway (the folder above it, say) is passed over, with a line in this module's log.

    **Raises** `DataError` if there is no such folder or no image; for a class without an image, or
    folders of splits instead of classes; for images beside class folders; for captions that are
    missing, double or of no image; for a folder that cannot be listed, a link to nothing or what
    is named like an image and is no file; for a file or folder that links put into two classes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("dog/1.png", "cat/2.JPEG"):
    ...         Path(root, name).parent.mkdir()
    ...         _ = Path(root, name).write_bytes(b"...")
    ...     source = ImageFolder(root)
    ...     source.class_names, source[1]
    (('cat', 'dog'), ImageRecord(image=b'...', id='dog/1.png', label=1, caption=None, sound=None))
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._listing = self._listed()
        self.class_names, self.labels = self._listing.class_names, self._listing.labels
        self.has_captions = self._listing.captions is not None

    def _listed(self) -> Listing:
        root, captions = self.root, _captions(self.root)
        walked = _Walk(self.root, classes=captions is None)
        if captions is not None:
            names = sorted((name for names in walked.names.values() for name in names), key=_order)
            return Listing.of(names, captions=_matched(self.root, captions, names))
        classes = [name for name, names in walked.names.items() if name and names]
        if set(map(str.lower, classes)) <= _SPLITS and classes and not walked.names[""]:
            raise DataError(
                f"{root}: the folders {', '.join(classes)} are splits, not classes; give one of "
                f"them, as {self.root / classes[0]}."
            )
        if walked.names[""] and classes:
            raise DataError(
                f"{root}: {len(walked.names[''])} images lie beside folders with images "
                f"({shown(classes)}). Class folders alone are labels, images alone have none: move "
                "one or the other away."
            )
        if not walked.names[""] and len(walked.names) > 2:
            classes = [name for name in walked.names if name]  # those without an image too
            check_classes(str(root), classes, [len(walked.names[name]) for name in classes])
        names = [name for each in walked.names.values() for name in each]
        if not names:
            raise DataError(f"{root}: expected images in it or in class folders, got none.")
        labels = [k for k, name in enumerate(classes) for _ in walked.names[name]]
        return Listing.of(names, classes, labels)

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        path = self._path(i)
        with reading(path):
            return self._listing.record(i, read_file(path))

    def _path(self, i: int) -> Path:
        return self.root / os.fsdecode(self._listing.names[i].encode("utf-8", "surrogateescape"))

    def digest(self) -> str:
        """Over names, sizes, labels and captions; it asks for the size of every file."""
        sizes = (self._path(i).stat().st_size for i in range(len(self)))
        try:
            return self._listing.digest(sizes)
        except OSError as error:
            raise DataError(f"{self.root}: the images changed while listed: {error}.") from error


def _order(name: str) -> tuple[str, str]:
    return posixpath.split(name)


class _Walk:
    """Every image below a folder: `names[top]`, by the folder in `root` that it lies in.

    `names[""]` are those in `root` itself; the tops are sorted, and those without an image are
    there too. Folders that are no links come first, so that a link never takes an image from the
    place where it is. With `classes` no image may be in two tops.
    """

    def __init__(self, root: Path, *, classes: bool):
        self._root, self._classes = root, classes
        self._folders: dict[str, str] = {}  # real path -> name from root
        self._linked_files: list[str] = []
        self._linked_folders: list[str] = []
        self.names: dict[str, list[str]] = {"": []}
        self._walk("", os.path.realpath(root))
        while self._linked_folders:  # walking one may add some
            self._linked_folders.sort()
            name = self._linked_folders.pop(0)
            self._follow(name, os.path.realpath(root / name))
        self._add_linked_files()
        names = {_as_utf8(top): map(_as_utf8, names) for top, names in self.names.items()}
        self.names = {top: sorted(names[top], key=_order) for top in sorted(names)}

    def _walk(self, name: str, real: str) -> None:
        stack = [(name, real)]
        while stack:
            name, real = stack.pop()
            self._folders[real] = name
            for entry in listed(self._root / name):
                inner = posixpath.join(name, entry.name)
                kind = kind_of(self._root / inner, entry, is_image)
                if kind == "folder":
                    self.names.setdefault(_top(inner), [])
                    if entry.is_symlink():
                        self._linked_folders.append(inner)
                    else:
                        stack.append((inner, os.path.join(real, entry.name)))
                elif kind == "file":
                    files = self._linked_files if entry.is_symlink() else self.names[_top(name)]
                    files.append(inner)

    def _follow(self, name: str, real: str) -> None:
        """Reads what a link leads to, unless it leads back to what is read anyway."""
        path, inside = self._root / name, os.path.join(real, "")
        again = self._folders.get(real)
        if again is None and os.path.realpath(self._root).startswith(inside):
            again = ".."
        if again is None:
            for other, known in self._folders.items():
                if other.startswith(inside):
                    raise DataError(
                        f"{path}: is a link to a folder around {self._root / known}, whose images "
                        "would be read twice. Remove one of the links."
                    )
            self._walk(name, real)
        elif not self._classes or ("/" in name and _top(again) in ("", "..", _top(name))):
            _pass_over(path, self._root / again)
            if "/" not in name:
                del self.names[name]
        else:  # a class passed over would shift the labels of those behind it
            raise DataError(
                f"{path}: is a link to images that are read as {self._root / again}: they would be "
                "of two classes. Remove the link."
            )

    def _add_linked_files(self) -> None:
        places: dict[str, str] = {}  # of files that are in none of the folders
        for name in sorted(self._linked_files):
            real = os.path.realpath(self._root / name)
            folder, file = os.path.split(real)
            top = _top(posixpath.dirname(name))
            if folder in self._folders and is_image(file):
                first = posixpath.join(self._folders[folder], file)
            else:
                first = places.setdefault(real, name)
            if first == name:
                self.names[top].append(name)
            elif self._classes and _top(posixpath.dirname(first)) != top:
                raise DataError(
                    f"{self._root / name}: is the same file as {self._root / first}: it would be "
                    "of two classes. Remove one of them."
                )
            else:
                _pass_over(self._root / name, self._root / first)


def _as_utf8(name: str) -> str:
    """A name that the system gave, the same in every locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _top(folder: str) -> str:
    return folder.split("/")[0]


def _pass_over(link: Path, first: Path) -> None:
    _logger.warning("%s: passed over: the link leads to %s, which is read already.", link, first)


def _captions(root: Path) -> dict[str, str] | None:
    """The captions by file name, from the one file that has them; None if there is none."""
    whole, lines = root / "captions.json", root / "metadata.jsonl"
    if whole.exists() and lines.exists():
        raise DataError(f"{root}: has both {whole.name} and {lines.name}. Remove one of them.")
    if not whole.exists() and not lines.exists():
        return None
    path = whole if whole.exists() else lines
    try:
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    pairs = _pairs(path, text) if path == whole else _pairs_of_lines(path, text)
    captions: dict[str, str] = {}
    for name, caption in pairs:
        if isinstance(caption, list):
            raise DataError(
                f"{path}: {name} has a list of captions; needed is one. Keep one of them, or store "
                "the image once for each."
            )
        if not isinstance(caption, str) or not _encodable(caption):
            raise DataError(f"{path}: the caption of {name} must be a text, got {caption!r}.")
        name = posixpath.normpath(name)
        if name in captions:
            raise DataError(f"{path}: has two captions of {name}. Keep one of them.")
        captions[name] = caption
    return captions


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _pairs(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        # As pairs, because of two equal names a dict keeps one.
        pairs = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {error}.") from error
    if not isinstance(pairs, tuple):
        raise DataError(f"{path}: expected an object, {{file: caption}}.")
    return list(pairs)


def _pairs_of_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is no JSON: {error}.") from error
        if not isinstance(entry, dict) or not {"file_name", "text"} <= entry.keys():
            got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(
                f"{path}: line {number}: expected an object with file_name and text, got {got}."
            )
        if not isinstance(entry["file_name"], str):
            raise DataError(f"{path}: line {number}: file_name must be a text.")
        yield entry["file_name"], entry["text"]


def _matched(root: Path, captions: dict[str, str], names: list[str]) -> list[str]:
    """The captions in the order of the images; refuses one without the other."""
    if not names:
        raise DataError(f"{root}: has captions and no images.")
    without = [name for name in names if name not in captions]
    unknown = sorted(captions.keys() - set(names))
    problems = []
    if without:
        problems.append(f"{len(without)} of {len(names)} images have no caption: {shown(without)}")
    if unknown:
        problems.append(f"{len(unknown)} captions are of no image there: {shown(unknown)}")
    if problems:
        raise DataError(f"{root}: {'; '.join(problems)}. Files are named as from this folder.")
    return [captions[name] for name in names]
