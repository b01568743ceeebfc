"""The paper's numbers, against sums over its tables and against what its text says of them."""

import itertools
import re

import pytest

from experiments.paper import reported

TABLES = {"imagenet": reported.IMAGENET, "cifar100": reported.CIFAR100}


def test_sums_of_the_tables():
    """Column sums of the paper's own tables, added up apart from this file's numbers."""
    imagenet = list(reported.IMAGENET.cells.values())
    assert len(imagenet) == 12
    sums = [sum(row[i].mean for row in imagenet) for i in range(3)]
    assert sums == pytest.approx([868.46, 883.15, 886.11])
    assert all(cell.std is None for row in imagenet for cell in row)
    cifar = [row for key, row in reported.CIFAR100.cells.items() if not key[3].endswith("ham")]
    assert len(cifar) == 6
    means = [sum(row[i].mean for row in cifar) for i in range(4)]
    assert means == pytest.approx([341.08, 357.06, 362.86, 368.74])
    deviations = [sum(row[i].std for row in cifar) for i in range(4)]
    assert deviations == pytest.approx([2.75, 2.53, 2.52, 2.07])


@pytest.mark.parametrize("name", TABLES)
def test_longer_training_is_better_and_sparser_nets_are_worse(name):
    table = TABLES[name]
    for key, row in table.cells.items():
        assert len(row) == len(table.epochs)
        means = [cell.mean for cell in row]
        assert means == sorted(means), key
    for topology, method in itertools.product(("rigl", "set"), ("sgd", "sparseopt")):
        for epochs in table.epochs:
            cells = [table.cell((topology, s, "gradient", method), epochs) for s in (0.9, 0.95)]
            cells.append(table.cell((topology, 0.97, "gradient", method), epochs))
            if None not in cells:
                assert cells[0].mean > cells[1].mean > cells[2].mean


def test_where_sparseopt_is_ahead():
    """On CIFAR-100 everywhere; on ImageNet in 14 of 18, with a tie at 0.90 after 270 epochs."""

    def gaps(table):
        pairs = (("sparseopt", "sgd"), ("sparseopt_ham", "ham"))
        return {
            (*key[:2], epochs): table.cell(key, epochs).mean
            - table.cell((*key[:3], dict(pairs)[key[3]]), epochs).mean
            for key in table.cells
            if key[3] in dict(pairs)
            for epochs in table.epochs
        }

    assert all(gap > 0 for gap in gaps(reported.CIFAR100).values())
    imagenet = gaps(reported.IMAGENET)
    assert len(imagenet) == 18
    assert sum(gap > 0 for gap in imagenet.values()) == 14
    assert imagenet["rigl", 0.9, 270] == 0
    # The largest gains are at 0.97 after 90 epochs, 1.21 and 1.31 points.
    largest = sorted(imagenet, key=imagenet.get)[-2:]
    assert largest == [("rigl", 0.97, 90), ("set", 0.97, 90)]
    assert imagenet["set", 0.97, 90] == pytest.approx(1.31)


def test_growth_by_corrected_gradients_explores_less():
    for sparsity in (0.9, 0.95, 0.97):
        sgd, raw, corrected = (
            reported.ITOP.cell(("rigl", sparsity, *arm), 270).mean
            for arm in (
                ("gradient", "sgd"),
                ("gradient", "sparseopt"),
                ("corrected_gradient", "sparseopt"),
            )
        )
        assert corrected < sgd < raw
        assert raw > 100 * (1 - sparsity)  # never below the density


def test_gradient_ratios_lie_a_little_above_theory():
    for sparsity, ratio in reported.GRADIENT_RATIO.items():
        assert 1 < ratio * (1 - sparsity) ** 0.5 < 1.15
    low, high = reported.GRADIENT_RATIO_WITHOUT_NORM
    assert 1 <= low < high < min(reported.GRADIENT_RATIO.values())


def test_cells():
    key = ("rigl", 0.9, "gradient", "sparseopt")
    assert str(reported.CIFAR100.cell(key, 100)) == "61.34 ± 0.35"
    assert str(reported.IMAGENET.cell(key, 90)) == "74.41"
    assert str(reported.ITOP.cell(key, 270)) == "~75"
    assert reported.CIFAR100.cell(key, 2) is None
    assert reported.CIFAR100.cell(("set", *key[1:]), 100) is None
    assert re.search(r"\b2605\.27541\b", reported.SOURCE)
