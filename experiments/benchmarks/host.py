"""What the host does: dispatch of a step, import, and compilation, sparse against dense.

    python -m experiments.benchmarks.host [--repeats=N] [--image_size=224] [--json=FILE]

Dispatch: one call of a compiled function that takes and returns the state of ResNet-50's training,
every array of it reduced to a scalar, so that nothing but the host's part is timed. Import: of
sparseopt_jax in a new process in which jax and optax are imported already. Compilation: ResNet-50's
train step as training compiles it, traced and compiled once.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import compile_check, programs
from experiments import mesh as meshes
from experiments.benchmarks import measuring
from experiments.benchmarks.memory import configs
from experiments.config import Config
from experiments.functions import MethodFunctions, ModelFunctions, method_functions, model_functions

_IMPORT = (
    "import time, jax, optax; begin = time.perf_counter(); import sparseopt_jax;"
    " print(time.perf_counter() - begin)"
)


def functions(config: Config, image_size: int) -> tuple[ModelFunctions, MethodFunctions, Any]:
    """What training compiles, for images of `image_size`, and the mesh of one device."""
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    shapes = compile_check.ImageNetShapes(mesh, image_size)
    model = model_functions(config, shapes)
    return model, method_functions(config, shapes, model), mesh


class Dispatcher:
    """Calls a compiled function of a state of which every array is a scalar.

    Attributes:
      state: what the last call returned.
    """

    def __init__(self, state: Any) -> None:
        """Compiles the function; `state` has the structure and the dtypes."""
        self.state = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), state)
        jitted = jax.jit(functools.partial(jax.tree.map, _changed), donate_argnums=0)
        self._compiled = jitted.lower(self.state).compile()

    def __call__(self) -> None:
        """One call, as a training step is called; it is not waited for."""
        self.state = self._compiled(self.state)


def _changed(leaf: jax.Array) -> jax.Array:
    return ~leaf if leaf.dtype == jnp.bool_ else leaf + jnp.ones((), leaf.dtype)


def import_seconds() -> float:
    """Seconds that `import sparseopt_jax` adds to jax and optax, in a new process."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


def compile_seconds(model: ModelFunctions, method: MethodFunctions, mesh: Any) -> float:
    """Seconds to trace and compile a train step."""
    begin = time.perf_counter()
    programs.lower_step(model, method, mesh).compile()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("host", "Dispatch, import and compilation, sparse against dense.")
    parser.add_argument("--repeats", type=int, default=200, help="calls of each, at least 1 (200)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels, at least 32 (224)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.repeats < 1 or asked.image_size < 32:
        parser.error("--repeats must be at least 1 and --image_size at least 32")
    methods = {
        name: functions(config, asked.image_size) for name, config in configs(batch_size=64).items()
    }
    result: dict[str, Any] = {"arrays": {}, "dispatch_ms": {}}
    calls = {name: Dispatcher(method.state) for name, (_, method, _) in methods.items()}
    for name, seconds in measuring.alternating(calls, asked.repeats).items():
        result["arrays"][name] = len(jax.tree.leaves(methods[name][1].state))
        result["dispatch_ms"][name] = 1e3 * statistics.median(seconds)
        print(
            f"{name:>6}: dispatch {result['dispatch_ms'][name]:.2f} ms,"
            f" {result['arrays'][name]} arrays",
            flush=True,
        )
    result["import_seconds"] = statistics.median(import_seconds() for _ in range(5))
    print(f"import sparseopt_jax: {result['import_seconds']:.3f} s on top of jax and optax")
    result["compile_seconds"] = {}
    for name, method in methods.items():
        result["compile_seconds"][name] = compile_seconds(*method)
        print(f"{name:>6}: step compiled in {result['compile_seconds'][name]:.1f} s", flush=True)
    compiled = result["compile_seconds"]
    result["ratios"] = {"compile_seconds": compiled["sparse"] / compiled["dense"]}
    print(f"compilation, sparse over dense: {result['ratios']['compile_seconds']:.2f}")
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
