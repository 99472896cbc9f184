"""Clips from files: videos, animated images and folders of frames, at one size and frame rate."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from ..durable import check_is_file, read_file, replacing
from ._entries import kind_of, listed
from .decode import MAX_SIDE, as_size, center_crop, decode_image
from .errors import DataError, reading
from .image_source import IMAGE_ENDINGS, ImageRecord, checked_index, listing_digest, shown

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
ANIMATION_ENDINGS = (".gif", ".webp", ".apng")
CAPTIONS, INDEX, PIXELS = "captions.json", "clips.json", "clips.bin"
FORMAT = 1
FRAME_PIXELS = 2**25  # of a frame, at most: 8K; an animation has some of them in memory
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_logger = logging.getLogger(__name__)

Frames = UInt8[np.ndarray, "f h w c"]
Timed = tuple[float, np.ndarray]  # when a frame is shown, in seconds, and its pixels


class Wanted(NamedTuple):
    """What a clip of a file is: `frames` of `size`, `fps` a second or, if None, as they come."""

    frames: int
    size: tuple[int, int]
    channels: int = 3
    fps: float | None = None


def read_clips(path: str | Path, wanted: Wanted, *, most: int = 1000) -> list[Frames]:
    """The clips in a video file, an animated image or a folder of frames, one after another.

    With `fps` the frame of a clip at `t` is the one that is shown at `t`, so that files of any
    rate, also a variable one, become clips of one rate; a folder of frames has no times and is
    taken as it is. Frames are turned as the file says (of a phone that was held upright), and
    cropped as `center_crop` does. What is left at the end, too short for a clip, is not used.

    **Arguments**: `most`: clips of one file.

    **Raises** `DataError`, with the file's name, if it cannot be decoded to its end, has no
    pictures, or fewer than a clip needs.

    >>> import tempfile
    >>> from PIL import Image
    >>> pictures = [Image.new("L", (9, 7), 40 * k) for k in range(5)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.gif")
    ...     pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    ...     [clip.shape for clip in read_clips(path, Wanted(2, (8, 8), 1))]
    [(2, 8, 8, 1), (2, 8, 8, 1)]
    """
    path = Path(path)
    try:
        check_is_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from error
    if path.is_dir():
        timed, untimed = _of_folder(path, wanted), True
    else:
        ending = path.suffix.lower()
        timed = _of_image(path, wanted) if ending in ANIMATION_ENDINGS else _of_video(path, wanted)
        untimed = False
    clips, clip, seen = [], [], 0
    for _, frame in _resampled(timed, None if untimed else wanted.fps):
        seen += 1
        clip.append(center_crop(frame, wanted.size))
        if len(clip) == wanted.frames:
            clips.append(np.stack(clip))
            clip = []
        if len(clips) == most:
            break
    if not clips:
        rate = "" if wanted.fps is None or untimed else f" at {wanted.fps:g} a second"
        raise DataError(
            f"{path}: has {seen} frame{'s' if seen != 1 else ''}{rate}; a clip needs "
            f"{wanted.frames}. Ask for fewer frames, or a higher rate."
        )
    return clips


def _resampled(timed: Iterator[Timed], fps: float | None) -> Iterator[Timed]:
    """The frames shown at 0, 1 / fps, 2 / fps, ... after the first; all of them without `fps`."""
    if fps is None:
        yield from timed
        return
    start, last, k, gap = None, None, 0, 0.0
    for time, frame in timed:
        start = time if start is None else start
        if last is not None:
            while k / fps + start < time - 1e-6:
                yield k / fps, last[1]
                k += 1
            gap = time - last[0]
        last = time, frame
    if last is not None and start is not None:
        # The last frame is shown as long as the one before it, or for one frame of the clip.
        end = last[0] + (gap or 1 / fps)
        while k / fps + start < end - 1e-6:
            yield k / fps, last[1]
            k += 1


def _of_video(path: Path, wanted: Wanted) -> Iterator[Timed]:
    try:
        import av
    except ImportError:
        raise DataError(
            f"{path.name}: video files need the package av: pip install 'eqxldm[video]'. Animated "
            "images (gif, webp) and folders of frames need nothing more."
        ) from None
    shape = {1: "gray", 3: "rgb24", 4: "rgba"}[wanted.channels]
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream.")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > FRAME_PIXELS:
                raise DataError(f"{path}: its frames have more than {FRAME_PIXELS} pixels.")
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 25)
            for k, frame in enumerate(container.decode(stream)):
                pixels = frame.to_ndarray(format=shape)
                pixels = pixels[..., None] if pixels.ndim == 2 else pixels
                turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
                yield (k / rate if frame.time is None else float(frame.time)), turned
    except DataError:
        raise
    except (av.FFmpegError, ValueError, MemoryError, OSError) as error:  # type: ignore[attr-defined]
        raise DataError(f"{path}: cannot be decoded: {_reason(error)}.") from error


def _of_image(path: Path, wanted: Wanted) -> Iterator[Timed]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG")) as picture:
            if picture.width * picture.height > FRAME_PIXELS or max(picture.size) > MAX_SIDE:
                raise DataError(
                    f"{path}: its frames have more than {FRAME_PIXELS} pixels, or a side longer "
                    f"than {MAX_SIDE}."
                )
            time = 0.0
            for frame in ImageSequence.Iterator(picture):
                pixels = np.asarray(frame.convert(_MODES[wanted.channels]))
                yield time, pixels.reshape(*pixels.shape[:2], -1)
                time += max(float(frame.info.get("duration", 100)), 10.0) / 1000
    except DataError:
        raise
    except Exception as error:  # each format's reader has its own ways to fail
        raise DataError(f"{path}: cannot be decoded: {_reason(error)}.") from error


def _of_folder(path: Path, wanted: Wanted) -> Iterator[Timed]:
    size = None
    for k, file in enumerate(_frame_files(path)):
        with reading(file):
            content = read_file(file)
        pixels = decode_image(content, wanted.channels, name=str(file), max_pixels=FRAME_PIXELS)
        size = pixels.shape[:2] if size is None else size
        if pixels.shape[:2] != size:
            raise DataError(
                f"{file}: is {pixels.shape[1]} x {pixels.shape[0]}, the frames before it are "
                f"{size[1]} x {size[0]}: frames of one folder are one clip and have one size."
            )
        yield float(k), pixels


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _frame_files(path: Path) -> list[Path]:
    """The images of a folder, 2.png before 10.png."""
    number = lambda name: [int(s) if k % 2 else s for k, s in enumerate(re.split(r"(\d+)", name))]
    names = [e.name for e in listed(path) if _ends(e.name, IMAGE_ENDINGS)]
    return [path / name for name in sorted(names, key=number)]


def list_clips(folder: str | Path) -> list[tuple[Path, str | None]]:
    """Every file or folder of frames below a folder that may be a clip, and its caption.

    Captions are those of `captions.json`, `{file: caption}`, beside the files, or the names of the
    folders that the files lie in, classes. A folder that holds three images or more, and no video
    and no image that moves, is one clip, its frames. Links are followed, and what is read anyway is
    passed over, with a line in this module's log.

    **Raises** `DataError` if there is no such folder, nothing in it, or captions for some alone;
    for a folder that cannot be listed, a link to nothing, or what is named like a clip and is none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        came = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {came}; needed is a folder of clips.")
    captions = _captions(folder)
    found = sorted(_Walk(folder).found)
    if not found:
        raise DataError(
            f"{folder}: holds no clips. A clip is a file that ends with "
            f"{', '.join(VIDEO_ENDINGS + ANIMATION_ENDINGS)}, or a folder of frames."
        )
    if captions is not None:
        missing = [str(p.relative_to(folder)) for p in found if _name(p, folder) not in captions]
        if missing:
            raise DataError(f"{folder / CAPTIONS}: lacks captions for {shown(missing)}.")
        return [(path, captions[_name(path, folder)]) for path in found]
    classes = {path.parent for path in found}
    if folder in classes or len(classes) < 2:
        return [(path, None) for path in found]
    return [(path, path.parent.name.replace("_", " ")) for path in found]


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


class _Walk:
    """Every file or folder of frames below a folder that may be a clip, each once.

    What is no link comes first, so that a link never takes a clip from the place where it is. A
    link to what is read anyway, such as the folder around it, is passed over with a line in the
    log.
    """

    def __init__(self, folder: Path):
        self.found: list[Path] = []
        self._seen: dict[str, Path] = {}  # by their real paths, what is read
        self._links: list[Path] = []
        self._seen[os.path.realpath(folder)] = folder
        self._around = os.path.join(os.path.realpath(folder), "")
        self._walk(folder, top=True)
        while self._links:  # walking one may add some; of files those that are in no folder count
            link = next((link for link in self._links if link.is_dir()), self._links[0])
            self._links.remove(link)
            if not link.is_dir():
                self._add(link)
            elif self._is_new(link):
                self._walk(link)

    def _walk(self, folder: Path, *, top: bool = False) -> None:
        entries = [(folder / e.name, e, self._kind(folder, e)) for e in listed(folder)]
        files = [path for path, _, kind in entries if kind == "file"]
        videos = [path for path in files if _ends(path.name, VIDEO_ENDINGS + ANIMATION_ENDINGS)]
        frames = [path for path in files if _ends(path.name, IMAGE_ENDINGS)]
        moves = lambda path: not _ends(path.name, IMAGE_ENDINGS) or _is_animated(path)
        if not top and len(frames) > 2 and not any(map(moves, videos)):
            self.found.append(folder)
            return
        for path, entry, kind in entries:
            if kind != "folder" and path not in videos:
                continue
            if entry.is_symlink():
                self._links.append(path)
            elif kind == "file":
                self._add(path)
            elif self._is_new(path):
                self._walk(path)

    def _add(self, file: Path) -> None:
        if self._is_new(file):
            self.found.append(file)

    def _kind(self, folder: Path, entry: os.DirEntry) -> str:
        wanted = lambda name: _ends(name, VIDEO_ENDINGS + ANIMATION_ENDINGS + IMAGE_ENDINGS)
        return kind_of(folder / entry.name, entry, wanted, "a clip")

    def _is_new(self, path: Path) -> bool:
        real = os.path.realpath(path)
        first = self._seen.get(real)
        if first is None and not self._around.startswith(os.path.join(real, "")):
            self._seen[real] = path
            return True
        leads = "the folder around it" if first is None else first
        _logger.warning("%s: passed over: it leads to %s, which is read.", path, leads)
        return False


def _is_animated(path: Path) -> bool:
    """Whether a GIF or WebP file has several frames; one that cannot be read has not."""
    from PIL import Image

    try:
        with Image.open(path, formats=("GIF", "WEBP")) as picture:
            return getattr(picture, "is_animated", False)
    except Exception:  # each format's reader has its own ways to fail
        return False


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _captions(folder: Path) -> dict[str, str] | None:
    path = folder / CAPTIONS
    if not path.exists():
        return None
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}.") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise DataError(f'{path}: must be an object {{"file": "caption"}}.')
    return found


