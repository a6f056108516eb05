"""Validation images are held out of the training images."""

import numpy as np
import pytest

from mnist_jax.data.dataset import Split, hold_out


def make_split(counts: list[int]) -> Split:
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    image = np.arange(len(label), dtype=np.uint8)[:, None, None, None].repeat(28, 1).repeat(28, 2)
    return Split(image, label.astype(np.int32))


@pytest.mark.parametrize("count", [1, 50, 120, 199])
def test_each_class_gives_its_share_and_every_image_is_in_one_place(count):
    split = make_split([100, 60, 40])
    rest, held_out = hold_out(split, count)
    assert len(held_out.label) == count
    shares = np.bincount(held_out.label, minlength=3) - count * np.array([100, 60, 40]) / 200
    assert np.abs(shares).max() <= 1
    together = np.concatenate([rest.image, held_out.image])[:, 0, 0, 0]
    assert sorted(together.tolist()) == list(range(200))
    for part in (rest, held_out):
        places = part.image[:, 0, 0, 0].astype(int)
        assert (np.diff(places) > 0).all()
        np.testing.assert_array_equal(part.label, split.label[places])
    np.testing.assert_array_equal(hold_out(split, count)[1].image, held_out.image)  # as before
