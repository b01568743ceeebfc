"""What every NAME of `reproduce` trains, and how it is shown; training: test_reproduce_runs.py."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import reproduce
from experiments.config import Config, ConfigError
from experiments.configs import imagenet_resnet50
from experiments.divergence import DivergedError
from experiments.paper import figures, side_by_side
from experiments.paper.catalogue import BY_NAME
from experiments.paper.request import parse
from experiments.reporting.finished_runs import Run


def settings(*words):
    return {name: one.config for name, one in parse(words).settings.items()}


# Settings, and runs in all: the paper's table sizes times methods times seeds.
@pytest.mark.parametrize(
    ("name", "count", "runs", "some"),
    [
        ("imagenet-table", 18, 36, "set-0.95-180epochs"),
        ("cifar100-table", 24, 240, "rigl-0.9-500epochs"),
        ("ham-table", 4, 80, "rigl-0.95-100epochs"),
        ("itop", 6, 9, "corrected-0.97-270epochs"),
        ("direction-only", 12, 100, "unit_norm-0.95-300epochs"),
        ("normalisation", 12, 80, "network-0.95-200epochs"),
        ("hessian", 1, 15, "0.95-100epochs"),
        ("factors", 21, 210, "init=sparse_he_normal"),
        ("factors-mlp", 24, 480, "momentum=0"),
    ],
)
def test_settings(name, count, runs, some):
    found = settings(name)
    assert len(found) == count
    assert sum(len(config.methods()) * config.seeds for config in found.values()) == runs
    assert some in found
    # No two settings train the same.
    assert len({json.dumps(dataclasses.asdict(config)) for config in found.values()}) == count


def changes(one, other):
    left, right = dataclasses.asdict(one), dataclasses.asdict(other)
    return {field: right[field] for field in left if left[field] != right[field]}


def test_configs_of_the_settings():
    imagenet = settings("imagenet-table")["set-0.97-270epochs"]
    assert changes(imagenet_resnet50.get_config(), imagenet) == {
        "topology": "set", "sparsity": 0.97, "epochs": 270
    }  # fmt: skip
    cifar = settings("cifar100-table")["rigl-0.97-200epochs"]
    recipe = Config(
        dataset="cifar100", model="resnet20", sparsity=0.97, topology="rigl", epochs=200, seeds=5,
        batch_size=128, learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4,
        schedule="cosine", update_interval=100, drop_fraction=0.3, update_end=0.75,
        distribution="erk", compare=("sgd", "sparseopt"),
    )  # fmt: skip
    assert not changes(cifar, recipe).keys() - {"data_dir", "log_every", "keep_last", "keep_best"}
    itop = settings("itop")
    elsewhere = settings("itop", "--dataset=fashion_mnist", "--epochs=200")["raw-0.97-200epochs"]
    assert changes(cifar, elsewhere) == {"dataset": "fashion_mnist"}
    assert changes(itop["raw-0.9-270epochs"], itop["corrected-0.9-270epochs"]) == {
        "grow_by": "corrected_gradient", "compare": ("sparseopt",)
    }  # fmt: skip
    ham = settings("ham-table")["rigl-0.95-300epochs"]
    assert (ham.ham_alpha, ham.ham_beta) == (200, 0.016)


def test_factors_change_one_field_each():
    found = settings("factors")
    base = found["base"]
    for name, config in found.items():
        field, _, value = name.partition("=")
        changed = changes(base, config)
        if name == "base":
            assert not changed
        elif field in ("batch_size", "fraction"):  # as many steps as the base's 468
            images = 60_000 * {"batch_size=32": 0.25, "fraction=0.1": 0.1}.get(name, 1)
            steps = config.epochs * int(images / config.batch_size)
            assert steps == pytest.approx(468, rel=0.02)
        else:
            assert list(changed) == [field]
            assert str(changed[field]).lower() in (value, f"{value}.0")


def test_narrower_and_shorter():
    found = settings("cifar100-table", "--epochs=2,30", "--config.sparsity=0.97", "--seeds=3")
    assert list(found) == [
        "rigl-0.97-2epochs", "rigl-0.97-30epochs", "set-0.97-2epochs", "set-0.97-30epochs"
    ]  # fmt: skip
    assert {config.seeds for config in found.values()} == {3}
    assert [config.epochs for config in found.values()] == [2, 30, 2, 30]
    assert list(settings("itop", "--config.grow_by=corrected_gradient", "--epochs=1")) == [
        "corrected-0.9-1epoch", "corrected-0.95-1epoch", "corrected-0.97-1epoch"
    ]  # fmt: skip
    assert list(settings("factors", "--settings=base,learning*=0.5")) == [
        "base", "learning_rate=0.5"
    ]  # fmt: skip
    lower = settings("factors", "--config.learning_rate=0.01")
    assert [lower[name].learning_rate for name in ("base", "learning_rate=2", "pairs=true")] == [
        0.01, 2, 0.01
    ]  # fmt: skip
    # Lengths of factors are multiples of the base's.
    assert {config.epochs for config in settings("factors", "--epochs=3").values()} == {3, 12, 30}
    # 5 of 90 epochs of warm-up are 1/18; longer trainings keep the 5.
    shorter = settings("imagenet-table", "--epochs=18,400", "--settings=rigl-0.9-*")
    assert [config.warmup_epochs for config in shorter.values()] == pytest.approx([1, 5])
    asked = parse(
        ["hessian", "--dataset=digits", "--data_dir=/somewhere", "--config.model=resnet8"]
    )
    (config,) = (one.config for one in asked.settings.values())
    assert (config.dataset, config.data_dir, config.model) == ("digits", "/somewhere", "resnet8")
    again = parse(asked.words)
    assert again == asked
    assert str(asked.workdir) == "runs/hessian"


def test_dense_training_is_not_repeated_for_every_sparsity():
    words = ["cifar100-table", "--epochs=1,2", "--config.compare=dense,sgd,ham"]
    found = settings(*words)
    dense = {name: config for name, config in found.items() if "dense" in config.compare}
    assert list(dense) == ["dense-1epoch", "dense-2epochs"]
    assert {config.compare for config in dense.values()} == {("dense",)}
    assert len(found) == 2 + 12
    # So are those of a command for one sparsity, which may share the folder of the whole.
    single = settings(*words, "--config.sparsity=0.97", "--config.topology=set")
    assert single == {
        name: config
        for name, config in found.items()
        if "dense" in name or name.startswith("set-0.97")
    }
    # Elsewhere there is one sparsity, and dense is one of the methods.
    assert list(settings("ham-table", "--epochs=1", "--config.compare=dense,ham")) == [
        "rigl-0.95-1epoch"
    ]


def test_settings_that_an_override_makes_the_same_are_trained_once():
    words = ["factors", "--config.learning_rate=0.02"]
    asked = parse(words)
    assert asked.settings["base"].same == ("learning_rate=0.02",)
    assert "learning_rate=0.02" not in asked.settings
    assert len(asked.settings) == len(settings("factors")) - 1
    said = "The same as base, so not trained again: learning_rate=0.02"
    assert said in reproduce.choices(asked)
    assert list(settings(*words, "--settings=learning_rate=0.0*")) == ["base"]
    assert "The same as" not in reproduce.choices(parse(["factors"]))


def test_the_published_command_has_no_folder_of_this_machine():
    for data_dir in ("--data_dir=/data", "--config.data_dir=/data"):
        asked = parse(["itop", "--epochs=2", data_dir, "--config.sparsity=0.9", "--workdir=/here"])
        assert asked.published_command() == (
            "python -m experiments.reproduce itop --epochs=2 --config.sparsity=0.9"
        )
        assert "--workdir=/here" in asked.command()
        assert data_dir in asked.command()


def test_the_heading_says_whose_words_it_has():
    itop = reproduce.heading(parse(["itop"])).splitlines()
    assert itop[-1] == (
        "the paper says: growth by raw gradients is the default and the better choice"
    )
    cifar = reproduce.heading(parse(["cifar100-table"]))
    assert cifar.endswith("\nThe paper's table is of RigL alone.")
    assert "the paper says" not in cifar


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which table or figure? Names: imagenet-table, cifar100-table"),
        (["cifar-table"], "cifar-table: no such table or figure. Did you mean 'cifar100-table'?"),
        (["itop", "--seed=1"], "--seed=1: no such argument. Did you mean '--seeds'?"),
        (
            ["itop", "--config.sparsty=1"],
            "--config.sparsty: no such field. Did you mean 'sparsity'",
        ),
        (["itop", "--config.sparsity=0.8"], "sparsity 0.9, 0.95, 0.97; give one of these"),
        (["itop", "--config.compare=sgd"], "--config.compare=sgd: the settings of itop say"),
        (["itop", "--epochs=2,0"], "--epochs=2,0 must be integers of at least 1"),
        (["itop", "--epochs=two"], "--epochs=two must be integers of at least 1"),
        (["itop", "--epochs=1", "--config.epochs=1"], "--epochs and --config.epochs mean the same"),
        (["itop", "--seeds=few"], "--seeds='few' must be an integer at least 1"),
        (["factors", "--epochs=1,2"], "--epochs=1,2: factors takes one number"),
        (["factors", "--settings=bas"], "--settings=bas: factors has no such setting."),
        (["cifar100-table", "--config.optimizer=sgd"], "give --config.compare"),
        (["cifar100-table", "--config.compare="], "names no method"),
        (["hessian", "--config.hessian_every=0"], "it must be at least 1"),
        (["gradient-ratio", "--epochs=2"], "--epochs=2: gradient-ratio is measured before any"),
        (["gradient-ratio", "--config.epochs=2"], "--config.epochs=2: gradient-ratio"),
        (["gradient-ratio", "--config.sparsity=0.5"], "--config.sparsity=0.5: gradient-ratio"),
        (["grown-warmup", "--config.momentum=0.5"], "0.5: grown-warmup trains an MLP of its own"),
        (["gradient-ratio", "--settings=x"], "gradient-ratio has one setting"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(words)
    assert reproduce.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_lists_all_names(capsys):
    with pytest.raises(SystemExit) as left:
        reproduce.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for name, reproduction in BY_NAME.items():
        assert re.search(rf"^  {name} +{re.escape(reproduction.summary)}$", shown, re.MULTILINE)


def made_run(method, seed, accuracy, lines=()):
    result = {"method": method, "seed": seed, "test_accuracy": accuracy, "itop_rate": accuracy}
    return Run(result, list(lines), {}, {})


# In points, sparseopt - sgd is 1, 3 and 2: mean 2, standard deviation 1. With 2 degrees of
# freedom Student's t has a closed form: p = 1 - t / sqrt(t^2 + 2) at t = 2 sqrt(3).
ACCURACIES = {"sgd": (0.50, 0.52, 0.54), "sparseopt": (0.51, 0.55, 0.56)}
P = 1 - np.sqrt(12 / 14)


def made_table(*words):
    asked = parse(["cifar100-table", "--config.sparsity=0.9", "--config.topology=rigl", *words])
    (name,) = asked.settings
    runs = {
        name: [
            made_run(method, seed, accuracy)
            for method, accuracies in ACCURACIES.items()
            for seed, accuracy in enumerate(accuracies)
        ]
    }
    return asked, side_by_side.rows_of(asked.reproduction, asked.settings, runs)


def test_rows_and_differences():
    asked, rows = made_table("--epochs=100", "--seeds=3")
    own = [row for row in rows if row["setting"]]
    assert [(row["method"], row["paper"]["mean"]) for row in own] == [
        ("sgd", 60.66), ("sparseopt", 61.34)
    ]  # fmt: skip
    assert own[0]["ours"]["mean"] == pytest.approx(52)
    assert own[0]["ours"]["std"] == pytest.approx(2)
    # Beside them the paper's three further lengths.
    assert [row["epochs"] for row in rows if not row["setting"]] == 2 * [200, 300, 500]
    found = side_by_side.differences_of(rows)
    assert [(row["epochs"], row["paper"]) for row in found] == [
        (100, 0.68), (200, 0.19), (300, 0.53), (500, 0.56)
    ]  # fmt: skip
    ours = found[0]["ours"]
    assert (ours["n"], ours["mean"], ours["std"]) == pytest.approx((3, 2, 1))
    assert ours["p"] == pytest.approx(P)
    assert all(row["ours"] is None for row in found[1:])
    certain = [dict(found[0], ours=dict(ours, p=0.002)), dict(found[0], ours=dict(ours, p=None))]
    marked = side_by_side.difference_table(asked.reproduction, [*certain, *found])
    assert re.search(r" 0.0020\* +3\n", marked)
    assert "Of 2 comparisons\nhere, 0.02 would" in marked
    table = side_by_side.table(asked.reproduction, rows)
    assert re.search(r"RigL 0.9 sgd +paper +60.66 ± 0.43 +62.93 ± 0.17", table)
    assert re.search(r"\n +ours +52.00 ± 2.00 \(3\) +- +-", table)
    differences = side_by_side.difference_table(asked.reproduction, found)
    assert re.search(
        r"sparseopt - sgd +100 +\+0.68 +\+2.00 +\[-0.48, \+4.48\] +0.0742 +3", differences
    )
    assert "not comparable" not in reproduce.heading(asked)


def test_another_task_is_said_to_be_one():
    """A dataset, a model, or a shorter run that the paper does not have."""
    for words in (["--dataset=digits"], ["--config.model=resnet8"], ["--config.steps=9"]):
        asked, rows = made_table("--epochs=100", *words)
        assert "not comparable with the paper's" in reproduce.heading(asked)
    assert rows[0]["paper"] is not None
    # Another correction is not the paper's, wherever it is trained.
    _, rows = made_table("--epochs=100", "--config.average_over=network")
    assert all(row["paper"] is None for row in rows)


def test_a_variant_is_compared_with_the_first_that_has_the_other_method():
    asked = parse(["normalisation", "--epochs=1", "--seeds=2"])
    runs = {
        name: [made_run(m, seed, i / 10) for m in one.config.methods() for seed in (0, 1)]
        for i, (name, one) in enumerate(asked.settings.items())
    }
    rows = side_by_side.rows_of(asked.reproduction, asked.settings, runs)
    found = [row for row in side_by_side.differences_of(rows) if row["ours"]]
    assert [(row["of"], row["minus"]) for row in found] == [
        ([variant, "sparseopt"], ["layer", "sgd"]) for variant in ("layer", "network", "none")
    ]
    assert [row["ours"]["mean"] for row in found] == pytest.approx([0, 10, 20])
    figure = figures.budgets(rows, "test accuracy (%)", "title", same_task=False)
    ours, published = figure.axes
    assert (ours.get_title(), published.get_title()) == (
        "ours: RigL 0.95",
        "the paper's: RigL 0.95",
    )
    heights = [float(line.get_ydata()[0]) for line in ours.lines if line.get_marker() == "o"]
    assert heights == pytest.approx([0, 0, 10, 20])
    drawn = [list(line.get_ydata()) for line in published.lines if line.get_marker() == "o"]
    assert drawn == [[55.8, 59.22, 60.0, 61.45], [56.8, 59.91, 60.67, 61.74]]


def test_eigenvalues_beside_two_over_the_rate():
    """The rate falls from 0.1 at step 10 to 0.05 at step 20: 0.075 at step 15."""
    lines = [
        {"kind": "train", "step": 10, "learning_rate": 0.1},
        {"kind": "diagnostics", "step": 10, "epoch": 1.0, "hessian_top_eigenvalue": 15.0},
        {"kind": "diagnostics", "step": 12, "epoch": 1.2},
        {"kind": "diagnostics", "step": 15, "epoch": 1.5, "hessian_top_eigenvalue": 30.0},
        {"kind": "train", "step": 20, "learning_rate": 0.05},
    ]
    run = made_run("sgd", 0, 0.5, lines)
    higher = [
        dict(line, hessian_top_eigenvalue=line["hessian_top_eigenvalue"] + 2)
        if "hessian_top_eigenvalue" in line
        else line
        for line in lines
    ]
    assert side_by_side.eigenvalues(run) == [
        (1.0, 15.0, pytest.approx(20)), (1.5, 30.0, pytest.approx(2 / 0.075))
    ]  # fmt: skip
    rows = side_by_side.curves_of({"0.95-2epochs": [run, made_run("sgd", 1, 0.5, higher)]})
    assert [(row["epoch"], row["ours"]["mean"], row["ours"]["n"]) for row in rows] == [
        (1.0, 16.0, 2), (1.5, 31.0, 2)
    ]  # fmt: skip
    table = side_by_side.curve_table(rows)
    assert re.search(r"^1.5 +31.0 ± 1.4 \(2\) +26.67$", table, re.MULTILINE)
    (axes,) = figures.sharpness(rows, "title").axes
    measured, limit = axes.lines
    assert list(measured.get_ydata()) == [16, 31]
    assert list(limit.get_ydata()) == pytest.approx([20, 2 / 0.075])


def test_bars_of_itop():
    asked = parse(["itop", "--epochs=2", "--seeds=1", "--config.sparsity=0.95"])
    runs = {
        name: [made_run(method, 0, 0.2 + 0.1 * i) for method in one.config.methods()]
        for i, (name, one) in enumerate(asked.settings.items())
    }
    rows = side_by_side.rows_of(asked.reproduction, asked.settings, runs)
    table = asked.reproduction.published
    figure = figures.bars(rows, "R_m", "title", table)
    (legend,) = figure.legends
    shown = " ".join(legend.get_title().get_text().split())
    assert shown.endswith("the paper's, resnet50 on imagenet2012 after 270 epochs, off a figure")
    (axes,) = figure.axes
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == pytest.approx([20, 54, 20, 56, 30, 39.5])
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False, True] * 3


def test_forest_of_factors():
    asked = parse(["factors", "--settings=base,topology=static", "--seeds=2"])
    runs = {
        name: [made_run("sgd", s, 0.5) for s in (0, 1)]
        + [made_run("sparseopt", s, 0.5 + 0.01 * (i + s)) for s in (0, 1)]
        for i, name in enumerate(asked.settings)
    }
    rows = side_by_side.rows_of(asked.reproduction, asked.settings, runs)
    found = side_by_side.differences_of(rows)
    assert [row["ours"]["mean"] for row in found] == pytest.approx([0.5, 1.5])
    (axes,) = figures.forest(found, "points", "title").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["base", "topology=static"]
    assert axes.get_xlabel() == "sparseopt - sgd: points"
    ham = dict(found[1], of=["topology=static", "sparseopt_ham"], minus=["topology=static", "ham"])
    (axes,) = figures.forest([*found, ham], "points", "title").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "base: sparseopt - sgd",
        "topology=static: sparseopt - sgd",
        "topology=static: sparseopt_ham - ham",
    ]
    assert axes.get_xlabel() == "difference: points"
    assert "static: sparseopt - sgd" in side_by_side.difference_table(asked.reproduction, found)


def test_what_diverged_is_shown_whatever_the_folder_holds_besides(tmp_path, monkeypatch, capsys):
    """The sweep has trained all that it could: seed 1 of sparseopt is lost."""
    words = [
        "cifar100-table", "--epochs=1", "--seeds=2", "--config.sparsity=0.9",
        "--config.topology=set", f"--workdir={tmp_path}",
    ]  # fmt: skip

    def train_sweep(name, configs, folder, stop):
        (setting,) = configs
        (tmp_path / "sweep.json").write_text('{"name": "other", "settings": ["another"]}')
        (folder / setting).mkdir()
        config = json.dumps(dataclasses.asdict(configs[setting]))
        (folder / setting / "config.json").write_text(config)
        for method, seed in (("sgd", 0), ("sgd", 1), ("sgd", 7), ("sparseopt", 0), ("ham", 0)):
            run = folder / setting / f"runs/{method}-seed{seed}"
            run.mkdir(parents=True)
            result = {
                "method": method, "seed": seed, "steps": 1, "density": 0.1, "test_accuracy": 0.5
            }  # fmt: skip
            (run / "result.json").write_text(json.dumps(result))
            (run / "metrics.jsonl").write_text("")
        run = folder / setting / "runs/sparseopt-seed1"
        run.mkdir()
        lost = {"method": "sparseopt", "seed": 1, "message": "the loss is nan at step 22"}
        (run / "diverged.json").write_text(json.dumps(lost | {"environment": {}}))
        raise DivergedError("sparseopt seed 1: the loss is nan at step 22")

    monkeypatch.setattr(reproduce.sweep, "train_sweep", train_sweep)
    assert reproduce.main(words) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: sparseopt seed 1: the loss is nan")
    line = "diverged: set-0.9-1epoch sparseopt seed 1: the loss is nan at step 22\n"
    assert shown.out.count(line) == 2  # in the table, and in the report
    assert "not finished" not in shown.out.lower()
    record = json.loads((tmp_path / "cifar100-table.json").read_text())
    assert record["missing"] == {}
    assert record["diverged"] == {
        "set-0.9-1epoch": [
            {"method": "sparseopt", "seed": 1, "message": "the loss is nan at step 22"}
        ]
    }
    own = {row["method"]: row["seeds"] for row in record["rows"] if row["setting"]}
    assert own == {"sgd": [0, 1, 7], "sparseopt": [0]}
    assert (tmp_path / "cifar100-table-figure.png").is_file()
    assert list(json.loads((tmp_path / "summary.json").read_text())["settings"]) == [
        "set-0.9-1epoch"
    ]
