"""Datasets that fit on the device: loading, an epoch's order, crops and flips, exact evaluation.

Images stay on the device as the bytes they are on disk. A batch is one gather from them, so no
host work is left in the training loop; everything here that runs inside it is a pure function of
arrays, which `jax.vmap` maps over seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import mesh as meshes
from experiments.data import decode
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError, DataError
from experiments.data.sources import Source

Augmentation = Literal["none", "crop", "crop_flip"]

PADDING = 4
"""Pixels of black around an image before a random crop of its own size."""

_READ_AT_ONCE = 1000


class Split(NamedTuple):
    """Images, uint8, (examples, height, width, channels), and labels, int32, (examples,)."""

    images: jax.Array
    labels: jax.Array


class EvalBatch(NamedTuple):
    """Images (batch, height, width, channels), labels (batch,), and weights (batch,), 1 or 0."""

    images: jax.Array
    labels: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset whole on every device of a mesh, or on the default device.

    Attributes:
      train: what to train on.
      test: what to evaluate on.
      num_classes: how many labels there are.
      mean: of the training images' values, float32, (channels,).
      std: their standard deviation, float32, (channels,).
    """

    train: Split
    test: Split
    num_classes: int
    mean: np.ndarray
    std: np.ndarray


def make_dataset(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    mesh: Mesh | None = None,
) -> Dataset:
    """Puts images and labels on the devices; `mean` and `std` are those of the training images."""

    def put(array: np.ndarray, dtype: Any) -> jax.Array:
        array = np.asarray(array, dtype)
        return jnp.asarray(array) if mesh is None else meshes.replicate(mesh, array)

    images = train[0]
    # A histogram of 256 values: exact, and without a float copy of all images.
    counts = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    )
    values = np.arange(256)
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return Dataset(
        train=Split(put(images, np.uint8), put(train[1], np.int32)),
        test=Split(put(test[0], np.uint8), put(test[1], np.int32)),
        num_classes=num_classes,
        mean=mean.astype(np.float32),
        std=std.astype(np.float32),
    )


