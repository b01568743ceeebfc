"""From a config to its data: on the device where it fits, else streamed."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import mesh as meshes
from experiments.config import Config, ConfigError
from experiments.corrections import Corrections
from experiments.data import on_device, sources, streaming, transforms
from experiments.data.corrupt import CorruptExamples
from experiments.data.on_device import EvalBatch, Split

DEVICE_BYTES = 4 * 2**30
"""Larger datasets are streamed unless `storage` says otherwise; ImageNet is, CIFAR is not."""

_WITHOUT_FLIP = ("digits", "mnist", "kmnist", "emnist")

# Of the channels' values from 0 to 255, over ImageNet's training images; the usual constants.
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = 255 * np.array([0.229, 0.224, 0.225], np.float32)


class Shapes(Protocol):
    """What compilation needs of a dataset: everything but its images.

    Attributes:
      mesh: the devices that batches are shared out over.
      num_classes: how many labels there are.
      image_shape: height, width and channels of the images of a batch.
      mean: what to subtract from the values of a batch, float32, (channels,).
      std: what to divide by after that, float32, (channels,).
      train_examples: how many images there are to train on.
    """

    mesh: Mesh
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    train_examples: int


class Data(Shapes, Protocol):
    """What training needs of a dataset.

    Attributes:
      streamed: whether its images are read and decoded batch by batch.
      corrupt: images that were left out.
    """

    streamed: bool
    corrupt: CorruptExamples

    def train_batches(self, seed: int, first_step: int) -> Iterator[Split]:
        """The batch of every step from `first_step` on, uint8 images and int32 labels."""

    def eval_batches(self) -> Iterable[EvalBatch]:
        """Batches that hold every test example once, and padding of weight 0."""


class DeviceData:
    """A dataset on the devices, with a config's batch size and augmentation; see `Data`.

    `train` holds all training images.
    """

    streamed = False

    def __init__(
        self, dataset: on_device.Dataset, config: Config, corrupt: CorruptExamples, mesh: Mesh
    ) -> None:
        """Keeps what it is given; the dataset lies on the same mesh."""
        self.mesh = mesh
        self._dataset = dataset
        self.train, self._test = dataset.train, dataset.test
        self.num_classes = dataset.num_classes
        _, height, width, channels = dataset.train.images.shape
        self.image_shape = (height, width, channels)
        self.mean, self.std = dataset.mean, dataset.std
        self.train_examples = len(dataset.train.labels)
        self.corrupt = corrupt
        self.steps_per_epoch = self.train_examples // config.batch_size
        self.augmentation: Any = _augmentation(config, streamed=False)
        self._batch_size = config.batch_size

    def with_config(self, config: Config) -> DeviceData:
        """The same images, with another config's batch size and augmentation."""
        return DeviceData(self._dataset, config, self.corrupt, self.mesh)

    def train_batches(self, seed: int, first_step: int) -> Iterator[Split]:
        """As `Data.train_batches`."""
        return on_device.train_batches(
            self.train, seed, first_step, self._batch_size, self.augmentation, self.mesh
        )

    def epoch_order(self, seed: int, epoch: int) -> jax.Array:
        """The order of an epoch, on all devices; see `on_device.epoch_order`."""
        order_of, _ = on_device.compiled(self.mesh)
        return order_of(seed, epoch, examples=self.train_examples)

    def take_batch(
        self, split: Split, order: jax.Array, seed: Any, epoch: Any, index: Any
    ) -> Split:
        """Batch number `index` of an epoch; `on_device.take_batch` with this config's settings."""
        return on_device.take_batch(
            split,
            order,
            seed,
            epoch,
            index,
            batch_size=self._batch_size,
            augmentation=self.augmentation,
        )

    @functools.cached_property
    def _eval_batches(self) -> list[EvalBatch]:
        batches = jax.jit(
            on_device.eval_batches,
            static_argnums=1,
            out_shardings=meshes.batch_sharding(self.mesh),
        )
        eval_batches: list[EvalBatch] = batches(self._test, self._batch_size)
        return eval_batches

    def eval_batches(self) -> list[EvalBatch]:
        """As `Data.eval_batches`."""
        return self._eval_batches


