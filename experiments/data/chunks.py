"""The order of a stream's examples, and the reading and decoding of a chunk of them.

A chunk is a run of consecutive positions of the stream; see `streaming` for what a position is and
for who decodes which chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.data import decode
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError
from experiments.data.sources import Example, Source


def example_index(examples: int, seed: int, position: int) -> int:
    """Which example a position of the stream stands for."""
    epoch, place = divmod(position, examples)
    return int(epoch_order(examples, seed, epoch)[place])


_order_lock = threading.Lock()


def epoch_order(examples: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    """The order of the examples in an epoch, a permutation given by seed and epoch alone.

    It ranks Philox's raw numbers, which every version of NumPy has in common. Grain's own shuffle
    would take 10 microseconds an image, 500 where images are few, while no other thread runs; and
    epoch 1 of a seed would have the order of epoch 0 of the next seed.
    """
    with _order_lock:  # or all threads would work out the same order when an epoch begins
        return _epoch_order(examples, seed, epoch)


@functools.lru_cache(maxsize=4)
def _epoch_order(examples: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    # The counter of `decode.random_crops` stays below 2^192, so the two never share a number.
    raw = np.random.Philox(key=seed, counter=(epoch + 1) << 192).random_raw(examples)
    return np.argsort(raw, kind="stable").astype(np.uint32)


class Chunk(NamedTuple):
    """Part of a batch; `failed` has slot, example and what is wrong for what is still missing."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    first: int
    failed: list[tuple[int, int, str]]


@dataclasses.dataclass(frozen=True)
class ChunkReader:
    """Reads and decodes the examples at some positions; can be pickled.

    Attributes:
      source: the examples.
      image_size: height and width of the results.
      seed: gives order, crops and flips of an endless stream.
      ratio: side of the central square over the image's shorter side; None takes random crops.
      end: None in an endless stream; else how many examples there are, in their own order, and
        positions from there on are padding.
    """

    source: Source
    image_size: int
    seed: int
    ratio: float | None
    end: int | None

    def __call__(self, positions: range) -> Chunk:
        """Decodes a chunk. A damaged image does not raise here: the consumer tells of it."""
        number, size = len(positions), self.image_size
        images = np.zeros((number, size, size, 3), np.uint8)
        labels, weights = np.zeros(number, np.int32), np.zeros(number, np.float32)
        chunk = Chunk(images, labels, weights, positions.start, [])
        if self.end is not None:
            positions = range(positions.start, min(positions.stop, self.end))
        if not positions:
            return chunk
        indices = list(positions)
        if self.end is None:
            indices = [example_index(len(self.source), self.seed, p) for p in positions]
        examples = self.source.read(indices)
        heights, widths = [1] * len(indices), [1] * len(indices)
        damaged = {}
        for slot, example in enumerate(examples):
            try:
                heights[slot], widths[slot] = decode.image_size(example.encoded)
            except CorruptImageError as error:
                damaged[slot] = str(error)
        crops, flips = self._crops(positions.start, heights, widths)
        for slot, example in enumerate(examples):
            if slot not in damaged:
                try:
                    self._decode(chunk, slot, example, crops[slot], flips[slot])
                except CorruptImageError as error:
                    damaged[slot] = str(error)
        chunk.failed.extend((slot, indices[slot], damaged[slot]) for slot in sorted(damaged))
        return chunk

    def _crops(
        self, first: int, heights: list[int], widths: list[int]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        if self.ratio is None:
            return decode.random_crops(self.seed, first, heights, widths)
        sizes = zip(heights, widths, strict=True)
        crops = [decode.central_crop(height, width, self.ratio) for height, width in sizes]
        return np.array(crops, np.int32), np.zeros(len(crops), bool)

    def _decode(
        self, chunk: Chunk, slot: int, example: Example, crop: npt.NDArray[np.int32], flip: Any
    ) -> None:
        out = chunk.images[slot]
        decode.decode_crop(example.encoded, crop, self.image_size, flip=bool(flip), out=out)
        chunk.labels[slot] = example.label
        chunk.weights[slot] = 1

    def complete(self, chunk: Chunk, corrupt: CorruptExamples) -> None:
        """Reports the damaged images of a chunk, and in an endless stream replaces them."""
        examples = len(self.source)
        for slot, index, error in chunk.failed:
            corrupt.report(self.source, index, error)
            if self.end is not None:
                continue
            for distance in range(1, examples):
                other = (index + distance) % examples
                (example,) = self.source.read([other])
                try:
                    height, width = decode.image_size(example.encoded)
                    crops, flips = self._crops(chunk.first + slot, [height], [width])
                    self._decode(chunk, slot, example, crops[0], flips[0])
                    break
                except CorruptImageError as damage:
                    corrupt.report(self.source, other, str(damage))
            else:
                split = self.source.split
                raise CorruptImageError(f"no image of split {split!r} can be decoded: {error}")
