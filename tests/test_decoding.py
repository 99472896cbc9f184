"""Decoding as ADM does, its centre crop, flips that depend on the record alone."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from eqxldm.data import DataError, center_crop, decode_and_crop, decode_image, flip_mask


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def box_halved(image):
    """The mean of each 2 x 2 block of the even part, rounded as Pillow rounds: half up."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    blocks = image[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).astype(int)
    return ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_powers_of_two_are_means_of_blocks(steps):
    """A 16 x 16 crop of an even multiple of 16 needs no bicubic step: it is the identity."""
    image = pixels(16 * 2**steps, 24 * 2**steps)
    halved = image
    for _ in range(steps):
        halved = box_halved(halved)
    cropped = center_crop(image, 16)
    assert np.abs(cropped.astype(int) - halved[:, 4:20]).max() <= steps  # sums in two passes


def reference_crop(image, size):
    """The description step by step, on arrays: for every step one call of Pillow."""
    height, width = image.shape[:2]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


SIDES = [
    (20, 20),
    (37, 53),
    (53, 37),
    (31, 200),
    (200, 63),
    (64, 64),
    (127, 128),
    (9, 14),
    (33, 32),
]


@pytest.mark.parametrize("sides", SIDES)
def test_the_crop_is_adms(sides):
    image = pixels(*sides)
    cropped = center_crop(image, 16)
    assert cropped.shape == (16, 16, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, reference_crop(image, 16))
    content = encoded(Image.fromarray(image), "JPEG")
    np.testing.assert_array_equal(
        decode_and_crop(content, 16), center_crop(decode_image(content), 16)
    )


def test_odd_remainders_are_cut_low():
    """Of 5 columns too many, 2 are cut left and 3 right; rows likewise."""
    wide = np.repeat(np.arange(21, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)
    assert center_crop(wide, 16)[0, :, 0].tolist() == list(range(2, 18))
    assert center_crop(wide.transpose(1, 0, 2).copy(), 16)[:, 0, 0].tolist() == list(range(2, 18))


RGB = Image.fromarray(pixels(6, 5))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_come_back(kind):
    np.testing.assert_array_equal(decode_image(encoded(RGB, kind)), np.array(RGB))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_files_are_what_pillow_says(kind):
    content = encoded(RGB, kind)
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(content), expected)


def first(image, kind="PNG", **options):
    return decode_image(encoded(image, kind, **options))[0, 0].tolist()


