"""Bytes that the sparse update moves over those of the dense one, from the compiled programs.

    python -m experiments.benchmarks.update_bytes [--topology=v5e:1x1] [--json=FILE]

SGD with momentum and weight decay on ResNet-50's parameters, with donated buffers: dense; SparseOpt
with static masks; SparseOpt with RigL, on a step that does not update the topology. Nothing is run,
so it works for TPUs that are not there as well. Two accounts of the same: the compiler's
(`cost_analysis`), which counts RigL's topology update as if it came on every step, and ours from
the program's text (`experiments.hlo.bytes_moved`), which leaves loops out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import sparseopt_jax as sx
from experiments import hlo
from experiments.benchmarks import measuring

PROGRAMS: Mapping[str, Any] = {
    "dense": None,
    "static": sx.Static(),
    "rigl": sx.RigL(interval=100, drop_fraction=0.3, end_step=25_000),
}
"""The topology of each program."""


def compile_update(topology: Any, params: Any, device: Any = None) -> Any:
    """One update, compiled; see `measuring.optimizer`.

    Args:
      topology: None for the dense one.
      params: shapes.
      device: what to compile for; None: the one at hand.
    """
    tx = measuring.optimizer(topology)
    shapes = params, jax.eval_shape(tx.init, params), params
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(measuring.update(tx), donate_argnums=(0, 1))
    return jitted.lower(*measuring.placed(shapes, sharding)).compile()


def measure(params: Any, device: Any = None) -> dict[str, dict[str, Any]]:
    """Bytes of each program, by both accounts, and over those of the dense one."""
    measured: dict[str, dict[str, Any]] = {}
    for name, topology in PROGRAMS.items():
        compiled = compile_update(topology, params, device)
        moved = hlo.bytes_moved(compiled.as_text())
        measured[name] = {
            "cost_analysis": compiled.cost_analysis()["bytes accessed"],
            "moved": sum(moved.values()),
            "copied": moved.get("copy", 0),
        }
        for account in ("cost_analysis", "moved"):
            measured[name][f"{account}_over_dense"] = (
                measured[name][account] / measured["dense"][account]
            )
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("update_bytes", "Bytes of the sparse update over the dense one's.")
    measuring.add_topology(parser)
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    device = measuring.tpu(parser, asked.topology)
    params = measuring.resnet50_params()
    measured = measure(params, device)
    print(f"ResNet-50's parameters: {measuring.size(params) / 1e6:.1f} MB; MB that an update moves")
    print(
        f"{'':8}{'cost_analysis':>14}{'over dense':>12}{'text':>10}{'copies':>8}{'over dense':>12}"
    )
    for name, row in measured.items():
        print(
            f"{name:8}{row['cost_analysis'] / 1e6:14.1f}{row['cost_analysis_over_dense']:12.3f}"
            f"{row['moved'] / 1e6:10.1f}{row['copied'] / 1e6:8.1f}{row['moved_over_dense']:12.3f}"
        )
    print("rigl: cost_analysis counts a topology update on every step, the text none")
    result = {"device": asked.topology or jax.devices()[0].device_kind, "programs": measured}
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
