"""Batches of images that are decoded as they are needed, by Grain's threads and processes.

The stream of a run is endless, and a position in it stands for one example: its epoch is
position // examples, and the epoch's permutation says which example it is. Step t takes the
positions from t * batch_size on, so batches run across the ends of epochs and no example is left
out. Of each batch every process takes its own consecutive part. So the batch of a step, its crops
and its flips are given by seed and step alone: the same on any number of processes, threads and
workers, and a run continues at a step without reading anything from before it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import signal
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import numpy.typing as npt
from absl import flags

from experiments.config import ConfigError
from experiments.data.chunks import Chunk, ChunkReader
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import DataError
from experiments.data.sources import Source

EVAL_RATIO = 0.875
"""Side of the central square over the image's shorter side; 224 pixels of 256."""

# Images that Grain handles as one element: one by one they cost a third of the throughput.
_MAX_CHUNK = 64
_ENDLESS = 2**62  # Grain's datasets have a length


class HostBatch(NamedTuple):
    """One process's part of a batch, or the whole of it where it is made of `jax.Array`.

    Attributes:
      images: uint8, (examples, image_size, image_size, 3), in RGB.
      labels: int32, (examples,).
      weights: float32, (examples,): 1, or 0 for padding and for what cannot be decoded.
    """

    images: npt.NDArray[np.uint8] | jax.Array
    labels: npt.NDArray[np.int32] | jax.Array
    weights: npt.NDArray[np.float32] | jax.Array