def test_other_modes_are_converted():
    assert first(Image.new("L", (2, 2), 9)) == [9, 9, 9]
    assert first(Image.new("1", (2, 2), 1)) == [255, 255, 255]
    assert first(Image.new("LA", (2, 2), (9, 3))) == [9, 9, 9]
    assert first(Image.new("RGBA", (2, 2), (9, 8, 7, 0))) == [9, 8, 7]  # dropped, not blended
    assert first(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF") == [0, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert first(palette) == [4, 5, 6]
    assert first(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG") == [0, 0, 0]


def test_sixteen_bits_keep_the_high_byte():
    deep = Image.fromarray(np.array([[0, 255, 256, 40000, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(deep, kind))[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_the_orientation_tag_is_ignored_as_in_adm():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    assert decode_image(encoded(RGB, "JPEG", exif=exif)).shape == (6, 5, 3)


GOOD = encoded(Image.fromarray(pixels(64, 64)), "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        GOOD[:10],
        GOOD[: len(GOOD) // 2],
        encoded(RGB)[:60],
        GOOD[:200] + bytes(99),
    ],
)
def test_unreadable_images_are_named(content):
    with pytest.raises(DataError, match=rf"n01/x\.JPEG: cannot be decoded \({len(content)} bytes"):
        decode_and_crop(content, 8, name="n01/x.JPEG")


def test_an_image_that_would_fill_the_memory_is_refused():
    header = encoded(Image.new("1", (8, 8)))
    huge = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(huge)


def test_flips_depend_on_seed_epoch_and_record_alone():
    n = 4000
    records, zeros = np.arange(n), np.zeros(n, int)
    masks = [flip_mask(s, zeros + e, records) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1), (7, 3)]]
    shuffled = np.random.default_rng(0).permutation(n)
    np.testing.assert_array_equal(flip_mask(0, zeros, shuffled), masks[0][shuffled])
    assert flip_mask(0, zeros[:1], records[5:6])[0] == masks[0][5]
    # Fair, and independent of one another: 5 sigma of a fair coin, of runs in a row too.
    bound = 5 * 0.5 / np.sqrt(n)
    for k, mask in enumerate(masks):
        assert abs(mask.mean() - 0.5) < bound
        assert abs((mask[1:] == mask[:-1]).mean() - 0.5) < bound
        for other in masks[:k]:
            assert abs((mask == other).mean() - 0.5) < bound


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (30, 8), (7, 64)])
def test_crops_that_are_not_square_fill_both_sides(size):
    """Of an image of the same shape nothing is cut; of others the middle of the longer side."""
    h, w = size
    image = pixels(h * 2, w * 2)
    means = image.reshape(h, 2, w, 2, 3).mean((1, 3))
    assert np.abs(center_crop(image, size) - means).max() <= 1
    wide = np.concatenate(
        [np.zeros((h, w, 3), np.uint8), pixels(h, w), np.zeros((h, w, 3), "u1")], 1
    )
    np.testing.assert_array_equal(center_crop(wide, size), wide[:, w : 2 * w])
    with pytest.raises(ValueError, match="at least 1, got 0 x 4"):
        center_crop(image, (0, 4))


@pytest.mark.parametrize("shape", [(4000, 1), (1, 65_000), (30_000, 3)])
def test_lines_take_no_more_than_their_crop(shape):
    """Enlarged first and cut then, 1 x 4000 pixels are 256 x 1,024,000: 0.8 GB."""
    image = Image.fromarray(np.full((*shape, 3), 77, np.uint8))
    begin = time.perf_counter()
    cropped = decode_and_crop(encoded(image), 256)
    assert time.perf_counter() - begin < 2
    assert cropped.shape == (256, 256, 3) and np.all(cropped == 77)


def test_elongated_images_are_cut_in_the_middle():
    ramp = np.arange(2000, dtype=np.float32)[None, :, None].repeat(10, 0).repeat(3, 2)
    ramp = (ramp / 8).astype(np.uint8)
    # 200 : 1, more than the bound of 16: within the rounding of the plain way.
    assert np.abs(center_crop(ramp, 32).astype(int) - reference_crop(ramp, 32)).max() <= 1


def test_no_other_format_is_tried():
    """Pillow hands an EPS file, whatever its name, to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(DataError, match=r"x\.png: .*it is none of JPEG, PNG, WEBP"):
        decode_image(eps, name="x.png")


def test_the_most_pixels_are_an_option():
    content = encoded(Image.new("L", (30, 20)))
    assert decode_image(content, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(DataError, match="30 x 20 pixels are more than max_pixels, 599"):
        decode_image(content, max_pixels=599)


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1)])
def test_sides_longer_than_any_picture_has_are_refused(size):
    """Pillow takes seconds and much memory for millions of rows of a pixel or two."""
    with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels: no side may be longer"):
        decode_image(encoded(Image.new("L", size)))


def test_integers_of_32_bits_are_pixels_where_they_fit():
    image = lambda values: encoded(Image.fromarray(np.array(values, np.int32)), "TIFF")
    assert decode_image(image([[0, 7, 255]]))[0, :, 1].tolist() == [0, 7, 255]
    for values in ([[0, 256]], [[-1, 9]], [[0, 2**30]]):
        with pytest.raises(DataError, match=r"integers of 32 bits go from .* save it with 8 or 16"):
            decode_image(image(values))
    floats = encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")
    with pytest.raises(DataError, match="its pixels are floats"):
        decode_image(floats)


def test_sixteen_bits_of_a_pgm_keep_the_high_byte():
    content = b"P5 3 1 65535\n" + np.array([255, 256, 65535], ">u2").tobytes()
    assert decode_image(content)[0, :, 0].tolist() == [0, 1, 255]


def test_one_channel_is_luma_and_four_are_opaque():
    image = pixels(5, 6)
    grey = decode_image(encoded(Image.fromarray(image)), 1)
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (5, 6, 1) and np.abs(grey[..., 0] - luma).max() <= 1
    opaque = decode_image(encoded(Image.fromarray(image)), 4)
    np.testing.assert_array_equal(opaque, np.dstack([image, np.full((5, 6), 255)]))
    with pytest.raises(ValueError, match="an image file gives 1 to 4, asked for are 5"):
        decode_image(encoded(RGB), 5)
