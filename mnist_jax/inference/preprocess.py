"""A person's picture of a digit, as MNIST would hold it.

    file → read_image: grey, within bounds → to_mnist: the digit, white on black, 28×28

MNIST's digits are, in the words of its page, "size normalized to fit in a 20x20 pixel box while
preserving their aspect ratio", grey "as a result of the anti-aliasing technique", and put into a
28×28 image "by computing the center of mass of the pixels, and translating the image so as to
position this point at the center" (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/).
An image of MNIST therefore comes out as it was, but for a pixel here and there.
"""

import functools
import math
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import polynomial

from mnist_jax import atomic_io as storage
from mnist_jax.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""How the names of files in these formats end."""
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000  # a telephone's camera has up to 50 million
MAX_SIDE = 1024  # pixels; of a larger picture so much is enough for one digit

SIZE, BOX = 28, 20  # pixels of an image, and of the box in it that a digit fills


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture as grey levels; the first frame, if it has several.

    The content decides about the format, not the name. Grey is the luminance that ITU-R BT.601
    gives to red, green and blue; CMYK and palettes are turned into these before. Of 16 bits a level
    the picture keeps all (a PNG in colour the upper 8). What is transparent shows the paper: the
    median of what is opaque where that is most of the picture and not all of one tone; otherwise
    the drawing alone is opaque, on white if it is dark and on black if it is bright. The
    orientation that a camera noted is applied. A picture with a side of more than 1,024 pixels is
    shrunk by a whole number.

    Args:
        path: of a PNG, JPEG, BMP, GIF or WebP file.

    Returns:
        (height, width) float32, from 0, black, to 255.

    Raises:
        DataError: it cannot be read, is no such picture, a damaged one, or too large.
    """
    from PIL import Image

    try:
        data = storage.read_bounded(storage.user_path(path), max_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities that do not keep it from being read
            picture = Image.open(BytesIO(data), formats=FORMATS)
            if math.prod(picture.size) > MAX_PIXELS:  # nothing is decoded yet
                raise Image.DecompressionBombError
            picture.draft("L", (MAX_SIDE, MAX_SIDE))  # a JPEG can be decoded at a fraction
            picture = _grey(_upright(picture))
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{path} is no picture that can be read; allowed are PNG, JPEG, BMP, GIF and WebP"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path} is too large; allowed are {MAX_PIXELS // 10**6} million pixels; shrink it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder stumbles over
        raise DataError(f"{path} is damaged: {error}") from error
    return np.asarray(picture, np.float32)


def _upright(picture: Any) -> Any:
    """A picture turned and flipped as its EXIF data say."""
    from PIL import ExifTags
    from PIL.Image import Transpose as To

    picture.load()
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged data beside a whole picture
        return picture
    turns = (To.FLIP_LEFT_RIGHT, To.ROTATE_180, To.FLIP_TOP_BOTTOM)
    turns = (*turns, To.TRANSPOSE, To.ROTATE_270, To.TRANSVERSE, To.ROTATE_90)
    turn = dict(enumerate(turns, start=2)).get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _grey(picture: Any) -> Any:
    """A picture in grey, on a paper where it is transparent, and shrunk if it is large."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 0..65535
        picture = Image.fromarray(np.asarray(picture).astype(np.float32) / 257)
    elif picture.has_transparency_data:
        if picture.mode != "RGBA":  # a copy may take 256 MB
            picture = picture.convert("RGBA")
        grey, alpha = picture.convert("L"), picture.getchannel("A")
        paper = Image.new("L", picture.size, _paper_behind(grey, alpha))
        picture = Image.composite(grey, paper, alpha)
    else:
        picture = picture.convert("L")
    return picture.reduce(max(1, math.ceil(max(picture.size) / MAX_SIDE)))


def _paper_behind(grey: Any, alpha: Any) -> int:
    """The grey level that a transparent picture is to be seen on; see `read_image`."""
    opaque = alpha.point([0] * 128 + [255] * 128)
    up_to = np.cumsum(grey.histogram(opaque))  # pixels, by level
    low, middle, high = np.searchsorted(up_to, up_to[-1] * np.array((0.05, 0.5, 0.95))).tolist()
    if high - low > 32 and up_to[-1] > math.prod(grey.size) / 2:
        return middle
    return 255 if middle < 128 else 0


class Digit(NamedTuple):
    """What a picture shows.

    Attributes:
        image: (28, 28, 1) uint8, the digit as MNIST would hold it, white on black.
        others: how many more digits the picture seems to hold.
    """

    image: np.ndarray
    others: int


def read_digit(path: str | Path) -> Digit:
    """`to_mnist` of a file's picture.

    Raises:
        DataError: as `read_image` and `to_mnist` say; names the file.
    """
    grey = read_image(path)
    try:
        return to_mnist(grey)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def pictures_of(path: Path) -> list[Path]:
    """A file's path itself; of a folder, those of its pictures by their names' ends, sorted.

    What is in folders within is left out, and so is what is hidden.

    Raises:
        DataError: a folder without pictures, or one that cannot be read.
    """
    try:
        if not path.is_dir():
            return [path]
        found = [
            file
            for file in sorted(path.iterdir())
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
        found = [file for file in found if not file.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not found:
        raise DataError(
            f"{path} holds no picture: no name in it ends in {', '.join(SUFFIXES)}; name files"
        )
    return found


MIN_CONTRAST = 24  # levels of 255 between the paper and the ink where it is strongest
MIN_SIDE = 5  # pixels of a digit's longer side
SPECK = 0.02  # share of the digit's area that something has to have to be looked at
THIN, USUAL = 1.6, 2.0  # pixels of MNIST: strokes narrower than nearly all of its own, and those


def to_mnist(grey: np.ndarray) -> Digit:
    """Finds the digit in a picture, and makes of it what MNIST would.

    The paper may be of any tone, darker or brighter than the ink, and lit unevenly as long as its
    tone changes smoothly; lines much fainter than the ink do not matter. Of several digits the
    largest is taken that does not touch the picture's edge; what is detached from a digit by a
    little belongs to it. Strokes as thin as a ballpoint's, which 20 pixels would hardly show, are
    widened to the usual width of MNIST's.

    Args:
        grey: (height, width), from 0, black, to 255: what `read_image` returns.

    Raises:
        DataError: nothing stands out from the paper.
    """
    ink, noise = _ink(np.asarray(grey, np.float32))
    least = max(5 * noise, MIN_CONTRAST / 3)
    candidates = ink[ink > least]
    if np.max(candidates, initial=0) < MIN_CONTRAST:
        raise DataError("no digit found: nothing stands out from the paper")
    # A little below the middle, as MNIST's boxes hold the faint pixels at a stroke's edge too; far
    # enough above the paper to leave out the lines of squared paper.
    labels, parts = _parts(ink > max(0.8 * _otsu(candidates), least))
    digit, others = _choose(parts, ink.shape)
    ink = np.maximum(ink - 2 * noise, 0)
    return Digit(_frame(ink, np.isin(labels, digit.labels), digit), others)


def _ink(grey: np.ndarray) -> tuple[np.ndarray, float]:
    """How far each pixel is from the paper, positive for ink, and the noise's standard deviation.

    Light falls on ink and paper alike, so that the difference is divided by the paper's tone (plus
    a little, for black has none).
    """
    paper, rest = _paper(grey)
    ink, light = grey - paper, np.maximum(paper, 0)
    light += 20
    ink *= light.mean()
    ink /= light
    step = math.isqrt(ink.size // 40_000) + 1
    some = ink[::step, ::step]
    if np.sum(some * some * some) < 0:  # ink is far from the paper, and noise to both sides
        np.negative(ink, out=ink)
    # Of normal noise a quarter is within 0.3186 deviations, and half of the differences between
    # neighbours within 0.9539. The first is too much where the paper is not followed exactly.
    noise = np.quantile(np.abs(rest), 0.25) / 0.3186
    if ink.shape[1] > 1:
        noise = min(noise, np.median(np.abs(np.diff(ink[:: 4 * step]))) / 0.9539)
    return ink, float(noise)


# The columns of `polyvander2d` with squares of both that are of degree 0, 1 and 2 in all.
TERMS = ((0,), (0, 1, 3), (0, 1, 2, 3, 4, 6))


def _paper(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The paper's tone under every pixel, and how far some hundreds of the pixels are from it.

    A polynomial of degree 0, 1 or 2 in x and y with the least absolute deviations, found by
    reweighted least squares: ink, as long as it is the minority, hardly moves it. At the picture's
    edge ink is rare, and pixels count more. A degree has to explain a tenth of the pixels more than
    the one below, for a paper that bends can follow a digit.
    """
    y, x = (np.linspace(-1, 1, size) for size in grey.shape)
    rows, columns = (np.linspace(0, size - 1, min(size, 24)).astype(np.intp) for size in grey.shape)
    sample = grey[np.ix_(rows, columns)].astype(np.float64)
    weight = np.ones_like(sample)
    weight[[0, -1]] = weight[:, [0, -1]] = 20
    terms = polynomial.polyvander2d(*np.meshgrid(y[rows], x[columns], indexing="ij"), (2, 2))
    sample, weight, terms = sample.ravel(), weight.ravel() / weight.sum(), terms.reshape(-1, 9)

    tone, best, explained = np.zeros(9), np.zeros(9), -1.0
    order = np.argsort(sample)
    tone[0] = sample[order[np.searchsorted(np.cumsum(weight[order]), 0.5)]]  # the median
    for of_degree in TERMS:
        chosen = terms[:, of_degree]
        for _ in range(6 if len(of_degree) > 1 else 0):
            pull = weight / np.maximum(np.abs(sample - terms @ tone), 1)
            # The ridge is for pictures that are too narrow to tell all terms apart.
            matrix = chosen.T @ (chosen * pull[:, None]) + 1e-9 * np.eye(len(of_degree))
            tone[list(of_degree)] = np.linalg.solve(matrix, chosen.T @ (sample * pull))
        share = weight[np.abs(sample - terms @ tone) < 10].sum()
        if share > explained + 0.1:
            best, explained = tone.copy(), share
        if explained > 0.9:
            break
    paper = polynomial.polyvander(y, 2) @ best.reshape(3, 3) @ polynomial.polyvander(x, 2).T
    return paper.astype(np.float32), sample - terms @ best


