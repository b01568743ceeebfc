"""The model that a run has trained, in one file: `python -m experiments.export RUN --to=FILE`.

RUN is a work folder of `experiments.train` with one finished run, or the folder of one of several
(`DIR/runs/sparseopt-seed0`). The ending of FILE says what it is to be:

    none, .compact, .safetensors   a compact file, which `sx.load_compact` and
                                   `sx.load_compact_masks` read: `params`, with their masks, and
                                   `batch_stats`, as the model's `apply` takes them
    .stablehlo                     a program with its weights, for `jax.export.deserialize`
    .onnx                          ONNX, with sparse initializers
    .tflite                        LiteRT, with its encoding of sparse kernels
    .pt, .npz                      the state dict of torchvision's ResNets, of PyTorch or NumPy

Those after the first take images as the run did, (image - mean) / std, whose numbers are printed.
"""

from __future__ import annotations

import importlib
import io
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import sparseopt_jax as sx
from experiments import build, checkpoint, metrics
from experiments.checkpoint import CheckpointError
from experiments.command_line import Parser
from experiments.config import Config, ConfigError
from experiments.paths import local_path, output_file
from experiments.terminal import tolerant_output
from sparseopt_jax.models import export as formats

_COMPACT = ("", ".compact", ".safetensors")


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


def _npz(model: Any, variables: Any, shape: Sequence[int]) -> bytes:
    content = io.BytesIO()
    state: dict[str, Any] = dict(formats.to_pytorch(model, variables))
    np.savez_compressed(content, **state)
    return content.getvalue()


def _pt(model: Any, variables: Any, shape: Sequence[int]) -> bytes:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--to=FILE.pt needs PyTorch, which is not installed; FILE.npz has the same arrays"
            " without it: {name: torch.from_numpy(array) for name, array in np.load(FILE).items()}"
        ) from error
    state, content = formats.to_pytorch(model, variables), io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, content)
    return content.getvalue()


_FORMATS: Mapping[str, tuple[str, Callable[[Any, Any, Sequence[int]], bytes]]] = {
    ".stablehlo": ("StableHLO", formats.to_stablehlo),
    ".onnx": ("ONNX", formats.to_onnx),
    ".tflite": ("LiteRT", formats.to_tflite),
    ".pt": ("PyTorch's state dict", _pt),
    ".npz": ("PyTorch's state dict", _npz),
}


def export(folder: pathlib.Path, file: pathlib.Path, values: str = "exact") -> str:
    """Writes a file of the format that its ending names; returns lines that say what it has.

    Args:
      folder: as `find_run` takes it.
      file: to write.
      values: as for `sx.save_compact`.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
      ConfigError: there is no such run or format, or what the format needs is not there.
      OSError: the file cannot be written.
    """
    if file.suffix not in (*_COMPACT, *_FORMATS):
        raise ConfigError(
            f"--to={file} must end in .compact or {', '.join(_FORMATS)}, or in nothing for a"
            f" compact file; got {file.suffix!r}"
        )
    if file.suffix in _FORMATS and values != "exact":
        raise ConfigError(f"--values={values} is for compact files; --to={file} is none")
    run = find_run(folder)
    variables, masks = final_variables(run)
    if file.suffix in _FORMATS:
        what, more = _write_model(run, variables, file)
    else:
        both = None if masks is None else {"params": masks, "batch_stats": None}
        sx.save_compact(file, variables, both, values=values)
        what, more = "compact file", ""
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    kept = weights if masks is None else sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    return (
        f"{file}: {what}, {file.stat().st_size:,} bytes, dense {dense:,}; {run.name}, {kept:,} of"
        f" {weights:,} parameters{more}"
    )


def _write_model(run: pathlib.Path, variables: Any, file: pathlib.Path) -> tuple[str, str]:
    """Writes a format that is no compact file; its name, and a line on what the model takes."""
    origin = metrics.read_json(run / "run.json")
    if "images" not in origin:
        raise ConfigError(
            f"RUN={run} does not say what images it takes: it is of an older version, of which"
            " only compact files can be written"
        )
    name, write = _FORMATS[file.suffix]
    images = origin["images"]
    num_classes = len(variables["params"]["head"]["bias"])
    model = build.make_model(Config.from_json(origin["config"]), num_classes)
    try:
        metrics.write_atomically(file, write(model, variables, images["shape"]))
    except ModuleNotFoundError as error:
        raise ConfigError(f"--to={file}: {error}") from error
    return name, (
        f"\nIt takes (image - mean) / std, with images {images['shape']} of values from 0 to 255,"
        f" mean {images['mean']}, std {images['std']}"
    )


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m experiments.export",
        description="Writes the model that a run has trained to a compact file, or to"
        " .stablehlo, .onnx, .tflite, .pt or .npz (PyTorch's state dict), by the ending of FILE.",
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
