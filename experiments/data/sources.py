"""Where encoded images come from: tensorflow-datasets, or a folder of class folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class Example(NamedTuple):
    """One image as it lies on disk (JPEG, PNG, ...) and its label, from 0 on."""

    encoded: bytes
    label: int


class Source(Protocol):
    """Random access to the examples of one split; can be pickled, and read from many threads.

    Attributes:
      split: the name of the split.
      num_classes: how many labels there are.
      image_shape: height, width and channels; None where images differ in it.
      passed_over: how many files lie among the images that are none, by kind, e.g. ".txt".
    """

    split: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    passed_over: Mapping[str, int]

    def __len__(self) -> int:
        """How many examples there are."""

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The examples at `indices`, in that order; raises DataError where a file is damaged."""

    def name(self, index: int) -> str:
        """What to call the example in a message: its file, or record file and place in it."""


def counted(kinds: Mapping[str, int]) -> str:
    """How many files there are of each kind, the most first.

    Example:
      >>> counted({".txt": 1, ".heic": 1200})
      '1,200 .heic, 1 .txt'
    """
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 10} more kinds" if len(ordered) > 10 else ""
    return ", ".join(f"{number:,} {kind}" for kind, number in ordered[:10]) + more


def open_source(dataset: str, data_dir: str, split: str = "", label: str = "label") -> Source:
    """Opens one split of a dataset on disk.

    Args:
      dataset: "folder", for `data_dir/<split>/<class>/<image>`; or a dataset of tensorflow-datasets
        (`name`, `name/config`, each with or without `:version`) that `experiments.prepare` has
        prepared in `data_dir`.
      data_dir: a local folder.
      split: e.g. "train", or a slice such as "train[:90%]" (of tensorflow-datasets only). Empty:
        the split to evaluate on, which is test where it has labels, or else validation.
      label: the feature to learn, where a dataset has several labels.

    Returns:
      The split's examples.

    Raises:
      ConfigError: the dataset, the split or the label is not there.
      DataError: a file is missing or damaged; what can be seen without reading every record is
        found here.
    """
    # Only what is asked for is imported: tensorflow-datasets takes a second.
    if dataset == "folder":
        from experiments.data import folder

        return folder.open_folder(data_dir, split, label)
    from experiments.data import tfds_source

    return tfds_source.open_dataset(dataset, data_dir, split, label)
