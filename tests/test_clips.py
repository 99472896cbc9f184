"""Clips: made ones are what they say, files become one rate and size, bad ones are listed."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from eqxldm.data import (
    DataError,
    MovingDigits,
    Wanted,
    caption_of,
    direction_of,
    image_batches,
    list_clips,
    no_condition,
    open_clips,
    read_caption,
    read_clips,
    write_clips,
)

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(100, 256, (10, 8, 8), dtype=np.uint8)


def moving(**options):
    return MovingDigits(DIGITS, np.arange(10), 100, **{"size": 32, "frames": 9, **options})


def test_a_clip_depends_on_its_seed_and_number_alone():
    clip, again = moving().clip(7), moving().clip(7)
    assert (clip.frames == again.frames).all() and clip.caption == again.caption
    assert (clip.frames != moving().clip(8).frames).any()
    assert (clip.frames != moving(seed=1).clip(7).frames).any()
    longer = moving(frames=17).clip(7)
    assert (longer.frames[:9] == clip.frames).all()
    assert moving().digest() == moving().digest() != moving(seed=1).digest()


def test_digits_keep_their_speed_and_stay_inside():
    for index in range(20):
        clip = moving(frames=33, speeds=(3.0, 3.0)).clip(index)
        assert clip.places.min() >= 0 and clip.places.max() <= 24
        steps = np.abs(np.diff(clip.places, axis=0))
        # Where no wall is met in a frame, both parts of the velocity are as they began.
        free = np.isclose(steps, np.abs(clip.velocities), atol=1e-9)
        at_wall = np.minimum(clip.places[1:], 24 - clip.places[1:]) <= 3
        assert (free | at_wall).all() and free.mean() > 0.7


def test_a_frame_has_each_digit_at_its_place_the_brighter_pixel_above():
    clip = moving().clip(3)
    frame = np.zeros((32, 32), np.uint8)
    for digit, (i, j) in zip(clip.digits, np.round(clip.places[4]).astype(int), strict=True):
        part = frame[i : i + 8, j : j + 8]
        np.maximum(part, DIGITS[digit], out=part)
    assert (clip.frames[4, ..., 0] == frame).all()


def test_captions_are_true_and_can_be_read():
    said = [clip for i in range(30) for clip in read_caption(moving().clip(i).caption)]
    assert {direction for _, direction in said} == {"up", "down", "left", "right"}
    for way, velocity in {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}.items():
        assert direction_of(np.array(velocity, float)) == way
        assert read_caption(caption_of(np.array([4]), np.array([velocity], float))) == [(4, way)]


def test_strips_become_batches_of_clips():
    batches = image_batches(
        moving(), 4, size=(9 * 32, 32), channels=1, condition=no_condition, seed=0, flip=False
    )
    batch = next(batches)
    frames = batch["image"].reshape(4, 9, 32, 32, 1)
    assert (frames[0] == moving().clip(int(batch["index"][0])).frames).all()


@pytest.mark.parametrize(
    "options", [{"size": 8}, {"frames": 0}, {"speeds": (3.0, 1.0)}, {"count": 0}]
)
def test_sizes_of_moving_digits_that_do_not_fit_are_refused(options):
    with pytest.raises(DataError, match="moving digits"):
        moving(**options)


def pictures(n, size=(20, 16)):
    return [Image.new("RGB", size, (10 * k, 0, 0)) for k in range(n)]


def save(path, n, durations: int | list[int] = 100, **options):
    first, *rest = pictures(n)
    first.save(path, save_all=True, append_images=rest, duration=durations, **options)


def reds(clips):
    return [clip[:, 4, 4, 0].tolist() for clip in clips]


def test_animated_images_and_folders_of_frames_are_clips(tmp_path):
    wanted = Wanted(3, (8, 8))
    save(tmp_path / "a.png", 7)
    shutil.copy(tmp_path / "a.png", tmp_path / "a.apng")
    save(tmp_path / "a.webp", 7, lossless=True)
    assert reds(read_clips(tmp_path / "a.apng", wanted)) == [[0, 10, 20], [30, 40, 50]]
    assert reds(read_clips(tmp_path / "a.webp", wanted)) == [[0, 10, 20], [30, 40, 50]]
    (tmp_path / "frames").mkdir()
    for k, picture in enumerate(pictures(12)):
        picture.save(tmp_path / "frames" / f"{k}.png")  # 10.png comes after 9.png
    assert reds(read_clips(tmp_path / "frames", Wanted(12, (8, 8)))) == [[*range(0, 120, 10)]]
    pictures(1, (8, 8))[0].save(tmp_path / "frames" / "20.png")
    with pytest.raises(DataError, match=r"20\.png: is 8 x 8, the frames before it are 20 x 16"):
        read_clips(tmp_path / "frames", Wanted(13, (8, 8)))


def test_a_variable_frame_rate_becomes_the_one_asked_for(tmp_path):
    # Shown at 0, 0.1, 0.5 and 0.6 s.
    save(tmp_path / "a.webp", 4, [100, 400, 100, 100], lossless=True)
    clips = read_clips(tmp_path / "a.webp", Wanted(7, (8, 8), fps=10.0))
    assert reds(clips) == [[0, 10, 10, 10, 10, 20, 30]]
    assert reds(read_clips(tmp_path / "a.webp", Wanted(3, (8, 8), fps=5.0))) == [[0, 10, 10]]


@pytest.mark.parametrize(
    ("n", "content", "message"),
    [(1, None, "has 1 frame; a clip needs 3"), (2, None, "has 2 frames; a clip needs 3"),
     (0, b"GIF89a", "cannot be decoded"), (0, b"", "cannot be decoded")],
)  # fmt: skip
def test_files_that_are_no_clip_say_why(n, content, message, tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(content) if content is not None else save(path, n)
    with pytest.raises(DataError, match=message):
        read_clips(path, Wanted(3, (8, 8)))


def test_a_folder_is_decoded_once_and_lists_what_it_left_out(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    for name in ("a_cat", "dog"):
        (folder / name).mkdir(parents=True)
        save(folder / name / "1.gif", 7)
    (folder / "dog" / "2.gif").write_bytes(b"GIF89a")
    found = write_clips(folder, out, Wanted(3, (8, 8)))
    assert len(found) == 4 and list(found.skipped) == ["dog/2.gif"]
    assert [found[i].caption for i in range(4)] == ["a cat", "a cat", "dog", "dog"]
    assert found[1].id == "a_cat/1.gif#1" and np.shape(found[0].image) == (24, 8, 3)
    before = (out / "clips.bin").stat().st_mtime_ns
    assert write_clips(folder, out, Wanted(3, (8, 8))).digest() == found.digest()
    assert (out / "clips.bin").stat().st_mtime_ns == before
    assert write_clips(folder, out, Wanted(2, (8, 8))).digest() != found.digest()
    with pytest.raises(DataError, match=r"2\.gif"):
        write_clips(folder, tmp_path / "strict", Wanted(3, (8, 8)), strict=True)
    for damage in ("{}", '{"ids": 5', "[1]", '{"ids": [1], "captions": null, "format": 1}'):
        (out / "clips.json").write_text(damage)
        with pytest.raises(DataError, match="no clips can be read"):
            open_clips(out)


def test_clips_that_are_not_those_that_were_written_are_refused(tmp_path):
    save(tmp_path / "a.gif", 7)
    out, wanted = tmp_path / "out", Wanted(3, (8, 8))
    write_clips(tmp_path, out, wanted)
    content = bytearray((out / "clips.bin").read_bytes())
    content[100] ^= 1
    (out / "clips.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"clips\.bin is not what was written\. Delete it"):
        write_clips(tmp_path, out, wanted)
    about = json.loads((out / "clips.json").read_text())
    (out / "clips.json").write_text(json.dumps(about | {"captions": ["one"]}))
    with pytest.raises(DataError, match="other captions than clips"):
        open_clips(out)


def test_each_clip_is_read_once_whatever_links_there_are(tmp_path, caplog):
    """Over two links and back, to the folder around, to a sibling, to a file that is read."""
    root, store = tmp_path / "in" / "root", tmp_path / "store"
    for folder in (root / "cat", root / "dog", store):
        folder.mkdir(parents=True)
    save(root / "cat" / "1.gif", 3)
    save(store / "2.gif", 3)
    for link, target in {
        "cat/there": "../dog", "dog/back": "../cat", "cat/up": "..", "dog/above": "../../..",
        "all": root, "dog/1.gif": "../cat/1.gif", "emu": store, "dog/3.gif": store / "2.gif",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        found = [path.relative_to(root).as_posix() for path, _ in list_clips(root)]
    assert found == ["cat/1.gif", "emu/2.gif"]
    assert caplog.text.count("passed over") == 7


def test_a_folder_of_images_that_move_is_a_class_and_one_of_still_ones_a_clip(tmp_path):
    for name in ("cat", "dog", "emu/still"):
        (tmp_path / name).mkdir(parents=True)
    for k in range(4):
        save(tmp_path / "cat" / f"{k}.gif", 3)
        save(tmp_path / "dog" / f"{k}.webp", 3, lossless=True)
        pictures(1)[0].save(tmp_path / "emu/still" / f"{k}.webp", lossless=True)
    found = list_clips(tmp_path)
    assert [caption for path, caption in found if path.is_file()] == 4 * ["cat"] + 4 * ["dog"]
    assert [path.name for path, _ in found if path.is_dir()] == ["still"]
    save(tmp_path / "emu/still" / "5.gif", 3)  # beside what moves, still ones are too short
    assert len(list_clips(tmp_path)) == 13


def test_what_would_be_missing_without_a_word_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.gif", 3)
    (tmp_path / "b.gif").symlink_to("gone.gif")
    with pytest.raises(DataError, match=r"b\.gif: is a link to nothing"):
        list_clips(tmp_path)
    (tmp_path / "b.gif").unlink()
    os.mkfifo(tmp_path / "c.mp4")
    with pytest.raises(DataError, match=r"c\.mp4: is named like a clip and is no file"):
        list_clips(tmp_path)
    with pytest.raises(DataError, match=r"c\.mp4: is a pipe"):
        read_clips(tmp_path / "c.mp4", Wanted(3, (8, 8)))
    (tmp_path / "c.mp4").unlink()
    (tmp_path / "in").mkdir()
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match="in: cannot be listed: Permission denied"):
        list_clips(tmp_path)


def test_frames_are_read_as_images_are(tmp_path):
    """Of the formats of a list, with a bound on their pixels; 16 bits keep their high byte."""
    for name in ("²1", "²2", "²10"):
        grey = np.full((4, 4), 256 * 7, np.uint16)
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    assert (read_clips(tmp_path, Wanted(3, (4, 4)))[0] == 7).all()
    (tmp_path / "²2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match="none of JPEG, PNG"):
        read_clips(tmp_path, Wanted(3, (4, 4)))
    Image.new("1", (6_000, 6_000)).save(tmp_path / "²2.png")
    with pytest.raises(DataError, match="more than max_pixels"):
        read_clips(tmp_path, Wanted(3, (4, 4)))
    Image.new("1", (70_000, 1)).save(tmp_path / "long.apng", "PNG")
    with pytest.raises(DataError, match="or a side longer than 65535"):
        read_clips(tmp_path / "long.apng", Wanted(3, (4, 4)))


def test_captions_beside_the_files_are_for_all_of_them(tmp_path):
    save(tmp_path / "a.gif", 3)
    save(tmp_path / "b.gif", 3)
    (tmp_path / "captions.json").write_text(json.dumps({"a.gif": "a fish"}))
    with pytest.raises(DataError, match=r"lacks captions for b\.gif"):
        list_clips(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"a.gif": "a fish", "b.gif": "two"}))
    assert [caption for _, caption in list_clips(tmp_path)] == ["a fish", "two"]
    (tmp_path / "captions.json").unlink()
    assert [caption for _, caption in list_clips(tmp_path)] == [None, None]


def test_folders_without_clips_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list_clips(tmp_path / "no")
    with pytest.raises(DataError, match="holds no clips"):
        list_clips(tmp_path)
    save(tmp_path / "a.gif", 2)
    with pytest.raises(DataError, match="none of its 1 files can be used"):
        write_clips(tmp_path, tmp_path / "out", Wanted(3, (8, 8)))


def write_video(path, n, *, size=(34, 22), audio=False):
    from fractions import Fraction

    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        if audio:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        else:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            for k in range(n):
                pixels = np.full((size[1], size[0], 3), 20 * k, np.uint8)
                pixels[: size[1] // 2] = 255  # the upper half is white
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 10)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_videos_are_decoded_and_damaged_ones_say_so(tmp_path):
    write_video(tmp_path / "a.mp4", 8)
    clips = read_clips(tmp_path / "a.mp4", Wanted(4, (16, 16), 1))
    assert len(clips) == 2 and abs(int(clips[1][0, 14, 8, 0]) - 80) < 6
    assert clips[0][:, 2, 8, 0].min() > 240
    write_video(tmp_path / "sound.mp4", 0, audio=True)
    with pytest.raises(DataError, match="has no video stream"):
        read_clips(tmp_path / "sound.mp4", Wanted(4, (16, 16)))
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4: (cannot be decoded|has no video)"):
        read_clips(tmp_path / "cut.mp4", Wanted(4, (16, 16)))


def test_a_phone_held_upright_gives_upright_frames(tmp_path):
    write_video(tmp_path / "a.mp4", 4, size=(32, 32))
    content = (tmp_path / "a.mp4").read_bytes()
    # The matrix of the track header: one, then a quarter turn.
    one, turn = 1 << 16, (-1) & 0xFFFFFFFF
    plain = b"".join(n.to_bytes(4, "big") for n in (one, 0, 0, 0, one, 0, 0, 0, 1 << 30))
    quarter = (0, one, 0, turn << 16 & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30)
    turned = b"".join(n.to_bytes(4, "big") for n in quarter)
    track = content.index(b"tkhd")
    at = content.index(plain, track)
    (tmp_path / "b.mp4").write_bytes(content[:at] + turned + content[at + len(turned) :])
    (clip,) = read_clips(tmp_path / "b.mp4", Wanted(4, (32, 32), 1))
    # The matrix turns clockwise: what was above is on the right.
    assert clip[0, 16, 28, 0] > 240 > 100 > clip[0, 16, 4, 0]
