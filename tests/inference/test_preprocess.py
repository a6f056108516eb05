"""A person's picture becomes an image like MNIST's."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from mnist_jax import load_dataset
from mnist_jax.errors import DataError
from mnist_jax.inference.preprocess import Digit, to_mnist


@pytest.fixture(scope="module")
def real(split) -> list[tuple[np.ndarray, Digit]]:
    """Four of each of scikit-learn's digits: (28, 28) float32, white on black, and read."""
    chosen = [split.image[split.label == digit][:4, ..., 0] for digit in range(10)]
    return [(image, to_mnist(image)) for image in np.concatenate(chosen).astype(np.float32)]


def seven(size: int = 100, pen: int = 10, at: tuple[int, int] = (30, 20)) -> np.ndarray:
    """A 7 of half the picture's size in black on white: (size, size) float32."""
    picture = Image.new("L", (size, size), 255)
    (x, y), long = at, size // 2
    corners = [(x, y), (x + long * 2 // 3, y), (x + long // 4, y + long)]
    ImageDraw.Draw(picture).line(corners, 0, pen, joint="curve")
    return np.asarray(picture, np.float32)


def larger(image: np.ndarray, times: float) -> np.ndarray:
    side = round(len(image) * times)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def difference(a: Digit, b: Digit) -> float:
    """Mean absolute difference, in levels of 255."""
    return float(np.abs(a.image.astype(float) - b.image).mean())


EDGES = [(0, 0, 199, 0), (199, 0, 199, 199), (0, 199, 199, 199), (0, 0, 0, 199)]
BOX = [(30, 20, 160, 20), (160, 20, 160, 170), (30, 170, 160, 170), (30, 20, 30, 170)]
RULED = [(0, y, 199, y) for y in (25, 62, 99, 136, 173)]
RING = [(100 + 92 * math.cos(a / 9), 100 + 98 * math.sin(a / 9)) for a in range(58)]
LINED = {
    "circle": ([(*a, *b) for a, b in itertools.pairwise(RING)], 0, 5),
    "underline": ([(40, 182, 150, 179)], 0, 6),
    "box": (BOX, 0, 4),
    "grey box": (BOX, 130, 4),
    "three sides": (BOX[:3], 0, 4),
    "cells": ([(x, 0, x, 199) for x in (20, 180)] + [(0, y, 199, y) for y in (10, 190)], 0, 3),
    "margin line": ([(12, 0, 12, 199)], 0, 3),
    "line above": ([(0, 9, 199, 9)], 0, 3),
    "form": ([*BOX, (100, 170, 100, 199)], 0, 2),
    "ruled": (RULED, 0, 3),
    "faint": (RULED, 200, 2),
    "frame": (EDGES, 0, 1),
    "two edges": (EDGES[2:], 0, 4),
}


@pytest.mark.parametrize(("lines", "tone", "pen"), LINED.values(), ids=LINED)
def test_lines_around_and_across_the_digit_are_not_read(lines, tone, pen):
    plain = seven(200, 20, (60, 40))
    picture = Image.fromarray(plain.astype(np.uint8))
    for line in lines:
        ImageDraw.Draw(picture).line(line, tone, pen)
    lined = np.minimum(plain, picture)  # the digit is written on the lines
    found = to_mnist(lined)
    assert (difference(found, to_mnist(plain)) < 6, found.warning) == (True, "")


@pytest.mark.parametrize(("shape", "turn"), [("ellipse", 0), ("rectangle", 0), ("rectangle", 2)])
def test_a_small_digit_is_found_in_a_large_outline(shape, turn):
    picture = ImageOps.expand(Image.fromarray(seven(180).astype(np.uint8)), 150, 255)
    plain = to_mnist(np.asarray(picture))
    getattr(ImageDraw.Draw(picture), shape)([60, 60, 420, 420], outline=0, width=4)
    found = to_mnist(np.asarray(picture.rotate(turn, fillcolor=255)))
    assert (difference(found, plain) < 12, found.warning) == (True, "")


def test_the_bars_of_a_digit_that_fills_its_picture_stay():
    four = [(70, 1, 70, 98), (1, 65, 98, 65), (1, 65, 70, 3)]
    two = [(1, 3, 98, 3), (98, 3, 1, 96), (1, 96, 98, 96)]
    clock = [(2, 3, 98, 3), (97, 3, 97, 50), (2, 50, 98, 50), (3, 50, 3, 97), (2, 96, 98, 96)]
    for strokes in (four, two, clock):
        picture = Image.new("L", (100, 100), 255)
        for stroke in strokes:
            ImageDraw.Draw(picture).line(stroke, 0, 4)
        with_margin = ImageOps.expand(picture, 40, 255)
        found, expected = (to_mnist(np.asarray(p, np.float32)) for p in (picture, with_margin))
        assert difference(found, expected) < 6


def test_the_digit_is_scaled_and_centred_like_mnist_s():
    found = to_mnist(seven())
    assert (found.image.shape, found.image.dtype, found.warning) == ((28, 28, 1), np.uint8, "")
    ink = found.image[..., 0].astype(float)
    rows, columns = np.flatnonzero(ink.max(1) > 60), np.flatnonzero(ink.max(0) > 60)
    assert np.ptp(rows) + 1 == 20
    assert np.ptp(columns) + 1 == pytest.approx(20 * 42 / 60, abs=1)  # keeps its aspect ratio
    assert ink.max() == 255 and ink[:2].max() == 0
    y, x = (ink.sum(axis) @ np.arange(28) / ink.sum() for axis in (1, 0))
    assert 13.5 <= y < 14.5 and 13.5 <= x < 14.5
    assert ink[rows[1]].sum() > ink[rows[-2]].sum()  # its bar is at the top
    heavy = np.full((100, 100), 255.0)
    heavy[10:90, 48:52] = heavy[70:90, 30:70] = 0
    assert np.ptp(np.flatnonzero(to_mnist(heavy).image.max((1, 2)) > 60)) + 1 == 20  # not cut off


@pytest.mark.mnist
def test_mnist_s_own_images_come_out_nearly_unchanged(mnist_dir, data_dir):
    image = load_dataset("mnist", data_dir=data_dir, manual_dir=mnist_dir).test.image[:500]
    found = np.array([to_mnist(one[..., 0]).image for one in image], float)
    changes = np.abs(found - image).mean((1, 2, 3))
    assert np.mean(changes) < 1
    assert np.median(changes) < 0.2


def on_paper(image: np.ndarray, ink: float, paper: float) -> np.ndarray:
    return paper + (ink - paper) * image / 255


def lit(picture: np.ndarray, least: float) -> np.ndarray:
    """Fading from full light in one corner to the share `least` in the opposite one."""
    y, x = (np.linspace(0, 1, size) for size in picture.shape)
    return picture * (1 - (1 - least) * (x + y[:, None]) / 2)


def vignetted(picture: np.ndarray) -> np.ndarray:
    y, x = (np.linspace(-1, 1, size) for size in picture.shape)
    return picture * (1 - 0.25 * (x * x + (y * y)[:, None]))


def squared(picture: np.ndarray) -> np.ndarray:
    lines = np.arange(len(picture)) % 40 // 2 == 4
    return np.where(lines | lines[:, None], np.minimum(picture, 180), picture)


def noisy(picture: np.ndarray, sd: float, salt: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(rng.random(picture.shape) < salt, 0, rng.normal(picture, sd))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: 255 - image,
        lambda image: on_paper(image, 90, 140),
        lambda image: on_paper(image, 200, 40),
        lambda image: 255 - larger(image, 20),
        lambda image: np.pad(255 - larger(image, 3), ((200, 30), (90, 400)), constant_values=255),
        lambda image: lit(on_paper(larger(image, 5), 40, 230), 0.4),
        lambda image: lit(on_paper(larger(image, 5), 230, 90), 0.4),
        lambda image: vignetted(on_paper(larger(image, 5), 40, 230)),
        lambda image: on_paper(larger(image, 5), 40, 150) + lit(np.full((140, 140), 80.0), 0),
        lambda image: squared(on_paper(larger(image, 5), 30, 240)),
        lambda image: (255 - larger(image, 4))[12:-12, 12:-12],  # little paper around the digit
        lambda image: (255 - larger(image, 4))[16:-16, 16:-16],  # none
        lambda image: noisy(on_paper(larger(image, 5), 40, 220), 6, 0),
        lambda image: noisy(on_paper(larger(image, 5), 40, 220), 0, 0.002),
    ],
)
def test_tone_light_place_size_and_noise_make_little_difference(change, real):
    for image, expected in real:
        assert difference(expected, to_mnist(change(image))) < 18


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((1, 1)),
        np.full((50, 1), 128),
        np.random.default_rng(0).normal(220, 5, (300, 200)),
        np.random.default_rng(0).uniform(0, 255, (100, 100)),
        lit(np.full((200, 200), 220.0), 0.3),
        vignetted(np.full((200, 200), 220.0)),
        noisy(np.full((300, 300), 255.0), 0, 0.002),  # dust
        np.pad(np.zeros((3, 3)), 100, constant_values=255),
    ],
    ids=str,
)
def test_a_blank_picture_is_refused(picture):
    with pytest.raises(DataError, match="no digit found"):
        to_mnist(picture)


