"""The stream of batches: order, processes, resuming, evaluation, damaged images, workers."""

import functools
import gc
import io
import itertools
import multiprocessing
import sys
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.config import ConfigError
from experiments.data import decode, streaming
from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError, DataError
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
    """Images whose boxes and flips all give different pixels."""
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


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_every_example_is_seen_once_an_epoch(process_count):
    # 30 examples in batches of 12: epochs end inside of batches, and 5 batches are 2 epochs.
    source = MemorySource(coloured(30))
    parts = [
        list(train(source, last_step=10, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    assert all(batch.images.shape[0] == 12 // process_count for part in parts for batch in part)
    assert all((batch.weights == 1).all() for part in parts for batch in part)
    epochs = numbers(joined(parts)).reshape(4, 30)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(30), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@given(examples=st.integers(1, 200), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 2**60))
def test_order_is_a_permutation_given_by_seed_and_epoch(examples, seed, epoch):
    order = [
        streaming.example_index(examples, seed, epoch * examples + place)
        for place in range(examples)
    ]
    assert sorted(order) == list(range(examples))
    streaming._epoch_order.cache_clear()
    np.testing.assert_array_equal(streaming.epoch_order(examples, seed, epoch), order)


def test_orders_are_uniform_and_those_of_seeds_unrelated():
    orders = np.stack(
        [streaming.epoch_order(10, seed, epoch) for seed in range(40) for epoch in range(100)]
    )
    # By chance about two of the 4,000 are equal; were the epochs of a seed those of the one before
    # it, a step later, there would be only 139 different ones.
    assert len(np.unique(orders, axis=0)) > 3980
    counts = np.stack([np.bincount(column, minlength=10) for column in orders.T])
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 126  # 81 degrees of freedom, probability 0.001


def test_order_and_boxes_are_those_that_earlier_runs_had():
    """A change here would continue earlier runs with other data."""
    np.testing.assert_array_equal(streaming.epoch_order(8, 1, 2), [5, 3, 6, 0, 1, 4, 2, 7])
    boxes, flips = decode.random_boxes(1, 2, [375, 375], [500, 500])
    np.testing.assert_array_equal(boxes, [[3, 20, 370, 463], [11, 117, 330, 276]])
    np.testing.assert_array_equal(flips, [True, False])


@pytest.mark.parametrize("process_count", [2, 3])
def test_global_batches_are_the_same_on_any_number_of_processes(process_count):
    source = MemorySource(patterned())
    parts = [
        list(train(source, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    assert_same(joined(parts), list(train(source)))


@settings(max_examples=12)
@given(
    first=st.integers(0, 7),
    process_count=st.sampled_from([1, 2, 3, 4]),
    threads=st.integers(1, 40),
    random_crop=st.booleans(),
)
def test_a_run_continues_at_any_step_on_any_number_of_processes(
    first, process_count, threads, random_crop
):
    source = MemorySource(patterned())
    options = {"last_step": 8, "batch_size": 24, "random_crop": random_crop}
    parts = [
        list(
            train(
                source,
                first_step=first,
                process_index=index,
                process_count=process_count,
                workers=streaming.Workers(threads),
                **options,
            )
        )
        for index in range(process_count)
    ]
    assert_same(joined(parts), list(train(source, **options))[first:])


def test_large_batches_are_joined_from_chunks():
    source = MemorySource(coloured(30))
    (batch,) = train(source, batch_size=150, last_step=1)  # 3 chunks of 50
    found = numbers([batch]).reshape(5, 30)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(30), (5, 1)))


def test_boxes_and_flips_are_those_of_the_position():
    source = MemorySource(patterned())
    batches = list(train(source, last_step=4))
    images = np.concatenate([batch.images for batch in batches])
    position = 0
    for epoch in range(3):
        for index in streaming.epoch_order(23, 3, epoch):
            if position == len(images):
                break
            encoded = source.images[index]
            height, width = decode.image_size(encoded)
            boxes, flips = decode.random_boxes(3, position, [height], [width])
            expected = decode.decode_box(encoded, boxes[0], SIZE)
            expected = expected[:, ::-1] if flips[0] else expected
            np.testing.assert_array_equal(images[position], expected)
            position += 1
    assert position == 48


def test_without_random_crops_the_central_square_is_taken():
    source = MemorySource(patterned())
    for batch in train(source, last_step=4, random_crop=False):
        for image, label in zip(batch.images, batch.labels, strict=True):
            candidates = [
                decode.decode_box(encoded, decode.central_box(*decode.image_size(encoded)), SIZE)
                for encoded in source.images[label::5]
            ]
            assert any(np.array_equal(image, candidate) for candidate in candidates)


def test_another_seed_gives_another_stream():
    source = MemorySource(coloured(30))
    one, other = (numbers(list(train(source, seed=seed))) for seed in (1, 2))
    assert (one != other).any()
    # Nor is one the other a whole epoch later, as with Grain's own seeds.
    assert (one[30:60] != other[:30]).any()
    assert (one[:30] != other[30:60]).any()


def test_only_what_is_needed_is_read():
    source = MemorySource(coloured(200))
    batches = train(source, last_step=None, first_step=1000, workers=streaming.Workers(2))
    assert source.reads == []
    next(batches)
    batches.close()
    expected = {streaming.example_index(200, 3, 12_000 + place) for place in range(12)}
    assert expected <= set(source.reads)
    assert len(source.reads) <= 12 * 5  # two threads at work, two batches ready, one taken


@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 12, 31])
def test_evaluation_sees_every_example_once(process_count, examples):
    source = MemorySource(coloured(examples))
    parts = [
        list(
            streaming.eval_batches(
                source,
                batch_size=12,
                image_size=SIZE,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    batches = joined(parts)
    assert len(batches) == -(-examples // 12)
    assert all(batch.images.shape == (12, SIZE, SIZE, 3) for batch in batches)
    weights = np.concatenate([batch.weights for batch in batches])
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < examples)
    images, labels = (np.concatenate([batch[i] for batch in batches]) for i in range(2))
    np.testing.assert_array_equal(
        numbers([streaming.HostBatch(images[:examples], labels[:examples], weights[:examples])]),
        np.arange(examples),
    )
    assert not images[examples:].any()
    assert not labels[examples:].any()


def test_evaluation_takes_the_central_square():
    source = MemorySource(patterned())
    for ratio in (0.875, 0.5):
        batches = streaming.eval_batches(source, batch_size=23, image_size=SIZE, ratio=ratio)
        (batch,) = batches
        for image, encoded in zip(batch.images, source.images, strict=True):
            box = decode.central_box(*decode.image_size(encoded), ratio)
            np.testing.assert_array_equal(image, decode.decode_box(encoded, box, SIZE))


def damaged(count, indices):
    images = list(coloured(count))
    for number, index in enumerate(indices):
        images[index] = b"" if number % 2 else images[index][:50]
    return MemorySource(images)


def eval_all(source, **options):
    return streaming.eval_batches(source, batch_size=12, image_size=SIZE, **options)


@pytest.mark.parametrize("stream", [train, eval_all])
def test_a_damaged_image_is_named(stream):
    source = damaged(30, [17])
    with pytest.raises(CorruptImageError, match=r"/data/train/017\.png.*max_corrupt=0.*damaged"):
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
    positions = [p for p in range(72) if streaming.example_index(23, 3, p) == 7]
    changed = (whole != replaced).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(changed), positions)


def test_a_damaged_image_has_no_weight_in_evaluation():
    broken = [0, 17, 29]
    lines = []
    batches = list(eval_all(damaged(30, broken), corrupt=CorruptExamples(3, lines.append)))
    weights = np.concatenate([batch.weights for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(weights[:30] == 0), broken)
    assert not weights[30:].any()
    assert [line.rsplit("/", 1)[1] for line in lines] == ["000.png", "017.png", "029.png"]


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
    order = [streaming.example_index(23, 3, position) for position in range(23)]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"process_count": 5}, "batch_size=12 must be a multiple of 5, the number of processes"),
        ({"process_count": 3, "process_index": 3}, r"process_index=3 must be in \[0, 3\)"),
        ({"process_count": 0}, "process_count=0 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"first_step": -1}, "first_step=-1 must be at least 0"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        train(MemorySource(coloured(30)), **options)


@pytest.mark.parametrize("ratio", [0, 1.1, float("nan")])
def test_wrong_ratio(ratio):
    with pytest.raises(ConfigError, match=r"ratio=.* must be in \(0, 1\]"):
        eval_all(MemorySource(coloured(30)), ratio=ratio)


@pytest.mark.parametrize("name", ["threads", "processes"])
def test_wrong_workers(name):
    with pytest.raises(ConfigError, match=f"{name}=-1 must be at least 0"):
        streaming.Workers(**{name: -1})


@pytest.mark.parametrize("stream", [train, eval_all])
def test_no_images(stream):
    with pytest.raises(DataError, match="split 'train' has no images"):
        stream(MemorySource([]))


def test_tensorflow_is_not_imported():
    assert "tensorflow" not in sys.modules
