"""Image folders: one folder a class."""

import os
from pathlib import Path
from typing import SupportsIndex

from .idx import DataError
from .records import ImageRecord, Listing, check_classes, checked_index, is_image

_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class ImageFolder:
    """Class folders of images, `root/dog/xx.jpg`, nested or not; opening lists the names.

    Labels count the class folders in sorted order, and the images of a class are sorted by folder,
    then by name, as in torchvision. Hidden files and folders are left out; links are followed.

    **Raises** `DataError` if there is no such folder, no class folder, only one, one without an
    image, or if the folders are those of splits.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("dog/1.png", "cat/2.JPEG"):
    ...         Path(root, name).parent.mkdir()
    ...         _ = Path(root, name).write_bytes(b"...")
    ...     source = ImageFolder(root)
    ...     source.class_names, source[1]
    (('cat', 'dog'), ImageRecord(image=b'...', label=1, id='dog/1.png'))
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        try:
            entries = sorted(e.name for e in os.scandir(root) if e.is_dir())
            loose = [e.name for e in os.scandir(root) if e.is_file() and is_image(e.name)]
        except OSError as error:
            raise DataError(f"{root}: cannot be listed: {error.strerror or error}.") from error
        classes = [name for name in entries if not name.startswith(".")]
        if not classes:
            found = f"{len(loose)} images, but not in class folders" if loose else "no class folder"
            raise DataError(
                f"{root}: expected a folder a class with images in it, got {found}."
                + (" Move them into a folder a class." if loose else "")
            )
        if set(map(str.lower, classes)) <= _SPLITS:
            raise DataError(
                f"{root}: the folders {', '.join(classes)} are splits, not classes; give one of "
                f"them, as {self.root / classes[0]}."
            )
        names: list[str] = []
        labels: list[int] = []
        counts: list[int] = []
        for label, name in enumerate(classes):
            files = _images(self.root, name)
            names += files
            labels += [label] * len(files)
            counts.append(len(files))
        check_classes(str(root), classes, counts)
        self._listing = Listing.of(classes, names, labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._listing.class_names

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        name = self._listing.name(i)
        try:
            content = (self.root / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.root / name}: cannot be read: {error.strerror or error}."
            ) from error
        return ImageRecord(content, int(self._listing.labels[i]), name)

    def digest(self) -> str:
        """Over names, sizes and labels; it asks for the size of every file."""
        name = self._listing.name
        sizes = ((self.root / name(i)).stat().st_size for i in range(len(self)))
        try:
            return self._listing.digest(sizes)
        except OSError as error:
            raise DataError(f"{self.root}: the images changed while listed: {error}.") from error


def _images(root: Path, name: str) -> list[str]:
    """The images below a class folder, as paths from `root` with slashes."""
    found = []
    for folder, inner, files in os.walk(root / name, followlinks=True):
        inner[:] = [i for i in inner if not i.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        found += [(below, file) for file in files if is_image(file)]
    return [f"{folder}/{file}" for folder, file in sorted(found)]
