"""The report of a sweep, from made-up runs whose statistics are known."""

import json
import math

import numpy as np
import pytest

from experiments import report
from experiments.config import ConfigError
from experiments.reporting import finished_runs, plots

CONFIG = {
    "compare": ["sgd", "sparseopt"], "seeds": 3, "model": "resnet8", "dataset": "digits",
    "distribution": "erk", "sparsity": 0.9, "topology": "set", "batch_size": 10, "epochs": 4,
}  # fmt: skip
STEPS = 40
T_2 = 4.302653  # Student's t at 0.975 with 2 degrees of freedom, from a printed table
ENVIRONMENT = {"git_commit": "a" * 40, "git_dirty": False, "versions": {"jax": "1"},
               "device_kind": "cpu"}  # fmt: skip
DENSE = {"forward_dense": 1000.0, "forward": 1000.0, "training": 3000.0}
SPARSE = {"forward_dense": 1000.0, "forward": 80.0, "training": 300.0}


def write_run(setting, method, seed, accuracy, loss, **changes):
    """A run of 40 steps: losses of 2, 1, 1 and `loss`; accuracies 0.1 below the last one, and it.

    The first tenth of the steps has the lines of steps 1 and 4.
    """
    folder = setting / "runs" / f"{method}-seed{seed}"
    folder.mkdir(parents=True)
    rate = None if method == "dense" else 0.25
    result = {
        "method": method, "seed": seed, "steps": STEPS, "test_accuracy": accuracy,
        "train_loss": loss, "density": 1.0 if method == "dense" else 0.1, "itop_rate": rate,
        "flops_per_example": DENSE if method == "dense" else SPARSE, "environment": ENVIRONMENT,
    } | changes  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    steps = {1: 2.0, 4: 1.0, 20: 1.0, STEPS: loss}
    lines = [
        {"kind": "train", "step": step, "epoch": step / 10, "loss": value, "itop_rate": rate}
        for step, value in steps.items()
    ]
    lines += [
        {"kind": "eval", "step": step, "epoch": step / 10, "test_accuracy": accuracy - lower}
        for step, lower in ((20, 0.1), (STEPS, 0.0))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_setting(folder, name, accuracies, **changes):
    """A work folder; `accuracies` by method, from seed 0 on. The loss is 1 - accuracy."""
    setting = folder / name
    setting.mkdir(parents=True)
    (setting / "config.json").write_text(json.dumps(CONFIG | changes))
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            write_run(setting, method, seed, accuracy, 1 - accuracy)
    return setting


@pytest.fixture
def sweep(tmp_path):
    """Of five settings one is whole, one has dense runs, one seed, one no run, one no folder."""
    # sparseopt - sgd is 0.03, 0.01 and 0.05: mean 0.03, standard deviation 0.02.
    both = {"sgd": (0.80, 0.82, 0.84), "sparseopt": (0.83, 0.83, 0.89)}
    write_setting(tmp_path, "set-0.9", both)
    more = ["dense", "ham", "sparseopt_ham"]
    write_setting(
        tmp_path, "group/dense", {"dense": (0.95, 0.97), "ham": (0.5, 0.6),
        "sparseopt_ham": (0.6, 0.7)}, compare=more, seeds=2,
    )  # fmt: skip
    write_setting(tmp_path, "a-seed", {"sgd": (0.7,), "sparseopt": (0.75,)}, sparsity=0.95)
    write_setting(tmp_path, "none", {})
    names = ["set-0.9", "none", "group/dense", "a-seed", "later"]
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "a table", "settings": names}))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Figures by name, which are not written but kept."""
    found = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: found.update({path.name: figure}))
    return found


def test_settings_come_in_the_order_of_the_sweep(sweep):
    loaded = report.load_sweep(sweep)
    assert list(loaded) == ["set-0.9", "group/dense", "a-seed"]
    assert [len(runs) for runs in loaded.values()] == [6, 6, 2]
    first = loaded["group/dense"][0]
    assert (first.result["method"], first.result["seed"]) == ("dense", 0)
    assert first.config == json.loads((sweep / "group/dense/config.json").read_text())
    (sweep / "sweep.json").unlink()
    assert list(report.load_sweep(sweep)) == ["a-seed", "group/dense", "set-0.9"]
    assert finished_runs.sweep_name(sweep) == sweep.name


def test_summary(sweep):
    summary = report.summarize_sweep(sweep)
    assert summary["name"] == "a table"
    assert summary["unfinished"] == {
        "none": {"finished": 0, "expected": 6, "diverged": 0},
        "a-seed": {"finished": 2, "expected": 6, "diverged": 0},
        "later": {"finished": 0, "expected": None, "diverged": 0},
    }
    assert summary["diverged"] == {}
    sgd = summary["settings"]["set-0.9"]["methods"]["sgd"]
    assert sgd["late_train_loss"]["mean"] == pytest.approx(0.18)
    assert sgd["late_train_loss"]["std"] == pytest.approx(0.02)
    # Step 1 at 2, steps 2 to 4 at 1.
    assert sgd["early_train_loss"]["mean"] == pytest.approx((2 + 3 * 1) / 4)
    assert sgd["itop_rate"]["mean"] == 0.25
    assert sgd["training_flops"] == 300 * 10 * STEPS
    assert sgd["training_flops_over_dense"] == pytest.approx(0.1)
    dense = summary["settings"]["group/dense"]["methods"]["dense"]
    assert dense["itop_rate"] is None
    assert dense["training_flops_over_dense"] == 1
    paired = summary["settings"]["set-0.9"]["paired"]["sparseopt - sgd"]
    half = T_2 * 0.02 / math.sqrt(3)
    t = 0.03 * math.sqrt(3) / 0.02
    for quantity, sign in (("test_accuracy", 1), ("late_train_loss", -1)):
        found = paired[quantity]
        assert found["mean"] == pytest.approx(sign * 0.03)
        assert found["ci95"] == pytest.approx((sign * 0.03 - half, sign * 0.03 + half), rel=1e-6)
        assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert (paired["early_train_loss"]["mean"], paired["early_train_loss"]["p"]) == (0, 1)
    ham = summary["settings"]["group/dense"]["paired"]
    assert list(ham) == ["sparseopt_ham - ham"]
    assert summary["settings"]["a-seed"]["paired"]["sparseopt - sgd"]["test_accuracy"]["p"] is None
    assert summary["environment"] == {name: [value] for name, value in ENVIRONMENT.items()}


def test_report(sweep, drawn):
    text = report.report_sweep(sweep)
    assert max(map(len, text.partition(str(sweep))[0].splitlines())) <= 100
    rows = [" ".join(line.split()) for line in text.splitlines()]
    at = rows.index("setting method n accuracy (%) training loss R_m kFLOPs x dense")
    assert rows[at + 1] == "set-0.9 sgd 3 82.00 ± 2.00 0.1800 ± 0.0200 0.250 120 0.100"
    assert rows[at + 2] == "sparseopt 3 85.00 ± 3.46 0.1500 ± 0.0346 0.250 120 0.100"
    assert rows[at + 3] == "group/dense dense 2 96.00 ± 1.41 0.0400 ± 0.0141 - 1200 1.000"
    assert rows[at + 6] == "a-seed sgd 1 70.00 0.3000 0.250 120 0.100"
    assert "sparseopt - sgd, paired by seed: test accuracy (percentage points)" in text
    # 100 * (0.03 - and + 4.302653 * 0.02 / sqrt(3))
    assert "set-0.9 3 +3.00 ± 2.00 [-1.97, +7.97] 0.1217" in rows
    assert "set-0.9 3 -0.0300 ± 0.0200 [-0.0797, +0.0197] 0.1217" in rows
    assert "a-seed 1 +5.00 - -" in rows
    assert "Of 6 comparisons" in text
    assert "  none: 0 of 6 runs\n  a-seed: 2 of 6 runs\n  later: not started\n" in text
    assert "commit aaaaaaaaaa; jax 1; device cpu" in text
    assert "Not the same" not in text
    assert json.loads((sweep / "summary.json").read_text()) == json.loads(
        json.dumps(report.summarize_sweep(sweep))
    )
    names = ["summary.json", *drawn]
    assert text.endswith("\n" + "\n".join(str(sweep / name) for name in names))


def test_pictures_show_the_runs(sweep, drawn):
    report.report_sweep(sweep)
    assert list(drawn) == [
        "curves.png", "loss.png", "difference_accuracy.png", "difference_loss.png", "itop.png",
        "flops.png", "flops_loss.png",
    ]  # fmt: skip
    titles = [axes.get_title() for axes in drawn["curves.png"].axes]
    assert titles == ["set-0.9 (n = 3)", "group/dense (n = 2)", "a-seed (n = 1)"]
    sgd, sparseopt = drawn["curves.png"].axes[0].lines
    np.testing.assert_allclose(sgd.get_xydata(), [[2, 72], [4, 82]])
    np.testing.assert_allclose(sparseopt.get_xydata(), [[2, 75], [4, 85]])
    loss = drawn["loss.png"].axes[0].lines[0]
    np.testing.assert_allclose(loss.get_xydata(), [[0.1, 2], [0.4, 1], [2, 1], [4, 0.18]])
    _zero, difference = drawn["difference_loss.png"].axes[0].lines
    np.testing.assert_allclose(difference.get_ydata(), [0, 0, 0, -0.03], atol=1e-12)
    accuracy = drawn["difference_accuracy.png"].axes[1].lines[1]
    np.testing.assert_allclose(accuracy.get_ydata(), [10, 10])
    assert len(drawn["itop.png"].axes[1].lines) == 2  # dense has no R_m


def test_loss_against_flops(sweep, drawn):
    report.report_sweep(sweep)
    panels = {axes.get_title(): axes for axes in drawn["flops_loss.png"].axes}
    dense, sgd, *_ = (box.lines[0].get_xydata() for box in panels["SET"].containers)
    np.testing.assert_allclose(dense, [[3000 * 10 * STEPS, 0.04]])
    np.testing.assert_allclose(sgd[:, 1], [0.18])


def test_skew_of_the_gradient_is_the_mean_over_layers(sweep, drawn):
    """Ratios of 0.8 + seed / 10 and 0.6 in two layers, angles of 0.1 and 0.3; a third has none."""
    for seed in range(3):
        path = sweep / f"set-0.9/runs/sgd-seed{seed}/metrics.jsonl"
        layers = {
            "one": {"norm_ratio": 0.8 + seed / 10, "angle": 0.1},
            "two": {"norm_ratio": 0.6, "angle": 0.3},
            "three": {"norm_ratio": None, "angle": None},
        }
        line = {"kind": "diagnostics", "step": 20, "epoch": 2.0, "gradient_skew": layers}
        path.write_text(path.read_text() + json.dumps(line) + "\n")
    report.report_sweep(sweep)
    for name, mean in (("skew_norm.png", 0.75), ("skew_angle.png", math.degrees(0.2))):
        (axes,) = drawn[name].axes
        assert axes.get_title() == "set-0.9 (n = 3)"
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_xydata(), [[2, mean]])
    (_, spread) = drawn["skew_norm.png"].axes[0].collections
    (segment,) = spread.get_segments()
    np.testing.assert_allclose(segment, [[2, 0.7], [2, 0.8]])


def write_diverged(setting, method, seed, message):
    folder = setting / "runs" / f"{method}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"method": method, "seed": seed, "message": message, "environment": ENVIRONMENT}
    (folder / "diverged.json").write_text(json.dumps(content))


def test_a_run_that_diverged_is_neither_counted_nor_missing(sweep, drawn):
    lost = sweep / "set-0.9"
    (lost / "runs/sparseopt-seed2/result.json").unlink()
    message = "sparseopt seed 2: the loss is nan at step 22.\nA smaller learning_rate may help"
    write_diverged(lost, "sparseopt", 2, message)
    write_diverged(lost, "sgd", 0, "of before, tried again and finished since")
    write_diverged(sweep / "none", "sgd", 1, "the loss is inf at step 3")
    text = report.report_sweep(sweep)
    summary = json.loads((sweep / "summary.json").read_text())
    assert summary["diverged"] == {
        "set-0.9": [{"method": "sparseopt", "seed": 2, "message": "the loss is nan at step 22"}],
        "none": [{"method": "sgd", "seed": 1, "message": "the loss is inf at step 3"}],
    }
    assert summary["settings"]["set-0.9"]["methods"]["sparseopt"]["seeds"] == [0, 1]
    assert summary["settings"]["set-0.9"]["paired"]["sparseopt - sgd"]["seeds"] == [0, 1]
    assert "set-0.9" not in summary["unfinished"]
    assert "\ndiverged: set-0.9 sparseopt seed 2: the loss is nan at step 22\n" in text
    assert "  none: 0 of 6 runs (1 diverged)\n" in text
    single = report.report(lost)
    assert f"\ndiverged: {lost} sparseopt seed 2: the loss is nan at step 22\n" in single
    assert "not finished" not in single


def test_all_runs_diverged(tmp_path):
    write_diverged(write_setting(tmp_path, "one", {}), "sgd", 0, "the loss is nan at step 22")
    for folder in (tmp_path, tmp_path / "one"):
        with pytest.raises(ConfigError, match="1 diverged, the first of them sgd seed 0: the loss"):
            report.report(folder)


def test_other_runs_of_a_folder_are_shown_and_stand_for_none_that_is_missing(tmp_path, drawn):
    setting = write_setting(tmp_path, "one", {"sgd": (0.5, 0.6), "ham": (0.5, 0.6, 0.7)}, seed=1)
    text = report.report_sweep(tmp_path)
    # Of seeds 1 to 3 of sgd and sparseopt there is one.
    assert "  one: 1 of 6 runs" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    seeds = {name: row["seeds"] for name, row in summary["settings"]["one"]["methods"].items()}
    assert seeds == {"sgd": [0, 1], "ham": [0, 1, 2]}
    single = {"compare": [], "optimizer": "ham", "seeds": 2}
    (setting / "config.json").write_text(json.dumps(CONFIG | single))
    assert finished_runs.progress(setting) == finished_runs.Progress(2, 2)
    dense = {"topology": "dense", "optimizer": "sgd"}
    (setting / "config.json").write_text(json.dumps(CONFIG | single | dense))
    assert finished_runs.progress(setting) == finished_runs.Progress(0, 2)


def test_a_report_on_some_settings_whatever_the_sweep_lists(sweep, drawn):
    text = report.report_sweep(sweep, ["a-seed", "later"])
    assert list(json.loads((sweep / "summary.json").read_text())["settings"]) == ["a-seed"]
    assert "1 setting with" in text
    assert "set-0.9" not in text
    assert "not finished:\n  a-seed: 2 of 6 runs\n  later: not started\n" in text
    with pytest.raises(ConfigError, match="no finished run yet of none, later"):
        report.report_sweep(sweep, ["none", "later"])


def test_dense_runs_are_beside_every_sparsity_in_the_picture_of_flops(sweep, drawn):
    longer = {"sgd": (0.9,), "sparseopt": (0.9,)}
    setting = write_setting(sweep, "longer", longer, epochs=8)
    for method in longer:
        path = setting / f"runs/{method}-seed0/result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 2 * STEPS}))
    write_setting(sweep, "rigl", {"sgd": (0.8, 0.9)}, topology="rigl")
    names = ["set-0.9", "longer", "group/dense", "a-seed", "rigl"]
    (sweep / "sweep.json").write_text(json.dumps({"name": "a table", "settings": names}))
    report.report_sweep(sweep)
    panels = {axes.get_title(): axes for axes in drawn["flops.png"].axes}
    assert list(panels) == ["SET", "RigL"]
    (dense, sgd) = (box.lines[0].get_xydata() for box in panels["RigL"].containers)
    np.testing.assert_allclose(dense, [[3000 * 10 * STEPS, 96]])
    np.testing.assert_allclose(sgd, [[300 * 10 * STEPS, 85]])
    # Dense, then by method a line over both lengths at 0.9, and points.
    sizes = sorted(len(box.lines[0].get_xdata()) for box in panels["SET"].containers)
    assert sizes == [1, 1, 1, 1, 1, 2, 2]


def test_a_model_s_dense_runs_are_in_its_own_panels_alone(tmp_path, drawn):
    both = {"dense": (0.9,), "sgd": (0.8,)}
    for name, changes in {
        "small": {}, "wide": {"width": 2}, "mlp": {"model": "mlp"}, "rigl": {"topology": "rigl"}
    }.items():  # fmt: skip
        write_setting(tmp_path, name, both, compare=["dense", "sgd"], seeds=1, **changes)
    wide = tmp_path / "wide/runs/dense-seed0/result.json"
    wide.write_text(json.dumps(json.loads(wide.read_text()) | {"test_accuracy": 0.7}))
    text = report.report_sweep(tmp_path)
    panels = {axes.get_title(): axes for axes in drawn["flops.png"].axes}
    assert set(panels) == {"resnet8, SET", "resnet8, width=2, SET", "mlp, SET", "resnet8, RigL"}
    for title, axes in panels.items():
        dense, sgd = (box.lines[0].get_ydata().tolist() for box in axes.containers)
        assert (dense, sgd) == ([70.0] if "width" in title else [90.0], [80.0])
    assert ", mlp, resnet8 on digits: 4 settings" in text


def test_titles_name_what_was_trained(tmp_path, drawn):
    """Whatever the sweep is called, and however long it was to be."""
    (tmp_path / "flowers").mkdir()
    for name, changes in {
        "rigl-0.9-100epochs": {"dataset": "fashion_mnist", "epochs": 100},
        "own": {"dataset": "folder", "data_dir": str(tmp_path / "flowers")},
    }.items():
        write_setting(tmp_path, name, {"sgd": (0.5,)}, **changes)
        path = tmp_path / name / "runs/sgd-seed0/result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 4.0}))
    names = ["rigl-0.9-100epochs", "own"]
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "cifar100-table", "settings": names}))
    text = report.report_sweep(tmp_path)
    for name, figure in drawn.items():
        title = figure.get_suptitle().replace("\n", " ")
        expected = "resnet8 on fashion_mnist, folder flowers (settings of cifar100-table)"
        assert title == expected, name
    titles = [axes.get_title() for axes in drawn["curves.png"].axes]
    # 40 steps, which are 4 epochs.
    assert titles == ["rigl-0.9-100epochs, cut to 40 steps (n = 1)", "own (n = 1)"]
    assert "\ncut to 40 steps: rigl-0.9-100epochs\n" in text


def test_settings_on_different_data_have_panels_of_their_own(tmp_path, drawn):
    write_setting(tmp_path, "one", {"sgd": (0.5,)})
    write_setting(tmp_path, "two", {"sgd": (0.4,)}, pairs=True)
    write_setting(tmp_path, "three", {"sgd": (0.3,)}, train_split="train[:10%]")
    report.report_sweep(tmp_path)
    titles = [axes.get_title() for axes in drawn["flops.png"].axes]
    assert sorted(titles) == ["pairs, train", "train", "train[:10%]"]


def test_a_log_that_lost_its_evaluations_is_in_no_curve(sweep, drawn):
    for path in sweep.glob("set-0.9/runs/*/metrics.jsonl"):
        lines = [line for line in path.read_text().splitlines() if '"eval"' not in line]
        path.write_text("".join(line + "\n" for line in lines))
    report.report_sweep(sweep)
    titles = {name: [axes.get_title() for axes in drawn[name].axes] for name in drawn}
    assert titles["curves.png"] == ["group/dense (n = 2)", "a-seed (n = 1)"]
    assert titles["difference_accuracy.png"] == titles["curves.png"]
    assert len(titles["loss.png"]) == 3


def test_results_without_accuracy_or_flops(tmp_path, drawn):
    setting = write_setting(tmp_path, "old", {})
    for method, loss in (("sgd", 0.5), ("sparseopt", 0.25)):
        nothing = {"test_accuracy": None, "flops_per_example": None, "environment": {}}
        write_run(setting, method, 0, 0.5, loss, **nothing)
        log = setting / f"runs/{method}-seed0/metrics.jsonl"
        log.write_text(json.dumps({"kind": "train", "step": 9, "epoch": 1, "loss": loss}) + "\n")
    rows = [" ".join(line.split()) for line in report.report_sweep(tmp_path).splitlines()]
    assert "old sgd 1 - 0.5000 0.250 - -" in rows
    assert "old 1 -0.2500 - -" in rows
    assert list(drawn) == ["loss.png", "difference_loss.png"]


def test_more_settings_than_a_picture_can_take(tmp_path, drawn):
    for number in range(13):
        write_setting(tmp_path, f"setting {number:02}", {"sgd": (0.5,)})
    report.report_sweep(tmp_path)
    assert [len(drawn[name].axes) for name in ("curves.png", "curves-2.png")] == [12, 1]
    assert drawn["curves-2.png"].axes[0].get_title() == "setting 12 (n = 1)"


def test_runs_made_differently_are_told_of(sweep, drawn):
    other = ENVIRONMENT | {"git_commit": "b" * 40, "git_dirty": True, "device_kind": "a GPU"}
    write_run(sweep / "a-seed", "sgd", 1, 0.7, 0.3, environment=other)
    text = report.report_sweep(sweep)
    assert "commit aaaaaaaaaa, bbbbbbbbbb, with uncommitted changes; jax 1; device cpu, a G" in text
    assert "Not the same in all runs: git_commit, git_dirty, device_kind" in text


def test_long_names_have_a_line_of_their_own(tmp_path, drawn):
    name = "a setting whose name is too long for a column of a table"
    write_setting(tmp_path, name, {"sgd": (0.5, 0.6), "sparseopt": (0.5, 0.6)})
    text = report.report_sweep(tmp_path)
    assert f"\n{name}\n         sgd" in text
    assert f"\n{name}\n         2" in text
    assert "[+0.00, +0.00]" in text  # all differences are 0


def test_command(sweep, capsys):
    assert report.main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    for name in ("summary.json", "curves.png", "flops.png", "itop.png"):
        assert str(sweep / name) in printed
        assert (sweep / name).stat().st_size > 1000


@pytest.mark.parametrize("content", ['["set-0.9"]', '{"settings": "set-0.9"}', '{"settings": [1]}'])
def test_a_damaged_sweep_is_named(sweep, content, capsys):
    (sweep / "sweep.json").write_text(content)
    assert report.main([str(sweep)]) == 2
    assert "sweep.json has settings=" in capsys.readouterr().err


def test_a_damaged_line_of_a_log_is_named(sweep, capsys):
    path = sweep / "a-seed/runs/sgd-seed0/metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "tr')
    assert report.main([str(sweep)]) == 2
    assert f"{path}: line 7 is not JSON" in capsys.readouterr().err


def test_a_sweep_without_finished_runs(tmp_path):
    write_setting(tmp_path, "one", {})
    with pytest.raises(ConfigError, match="no finished run yet, in any of its settings: one"):
        report.load_sweep(tmp_path)
    with pytest.raises(ConfigError, match="nor of a sweep"):
        report.load_sweep(tmp_path / "one")


def test_loss_of_the_first_and_of_the_last_tenth(tmp_path):
    """100 steps with lines of different lengths: 1-4, 5-10, 11-12, 13-89, 90, 91-98, 99-100."""
    losses = {4: 3.0, 10: 2.0, 12: 9.0, 89: 9.0, 90: 9.0, 98: 0.5, 100: 0.25}
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in losses.items()]
    run = finished_runs.Run({"steps": 100}, lines, {}, {})
    assert finished_runs.early_train_loss(run) == pytest.approx((4 * 3 + 6 * 2) / 10)
    assert finished_runs.late_train_loss(run) == pytest.approx((8 * 0.5 + 2 * 0.25) / 10)
    # No line lies within the last tenth: the last one it is.
    whole = finished_runs.Run({"steps": 100}, [lines[0], lines[-1]], {}, {})
    assert finished_runs.late_train_loss(whole) == 0.25
    assert finished_runs.late_train_loss(finished_runs.Run({"steps": 100}, [], {}, {})) is None
