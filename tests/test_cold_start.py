"""The study of Adam's cold start: arms that part where they should, and statistics by hand."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import metrics
from experiments.config import Config, ConfigError
from experiments.paper import cold_start
from experiments.paper.cold_start import Arm
from experiments.reporting import plots
from tests.train_runs import standard_promotion

# 90 steps an epoch, 144 in which the topology may change: updates on steps 40, 80 and 120.
CONFIG = Config(
    batch_size=16, epochs=2, update_interval=40, update_end=0.8, learning_rate=1e-3, seeds=2, seed=3
)
ARMS = (Arm("dense"), Arm("set"), Arm("set", cure="correction"))


@pytest.fixture(scope="module")
def losses():
    """Those of each arm, as they were trained."""
    return []


@pytest.fixture(scope="module")
def found(tmp_path_factory, losses):
    """Interrupted after the second arm, and started again."""
    file = tmp_path_factory.mktemp("kept") / "parts.json"
    said = []

    def interrupt(text):
        said.append(text)
        if "(2 of 3)" in text:
            raise KeyboardInterrupt

    def watched(values, updates, before=cold_start.loss_around):
        losses.append(values)
        return before(values, updates)

    with standard_promotion(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_start, "ARMS", ARMS)
        patch.setattr(cold_start, "loss_around", watched)
        with pytest.raises(KeyboardInterrupt):
            cold_start.measure(CONFIG, interrupt, file)
        assert list(metrics.read_json(file)["parts"]) == [
            "dense, seeds 3 to 4", "set 0.999 neither, seeds 3 to 4"
        ]  # fmt: skip
        assert len(losses) == 1
        result = cold_start.measure(CONFIG, said.append, file)
    assert len(losses) == 2
    return result


@pytest.mark.usefixtures("found")
def test_arms_are_paired_and_part_where_the_first_weights_grow(losses):
    """The same weights, masks and batches; the step that grows weights moves them differently."""
    neither, correction = losses
    assert neither.shape == correction.shape == (2, 180)
    # Two programs, which may round their products and sums in other places.
    np.testing.assert_allclose(neither[:, :41], correction[:, :41], rtol=2e-3)
    apart = np.abs(neither - correction)
    assert apart[:, 41:60].mean() > 10 * apart[:, :41].mean()
    assert (neither[0] != neither[1]).all()


def test_what_is_found(found, losses):
    assert found["updates"] == [40, 80, 120]
    assert found["seeds"] == [3, 4]
    neither, correction = (found["arms"][str(arm)] for arm in ARMS[1:])
    assert correction["late_loss"]["values"] == pytest.approx(losses[1][:, 162:].mean(axis=1))
    # Update 120 lacks steps behind it.
    jumps = [
        losses[0][:, step + 1 : step + 21].mean(axis=1) - losses[0][:, step - 19 : step + 1].mean(1)
        for step in (40, 80)
    ]
    assert neither["jump"]["values"] == pytest.approx(np.mean(jumps, axis=0), abs=1e-5)
    for arm in found["arms"].values():
        assert all(0.3 < value < 1 for value in arm["test_accuracy"]["values"])
    assert all(0 < value < 1 for value in neither["survival"]["values"])
    assert found["arms"]["dense"]["around"] is None
    assert [row["quantity"] for row in found["differences"]] == list(cold_start.QUANTITIES)
    for row in found["differences"]:
        ours, base = (found["arms"][row[name]][row["quantity"]] for name in ("of", "minus"))
        assert row["mean"] == pytest.approx(ours["mean"] - base["mean"])


def test_it_is_json_and_is_shown(found, tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start, "ARMS", ARMS)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))
    text = cold_start.table(found)
    assert max(map(len, text.splitlines())) <= 100
    accuracy = 100 * found["arms"]["dense"]["test_accuracy"]["mean"]
    assert re.search(rf"^dense +{accuracy:.2f} ± .* -  +-$", text, re.MULTILINE)
    assert text.count("set 0.999 correction - neither") == 4
    figure = cold_start.figure(found)
    _, difference = figure.axes[0].lines
    cured, base = (found["arms"][str(arm)]["around"] for arm in (ARMS[2], ARMS[1]))
    assert difference.get_ydata() == pytest.approx(np.mean(cured, 0) - np.mean(base, 0))
    assert list(difference.get_xdata()[[0, 19, 99]]) == [-19, 0, 80]
    plots.save(figure, tmp_path / "around.png")


def test_survival_by_hand():
    """Two seeds; the second update keeps one of two weights that the first grew, and one of one."""
    one = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    two = np.array([[0, 0, 1, 1], [1, 0, 1, 0]], bool)
    three = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], bool)
    assert cold_start.survival([(one, two), (two, three)]).tolist() == [0.5, 1]
    with pytest.raises(ConfigError, match="grow no weight"):
        cold_start.survival([(one, one), (one, two)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_interval": 20}, "update_interval=20: .*the interval must be at least 28"),
        ({"epochs": 1}, "epochs=1 has 90 steps, update_interval=40: there must be at least two"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        cold_start.measure(dataclasses.replace(CONFIG, **changes), lambda text: None)
