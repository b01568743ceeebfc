"""Folders that a user names."""

from __future__ import annotations

import pathlib

from experiments.config import ConfigError


def local_folder(argument: str, value: str) -> pathlib.Path:
    """The path that `value` stands for, whether it exists or not.

    Raises:
      ConfigError: it cannot be a path here; the message names `argument`.
    """
    try:
        path = pathlib.Path(value).expanduser()
        path.is_dir()  # too long a name, or no leave to look
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{argument}={value}: not a folder that can be used: {reason}") from error
    return path
