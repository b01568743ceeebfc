"""Compiles training for TPUs that are not there: memory, FLOPs and communication of each chip.

    python -m experiments.compile_check --topology=v5e:4x4 [--batch_size=1024,4096] [--json=FILE]
        [--config=FILE] [--config.FIELD=VALUE ...]

Three programs are compiled ahead of time, with the mesh and the shardings of `experiments.train`:
the topology update by itself, and, for each batch size, the evaluation and the training step as
`train` compiles them; the step holds the topology update too. It needs the TPU's compiler (libtpu):
no TPU, no data set (ImageNet's shapes are built in), no network. The step is that of the config's
`optimizer`; `compare` is left out.

Memory is the compiler's own account of one chip (`memory_analysis`); a program that does not fit is
answered with its reason, and exit code 1. Batches that are on their way to the chips need memory
besides. FLOPs are its count for one chip (`cost_analysis`): element by element operations are among
them, and every step counts as one that updates the topology. Collectives are counted by kind, with
the size of their results on one chip; see `experiments.hlo` for loops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments import build, command_line, data, hlo, metrics, programs
from experiments import mesh as meshes
from experiments.config import SPECS, Config, ConfigError
from experiments.functions import (
    MethodFunctions,
    ModelFunctions,
    method_functions,
    model_functions,
)
from experiments.paths import local_path, output_file
from experiments.terminal import tolerant_output

_PROGRAM = "python -m experiments.compile_check"
_CONFIG = pathlib.Path(__file__).parent / "configs" / "imagenet_resnet50.py"
_ARGUMENTS = ("--topology", "--batch_size", "--json", "--config")
_MIB = 2**20

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; libtpu warns where it finds none
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for chips, and none is used
}
"""Environment variables with which libtpu compiles on a machine without a TPU."""


class Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
      memory: of a chip, in GiB.
      layouts: of chips; those that there are, or the usual ones.
      more: what other layouts look like.
      options: what else libtpu has to know.
    """

    memory: int
    layouts: tuple[str, ...]
    more: re.Pattern[str] | None = None
    options: Mapping[str, Any] = types.MappingProxyType({})


_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_CUBE = re.compile(r"[1-9]\d*x[1-9]\d*x[1-9]\d*")

GENERATIONS = {
    # Both cores of a chip as one device, as jax has them on a real one.
    "v4": Generation(32, _CUBES, _CUBE, {"chip_config_name": "megacore"}),
    "v5e": Generation(16, _PLANES),
    "v5p": Generation(95, _CUBES, _CUBE),
    "v6e": Generation(32, _PLANES),
}
"""By the name that a topology starts with."""


class ImageNetShapes:
    """What compilation needs of ImageNet; see `data.Shapes`."""

    num_classes = 1000
    train_examples = 1_281_167
    # Of no consequence for what is compiled.
    mean, std = np.full(3, 127.5, np.float32), np.full(3, 60.0, np.float32)

    def __init__(self, mesh: Mesh, image_size: int) -> None:
        """For images of `image_size` pixels in height and in width."""
        self.mesh = mesh
        self.image_shape = (image_size, image_size, 3)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program; bytes and FLOPs are those of one chip.

    Attributes:
      program: its name.
      batch_size: images of all chips together; None where it has no batch.
      seconds: how long it took to trace and to compile.
      error: why it could not be compiled, e.g. for want of memory; the rest is None then.
      arguments: bytes of what it is given.
      outputs: bytes of what it returns.
      reused: bytes of outputs that lie where arguments lay.
      temporaries: bytes that it needs meanwhile.
      code: bytes of the program.
      peak: most bytes of all these but the code at one time.
      flops: how many it takes.
      collectives: by kind.
    """

    program: str
    batch_size: int | None
    seconds: float
    error: str | None = None
    arguments: int | None = None
    outputs: int | None = None
    reused: int | None = None
    temporaries: int | None = None
    code: int | None = None
    peak: int | None = None
    flops: float | None = None
    collectives: dict[str, hlo.Collective] | None = None


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The chips of a topology, for which programs can be compiled but not run.

    Args:
      name: a generation and a layout, e.g. "v5e:4x4".

    Raises:
      ConfigError: libtpu is not installed, or the topology is unknown.
    """
    generation, _, layout = name.partition(":")
    known = GENERATIONS.get(generation)
    right = known and (layout in known.layouts or (known.more and known.more.fullmatch(layout)))
    if not known or not right:
        raise ConfigError(_unknown_topology(name))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError(
            "the compiler for TPUs is missing: no module named libtpu; install it (on Linux) with"
            " pip install '.[tpu]'"
        )
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if set(layout) != {"1", "x"}:
        # The library takes what it traces for unsharded where there is one device alone.
        with contextlib.suppress(RuntimeError):  # The host's devices are there already.
            jax.config.update("jax_num_cpu_devices", 2)  # type: ignore[no-untyped-call]
    options = dict(known.options)
    if set(layout) == {"1", "x"}:  # a machine with less than the usual four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"{_unknown_topology(name)}\nlibtpu: {_first_line(error)}") from error


