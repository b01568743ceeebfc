"""Streams of damaged images, threads and processes that decode, batches on their way to devices."""

import gc
import itertools
import multiprocessing
import threading

import jax
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data import chunks, streaming
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError, DataError
from tests.image_sources import (
    MemorySource,
    assert_same,
    coloured,
    eval_all,
    joined,
    numbers,
    patterned,
    train,
)


def damaged(count, indices):
    images = list(coloured(count))
    for number, index in enumerate(indices):
        images[index] = b"" if number % 2 else images[index][:50]
    return MemorySource(images)


@pytest.mark.parametrize("stream", [train, eval_all])
def test_a_damaged_image_is_named(stream):
    source = damaged(30, [17])
    with pytest.raises(CorruptImageError, match=r"/data/train/017\.png.*damaged.*max_corrupt=0"):
        list(stream(source))
    source = damaged(30, [4, 17, 5])
    lines = []
    with pytest.raises(CorruptImageError, match=r"/data/train/0(04|05|17)\.png.*max_corrupt=2"):
        list(stream(source, corrupt=CorruptExamples(2, lines.append)))
    assert len(lines) == 2


@pytest.mark.parametrize("process_count", [1, 3])
def test_a_damaged_image_is_replaced_by_the_next_in_training(process_count):
    broken = (4, 17, 18, 29)
    lines = []
    corrupt = CorruptExamples(4, lines.append)
    source, whole = damaged(30, broken), MemorySource(coloured(30))
    parts, expected = (
        [
            list(train(of, corrupt=corrupt, process_index=index, process_count=process_count))
            for index in range(process_count)
        ]
        for of in (source, whole)
    )
    assert len(corrupt) == len(lines) == 4
    replaced = {4: 5, 17: 19, 18: 19, 29: 0}
    expected = [replaced.get(index, index) for index in numbers(joined(expected))]
    np.testing.assert_array_equal(numbers(joined(parts)), expected)
    assert all((batch.weights == 1).all() for part in parts for batch in part)


def test_a_replaced_image_changes_no_other_one():
    images = list(patterned())
    images[7] = b"broken"
    corrupt = CorruptExamples(1, lambda line: None)
    batches = [
        list(train(MemorySource(patterned()))),
        list(train(MemorySource(images), corrupt=corrupt)),
    ]
    whole, replaced = (np.concatenate([batch.images for batch in part]) for part in batches)
    positions = [p for p in range(72) if chunks.example_index(23, 3, p) == 7]
    changed = (whole != replaced).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(changed), positions)


def test_a_damaged_image_has_no_weight_in_evaluation():
    broken = [0, 17, 29]
    lines = []
    batches = list(eval_all(damaged(30, broken), corrupt=CorruptExamples(3, lines.append)))
    weights = np.concatenate([batch.weights for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(weights[:30] == 0), broken)
    assert not weights[30:].any()
    names = [line.rsplit("/", 1)[1].split(":")[0] for line in lines]
    assert names == ["000.png", "017.png", "029.png"]


def test_nothing_but_damaged_images():
    source = damaged(3, [0, 1, 2])
    with pytest.raises(CorruptImageError, match="no image of split 'train' can be decoded"):
        next(train(source, corrupt=CorruptExamples(9, lambda line: None)))


def test_an_error_of_the_source_arrives_as_it_is():
    with pytest.raises(DataError) as error:
        list(train(MemorySource(coloured(30), unreadable={20})))
    assert str(error.value) == "/data/train.array_record-00000-of-00001 is cut off"


def prefetch_threads():
    return {thread for thread in threading.enumerate() if "grain" in thread.name}


@pytest.mark.parametrize("stop", ["close", "drop", "close on device"])
def test_threads_end_with_the_iterator(stop):
    earlier = prefetch_threads()  # one of another test may be finishing what it was at
    batches = train(MemorySource(coloured(30)), last_step=None, workers=streaming.Workers(3))
    if stop == "close on device":
        batches = streaming.to_device(batches, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    next(batches)
    running = prefetch_threads() - earlier
    assert running
    if stop == "drop":
        del batches
        gc.collect()
    else:
        batches.close()
    for thread in running:
        thread.join(timeout=30)
    assert not running & prefetch_threads()


def test_worker_processes_give_the_same_batches_and_errors():
    """One test for all of it, since each process takes seconds to start."""
    images = list(patterned())
    order = [chunks.example_index(23, 3, position) for position in range(23)]
    images[order[9]] = b"broken"
    lines = []
    expected = train(
        MemorySource(images), batch_size=4, corrupt=CorruptExamples(1, lambda line: None)
    )
    batches = train(
        MemorySource(images, unreadable={order[22]}),
        batch_size=4,
        first_step=1,
        last_step=None,
        workers=streaming.Workers(threads=2, processes=2),
        corrupt=CorruptExamples(1, lines.append),
    )
    # Up to position 19; the next batch has position 22.
    assert_same(itertools.islice(batches, 4), list(expected)[1:5])
    assert len(lines) == 1
    assert f"/data/train/{order[9]:03}.png" in lines[0]
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "/data/train.array_record-00000-of-00001 is cut off"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("axes", [(8,), (2, 4)])
def test_batches_arrive_as_global_arrays(axes):
    devices = np.array(jax.devices()[:8]).reshape(axes)
    mesh = jax.sharding.Mesh(devices, ("data", "model")[: len(axes)])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    source = MemorySource(patterned())
    options = {"batch_size": 16}
    batches = list(streaming.to_device(train(source, **options), sharding))
    assert_same(batches, list(train(source, **options)))
    for batch in batches:
        for array in batch:
            assert isinstance(array, jax.Array)
            assert array.sharding == sharding
            assert array.addressable_shards[0].data.shape[0] == 16 // axes[0]


@pytest.mark.parametrize(("ahead", "length"), [(0, 6), (1, 6), (2, 6), (1, 0), (3, 1)])
def test_batches_are_sent_ahead_of_their_turn(ahead, length):
    pulled = []

    def host_batches():
        for batch in train(MemorySource(coloured(30)), last_step=length):
            pulled.append(batch)
            yield batch

    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    batches = streaming.to_device(host_batches(), device, ahead)
    assert pulled == []
    received = []
    for batch in batches:
        received.append(batch)
        assert batch.images.devices() == {jax.devices()[3]}
        assert len(pulled) == min(len(received) + ahead, length)
    assert_same(received, pulled)
    assert len(received) == length


def test_a_batch_that_devices_cannot_share():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with pytest.raises(ConfigError, match=r"batch_size=12 must be a multiple"):
        next(streaming.to_device(train(MemorySource(coloured(30))), sharding))


def test_a_killed_worker_process_is_told_of():
    workers = streaming.Workers(threads=1, processes=1)
    batches = train(MemorySource(coloured(30)), last_step=None, workers=workers)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(DataError, match="one of the 1 decoding processes was killed"):
        list(itertools.islice(batches, 1000))