def _otsu(values: np.ndarray) -> float:
    """The level that divides values best into two classes (Otsu, 1979)."""
    low, high = float(values.min()), float(values.max())
    width = max(high - low, 1e-6) / 255
    count = np.bincount(((values - low) / width).astype(np.uint8), minlength=256).astype(np.float64)
    below, sums = np.cumsum(count)[:-1], np.cumsum(count * np.arange(256))
    # The variance between the classes, but for constants.
    between = (sums[-1] * below - count.sum() * sums[:-1]) ** 2
    between /= np.maximum(below * (count.sum() - below), 1)  # else 0 above as well
    return low + (int(np.argmax(between)) + 1) * width


class Part(NamedTuple):
    """Ink that hangs together, or several pieces of such. Rows and columns end before the ends."""

    labels: tuple[int, ...]
    area: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def side(self) -> int:
        """The longer one, in pixels."""
        return max(self.bottom - self.top, self.right - self.left)

    def join(self, other: "Part") -> "Part":
        """Both as one."""
        ends = zip(self[2:], other[2:], (min, max, min, max), strict=True)
        return Part(
            self.labels + other.labels, self.area + other.area, *(f(a, b) for a, b, f in ends)
        )


def _parts(mask: np.ndarray) -> tuple[np.ndarray, list[Part]]:
    """A mask's connected pixels, diagonals included: their labels, and the forty largest parts."""
    from scipy import ndimage

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3)), labels)
    areas, boxes = np.bincount(labels.ravel())[1:], ndimage.find_objects(labels)
    largest = np.argsort(-areas, kind="stable")[:40].tolist()
    return labels, [
        Part((i + 1,), int(areas[i]), y.start, y.stop, x.start, x.stop)
        for i in largest
        for y, x in [boxes[i]]
    ]


