"""Paths that a user names, on a command line or in a config: `~` is the user's home folder."""

from __future__ import annotations

import os
import pathlib

from experiments.config import ConfigError


def local_path(argument: str, value: str) -> pathlib.Path:
    """The path that `value` stands for, whether it exists or not.

    Args:
      argument: what the user gave it by, for the message, e.g. "--workdir".
      value: as the user wrote it; shells leave the `~` of `--workdir=~/runs` as it is.

    Raises:
      ConfigError: it cannot be a path here; the message names `argument`.

    Example:
      >>> local_path("--workdir", "~/runs") == pathlib.Path.home() / "runs"
      True
    """
    try:
        path = pathlib.Path(value).expanduser()
        path.is_dir()  # too long a name, or no leave to look
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{argument}={value}: not a path that can be used: {reason}") from error
    return path


def output_file(argument: str, value: str) -> pathlib.Path:
    """The path of a file that is to be written, said to be one before minutes have passed.

    Args:
      argument: what the user gave it by, e.g. "--json".
      value: as the user wrote it.

    Raises:
      ConfigError: it is a folder, or lies in none that can be written to.
    """
    path = local_path(argument, value)
    if path.is_dir():
        raise ConfigError(f"{argument}={value} must be a file, and is a folder")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{argument}={value}: {path.parent} must be a folder to write to")
    return path


def work_folder(value: str) -> pathlib.Path:
    """The path of `--workdir`, in which checkpoints can be written.

    Raises:
      ConfigError: it cannot be a path, or its name is not UTF-8, which orbax and XLA need.
    """
    path = local_path("--workdir", value)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--workdir={value}: its whole path must be UTF-8, or no checkpoint can be written;"
            f" {path.absolute()} is not"
        ) from error
    return path
