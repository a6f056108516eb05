"""Turns a person's picture of a digit into a 28×28 image like those of MNIST.

    file → read_image: grey levels → to_mnist: the digit, white on black, 28×28

MNIST's digits fill "a 20x20 pixel box while preserving their aspect ratio" and have their center of
mass at the center of a 28×28 image (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/).
An image of MNIST itself comes out nearly unchanged.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from numpy.polynomial import polynomial
from PIL import Image
from PIL.Image import Resampling

from mnist_jax.errors import DataError
from mnist_jax.inference.read_image import read_image

SIZE, BOX = 28, 20  # pixels: side of an image, and of the box in it that a digit fills

MIN_CONTRAST = 24  # grey levels between the background and the strongest ink
MIN_SIDE = 5  # pixels of a digit's longer side
LINE = 0.95  # a line fills this share of the picture's width or height
SPECK = 0.02  # components with a smaller share of the digit's area are dirt
# Stroke widths in pixels of the 28×28 image: nearly all of MNIST exceeds the first.
THIN_STROKE, TYPICAL_STROKE = 1.6, 2.0


class Digit(NamedTuple):
    """The digit found in a picture."""

    image: np.ndarray  # (28, 28, 1) uint8, white on black, as MNIST would hold it
    warning: str = ""  # why the digit may be misread


def read_digit(path: str | Path) -> Digit:
    """`to_mnist(read_image(path))`; the message of a DataError names the file."""
    grey = read_image(path)
    try:
        return to_mnist(grey)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def to_mnist(grey: np.ndarray) -> Digit:
    """Finds the digit in a picture, as from `read_image`, and brings it into MNIST's form.

    The background may have any tone, darker or brighter than the ink, and uneven but smooth
    lighting; or it may be a sheet of paper on a table. Lines much fainter than the ink, as on
    squared paper, are ignored, and so are two or more level or upright lines through the whole
    picture, boxes and circles around the digit, and an underline. Of several digits the largest is
    taken that does not touch the picture's edge; parts slightly detached from a digit belong to it.
    Strokes as thin as a ballpoint's are widened to MNIST's typical width.

    Raises DataError if nothing stands out from the background.
    """
    grey = _without_margin(np.asarray(grey, np.float32))
    ink, noise = _subtract_background(grey)
    lowest = max(5 * noise, MIN_CONTRAST / 3)
    candidates = ink[ink > lowest]
    if np.max(candidates, initial=0) < MIN_CONTRAST:
        raise DataError("no digit found: nothing stands out from the background")
    # Slightly below Otsu's threshold, because MNIST's bounding boxes include the faint pixels at
    # the edge of a stroke.
    mask = ink > max(0.8 * _otsu(candidates), lowest)
    if (sheet := _sheet(grey, mask)) is not None:
        return to_mnist(sheet)
    own, others = _find_digit(_without_lines(mask))
    (place,) = scipy.ndimage.find_objects(own.astype(int))
    warning = "the digit touches the picture's edge" if _edge(own).any() else ""
    if _is_enclosed(own[place]):
        warning = "a box or a circle seems to touch the digit"
    if others:
        warning = f"the picture seems to hold {others + 1} digits; the largest is used"
    return Digit(_normalize(np.maximum(ink - 2 * noise, 0), own), warning)


def _subtract_background(grey: np.ndarray) -> tuple[np.ndarray, float]:
    """The ink at every pixel, positive where it stands out, and the noise's standard deviation."""
    background = _background(grey)
    # Lighting scales ink and background alike, so the difference is relative to the background.
    light = np.maximum(background, 0) + 20  # black has no tone to divide by
    ink = (grey - background) * (light.mean() / light)
    if np.sum(ink * ink * ink) < 0:  # negative skew: bright background, dark ink
        ink = -ink
    # Normal noise: neighbours differ by 0.9539 standard deviations in the median.
    noise = np.median(np.abs(np.diff(ink))) / 0.9539 if ink.shape[1] > 1 else 0.0
    return ink, float(noise)


