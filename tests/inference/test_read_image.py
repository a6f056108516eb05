"""Picture files of every kind become grey levels, or one line."""

import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mnist_jax.errors import DataError
from mnist_jax.inference.read_image import read_image

GREY = np.full((20, 30), 230, np.uint8)
GREY[5:15, 10:13] = 20
INK = np.where(GREY < 100, 255, 0).astype(np.uint8)
L = Image.fromarray(GREY)
RGB = L.convert("RGB")
WEBP = {"lossless": True}


def with_alpha(tone: int, alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    picture = Image.new(mode, (30, 20), (tone,) * (len(mode) - 1) + (0,))
    picture.putalpha(Image.fromarray(alpha))
    return picture


@pytest.mark.parametrize(
    ("picture", "name", "options", "paper", "ink"),
    [
        (L, "x.bmp", {}, 230, 20),
        (L, "x.webp", WEBP, 230, 20),
        (L, "a PNG.jpg", {"format": "PNG"}, 230, 20),
        (L, "the first of two.gif", {"save_all": True, "append_images": [RGB]}, 230, 20),
        (RGB, "x.png", {}, 230, 20),
        (RGB.quantize(4), "x.png", {}, 230, 20),
        (L.convert("1", dither=Image.Dither.NONE), "1 bit.png", {}, 255, 0),
        # Of more than 8 bits the darkest level becomes 0, and the brightest 255 unless it is near.
        (Image.fromarray(GREY.astype(np.uint16) * 257 + 64), "16 bits.png", {}, 255, 0),
        (Image.fromarray(GREY.astype(np.uint16) + 60_000), "narrow, 16 bits.png", {}, 210, 0),
        (Image.fromarray(np.float32(GREY) / 255), "floats to 1.tiff", {}, 210, 0),
        (Image.fromarray(np.float32(GREY) / 204), "floats to 1.13.tiff", {}, 255, 0),
        # Transparent pixels show white paper behind dark ink, and black behind bright ink.
        (with_alpha(0, INK), "x.png", {}, 255, 0),
        (with_alpha(255, INK, "LA"), "x.png", {}, 0, 255),
        (with_alpha(255, INK // 3), "faint.png", {}, 0, 85),
        (with_alpha(0, INK // 2), "half transparent.png", {}, 255, 128),
        (with_alpha(0, INK // 255 * 254), "nearly opaque.webp", WEBP, 255, 1),
        (L.convert("P"), "palette.png", {"transparency": 230}, 255, 20),
        (L, "grey level.png", {"transparency": 230}, 255, 20),
        (RGB, "colour.png", {"transparency": (230, 230, 230)}, 255, 20),
    ],
)
def test_every_format_and_mode_gives_grey_levels(picture, name, options, paper, ink, tmp_path):
    picture.save(path := tmp_path / name, **options)
    grey = read_image(path)
    assert (grey.shape, grey.dtype) == ((20, 30), np.float32)
    tolerance = 0.01 if "16 bits" in name else 2
    np.testing.assert_allclose(grey, np.where(INK, ink, paper), atol=tolerance)


def test_the_exif_orientation_is_applied_and_damaged_data_are_ignored(tmp_path):
    """The standard says where the 0th row and the 0th column of the stored picture are shown."""
    upright = GREY, GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1]
    on_its_side = GREY.T, GREY.T[::-1], GREY[::-1, ::-1].T, GREY.T[:, ::-1]
    for orientation, stored in enumerate((*upright, *on_its_side)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
        assert (read_image(tmp_path / "x.png") == GREY).all(), orientation
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0what is this"):
        L.save(path := tmp_path / "x.jpg", exif=exif)
        assert read_image(path).shape == (20, 30)


def test_a_large_picture_is_reduced(tmp_path):
    large = np.kron(GREY, np.ones((100, 100), np.uint8))  # 2000 × 3000
    for name in ("x.png", "x.jpg"):
        Image.fromarray(large).save(path := tmp_path / name)
        height, width = (grey := read_image(path)).shape
        assert 600 < height < width <= 1024
        dark = grey[height * 9 // 20, width * 11 // 30]
        assert (grey[0, 0], dark) == pytest.approx((230, 20), abs=3)


def encoded(kind: str) -> bytes:
    L.save(file := BytesIO(), kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a picture; allowed are PNG, JPEG, BMP, GIF"),
        (lambda path: path.write_bytes(encoded("PPM")), "is not a picture"),
        (lambda path: path.write_bytes(encoded("PNG")[:60]), "cannot be decoded"),
        (lambda path: Image.new("1", (9500, 9500)).save(path), "exceeds limit"),  # a few kB
        (lambda path: Image.new("F", (9, 9), np.nan).save(path, "TIFF"), "not all .* are finite"),
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a folder without pictures; allowed are PNG, "),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: os.truncate(path, path.write_bytes(b"") or 10**12), "100,000,000 bytes"),
    ],
)
def test_an_unreadable_file_is_refused(make, message, tmp_path):
    make(path := tmp_path / "x.png")
    with pytest.raises(DataError, match=f"x.png.*{message}"):
        read_image(path)
