"""Image-classification datasets of tensorflow-datasets, read from ArrayRecord without TensorFlow.

Records are parsed here: tensorflow-datasets' own reading takes five to ten times as long, most of
it under the interpreter's lock.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
import pathlib
import resource
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from array_record.python import array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from experiments.command_line import closest
from experiments.config import ConfigError
from experiments.data import prepared
from experiments.data.errors import DataError
from experiments.data.sources import Example

EVALUATION = ("test", "validation", "val")
"""Splits to evaluate on, the first choice first; one without labels is passed over."""

_OTHER_FILES = 1024  # how many files a process may have open besides a dataset's


@dataclasses.dataclass(frozen=True)
class Shard:
    """Records `first` to `first + size - 1` of a file that holds `total`."""

    path: str
    first: int
    size: int
    total: int


class TfdsSource:
    """The examples of one split, in the order of its record files; see `sources.Source`."""

    def __init__(
        self,
        split: str,
        shards: Sequence[Shard],
        keys: tuple[str, str],
        num_classes: int,
        image_shape: tuple[int | None, int | None, int],
    ) -> None:
        """Opens no file; `keys` are the names of image and label in a record."""
        self.split = split
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.passed_over: Mapping[str, int] = {}
        self._shards = tuple(shards)
        self._ends = list(itertools.accumulate(shard.size for shard in shards))
        self._keys = keys
        self._start()

    def _start(self) -> None:
        _allow_open_files(len(self._shards))
        self._lock = threading.Lock()
        self._readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process: open files and their lock."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Files are opened again when they are read."""
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        """How many examples there are."""
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the shard and of the record in its file."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in [0, {len(self)})")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        return number, int(index) - (self._ends[number] - shard.size) + shard.first

    def name(self, index: int) -> str:
        """The record file, and the number of the record in it."""
        number, record = self._place(index)
        return self._name(number, record)

    def _name(self, number: int, record: int) -> str:
        return f"{self._shards[number].path}, record {record}"

    def read(self, indices: Sequence[int]) -> list[Example]:
        """As `sources.Source.read`."""
        # One call a file: array_record's own data source starts threads for every batch, which
        # takes ten times as long as reading records from many files one after the other.
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for slot, index in enumerate(indices):
            number, record = self._place(index)
            slots, records = groups.setdefault(number, ([], []))
            slots.append(slot)
            records.append(record)
        examples: list[Any] = [None] * len(indices)
        for number, (slots, records) in groups.items():
            contents = self._read_records(number, records)
            for slot, record, content in zip(slots, records, contents, strict=True):
                examples[slot] = self._parse(content, number, record)
        return examples

    def _reader(self, number: int) -> Any:
        reader = self._readers.get(number)
        if reader is None:
            with self._lock:
                reader = self._readers.get(number)
                if reader is None:
                    reader = self._readers[number] = _open_reader(self._shards[number].path)
        return reader

    def _read_records(self, number: int, records: Sequence[int]) -> list[bytes]:
        try:
            return self._reader(number).read(records)
        except (RuntimeError, IndexError, ValueError) as error:
            if len(records) > 1:  # which one is it?
                return [self._read_records(number, [record])[0] for record in records]
            raise DataError(f"{self._name(number, records[0])}: cannot be read: {error}") from error

    def _parse(self, content: bytes, number: int, record: int) -> Example:
        """As `_parse_unchecked`; raises DataError where the label is none of the classes."""
        label, (encoded, value) = self._keys[1], self._parse_unchecked(content, number, record)
        if not 0 <= value < self.num_classes:
            raise DataError(
                f"{self._name(number, record)}: {label!r} is {value}; it must be from 0 to"
                f" {self.num_classes - 1}" + (" (-1: there is no label)" if value == -1 else "")
            )
        return Example(encoded, value)

    def _parse_unchecked(self, content: bytes, number: int, record: int) -> tuple[bytes, int]:
        """Image and label of a record; raises DataError where it has none."""
        image, label = self._keys
        try:
            feature = tf_example_pb2.Example.FromString(content).features.feature
            return feature[image].bytes_list.value[0], feature[label].int64_list.value[0]
        except (DecodeError, IndexError) as error:
            raise DataError(
                f"{self._name(number, record)}: no example with {image!r} and {label!r}: {error}"
            ) from error

    def has_labels(self) -> bool:
        """Whether any of the first examples has one; without them a split is published as -1."""
        shard = self._shards[0]
        records = range(shard.first, shard.first + min(shard.size, 16))
        contents = self._read_records(0, records)
        pairs = zip(records, contents, strict=True)
        return any(self._parse_unchecked(content, 0, record)[1] >= 0 for record, content in pairs)


