"""Prepares a dataset: `python -m experiments.prepare --dataset=NAME --data_dir=DIR`.

Downloads a dataset of tensorflow-datasets and stores it as ArrayRecord files, which training
reads without TensorFlow. Started again after an interruption, even a hard one, it keeps the
downloads that were complete and writes the records anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import logging as absl_logging

from experiments import prepare_errors, prepare_requirements
from experiments.command_line import Parser, closest
from experiments.config import ConfigError
from experiments.data.errors import DataError
from experiments.paths import local_path
from experiments.prepare_requirements import gigabytes
from experiments.terminal import swallowed_interrupts_unprinted, tolerant_output

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

REPORT_EVERY = 30.0
"""Seconds between lines on progress, where there is no terminal for bars."""

RETRIES = 5
"""Attempts after a failed connection, 6 s in all; tensorflow-datasets' own 10 take 200 s."""

IDX_DATASETS = ("mnist", "fashion_mnist", "kmnist")
"""Datasets whose publishers' four idx files `--idx_dir` takes."""

_CONFIGS = pathlib.Path(__file__).parent / "configs"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.prepare",
        description="Downloads a dataset of tensorflow-datasets and stores it as ArrayRecord"
        " files, which training reads without TensorFlow. Started again, it goes on: finished"
        " downloads are kept.",
        epilog="Without a download: Debian's package dataset-fashion-mnist puts the four files of"
        " Fashion-MNIST into /usr/share/datasets/fashion-mnist; then: python -m"
        " experiments.prepare --dataset=fashion_mnist"
        " --idx_dir=/usr/share/datasets/fashion-mnist --data_dir=DIR",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="e.g. cifar10, cifar100, mnist, imagenet2012, emnist/letters",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="local folder for all prepared datasets")
    parser.add_argument(
        "--manual_dir",
        metavar="DIR",
        help="folder with files that were downloaded by hand, under their own names"
        " (default: DIR/downloads/manual); with --dataset=folder that of the class folders",
    )
    parser.add_argument(
        "--idx_dir",
        metavar="DIR",
        help="folder with the four idx files, instead of a download, and without TensorFlow"
        f" ({', '.join(IDX_DATASETS)})",
    )
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    asked, unknown = parser.parse_known_args(list(words))
    if unknown:
        names = ("--dataset", "--data_dir", "--manual_dir", "--idx_dir", "--help")
        hint = closest(unknown[0].split("=", 1)[0], names)
        raise ConfigError(f"{unknown[0]}: no such argument.{hint}\nArguments: {', '.join(names)}")
    if not asked.dataset:
        raise ConfigError(
            "--dataset is missing, e.g. python -m experiments.prepare --dataset=cifar10"
            f" --data_dir={asked.data_dir or 'data'}"
        )
    return asked


