"""What to say when tensorflow-datasets fails: the address, the file and the way out."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import pathlib
from collections.abc import Iterator

from experiments.config import ConfigError
from experiments.data.errors import DataError

NO_TENSORFLOW = (
    "preparing it needs TensorFlow (training does not), which is not installed:"
    " pip install '.[prepare]'"
)


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed; does not import it."""
    return importlib.util.find_spec("tensorflow") is not None


@contextlib.contextmanager
def explained(dataset: str, root: pathlib.Path) -> Iterator[None]:
    """Turns whatever is raised into ConfigError or DataError with a message to act on."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise explain(error, dataset, root) from error


def explain(error: BaseException, dataset: str, root: pathlib.Path) -> ConfigError | DataError:
    """The error to show instead of `error`, which preparing `dataset` in `root` raised."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import extractor

    again = "start the same command again: downloads that are complete are kept"
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, ImportError):
            missing = (cause.name or str(cause)).split(".")[0]
            if missing == "tensorflow":
                return ConfigError(f"{dataset}: {NO_TENSORFLOW}")
            return ConfigError(
                f"{dataset}: preparing it needs the Python package {missing!r}, which is not"
                f" installed ({cause})"
            )
        if _no_space(cause):
            return DataError(
                f"{dataset}: no space left on the disk of {root}; free some, or choose another"
                f" --data_dir, and {again}"
            )
    for cause in chain:
        if isinstance(cause, requests.exceptions.RequestException):
            url = getattr(cause.request, "url", None) or "a file"
            reason = getattr(cause.args[0], "reason", None) if cause.args else None
            return DataError(
                f"{dataset}: cannot download {url} into {root / 'downloads'}:"
                f" {_shortened(reason or cause)}\nIs there a network? When there is,"
                f" {again}. Or download the file otherwise, put it into a folder, and add"
                " --manual_dir=FOLDER"
            )
        if isinstance(cause, tfds.download.DownloadError):
            return DataError(
                f"{dataset}: a download into {root / 'downloads'} failed: {_shortened(cause)}\n"
                f"The server may be down for now: {again}"
            )
        if type(cause).__name__ == "NonMatchingChecksumError":
            return DataError(
                f"{dataset}: a downloaded file is not the published one:"
                f" {' '.join(str(cause).split())}\nIt is not used; delete it if you put it there,"
                f" and {again}"
            )
        if isinstance(cause, extractor.ExtractError):
            return DataError(f"{dataset}: an archive cannot be unpacked: {_shortened(cause)}")
    if isinstance(error, AssertionError):  # what tensorflow-datasets raises for wrong requests
        return ConfigError(f"{dataset}: {_shortened(error)}")
    return DataError(
        f"{dataset}: preparing it in {root} failed inside tensorflow-datasets:"
        f" {type(error).__name__}: {_shortened(error)}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _no_space(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # ArrayRecord's writer and tensorflow-datasets themselves have only texts.
    texts = ("No space left on device", "Disk quota exceeded", "Not enough disk space")
    return any(text in str(error) for text in texts)


def _shortened(error: BaseException, most: int = 600) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + " ..."