class StreamedData:
    """A dataset that is read and decoded batch by batch; see `Data`."""

    streamed = True

    def __init__(
        self,
        train: sources.Source,
        test: sources.Source,
        config: Config,
        corrupt: CorruptExamples,
        mesh: Mesh,
    ) -> None:
        """Keeps what it is given; opens no file."""
        self.mesh = mesh
        self._train, self._test, self._config = train, test, config
        self.num_classes = train.num_classes
        self.image_shape = (config.image_size, config.image_size, 3)
        self.mean, self.std = _IMAGENET_MEAN, _IMAGENET_STD
        self.train_examples = len(train)
        self.corrupt = corrupt
        self._random_crop = _augmentation(config, streamed=True) == "random_resized_crop"
        self._sharding = meshes.batch_sharding(mesh)

    def train_batches(self, seed: int, first_step: int) -> Iterator[Split]:
        """As `Data.train_batches`."""
        batches = streaming.train_batches(
            self._train,
            seed=seed,
            batch_size=self._config.batch_size,
            image_size=self._config.image_size,
            first_step=first_step,
            random_crop=self._random_crop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self._workers(),
            corrupt=self.corrupt,
        )
        global_batches: Iterator[Any] = streaming.to_device(batches, self._sharding)
        for batch in global_batches:
            yield Split(batch.images, batch.labels)

    def eval_batches(self) -> Iterator[EvalBatch]:
        """As `Data.eval_batches`."""
        batches = streaming.eval_batches(
            self._test,
            batch_size=self._config.batch_size,
            image_size=self._config.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self._workers(),
            corrupt=self.corrupt,
        )
        global_batches: Iterator[Any] = streaming.to_device(batches, self._sharding)
        for batch in global_batches:
            yield EvalBatch(*batch)

    def _workers(self) -> streaming.Workers:
        return streaming.Workers(self._config.loader_threads, self._config.loader_processes)


class Facts(NamedTuple):
    """What is known of a dataset before its images are loaded; see `Data` for the attributes."""

    mesh: Mesh
    num_classes: int
    train_examples: int
    streamed: bool


class _Opened(NamedTuple):
    """A dataset that is open; `load` takes the config, counts corrupt images, and takes a mesh."""

    num_classes: int
    train_examples: int
    streamed: bool
    load: Callable[[Config, CorruptExamples, Mesh], DeviceData | StreamedData]


def load(
    config: Config,
    say: Callable[[str], object] = print,
    mesh: Mesh | None = None,
    check: Callable[[Config, Facts | None], object] = lambda config, facts: None,
) -> DeviceData | StreamedData:
    """The data that a config names.

    Args:
      config: names dataset, folder, splits, label and storage.
      say: called with a line of text for each split, and for each image that is left out.
      mesh: where to put it; by default the mesh that the config asks for.
      check: raises ConfigError where something else cannot work. It is called before images are
        loaded, with None where the dataset cannot be opened.

    Returns:
      The data, on the devices or ready to be streamed.

    Raises:
      ConfigError: the dataset or a split is not there, or settings do not fit it; it is one for all
        that was found.
      DataError: a file is damaged.
    """
    wrong = Corrections(config)
    if mesh is None:
        mesh = wrong.attempt(meshes.make_mesh)
    opened = _open_digits(wrong) if config.dataset == "digits" else _open(wrong, say)
    facts = None
    if mesh is not None and opened is not None:
        classes, examples, streamed, _ = opened
        wrong.attempt(functools.partial(_augmentation, streamed=streamed))
        facts = Facts(mesh, classes**2 if wrong.config.pairs else classes, examples, streamed)
        wrong.attempt(functools.partial(_check_num_classes, num_classes=facts.num_classes))
    wrong.attempt(lambda config: check(config, facts))
    wrong.raise_if_any()
    assert mesh is not None
    assert opened is not None
    return opened.load(config, CorruptExamples(config.max_corrupt, say), mesh)


def _open_digits(wrong: Corrections) -> _Opened:
    def check(config: Config, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} must be {' or '.join(map(repr, allowed))} for"
                " dataset=digits, which is embedded",
                {name: allowed[0]},
            )

    for name, allowed in (
        ("storage", ("auto", "device")),
        ("train_split", ("train",)),
        ("test_split", ("", "test")),
        ("label", ("label",)),
    ):
        wrong.attempt(functools.partial(check, name=name, allowed=allowed))
    train, test = on_device.load_digits()
    return _Opened(10, len(train[1]), False, functools.partial(_on_device, train, test, 10))


