"""TensorBoard and W&B: read back by TensorBoard itself, and by a stand-in that notes every call."""

import contextlib
import dataclasses
import importlib.util
import inspect
import resource
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config, ConfigError
from experiments.loggers import Loggers, check_installed, open_loggers, scalars

CONFIG = Config(data_dir="there")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "grid" / "runs" / "sgd-seed3"
    folder.mkdir(parents=True)
    return folder


def open_(names, folder, first_step=0):
    return open_loggers(names, folder, CONFIG, "sgd", 3, first_step)


def train_line(step, loss=0.5):
    line = {"kind": "train", "method": "sgd", "seed": 3, "step": step, "epoch": step / 10}
    return line | {"loss": loss}


def test_scalars_are_the_finite_numbers_by_tag():
    line = {
        "kind": "diagnostics", "method": "sgd", "seed": 3, "step": 20, "epoch": 2,
        "gradient_norm": np.float32(0.5), "itop_rate": jnp.bfloat16(0.25), "mask_churn": None,
        "gradient_skew": {"block/kernel": {"mean": float("nan"), "std": jnp.float32(2)}},
        "fan_in": {"kernel": {"mean": np.array(3), "max": np.inf, "all": np.arange(3)}},
        "flag": True, "name": "text", "values": [1, 2], "none": {},
    }  # fmt: skip
    assert scalars(line) == {
        "diagnostics/epoch": 2.0,
        "diagnostics/gradient_norm": 0.5,
        "diagnostics/itop_rate": 0.25,
        "diagnostics/gradient_skew/block/kernel/std": 2.0,
        "diagnostics/fan_in/kernel/mean": 3.0,
    }
    assert {type(value) for value in scalars(line).values()} == {float}


# TensorBoard.


@pytest.fixture
def shown(monkeypatch, run_folder):
    """A function that returns what TensorBoard shows of the run: tag -> [(step, value)]."""
    # With this module there TensorBoard reads files by itself, without TensorFlow.
    stand_in = types.ModuleType("tensorboard.compat.notf")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", stand_in)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read():
        events = EventAccumulator(str(run_folder / "tensorboard"))
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    return read


def test_tensorboard_shows_every_line_once_it_is_written(run_folder, shown):
    with open_(["tensorboard"], run_folder) as loggers:
        loggers.write(train_line(10, loss=0.1) | {"mask_churn": None})
        assert shown() == {
            "train/epoch": [(10, 1.0)],
            "train/loss": [(10, np.float32(0.1))],
        }
        loggers.write({"kind": "eval", "step": 10, "test_accuracy": 0.75})
        loggers.write(train_line(20, loss=np.nan))
        loggers.write({"kind": "diagnostics", "step": 20, "fan_in": {"a/kernel": {"mean": 4}}})
    assert shown() == {
        "train/epoch": [(10, 1.0), (20, 2.0)],
        "train/loss": [(10, np.float32(0.1))],
        "eval/test_accuracy": [(10, 0.75)],
        "diagnostics/fan_in/a/kernel/mean": [(20, 4.0)],
    }


def test_tensorboard_hides_what_was_written_after_the_step_a_run_goes_on_from(run_folder, shown):
    def train(first_step, *steps):
        with open_(["tensorboard"], run_folder, first_step) as loggers:
            for step in steps:
                loggers.write(train_line(step, loss=first_step))

    train(0, 10, 20, 30, 40)
    (first,) = (run_folder / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-7])  # killed in the middle of a write
    assert [step for step, _ in shown()["train/loss"]] == [10, 20, 30]
    train(20)  # killed again, before it wrote anything
    assert shown()["train/loss"] == [(10, 0), (20, 0)]
    train(20, 30, 40)
    assert shown()["train/loss"] == [(10, 0), (20, 0), (30, 20), (40, 20)]
    train(0, 10)  # no checkpoint was left
    assert shown()["train/loss"] == [(10, 0)]


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_logger_and_not_training(run_folder, shown, capsys):
    with open_(["tensorboard"], run_folder) as loggers:
        loggers.write(train_line(10))
        with full_disk(100):
            for step in (20, 30, 40):
                loggers.write(train_line(step))
        loggers.write(train_line(50))
    said = capsys.readouterr().err
    assert said.count("warning: logger tensorboard failed") == 1
    assert "File too large" in said
    assert "metrics.jsonl" in said
    assert shown()["train/loss"] == [(10, 0.5)]


def test_a_folder_that_cannot_be_written_to_does_not_stop_training(run_folder, capsys):
    with full_disk(0):
        loggers = open_(["tensorboard"], run_folder)
    other = run_folder.with_name("sgd-seed4")
    other.write_bytes(b"")  # where the folder should be
    with loggers, open_(["tensorboard"], other) as others:
        loggers.write(train_line(10))
        others.write(train_line(10))
    said = capsys.readouterr().err
    assert said.count("warning: logger tensorboard failed") == 2
    assert "File too large" in said
    assert str(other) in said


