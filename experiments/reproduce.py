"""Trains what a table or figure of the paper shows: `python -m experiments.reproduce NAME`.

    python -m experiments.reproduce NAME [--workdir=DIR] [--dataset=NAME] [--data_dir=DIR]
        [--epochs=N[,N...]] [--seeds=N] [--settings=PATTERN[,...]] [--config.FIELD=VALUE ...]

It trains every setting in a folder of its own, started again goes on where it was, and then prints
its table, the paper's numbers beside ours, draws the figure, and writes both as `DIR/NAME.json` and
`DIR/NAME-figure.png`. A value for a field that the settings differ in, e.g. --config.sparsity=0.97,
keeps the settings that have it; any other holds for all of them, and changes the base of `factors`.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import distributed, metrics, report, sweep, train, workdir
from experiments.divergence import DivergedError
from experiments.paper import (
    cold_start,
    figures,
    gradient_ratio,
    neuron_steps,
    reported,
    side_by_side,
)
from experiments.paper.request import Request, parse
from experiments.paper.side_by_side import QUANTITIES, Row
from experiments.programs import kept_in
from experiments.reporting import finished_runs, plots, tables
from experiments.run import StoppedError
from experiments.stopping import StopRequests
from experiments.terminal import tolerant_output

if TYPE_CHECKING:
    import matplotlib.figure

_MEASUREMENTS = {
    "gradient_ratio": gradient_ratio, "neuron_steps": neuron_steps, "cold_start": cold_start
}  # fmt: skip
"""What is no sweep, by what a reproduction shows: modules that measure, table and draw it."""


def reproduce(asked: Request, stop: StopRequests) -> None:
    """Trains what is missing, then prints tables, and writes numbers and figures.

    These show what there is, also where some runs diverged or training was stopped.

    Args:
      asked: what to do.
      stop: says when to stop.

    Raises:
      CheckpointError, ConfigError, DataError, DivergedError, StoppedError: as `train.train_grid`.
    """
    main = distributed.is_main()
    if main:
        print("\n\n".join(filter(None, (heading(asked), choices(asked)))) + "\n", flush=True)
    if asked.reproduction.shows not in QUANTITIES:
        with stop:
            _measure(asked)
        return
    configs = {name: setting.config for name, setting in asked.settings.items()}
    try:
        with stop:
            sweep.train_sweep(asked.reproduction.name, configs, asked.workdir, stop)
    except (StoppedError, DivergedError) as error:
        if main:
            print("\n" + _show(asked, isinstance(error, StoppedError)), flush=True)
        raise
    if main:
        print("\n" + _show(asked), flush=True)


def heading(asked: Request) -> str:
    """What is reproduced, and on which task, as text."""
    reproduction = asked.reproduction
    same, ours = side_by_side.task_of(reproduction, asked.settings)
    lines = [f"{reproduction.name}: {reproduction.summary}", ""]
    published = reproduction.published
    if published is not None:
        lines.append(f"paper: {reported.SOURCE}: {published.model} on {published.dataset}")
    lines.append(f"ours: {ours}")
    if published is not None and not same:
        lines.append(
            "Ours is another task: its numbers are not comparable with the paper's, which are shown"
            " for what\nthey are."
        )
    for claim in reproduction.claims:
        lines.append(textwrap.fill(f"the paper says: {claim}", 98, break_on_hyphens=False))
    return "\n".join([*lines, *reproduction.notes])


def choices(asked: Request) -> str:
    """What was chosen by us, or by the command line, as text."""
    reproduction, lines = asked.reproduction, []
    if reproduction.left_open:
        lines.append("Left open by the paper's text, so ours; where each comes from:")
    by_source: dict[str, list[str]] = {}
    for row in _hyperparameters(asked):
        source = "given by this command" if row["changed"] else row["from"]
        if row["field"] == "warmup_epochs" and row["values"] != [reproduction.base.warmup_epochs]:
            source = f"{row['from']}, shortened as the training is"
        values = "/".join(map(_plain, row["values"]))
        by_source.setdefault(source, []).append(f"{row['field']}={values}")
    lines += [
        textwrap.fill(f"{', '.join(fields)}: {source}", 98, initial_indent="  ",
                      subsequent_indent="    ", break_on_hyphens=False)
        for source, fields in by_source.items()
    ]  # fmt: skip
    further = [
        f"{field}={_plain(value)}"
        for field, value in asked.overrides.items()
        if field not in reproduction.left_open and field != "data_dir"
    ]
    if further:
        lines.append(f"Given by this command: {', '.join(further)}")
    lines += [
        f"The same as {name}, so not trained again: {', '.join(one.same)}"
        for name, one in asked.settings.items()
        if one.same
    ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _hyperparameters(asked: Request) -> list[Row]:
    """The fields that the paper leaves open: their values, and where they come from."""
    return [
        {
            "field": field,
            "values": list(
                dict.fromkeys(getattr(one.config, field) for one in asked.settings.values())
            ),
            "from": source,
            "changed": field in asked.overrides,
        }
        for field, source in asked.reproduction.left_open.items()
    ]


def _finished(asked: Request) -> dict[str, list[finished_runs.Run]]:
    """The finished runs of the settings asked for, by setting; the folder may hold others."""
    return finished_runs.load_settings(asked.workdir, asked.settings)


def _record(asked: Request, runs: Mapping[str, Sequence[finished_runs.Run]]) -> dict[str, Any]:
    """What `NAME.json` holds."""
    reproduction = asked.reproduction
    rows = side_by_side.rows_of(reproduction, asked.settings, runs)
    curves = side_by_side.curves_of(runs) if reproduction.shows == "sharpness" else []
    missing, diverged = {}, {}
    for name, setting in asked.settings.items():
        of_config = set(setting.config.runs())
        lost = [
            run
            for run in finished_runs.diverged(asked.workdir / name)
            if (run["method"], run["seed"]) in of_config
        ]
        done = {(run.result["method"], run.result["seed"]) for run in runs.get(name, ())}
        finished = len(of_config & done)
        if finished + len(lost) < len(of_config):
            missing[name] = {"finished": finished, "of": len(of_config)}
        if lost:
            diverged[name] = lost
    return _header(asked) | {
        "quantity": QUANTITIES[reproduction.shows].name,
        "missing": missing,
        "diverged": diverged,
        "rows": rows,
        "differences": side_by_side.differences_of(rows),
        "curves": curves,
    }


def _header(asked: Request) -> dict[str, Any]:
    reproduction = asked.reproduction
    same, ours = side_by_side.task_of(reproduction, asked.settings)
    published = reproduction.published
    task = None if published is None else f"{published.model} on {published.dataset}"
    return {
        "name": reproduction.name,
        "summary": reproduction.summary,
        "command": asked.published_command(),
        "paper": {"source": reported.SOURCE, "task": task, "claims": list(reproduction.claims)},
        "ours": {"task": ours, "same_task_as_paper": published is not None and same},
        "notes": list(reproduction.notes),
        "same_settings": {name: one.same for name, one in asked.settings.items() if one.same},
        "hyperparameters": _hyperparameters(asked),
        "environment": metrics.environment(),
    }


def _tables(asked: Request, record: Mapping[str, Any]) -> str:
    reproduction = asked.reproduction
    parts = [heading(asked), side_by_side.table(reproduction, record["rows"])]
    if record["curves"]:
        parts.append(
            side_by_side.curve_table(record["curves"])
            + "\nmeasured on the epoch's last batch. With momentum m the edge of stability is at"
            " (1 + m) times\n2 / learning rate."
        )
    if record["differences"]:
        parts.append(side_by_side.difference_table(reproduction, record["differences"]))
    if record["diverged"]:
        parts.append(tables.diverged(record["diverged"]))
    if record["missing"]:
        counts = [
            f"  {name}: {n['finished']} of {n['of']}" for name, n in record["missing"].items()
        ]
        parts.append("\n".join(["Not finished yet, runs:", *counts]))
    return "\n\n".join(parts)


def _show(asked: Request, stopped: bool = False) -> str:
    """Writes numbers and figures; returns the tables, where they are, and how to go on.

    The last is not said of a command that was stopped, which ends by saying so itself.
    """
    runs = _finished(asked)
    record = _record(asked, runs)
    name = asked.reproduction.name
    written = [asked.workdir / f"{name}.json"]
    metrics.write_json(written[0], record)
    figure = _figure(asked, record) if runs else None
    if figure is not None:
        # Not NAME.png: the report has an itop.png of its own.
        written.append(asked.workdir / f"{name}-figure.png")
        plots.save(figure, written[-1])
    parts = [_tables(asked, record), "\n".join(map(str, written))]
    if runs:
        everything = report.report_sweep(asked.workdir, list(asked.settings))
        parts.append(f"All of {name}:\n\n{everything}")
    if record["missing"] and not stopped:
        parts.append(f"not finished; to continue: {asked.command()}")
    return "\n\n".join(parts)


def _figure(asked: Request, record: Mapping[str, Any]) -> matplotlib.figure.Figure | None:
    reproduction = asked.reproduction
    same, ours = side_by_side.task_of(reproduction, asked.settings)
    title = f"{ours} (settings of {reproduction.name})"
    quantity = QUANTITIES[reproduction.shows]
    if reproduction.shows == "sharpness":
        return figures.sharpness(record["curves"], title) if record["curves"] else None
    if reproduction.shows == "factors":
        differences = [row for row in record["differences"] if row["ours"] is not None]
        return figures.forest(differences, quantity.of_difference, title) if differences else None
    if reproduction.shows == "itop_rate":
        return figures.bars(record["rows"], quantity.name, title, reproduction.published)
    return figures.budgets(record["rows"], quantity.name, title, same)


def _measure(asked: Request) -> None:
    """Does a reproduction that is no sweep: one function measures, tables and draws it."""
    (setting,) = asked.settings.values()
    keep = asked.workdir / f"{asked.reproduction.name}-parts.json"
    measurement: Any = _MEASUREMENTS[asked.reproduction.shows]
    with distributed.lock(lambda: workdir.lock(asked.workdir)), kept_in(asked.workdir):
        results = measurement.measure(setting.config, say=_say, keep=keep)
    if not distributed.is_main():
        return
    written = [
        asked.workdir / f"{asked.reproduction.name}{end}" for end in (".json", "-figure.png")
    ]
    metrics.write_json(written[0], _header(asked) | {"found": results})
    plots.save(measurement.figure(results), written[1])
    print("\n" + measurement.table(results) + "\n\n" + "\n".join(map(str, written)), flush=True)


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command, in processes that have found each other; returns its exit code.

    The codes are those of `train.guarded`.
    """
    asked: Request | None = None

    def body(stop: StopRequests) -> None:
        nonlocal asked
        asked = parse(sys.argv[1:] if argv is None else argv)
        reproduce(asked, stop)

    return train.guarded(
        body, lambda: asked.command() if asked else "python -m experiments.reproduce"
    )


if __name__ == "__main__":
    train.leave(train.join_and_run(main))