def _choose(parts: list[Part], shape: tuple[int, ...]) -> tuple[Part, int]:
    """The digit, with all that belongs to it, and how many more there are."""
    height, width = shape
    longer = max(height, width)

    def is_free(part: Part) -> bool:
        return min(part.top, part.left, height - part.bottom, width - part.right) > 0

    def is_inside(part: Part) -> bool:
        return is_free(part) and part.side >= longer / 10

    large = [part for part in parts if part.side >= max(MIN_SIDE, longer / 50)]
    if not large:
        raise DataError("no digit found: nothing but specks stands out from the paper")
    main = max(large, key=lambda part: (is_inside(part), part.area))
    parts = [part for part in parts if part.area >= SPECK * main.area]
    # Beside a digit, what touches the edge is another, or the table's edge along the picture's.
    others = [part for part in parts if is_inside(main) and not is_free(part)]
    digits: list[Part] = []
    for part in parts:
        if part not in others:
            near = [digit for digit in digits if _belong_together(digit, part)]
            digits = [digit for digit in digits if digit not in near]
            digits.append(functools.reduce(Part.join, near, part))
    digit = next(digit for digit in digits if main.labels[0] in digit.labels)
    others += [one for one in digits if one is not digit]
    return digit, sum(one.side > 0.4 * digit.side and one.area > 0.1 * digit.area for one in others)


