"""Datasets that fit on the device: loading, shuffling, and batches for an exact evaluation.

A dataset is four arrays. Another small image dataset is one more function that returns them,
entered in `LOADERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images, normalised, and their labels.

    Attributes:
      train_images: float32, (examples, height, width, channels).
      train_labels: int32, (examples,), from 0 to `num_classes` - 1.
      test_images: as `train_images`.
      test_labels: as `train_labels`.
      num_classes: how many labels there are.
    """

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array
    num_classes: int


class EvalBatch(NamedTuple):
    """Images (batch, height, width, channels), labels (batch,), and weights (batch,), 1 or 0."""

    images: jax.Array
    labels: jax.Array
    weights: jax.Array


def split_by_class(labels: np.ndarray, every: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the test examples: of each class every `every`-th is for testing.

    The same for every seed and every version of NumPy, since no random number enters.
    """
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def load_digits(data_dir: str = "") -> Dataset:
    """1,797 handwritten digits of 8x8 pixels, which scikit-learn embeds; a fifth is for testing.

    Normalised to mean 0 and variance 1 by the training images' statistics. Source: E. Alpaydin
    and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
    """
    del data_dir
    from sklearn import datasets  # imported where it is needed: only this dataset uses it

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    train, test = split_by_class(labels)
    images = (images - images[train].mean()) / images[train].std()
    return Dataset(
        train_images=jnp.asarray(images[train], jnp.float32),
        train_labels=jnp.asarray(labels[train], jnp.int32),
        test_images=jnp.asarray(images[test], jnp.float32),
        test_labels=jnp.asarray(labels[test], jnp.int32),
        num_classes=10,
    )


LOADERS = {"digits": load_digits}
"""Loaders by the name of their dataset; each takes `data_dir`."""


def load(name: str, data_dir: str = "") -> Dataset:
    """The dataset called `name`, whole, on the default device."""
    return LOADERS[name](data_dir)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Full batches in an epoch; raises ConfigError where there is none."""
    examples = len(dataset.train_labels)
    if batch_size > examples:
        raise ConfigError(
            f"batch_size={batch_size} must be at most {examples}, the number of training images"
        )
    return examples // batch_size


def epoch_permutation(seed: int, epoch: int, examples: int) -> jax.Array:
    """The order of the examples in an epoch: int32, (examples,), given by seed and epoch alone."""
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), examples)


def train_batches(
    dataset: Dataset, seed: int, epoch: int, batch_size: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Images and labels of each full batch of an epoch, in the epoch's own random order.

    The examples left over at an epoch's end are other ones in the next.
    """
    order = epoch_permutation(seed, epoch, len(dataset.train_labels))
    for step in range(steps_per_epoch(dataset, batch_size)):
        chosen = jax.lax.dynamic_slice_in_dim(order, step * batch_size, batch_size)
        yield _take(dataset.train_images, chosen), _take(dataset.train_labels, chosen)


@jax.jit
def _take(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="promise_in_bounds")


def eval_batches(images: jax.Array, labels: jax.Array, batch_size: int) -> list[EvalBatch]:
    """All examples in batches of one size: the last is padded with examples of weight 0."""
    examples = len(labels)
    weights = jnp.ones(examples, jnp.float32)
    padding = -examples % batch_size
    images, labels, weights = (
        jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        for array in (images, labels, weights)
    )
    return [
        EvalBatch(*(array[i : i + batch_size] for array in (images, labels, weights)))
        for i in range(0, examples, batch_size)
    ]