def _open(wrong: Corrections, say: Callable[[str], object]) -> _Opened | None:
    """Both splits of a dataset on disk; None where one of them cannot be opened."""
    train, test = (
        wrong.attempt(
            lambda config: sources.open_source(
                config.dataset,
                config.data_dir,
                getattr(config, field),  # noqa: B023
                config.label,
            )
        )
        for field in ("train_split", "test_split")
    )
    if train is None or test is None:
        return None
    for source in (train, test):
        say(
            f"{source.split}: {len(source):,} images, {source.num_classes:,} classes"
            + (
                f"; passed over: {sources.counted(others)}"
                if (others := source.passed_over)
                else ""
            )
        )
    streamed = wrong.attempt(functools.partial(_is_streamed, train=train, test=test)) or False

    def load(config: Config, corrupt: CorruptExamples, mesh: Mesh) -> DeviceData | StreamedData:
        if streamed:
            return StreamedData(train, test, config, corrupt, mesh)
        images, tests = (on_device.load_split(source, corrupt) for source in (train, test))
        return _on_device(images, tests, train.num_classes, config, corrupt, mesh)

    return _Opened(train.num_classes, len(train), streamed, load)


def _is_streamed(config: Config, train: sources.Source, test: sources.Source) -> bool:
    """Whether the images are read batch by batch; raises ConfigError where that cannot be."""
    size = math.inf
    if None not in train.image_shape:
        size = (len(train) + len(test)) * math.prod(n for n in train.image_shape if n is not None)
    if config.storage == "device" and size == math.inf:
        reason = f"images of {config.dataset} differ in shape"
        if config.dataset == "folder":
            reason = (
                "class folders are streamed. Small images of one shape lie on the device once they"
                " are stored as records: python -m experiments.prepare --dataset=folder"
                f" --manual_dir={shlex.quote(config.data_dir)} --data_dir=RECORDS"
            )
        raise ConfigError(
            f"storage='device' must be auto or stream, since {reason}", {"storage": "auto"}
        )
    streamed = config.storage == "stream" or (config.storage == "auto" and size > DEVICE_BYTES)
    if streamed and (config.pool > 1 or config.pairs):
        raise ConfigError(
            f"pool={config.pool} and pairs={config.pairs} must be 1 and False, since"
            f" {config.dataset} is streamed; they are for images on the device",
            ({"pool": 1} if config.pool > 1 else {}) | ({"pairs": False} if config.pairs else {}),
        )
    return streamed


def _check_num_classes(config: Config, num_classes: int) -> None:
    if config.num_classes not in (0, num_classes):
        raise ConfigError(
            f"num_classes={config.num_classes} must be {num_classes}, the number of classes of"
            f" {config.dataset} ({config.label}), or 0",
            {"num_classes": num_classes},
        )


def _on_device(
    train: transforms.Images,
    test: transforms.Images,
    num_classes: int,
    config: Config,
    corrupt: CorruptExamples,
    mesh: Mesh,
) -> DeviceData:
    """The data of images in memory."""
    (train, classes), (test, _) = (
        transforms.transform(split, num_classes, config) for split in (train, test)
    )
    dataset = on_device.make_dataset(train, test, classes, mesh)
    return DeviceData(dataset, config, corrupt, mesh)


def _augmentation(config: Config, streamed: bool) -> str:
    """What `config.augmentation` comes to; raises ConfigError where it does not fit."""
    allowed = ("none", "random_resized_crop") if streamed else ("none", "crop", "crop_flip")
    if config.augmentation == "auto":
        without = config.dataset.split("/")[0].split(":")[0] in _WITHOUT_FLIP
        return "none" if without else allowed[-1]
    if config.augmentation not in allowed:
        where = "streamed" if streamed else "on the device"
        raise ConfigError(
            f"augmentation={config.augmentation!r} must be auto, {', '.join(allowed[:-1])} or"
            f" {allowed[-1]}, since {config.dataset} is {where}",
            {"augmentation": "auto"},
        )
    return config.augmentation


def steps_per_epoch(config: Config, data: Shapes | Facts) -> int:
    """Full batches in an epoch; raises ConfigError where there is none."""
    if config.batch_size > data.train_examples:
        changes: dict[str, Any] = {}
        advice = ""
        if fitting := _fitting_batch(config, data):
            # P. Goyal et al., arXiv 1706.02677: the learning rate goes with the batch.
            rate = float(f"{config.learning_rate * fitting / config.batch_size:.2g}")
            changes = {"batch_size": fitting, "learning_rate": rate}
            advice = f"; for {fitting} a learning_rate of {rate:g} is in proportion"
        raise ConfigError(
            f"batch_size={config.batch_size} must be at most {data.train_examples}, the number of"
            f" training images{advice}",
            changes,
        )
    return data.train_examples // config.batch_size


def _fitting_batch(config: Config, data: Shapes | Facts) -> int:
    """A batch size with which an epoch has some steps; 0 where devices are too many."""
    step = math.lcm(data.mesh.size, config.bn_groups)
    most = data.train_examples
    power = 2 ** int(math.log2(max(most / 10, min(8, most))))
    return max(power, step) // step * step if step <= most else 0
