"""Tables and pictures from finished runs whose statistics are known."""

import json
import math

import matplotlib.image
import numpy as np
import pytest

from experiments import report
from experiments.config import ConfigError
from experiments.reporting import plots

# sparseopt - sgd is 0.03, 0.01 and 0.05: mean 0.03, standard deviation 0.02.
ACCURACIES = {"sgd": (0.90, 0.92, 0.94), "sparseopt": (0.93, 0.93, 0.99), "dense": (0.99,)}
# Student's t at 0.975 with 2 degrees of freedom, from a printed table.
T_2 = 4.302653


def write_run(workdir, method, seed, accuracy):
    folder = workdir / "runs" / f"{method}-seed{seed}"
    folder.mkdir(parents=True)
    result = {
        "method": method,
        "seed": seed,
        "test_accuracy": accuracy,
        "density": 1.0 if method == "dense" else 0.05,
        "steps": 80,
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"kind": "train", "step": 10 * e, "epoch": e, "loss": 1 / e} for e in range(1, 9)]
    lines += [
        {"kind": "eval", "epoch": e, "test_accuracy": accuracy - 0.5 / e**2} for e in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method != "dense":
        arrays = {}
        for layer, size in (("conv_stem/kernel", 9), ("head/kernel", 64)):
            arrays[f"before/{layer}"] = np.full(10, size // 2)
            arrays[f"size/{layer}"] = np.asarray(size)
            arrays[f"after/{layer}"] = np.arange(10) % size
        np.savez(folder / "fan_in.npz", **arrays)


@pytest.fixture
def workdir(tmp_path):
    config = {
        "compare": ["dense", "sgd", "sparseopt"],
        "model": "resnet8",
        "dataset": "digits",
        "distribution": "erk",
        "sparsity": 0.95,
        "topology": "rigl",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for method, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path, method, seed, accuracy)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Figures by name, which are not written but kept."""
    found = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: found.update({path.name: figure}))
    return found


def test_summary(workdir):
    summary = report.summarize(report.load_runs(workdir))
    assert list(summary["methods"]) == ["dense", "sgd", "sparseopt"]
    sgd = summary["methods"]["sgd"]
    assert sgd["seeds"] == [0, 1, 2]
    assert sgd["density"] == pytest.approx(0.05)
    assert sgd["test_accuracy"]["mean"] == pytest.approx(0.92)
    assert sgd["test_accuracy"]["std"] == pytest.approx(0.02)
    assert summary["methods"]["sparseopt"]["test_accuracy"]["std"] == pytest.approx(
        math.sqrt(0.0012)
    )
    paired = summary["paired"]["sparseopt - sgd"]
    assert paired["test_accuracy"]["differences"] == pytest.approx([0.03, 0.01, 0.05])
    half = T_2 * 0.02 / math.sqrt(3)
    assert paired["test_accuracy"]["ci95"] == pytest.approx((0.03 - half, 0.03 + half), rel=1e-6)
    assert paired["test_accuracy"]["std"] == pytest.approx(0.02)
    # With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = 0.03 * math.sqrt(3) / 0.02
    assert paired["test_accuracy"]["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert paired["late_train_loss"]["mean"] == 0  # all logs have the same loss


def test_pairs_are_seeds_that_both_methods_have(workdir):
    (workdir / "runs/sgd-seed1/result.json").unlink()  # as if it were not finished
    paired = report.summarize(report.load_runs(workdir))["paired"]["sparseopt - sgd"]
    assert paired["seeds"] == [0, 2]
    assert paired["test_accuracy"]["differences"] == pytest.approx([0.03, 0.05])


def test_table(workdir):
    lines = report.table(report.summarize(report.load_runs(workdir))).splitlines()
    assert lines[0].split() == ["method", "density", "test", "accuracy", "(%)", "n"]
    assert lines[1].split() == ["dense", "1.0000", "99.00", "1"]
    assert lines[2].split() == ["sgd", "0.0500", "92.00", "±", "2.00", "3"]
    assert lines[3].split() == ["sparseopt", "0.0500", "95.00", "±", "3.46", "3"]
    assert lines[5].endswith("(percentage points): +3.00, +1.00, +5.00")
    # 100 * (0.03 - and + 4.302653 * 0.02 / sqrt(3))
    assert "mean +3.00 ± 2.00, 95 % confidence interval [-1.97, +7.97]" in lines[6]
    assert lines[6].endswith("n = 3, p = 0.1217")
    assert "p < 0.01 (*) is what we call a difference. Of 2 comparisons" in lines[-2]


def test_pictures(workdir):
    written = report.write_pictures(report.load_runs(workdir), workdir)
    assert [path.name for path in written] == ["accuracy.png", "loss.png", "fan_in.png"]
    for path in written:
        height, width, _ = matplotlib.image.imread(path).shape
        assert height > 200
        assert width > 400


def test_pictures_show_the_runs(workdir, drawn):
    report.write_pictures(report.load_runs(workdir), workdir)
    (axes,) = drawn["accuracy.png"].axes
    dense, sgd, sparseopt = axes.lines
    epochs = np.arange(1, 9)
    for line, mean in ((dense, 99), (sgd, 92), (sparseopt, 95)):
        np.testing.assert_allclose(line.get_ydata(), mean - 50 / epochs**2)
    assert axes.get_title() == "n = 1 dense, 3 sgd, 3 sparseopt"
    (axes,) = drawn["loss.png"].axes
    for line in axes.lines:
        np.testing.assert_allclose(line.get_xydata(), np.transpose([epochs, 1 / epochs]))


def test_command(workdir, drawn, capsys):
    assert report.main([str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert "sparseopt - sgd, paired by seed" in printed
    assert str(workdir / "fan_in.png") in printed


def test_the_command_says_which_runs_are_missing(workdir, drawn, capsys):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"seeds": 3}))
    assert report.main([str(workdir)]) == 0
    assert f"not finished:\n  {workdir}: 7 of 9 runs\n" in capsys.readouterr().out


def test_uniform_says_why_its_density_is_higher(workdir, drawn, capsys):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"distribution": "uniform"}))
    assert report.main([str(workdir)]) == 0
    assert "first layer dense" in capsys.readouterr().out


def test_command_with_a_wrong_folder(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no finished run"):
        report.load_runs(tmp_path)
    assert report.main([]) == 2
    assert report.main(["--help"]) == 0
