"""What all commands share: paths, any terminal, any set-up of Matplotlib, help, loggers."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rich.console

from experiments import (
    command_line,
    compile_check,
    demo,
    flops,
    loggers,
    prepare,
    report,
    reproduce,
    soak,
    train,
)
from experiments.benchmarks import input_pipeline, measuring, step_time
from experiments.config import ConfigError
from experiments.paper import request
from experiments.progress import Progress
from experiments.terminal import tolerant_output
from tests import train_runs

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIG = {
    "compare": ["sgd", "sparseopt"], "seeds": 2, "model": "mlp", "dataset": "digits",
    "distribution": "erk", "sparsity": 0.9, "topology": "rigl", "epochs": 2,
}  # fmt: skip


def write_finished(folder):
    """A work folder with two seeds of two methods."""
    for method in CONFIG["compare"]:
        for seed, accuracy in enumerate((0.5, 0.75)):
            run = folder / "runs" / f"{method}-seed{seed}"
            run.mkdir(parents=True)
            lines = [
                {"kind": "train", "step": 1, "epoch": 1, "loss": 0.5},
                {"kind": "eval", "step": 1, "epoch": 1, "test_accuracy": accuracy},
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            result = {
                "method": method, "seed": seed, "steps": 1, "epochs": 1, "density": 0.1,
                "test_accuracy": accuracy, "state_sha256": "0", "environment": {},
            }  # fmt: skip
            (run / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home folder; the folder that commands are called in is another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())  # no folder that is called ~


@pytest.fixture
def printed(monkeypatch):
    """A function that prints in an encoding; what was printed by then is its answer."""

    def of(encoding, body):
        bytes_ = io.BytesIO()
        with monkeypatch.context() as patch:
            stream = io.TextIOWrapper(bytes_, encoding=encoding)
            patch.setattr(sys, "stdout", stream)
            body()
            stream.flush()
            assert stream.errors == "strict"  # as it was before
        return bytes_.getvalue()

    return of


# Paths.


def test_every_path_may_begin_with_the_home_folder(home, monkeypatch, capsys):
    (home / "config.py").write_text(train_runs.FILE.format(config=train.Config(epochs=7)))
    asked = command_line.parse(["--config=~/config.py", "--workdir=~/w"])
    assert (asked.config.epochs, asked.workdir) == (7, home / "w")
    assert asked.words == (f"--config={home}/config.py", f"--workdir={home}/w")
    assert request.parse(["itop", "--workdir=~/w"]).workdir == home / "w"
    checked = compile_check._parse(["--topology=v5e:4x4", "--json=~/x", "--config=~/config.py"])
    assert (checked.json, checked.config.epochs) == (home / "x", 7)

    soaked = []
    monkeypatch.setattr(soak, "soak", lambda words, folder, *_: soaked.append(folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        soak.main(["--workdir=~/s"])
    assert soaked == [home / "s"]

    write_finished(home / "runs")
    assert report.main(["~/runs"]) == 0
    assert f"\n{home}/runs/accuracy.png\n" in capsys.readouterr().out

    monkeypatch.setattr(flops, "compare", lambda interval: {"interval": interval})
    monkeypatch.setattr(flops, "table", lambda found: "")
    assert flops.main(["--output=~/flops.json"]) == 0
    assert json.loads((home / "flops.json").read_text())["interval"] == 100

    _, traced, config = step_time.parse(["--trace=~/t", "--json=~/j", "--config=~/config.py"])
    assert (traced.trace, traced.json, config.epochs) == (home / "t", home / "j", 7)
    parser = measuring.parser("host", "")
    words = ["--json=~/j"]
    measuring.append(parser.parse_args(words), parser, words, {})
    assert json.loads((home / "j").read_text())["command"].endswith("benchmarks.host")
    monkeypatch.setattr(input_pipeline, "compare_streams", lambda *_: {"2 threads": 1.0})
    monkeypatch.setattr(
        input_pipeline,
        "on_the_device",
        lambda _: {"epoch_seconds_without_model": 1, "share_of_training": 1},
    )
    monkeypatch.setattr(input_pipeline, "write_images", lambda *_: 1)
    assert input_pipeline.main(["--plot=~/p.png"]) == 0
    assert (home / "p.png").read_bytes().startswith(b"\x89PNG")

    (home / "idx").mkdir()
    for words, named in (
        (["--dataset=mnist", "--idx_dir=~/idx"], f"{home}/idx"),
        (["--dataset=imagenet2012", "--manual_dir=~/manual"], f"--manual_dir={home}/manual"),
    ):
        assert prepare.main([*words, "--data_dir=~/data"]) == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["--config=experiments/configs/digits.py"]),
        (demo.main, []),
        (reproduce.main, ["itop"]),
        (soak.main, []),
    ],
)
def test_a_work_folder_that_checkpoints_cannot_be_in(main, words, capsys):
    for name, why in ((os.fsdecode(b"caf\xe9"), "must be UTF-8"), ("~no such user/x", "home")):
        assert main([*words, f"--workdir={name}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --workdir=")
        assert why in said


def test_a_file_that_cannot_be_written_is_named_before_anything_is_done(tmp_path, capsys):
    with pytest.raises(SystemExit):
        flops.main([f"--output={tmp_path}/none/x.json"])
    assert f"{tmp_path}/none must be a folder to write to" in capsys.readouterr().err


# What is printed.


def test_an_output_that_cannot_encode_everything(tmp_path, printed):
    folder = write_finished(tmp_path / os.fsdecode(b"$caf\xe9$") / "one")
    for of in (folder, folder.parent):  # of the latter the name is in the pictures' titles, too
        for encoding, plus_minus in (
            ("ascii", b"+/-"),
            ("latin-1", b"\xb1"),
            ("utf-8", b"\xc2\xb1"),
        ):
            shown = printed(encoding, lambda: report.main([str(of)]))  # noqa: B023
            assert b"62.50 " + plus_minus + b" 17.68" in shown
            assert b"caf\\udce9" in shown
    assert (folder.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_bar_on_a_terminal_that_is_not_utf_8(printed):
    def train_a_little():
        with tolerant_output():
            console = rich.console.Console(force_terminal=True, width=30)
            progress = Progress(runs=1, steps=2, console=console)
            with progress.live(), progress.running("a very long name of a setting", 2, epochs=1):
                progress.update(1, 1, {"loss": 0.5})
                with progress.doing("saving"):
                    pass

    shown = printed("ascii", train_a_little)
    assert b"[1/1] a very long name" in shown
    assert b"..." in shown


def test_what_the_user_chose_for_such_characters_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_output():
        print("±", end="")
    stream.flush()
    assert stream.buffer.getvalue() == b"?"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as a notebook's, which is no text file
    with tolerant_output():
        print("±", end="")
    assert sys.stdout.getvalue() == "±"


# Matplotlib.

_APART = """
import os, sys
from experiments import report, reproduce, train, workdir
import pathlib
for main in (train.main, reproduce.main):
    try:
        main(["--help"])
    except SystemExit as left:
        assert not left.code
