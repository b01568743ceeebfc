"""Slopes over the fan-in: against constructed data, and what one step of SGD has to give."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.config import Config, ConfigError
from experiments.paper import neuron_steps
from experiments.reporting import plots, seed_statistics

CONFIG = Config(
    model="mlp",
    hidden=24,
    batch_size=32,
    sparsity=0.8,
    update_interval=3,
    epochs=1,
    schedule="constant",
    weight_decay=0.0,
    compare=("sgd", "sparseopt"),
    mesh_data=1,
)


def quiet(text):
    pass


def once(compile_it):
    """A program for each config, whichever loading of the same data it is for."""
    found = {}

    def compiled(config, *further):
        if config not in found:
            found[config] = compile_it(config, *further)
        return found[config]

    return compiled


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "parts.json"


@pytest.fixture(scope="module")
def found(file):
    """Interrupted after the first run, and started again."""

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for name in ("compile_model", "compile_method"):
            patch.setattr(neuron_steps, name, once(getattr(neuron_steps, name)))
        with pytest.raises(KeyboardInterrupt):
            neuron_steps.measure(CONFIG, (0, 3, 5), interrupt, keep=file)
        assert list(json.loads(file.read_text())["parts"]) == ["sgd seed 0"]
        return neuron_steps.measure(CONFIG, (0, 3, 5), quiet, keep=file)


def test_runs_that_are_done_are_not_trained_again(found, file, monkeypatch):
    written = file.read_bytes()
    monkeypatch.setattr(neuron_steps, "compile_method", None)  # nothing is left to train
    assert neuron_steps.measure(CONFIG, (0, 3, 5), quiet, keep=file) == found
    assert file.read_bytes() == written
    parts = json.loads(written)["parts"]
    assert list(parts) == ["sgd seed 0", "sparseopt seed 0"]
    slope = found["slopes"]["sgd"]["relative_step"][1]["mean"]
    assert parts["sgd seed 0"]["found"][1]["relative_step"] == slope


def test_runs_of_another_measurement_are_refused(found, file):
    other = dataclasses.replace(CONFIG, sparsity=0.9)
    with pytest.raises(ConfigError, match=r"parts.json holds measurements with sparsity=0.8, not"):
        neuron_steps.measure(other, (0, 3, 5), quiet, keep=file)
    with pytest.raises(ConfigError, match=r"with steps=\[0, 3, 5\], not \[0, 10, 30\]"):
        # The run has 45 steps, so of the default ones three are left.
        neuron_steps.measure(CONFIG, say=quiet, keep=file)
    damaged = file.with_name("damaged.json")
    damaged.write_text("[]")
    with pytest.raises(ConfigError, match=r"damaged.json must have config, how, parts"):
        neuron_steps.measure(CONFIG, (0,), quiet, keep=damaged)


def test_slope_of_one_group_against_polyfit():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50))
    assert neuron_steps.pooled_slope([(x, y)]) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_slope_of_groups_with_other_means_against_least_squares():
    generator = np.random.default_rng(1)
    groups, columns, right = [], [], []
    for i, size in enumerate((10, 20, 30)):
        x = generator.normal(3 * i, 1, size)
        y = -0.5 * x + 100 * i + generator.normal(size=size)
        groups.append((x, y))
        columns.append(np.column_stack([x, *(np.full(size, float(i == j)) for j in range(3))]))
        right.append(y)
    slope = np.linalg.lstsq(np.concatenate(columns), np.concatenate(right), rcond=None)[0][0]
    assert neuron_steps.pooled_slope(groups) == pytest.approx(slope)


def test_slope_leaves_out_what_has_none():
    line = np.arange(4.0), 2 * np.arange(4.0)
    equal = np.full(5, np.log(3)), np.arange(5.0)
    infinite = np.array([1.0, 2.0, 9.0]), np.array([2.0, 4.0, -np.inf])
    assert neuron_steps.pooled_slope([line, equal, infinite]) == pytest.approx(2)
    assert neuron_steps.pooled_slope([equal]) is None
    assert neuron_steps.pooled_slope([]) is None


def test_values_of_neurons_against_loops():
    generator = np.random.default_rng(2)
    before, after, gradient = generator.normal(size=(3, 2, 3, 4, 6)).astype(np.float32)
    mask = generator.random((2, 3, 4, 6)) < 0.3
    mask[..., 0] = False
    mask[..., 1] = np.arange(24).reshape(2, 3, 4) == 5  # one weight only
    found = neuron_steps.neuron_values(before, after, gradient, mask)
    for place, neuron in enumerate(range(2, 6)):
        w, v, g = (np.float64(a[..., neuron][mask[..., neuron]]) for a in (before, after, gradient))
        assert found["fan_in"][place] == len(w) >= 2
        step = np.linalg.norm(v - w) / np.linalg.norm(w)
        assert found["relative_step"][place] == pytest.approx(step)
        assert found["gradient_per_weight"][place] == pytest.approx(np.sqrt((g**2).mean()))
        assert found["squared_weight"][place] == pytest.approx((w**2).mean())
    assert all(len(values) == 4 for values in found.values())
    fewer = neuron_steps.neuron_values(before, after, gradient, mask, min_fan_in=1)
    assert fewer["fan_in"].tolist() == [1, *found["fan_in"]]


def test_first_step_is_the_learning_rate_times_the_gradient(found):
    """|change of w| = rate * |gradient|, with SparseOpt times sqrt(fan-in); logs are linear."""
    first = {
        method: {name: cells[0]["mean"] for name, cells in quantities.items()}
        for method, quantities in found["slopes"].items()
    }
    for method, power in (("sgd", 0.0), ("sparseopt", 0.5)):
        slope = first[method]
        expected = slope["gradient_per_weight"] - slope["squared_weight"] / 2 + power
        assert slope["relative_step"] == pytest.approx(expected, abs=1e-4)
    for name in ("gradient_per_weight", "squared_weight"):  # the same weights, the same batch
        assert first["sgd"][name] == pytest.approx(first["sparseopt"][name], abs=1e-6)


def test_every_step_of_every_method_is_measured(found):
    assert found["layers"] == ["dense0/kernel", "dense1/kernel"]
    assert found["steps"] == [0, 3, 5]
    for method in ("sgd", "sparseopt"):
        assert all(0 < n <= 48 for n in found["neurons"][method])
        for cells in found["slopes"][method].values():
            assert [cell["step"] for cell in cells] == [0, 3, 5]
            for cell in cells:
                assert cell["n"] == 1
                assert cell["values"] == [cell["mean"]]
                assert np.isfinite(cell["mean"])
                assert cell["std"] is None


def test_no_slope_is_shown_as_none(found, tmp_path):
    nothing = seed_statistics.describe_given([None, None])
    assert nothing == {"n": 0, "mean": None, "std": None, "values": [None, None]}
    some = seed_statistics.describe_given([None, 1.0, 3.0])
    assert (some["n"], some["mean"], some["values"]) == (2, 2.0, [None, 1.0, 3.0])
    cells = [{"step": step} | nothing for step in found["steps"]]
    empty = found | {"slopes": {"sgd": dict.fromkeys(neuron_steps.QUANTITIES, cells)}}
    rows = [line.split() for line in neuron_steps.table(empty).splitlines()]
    assert rows.count(["5", "-"]) == len(neuron_steps.QUANTITIES)
    plots.save(neuron_steps.figure(empty), tmp_path / "slopes.png")
    assert (tmp_path / "slopes.png").read_bytes().startswith(b"\x89PNG")


def test_result_is_json_and_is_shown(found):
    again = json.loads(json.dumps(found))
    assert again == found
    text = neuron_steps.table(again)
    assert max(map(len, text.splitlines())) <= 100
    cells = [quantities["relative_step"][1]["mean"] for quantities in found["slopes"].values()]
    rows = [line.split() for line in text.splitlines()]
    assert ["3", *(f"{mean:+.3f}" for mean in cells)] in rows
    panels = neuron_steps.figure(again).axes
    for axes, name in zip(panels, neuron_steps.QUANTITIES, strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        for method in ("sgd", "sparseopt"):
            np.testing.assert_array_equal(lines[method].get_xdata(), [1, 4, 6])
            means = [cell["mean"] for cell in found["slopes"][method][name]]
            np.testing.assert_array_equal(lines[method].get_ydata(), means)


@pytest.mark.parametrize("steps", [(), (3, 1), (1, 1), (-1, 2), (0, 45)])
def test_wrong_steps(steps):
    """An epoch of 1,442 digits has 45 steps of 32."""
    message = "must be below 45" if steps == (0, 45) else "ascending integers of at least 0"
    with pytest.raises(ConfigError, match=message):
        neuron_steps.measure(CONFIG, steps, say=lambda text: None)


@pytest.mark.parametrize("value", [0, True, 2.0])
def test_wrong_min_fan_in(value):
    with pytest.raises(ConfigError, match=f"min_fan_in={value} must be an integer of at least 1"):
        neuron_steps.measure(CONFIG, (0,), min_fan_in=value)


def test_dense_method_is_refused():
    config = Config(compare=("dense", "sgd"))
    with pytest.raises(ConfigError, match=r"dense,sgd.*sparse methods"):
        neuron_steps.measure(config, (0,))