def _unknown_topology(name: str) -> str:
    lines = [f"--topology={name} must be a TPU generation and its layout of chips, such as one of"]
    for generation, known in GENERATIONS.items():
        names = [f"{generation}:{layout}" for layout in known.layouts]
        lines.append(", ".join(names + ["..."] * (known.more is not None)))
    return "\n".join(lines)


def lowerings(
    config: Config, batch_sizes: Sequence[int], devices: Sequence[jax.Device]
) -> tuple[Mesh, list[tuple[str, int | None, Callable[[], Any]]]]:
    """What there is to compile.

    Args:
      config: of one method; `compare` is empty.
      batch_sizes: images of all chips together.
      devices: the chips.

    Returns:
      The mesh; and for each program its name, its batch size (None where it has none), and what
      gives `jax.jit(...).lower(...)`. Nothing is traced yet.

    Raises:
      ConfigError: the config does not fit the chips or a batch size, or is not for ImageNet.
    """
    if config.dataset.split(":")[0] != "imagenet2012":
        raise ConfigError(
            f"dataset={config.dataset!r} must be 'imagenet2012', whose shapes are built in"
        )
    configs = [dataclasses.replace(config, batch_size=size) for size in batch_sizes]
    datasets = [ImageNetShapes(meshes.make_mesh(c, devices), c.image_size) for c in configs]
    if config.num_classes not in (0, datasets[0].num_classes):
        raise ConfigError(
            f"num_classes={config.num_classes} must be {datasets[0].num_classes}, or 0"
        )
    for one, dataset in zip(configs, datasets, strict=True):
        build.check(one, data.steps_per_epoch(one, dataset))

    mesh = datasets[0].mesh

    @functools.cache
    def of(index: int) -> tuple[ModelFunctions, MethodFunctions]:
        model = model_functions(configs[index], datasets[index])
        return model, method_functions(configs[index], datasets[index], model)

    def evaluation(index: int) -> Any:
        return programs.lower_evaluate(of(index)[0], mesh)

    def training_step(index: int) -> Any:
        return programs.lower_step(*of(index), mesh)

    entries: list[tuple[str, int | None, Callable[[], Any]]] = []
    if config.topology in ("set", "rigl"):
        entries.append(("topology update", None, lambda: programs.lower_topology_update(of(0)[1])))
    for index, size in enumerate(batch_sizes):
        entries.append(("evaluation", size, functools.partial(evaluation, index)))
        entries.append(("training step", size, functools.partial(training_step, index)))
    return mesh, entries