def _belong_together(a: Part, b: Part) -> bool:
    """Whether two parts are of one digit.

    Such as a 5 and its bar: one above the other, no more than a fifth of the larger's side apart;
    or beside each other, no more than a tenth apart, if one is smaller or both together are slim.
    Else they are two digits, side by side and of one size.
    """
    large, small = (a, b) if a.side >= b.side else (b, a)
    across = min(a.right, b.right) - max(a.left, b.left)  # shared columns; the gap where negative
    down = min(a.bottom, b.bottom) - max(a.top, b.top)
    if across >= (small.right - small.left) / 2:
        return -down <= large.side / 5 + 1
    both = a.join(b)
    slim = both.right - both.left < 0.75 * (both.bottom - both.top)
    return -min(across, down) <= large.side / 10 + 1 and (slim or small.side < 0.7 * large.side)


def _frame(ink: np.ndarray, own: np.ndarray, digit: Part) -> np.ndarray:
    """The digit's ink, where `own` says that it is the digit's, as MNIST's (28, 28, 1) uint8."""
    from PIL.Image import Resampling, fromarray
    from scipy import ndimage

    rows, columns = slice(digit.top, digit.bottom), slice(digit.left, digit.right)
    inner = ndimage.binary_erosion(own[rows, columns], np.ones((3, 3))).sum()
    stroke = 2 * digit.area / (digit.area - inner) * BOX / digit.side  # area by half the outline
    more = round((USUAL - stroke) / BOX * digit.side / 2) if stroke < THIN else 0  # to each side

    # The square of the picture that becomes the image: the digit's box begins at a whole pixel.
    scale = BOX / (digit.side + 2 * more)
    boxes = [round((s.stop - s.start + 2 * more) * scale) for s in (rows, columns)]  # of the image
    begins = [(SIZE - box) // 2 for box in boxes]
    top, left = digit.top - more - begins[0] / scale, digit.left - more - begins[1] / scale
    y, x, size = math.floor(top), math.floor(left), math.ceil(SIZE / scale) + 1
    window = (left - x, top - y, left - x + SIZE / scale, top - y + SIZE / scale)

    def seen(picture: np.ndarray, resampling: Resampling) -> np.ndarray:
        square = _cut(picture.astype(np.float32), y, x, size)
        if more:
            square = ndimage.maximum_filter(square, 2 * more + 1)
        return np.asarray(fromarray(square).resize((SIZE, SIZE), resampling, window))

    near = ndimage.binary_dilation(seen(own, Resampling.BOX) > 0.01, np.ones((3, 3)))
    image = np.where(near, seen(ink, Resampling.HAMMING), 0)
    strong = image[image > image.max() / 2]
    image = np.rint(255 * np.clip(image / np.percentile(strong, 90), 0, 1)).astype(np.uint8)

    # As for MNIST by whole pixels: every centre of mass there is from 13.5 up to 14.5.
    centres = [np.arange(SIZE) @ image.sum(axis) / image.sum() for axis in (1, 0)]
    moves = [math.ceil(SIZE / 2 - 0.5 - centre) for centre in centres]
    moves = [
        min(max(move, -begin), SIZE - box - begin)
        for move, begin, box in zip(moves, begins, boxes, strict=True)
    ]
    return _cut(image, -moves[0], -moves[1], SIZE)[..., None]


def _cut(picture: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """A square of a picture, 0 where it is beyond the picture's edge."""
    square = np.zeros((size, size), picture.dtype)
    height, width = picture.shape
    rows = slice(max(top, 0), max(min(top + size, height), 0))
    columns = slice(max(left, 0), max(min(left + size, width), 0))
    inside = picture[rows, columns]
    y, x = rows.start - top, columns.start - left
    square[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return square