# W&B.


class UsageError(Exception):
    """W&B's name for a wrong setting, e.g. nobody logged in."""


class StandIn(types.ModuleType):
    """Stands in for the package wandb and notes calls; holds them against the real one, if any."""

    UsageError = UsageError

    def __init__(self, signature, settings):
        super().__init__("wandb")
        self.signature, self.settings = signature, settings
        self.calls, self.failing = [], {}

    def _note(self, call, arguments):
        self.calls.append((call, arguments))
        if call in self.failing:
            raise self.failing[call]

    def init(self, **arguments):
        if self.signature is not None:
            self.signature.bind(**arguments)
            assert set(arguments["settings"]) <= self.settings
        self._note("init", arguments)
        return self

    def log(self, values, step):
        self._note("log", {"values": values, "step": step})

    def finish(self, exit_code):
        self._note("finish", {"exit_code": exit_code})

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    signature, settings = None, set()
    if importlib.util.find_spec("wandb"):
        real = importlib.import_module("wandb")
        signature, settings = inspect.signature(real.init), set(real.Settings.model_fields)
        for name, arguments in (("log", ({}, 1)), ("finish", (0,))):
            inspect.signature(getattr(real.Run, name)).bind(None, *arguments)
        inspect.signature(real.login).bind(verify=False)
        assert issubclass(real.errors.AuthenticationError, Exception)
    module = StandIn(signature, settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_has_one_run_for_one_run(wandb, run_folder, monkeypatch):
    with open_(["wandb"], run_folder) as loggers:
        loggers.write(train_line(10) | {"mask_churn": None})
        loggers.write({"kind": "eval", "step": 10, "test_accuracy": 0.75})
    (init,) = wandb.named("init")
    assert init["config"] == dataclasses.asdict(CONFIG) | {"method": "sgd", "seed": 3}
    assert (init["project"], init["group"], init["name"]) == ("sparseopt_jax", "grid", "sgd-seed3")
    assert (init["dir"], init["resume"]) == (str(run_folder), "allow")
    assert init["settings"] == {"finish_timeout": 60}
    assert wandb.named("log") == [
        {"values": {"train/epoch": 1.0, "train/loss": 0.5}, "step": 10},
        {"values": {"eval/test_accuracy": 0.75}, "step": 10},
    ]
    assert wandb.named("finish") == [{"exit_code": 0}]

    # The run goes on, is interrupted, and another one starts: its id is its own.
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    with pytest.raises(KeyboardInterrupt), open_(["wandb"], run_folder, 10) as loggers:
        raise KeyboardInterrupt
    other = run_folder.with_name("sgd-seed4")
    other.mkdir()
    with open_loggers(["wandb"], other, CONFIG, "sgd", 4, 0) as loggers:
        loggers.close(143)
    ids = [init["id"] for init in wandb.named("init")]
    assert ids[0] == ids[1] == (run_folder / "wandb_id").read_text().strip()
    assert ids[2] not in ids[:2]
    assert all(ids)
    assert [init["project"] for init in wandb.named("init")] == ["sparseopt_jax", "mine", "mine"]
    assert wandb.named("init")[2]["settings"] == {}
    assert wandb.named("finish")[1:] == [{"exit_code": 1}, {"exit_code": 143}]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_wandb_failing_leaves_tensorboard_and_training(call, wandb, run_folder, shown, capsys):
    wandb.failing[call] = ConnectionError("network is gone")
    with open_(["wandb", "tensorboard"], run_folder) as loggers:
        loggers.write(train_line(10))
        loggers.write(train_line(20))
    assert shown()["train/loss"] == [(10, 0.5), (20, 0.5)]
    assert capsys.readouterr().err.count("warning: logger wandb failed") == 1
    assert len(wandb.named("finish")) == (call != "init")


def test_a_wrong_setting_of_wandb_stops_a_new_run_only(wandb, run_folder, capsys):
    wandb.failing["init"] = UsageError("No API key configured.")
    with pytest.raises(ConfigError, match="loggers=wandb: No API key"):
        open_(["tensorboard", "wandb"], run_folder)
    with open_(["wandb"], run_folder, first_step=10) as loggers:
        loggers.write(train_line(20))
    assert "No API key" in capsys.readouterr().err
    assert not wandb.named("log")


# Both.


def test_an_absent_package_is_named(monkeypatch, wandb):
    check_installed([])
    check_installed(["tensorboard", "wandb"])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    check_installed(["wandb"])
    with pytest.raises(ConfigError, match="loggers=tensorboard needs the package tensorboardX: "):
        check_installed(["wandb", "tensorboard"])
    with pytest.raises(ConfigError, match="'files' must be one of tensorboard, wandb"):
        check_installed(["files"])


def test_without_loggers_nothing_is_written(run_folder):
    with open_([], run_folder) as loggers:
        assert isinstance(loggers, Loggers)
        loggers.write(train_line(10))
    assert not list(run_folder.iterdir())
