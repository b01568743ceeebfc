"""Scaling on paper: what ResNet-50's training sends over the links of a TPU slice, and its share.

    python -m experiments.benchmarks.scaling [--topologies=v5e:1x1,v5e:2x4,v5e:8x8]
        [--batch_per_chip=128] [--image_size=64] [--json=FILE]

Compiles, ahead of time and with the shardings of `experiments.train`, the training step between two
topology updates (bfloat16, ERK 0.9, SparseOpt) and RigL's topology update, on a mesh of all chips
along data and on one along fsdp; runs nothing. The bytes on the wire of a chip are those of ring
algorithms on n chips: 2 (n - 1) / n of an all-reduce's result, (n - 1) / n of an all-gather's or an
all-to-all's, n - 1 times a reduce-scatter's, all of a permutation's.

The share is communication / (communication + computation): nothing overlaps, the step's FLOPs at
224x224 pixels (three forward passes, by `sparseopt_jax.flops`) run at the chip's peak, and the
links at their published speed. Real computation is slower, so the share is at most that. Programs
are compiled for small images by default, which takes minutes; the bytes of gradients, weights and
statistics do not depend on the images' size, those of activations that fsdp may move do. Of the
topology update one pass of each search counts; there are at most 64.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import build, compile_check, flops, hlo, programs
from experiments import mesh as meshes
from experiments.benchmarks import measuring
from experiments.config import Config, ConfigError
from experiments.configs import imagenet_resnet50
from experiments.functions import method_functions, model_functions


class Published(NamedTuple):
    """Of one chip, as published.

    Attributes:
      flops: a second, bfloat16.
      links: bytes a second that it sends over all of its links together.
      ports: how many links it has.
    """

    flops: float
    links: float
    ports: int


PUBLISHED: Mapping[str, Published] = {
    "v5e": Published(197e12, 200e9, 4),
    "v5p": Published(459e12, 600e9, 6),
}
"""From Google Cloud's pages on TPU v5e and v5p, which give both directions: 400 and 1200 GB/s."""


def wire_bytes(collectives: Mapping[str, hlo.Collective], devices: int) -> float:
    """Bytes that a chip sends for collectives over `devices` chips, by ring algorithms.

    Args:
      collectives: by kind, with the size of their results on one chip.
      devices: how many chips take part in each.

    Raises:
      ValueError: of a kind that is not known.
    """
    others = devices - 1
    factors = {
        "all-reduce": 2 * others / devices,
        "all-gather": others / devices,
        "all-to-all": others / devices,
        "reduce-scatter": float(others),
        "collective-permute": 1.0,
    }
    total = 0.0
    for kind, collective in collectives.items():
        if kind not in factors:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(factors)}")
        total += factors[kind] * collective.bytes
    return total


def share(seconds: float, computation: float) -> float:
    """Communication's part of a step in which nothing overlaps."""
    return seconds / (seconds + computation)


def compiled_text(config: Config, program: str, devices: Sequence[jax.Device]) -> str:
    """The text of the training step, or of the topology update, for these chips."""
    mesh = meshes.make_mesh(config, devices)
    dataset = compile_check.ImageNetShapes(mesh, config.image_size)
    build.check(config, dataset.train_examples // config.batch_size)
    model = model_functions(config, dataset)
    method = method_functions(config, dataset, model)
    if program == "step":
        lowered = programs.lower_step(model, method, mesh)
    else:
        lowered = programs.lower_topology_update(method)
    return str(lowered.compile().as_text())


def measure(
    config: Config, topologies: Mapping[str, Sequence[jax.Device]], batch_per_chip: int
) -> Iterator[dict[str, Any]]:
    """A record for each topology and mesh, as each is done.

    Args:
      config: of RigL; its batch size and mesh are replaced.
      topologies: the chips by name, e.g. of "v5e:2x4".
      batch_per_chip: images.
    """
    image = 3 * flops.count(None).dense
    for name, devices in topologies.items():
        chip, count = PUBLISHED[name.partition(":")[0]], len(devices)
        computation = image * batch_per_chip / chip.flops
        for axis in ("data", "fsdp")[: min(count, 2)]:
            sized = dataclasses.replace(
                config,
                batch_size=batch_per_chip * count,
                mesh_fsdp=count if axis == "fsdp" else 1,
                mesh_data=1 if axis == "fsdp" else count,
            )
            record: dict[str, Any] = {"topology": name, "chips": count, "mesh": axis}
            static = dataclasses.replace(sized, topology="static")
            for program, one in (("step", static), ("update", sized)):
                text = compiled_text(one, program, devices)
                collectives = hlo.collectives(text)
                wire = wire_bytes(collectives, count)
                record[program] = {
                    "collectives": {kind: dataclasses.asdict(c) for kind, c in collectives.items()},
                    "wire_bytes": wire,
                    "share_all_links": share(wire / chip.links, computation),
                    "share_one_link": share(wire * chip.ports / chip.links, computation),
                }
            yield record


def _topologies(made: argparse.ArgumentParser, names: str) -> dict[str, Sequence[jax.Device]]:
    topologies = {}
    for name in names.split(","):
        if name.partition(":")[0] not in PUBLISHED:
            made.error(f"--topologies={name} must be of {' or '.join(PUBLISHED)}, e.g. v5e:2x4")
        try:
            topologies[name] = compile_check.topology_devices(name)
        except ConfigError as error:
            made.error(str(error))
    return topologies


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("scaling", "What training sends over a TPU slice, and its share.")
    parser.add_argument("--topologies", default="v5e:1x1,v5e:2x4,v5e:8x8", metavar="NAME,...")
    parser.add_argument("--batch_per_chip", type=int, default=128, help="images, at least 1 (128)")
    parser.add_argument("--image_size", type=int, default=64, help="pixels, at least 32 (64)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.batch_per_chip < 1 or asked.image_size < 32:
        parser.error("--batch_per_chip must be at least 1 and --image_size at least 32")
    topologies = _topologies(parser, asked.topologies)
    config = dataclasses.replace(
        imagenet_resnet50.get_config(),
        compare=(), optimizer="sparseopt", sparsity=0.9, image_size=asked.image_size,
    )  # fmt: skip
    rows = []
    print(f"{'topology':>9} {'mesh':>5}  program  MB on the wire of a chip, share of a step")
    for row in measure(config, topologies, asked.batch_per_chip):
        rows.append(row)
        for program in ("step", "update"):
            of = row[program]
            kinds = ", ".join(f"{c['count']} {kind}" for kind, c in of["collectives"].items())
            print(
                f"{row['topology']:>9} {row['mesh']:>5}  {program:7}"
                f" {of['wire_bytes'] / 1e6:8.3f} MB, at most {of['share_all_links']:.2%}"
                f" (one link: {of['share_one_link']:.2%}); {kinds or 'nothing'}",
                flush=True,
            )
    measuring.append(asked, parser, argv, {"programs": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