def test_the_largest_of_several_digits_is_taken_and_they_are_counted():
    small, large = seven(), seven(140, 14, (40, 30))
    small = np.pad(small, ((0, 40), (0, 0)), constant_values=255)
    alone = to_mnist(large)
    for pictures in ((small, large), (large, small), (small, large, small)):
        found = to_mnist(np.concatenate(pictures, axis=1))
        assert difference(found, alone) < 4
        assert f"seems to hold {len(pictures)} digits; the largest is used" in found.warning
    assert "hold 2 digits" in to_mnist(np.concatenate([small, small])).warning
    wide = np.pad(large, ((0, 0), (0, 60)), constant_values=255)
    near = to_mnist(np.minimum(wide, np.roll(wide, 60, axis=1)))  # a gap as within a digit
    assert (difference(near, alone) < 4, "hold 2 digits" in near.warning) == (True, True)


@pytest.mark.parametrize("angle", [0, -20])
def test_the_digit_on_a_sheet_of_paper_on_a_table_is_found(angle):
    sheet = Image.fromarray(seven(140, 14, (40, 30)).astype(np.uint8))
    turned = sheet.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=70)
    table = Image.new("L", (350, 300), 70)
    table.paste(turned, (60, 50))
    found, alone = to_mnist(np.asarray(table)), sheet.rotate(angle, fillcolor=255)
    assert (difference(found, to_mnist(np.asarray(alone))) < 6, found.warning) == (True, "")


