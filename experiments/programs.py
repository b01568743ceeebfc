"""The compiled functions of a grid: those of the model, and those of each method.

Weights and evaluation are the same for every method, and the seed is data, so nothing is compiled
twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

import sparseopt_jax as sx
from experiments import data
from experiments import mesh as meshes
from experiments.config import Config
from experiments.functions import (
    SEED,
    MethodFunctions,
    ModelFunctions,
    State,
    method_functions,
    model_functions,
)


@contextlib.contextmanager
def kept_in(folder: pathlib.Path) -> Iterator[None]:
    """Keeps what is compiled in the body in a `compilation_cache`, for the next start.

    Folders in `runs`, where they are by default, share `runs/compilation_cache`, so that the same
    config compiles nothing in a new folder either. Any other folder has a cache of its own.

    JAX's persistent compilation cache holds all of it, also what compiles quickly: a run that goes
    on compiles nothing, and runs the very programs that it ran before. Where the user has a cache
    already (JAX_COMPILATION_CACHE_DIR), that one is used, as it is set up.

    Args:
      folder: a work folder, or that of a sweep. The cache may be deleted at any time.
    """
    place = "jax_compilation_cache_dir"
    if getattr(jax.config, place) is not None:
        yield
        return
    folder, shared = folder.absolute(), pathlib.Path("runs").absolute()
    settings = {
        place: str((shared if folder.parent == shared else folder) / "compilation_cache"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    # Or it would stay where it was when the first program was compiled, if anywhere.
    compilation_cache.reset_cache()


@dataclasses.dataclass(frozen=True)
class ModelPrograms:
    """What all methods share.

    Attributes:
      functions: what was compiled, with its shapes.
      init: seed (int32 scalar) -> params, batch_stats; all weights, as a dense model has them.
      evaluate: (params, batch_stats, EvalBatch) -> number of examples, number correct, sum of
        losses.
      layers: sizes of the layers that can have masks, by path, in the model's order.
    """

    functions: ModelFunctions
    init: Callable[..., Any]
    evaluate: Callable[..., Any]
    layers: dict[str, int]


@dataclasses.dataclass(frozen=True)
class MethodPrograms:
    """What one method adds; all its runs share it.

    Attributes:
      functions: what was compiled, with its shapes.
      start: (params, batch_stats, seed) -> State, with masks and masked weights where sparse.
      step: (State, images, labels) -> State, metrics; the given state's memory is used again.
      steps: (State, training Split, order, seed, epoch, index) -> State, metrics of
        `steps_per_call` steps, from the epoch's batch number `index` on; the same as that many
        calls of `step`, in one compiled loop. None where `steps_per_call` is 1.
      steps_per_call: steps of a call of `steps`.
      measure: (optimizer state, earlier masks) -> active weights, mask churn, ITOP rate, and a copy
        of the masks that outlives the next step; only for sparse methods.
      diagnose: (State, images, labels) -> gradient norm and, for sparse methods, per layer the
        gradient's skew and the fan-in; compiled on the first call.
      sharpness: (State, images, labels) -> the Hessian's top eigenvalue on these images and how far
        it may be off; compiled on the first call.
      learning_rate: the schedule, step -> rate.
      seconds: how long the compilation took.
    """

    functions: MethodFunctions
    start: Callable[..., Any]
    step: Callable[..., Any]
    steps: Callable[..., Any] | None
    steps_per_call: int
    measure: Callable[..., Any]
    diagnose: Callable[..., Any]
    sharpness: Callable[..., Any]
    learning_rate: optax.Schedule
    seconds: float


def compile_model(config: Config, dataset: data.Data) -> ModelPrograms:
    """Compiles initial weights and evaluation, on a CPU beside what is done next.

    Args:
      config: names the model and the batch size.
      dataset: gives mesh, shapes, number of classes, mean and standard deviation.

    Returns:
      The compiled programs.
    """
    functions, mesh = model_functions(config, dataset), dataset.mesh
    pool = ThreadPoolExecutor(1)
    init = pool.submit(compile_init, functions, mesh)
    evaluate = pool.submit(lambda: lower_evaluate(functions, mesh).compile())
    pool.shutdown(wait=not on_cpu(mesh))  # other compilers try programs out on a device
    return ModelPrograms(
        functions=functions,
        init=lambda *arguments: init.result()(*arguments),
        evaluate=lambda *arguments: evaluate.result()(*arguments),
        layers=functions.layers,
    )


def compile_init(functions: ModelFunctions, mesh: Mesh) -> Callable[..., Any]:
    """A seed's initial weights, compiled."""
    return compile_fast(mesh, functions.init, SEED, out_shardings=shardings(functions.weights))


def compile_start(model: ModelFunctions, method: MethodFunctions, mesh: Mesh) -> Callable[..., Any]:
    """A run's first state from its initial weights, compiled."""
    out = shardings(method.state)
    return compile_fast(mesh, method.start, *model.weights, SEED, out_shardings=out)


