"""Each random distortion does what its name says and stays within its bound."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from mnist_jax.data.augment import Distortion

KEY = jax.random.key(3)
DOTS = np.zeros((64, 28, 28, 1), np.float32)
DOTS[:, 8:11, 17:20] = 1  # a bright spot above and to the right of the center


def augment(images: np.ndarray, **amounts: float) -> np.ndarray:
    return np.asarray(jax.jit(Distortion(**amounts))(jnp.asarray(images), KEY))


def center(images) -> np.ndarray:
    """The center of mass of each image, as (y, x)."""
    return np.array([ndimage.center_of_mass(image) for image in images[..., 0]])


def test_a_shift_moves_each_image_independently_within_the_bound():
    moved = center(augment(DOTS, shift=2.0)) - center(DOTS)
    assert np.abs(moved).max() <= 2.0 + 1e-4
    assert moved.std(0).min() > 0.9  # a uniform draw's is 1.15
    assert np.abs(np.corrcoef(moved.T)[0, 1]) < 0.4


def test_a_rotation_keeps_the_distance_from_the_middle():
    before, after = (center(x) - 13.5 for x in (DOTS, augment(DOTS, rotation=20.0)))
    np.testing.assert_allclose(np.hypot(*after.T), np.hypot(*before.T), rtol=0.02)
    angles = np.degrees(np.arctan2(*after.T) - np.arctan2(*before.T))
    assert 15 < np.abs(angles).max() < 20.5
    assert angles.min() < -10 < 10 < angles.max()


def test_a_scale_changes_each_axis_between_its_bounds():
    factors = (center(augment(DOTS, scale=0.25)) - 13.5) / (center(DOTS) - 13.5)
    assert 1 / 1.25 - 0.02 < factors.min() < 0.85
    assert 1.15 < factors.max() < 1.25 + 0.02
    assert np.abs(factors[:, 0] - factors[:, 1]).max() > 0.1
    assert np.abs(np.corrcoef(center(augment(DOTS, shift=2.0)).T, factors.T)[:2, 2:]).max() < 0.4


def test_pixels_keep_their_range_and_without_any_amount_their_values():
    assert not Distortion()
    np.testing.assert_allclose(augment(DOTS), DOTS, atol=1e-5)
    images = np.random.default_rng(0).uniform(50, 255, (16, 28, 28, 1)).astype(np.float32)
    moved = augment(images, shift=3.0, rotation=30.0, scale=0.3)
    assert moved.shape == images.shape
    assert 0 == moved.min() < moved.max() <= 255.001  # from outside come zeros