folder = pathlib.Path(sys.argv[1])
workdir.merge_results(folder)
assert "matplotlib" not in sys.modules
code = report.main([str(folder)])
assert os.environ["MPLBACKEND"].startswith("module://")
import matplotlib
assert matplotlib.rcParams["savefig.bbox"] == "tight"  # other pictures have the user's settings
sys.exit(code)
"""


def test_a_notebook_s_matplotlib_in_a_process_of_its_own(tmp_path):
    """Its backend is not installed here, its settings would want LaTeX, and output is ASCII."""
    folder = write_finished(tmp_path / "run")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\n")
    answer = subprocess.run(
        [sys.executable, "-c", _APART, str(folder)],
        env=os.environ
        | {
            "MPLBACKEND": "module://no_such_package.backend_inline",
            "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
            "MPLCONFIGDIR": "/proc/not/to/be/written/to",
            "PYTHONIOENCODING": "ascii",
        },
        capture_output=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr.decode()
    assert b"62.50 +/- 17.68" in answer.stdout
    assert json.loads((folder / "result.json").read_text())["runs"]
    # The size that it has without settings: nothing is cut away around it.
    header = (folder / "accuracy.png").read_bytes()[16:24]
    assert [int.from_bytes(header[:4]), int.from_bytes(header[4:])] == [1050, 675]


# Help.


def help_of(main, words, capsys):
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_what_a_file_has(tmp_path, capsys):
    path = tmp_path / "mine.py"
    config = train.Config(epochs=123, compare=("dense", "sgd"), nesterov=True)
    path.write_text(train_runs.FILE.format(config=config))
    shown = help_of(train.main, [f"--config={path}"], capsys)
    for name, value in (("epochs", "123"), ("compare", "dense,sgd"), ("nesterov", "true")):
        assert f"(default in mine.py: {value})" in shown.split(f" --config.{name} VALUE ")[-1]
    assert "(default in Config: 20)" in help_of(train.main, [], capsys)
    assert "(default in mine.py: 123)" in help_of(
        compile_check.main, ["--config", str(path)], capsys
    )
    assert "(default in imagenet_resnet50.py: 90)" in help_of(compile_check.main, [], capsys)
    assert "(default in ResNet-20's config: 10)" in help_of(step_time.main, [], capsys)
    shown = help_of(reproduce.main, ["cifar100-table"], capsys)
    for value in ("0.9 / 0.95 / 0.97", "100 / 200 / 300 / 500", "sgd,sparseopt"):
        assert f"(default in cifar100-table: {value})" in shown
    shown = help_of(reproduce.main, ["imagenet-table", "--dataset=cifar100"], capsys)
    assert "(default in imagenet-table: resnet20)" in shown
    assert train.main([f"--config={tmp_path}/none.py", "--help"]) == 2


# Loggers.


class UsageError(Exception):
    """W&B's name for a wrong setting."""


class WandB:
    """Stands in for the package wandb, where nobody is logged in."""

    UsageError = UsageError
    errors = type("errors", (), {"AuthenticationError": UsageError})

    @staticmethod
    def login(verify):
        assert not verify  # no network is needed
        raise UsageError("No API key configured.")


def test_wandb_without_login_is_found_before_anything_is_read_or_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", WandB)
    config = train.Config(**CONFIG | {"compare": ("sgd",), "seeds": 1, "loggers": ("wandb",)})
    for main, words in (
        (train.main, train_runs.command(tmp_path / "w", config)),
        (reproduce.main, ["itop", "--config.loggers=wandb", f"--workdir={tmp_path}/w"]),
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: loggers=wandb: No API key configured.\nLog in by")
        assert "WANDB_MODE=offline" in said.err
        assert "compiling" not in said.out
    assert {path.name for path in tmp_path.iterdir()} == {"w.py"}
    # A run that goes on, perhaps at night on a new machine, is not stopped for it.
    (tmp_path / "w/runs/sgd-seed0").mkdir(parents=True)
    (tmp_path / "w/runs/sgd-seed0/run.json").write_text("{}")
    train.check_loggers(config, tmp_path / "w")
    monkeypatch.setattr(WandB, "login", lambda verify: 1 / 0)  # W&B's own service is broken
    loggers.check_login(["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match="tensorboard, wandb"):
        loggers.check_installed(["files"])