def split_by_class(labels: np.ndarray, every: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the test examples: of each class every `every`-th is for testing.

    The same for every seed and every version of NumPy, since no random number enters.
    """
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1,797 handwritten digits of 8x8 pixels, which scikit-learn embeds; a fifth is for testing.

    Values are 0 to 16. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI, 1998 (its test set).

    Returns:
      Images, uint8, (examples, 8, 8, 1), and labels, (examples,), to train and to test on.
    """
    from sklearn import datasets  # imported where it is needed: only this dataset uses it

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    train, test = ((images[chosen], labels[chosen]) for chosen in split_by_class(labels))
    return train, test


def load_split(source: Source, corrupt: CorruptExamples) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source, decoded, and their labels.

    Args:
      source: one whose images have one shape.
      corrupt: counts images that cannot be decoded; they are left out.

    Returns:
      Images, uint8, (examples, height, width, channels), and labels, int32, (examples,).

    Raises:
      CorruptImageError: more images cannot be decoded than are allowed.
      DataError: an image's shape is another one than the dataset states, or none is left.
    """
    shape = tuple(size for size in source.image_shape if size is not None)
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    good = np.ones(len(source), bool)

    def load(first: int) -> list[tuple[int, str]]:
        indices = range(first, min(first + _READ_AT_ONCE, len(source)))
        failed: list[tuple[int, str]] = []
        for index, example in zip(indices, source.read(indices), strict=True):
            labels[index] = example.label
            try:
                # All three channels of a grayscale image are the same.
                image = _decode(example.encoded)[..., : images.shape[-1]]
            except CorruptImageError as error:
                failed.append((index, str(error)))
                continue
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{source.name(index)} has shape {image.shape}, but its dataset states"
                    f" {images.shape[1:]}"
                )
            images[index] = image
        return failed

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for failed in pool.map(load, range(0, len(source), _READ_AT_ONCE)):
            for index, reason in failed:
                corrupt.report(source, index, reason)
                good[index] = False
    if not good.any():
        raise DataError(f"split {source.split!r} has no image that can be decoded")
    return (images, labels) if good.all() else (images[good], labels[good])


def _decode(encoded: bytes) -> np.ndarray:
    """As `decode.decode`; small PNGs, which many datasets consist of, in a fifth of the time."""
    if encoded.startswith(b"\x89PNG") and encoded[24:25] <= b"\x08":  # bits of a value
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        with contextlib.suppress(cv2.error):  # decode.decode says what is wrong
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
            if image is not None:
                return image[..., ::-1]
    return decode.decode(encoded)


def epoch_order(seed: int | jax.Array, epoch: int | jax.Array, examples: int) -> jax.Array:
    """The order of the examples in an epoch: int32, (examples,), given by seed and epoch alone."""
    order_key, _ = _epoch_keys(seed, epoch)
    return jax.random.permutation(order_key, examples)


def take_batch(
    split: Split,
    order: jax.Array,
    seed: int | jax.Array,
    epoch: int | jax.Array,
    index: int | jax.Array,
    *,
    batch_size: int,
    augmentation: Augmentation = "none",
) -> Split:
    """Batch number `index` of an epoch, cropped and flipped.

    Pure, so it runs inside a jitted step or scan, and under `jax.vmap` over `order` and `seed`
    with one copy of the images.

    Args:
      split: all training images.
      order: of the epoch, from `epoch_order` with the same seed and epoch.
      seed: of the run.
      epoch: number of the epoch.
      index: number of the batch in the epoch, from 0.
      batch_size: images in a batch.
      augmentation: `crop` pads with PADDING black pixels on each side and crops at random to the
        size before, `crop_flip` also flips left to right with probability a half.

    Returns:
      Images, uint8, (batch_size, height, width, channels), and labels, int32, (batch_size,).
    """
    chosen = jax.lax.dynamic_slice_in_dim(order, index * batch_size, batch_size)
    labels = split.labels.at[chosen].get(mode="promise_in_bounds")
    if augmentation == "none":
        return Split(split.images.at[chosen].get(mode="promise_in_bounds"), labels)
    _, augment_key = _epoch_keys(seed, epoch)
    shift_key, flip_key = jax.random.split(jax.random.fold_in(augment_key, index))
    _, height, width, _ = split.images.shape
    shifts = jax.random.randint(shift_key, (2, batch_size, 1), -PADDING, PADDING + 1)
    rows = shifts[0] + jnp.arange(height)[None]
    columns = shifts[1] + jnp.arange(width)[None]
    if augmentation == "crop_flip":
        flip = jax.random.bernoulli(flip_key, shape=(batch_size, 1))
        columns = jnp.where(flip, columns[:, ::-1], columns)
    return Split(_crop(split.images, chosen, rows, columns), labels)


def _crop(images: jax.Array, chosen: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The given rows and columns of the chosen images; those outside an image are black."""
    _, height, width, _ = images.shape
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    gathered = images.at[
        chosen[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ].get(mode="promise_in_bounds")
    return jnp.where(inside[..., None], gathered, jnp.zeros((), images.dtype))


@functools.cache
def compiled(mesh: Mesh | None) -> tuple[Callable[..., jax.Array], Callable[..., Split]]:
    """`epoch_order`, replicated over a mesh, and `take_batch`, its examples shared out over it."""
    order: dict[str, Any] = {} if mesh is None else {"out_shardings": meshes.replicated(mesh)}
    batch: dict[str, Any] = {} if mesh is None else {"out_shardings": meshes.batch_sharding(mesh)}
    take_names = ("batch_size", "augmentation")
    return (
        jax.jit(epoch_order, static_argnames="examples", **order),
        jax.jit(take_batch, static_argnames=take_names, **batch),
    )


def train_batches(
    split: Split,
    seed: int,
    first_step: int,
    batch_size: int,
    augmentation: Augmentation,
    mesh: Mesh | None = None,
) -> Iterator[Split]:
    """The batch of every step from `first_step` on, without end, its examples over the mesh.

    The examples left over at an epoch's end are other ones in the next.
    """
    examples = len(split.labels)
    epoch, index = divmod(first_step, examples // batch_size)
    order_of, take = compiled(mesh)
    while True:
        order = order_of(seed, epoch, examples=examples)
        for i in range(index, examples // batch_size):
            yield take(
                split, order, seed, epoch, i, batch_size=batch_size, augmentation=augmentation
            )
        epoch, index = epoch + 1, 0


def eval_batches(split: Split, batch_size: int) -> list[EvalBatch]:
    """All examples in batches of one size: the last is padded with examples of weight 0."""
    examples = len(split.labels)
    padding = -examples % batch_size
    arrays = [
        jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        for array in (*split, jnp.ones(examples, jnp.float32))
    ]
    return [
        EvalBatch(*(array[i : i + batch_size] for array in arrays))
        for i in range(0, examples, batch_size)
    ]


def _epoch_keys(seed: int | jax.Array, epoch: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of an epoch's order and of its crops.

    The constant parts them from a run's other keys: `split` and `fold_in` of one key can give the
    same numbers.
    """
    data_key = jax.random.fold_in(jax.random.key(seed), 0x64617461)
    order_key, augment_key = jax.random.split(jax.random.fold_in(data_key, epoch))
    return order_key, augment_key
