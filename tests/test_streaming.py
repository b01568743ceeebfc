"""The stream of batches: order, processes, resuming, evaluation, wrong settings."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import ConfigError
from experiments.data import chunks, decode, streaming
from experiments.data.errors import DataError
from tests.image_sources import (
    SIZE,
    MemorySource,
    assert_same,
    coloured,
    eval_all,
    joined,
    numbers,
    patterned,
    train,
)


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
        chunks.example_index(examples, seed, epoch * examples + place) for place in range(examples)
    ]
    assert sorted(order) == list(range(examples))
    chunks._epoch_order.cache_clear()
    np.testing.assert_array_equal(chunks.epoch_order(examples, seed, epoch), order)


def test_orders_are_uniform_and_those_of_seeds_unrelated():
    orders = np.stack(
        [chunks.epoch_order(10, seed, epoch) for seed in range(40) for epoch in range(100)]
    )
    # By chance about two of the 4,000 are equal; were the epochs of a seed those of the one before
    # it, a step later, there would be only 139 different ones.
    assert len(np.unique(orders, axis=0)) > 3980
    counts = np.stack([np.bincount(column, minlength=10) for column in orders.T])
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 126  # 81 degrees of freedom, probability 0.001


def test_order_and_crops_are_those_that_earlier_runs_had():
    """A change here would continue earlier runs with other data."""
    np.testing.assert_array_equal(chunks.epoch_order(8, 1, 2), [5, 3, 6, 0, 1, 4, 2, 7])
    crops, flips = decode.random_crops(1, 2, [375, 375], [500, 500])
    np.testing.assert_array_equal(crops, [[3, 20, 370, 463], [11, 117, 330, 276]])
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


def test_crops_and_flips_are_those_of_the_position():
    source = MemorySource(patterned())
    batches = list(train(source, last_step=4))
    images = np.concatenate([batch.images for batch in batches])
    position = 0
    for epoch in range(3):
        for index in chunks.epoch_order(23, 3, epoch):
            if position == len(images):
                break
            encoded = source.images[index]
            height, width = decode.image_size(encoded)
            crops, flips = decode.random_crops(3, position, [height], [width])
            expected = decode.decode_crop(encoded, crops[0], SIZE)
            expected = expected[:, ::-1] if flips[0] else expected
            np.testing.assert_array_equal(images[position], expected)
            position += 1
    assert position == 48


def test_without_random_crops_the_central_square_is_taken():
    source = MemorySource(patterned())
    for batch in train(source, last_step=4, random_crop=False):
        for image, label in zip(batch.images, batch.labels, strict=True):
            candidates = [
                decode.decode_crop(encoded, decode.central_crop(*decode.image_size(encoded)), SIZE)
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
    expected = {chunks.example_index(200, 3, 12_000 + place) for place in range(12)}
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
            crop = decode.central_crop(*decode.image_size(encoded), ratio)
            np.testing.assert_array_equal(image, decode.decode_crop(encoded, crop, SIZE))


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
