"""The final parameters of a run as a compact file: `python -m experiments.export RUN --to=FILE`.

RUN is a work folder of `experiments.train` with one finished run, or the folder of one of several
(`DIR/runs/sparseopt-seed0`). FILE then has `params`, with their masks, and `batch_stats`, as the
model's `apply` takes them; `sx.load_compact(FILE)` and `sx.load_compact_masks(FILE)` read it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

import sparseopt_jax as sx
from experiments import checkpoint, metrics
from experiments.checkpoint import CheckpointError
from experiments.command_line import Parser
from experiments.config import ConfigError
from experiments.paths import local_path, output_file
from experiments.terminal import tolerant_output


def final_variables(run: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """What a finished run has learnt, from its last checkpoint.

    Args:
      run: its own folder, `WORKDIR/runs/METHOD-seedK`.

    Returns:
      `params` and `batch_stats`, NumPy's arrays in nested dicts; and the masks of `params`, None
      where the run is dense.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
    """
    origin = metrics.read_json(run / "run.json")
    folder, place = run, None
    if origin["group"] is not None:
        folder = run.parent.parent / "batches" / origin["group"]
        place = _place(run, [tuple(one) for one in metrics.read_json(folder / "runs.json")])
    step = metrics.read_json(run / "result.json")["steps"]
    arrays = checkpoint.read_arrays(folder / "checkpoints", step)
    variables = {name: arrays["state"].get(name, {}) for name in ("params", "batch_stats")}
    masks = arrays["logged_masks"]  # at the end that is all of them
    if place is not None:
        method, sparse, seed = place
        variables = jax.tree.map(lambda leaf: leaf[method, seed], variables)
        masks = None if sparse is None else jax.tree.map(lambda leaf: leaf[seed], masks[sparse])
    return variables, masks or None


def _place(run: pathlib.Path, members: Sequence[tuple[str, int]]) -> tuple[int, int | None, int]:
    """Where a run is in the arrays of its group: method, the same among sparse ones, and seed."""
    methods = list(dict.fromkeys(method for method, _ in members))
    seeds = list(dict.fromkeys(seed for _, seed in members))
    method, _, seed = run.name.rpartition("-seed")

    def is_sparse(name: str) -> bool:
        origin = metrics.read_json(run.with_name(f"{name}-seed{seed}") / "run.json")
        return bool(origin["config"]["topology"] != "dense")

    sparse = [name for name in methods if is_sparse(name)]
    among_sparse = sparse.index(method) if method in sparse else None
    return methods.index(method), among_sparse, seeds.index(int(seed))


def find_run(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the one finished run that `folder` is or holds; raises ConfigError."""
    if (folder / "run.json").is_file():
        if not (folder / "result.json").is_file():
            raise ConfigError(f"RUN={folder} is not finished: it has no result.json")
        return folder
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"RUN={folder} has no config.json: it is not the folder of a run, which"
            " experiments.train leaves"
        )
    runs = sorted(path.parent for path in folder.glob("runs/*/result.json"))
    if not runs:
        raise ConfigError(f"RUN={folder} has no finished run yet")
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise ConfigError(f"RUN={folder} has several finished runs: give one, {runs[0]}. {names}")
    return runs[0]


def export(folder: pathlib.Path, file: pathlib.Path, values: str = "exact") -> str:
    """Writes a compact file; returns a line that says how large it is.

    Args:
      folder: as `find_run` takes it.
      file: to write.
      values: as for `sx.save_compact`.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
      ConfigError: there is no such run.
      OSError: the file cannot be written.
    """
    run = find_run(folder)
    variables, masks = final_variables(run)
    both = None if masks is None else {"params": masks, "batch_stats": None}
    sx.save_compact(file, variables, both, values=values)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    kept = weights if masks is None else sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    return (
        f"{file}: {file.stat().st_size:,} bytes, dense {dense:,}; {run.name}, {kept:,} of"
        f" {weights:,} parameters"
    )


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m experiments.export",
        description="Writes the final parameters of a run, and their masks, to a compact file.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a work folder, or DIR/runs/METHOD-seedK")
    parser.add_argument("--to", metavar="FILE", required=True, help="the file to write")
    parser.add_argument(
        "--values",
        choices=("exact", "bfloat16"),
        default="exact",
        help="bfloat16 rounds the active weights (default: exact)",
    )
    try:
        asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
        folder = local_path("RUN", asked.run)
        print(export(folder, output_file("--to", asked.to), asked.values))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
