"""Random and central crops against the textbook's loop, their limits, and hand-worked cases."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import decode


def textbook_crop(rng, height, width):
    """Random resized crop as its authors and torchvision describe it, one number at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (200, 600)])
def test_crops_are_distributed_as_in_the_textbook(height, width):
    count = 4000
    crops, flips = decode.random_crops(3, 0, np.full(count, height), np.full(count, width))
    assert crops.shape == (count, 4)
    assert crops.dtype == np.int32
    assert flips.dtype == bool
    rng = random.Random(0)
    drawn = [crop for _ in range(count) if (crop := textbook_crop(rng, height, width))]
    found = [crop for crop in crops.tolist() if crop != centred(height, width)]
    for statistic in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: (top + 0.5) / (height - h + 1),
        lambda top, left, h, w: (left + 0.5) / (width - w + 1),
    ):
        one, other = (np.sort([statistic(*crop) for crop in part]) for part in (found, drawn))
        grid = np.concatenate([one, other])
        distances = np.searchsorted(one, grid, "right") / len(one) - np.searchsorted(
            other, grid, "right"
        ) / len(other)
        # Kolmogorov and Smirnov's bound for two samples at a probability of 0.001.
        assert np.abs(distances).max() < 1.95 * math.sqrt(1 / len(one) + 1 / len(other))
    assert abs(len(found) - len(drawn)) < 4 * math.sqrt(count) * 0.5
    assert abs(flips.mean() - 0.5) < 3.3 * 0.5 / math.sqrt(count)


def centred(height, width):
    """The largest centred crop of a ratio between 3/4 and 4/3, as a list."""
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=9),
    seed=st.integers(0, 2**31 - 1),
    first=st.integers(0, 2**40),
)
def test_crops_lie_in_the_image_and_within_the_limits(sizes, seed, first):
    heights, widths = np.transpose(sizes)
    crops, _ = decode.random_crops(seed, first, heights, widths)
    for (height, width), crop in zip(sizes, crops.tolist(), strict=True):
        top, left, h, w = crop
        assert h >= 1
        assert w >= 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        if crop != centred(height, width):
            # Both sides are rounded to integers.
            assert (h + 0.5) * (w + 0.5) >= 0.08 * height * width
            assert (w - 0.5) / (h + 0.5) <= 4 / 3
            assert (h - 0.5) / (w + 0.5) <= 4 / 3


def test_crops_where_no_attempt_fits():
    # 8 % of 10x1000 are at least 24 pixels high.
    crops, _ = decode.random_crops(0, 0, [10, 1000, 1], [1000, 10, 1])
    np.testing.assert_array_equal(crops, [[0, 493, 10, 13], [493, 0, 13, 10], [0, 0, 1, 1]])


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.integers(1, 20), st.integers(0, 20))
def test_crops_do_not_depend_on_how_the_stream_is_cut(seed, first, count, cut):
    rng = np.random.default_rng(seed)
    heights, widths = rng.integers(1, 600, (2, count))
    cut = min(cut, count)
    whole = decode.random_crops(seed, first, heights, widths)
    parts = (
        decode.random_crops(seed, first, heights[:cut], widths[:cut]),
        decode.random_crops(seed, first + cut, heights[cut:], widths[cut:]),
    )
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(pieces))


def test_crops_of_neighbours_and_of_seeds_differ():
    sizes = np.full(100, 500), np.full(100, 500)
    one, other, next_seed = (
        decode.random_crops(seed, first, *sizes)[0] for seed, first in ((1, 0), (1, 100), (2, 0))
    )
    crops = np.concatenate([one, other, next_seed])
    assert len(np.unique(crops, axis=0)) == 300


@pytest.mark.parametrize(
    ("height", "width", "ratio", "crop"),
    [
        (375, 500, 0.875, (23, 86, 328, 328)),  # 0.875 * 375 = 328.1
        (500, 333, 0.875, (104, 21, 291, 291)),
        (256, 256, 0.875, (16, 16, 224, 224)),
        (256, 300, 1, (0, 22, 256, 256)),
        (1, 9, 0.1, (0, 4, 1, 1)),
    ],
)
def test_central_crop(height, width, ratio, crop):
    assert decode.central_crop(height, width, ratio) == crop
