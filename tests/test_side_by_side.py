"""Tables and figures of the paper's and our numbers, where a command has cut ours short."""

import dataclasses
import re

from experiments import reproduce
from experiments.paper import figures, side_by_side
from experiments.paper.request import parse
from experiments.reporting.finished_runs import Run


def test_lengths_that_steps_cut_are_called_so():
    """In tables and figures; the paper's lengths beside them are whole."""
    asked = parse(
        ["cifar100-table", "--dataset=fashion_mnist", "--config.sparsity=0.9", "--epochs=1,200",
         "--config.topology=rigl", "--config.steps=20", "--seeds=1"]
    )  # fmt: skip
    runs = {
        name: [
            Run({"method": method, "seed": 0, "test_accuracy": 0.5, "steps": 20, "epochs": 1.0},
                [], {}, dataclasses.asdict(one.config))
            for method in one.config.methods()
        ]
        for name, one in asked.settings.items()
    }  # fmt: skip
    rows = side_by_side.rows_of(asked.reproduction, asked.settings, runs)
    table = side_by_side.table(asked.reproduction, rows).splitlines()
    assert re.split("  +", table[0])[1:] == [
        "1 epoch", "100 epochs", "200 epochs (ours: 20 steps)", "300 epochs", "500 epochs"
    ]  # fmt: skip
    differences = side_by_side.differences_of(rows)
    text = side_by_side.difference_table(asked.reproduction, differences)
    assert re.search(r"sparseopt - sgd +1 +- +\+0.00 ", text)
    assert re.search(r"sparseopt - sgd +200 \(ours: 20 steps\) +\+0.19 +\+0.00 ", text)
    figure = reproduce._figure(asked, {"rows": rows, "differences": differences, "curves": []})
    assert figure.get_suptitle() == (
        "resnet20 on fashion_mnist, steps=20 (settings of cifar100-table)"
    )
    ours, published = figure.axes
    labels = [label.get_text() for label in ours.get_xticklabels()]
    assert labels == ["1", "200, cut to\n20 steps"]
    assert [label.get_text() for label in published.get_xticklabels()] == [
        "100", "200", "300", "500"
    ]  # fmt: skip
    bars = figures.bars(rows, "accuracy", "title", None)
    assert [axes.get_title() for axes in bars.axes] == [
        "ours after 1 epoch", "ours after 20 steps of 200 epochs"
    ]  # fmt: skip
