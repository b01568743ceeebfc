"""Smaller images and pairs of images, made from the same real ones."""

import numpy as np
import pytest

from experiments import data
from experiments.config import Config, ConfigError
from experiments.data import transforms


def test_pool_takes_the_mean_of_each_square():
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 2)).astype(np.uint8)
    pooled = transforms.pool(images, 2)
    assert pooled.dtype == np.uint8
    for row in range(3):
        for column in range(2):
            square = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = np.floor(square.astype(float).mean((1, 2)) + 0.5)
            np.testing.assert_array_equal(pooled[:, row, column], expected)


def test_pairs_show_every_image_once_on_each_side():
    labels = np.arange(50)
    images = np.broadcast_to(labels[:, None, None, None], (50, 2, 3, 1)).astype(np.uint8)
    shown, told = transforms.pairs(images, labels, 50)
    assert shown.shape == (50, 2, 6, 1)
    left, right = shown[:, 0, 0, 0], shown[:, 0, 3, 0]
    np.testing.assert_array_equal(told, 50 * left.astype(int) + right)
    np.testing.assert_array_equal(np.sort(left), labels)
    np.testing.assert_array_equal(np.sort(right), labels)
    # Scattered: images that lie together, as those of a class may, are not paired with each other.
    assert np.median(np.abs(left.astype(int) - right)) > 8


def test_digits_pooled_and_paired():
    dataset = data.load(Config(pool=2, pairs=True, mesh_data=1))
    assert dataset.image_shape == (4, 8, 1)
    assert dataset.num_classes == 100
    assert dataset.train_examples == 1442
    labels = np.asarray(dataset.train.labels)
    assert labels.max() < 100
    # Two independent digits: about as many of each pair.
    counts = np.bincount(labels, minlength=100)
    assert counts.min() > 0
    assert counts.max() < 40


def test_pool_has_to_divide_the_images():
    with pytest.raises(ConfigError, match=r"pool=3 must divide .* 8 and 8"):
        data.load(Config(pool=3, mesh_data=1))