def compile_program(program: str, batch_size: int | None, lower: Callable[[], Any]) -> Compiled:
    """Compiles one program, and asks the compiler about it."""
    begin = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(program, batch_size, time.monotonic() - begin, error=_first_line(error))
    seconds = time.monotonic() - begin
    memory = compiled.memory_analysis()
    return Compiled(
        program=program,
        batch_size=batch_size,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=compiled.cost_analysis().get("flops"),
        collectives=hlo.collectives(compiled.as_text()),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


_COLUMNS = ("compile", "arguments", "temporaries", "outputs", "peak", "GFLOP", "collectives")
_UNITS = ("s", *("MiB/chip",) * 4, "per chip", "results on one chip")


def _row(*cells: str) -> str:
    *numbers, last = cells
    widths = (9, 12, 13, 10, 10, 10)
    return "".join(map(str.rjust, numbers, widths)) + f"  {last}"


def as_row(compiled: Compiled) -> str:
    """What the table says of a program, behind its name."""
    seconds = f"{compiled.seconds:.0f}"
    if compiled.error is not None:
        return f"{seconds:>9}  {compiled.error}"
    sizes = (compiled.arguments, compiled.temporaries, compiled.outputs, compiled.peak)
    collectives = (compiled.collectives or {}).items()
    return _row(
        seconds,
        *(f"{size / _MIB:.1f}" for size in sizes if size is not None),
        "?" if compiled.flops is None else f"{compiled.flops / 1e9:.1f}",
        ", ".join(f"{c.count} {kind} ({_size(c.bytes)})" for kind, c in collectives) or "none",
    )


def _size(count: int) -> str:
    return f"{count / _MIB:.1f} MiB" if count >= _MIB else f"{count} B"


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the command line asks for."""

    topology: str
    config: Config
    batch_sizes: tuple[int, ...]
    json: pathlib.Path | None
    command: str


def _parse(argv: Sequence[str]) -> _Asked:
    parser = command_line.Parser(
        prog=_PROGRAM,
        description="Compiles training for TPUs that are not there.",
        allow_abbrev=False,
    )
    parser.add_argument("--topology", metavar="NAME", help="the chips, e.g. v5e:4x4")
    parser.add_argument(
        "--batch_size", metavar="N,...", default="1024,4096", help="batch sizes (1024,4096)"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the result as JSON")
    parser.add_argument(
        "--config", metavar="FILE", default=str(_CONFIG), help="by default imagenet_resnet50.py"
    )
    shown = command_line.config_for_help([f"--config={_CONFIG}", *argv])
    command_line.add_overrides(parser, *(shown or (Config(), "Config")))
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(command_line.unknown_argument(unknown[0], _ARGUMENTS))
    if given.topology is None:
        raise ConfigError("--topology is missing, e.g. --topology=v5e:4x4")
    overrides = command_line.overrides(given)
    if "batch_size" in overrides:
        raise ConfigError(f"--config.batch_size: give --batch_size={overrides['batch_size']}")
    sizes = _batch_sizes(given.batch_size)
    # At once, since the config's own batch size need not fit the other overrides.
    overrides |= {"compare": (), "batch_size": sizes[0]}
    config = command_line.load_config(local_path("--config", given.config))
    config = dataclasses.replace(config, **overrides)
    path = None if given.json is None else output_file("--json", given.json)
    return _Asked(given.topology, config, sizes, path, f"{_PROGRAM} {shlex.join(argv)}")


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(SPECS["batch_size"].parse(item) for item in text.split(","))
    except ConfigError as error:
        raise ConfigError(f"--{error}, or several with commas between them") from None
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"--batch_size={text} names one of them twice")
    return sizes


def check(asked: _Asked) -> int:
    """Compiles everything, and prints a line for each program; returns the exit code."""
    devices = topology_devices(asked.topology)
    mesh, todo = lowerings(asked.config, asked.batch_sizes, devices)
    memory = GENERATIONS[asked.topology.partition(":")[0]].memory
    config, chips = asked.config, dict(mesh.shape)
    print(
        f"{config.model}, {config.dtype}, images of {config.image_size}x{config.image_size} pixels;"
        f" topology={config.topology} distribution={config.distribution}"
        f" sparsity={config.sparsity:g} optimizer={config.optimizer}\n"
        f"{asked.topology}: {len(devices)} chips ({devices[0].device_kind}) of {memory} GiB;"
        f" data={chips['data']} fsdp={chips['fsdp']} bn_groups={config.bn_groups}\n"
    )
    print(f"{'batch':<7}{'program':<15}{_row(*_COLUMNS)}\n{'':22}{_row(*_UNITS)}")
    compiled_programs = []
    for program, batch_size, lower in todo:
        # The name at once: it takes minutes, and the compiler may end the process.
        name = f"{'any' if batch_size is None else batch_size:<7}{program:<15}"
        print(name, end="", flush=True)
        compiled_programs.append(compile_program(program, batch_size, lower))
        print(as_row(compiled_programs[-1]), flush=True)
    if asked.json is not None:
        environment = metrics.environment()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            environment["versions"]["libtpu"] = importlib.metadata.version("libtpu")
        record = {
            "command": asked.command,
            "topology": asked.topology,
            "chips": len(devices),
            "device_kind": devices[0].device_kind,
            "memory_gib_per_chip": memory,
            "mesh": chips,
            "config": dataclasses.asdict(config),
            "programs": [dataclasses.asdict(compiled) for compiled in compiled_programs],
            "environment": environment,
        }
        metrics.write_json(asked.json, record)
    return 1 if any(compiled.error for compiled in compiled_programs) else 0


@tolerant_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for, in this process; returns the exit code.

    That is 0, 1 (a program cannot be compiled, e.g. for want of memory; a full disk), or 2 (wrong
    setting).
    """
    # The host computes nothing but shapes; a TPU or GPU that it has is left to others.
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
    try:
        return check(_parse(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


_CHILD = "import sys; from experiments import compile_check; sys.exit(compile_check.main())"


def command(argv: Sequence[str]) -> int:
    """Runs `main` in a process of its own, since the compiler may abort; returns the exit code.

    Where that happens it is 1, what was printed until then stands, and the compiler's own words are
    kept in a file.
    """
    handle, path = tempfile.mkstemp(prefix="compile_check-", suffix=".log")
    log = pathlib.Path(path)
    with open(handle, "w") as file:
        try:
            code = subprocess.run([sys.executable, "-c", _CHILD, *argv], stderr=file).returncode
        except KeyboardInterrupt:
            log.unlink()
            return 130
    text = log.read_text(errors="replace")
    if code >= 0:
        sys.stderr.write(text)
        log.unlink()
        return code
    reason = re.search(r"Check failed: .{1,200}|SIG[A-Z]+( [A-Z]+)+", text)
    print(
        f"\nerror: the compiler's process ended with {signal.Signals(-code).name} on this program:"
        f" {reason[0] if reason else 'it gave no reason'}\nits log: {log}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
