"""Our numbers beside the paper's: rows, paired differences, and their tables as text.

A row is one method of one setting, as JSON has it; percentages are percentages here, not fractions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.config import SPECS
from experiments.paper import reported
from experiments.paper.reproductions import Reproduction, Setting
from experiments.reporting import seed_statistics, tables
from experiments.reporting.finished_runs import COMPARED, Run, cut_to, dataset_name

Row = dict[str, Any]

_PAIRS = dict(COMPARED)
_NOT_PUBLISHED = ("average_over", "correct", "rescale", "fan_in_spread", "init")
"""Fields that the paper's tables have at their defaults, as far as it says."""

_TASK = (
    "model", "dataset", "label", "train_split", "test_split", "pool", "pairs", "width",
    "base_channels", "steps",
)  # fmt: skip
"""Fields that make another task, or a shorter training, of the paper's."""


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a table shows of a finished run.

    Attributes:
      name: with its unit.
      value: what it is of a run; None where the run has none.
      digits: behind the point.
      of_difference: name and unit of differences in it.
    """

    name: str
    value: Callable[[Run], float | None]
    digits: int
    of_difference: str


def _percent(field: str) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        fraction = run.result.get(field)
        return None if fraction is None else 100 * fraction

    return value


def _last_eigenvalue(run: Run) -> float | None:
    values = [line[1] for line in eigenvalues(run)]
    return values[-1] if values else None


_ACCURACY = Quantity(
    "test accuracy (%)", _percent("test_accuracy"), 2, "test accuracy (percentage points)"
)
QUANTITIES: Mapping[str, Quantity] = {
    "accuracy": _ACCURACY,
    "factors": _ACCURACY,
    "itop_rate": Quantity(
        "ITOP rate R_m (%)", _percent("itop_rate"), 2, "ITOP rate R_m (percentage points)"
    ),
    "sharpness": Quantity(
        "top eigenvalue of the Hessian, at the end",
        _last_eigenvalue,
        1,
        "top eigenvalue of the Hessian, at the end",
    ),
}
"""By what a reproduction shows."""


def eigenvalues(run: Run) -> list[tuple[float, float, float]]:
    """Epoch, top eigenvalue of the Hessian, and 2 / learning rate, wherever it was measured.

    The learning rate is that of the log's lines, and a straight line between them.
    """
    lines = [line for line in run.metrics if line["kind"] == "train"]
    steps, rates = ([line[name] for line in lines] for name in ("step", "learning_rate"))
    points = []
    for line in run.metrics:
        eigenvalue = line.get("hessian_top_eigenvalue")
        if line["kind"] == "diagnostics" and eigenvalue is not None and steps:
            rate = float(np.interp(line["step"], steps, rates))
            points.append((line["epoch"], eigenvalue, 2 / max(rate, 1e-12)))
    return points


def rows_of(
    reproduction: Reproduction,
    settings: Mapping[str, Setting],
    runs: Mapping[str, Sequence[Run]],
) -> list[Row]:
    """A row for each method of each setting, and for each number of the paper beside them.

    Args:
      reproduction: which.
      settings: what it trains, by name.
      runs: the finished runs of these settings.

    Returns:
      Rows with `setting` (None where only the paper has it), `variant`, `topology`, `sparsity`,
      `epochs`, `cut_to` (our steps, where they cut these short), `method`, `paper`, `seeds`,
      `values` (one a seed) and `ours` (their statistics).
    """
    value = QUANTITIES[reproduction.shows].value
    rows: dict[tuple[Any, ...], Row] = {}
    keys: dict[tuple[Any, ...], reported.Key | None] = {}
    for name, setting in settings.items():
        config = setting.config
        for method in config.methods():
            by_seed = {
                run.result["seed"]: value(run)
                for run in runs.get(name, ())
                if run.result["method"] == method
            }
            values = {seed: number for seed, number in by_seed.items() if number is not None}
            group = (setting.variant, config.topology, config.sparsity, method)
            keys[group] = _key(setting, method)
            row = rows[(*group, config.epochs)] = _row(name, group, config.epochs)
            row["cut_to"] = cut_to(runs.get(name, ()))
            row["paper"] = _published(reproduction, keys[group], config.epochs)
            row["seeds"], row["values"] = list(values), list(values.values())
            if values:
                row["ours"] = dataclasses.asdict(seed_statistics.describe(row["values"]))
    if reproduction.published is not None:
        for group, key in keys.items():
            for epochs in reproduction.published.epochs:
                cell = _published(reproduction, key, epochs)
                if cell is not None and (*group, epochs) not in rows:
                    rows[(*group, epochs)] = _row(None, group, epochs) | {"paper": cell}
    return list(rows.values())


def _row(setting: str | None, group: tuple[Any, ...], epochs: int) -> Row:
    variant, topology, sparsity, method = group
    return {
        "setting": setting, "variant": variant, "topology": topology, "sparsity": sparsity,
        "epochs": epochs, "cut_to": None, "method": method, "paper": None, "ours": None,
        "seeds": [], "values": [],
    }  # fmt: skip


def _key(setting: Setting, method: str) -> reported.Key | None:
    """Where the paper's tables have a setting's method, were model and dataset the paper's."""
    config = setting.config
    if any(getattr(config, name) != SPECS[name].default for name in _NOT_PUBLISHED):
        return None
    return config.topology, config.sparsity, config.grow_by, method