def _background(grey: np.ndarray) -> np.ndarray:
    """The background's tone at every pixel.

    A polynomial in x and y of total degree 0, 1 or 2 is fitted to a grid of at most 24×24 pixels by
    least absolute deviations, with iteratively reweighted least squares: as long as ink is the
    minority, it hardly matters. Pixels at the picture's edge, where ink is rare, weigh more. A
    higher degree must explain a tenth more of the pixels, because a curved fit can follow a digit.
    """
    y, x = (np.linspace(-1, 1, size) for size in grey.shape)
    rows, columns = (np.linspace(0, size - 1, min(size, 24)).astype(np.intp) for size in grey.shape)
    sample = grey[np.ix_(rows, columns)].astype(np.float64)
    weight = np.ones_like(sample)
    weight[[0, -1]] = weight[:, [0, -1]] = 20
    terms = polynomial.polyvander2d(*np.meshgrid(y[rows], x[columns], indexing="ij"), (2, 2))
    sample, weight, terms = sample.ravel(), weight.ravel() / weight.sum(), terms.reshape(-1, 9)

    # Coefficients of y^i x^j at index 3 i + j; begin with the weighted median.
    fit, order = np.zeros(9), np.argsort(sample)
    fit[0] = sample[order[np.searchsorted(np.cumsum(weight[order]), 0.5)]]
    best, explained = fit.copy(), weight[np.abs(sample - fit[0]) < 10].sum()
    for degree in ([0, 1, 3], [0, 1, 2, 3, 4, 6]):
        if explained > 0.9:
            break
        for _ in range(6):
            weighted = terms[:, degree].T * (weight / np.maximum(np.abs(sample - terms @ fit), 1))
            fit[degree] = np.linalg.lstsq(weighted @ terms[:, degree], weighted @ sample)[0]
        share = weight[np.abs(sample - terms @ fit) < 10].sum()
        if share > explained + 0.1:
            best, explained = fit.copy(), share
    return polynomial.polygrid2d(y, x, best.reshape(3, 3)).astype(np.float32)