def prepare(
    dataset: str, data_dir: str | None, manual_dir: str | None = None, idx_dir: str | None = None
) -> None:
    """Prepares a dataset in `data_dir`, or says that there is nothing to do.

    Args:
      dataset: its name in tensorflow-datasets, as `sources.open_source` takes it.
      data_dir: local folder of all datasets; made where there is none.
      manual_dir: folder with files that were downloaded by hand, or of class folders.
      idx_dir: folder with the idx files of a dataset of the MNIST family.

    Raises:
      ConfigError: the dataset is unknown, not one of images and labels, stored in another format
        already, or something has to be installed or downloaded by hand first: one for all of that.
      DataError: a download failed, or a file is damaged.
    """
    if dataset == "digits" or (dataset == "folder" and not manual_dir):
        _say_nothing_to_prepare(dataset)
        return
    # tensorflow-datasets takes a second to import, and what needs it comes only now.
    from experiments.data import prepared

    wrong = []
    if not data_dir or "://" in data_dir:
        wrong = [f"--data_dir={data_dir or ''} must be a local folder for the dataset"]
        data_dir, manual_dir = "DIR", manual_dir or "FILES"
    root = local_path("--data_dir", data_dir)
    manual = local_path("--manual_dir", manual_dir or str(root / "downloads" / "manual"))
    try:
        if dataset == "folder":
            task = _own_images(root, manual)
        else:
            task = _of_catalogue(dataset, root, manual, idx_dir)
    except ConfigError as error:
        raise ConfigError("\n".join([*wrong, str(error)])) from error
    if not task.folder.exists():
        wrong += task.missing
    if len(wrong) > 1 or data_dir == "DIR":
        command = prepared.prepare_command(dataset, data_dir, manual_dir)
        wrong.append(f"what would work:\n  {command}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    if task.folder.exists():
        info = _check_prepared(task.folder)
        task.check(info)
        print(f"{task.dataset} is already prepared.")
    else:
        _build(task.make_builder(), root, manual)
        info = _check_prepared(task.folder)
    for split in info.splits.values():
        print(f"{split.name}: {split.num_examples:,} images")
    for label, classes in prepared.class_labels(info.features, task.dataset).items():
        print(f"{label}: {classes:,} classes")
    downloads = root / "downloads" / info.name
    if size := _size(downloads):
        print(f"no longer needed, {gigabytes(size)}: {downloads}")
    _, shape = prepared.image_feature(info.features, task.dataset)
    command = _train_command(task.dataset, data_dir, None in shape)
    print(f"folder: {task.folder}\nto train: {command}")


class _Task(NamedTuple):
    """What there is to do.

    Attributes:
      dataset: its name.
      folder: where it goes.
      missing: what has to be there first.
      make_builder: makes what writes it.
      check: takes the `DatasetInfo` of what is in `folder`; raises ConfigError unless it is this.
    """

    dataset: str
    folder: pathlib.Path
    missing: list[str]
    make_builder: Callable[[], Any]
    check: Callable[[Any], None] = lambda info: None


def _of_catalogue(
    dataset: str, root: pathlib.Path, manual: pathlib.Path, idx_dir: str | None
) -> _Task:
    """A dataset of tensorflow-datasets."""
    from experiments.data import idx, prepared
    from experiments.data.folder import PREFIX

    name = prepared.parse_name(dataset)
    if name.name.startswith(PREFIX):
        command = prepared.prepare_command(dataset, root)
        raise ConfigError(f"--dataset={dataset}: such names are those of class folders: {command}")
    if idx_dir is not None and (name.name not in IDX_DATASETS or name.config):
        raise ConfigError(f"--idx_dir is for {', '.join(IDX_DATASETS)}, not for {dataset}")
    with prepare_errors.explained(dataset, root):
        builder = _builder(name, root)
        prepared.image_feature(builder.info.features, dataset)
        prepared.class_labels(builder.info.features, dataset)
    folder = pathlib.Path(builder.data_dir)
    if idx_dir is not None:
        return _Task(dataset, folder, [], lambda: idx.make_builder(builder, idx_dir, root))

    def checked() -> Any:
        if builder.name == "imagenet2012":
            prepare_requirements.check_imagenet(manual, root)
        return builder

    return _Task(dataset, folder, prepare_requirements.missing(builder, manual), checked)


def _own_images(root: pathlib.Path, manual: pathlib.Path) -> _Task:
    """The class folders in `manual`."""
    from experiments.data import own_images

    own = own_images.find(manual, root)
    return _Task(own.name, own.folder, [], own.builder, own.check_prepared)


def _say_nothing_to_prepare(dataset: str) -> None:
    if dataset == "digits":
        print("digits comes with scikit-learn; there is nothing to prepare.")
    else:
        print(
            "dataset=folder reads image files where they are: DIR/train/<class>/<image> and"
            " DIR/val/<class>/<image>; there is nothing to prepare.\nSmall images of one shape lie"
            " on the device once they are stored as records: python -m experiments.prepare"
            " --dataset=folder --manual_dir=DIR --data_dir=RECORDS"
        )
    print(f"to train: {_train_command(dataset, 'DIR', large=dataset == 'folder')}")


def _train_command(dataset: str, data_dir: str, large: bool) -> str:
    """The command that trains on a dataset, with its own config file if it has one."""
    own = _CONFIGS / f"{re.split('[/:]', dataset)[0]}.py"
    config = own if own.is_file() else _CONFIGS / "fashion_mnist.py"
    words = ["python", "-m", "experiments.train"]
    words.append(f"--config={config.relative_to(_CONFIGS.parents[1])}")
    if dataset != "digits":
        words += [f"--config.dataset={dataset}", f"--config.data_dir={data_dir}"]
    if large and config != own:
        words.append("--config.model=resnet50")
    return shlex.join(words)


def _builder(name: Any, root: pathlib.Path) -> Any:
    """The builder of tensorflow-datasets; raises ConfigError where it has none of that name."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.name not in known:
        hint = closest(name.name, known)
        if not prepare_errors.has_tensorflow():
            hint += " Some are known only where TensorFlow is installed: pip install '.[prepare]'"
        raise ConfigError(
            f"--dataset={name}: tensorflow-datasets {tfds.__version__} has no dataset"
            f" {name.name!r}.{hint}"
        )
    builder_class = tfds.builder_cls(name.name)
    configs = sorted(builder_class.builder_configs)
    if name.config and name.config not in configs:
        raise ConfigError(
            f"--dataset={name}: no such config.{closest(name.config, configs)}"
            f" Configs of {name.name}: {', '.join(configs) or 'none'}"
        )
    options = {"config": name.config, "version": name.version}
    return builder_class(data_dir=root, **{k: v for k, v in options.items() if v})


def _check_prepared(folder: pathlib.Path) -> Any:
    """The `DatasetInfo`; raises ConfigError or DataError where the folder cannot be used."""
    from experiments.data import prepared, tfds_source

    prepared.check_complete(folder)
    info = prepared.read_info(folder)
    for split in info.splits.values():
        tfds_source.check_files(tfds_source.shards(split), folder)
    return info


def _build(builder: Any, root: pathlib.Path, manual: pathlib.Path) -> None:
    """Downloads and writes, alone, and leaves nothing unfinished behind."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = RETRIES
    folder = pathlib.Path(builder.data_dir)
    downloads = root / "downloads" / builder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data_dir={root}: cannot be written to: {error}") from error
    config = tfds.download.DownloadConfig(
        extract_dir=downloads / "extracted",
        manual_dir=manual,
        try_download_gcs=False,  # what is stored there is in another format
    )
    with _alone(root, builder.name):
        _remove_unfinished(folder.parent, downloads, say=print)
        print(f"preparing {builder.info.full_name} in {folder}", flush=True)
        try:
            with (
                prepare_errors.explained(builder.name, root),
                _progress(builder.name, downloads, folder.parent),
            ):
                builder.download_and_prepare(download_config=config, file_format="array_record")
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it has arrived; now nothing may stop this:
            raise
        finally:
            _remove_unfinished(folder.parent, downloads)


@contextlib.contextmanager
def _alone(root: pathlib.Path, name: str) -> Iterator[None]:
    """Holds a lock that the kernel releases when this process ends, in whatever way."""
    path = root / f".{name}.lock"
    try:
        opened = path.open("a+")
    except OSError as error:
        raise ConfigError(f"--data_dir={root}: cannot be written to: {error}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{name} is being prepared in {root} by another process ({file.read().strip()});"
                f" wait until it has finished, or stop it (lock file: {path})"
            ) from None
        except OSError as error:
            print(f"note: {path} cannot be locked ({error}); start nothing else in {root}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _remove_unfinished(folder: pathlib.Path, downloads: pathlib.Path, say: Any = None) -> None:
    """Removes partial records, downloads and unpacked archives; complete ones are kept."""
    unfinished = [*folder.glob("incomplete.*"), *(downloads / "extracted").glob("incomplete.*")]
    partial = re.compile(r"\.tmp\.[0-9a-f]{32}$")
    # Not by a recursive glob, which fails where a download's thread removes a folder meanwhile.
    for parent, folders, _ in os.walk(downloads):
        unfinished += [pathlib.Path(parent, name) for name in folders if partial.search(name)]
    for path in unfinished:
        if say:
            say(f"removing what an interrupted run left: {path}")
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _progress(name: str, downloads: pathlib.Path, folder: pathlib.Path) -> Iterator[None]:
    """Bars of tensorflow-datasets on a terminal, otherwise a line now and then."""
    import tensorflow_datasets as tfds

    if sys.stderr.isatty():
        yield
        return
    started, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(REPORT_EVERY):
            minutes = (time.monotonic() - started) / 60
            print(
                f"{name}: {gigabytes(_size(downloads))} downloaded,"
                f" {gigabytes(sum(map(_size, folder.glob('incomplete.*'))))} written,"
                f" {minutes:.1f} minutes",
                flush=True,
            )

    thread = threading.Thread(target=report, daemon=True)
    tfds.disable_progress_bar()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tfds.enable_progress_bar()


def _size(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder, some of which may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(path, name))
    return total


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Raises KeyboardInterrupt now, and again soon: a callback, or a library, may swallow one."""
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise KeyboardInterrupt


@tolerant_output()
@swallowed_interrupts_unprinted()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 (data, network), 2 (wrong setting), 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = _parse(words)
        prepare(asked.dataset, asked.data_dir, asked.manual_dir, asked.idx_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        command = shlex.join(["python", "-m", "experiments.prepare", *words])
        print(f"\ninterrupted; to continue: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    # TensorFlow only encodes images here: it needs no GPU, and nobody needs its start-up messages.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # every retry would be a line
    absl_logging.set_verbosity(absl_logging.FATAL)
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _interrupt)
    exit_code = main()
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Downloads run in threads that cannot be stopped, and the interpreter would wait for them.
    os._exit(exit_code)
