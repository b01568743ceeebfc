"""Every optimizer of optax, found by introspection: the rows of the optimizer matrix.

A new optimizer in a new optax release becomes a row by itself. It needs an entry in a table below
only if an argument other than the learning rate has no default, or if its ``update`` asks for extra
arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

LEARNING_RATE = 1e-2
STEPS = 50
RATE_ENDS_AT = 30  # The schedules of these runs are 0 from this step on.

# Arguments without a default, and others without which an optimizer would keep no state.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "optax.add_noise": {"eta": 0.01, "gamma": 0.5, "key": 0},
    "optax.adaptive_grad_clip": {"clipping": 0.1},
    "optax.apply_every": {"k": 3},
    "optax.clip": {"max_delta": 1.0},
    "optax.clip_by_block_rms": {"threshold": 1.0},
    "optax.clip_by_global_norm": {"max_norm": 1.0},
    "optax.ema": {"decay": 0.9},
    "optax.noisy_sgd": {"key": 0},
    "optax.scale": {"step_size": 0.5},
    "optax.scale_by_backtracking_linesearch": {"max_backtracking_steps": 5, "store_grad": True},
    "optax.scale_by_schedule": {"step_size_fn": lambda count: 1.0 / (count + 1)},
    "optax.scale_by_zoom_linesearch": {"max_linesearch_steps": 5},
    "optax.sgd": {"momentum": 0.9, "nesterov": True},
    "optax.lbfgs": {"memory_size": 3},
    "optax.trace": {"decay": 0.9},
    "optax.contrib.galore": {"rank": 4, "update_proj_gap": 7},
    "optax.contrib.scale_by_galore": {"rank": 4},
}

# More than one row for optimizers whose arguments change what they keep.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Initial values that a step without gradient changes: weights that grow must have them again.
    "optax.rmsprop, initial_scale": (
        "optax.rmsprop",
        {"initial_scale": 1.0, "centered": True, "momentum": 0.9},
    ),
    "optax.adafactor, factored": (
        "optax.adafactor",
        {"min_dim_size_to_factor": 2, "momentum": 0.9},
    ),
}

# Extra arguments that ``update`` asks for, all computed from the loss.
EXTRA_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "optax.lbfgs": ("value", "grad", "value_fn"),
    "optax.polyak_sgd": ("value",),
    "optax.scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "optax.scale_by_polyak": ("value",),
    "optax.scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
    "optax.contrib.hutchinson_estimator_diag_hessian": ("obj_fn",),
    "optax.contrib.momo": ("value",),
    "optax.contrib.momo_adam": ("value",),
    "optax.contrib.reduce_on_plateau": ("value",),
    "optax.contrib.sophia": ("obj_fn",),
}

_WRAPPER = "goes around another transformation: a row of test_optimizer_wrappers.py"
_PER_EXAMPLE = "takes one gradient per example, so it goes before: see test_optimizer_wrappers.py"
EXCLUDED: dict[str, str] = {
    "optax.apply_if_finite": _WRAPPER,
    "optax.chain": _WRAPPER,
    "optax.conditionally_mask": _WRAPPER,
    "optax.conditionally_transform": _WRAPPER,
    "optax.flatten": _WRAPPER,
    "optax.inject_hyperparams": _WRAPPER,
    "optax.inject_stateful_hyperparams": "another name of optax.inject_hyperparams",
    "optax.lookahead": _WRAPPER,
    "optax.masked": _WRAPPER,
    "optax.multi_transform": "another name of optax.partition",
    "optax.named_chain": _WRAPPER,
    "optax.partition": _WRAPPER,
    "optax.selective_transform": _WRAPPER,
    "optax.freeze": "takes a mask of parameters: see test_optimizer_wrappers.py",
    "optax.measure_with_ema": "measures, moves nothing: see test_optimizer_wrappers.py",
    "optax.monitor": "measures, moves nothing: see test_optimizer_wrappers.py",
    "optax.snapshot": "measures, moves nothing: see test_optimizer_wrappers.py",
    "optax.set_to_zero": "moves nothing and keeps no state",
    "optax.stateless": "makes a transformation out of a function",
    "optax.stateless_with_tree_map": "makes a transformation out of a function",
    "optax.with_extra_args_support": "changes the signature of a transformation, nothing else",
    "optax.contrib.differentially_private_aggregate": _PER_EXAMPLE,
    "optax.contrib.dpsgd": "a chain of differentially_private_aggregate and sgd",
    "optax.contrib.mechanize": _WRAPPER,
    "optax.contrib.sam": _WRAPPER,
    "optax.contrib.schedule_free": _WRAPPER,
    "optax.contrib.split_real_and_imaginary": _WRAPPER,
}

# Optimizers whose return type is not annotated.
_NOT_ANNOTATED = {
    "optax.monitor",
    "optax.scale_by_factored_rms",
    "optax.contrib.dog",
    "optax.contrib.dowg",
    "optax.contrib.hutchinson_estimator_diag_hessian",
}


def transformations() -> dict[str, Callable[..., Any]]:
    """All public functions of optax and optax.contrib that return a gradient transformation."""
    found = {}
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            full = f"{module.__name__}.{name}"
            if name.startswith("_") or not callable(value) or inspect.isclass(value):
                continue
            try:  # Type aliases are callable too, and have no signature.
                returns = str(inspect.signature(value).return_annotation)
            except (TypeError, ValueError):
                continue
            if "GradientTransformation" in returns or full in _NOT_ANNOTATED:
                found[full] = value
    found["optax.inject_hyperparams"] = optax.inject_hyperparams
    found["optax.inject_stateful_hyperparams"] = optax.inject_stateful_hyperparams
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of the matrix.

    Attributes:
      make: ``(learning_rate) -> GradientTransformation``; it may ignore the learning rate.
      extra: names of the extra arguments that its ``update`` is given.
      takes_schedule: whether the learning rate may be a schedule.
      broadcasts_ranks: whether it needs ``jax_numpy_rank_promotion`` to be allowed.
    """

    make: Callable[[Any], optax.GradientTransformation]
    extra: tuple[str, ...] = ()
    takes_schedule: bool = False
    broadcasts_ranks: bool = False


