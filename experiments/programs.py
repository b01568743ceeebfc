"""The compiled functions of a grid: those of the model, and those of each method.

Weights and evaluation are the same for every method, and the seed is data, so nothing is compiled
twice.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax as sx
from experiments import build, data, metrics
from experiments.config import Config


class State(NamedTuple):
    """All that a training step changes; the three are pytrees of arrays."""

    params: Any
    batch_stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class ModelPrograms:
    """What all methods share.

    Attributes:
      module: the Flax module.
      init: seed (int32 scalar) -> params, batch_stats; all weights, as a dense model has them.
      evaluate: (params, batch_stats, EvalBatch) -> number of examples, number correct, sum of
        losses.
      layers: sizes of the layers that can have masks, by path, in the model's order.
      seconds: how long the compilation took.
    """

    module: Any
    init: Callable[..., Any]
    evaluate: Callable[..., Any]
    layers: dict[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class MethodPrograms:
    """What one method adds; all its runs share it.

    Attributes:
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
    """Compiles initial weights and evaluation.

    Args:
      config: names the model and the batch size.
      dataset: gives shapes, number of classes, mean and standard deviation.

    Returns:
      The compiled programs.
    """
    begin = time.monotonic()
    module = build.make_model(config, dataset.num_classes)
    layers: dict[str, int] = {}

    def init(seed: jax.Array) -> tuple[Any, Any]:
        weights_key, _ = _keys(seed)
        images = jnp.zeros((1, *dataset.image_shape), jnp.float32)
        variables = module.init(weights_key, images, train=False)
        for path, leaf in _leaves_in_order(variables["params"]).items():
            if sx.default_prunable(path, leaf):
                layers[path] = leaf.size
        return variables["params"], variables.get("batch_stats", {})

    def evaluate(
        params: Any, batch_stats: Any, batch: data.EvalBatch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}
        images = _normalise(batch.images, dataset)
        logits = module.apply(variables, images, train=False).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        # Chosen, not multiplied, by weight: a padded example's loss may be inf, and inf * 0 is NaN.
        counted = batch.weights > 0
        correct = (logits.argmax(-1) == batch.labels) & counted
        return counted.sum(), correct.sum(), jnp.where(counted, losses, 0.0).sum()

    seed = jnp.int32(0)
    params, batch_stats = jax.eval_shape(init, seed)
    weights = jnp.ones(config.batch_size, jnp.float32)
    batch = data.EvalBatch(*_example_batch(config, dataset), weights)
    return ModelPrograms(
        module=module,
        init=_compile_fast(init, seed),
        evaluate=jax.jit(evaluate).lower(params, batch_stats, batch).compile(),
        layers=layers,
        seconds=time.monotonic() - begin,
    )