def _open_reader(path: str) -> Any:
    # Read-ahead is for reading in order; the small buffer is what array_record itself uses.
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )


def _allow_open_files(count: int) -> None:
    """Raises the process's own limit, often 1,024, since each record file stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = count + _OTHER_FILES
    if soft == unlimited or soft >= wanted:
        return
    if hard != unlimited and hard < count + 64:
        raise ConfigError(
            f"the dataset has {count} record files, which are open at the same time, but this"
            f" process may open {hard} files only; raise that limit (ulimit -n)"
        )
    allowed = wanted if hard == unlimited else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def open_dataset(dataset: str, data_dir: str, split: str = "", label: str = "label") -> TfdsSource:
    """Opens one split; the arguments are those of `sources.open_source`.

    The end of every record file of the split is read, which finds those that are missing,
    truncated or of another length than recorded: 0.3 s for ImageNet's 1,024 files on a local
    disk. A damaged record inside a file is found when it is read.

    Raises:
      ConfigError: dataset, split or label is not there, or not one that can be learnt.
      DataError: a file is missing or damaged.
    """
    name = prepared.parse_name(dataset)
    folder = prepared.find_folder(name, data_dir)
    info = prepared.read_info(folder)
    if not split:
        return _evaluation_split(info, folder, label)
    source = _open_split(info, folder, split, label)
    if not source.has_labels():
        raise ConfigError(f"split {split!r} of {name} has no labels; {_splits(info)}")
    return source


def _splits(info: Any) -> str:
    return "splits: " + ", ".join(f"{k} ({v.num_examples:,})" for k, v in info.splits.items())


def _evaluation_split(info: Any, folder: pathlib.Path, label: str) -> TfdsSource:
    for split in EVALUATION:
        if split in info.splits and info.splits[split].num_examples:
            source = _open_split(info, folder, split, label)
            if source.has_labels():
                return source
    raise ConfigError(
        f"{folder} has no split {', '.join(EVALUATION)} with labels to evaluate on;"
        f" {_splits(info)}. Name one, or a part of one, e.g. train[90%:] after training on"
        " train[:90%]"
    )


def _open_split(info: Any, folder: pathlib.Path, split: str, label: str) -> TfdsSource:
    dataset = info.full_name
    image, shape = prepared.image_feature(info.features, dataset)
    labels = prepared.class_labels(info.features, dataset)
    if not labels.get(label):
        raise ConfigError(
            f"label={label!r}: {dataset} has no such class label.{closest(label, labels)}"
            f" Labels: {', '.join(f'{key} ({n} classes)' for key, n in labels.items())}"
        )
    try:
        files = shards(info.splits[split])
    except Exception as error:  # of several types, by what is wrong with a slice
        reason = f" ({str(error).splitlines()[0]})" if split.split("[")[0] in info.splits else ""
        raise ConfigError(
            f"split {split!r}: {dataset} has no such split{reason}.{closest(split, info.splits)}"
            f" Its {_splits(info)}; a part of one: train[:90%], train[1000:2000]"
        ) from error
    if not files:
        raise ConfigError(f"split {split!r} of {dataset} has no examples; {_splits(info)}")
    check_files(files, folder)
    return TfdsSource(split, files, (image, label), labels[label], shape)


def shards(split: Any) -> list[Shard]:
    """What a `SplitInfo` of tensorflow-datasets takes from which file."""
    instructions = split.file_instructions
    return [Shard(i.filename, i.skip, i.take, i.examples_in_shard) for i in instructions]


def check_files(parts: Iterable[Shard], folder: pathlib.Path) -> None:
    """Raises DataError where a record file is missing, damaged or of another length than told."""
    totals = {shard.path: shard.total for shard in parts}
    with ThreadPoolExecutor(16) as pool:
        messages = pool.map(_wrong, totals, totals.values())
        wrong = [message for message in messages if message]
    if wrong:
        others = f" (and {len(wrong) - 1} more of {len(totals)} files)" if len(wrong) > 1 else ""
        raise DataError(
            f"{wrong[0]}{others}. Copy it again from where it is whole, or delete {folder} and"
            f" prepare it again:\n  {prepared.prepare_command(*prepared.dataset_and_root(folder))}"
        )


def _wrong(path: str, expected: int) -> str:
    """What is wrong with a record file; empty where nothing is."""
    if not os.path.exists(path):
        return f"{path} is missing"
    if not os.path.getsize(path):
        return f"{path} is empty (0 bytes)"
    try:
        reader = _open_reader(path)
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:
        return f"{path} is truncated or damaged ({error})"
    if records != expected:
        return f"{path} has {records} records, but {prepared.INFO} says {expected}"
    return ""