def _row(name: str, factory: Callable[..., Any], given: dict[str, Any]) -> Optimizer:
    parameters = inspect.signature(factory).parameters
    takes_rate = "learning_rate" in parameters and "learning_rate" not in given
    annotation = str(parameters["learning_rate"].annotation) if takes_rate else ""

    def make(learning_rate: Any) -> optax.GradientTransformation:
        rate = {"learning_rate": learning_rate} if takes_rate else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Still to be used.
            tx = factory(**rate, **given)
        # What only scales gradients still points uphill.
        return tx if takes_rate or name in _OWN_RATE else optax.chain(tx, optax.scale(-1e-2))

    return Optimizer(
        make,
        EXTRA_ARGUMENTS.get(name, ()),
        "Schedule" in annotation or "Callable" in annotation,
        name == "optax.scale_by_distance_over_gradients",
    )


# Optimizers, with their own sign, that take no learning rate.
_OWN_RATE = {"optax.polyak_sgd", "optax.contrib.cocob"}


def state_types(tx: optax.GradientTransformation) -> set[str]:
    """Names of the NamedTuples with arrays in a transformation's state: which rules it follows."""
    found = set()

    def visit(node: Any) -> None:
        if hasattr(node, "_fields") and jax.tree.leaves(node):
            found.add(type(node).__name__)
        if isinstance(node, dict):
            node = tuple(node.values())
        if isinstance(node, tuple | list):
            for child in node:
                visit(child)

    visit(jax.eval_shape(tx.init, make_params()))
    return found


