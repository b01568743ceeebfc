"""Settings that do not fit the data: all of them in one message, and a command that works."""

import dataclasses
import itertools
import shlex

import pytest

from experiments import command_line, data, mesh, train
from experiments.config import Config, ConfigError
from experiments.corrections import Corrections, with_command
from tests import make_data

IMAGENET = "experiments/configs/imagenet_resnet50.py"

WRONG = {
    "storage=device": "storage='device' must be auto or stream",
    "pool=2": "pool=2 and pairs=False must be 1 and False",
    "augmentation=crop": "augmentation='crop' must be auto, none or random_resized_crop",
    "num_classes=10": "num_classes=10 must be 3, the number of classes of folder",
    "batch_size=64": "batch_size=64 must be at most 18, the number of training images",
    "warmup_epochs=7": "warmup_epochs=7 must be below epochs=6",
    "update_interval=500": "update_interval=500 must be at most ",
    "batch_runs=yes": "batch_runs='yes' must be auto or no",
}
"""What cannot work with 18 images in class folders and 6 epochs, and what is said of it."""

RIGHT = ("epochs=6", "batch_size=4", "warmup_epochs=0", "update_interval=2", "mesh_data=1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "photos"
    for split, images in (("train", 6), ("val", 2)):
        make_data.class_folders(root, split, ["ant", "bee", "cow"], images)
    return root


def words(photos, *settings):
    given = ("dataset=folder", f"data_dir={photos}", *RIGHT, *settings)
    return [f"--config={IMAGENET}", *(f"--config.{s}" for s in given), "--workdir=runs/mine"]


def refused(capsys, arguments):
    """What the command says, and the command that it says would work."""
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    message, command = said.split("\nwhat would work")
    python, _, module, *found = shlex.split(command.split(":\n  ")[1])
    assert (python, module) == ("python", "experiments.train")
    assert found[-1] == "--workdir=runs/mine"
    return message, found


def check_works(arguments):
    """That a command has nothing more to correct before it trains."""
    config = command_line.parse(arguments).config
    dataset = data.load(config, lambda text: None, check=train.check)
    train.check(config, dataset)


@pytest.mark.parametrize(
    "settings",
    [*itertools.combinations(WRONG, 1), tuple(WRONG)[:4], tuple(WRONG)[4:], tuple(WRONG)],
    ids=",".join,
)
def test_all_that_is_wrong_is_said_at_once_with_a_command_that_works(photos, capsys, settings):
    message, command = refused(capsys, words(photos, *settings))
    found = {setting for setting, text in WRONG.items() if text in message}
    # With fewer images in a batch there are more steps, and 500 may do.
    assert set(settings) - found <= {"update_interval=500"}
    assert found <= set(settings)
    assert message.startswith("error: " if len(found) == 1 else f"error: {len(found)} settings can")
    check_works(command)


def test_the_config_for_imagenet_with_own_images(photos, capsys):
    """As a user meets it: the folder first, and then one correction."""
    own = [f"--config={IMAGENET}", "--config.dataset=folder", "--config.mesh_data=1"]
    message, command = refused(capsys, [*own, "--config.epochs=3", "--workdir=runs/mine"])
    assert message.startswith("error: 2 settings cannot work:\n  data_dir=data: no such folder;")
    assert "\n  warmup_epochs=5 must be below epochs=3" in message
    assert "--config.data_dir=FOLDER" in command
    command = [word.replace("FOLDER", str(photos)) for word in command]
    message, command = refused(capsys, command)
    assert "batch_size=4096 must be at most 18" in message
    assert "for 8 a learning_rate of 0.0031 is in proportion" in message
    assert {"--config.batch_size=8", "--config.learning_rate=0.0031"} < set(command)
    check_works(command)


def test_a_folder_above_the_right_one(photos, capsys):
    _, command = refused(capsys, words(photos, f"data_dir={photos.parent}"))
    assert f"--config.data_dir={photos}" in command
    check_works(command)


def test_the_digits(capsys):
    wrong = ("storage=stream", "label=colour", "train_split=all", "test_split=val")
    given = [f"--config.{setting}" for setting in (*wrong, "epochs=1", "update_interval=17")]
    config = "--config=experiments/configs/digits.py"
    message, command = refused(capsys, [config, *given, "--workdir=runs/mine"])
    assert message.startswith("error: 5 settings cannot work:")
    assert all(f"\n  {name}=" in message for name in ("storage", "label", "train_split"))
    assert "\n  test_split='val' must be '' or 'test' for dataset=digits" in message
    assert "\n  update_interval=17 must be at most 16" in message
    check_works([*command, "--config.mesh_data=1"])


def test_a_batch_fits_devices_groups_and_images(photos):
    config = dataclasses.replace(
        command_line.parse(words(photos)).config, batch_size=30, bn_groups=3, mesh_data=2
    )
    found = Corrections(config)
    assert found.attempt(lambda config: mesh.make_mesh(config).size) == 2
    assert found.config.batch_size == 30
    found.attempt(lambda config: data.load(config, lambda text: None, check=train.check))
    assert found.config.batch_size == 6  # at most 18, of 2 and 3 a multiple
    with pytest.raises(ConfigError, match=r"batch_size=7 must be a multiple of 2") as caught:
        mesh.make_mesh(dataclasses.replace(config, batch_size=7, bn_groups=1))
    assert caught.value.changes == {"batch_size": 6}


def test_what_has_no_right_value_gets_no_command():
    error = ConfigError("sky=green must be blue")
    assert with_command(error, "experiments.train", ["--workdir=x"]) is error
    found = Corrections(Config())

    def check(config):
        raise ConfigError("sky=green must be blue")

    assert found.attempt(check) is None
    assert found.attempt(check) is None
    with pytest.raises(ConfigError, match=r"^sky=green must be blue$"):
        found.raise_if_any()