@dataclasses.dataclass(frozen=True)
class Workers:
    """What decodes: `threads` in this process, or in each of `processes` of its own.

    Attributes:
      threads: 0 stands for one a core, shared out among the processes.
      processes: 0 decodes in this process; others take seconds to start.

    Raises:
      ConfigError: one of them is negative.
    """

    threads: int = 0
    processes: int = 0

    def __post_init__(self) -> None:
        """Checks both."""
        for name, value in (("threads", self.threads), ("processes", self.processes)):
            if value < 0:
                raise ConfigError(f"{name}={value} must be at least 0")

    def threads_each(self) -> int:
        """Threads in each process that decodes."""
        return self.threads or max(1, _cores() // max(1, self.processes))


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    image_size: int,
    first_step: int = 0,
    last_step: int | None = None,
    random_crop: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    workers: Workers = Workers(),
    corrupt: CorruptExamples | None = None,
) -> Iterator[HostBatch]:
    """This process's part of the batch of every step, from `first_step` up to `last_step`.

    An example that cannot be decoded is replaced by the next one of the source that can.

    Args:
      source: the examples.
      seed: gives the order, the crops and the flips.
      batch_size: images in a step, over all processes.
      image_size: height and width of the images of the batches.
      first_step: the step of the first batch.
      last_step: the step to stop before; None never stops.
      random_crop: take a random crop of each image and flip half of them; otherwise the central
        square, as evaluation does.
      process_index: which process this is, from 0.
      process_count: how many processes there are.
      workers: what decodes.
      corrupt: counts what cannot be decoded; None allows none.

    Returns:
      An iterator; its `close` stops the workers, and so does dropping it.

    Raises:
      ConfigError: a number is out of its range, or `batch_size` no multiple of `process_count`.
      DataError: the source has no examples. The iterator raises what `source.read` raises, and
        CorruptImageError where more cannot be decoded than `corrupt` allows.
    """
    part = _Part(batch_size, process_index, process_count, workers)
    _check(source, image_size)
    _check_at_least("first_step", first_step, 0)
    reader = ChunkReader(source, image_size, seed, None if random_crop else EVAL_RATIO, None)
    return _start(reader, part, first_step, last_step, workers, corrupt)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    ratio: float = EVAL_RATIO,
    process_index: int = 0,
    process_count: int = 1,
    workers: Workers = Workers(),
    corrupt: CorruptExamples | None = None,
) -> Iterator[HostBatch]:
    """This process's part of batches that hold every example exactly once, in the source's order.

    The last batch is filled up with black images of weight 0, so all processes have the same
    number of batches, all of one size. What cannot be decoded has weight 0 too.

    Args:
      source: the examples.
      batch_size: images in a batch, over all processes.
      image_size: height and width of the images of the batches.
      ratio: side of the central square that is taken of an image, over its shorter side.
      process_index: which process this is, from 0.
      process_count: how many processes there are.
      workers: what decodes.
      corrupt: counts what cannot be decoded; None allows none.

    Returns:
      An iterator; its `close` stops the workers, and so does dropping it.

    Raises:
      ConfigError: as for `train_batches`; also where `ratio` is not in (0, 1].
      DataError: as for `train_batches`.
    """
    part = _Part(batch_size, process_index, process_count, workers)
    _check(source, image_size)
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio={ratio} must be in (0, 1]")
    reader = ChunkReader(source, image_size, 0, ratio, len(source))
    return _start(reader, part, 0, -(-len(source) // batch_size), workers, corrupt)


def to_device(
    batches: Iterator[HostBatch], sharding: jax.sharding.Sharding, ahead: int = 1
) -> Iterator[HostBatch]:
    """The global batches as `jax.Array`s, sent to the devices `ahead` batches before their turn.

    Args:
      batches: this process's parts; closed when the result is closed or dropped.
      sharding: how the leading dimension lies on the devices of all processes, in the order of
        the processes. A `NamedSharding` over the batch, or a `SingleDeviceSharding`.
      ahead: how many batches lie on the devices besides the one in use.

    Returns:
      An iterator over batches whose arrays are global.

    Raises:
      ConfigError: raised by the iterator, where the devices cannot share a batch out evenly.
    """
    sent: collections.deque[HostBatch] = collections.deque()
    try:
        for batch in batches:
            sent.append(_put(batch, sharding))
            if len(sent) > ahead:
                yield sent.popleft()
        while sent:
            yield sent.popleft()
    finally:
        _close(batches)


def _put(batch: HostBatch, sharding: Any) -> HostBatch:
    processes = len({device.process_index for device in sharding.device_set})
    examples = len(batch.labels) * processes
    try:
        sharding.shard_shape((examples,))
    except ValueError:
        raise ConfigError(
            f"batch_size={examples} must be a multiple of the number of devices that share a"
            f" batch, in {sharding}"
        ) from None
    put: Any = jax.make_array_from_process_local_data
    return HostBatch(*(put(sharding, array, (examples, *array.shape[1:])) for array in batch))


class _Part:
    """Which positions of a global batch are this process's, and in what chunks it decodes them."""

    def __init__(
        self, batch_size: int, process_index: int, process_count: int, workers: Workers
    ) -> None:
        _check_at_least("process_count", process_count, 1)
        _check_at_least("batch_size", batch_size, 1)
        if not 0 <= process_index < process_count:
            raise ConfigError(f"process_index={process_index} must be in [0, {process_count})")
        if batch_size % process_count:
            raise ConfigError(
                f"batch_size={batch_size} must be a multiple of {process_count}, the number of"
                " processes"
            )
        examples = batch_size // process_count
        # Smaller where there are many threads, so that two batches keep them all busy.
        threads = workers.threads_each() * max(1, workers.processes)
        limit = min(_MAX_CHUNK, max(8, 2 * examples // threads))
        self._batch_size = batch_size
        self._offset = process_index * examples
        self.chunk = max(n for n in range(1, min(limit, examples) + 1) if examples % n == 0)
        self.chunks_per_step = examples // self.chunk

    def positions(self, number: int) -> range:
        """The positions of chunk `number`, counted from step 0."""
        step, index = divmod(number, self.chunks_per_step)
        first = step * self._batch_size + self._offset + index * self.chunk
        return range(first, first + self.chunk)


def _start(*arguments: Any) -> Iterator[HostBatch]:
    batches = _batches(*arguments)
    # One still open when Python exits would be closed after the modules that Grain needs for it.
    weakref.finalize(batches, lambda batches: _close(batches()), weakref.ref(batches))
    return batches


def _close(batches: Any) -> None:
    getattr(batches, "close", lambda: None)()


def _batches(
    reader: ChunkReader,
    part: _Part,
    first_step: int,
    last_step: int | None,
    workers: Workers,
    corrupt: CorruptExamples | None,
) -> Iterator[HostBatch]:
    corrupt = CorruptExamples(0) if corrupt is None else corrupt
    first = first_step * part.chunks_per_step
    last = _ENDLESS if last_step is None else last_step * part.chunks_per_step
    iterator = iter(_schedule(reader, part, first, max(first, last), workers))
    try:
        while chunks := list(itertools.islice(iterator, part.chunks_per_step)):
            for chunk in chunks:
                reader.complete(chunk, corrupt)
            if len(chunks) == 1 and not workers.processes:
                yield HostBatch(*chunks[0][:3])
            else:  # also of one chunk, which would hold on to the memory shared with a process
                parts = zip(*(chunk[:3] for chunk in chunks), strict=True)
                yield HostBatch(*map(np.concatenate, parts))
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise DataError(
            f"one of the {workers.processes} decoding processes was killed, perhaps for want of"
            f" memory; fewer loader_processes take less ({error})"
        ) from error
    finally:
        iterator.close()


def _schedule(
    reader: ChunkReader, part: _Part, first: int, last: int, workers: Workers
) -> grain.IterDataset[Chunk]:
    """The chunks from `first` up to `last`: those at work, and about a batch that is ready."""
    threads, processes = workers.threads_each(), workers.processes
    ready = -(-part.chunks_per_step // max(1, processes))
    dataset = (
        grain.MapDataset.range(first, last)
        .map(part.positions)
        .map(reader)
        .to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads + ready))
    )
    if processes:
        # Grain reads absl flags of its own, which absl forbids before `app.run` has parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=processes)
        dataset = dataset.mp_prefetch(options, _ignore_interrupts)
    return dataset


def _ignore_interrupts(index: int, count: int) -> None:
    """Ctrl-C reaches workers too; the process that reads from them stops them."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check(source: Source, image_size: int) -> None:
    _check_at_least("image_size", image_size, 1)
    if not len(source):
        raise DataError(f"split {source.split!r} has no images")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