def _published(reproduction: Reproduction, key: reported.Key | None, epochs: int) -> Row | None:
    table = reproduction.published
    cell = table.cell(key, epochs) if table is not None and key is not None else None
    return None if cell is None else dataclasses.asdict(cell)


def differences_of(rows: Sequence[Row]) -> list[Row]:
    """The differences between methods of `COMPARED`, by seed, and the paper's beside them.

    A method is compared with the other one of its own variant, or with that of the first variant
    that has one, at the same topology, sparsity and length.

    Returns:
      Rows with `of` and `minus` (variant and method), `paper` (the difference of its means) and
      whether that is `approximate`, and `ours` (`PairedStatistics` and `seeds`). Either of `paper`
      and `ours` may be None.
    """
    differences = []
    for row in rows:
        if row["method"] not in _PAIRS:
            continue
        others = [other for other in rows if other["method"] == _PAIRS[row["method"]]]
        others = [one for one in others if _where(one) == _where(row)]
        own = [other for other in others if other["variant"] == row["variant"]]
        if not others:
            continue
        other = (own or others)[0]
        ours = seed_statistics.compare(_by_seed(row), _by_seed(other))
        both = row["paper"] and other["paper"]
        differences.append(
            {name: row[name] for name in ("setting", "topology", "sparsity", "epochs", "cut_to")}
            | {"of": [row["variant"], row["method"]], "minus": [other["variant"], other["method"]]}
            | {
                "paper": round(row["paper"]["mean"] - other["paper"]["mean"], 2) if both else None,
                "approximate": bool(both) and row["paper"]["approximate"],
                "ours": None if ours is None else {"seeds": ours[0]} | dataclasses.asdict(ours[1]),
            }
        )
    return [row for row in differences if row["paper"] is not None or row["setting"] is not None]


def _where(row: Row) -> tuple[Any, ...]:
    return row["topology"], row["sparsity"], row["epochs"]


def _by_seed(row: Row) -> dict[int, float]:
    return dict(zip(row["seeds"], row["values"], strict=True))


def curves_of(runs: Mapping[str, Sequence[Run]]) -> list[Row]:
    """The Hessian's top eigenvalue along training: a row for each setting, method and epoch.

    Returns:
      Rows with `setting`, `method`, `epoch`, `seeds`, `values`, `ours` (their statistics) and
      `two_over_rate` (2 / learning rate).
    """
    rows: dict[tuple[str, str, float], Row] = {}
    for setting, of_setting in runs.items():
        for run in of_setting:
            method = run.result["method"]
            for epoch, eigenvalue, limit in eigenvalues(run):
                row = rows.setdefault(
                    (setting, method, epoch),
                    {"setting": setting, "method": method, "epoch": epoch, "seeds": []}
                    | {"values": [], "two_over_rate": limit},
                )
                row["seeds"].append(run.result["seed"])
                row["values"].append(eigenvalue)
    for row in rows.values():
        row["ours"] = dataclasses.asdict(seed_statistics.describe(row["values"]))
    return list(rows.values())


def task_of(reproduction: Reproduction, settings: Mapping[str, Setting]) -> tuple[bool, str]:
    """Whether our task is the paper's, and ours in words; epochs aside, which tables show."""
    base, varied = reproduction.base, reproduction.varied()
    one = next(iter(settings.values())).config
    # Fields that the settings differ in are in their names.
    fields = {name: getattr(base if name in varied else one, name) for name in _TASK}
    dataset = dataset_name({"dataset": fields["dataset"], "data_dir": one.data_dir})
    text = f"{fields['model']} on {dataset}"
    for name, value in fields.items():
        if name not in ("model", "dataset") and value != SPECS[name].default:
            text += f", {name}={value}"
    same = all(value == getattr(base, name) for name, value in fields.items())
    published = reproduction.published
    if published is not None:
        same &= (fields["model"], fields["dataset"]) == (published.model, published.dataset)
    return same, text


_NAMES = {"rigl": "RigL", "set": "SET", "static": "static"}


def label(row: Row, method: str | None = None) -> str:
    """What a row is of, its length aside, e.g. `RigL 0.95 sparseopt`."""
    method = row["method"] if method is None else method
    where = "" if method == "dense" else f"{_NAMES[row['topology']]} {row['sparsity']:g}"
    return " ".join(filter(None, (where, row["variant"], method)))


def our_length(row: Mapping[str, Any]) -> str:
    """How long our training of a row was, e.g. `100 epochs`, or `20 steps of 100 epochs`."""
    epochs = _epochs(row["epochs"])
    return epochs if row["cut_to"] is None else f"{row['cut_to']} steps of {epochs}"


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