def compile_method(config: Config, dataset: data.Data, model: ModelPrograms) -> MethodPrograms:
    """Compiles the training step of one method.

    Args:
      config: the config of that method alone (`Config.for_method`).
      dataset: gives shapes, number of classes, mean and standard deviation.
      model: what `compile_model` returned for the same config.

    Returns:
      The compiled programs.
    """
    begin = time.monotonic()
    steps_per_epoch = data.steps_per_epoch(config, dataset)
    sparse = config.topology != "dense"
    tx = build.make_optimizer(config, steps_per_epoch)  # only its `update`: its seed is not used

    def start(params: Any, batch_stats: Any, seed: jax.Array) -> State:
        _, masks_key = _keys(seed)
        opt_state = build.make_optimizer(config, steps_per_epoch, masks_key).init(params)
        if sparse:
            masks = sx.get_masks(opt_state)
            if config.init == "sparse_he_normal":
                params = sx.scale_to_fan_in(params, masks)
            params = sx.apply_masks(params, masks)
        return State(params, batch_stats, opt_state)

    def loss_and_logits(
        params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": batch_stats}
        inputs = _normalise(images, dataset)
        logits, changed = model.module.apply(variables, inputs, train=True, mutable=["batch_stats"])
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(labels, dataset.num_classes)
        targets = optax.smooth_labels(targets, config.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits, changed.get("batch_stats", {}))

    def step(
        state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        params, batch_stats, opt_state = state
        (loss, (logits, batch_stats)), gradient = jax.value_and_grad(loss_and_logits, has_aux=True)(
            params, batch_stats, images, labels
        )
        updates, new_opt_state = tx.update(gradient, opt_state, params)
        # The norm is that of the active weights' gradient, by the masks the loss was taken with.
        if sparse:
            gradient = sx.apply_masks(gradient, sx.get_masks(opt_state))
        measured = {
            "loss": loss,
            "train_accuracy": (logits.argmax(-1) == labels).mean(dtype=jnp.float32),
            "gradient_norm": sx.gradient_norm(gradient),
        }
        return State(optax.apply_updates(params, updates), batch_stats, new_opt_state), measured

    def steps(
        state: State,
        split: data.Split,
        order: jax.Array,
        seed: jax.Array,
        epoch: jax.Array,
        index: jax.Array,
    ) -> tuple[State, dict[str, jax.Array]]:
        assert isinstance(dataset, data.DeviceData)

        def body(state: State, i: jax.Array) -> tuple[State, dict[str, jax.Array]]:
            return step(state, *dataset.take_batch(split, order, seed, epoch, i))

        return jax.lax.scan(body, state, index + jnp.arange(steps_per_call))

    def measure(opt_state: Any, earlier: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        masks = sx.get_masks(opt_state)
        now = metrics.path_leaves(masks)
        active = sum(now[path].sum() for path in model.layers)
        churn = sx.mask_churn(masks, earlier).total
        copy = jax.tree.map(jnp.copy, masks)
        return jnp.asarray(active), churn, sx.itop_rate(opt_state), copy

    def diagnose(state: State, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
        gradient = jax.grad(loss_and_logits, has_aux=True)(
            state.params, state.batch_stats, images, labels
        )[0]
        if not sparse:
            return {"gradient_norm": sx.gradient_norm(gradient)}
        masks = sx.get_masks(state.opt_state)
        skew = sx.gradient_skew(gradient, masks, average_over=build.average_over(config))
        return {
            "gradient_norm": sx.gradient_norm(gradient, masks),
            "itop_rate": sx.itop_rate(state.opt_state),
            "gradient_skew": {path: skew[path]._asdict() for path in model.layers},
            "fan_in": {
                path: statistics._asdict()
                for path, statistics in sx.fan_in_statistics(masks).items()
                if path in model.layers
            },
        }

    def sharpness(state: State, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return loss_and_logits(params, state.batch_stats, images, labels)[0]

        masks = sx.get_masks(state.opt_state) if sparse else None
        # The first vector is the same on every call, so that differences are the loss's own.
        top = sx.hessian_top_eigenvalue(loss, state.params, jax.random.key(0), masks=masks)
        return {"hessian_top_eigenvalue": top.eigenvalue, "hessian_residual": top.residual}

    seed = jnp.int32(0)
    params, batch_stats = model.init(seed)
    state = jax.eval_shape(start, params, batch_stats, seed)
    masks = sx.get_masks(state.opt_state) if sparse else None
    images, labels = _example_batch(config, dataset)
    steps_per_call = _steps_per_call(config, dataset)
    compiled_steps = None
    if steps_per_call > 1:
        assert isinstance(dataset, data.DeviceData)
        split = dataset.dataset.train
        order = jnp.arange(len(split.labels), dtype=jnp.int32)
        arguments = state, split, order, seed, seed, seed
        compiled_steps = jax.jit(steps, donate_argnums=0).lower(*arguments).compile()
    return MethodPrograms(
        start=_compile_fast(start, params, batch_stats, seed),
        step=jax.jit(step, donate_argnums=0).lower(state, images, labels).compile(),
        steps=compiled_steps,
        steps_per_call=steps_per_call,
        measure=_compile_fast(measure, state.opt_state, masks) if sparse else measure,
        diagnose=_on_first_call(diagnose),
        sharpness=jax.jit(sharpness),
        learning_rate=build.learning_rate(config, steps_per_epoch),
        seconds=time.monotonic() - begin,
    )


def _steps_per_call(config: Config, dataset: data.Data) -> int:
    if not isinstance(dataset, data.DeviceData):
        return 1
    if config.steps_per_call:
        return config.steps_per_call
    # Enough to hide the host's part, and few enough that what is left over at the end of an epoch
    # or before a line of the log is short; those steps are taken one by one.
    on_accelerator = min(10, config.log_every, dataset.steps_per_epoch)
    return 1 if jax.default_backend() == "cpu" else on_accelerator


def _compile_fast(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Compiles what runs seldom: on a CPU optimising it takes far longer than running it."""
    cpu = jax.default_backend() == "cpu"
    options: dict[str, str | bool] | None = {"xla_backend_optimization_level": "0"} if cpu else None
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def _on_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `_compile_fast`, but only once it is called."""
    compiled: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not compiled:
            compiled.append(_compile_fast(function, *arguments))
        return compiled[0](*arguments)

    return call


def _keys(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a run's weights and of its masks, unrelated to each other."""
    weights_key, masks_key = jax.random.split(jax.random.key(seed))
    return weights_key, masks_key


def _example_batch(config: Config, dataset: data.Data) -> tuple[jax.Array, jax.Array]:
    images = jnp.zeros((config.batch_size, *dataset.image_shape), jnp.uint8)
    return images, jnp.zeros(config.batch_size, jnp.int32)


def _normalise(images: jax.Array, dataset: data.Data) -> jax.Array:
    """Images of a batch, uint8, to mean 0 and variance 1 per channel, float32."""
    shape = (1, 1, 1, -1)
    mean, std = dataset.mean.reshape(shape), dataset.std.reshape(shape)
    return (images.astype(jnp.float32) - mean) / std


def _leaves_in_order(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by '/'-joined path in the order in which the model made them (jax sorts by name)."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {
        name: leaf
        for key, branch in tree.items()
        for name, leaf in _leaves_in_order(branch, f"{path}/{key}" if path else key).items()
    }