def write_clips(
    folder: str | Path,
    out: str | Path,
    wanted: Wanted,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> "ClipFile":
    """Decodes all clips of a folder once, into `out`, from where `open_clips` reads them at random.

    A call for what is there already decodes nothing. `out/clips.json`, which is written last, says
    what the clips were made of, and lists what was left out, with the reason.

    **Arguments**: `strict`: a file that cannot be used raises `DataError`; otherwise it is listed.
    `progress(done, total)`: called with the number of files.

    **Raises** `DataError` if none can be used.
    """
    folder, out = Path(folder).expanduser(), Path(out)
    as_size(wanted.size)
    listed = list_clips(folder)
    about = {
        "format": FORMAT,
        "source": clips_digest(folder),
        "frames": wanted.frames,
        "size": list(wanted.size),
        "channels": wanted.channels,
        "fps": wanted.fps,
    }
    if (out / INDEX).exists():
        found = open_clips(out)
        if all(found.about.get(name) == value for name, value in about.items()):
            return found
    out.mkdir(parents=True, exist_ok=True)
    ids, captions, skipped, sha = [], [], {}, hashlib.sha256()
    with replacing(out / PIXELS) as temporary, open(temporary, "wb") as file:
        for done, (path, caption) in enumerate(listed):
            name = _name(path, folder)
            try:
                clips = read_clips(path, wanted)
            except DataError as error:
                if strict or "pip install" in str(error):
                    raise
                skipped[name] = str(error)
                continue
            for k, clip in enumerate(clips):
                pixels = np.ascontiguousarray(clip).data
                file.write(pixels)
                sha.update(pixels)
                ids.append(name if len(clips) == 1 else f"{name}#{k}")
                captions.append(caption)
            if progress is not None:
                progress(done + 1, len(listed))
        if not ids:
            raise DataError(
                f"{folder}: none of its {len(listed)} files can be used, the first: "
                f"{next(iter(skipped.values()))}"
            )
    texts = None if captions[0] is None else captions
    with replacing(out / INDEX) as temporary:
        about |= {"ids": ids, "captions": texts, "skipped": skipped, "sha256": sha.hexdigest()}
        temporary.write_text(json.dumps(about))
    return _opened(out, verify=False)


def clips_digest(folder: str | Path) -> str:
    """SHA-256 over the names, sizes and captions of a folder's files, which are not decoded."""
    folder = Path(folder).expanduser()
    facts = ((_name(p, folder), _weight(p), None, caption) for p, caption in list_clips(folder))
    return listing_digest((), facts)


def _weight(path: Path) -> int:
    return (
        sum(f.stat().st_size for f in _frame_files(path)) if path.is_dir() else path.stat().st_size
    )


def open_clips(folder: str | Path) -> "ClipFile":
    """What `write_clips` has written, compared with the checksum that it left.

    **Raises** `DataError` if it is not there or damaged.
    """
    folder = Path(folder)
    try:
        return _opened(folder, verify=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{folder}: no clips can be read: {_reason(error)}. Delete it.") from error


def _opened(folder: Path, *, verify: bool) -> "ClipFile":
    about = json.loads(read_file(folder / INDEX))
    ids, captions = about["ids"], about["captions"]
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']}, not {FORMAT}")
    texts = lambda values: isinstance(values, list) and all(isinstance(v, str) for v in values)
    if not texts(ids) or not isinstance(about["skipped"], dict):
        raise ValueError(f"{INDEX} is damaged")
    if captions is not None and not (texts(captions) and len(captions) == len(ids)):
        raise ValueError(f"{INDEX} has other captions than clips")
    shape = (len(ids), about["frames"], *about["size"], about["channels"])
    check_is_file(folder / PIXELS)
    if verify and "sha256" in about:  # one of an earlier version has none
        with open(folder / PIXELS, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                raise ValueError(f"{PIXELS} is not what was written")
    pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=shape)
    return ClipFile(about, pixels, folder / PIXELS)


class ClipFile:
    """Decoded clips as an `ImageSource` of strips, `(frames * height, width, channels)`."""

    def __init__(self, about: dict[str, Any], pixels: np.ndarray, path: Path):
        self.about, self._pixels, self._path = about, pixels, path
        self.captions: Sequence[str] | None = about["captions"]
        self.skipped: dict[str, str] = about["skipped"]
        self.class_names: tuple[str, ...] = ()
        self.has_captions = self.captions is not None

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self._pixels))
        _, f, h, w, c = self._pixels.shape
        strip = np.asarray(self._pixels[i]).reshape(f * h, w, c)
        caption = None if self.captions is None else self.captions[i]
        return ImageRecord(strip, self.about["ids"][i], None, caption)

    def digest(self) -> str:
        """Over what the clips were made of: names, sizes and captions of the files."""
        names = ("source", "frames", "size", "channels", "fps")
        rows = [(json.dumps([self.about[n] for n in names]), len(self), None, None)]
        return listing_digest((), rows)