def test_the_parts_of_a_broken_digit_are_joined():
    five, four = (Image.new("L", (120, 120), 255) for _ in range(2))
    pen = ImageDraw.Draw(five)
    pen.line([(45, 25), (45, 55)], 0, 9)
    pen.arc((25, 48, 85, 105), 200, 160, 0, 9)
    pen.line([(54, 22), (85, 22)], 0, 9)
    pen = ImageDraw.Draw(four)
    pen.line([(45, 20), (35, 65), (68, 65)], 0, 8)
    pen.line([(78, 30), (78, 105)], 0, 8)
    for picture in (five, four):
        found = to_mnist(np.asarray(picture))
        left, top, right, bottom = ImageOps.invert(picture).getbbox()
        shape = found.image[..., 0] > 60
        high, wide = (np.ptp(np.flatnonzero(shape.any(axis))) + 1 for axis in (1, 0))
        assert (found.warning, high) == ("", 20)
        assert wide == pytest.approx(20 * (right - left) / (bottom - top), abs=1.6)


def test_specks_and_what_the_picture_s_edge_cuts_off_are_ignored_beside_a_digit():
    specks = [np.s_[y : y + 2, x : x + 2] for y, x in ((10, 10), (90, 90), (80, 20), (25, 85))]
    for places in (specks, [np.s_[:, :6]], [np.s_[:, :6], np.s_[-3:]], [np.s_[:, -20:]]):
        picture = seven()
        for place in places:
            picture[place] = 60
        assert difference(to_mnist(picture), to_mnist(seven())) == 0
    cut_off = to_mnist(seven()[:, 33:])  # alone, it is the digit
    assert cut_off.warning == "the digit touches the picture's edge"
    boxed = np.pad(np.pad(seven()[8:80, 33:72], 4), 20, constant_values=255)
    circled = Image.fromarray(np.pad(seven(), 20, constant_values=255).astype(np.uint8))
    ImageDraw.Draw(circled).ellipse([30, 35, 102, 110], outline=0, width=4)
    for picture in (boxed, np.asarray(circled)):
        assert to_mnist(picture).warning == "a box or a circle seems to touch the digit"


def test_thin_strokes_are_widened_and_thick_ones_kept():
    def ink(pen: int) -> float:
        return float(to_mnist(seven(400, pen, (120, 80))).image.sum() / 255)

    assert ink(2) == pytest.approx(ink(5), rel=0.2)
    assert ink(2) == pytest.approx(ink(20), rel=0.35)
    assert ink(40) > 1.25 * ink(20)
    assert to_mnist(np.repeat([106, 96, 106, 176], [15, 11, 4, 5])[:, None]).image.any()  # one tone