@functools.cache
def classified() -> tuple[dict[str, Optimizer], dict[str, str], dict[str, Optimizer]]:
    """All transformations: rows of their own, parts of another row, and those without state.

    A ``scale_by_x`` whose state class occurs in the state of ``x`` needs no row.
    """
    rows, scalings = {}, {}
    for name, factory in transformations().items():
        if name in EXCLUDED:
            continue
        row = _row(name, factory, ARGUMENTS.get(name, {}))
        is_optimizer = "learning_rate" in inspect.signature(factory).parameters
        short = name.rsplit(".", 1)[1]
        own = (is_optimizer or name in _OWN_RATE) and not short.startswith("scale_by")
        (rows if own else scalings)[name] = row
    for name, (base, given) in VARIANTS.items():
        rows[name] = _row(base, transformations()[base], given)
    seen = {name: state_types(row.make(rate_of(row))) for name, row in rows.items()}
    parts, stateless = {}, {}
    for name, row in scalings.items():
        types = state_types(row.make(rate_of(row)))
        # scale_by_x is best found in x.
        whole = name.replace("scale_by_", "")
        wholes = [other for other, theirs in seen.items() if types <= theirs]
        if not types:
            stateless[name] = row
        elif wholes:
            parts[name] = whole if whole in wholes else wholes[0]
        else:
            rows[name] = row
    return rows, parts, stateless


# --- parameters and loss ------------------------------------------------------------------------

KERNEL = (8, 16)


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two kernels of one shape, so that a topology update compiles quickly, and a bias."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "Dense_0": {"kernel": normal(*KERNEL), "bias": normal(KERNEL[1])},
        "Dense_1": {"kernel": normal(*KERNEL)},
    }


def loss(params: Any, *_: Any) -> jax.Array:
    """A quadratic, in the dtype of the parameters, whose gradient has no zeros and no ties."""
    rng = np.random.default_rng(1)

    def leaf(p: jax.Array) -> jax.Array:
        target = jnp.asarray(rng.normal(size=p.shape), p.dtype)
        curvature = jnp.asarray(rng.uniform(0.5, 2, size=p.shape), p.dtype)
        return jnp.sum(curvature * jnp.square(p - target))

    return functools.reduce(jnp.add, map(leaf, jax.tree.leaves(params)))


def schedule(count: Any) -> jax.Array:
    return jnp.where(count < RATE_ENDS_AT, LEARNING_RATE, 0.0)


def rate_of(row: Optimizer) -> Any:
    """A learning rate, by a schedule that ends within the run where there can be one."""
    return schedule if row.takes_schedule else LEARNING_RATE


# --- what a state keeps per weight ---------------------------------------------------------------

# optax.tree.map_params fails on these; the fields of their states that are kept per weight.
_FIELDS = {
    "ScaleByLBFGSState": ("params", "updates"),
    "ScaleByBacktrackingLinesearchState": ("grad",),
    "ScaleByZoomLinesearchState": ("grad",),
    "ScaleBySM3State": ("nu",),
}


def per_weight(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """For each leaf of a state the index of the parameter that it is a slot of, or -1.

    Found by optax's own means, where they work, and not by the library's.
    """
    indices = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    hidden = functools.partial(jax.tree.map, lambda _: -1)

    def index(slot: Any, param: Any, i: int) -> Any:
        if isinstance(slot, optax.MaskedNode):
            return slot
        return i if jnp.shape(slot) == jnp.shape(param) else -1

    try:
        return optax.tree.map_params(
            tx,
            index,
            state,
            params,
            indices,
            transform_non_params=lambda _: -1,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
    except (IndexError, ValueError):

        def by_field(node: Any) -> Any:
            fields = _FIELDS.get(type(node).__name__)
            if fields is None:
                return hidden(node)
            return type(node)(
                **{
                    name: indices if name in fields else hidden(getattr(node, name))
                    for name in node._fields
                }
            )

        return jax.tree.map(by_field, state, is_leaf=lambda x: type(x).__name__ in _FIELDS)


def shared_slots(row: Optimizer) -> list[str]:
    """What an optimizer keeps, beside counters and keys, that is not kept per weight.

    Looked up for a matrix parameter, as paths in the state without the parameter's own.
    """
    params = {"w": jnp.zeros(KERNEL)}
    tx = row.make(rate_of(row))
    state = tx.init(params)
    slots = per_weight(tx, state, params)
    found = []
    for (path, leaf), index in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(slots), strict=True
    ):
        if index < 0 and jnp.issubdtype(leaf.dtype, jnp.floating):
            names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            found.append(f"{names[-1]} {leaf.shape}")
    return sorted(set(found))
