"""The configuration and the command line of the experiments."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from experiments import command_line, train
from experiments.config import SPECS, Config, ConfigError

REPOSITORY = pathlib.Path(__file__).parents[1]
DIGITS = "experiments/configs/digits.py"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def test_the_demo_is_the_main_job():
    config = command_line.load_config(pathlib.Path(DIGITS))
    assert (config.model, config.dataset, config.topology) == ("resnet20", "digits", "rigl")
    assert (config.distribution, config.sparsity, config.seeds) == ("erk", 0.95, 3)
    assert config.methods() == ("dense", "sgd", "sparseopt")


def test_every_shared_field_is_there():
    shared = (
        "dataset data_dir model sparsity distribution topology optimizer epochs steps batch_size"
        " learning_rate weight_decay seed seeds"
    )
    assert set(shared.split()) <= set(SPECS)
    assert {field.name for field in dataclasses.fields(Config)} == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_every_field_can_be_overridden(name):
    """With a value other than the default, and in the field's own type."""
    spec = SPECS[name]
    if spec.kind is bool:
        text, value = str(not spec.default).lower(), not spec.default
    elif spec.kind is tuple:
        text, value = ",".join(spec.choices[:2]), spec.choices[:2]
    elif spec.choices:
        text = value = spec.choices[-1]
    elif spec.kind is str:
        text = value = "some/folder"
    else:
        value = spec.kind(4) if spec.limits.high > 4 else 0.375
        text = str(value)
    arguments = [f"--config={DIGITS}", "--config.compare=", f"--config.{name}={text}"]
    if text == "dense":
        arguments.append("--config.optimizer=sgd")
    parsed = getattr(command_line.parse(arguments).config, name)
    assert parsed == value
    assert type(parsed) is type(spec.default)


def test_words_ask_for_the_same_again():
    given = [f"--config={DIGITS}", "--config.seeds=2", "--workdir=a b"]
    once = command_line.parse(given)
    again = command_line.parse(once.words)
    assert again == once
    assert again.workdir == pathlib.Path("a b")


def test_default_workdir_names_the_config():
    parts = command_line.parse([f"--config={DIGITS}"]).workdir.parts
    assert parts[0] == "runs"
    assert parts[1].startswith("digits-20")


# Wrong arguments, and what the answer must name: what was given, and what is right.
WRONG = [
    (["--config.sparsitty=0.9"], ["--config.sparsitty", "'sparsity'", "Fields: dataset"]),
    (["--config.=1"], ["name a field", "Fields: dataset"]),
    (["--config.sparsity=1"], ["--config.sparsity=1.0", "in [0, 1)"]),
    (["--config.sparsity=nan"], ["--config.sparsity=nan", "in [0, 1)"]),
    (["--config.sparsity=much"], ["--config.sparsity='much'", "a number in [0, 1)"]),
    (["--config.topology=rigel"], ["'rigel'", "static, set, rigl, dense", "mean 'rigl'"]),
    (["--config.storage=devise"], ["'devise'", "one of auto, device, stream", "mean 'device'"]),
    (["--config.epochs=0"], ["--config.epochs=0", "an integer at least 1"]),
    (["--config.epochs=2.5"], ["--config.epochs='2.5'", "an integer at least 1"]),
    (["--config.nesterov=maybe"], ["--config.nesterov='maybe'", "true or false"]),
    (["--config.compare=sgd,adam"], ["adam", "dense, sgd, sparseopt"]),
    (["--config.compare=sgd,sgd"], ["compare=sgd,sgd", "twice"]),
    (["--config.steps=0"], ["steps=0", "-1 for all"]),
    (["--config.topology=dense"], ["topology='dense'", "sgd, sparseopt", "compare=dense"]),
    (["--config.topology=dense", "--config.compare="], ["topology='dense'", "optimizer=sgd"]),
    (["--config.learning_rate=0"], ["--config.learning_rate=0", "above 0"]),
    (["--config.drop_fraction=1"], ["--config.drop_fraction=1.0", "in (0, 1)"]),
    (["--config.seeds"], ["--config.seeds", "expected one argument"]),
    (["--wrkdir=x"], ["--wrkdir=x", "'--workdir'"]),
    (["digits"], ["digits", "Arguments: --config"]),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=lambda value: " ".join(value))
def test_a_wrong_argument_is_answered_with_the_right_ones(arguments, named, capsys):
    assert train.main([f"--config={DIGITS}", *arguments]) == 2
    answer = capsys.readouterr().err
    assert answer.startswith("error: ")
    assert len(answer.splitlines()) <= 2
    for part in named:
        assert part in answer


def test_a_missing_config_file_names_those_there_are(capsys):
    assert train.main(["--config=experiments/configs/digit.py"]) == 2
    answer = capsys.readouterr().err
    assert "digit.py: no such file. Did you mean 'experiments/configs/digits.py'?" in answer
    assert train.main([]) == 2
    assert "--config is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("x = 1\n", "must define a function get_config() -> Config"),
        ("def get_config():\n    return {}\n", "must define a function get_config() -> Config"),
        ("def get_config(:\n", "SyntaxError"),
        (
            "from experiments.config import Config\n"
            "def get_config():\n    return Config(width='wide')\n",
            "width='wide' must be an integer at least 1",
        ),
    ],
)
def test_a_wrong_config_file_is_named(source, named, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert train.main([f"--config={path}"]) == 2
    answer = capsys.readouterr().err
    assert str(path) in answer
    assert named in answer


def test_a_config_file_of_another_kind_is_named(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert train.main([f"--config={path}"]) == 2
    assert "ending in .py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sparsity": "0.9"}, "sparsity='0.9' must be a number in"),
        ({"epochs": True}, "epochs=True must be an integer"),
        ({"epochs": 1.5}, "epochs=1.5 must be an integer"),
        ({"nesterov": 1}, "nesterov=1 must be true or false"),
        ({"compare": "sgd"}, "compare='sgd' must be a list"),
    ],
)
def test_a_config_with_a_wrong_type_cannot_be_made(fields, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        Config(**fields)


def test_an_integer_is_a_number():
    assert Config(sparsity=0) == Config(sparsity=0.0)
    assert type(Config(sparsity=0).sparsity) is float


def test_method_configs():
    config = Config(compare=("dense", "sgd"), optimizer="sparseopt", seeds=2)
    assert config.for_method("dense").methods() == ("dense",)
    assert config.for_method("sgd").methods() == ("sgd",)
    assert config.for_method("sgd").topology == config.topology
    assert Config().methods() == ("sparseopt",)


def test_no_traceback_in_a_real_process():
    answer = subprocess.run(
        [sys.executable, "-m", "experiments.train", f"--config={DIGITS}", "--config.sedes=2"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: --config.sedes: no such field. Did you mean 'seed")


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--config.{name} " in text for name in SPECS)
