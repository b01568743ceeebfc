"""Small sources of encoded images, and what is checked of the batches made of them."""

import functools
import io

import numpy as np
from PIL import Image

from experiments.data import streaming
from experiments.data.errors import DataError
from experiments.data.sources import Example

SIZE = 8


class MemorySource:
    """Encoded images in memory, which notes what is read of them."""

    split = "train"
    num_classes = 5
    image_shape = (None, None, 3)

    def __init__(self, images, unreadable=()):
        self.images = images
        self.unreadable = unreadable
        self.reads = []

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        self.reads.extend(indices)
        if set(indices) & set(self.unreadable):
            raise DataError("/data/train.array_record-00000-of-00001 is cut off")
        return [Example(self.images[index], index % 5) for index in indices]

    def name(self, index):
        return f"/data/train/{index:03}.png"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@functools.cache
def coloured(count):
    """Images of different shapes, each of one colour, whose red says which one it is."""
    return [
        png(np.full((9 + index % 7, 8 + index % 5, 3), (index, 255 - index, 7), np.uint8))
        for index in range(count)
    ]


def numbers(batches):
    """Which example each image of some batches of `coloured` is; checks the labels on the way."""
    images, labels = (np.concatenate([batch[i] for batch in batches]) for i in range(2))
    found = images[:, 0, 0, 0].astype(int)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    expected = np.stack([found, 255 - found, np.full_like(found, 7)], axis=-1)
    np.testing.assert_array_equal(
        images, np.broadcast_to(expected[:, None, None], (len(found), SIZE, SIZE, 3))
    )
    np.testing.assert_array_equal(labels, found % 5)
    return found


@functools.cache
def patterned(count=23):
    """Images whose crops and flips all give different pixels."""
    rng = np.random.default_rng(0)
    return [
        png(rng.integers(0, 256, (12 + index % 7, 30 - index % 5, 3), dtype=np.uint8))
        for index in range(count)
    ]


def train(source, **options):
    settings = {"seed": 3, "batch_size": 12, "image_size": SIZE, "last_step": 6} | options
    return streaming.train_batches(source, **settings)


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for array, expected in zip(one, other, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


def joined(parts):
    """Global batches from the parts of all processes."""
    return [
        streaming.HostBatch(*map(np.concatenate, zip(*batches, strict=True)))
        for batches in zip(*parts, strict=True)
    ]


def eval_all(source, **options):
    return streaming.eval_batches(source, batch_size=12, image_size=SIZE, **options)
