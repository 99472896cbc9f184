"""Which kind of image source a path is."""

from pathlib import Path

from ..errors import DataError, reading
from ..image_source import ImageSource
from .arrayrecord import ImageArrayRecord
from .folder import ImageFolder
from .parquet import ImageParquet
from .tar import ImageTars

_KINDS = """
  - a folder of images, or with one folder for each class;
  - a folder of images with captions.json ({file: caption}) or metadata.jsonl (file_name, text);
  - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
  - a .parquet file with the column image, and label or text, or a folder of such files;
  - an .arrayrecord file of write_array_record, or a folder of such files."""


def open_images(path: str | Path) -> ImageSource:
    """The images at a path: folders, ILSVRC tars, parquet or ArrayRecord files.

    What the path holds decides; a file is recognised by its ending. Labels and captions are there
    if the path has them; images in one folder, or of one class, have no labels.

    **Raises** `DataError`, with what was looked for, if it is none of these.

    >>> open_images("/nowhere")
    Traceback (most recent call last):
        ...
    eqxldm.data.errors.DataError: /nowhere: there is no such file or folder. Images can be:
      - a folder of images, or with one folder for each class;
      - a folder of images with captions.json ({file: caption}) or metadata.jsonl (file_name, text);
      - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
      - a .parquet file with the column image, and label or text, or a folder of such files;
      - an .arrayrecord file of write_array_record, or a folder of such files.
    """
    path = Path(path)
    if path.is_dir():
        with reading(path, "cannot be listed"):
            names = [entry.name.lower() for entry in path.iterdir()]
            if any(name.endswith(".arrayrecord") for name in names):
                return ImageArrayRecord(path)
            if any(name.endswith(".parquet") for name in names) or any(path.glob("data/*.parquet")):
                return ImageParquet(path)
            if any(name.endswith(".tar") for name in names):
                return ImageTars(path)
        if not names:
            raise DataError(f"{path}: is empty. Images can be:{_KINDS}")
        return ImageFolder(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder. Images can be:{_KINDS}")
    kinds = {".arrayrecord": ImageArrayRecord, ".parquet": ImageParquet, ".tar": ImageTars}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: is none of the known kinds. Images can be:{_KINDS}")
    return kind(path)
