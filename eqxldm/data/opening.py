"""Which kind of image source a path is."""

from pathlib import Path

from .array_records import ImageArrayRecord
from .folders import ImageFolder
from .idx import DataError
from .parquet import ImageParquet
from .records import ImageSource
from .tars import ImageTars

_KINDS = """
  - a folder with a folder a class, images in each;
  - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
  - a .parquet file with the columns image and label, or a folder of such files;
  - an .arrayrecord file of write_array_record, or a folder of such files."""


def open_images(path: str | Path) -> ImageSource:
    """The images at a path: class folders, ILSVRC tars, parquet or ArrayRecord files.

    What the path holds decides; a file is recognised by its ending.

    **Raises** `DataError`, with what was looked for, if it is none of these.

    >>> open_images("/nowhere")
    Traceback (most recent call last):
        ...
    eqxldm.data.idx.DataError: /nowhere: there is no such file or folder. Images can be:
      - a folder with a folder a class, images in each;
      - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
      - a .parquet file with the columns image and label, or a folder of such files;
      - an .arrayrecord file of write_array_record, or a folder of such files.
    """
    path = Path(path)
    if path.is_dir():
        try:
            names = [entry.name.lower() for entry in path.iterdir()]
            if any(name.endswith(".arrayrecord") for name in names):
                return ImageArrayRecord(path)
            if any(name.endswith(".parquet") for name in names) or any(path.glob("data/*.parquet")):
                return ImageParquet(path)
            if any(name.endswith(".tar") for name in names):
                return ImageTars(path)
            folders = any(entry.is_dir() for entry in path.iterdir())
        except OSError as error:
            raise DataError(f"{path}: cannot be listed: {error.strerror or error}.") from error
        if folders:
            return ImageFolder(path)
        found = f"holds {len(names)} files and no folder" if names else "is empty"
        raise DataError(f"{path}: {found}. Images can be:{_KINDS}")
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder. Images can be:{_KINDS}")
    kinds = {".arrayrecord": ImageArrayRecord, ".parquet": ImageParquet, ".tar": ImageTars}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: is none of the known kinds. Images can be:{_KINDS}")
    return kind(path)
