"""Reads a picture file as grey levels."""

import contextlib
import math
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mnist_jax.atomic_io import user_path
from mnist_jax.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
MAX_BYTES = 100_000_000
MAX_SIDE = 1024  # pixels; larger pictures are reduced, one digit needs no more


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture as grey levels, (height, width) float32 from 0 (black) to 255 or less.

    The file's content determines the format, not its name; of several frames the first is read.
    Colours become their luma (ITU-R BT.601). Those of more than 8 bits keep their precision; the
    darkest becomes 0. The EXIF orientation is applied. A picture with a side of over `MAX_SIDE` is
    reduced.

    Raises DataError if the file cannot be read, is not a picture, is damaged or too large.
    """
    file = user_path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has over {MAX_BYTES:,} bytes")
        if not file.is_file():  # opening a pipe would block
            kind = "a folder without pictures" if file.is_dir() else "no regular file"
            raise DataError(f"{path} is {kind}; allowed are {', '.join(FORMATS)}")
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities that do not prevent reading
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 89 million pixels
            picture = Image.open(BytesIO(data), formats=FORMATS)
            picture.draft("L", (MAX_SIDE, MAX_SIDE))  # lets the JPEG decoder reduce
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF data in an intact picture
                ImageOps.exif_transpose(picture, in_place=True)
            picture = _to_grey(picture)
            picture = picture.reduce(max(1, math.ceil(max(picture.size) / MAX_SIDE)))
    except Image.UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise DataError(f"{path} is not a picture; allowed are {allowed}") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types
        raise DataError(f"{path} cannot be decoded: {error}") from error
    return np.asarray(picture, np.float32)


def _to_grey(picture: Image.Image) -> Image.Image:
    """An image of any mode as one of mode L or F, with levels from 0 to 255."""
    if picture.mode[0] in "IF":  # up to 16 bits, many cameras use 10 to 14; or floats, often 0 to 1
        levels = np.asarray(picture).astype(np.float32)
        if not np.isfinite(levels).all():
            raise ValueError("not all of its levels are finite")
        levels -= levels.min()  # the digit may use a narrow range
        top = levels.max()  # of floats from 0 to 1 slightly more, after a filter
        white = max(1 if top < 2 else 255, top)
        return Image.fromarray(levels * (255 / white))
    if not picture.has_transparency_data:
        return picture.convert("L")
    picture = picture.convert("RGBA")
    grey, alpha = picture.convert("L"), picture.getchannel("A")
    cover = np.asarray(alpha)
    ink = np.asarray(grey)[cover >= cover.max() / 2]
    backdrop = 255 if np.median(ink) < 128 else 0  # white behind dark ink, black behind bright ink
    return Image.composite(grey, Image.new("L", picture.size, backdrop), alpha)
