"""Other tasks from the same images: smaller ones, and pairs of them side by side."""

from __future__ import annotations

import numpy as np

from experiments.config import Config, ConfigError

_HASH = 2_654_435_761  # Knuth's multiplier, 2**32 over the golden ratio: it scatters neighbours


Images = tuple[np.ndarray, np.ndarray]
"""Images, uint8, (examples, height, width, channels), and labels, integers, (examples,)."""


def transform(split: Images, num_classes: int, config: Config) -> tuple[Images, int]:
    """One split as `config.pool` and `config.pairs` ask for it.

    Args:
      split: what there is.
      num_classes: how many labels there are.
      config: says what to do.

    Returns:
      The split to use, and its number of classes.

    Raises:
      ConfigError: `pool` does not divide height and width.
    """
    images, labels = split
    if config.pool > 1:
        images = pool(images, config.pool)
    if config.pairs:
        images, labels = pairs(images, labels, num_classes)
        num_classes *= num_classes
    return (images, labels), num_classes


def pool(images: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` times `factor` pixels, rounded; halves up.

    Example:
      >>> pool(np.array([0, 1, 2, 4], np.uint8).reshape(1, 2, 2, 1), 2).ravel()
      array([2], dtype=uint8)
    """
    examples, height, width, channels = images.shape
    if height % factor or width % factor:
        raise ConfigError(
            f"pool={factor} must divide the height and the width of the images, {height} and"
            f" {width}"
        )
    squares = images.reshape(examples, height // factor, factor, width // factor, factor, channels)
    area = factor * factor
    return ((squares.sum((2, 4), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def pairs(images: np.ndarray, labels: np.ndarray, num_classes: int) -> Images:
    """Every image with another one on its right; the label tells both.

    Each image is once on the left and once on the right. The partners are the same for every seed
    and every version of NumPy, since no random number enters.

    Args:
      images: (examples, height, width, channels).
      labels: integers below `num_classes`, (examples,).
      num_classes: how many there are.

    Returns:
      Images (examples, height, 2 * width, channels), and labels `num_classes * left + right`.
    """
    index = np.arange(len(labels), dtype=np.uint64)
    partner = np.argsort(index * np.uint64(_HASH) % np.uint64(2**32), kind="stable")
    return np.concatenate([images, images[partner]], axis=2), num_classes * labels + labels[partner]