def _without_margin(grey: np.ndarray) -> np.ndarray:
    """The picture without bars of another tone at its edges, as of a frame.

    A bar that something but straight lines touches may belong to a digit, and stays.
    """
    page, cropped = np.median(grey), grey
    for _ in range(4):  # a quarter turn for each edge
        rows = cropped[: len(cropped) // 8]
        tone = np.median(rows, axis=1, keepdims=True)
        is_bar = np.abs(tone[:, 0] - page) > 2 * MIN_CONTRAST
        is_bar &= (np.abs(rows - tone) < MIN_CONTRAST).mean(1) > 0.8
        cropped = np.rot90(cropped[np.argmin(is_bar) if len(rows) else 0 :])
    ink = np.abs(cropped - page) > 2 * MIN_CONTRAST
    for axis in (0, 1):
        ink &= ink.mean(axis, keepdims=True) <= LINE
    return cropped if ink.any() and not _edge(ink).any() else grey


def _edge(pixels: np.ndarray) -> np.ndarray:
    """The outermost rows and columns."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _sheet(grey: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The picture of a sheet of paper alone, if it shows one on a table; its tone surrounds it.

    A sheet is a filled rectangle, at any angle, with something on it.
    """
    labels, _ = scipy.ndimage.label(mask)
    own = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    filled = scipy.ndimage.binary_fill_holes(own)
    outline = np.argwhere(filled & ~scipy.ndimage.binary_erosion(filled))
    angles = np.radians(np.arange(0, 180, 3))
    spans = np.ptp(outline @ np.array([np.sin(angles), np.cos(angles)]), axis=0) + 1
    rectangle = (spans[:30] * spans[30:]).min()  # the smallest around it
    if (
        filled.sum() < 0.85 * max(rectangle, mask.size / 9)
        or not 0.7 < own.sum() / filled.sum() < 1
    ):
        return None
    inside = scipy.ndimage.binary_erosion(filled, iterations=2 + max(mask.shape) // 100)
    (place,) = scipy.ndimage.find_objects(filled.astype(int))
    return np.where(inside, grey, np.median(grey[own]))[place]


def _without_lines(mask: np.ndarray) -> np.ndarray:
    """The ink without parallel lines through the whole picture, but with strokes that cross them.

    A single line, and lines between strokes that reach their ends, may be the bars of a digit that
    fills the picture, and stay.
    """
    for axis in (0, 1):
        kept, lines = mask.copy(), 0
        across = np.moveaxis(kept, axis, 0)
        labels, _ = scipy.ndimage.label(mask.mean(1 - axis) > LINE)
        for (line,) in scipy.ndimage.find_objects(labels):
            thickness = line.stop - line.start
            if line.start > 0 and line.stop < len(across) and thickness <= max(mask.shape) / 12:
                across[line] &= across[line.start - 1] & across[line.stop]
                lines += 1
        ends = across.shape[1] // 20 + 1
        if lines > 1 and not across[:, :ends].any() and not across[:, -ends:].any():
            mask = kept
    return mask


def _boxes(labels: np.ndarray) -> list[int]:
    """The labels of rectangles and circles that are drawn around something."""
    found, (_, sides, top, bottom, left, right) = [], _measure(labels)
    heights = bottom - top
    for label in np.flatnonzero(sides > max(labels.shape) / 4).tolist():
        part = labels[top[label] : bottom[label], left[label] : right[label]]
        is_inside = part != label
        if _straight_sides(part == label) < 3:  # no rectangle, which may be open
            is_inside &= scipy.ndimage.binary_fill_holes(part == label)
        if heights[part[is_inside]].max(initial=0) > 0.2 * len(part):  # more than a dot in a 0
            found.append(label)
    return found


def _is_enclosed(digit: np.ndarray) -> bool:
    """Whether a box or a circle seems to be part of a digit, bool: it has ink deep inside.

    Deeper than two strokes, over 0.4 of its size: digits printed in 90 fonts have at most 0.37.
    """
    padded = np.pad(digit, 1)
    depth = scipy.ndimage.distance_transform_edt(scipy.ndimage.binary_fill_holes(padded))
    deep = np.argwhere(padded & (depth > 2 * _stroke_width(digit)))
    return bool(len(deep)) and np.ptp(deep, axis=0).max() > 0.4 * max(digit.shape)


def _stroke_width(own: np.ndarray) -> float:
    """The mean width in pixels of the strokes of a digit, bool."""
    outline = own.sum() - scipy.ndimage.binary_erosion(own, np.ones((3, 3))).sum()
    return float(2 * own.sum() / outline)  # as area = length · width


def _straight_sides(part: np.ndarray) -> int:
    """On how many of its four sides a region, bool, has a straight line."""
    quarters = [np.array_split(part.mean(axis) > 0.8, 4) for axis in (0, 1)]
    return sum(bool(parts[end].any()) for parts in quarters for end in (0, -1))


def _otsu(values: np.ndarray) -> float:
    """The threshold with the largest variance between the two classes (Otsu, 1979)."""
    low = values.min()
    high = max(values.max(), low + 1)  # one tone: float32 may have no 256 levels within it
    counts, edges = np.histogram(values, 256, (low, high))
    below, sums = np.cumsum(counts, dtype=float), np.cumsum(counts * edges[:-1])
    total = below[-1]
    between = (sums[-1] * below - total * sums) ** 2 / np.maximum(below * (total - below), 1)
    # Between two tones without noise all levels tie: the middle of them.
    ties = np.flatnonzero(between[:-1] >= between[:-1].max() * (1 - 1e-9))
    return float(edges[ties[len(ties) // 2] + 1])


def _measure(labels: np.ndarray) -> np.ndarray:
    """Area in pixels, longer side, top, bottom, left and right of the regions, (6, labels) int.

    They stand at the label's index; the background, label 0, has zeros.
    """
    boxes = scipy.ndimage.find_objects(labels)
    ends = np.array([(0, 0, 0, 0), *((y.start, y.stop, x.start, x.stop) for y, x in boxes)])
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    sides = (ends[:, 1::2] - ends[:, ::2]).max(1)
    return np.vstack([areas, sides, *ends.T])


def _find_digit(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Chooses the digit among the connected components of the ink.

    Components are parts of one digit, as a 5 and its bar, if the gap between them is at most a
    fifth of the main component's side vertically and a seventh horizontally.

    Returns:
        The digit's own pixels, (height, width) bool, and the number of other digits.
    """
    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    if boxes := _boxes(labels):
        labels, count = scipy.ndimage.label(mask & ~np.isin(labels, boxes), np.ones((3, 3)))
    areas, sides, top, bottom, left, right = measures = _measure(labels)
    heights, widths = bottom - top, right - left
    at_edge, longer = np.isin(np.arange(count + 1), _edge(labels)), max(mask.shape)
    large = np.flatnonzero(sides >= max(MIN_SIDE, longer / 50))
    if not large.size:
        raise DataError("no digit found: only specks stand out from the background")
    inside = ~at_edge & (sides >= longer / 10)
    main = max(large, key=lambda label: (inside[label], areas[label]))

    parts = areas >= SPECK * areas[main]
    # Beside a whole digit, what touches the edge is another one or the edge of the table.
    apart = parts & at_edge & inside[main]
    beside = (right <= left[main]) | (left >= right[main])
    both = np.maximum(bottom, bottom[main]) - np.minimum(top, top[main])
    apart |= parts & beside & (np.minimum(heights, heights[main]) > 0.75 * both)  # also a digit
    parts &= beside | (top < bottom[main]) | (widths <= 3 * heights)  # no underline
    kept = (parts & ~apart)[labels]
    reach = [round(sides[main] / 5) + 1, round(sides[main] / 7) + 1]
    groups = scipy.ndimage.label(scipy.ndimage.maximum_filter(kept, reach))[0] * kept
    digit = groups[labels == main][0]
    apart &= ~(at_edge & (np.minimum(heights, widths) < longer / 12))  # a line is no digit
    areas, sides, *_ = np.hstack([_measure(groups), measures[:, apart]])
    is_digit = (areas > 0.1 * areas[digit]) & (sides > 0.4 * sides[digit])
    return groups == digit, int(is_digit.sum()) - 1


def _normalize(ink: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The digit scaled and centred as MNIST's: (28, 28, 1) uint8, white on black.

    ink, own: (height, width); own is True at the digit's pixels.
    """
    # Vectors are (row, column).
    pixels = np.argwhere(own)
    corner, shape = pixels.min(0), np.ptp(pixels, axis=0) + 1  # the bounding box
    side = shape.max()
    stroke = _stroke_width(own) * BOX / side
    widen = round((TYPICAL_STROKE - stroke) / BOX * side / 2) if stroke < THIN_STROKE else 0

    # The digit's box begins at a whole pixel of the image.
    corner, shape = corner - widen, shape + 2 * widen
    scale = BOX / shape.max()
    box = np.rint(shape * scale).astype(int)
    margin = (SIZE - box) // 2
    origin = corner - margin / scale  # the image's corner in the picture
    y, x = np.floor(origin).astype(int).tolist()
    top, left = (origin - (y, x)).tolist()
    length, side = SIZE / scale, math.ceil(SIZE / scale) + 1

    def resample(picture: np.ndarray, method: Resampling) -> np.ndarray:
        square = Image.fromarray(picture.astype(np.float32)).crop((x, y, x + side, y + side))
        square = scipy.ndimage.maximum_filter(np.asarray(square), 2 * widen + 1)
        window = (left, top, left + length, top + length)
        return np.asarray(Image.fromarray(square).resize((SIZE, SIZE), method, window))

    near = scipy.ndimage.binary_dilation(resample(own, Resampling.BOX) > 0.01, np.ones((3, 3)))
    image = np.where(near, resample(ink, Resampling.HAMMING), 0)
    white = np.percentile(image[image > image.max() / 2], 90)
    image = np.rint(255 * np.clip(image / white, 0, 1)).astype(np.uint8)

    # Translation by whole pixels, as in MNIST, where every centre of mass is from 13.5 up to 14.5.
    move = np.ceil(SIZE / 2 - 0.5 - np.array(scipy.ndimage.center_of_mass(image)))
    move = np.clip(move, -margin, SIZE - box - margin)
    return scipy.ndimage.shift(image, move, order=0)[..., None]