def lower_evaluate(functions: ModelFunctions, mesh: Mesh) -> Any:
    """The evaluation of one batch, ready to be compiled."""
    images, labels = functions.batch
    weights = meshes.struct(labels.shape, jnp.float32, meshes.batch_sharding(mesh))
    jitted = jax.jit(functions.evaluate, out_shardings=meshes.replicated(mesh))
    return jitted.lower(*functions.weights, data.EvalBatch(images, labels, weights))


def lower_step(model: ModelFunctions, method: MethodFunctions, mesh: Mesh) -> Any:
    """One training step, which uses the memory of its state again, ready to be compiled."""
    out = shardings(method.state), meshes.replicated(mesh)
    jitted = jax.jit(method.step, donate_argnums=0, out_shardings=out)
    return jitted.lower(method.state, *model.batch)


def lower_topology_update(method: MethodFunctions) -> Any:
    """One topology update given a gradient, ready to be compiled; it uses its memory again."""

    def update(opt_state: Any, params: Any, gradient: Any) -> tuple[Any, Any]:
        return sx.update_topology(method.tx, opt_state, params, gradient)

    params, _, opt_state = method.state
    out = shardings(params), shardings(opt_state)
    jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=out)
    return jitted.lower(opt_state, params, params)


def compile_method(config: Config, dataset: data.Data, model: ModelPrograms) -> MethodPrograms:
    """Compiles the training step of one method.

    Args:
      config: the config of that method alone (`Config.for_method`).
      dataset: gives mesh, shapes, number of classes, mean and standard deviation.
      model: what `compile_model` returned for the same config.

    Returns:
      The compiled programs.
    """
    begin = time.monotonic()
    mesh = dataset.mesh
    functions = method_functions(config, dataset, model.functions)
    state, replicated = functions.state, meshes.replicated(mesh)
    measure = functions.measure
    if config.topology != "dense":
        masks = sx.get_masks(state.opt_state)
        out = replicated, replicated, replicated, shardings(masks)
        measure = compile_fast(mesh, measure, state.opt_state, masks, out_shardings=out)
    steps_per_call = choose_steps_per_call(config, dataset)
    return MethodPrograms(
        functions=functions,
        start=compile_start(model.functions, functions, mesh),
        step=lower_step(model.functions, functions, mesh).compile(),
        steps=_compile_steps(dataset, functions, steps_per_call) if steps_per_call > 1 else None,
        steps_per_call=steps_per_call,
        measure=measure,
        diagnose=on_first_call(mesh, functions.diagnose),
        sharpness=jax.jit(functions.sharpness, out_shardings=replicated),
        learning_rate=functions.learning_rate,
        seconds=time.monotonic() - begin,
    )


def _compile_steps(dataset: data.Data, functions: MethodFunctions, steps_per_call: int) -> Any:
    """A loop of steps over batches that it takes itself."""
    assert isinstance(dataset, data.DeviceData)

    def steps(
        state: State,
        split: data.Split,
        order: jax.Array,
        seed: jax.Array,
        epoch: jax.Array,
        index: jax.Array,
    ) -> tuple[State, dict[str, jax.Array]]:
        def body(state: State, i: jax.Array) -> tuple[State, dict[str, jax.Array]]:
            batch = dataset.take_batch(split, order, seed, epoch, i)
            batch = constrain(batch, shared_out)
            return functions.step(state, *batch)

        return jax.lax.scan(body, state, index + jnp.arange(steps_per_call))

    constrain: Any = jax.lax.with_sharding_constraint
    replicated, shared_out = meshes.replicated(dataset.mesh), meshes.batch_sharding(dataset.mesh)
    split = meshes.abstract(dataset.train, replicated)
    order = meshes.struct(split.labels.shape, jnp.int32, replicated)
    out = shardings(functions.state), replicated
    jitted = jax.jit(steps, donate_argnums=0, out_shardings=out)
    return jitted.lower(functions.state, split, order, SEED, SEED, SEED).compile()


def choose_steps_per_call(config: Config, dataset: data.Data) -> int:
    """How many training steps one compiled loop takes; 1: there is no loop."""
    if not isinstance(dataset, data.DeviceData):
        return 1
    if config.steps_per_call:
        return config.steps_per_call
    # Enough to hide the host's part, and few enough that what is left over at the end of an epoch
    # or before a line of the log is short; those steps are taken one by one.
    on_accelerator = min(10, config.log_every, dataset.steps_per_epoch)
    return 1 if on_cpu(dataset.mesh) else on_accelerator


def shardings(shapes: Any) -> Any:
    """The shardings of arrays or of their shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are CPUs."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def compile_fast(
    mesh: Mesh, function: Callable[..., Any], *arguments: Any, out_shardings: Any
) -> Callable[..., Any]:
    """Compiles what runs seldom: on a CPU optimising it takes far longer than running it."""
    fast: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    lowered = jax.jit(function, out_shardings=out_shardings).lower(*arguments)
    return lowered.compile(compiler_options=fast if on_cpu(mesh) else None)


def on_first_call(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compile_fast`, but only once it is called; what it returns is replicated."""
    compiled: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not compiled:
            replicated = meshes.replicated(mesh)
            compiled.append(compile_fast(mesh, function, *arguments, out_shardings=replicated))
        return compiled[0](*arguments)

    return call
