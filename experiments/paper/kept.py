"""Parts of a long measurement in a file, so that started again it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments import distributed, metrics, workdir
from experiments.config import Config, ConfigError


class Kept:
    """The parts of one measurement that are done, by name; JSON values.

    Attributes:
      commits: the commits that the parts used so far were measured at, each once; with "+" behind
        one that had uncommitted changes, and None outside a git checkout.
    """

    def __init__(self, path: pathlib.Path | None, config: Config, how: Mapping[str, Any]) -> None:
        """Reads what is done already.

        Args:
          path: the file; None keeps nothing.
          config: of the measurement; seeds and methods may differ from those of before.
          how: what the parts depend on besides.

        Raises:
          ConfigError: the file is damaged, or of another measurement; the message says what
            differs.
        """
        self._path, self._config = path, config
        self._how = json.loads(json.dumps(how))
        self._parts: dict[str, Any] = {}
        self.commits: list[str | None] = []
        if path is not None:
            self._parts = distributed.from_main(lambda: self._read(path))

    def _read(self, path: pathlib.Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        content = metrics.read_json(path)
        names = ("config", "how", "parts")
        if not isinstance(content, dict) or not all(
            isinstance(content.get(name), dict) for name in names
        ):
            raise ConfigError(
                f"{path} must have {', '.join(names)}, an object each, as this command writes it;"
                " delete it to measure anew"
            )
        what = f"{path} holds measurements"
        workdir.check_same(self._config, content["config"], what)
        workdir.check_settings(content.get("settings", {}), what)
        for name, value in self._how.items():
            if content["how"].get(name) != value:
                raise ConfigError(
                    f"{path} holds measurements with {name}={content['how'].get(name)!r}, not"
                    f" {value!r}; give another --workdir"
                )
        return dict(content["parts"])

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """A part that is done already, or is measured now and kept.

        Args:
          name: of the part.
          measure: returns what JSON can hold.
        """
        if name not in self._parts:
            commit, status = metrics.checkout()
            entry = {"commit": f"{commit}+" if commit and status else commit, "found": measure()}
            self._parts[name] = entry
            if self._path is not None and distributed.is_main():
                content = {"config": dataclasses.asdict(self._config), "how": self._how}
                content["settings"] = metrics.settings()
                metrics.write_json(self._path, content | {"parts": self._parts})
        part = self._parts[name]
        if part["commit"] not in self.commits:
            self.commits.append(part["commit"])
        return part["found"]
