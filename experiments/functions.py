"""The functions of a grid, before compilation: those of the model, and those of each method.

Pure functions of arrays, with the shapes and shardings of what they take. `programs` compiles them
for the devices at hand, `compile_check` for devices that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax as sx
from experiments import build, data, metrics
from experiments import mesh as meshes
from experiments.config import Config
from sparseopt_jax.flops import flops as count_flops
from sparseopt_jax.model_flops import ModelFLOPs

SEED = meshes.struct((), jnp.int32)
"""The shape of a seed."""


class State(NamedTuple):
    """All that a training step changes; the three are pytrees of arrays."""

    params: Any
    batch_stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """What all methods share. Shapes are `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
      module: the Flax module.
      init: seed (int32 scalar) -> params, batch_stats; all weights, as a dense model has them.
      evaluate: (params, batch_stats, EvalBatch) -> number of examples, number correct, sum of
        losses.
      weights: shapes of params and batch_stats.
      batch: shapes of images and labels of a training batch.
      layers: sizes of the layers that can have masks, by path, in the model's order.
      count_forward: (active weights by path, as sorted items) -> FLOPs of one example's forward
        pass, by the conventions of `sx.flops`; other layers are dense. It is counted once.
    """

    module: Any
    init: Callable[..., Any]
    evaluate: Callable[..., Any]
    weights: tuple[Any, Any]
    batch: data.Split
    layers: dict[str, int]
    count_forward: Callable[[tuple[tuple[str, int], ...]], ModelFLOPs]


@dataclasses.dataclass(frozen=True)
class MethodFunctions:
    """What one method adds. Shapes are `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
      tx: the optimizer.
      start: (params, batch_stats, seed) -> State, with masks and masked weights where sparse.
      loss: (params, batch_stats, images, labels) -> loss, (logits, batch_stats).
      apply: (params, optimizer state, gradient) -> params, optimizer state, norm of the active
        weights' gradient.
      step: (State, images, labels) -> State, metrics.
      measure: (optimizer state, earlier masks) -> active weights, mask churn, ITOP rate, and a copy
        of the masks; only for sparse methods.
      diagnose: (State, images, labels) -> gradient norm and, for sparse methods, per layer the
        gradient's skew and the fan-in.
      sharpness: (State, images, labels) -> the Hessian's top eigenvalue on these images and how far
        it may be off.
      learning_rate: the schedule, step -> rate.
      state: shapes of a State.
    """

    tx: optax.GradientTransformationExtraArgs
    start: Callable[..., Any]
    loss: Callable[..., Any]
    apply: Callable[..., Any]
    step: Callable[..., Any]
    measure: Callable[..., Any]
    diagnose: Callable[..., Any]
    sharpness: Callable[..., Any]
    learning_rate: optax.Schedule
    state: State


def model_functions(config: Config, dataset: data.Shapes) -> ModelFunctions:
    """Initial weights and evaluation.

    Args:
      config: names the model and the batch size.
      dataset: gives mesh, shapes, number of classes, mean and standard deviation.
    """
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

    mesh, shared_out = dataset.mesh, meshes.batch_sharding(dataset.mesh)
    params, batch_stats = jax.eval_shape(init, SEED)
    shape = (config.batch_size, *dataset.image_shape)
    batch = data.Split(
        meshes.struct(shape, jnp.uint8, shared_out),
        meshes.struct(shape[:1], jnp.int32, shared_out),
    )
    params = meshes.abstract(params, meshes.param_shardings(mesh, params))
    batch_stats = meshes.abstract(batch_stats, meshes.replicated(mesh))

    @functools.cache
    def count_forward(active: tuple[tuple[str, int], ...]) -> ModelFLOPs:
        def logits(params: Any, batch_stats: Any, image: jax.Array) -> jax.Array:
            variables = {"params": params, "batch_stats": batch_stats}
            outputs: jax.Array = module.apply(variables, image, train=False)
            return outputs

        image = meshes.struct((1, *dataset.image_shape), jnp.float32)
        densities = {path: Fraction(number, layers[path]) for path, number in active}
        return count_flops(logits, params, densities, batch_stats, image)

    weights = params, batch_stats
    return ModelFunctions(module, init, evaluate, weights, batch, layers, count_forward)


def method_functions(
    config: Config, dataset: data.Shapes, model: ModelFunctions, automatic: bool = True
) -> MethodFunctions:
    """The training step of one method, and what is measured beside it.

    Args:
      config: the config of that method alone (`Config.for_method`).
      dataset: gives mesh, number of classes, mean and standard deviation.
      model: what `model_functions` returned for the same config.
      automatic: whether the step changes the topology when that is due; False where topology
        updates are scheduled outside.
    """
    steps_per_epoch = data.steps_per_epoch(config, dataset)
    sparse = config.topology != "dense"
    tx = build.make_optimizer(
        config, steps_per_epoch, automatic=automatic
    )  # only its `update`: its seed is not used

    def start(params: Any, batch_stats: Any, seed: jax.Array) -> State:
        _, masks_key = _keys(seed)
        opt_state = build.make_optimizer(config, steps_per_epoch, masks_key, automatic).init(params)
        if sparse:
            masks = sx.get_masks(opt_state)
            if config.fan_in_spread:
                spread_key = jax.random.fold_in(masks_key, 0x73707265)  # apart from all others
                masks = build.unequal_masks(masks, config.fan_in_spread, spread_key)
                opt_state = sx.set_masks(opt_state, masks)
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

    @jax.named_scope("optimizer")  # for profiles
    def apply(params: Any, opt_state: Any, gradient: Any) -> tuple[Any, Any, jax.Array]:
        updates, new_opt_state = tx.update(gradient, opt_state, params)
        # The norm is that of the active weights' gradient, by the masks the loss was taken with.
        if sparse:
            gradient = sx.apply_masks(gradient, sx.get_masks(opt_state))
        return optax.apply_updates(params, updates), new_opt_state, sx.gradient_norm(gradient)

    def step(
        state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        params, batch_stats, opt_state = state
        (loss, (logits, batch_stats)), gradient = jax.value_and_grad(loss_and_logits, has_aux=True)(
            params, batch_stats, images, labels
        )
        params, opt_state, norm = apply(params, opt_state, gradient)
        measured = {
            "loss": loss,
            "train_accuracy": (logits.argmax(-1) == labels).mean(dtype=jnp.float32),
            "gradient_norm": norm,
        }
        return State(params, batch_stats, opt_state), measured

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

    params, batch_stats = model.weights
    state = jax.eval_shape(start, params, batch_stats, SEED)
    return MethodFunctions(
        tx=tx,
        start=start,
        loss=loss_and_logits,
        apply=apply,
        step=step,
        measure=measure,
        diagnose=diagnose,
        sharpness=sharpness,
        learning_rate=build.learning_rate(config, steps_per_epoch),
        state=State(
            params,
            batch_stats,
            meshes.abstract(state.opt_state, sx.state_shardings(tx, params)),
        ),
    )


def flops_per_example(
    config: Config, dataset: data.Shapes, model: ModelFunctions, masks: Any
) -> dict[str, float]:
    """FLOPs that one example costs, see `ModelFunctions.count_forward`.

    Args:
      config: the config of a method alone.
      dataset: gives shapes.
      model: what `model_functions` returned for the same config.
      masks: bool arrays on the host, or None for a dense model.

    Returns:
      `forward_dense`, `forward` with the masks, and `training`: of a training step, averaged over
      the steps between topology updates.
    """
    leaves = {} if masks is None else metrics.path_leaves(masks)
    active = {path: int(leaves[path].sum()) for path in model.layers if path in leaves}
    counted = model.count_forward(tuple(sorted(active.items())))
    topology = None
    if config.topology != "dense":
        topology = build.make_topology(config, data.steps_per_epoch(config, dataset))
    return {
        "forward_dense": float(counted.dense),
        "forward": float(counted.sparse),
        "training": counted.training(topology),
    }


def _keys(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of a run's weights and of its masks, unrelated to each other."""
    weights_key, masks_key = jax.random.split(jax.random.key(seed))
    return weights_key, masks_key


def _normalise(images: jax.Array, dataset: data.Shapes) -> jax.Array:
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