def table(reproduction: Reproduction, rows: Sequence[Row]) -> str:
    """Our numbers beside the paper's: lengths of training side by side, or methods for factors."""
    quantity = QUANTITIES[reproduction.shows]
    by_method = reproduction.shows == "factors"
    cells: dict[str, dict[Any, tuple[str, str]]] = {}
    columns: dict[Any, str] = {}
    for row in sorted(rows, key=lambda row: 0 if by_method else row["epochs"]):
        column = row["method"] if by_method else row["epochs"]
        name = column if by_method else _epochs(column)
        if not by_method and row["cut_to"] is not None:
            name += f" (ours: {row['cut_to']} steps)"
        columns[column] = max(columns.get(column, ""), name, key=len)
    for row in rows:
        name = row["variant"] if by_method else label(row)
        column = row["method"] if by_method else row["epochs"]
        published = "-" if row["paper"] is None else str(reported.Cell(**row["paper"]))
        cells.setdefault(name, {})[column] = (published, _mean(row["ours"], quantity.digits))
    lines = []
    for name, of_name in cells.items():
        pairs = [of_name.get(column, ("-", "-")) for column in columns]
        papers, ours = ([cell[i] for cell in pairs] for i in (0, 1))
        if any(text != "-" for text in papers):
            lines.append([name, "paper", *papers])
            name = ""
        lines.append([name, "ours", *ours])
    text = tables.columns((quantity.name, "", *columns.values()), lines, left=2, longest=_LONGEST)
    return text + "\nours: mean ± sample standard deviation over seeds (how many seeds)"


_LONGEST = 46
"""Characters that a first column may have: a pair of methods of two variants."""


def _mean(ours: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if ours is None else f"{tables.plus_minus(ours, 1, digits)} ({ours['n']})"


def difference_table(reproduction: Reproduction, differences: Sequence[Row]) -> str:
    """The paired differences as text, with 95 % confidence intervals and p."""
    quantity = QUANTITIES[reproduction.shows]
    digits, published = quantity.digits, reproduction.published is not None
    head = [quantity.of_difference, "epochs", "paper", "ours", "95 % CI", "p", "n"]
    lines = []
    order = list(dict.fromkeys(map(_arm_of, differences)))
    for row in sorted(differences, key=lambda row: order.index(_arm_of(row))):
        ours = row["ours"] or {"mean": None, "ci95": None, "p": None, "n": 0}
        of, minus = (" ".join(filter(None, row[side])) for side in ("of", "minus"))
        where = f"{_NAMES[row['topology']]} {row['sparsity']:g}"
        if reproduction.shows == "factors":
            name = f"{row['of'][0]}: {row['of'][1]} - {row['minus'][1]}"
        else:
            name = f"{where} {of} - {minus}"
        cut = "" if row["cut_to"] is None else f" (ours: {row['cut_to']} steps)"
        line = [name, f"{row['epochs']}{cut}"]
        if published:
            line.append(_published_difference(row, digits))
        mean = "-" if ours["mean"] is None else f"{ours['mean']:+.{digits}f}"
        interval, p = tables.interval(ours, 1, digits), tables.p_value(ours["p"])
        lines.append([*line, mean, interval, p, str(ours["n"])])
    header = head if published else [word for word in head if word != "paper"]
    notes = [
        "ours: mean of the differences paired by seed, and its interval by Student's t.",
        *tables.about_p([row["ours"] for row in differences]),
    ]
    return "\n".join([tables.columns(header, lines, longest=_LONGEST), *notes])


def _arm_of(row: Row) -> tuple[Any, ...]:
    return row["topology"], row["sparsity"], *row["of"]


def _published_difference(row: Row, digits: int) -> str:
    if row["paper"] is None:
        return "-"
    return f"~{row['paper']:+g}" if row["approximate"] else f"{row['paper']:+.{digits}f}"


def curve_table(curves: Sequence[Row], at_most: int = 12) -> str:
    """The top eigenvalue along training beside 2 / learning rate, at a dozen epochs or fewer."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in curves):
        rows = [row for row in curves if row["setting"] == setting]
        epochs = sorted({row["epoch"] for row in rows})
        chosen = np.unique(np.linspace(0, len(epochs) - 1, min(at_most, len(epochs))).round())
        methods = list(dict.fromkeys(row["method"] for row in rows))
        lines = []
        for epoch in (epochs[int(index)] for index in chosen):
            at_epoch = {row["method"]: row for row in rows if row["epoch"] == epoch}
            means = [_mean(at_epoch[one]["ours"], 1) if one in at_epoch else "-" for one in methods]
            limit = next(iter(at_epoch.values()))["two_over_rate"]
            lines.append([f"{epoch:.3g}", *means, f"{limit:.4g}"])
        header = (f"{setting}: epoch", *methods, "2 / learning rate")
        parts.append(tables.columns(header, lines, longest=_LONGEST))
    return "\n\n".join(parts)
