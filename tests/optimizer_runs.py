"""Runs of the optimizer matrix: topologies, a watch on the optimizer, a record of each step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparseopt_jax as sx
from tests.optimizers import STEPS, loss, make_params, per_weight

# --- one step -----------------------------------------------------------------------------------


def extra_arguments(names: tuple[str, ...], value: Any, grads: Any) -> dict[str, Any]:
    every = {
        "value": value,
        "grad": grads,
        "value_fn": loss,
        "obj_fn": loss,
        "grad_fn": jax.grad(loss),
    }
    return {name: every[name] for name in names}


def fast(params: Any) -> Any:
    """The weights that gradients are taken at: ``optax.lookahead`` keeps two copies."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def make_step(tx: optax.GradientTransformation, extra: tuple[str, ...]) -> Callable[..., Any]:
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss)(fast(params))
        updates, state = update(grads, state, params, **extra_arguments(extra, value, grads))
        return optax.apply_updates(params, updates), state

    return step


# --- topologies ---------------------------------------------------------------------------------

TOPOLOGIES: dict[str, Any] = {
    "static": sx.Static(),
    "set": sx.SET(interval=5, drop_fraction=0.4, end_step=1_000),
    "rigl": sx.RigL(interval=5, drop_fraction=0.4, end_step=1_000),
}
UPDATE_STEPS = tuple(range(5, STEPS, 5))


@dataclasses.dataclass(frozen=True)
class OneOf(sx.Topology):
    """The topology of ``TOPOLOGIES`` with a traced index: one program serves all of them."""

    index: jax.Array

    def is_update_step(self, step: Any) -> jax.Array:
        every = [jnp.asarray(t.is_update_step(step)) for t in TOPOLOGIES.values()]
        return jnp.stack(every)[self.index]

    def update(self, *arguments: Any, **named: Any) -> Any:
        branches = [
            functools.partial(lambda t: t.update(*arguments, **named), t)
            for t in TOPOLOGIES.values()
        ]
        return jax.lax.switch(self.index, branches)


# --- what the inner optimizer is given ----------------------------------------------------------


class WatchedState(NamedTuple):
    inner: Any
    previous: jax.Array  # The masks of the step before, all in one vector.
    stale: jax.Array


def watched(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner``, and a count of what it should not have been given.

    That is gradients and weights of inactive positions that are not 0, and per-weight slots that
    are not what ``inner.init`` gives, where a weight is inactive or has just become active.
    """
    inner = optax.with_extra_args_support(inner)

    def vector(masks: Any) -> jax.Array:
        # Not a copy of the parameters' tree, so nothing takes it for a slot.
        return jnp.concatenate(
            [jnp.zeros(0, bool)] + [jnp.ravel(m) for m in jax.tree.leaves(masks)]
        )

    def init(params: Any) -> WatchedState:
        everywhere = jax.tree.map(lambda p: jnp.ones(jnp.shape(p), bool), fast(params))
        return WatchedState(inner.init(params), vector(everywhere), jnp.zeros((), jnp.int32))

    def update(
        grads: Any,
        state: WatchedState,
        params: Any,
        *,
        masks: Any = None,
        fan_in: Any = None,
        **extra: Any,
    ) -> tuple[Any, WatchedState]:
        if masks is None:
            raise sx.MissingMasksError("masks")
        leaves, structure = jax.tree.flatten(masks)
        sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]
        before = [
            old.reshape(new.shape)
            for old, new in zip(jnp.split(state.previous, sizes), leaves, strict=True)
        ]
        stayed = [old & new for old, new in zip(before, leaves, strict=True)]
        initial = inner.init(params)

        def stale(slot: Any, start: Any, index: int) -> jax.Array:
            if index < 0:
                return jnp.int32(0)
            return jnp.sum((slot != start) & ~stayed[index], dtype=jnp.int32)

        slots = per_weight(inner, state.inner, jax.tree.unflatten(structure, leaves))
        counts = jax.tree.leaves(jax.tree.map(stale, state.inner, initial, slots))
        copies = params if isinstance(params, optax.LookaheadParams) else (params,)
        for tree in (grads, *copies):
            for x, m in zip(jax.tree.leaves(tree), leaves, strict=True):
                counts.append(jnp.sum((x != 0) & ~m, dtype=jnp.int32))
        try:
            updates, new = inner.update(grads, state.inner, params, **extra)
        except sx.MissingMasksError:
            extra |= {"masks": masks, "fan_in": fan_in}
            updates, new = inner.update(grads, state.inner, params, **extra)
        total = functools.reduce(jnp.add, counts, state.stale)
        return updates, WatchedState(new, vector(masks), total)

    return optax.GradientTransformationExtraArgs(init, update)


# --- whole runs ---------------------------------------------------------------------------------


class Record(NamedTuple):
    """What happened at each of the steps of a run."""

    counts_hold: Any
    zeros_hold: Any
    stale: Any  # A running total.
    masks_changed: Any
    moved: Any  # Whether a weight that was and stayed active moved.
    finite: Any
    masks: Any  # All in one vector.


def _any(values: Any) -> jax.Array:
    return functools.reduce(jnp.logical_or, map(jnp.any, values))


def _finite(tree: Any) -> jax.Array:
    return ~_any(~jnp.isfinite(x) for x in jax.tree.leaves(tree))


def sparse(inner: Any, topology: Any, seed: Any = 0) -> Any:
    return sx.sparse_training(inner, distribution=sx.ERK(0.7), topology=topology, seed=seed)


def copies(params: Any) -> tuple[Any, ...]:
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def start(tx: Any, params: Any) -> tuple[Any, Any]:
    """Masked parameters, and the state."""
    state = tx.init(params)
    masked = [sx.apply_masks(copy, sx.get_masks(state)) for copy in copies(params)]
    return type(params)(*masked) if len(masked) > 1 else masked[0], state


def sparse_run(
    make_tx: Callable[[Any, Any], Any],
    extra: tuple[str, ...] = (),
    make_start: Callable[[], Any] = make_params,
    steps: int = STEPS,
) -> Callable[[Any, Any], Any]:
    """A function of a topology and a key that gives the run's record and last state.

    ``make_tx(topology, key)`` gives the whole transformation; the optimizer in it is ``watched``.
    """

    def run(topology: Any, key: jax.Array) -> tuple[Record, Any]:
        tx = make_tx(topology, key)
        params, state = start(tx, make_start())
        n_active = [jnp.sum(m, dtype=jnp.int32) for m in jax.tree.leaves(sx.get_masks(state))]
        step = make_step(tx, extra)

        def body(carry: Any, _: None) -> tuple[Any, Record]:
            params, state = carry
            new_params, new_state = step(params, state)
            old, new = (jax.tree.leaves(sx.get_masks(s)) for s in (state, new_state))
            before, after = (jax.tree.leaves(fast(p)) for p in (params, new_params))
            stale = [
                x.stale
                for x in jax.tree.leaves(new_state, is_leaf=lambda x: isinstance(x, WatchedState))
                if isinstance(x, WatchedState)
            ]
            return (new_params, new_state), Record(
                counts_hold=~_any(
                    jnp.sum(m, dtype=jnp.int32) != n for m, n in zip(new, n_active, strict=True)
                ),
                zeros_hold=~_any(
                    (p != 0) & ~m
                    for copy in copies(new_params)
                    for p, m in zip(jax.tree.leaves(copy), new, strict=True)
                ),
                stale=functools.reduce(jnp.add, stale),
                masks_changed=_any(m != n for m, n in zip(old, new, strict=True)),
                moved=_any(
                    (p != q) & m & n for p, q, m, n in zip(before, after, old, new, strict=True)
                ),
                finite=_finite(new_params),
                masks=jnp.concatenate([jnp.ravel(m) for m in new]),
            )

        last, record = jax.lax.scan(body, (params, state), None, length=steps)
        return record, last

    return run


def dense_run(
    make_tx: Callable[[], Any],
    extra: tuple[str, ...] = (),
    make_start: Callable[[], Any] = make_params,
) -> Callable[[], Any]:
    """The steps without ``sparse_training``: which moved a weight, which were finite, the state."""

    def run() -> tuple[Any, Any, Any]:
        tx, params = make_tx(), make_start()
        step = make_step(tx, extra)

        def body(carry: Any, _: None) -> Any:
            params, state = carry
            new_params, new_state = step(params, state)
            pairs = zip(jax.tree.leaves(params), jax.tree.leaves(new_params), strict=True)
            return (new_params, new_state), (_any(p != q for p, q in pairs), _finite(new_params))

        (_, state), (moved, finite) = jax.lax.scan(
            body, (params, tx.init(params)), None, length=STEPS
        )
        return moved, finite, state

    return run


def topologies_and_seeds(run: Callable[[Any, Any], Any], keys: jax.Array) -> Callable[[], Any]:
    """All of ``TOPOLOGIES``, and a vmap over seeds within each: one program."""
    over_seeds = jax.vmap(run, in_axes=(None, 0))
    indices = jnp.arange(len(TOPOLOGIES))
    return lambda: jax.lax.map(lambda i: over_seeds(OneOf(i), keys), indices)


# --- what a state holds -------------------------------------------------------------------------


def kinds(tree: Any) -> dict[str, Any]:
    """What decides on a recompilation: shape, dtype and weak type of each leaf, by path."""
    return {
        jax.tree_util.keystr(path): (x.shape, x.dtype, getattr(x, "weak_type", False))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def changed_kinds(tx: Any, extra: tuple[str, ...], params: Any, inner: Callable[..., Any]) -> Any:
    """The leaves of the parameters and ``inner(state)`` whose kind a step changes."""
    state = jax.eval_shape(tx.init, params)
    new_params, new_state = jax.eval_shape(make_step(tx, extra), params, state)
    assert jax.tree.structure((params, state)) == jax.tree.structure((new_params, new_state))
    before, after = kinds((params, inner(state))), kinds((new_params, inner(new_state)))
    return {path: (kind, after[path]) for path, kind in before.items() if kind != after[path]}


# --- eight devices ------------------------------------------------------------------------------

SPECS = {
    "Dense_0": {"kernel": PartitionSpec("x", None), "bias": PartitionSpec(None)},
    "Dense_1": {"kernel": PartitionSpec(None, "x")},
}


def place(params: Any, kind: AxisType) -> Any:
    """Parameters on a mesh of eight devices, the two kernels sharded in different ways."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    every = [jax.device_put(copy, shardings) for copy in copies(params)]
    return type(params)(*every) if len(every) > 1 else every[0]


def explicit_mode_refuses(tx: Any, extra: tuple[str, ...], params: Any) -> bool:
    """Whether an optimizer itself, without ``sparse_training``, fails in Explicit mode."""
    try:
        jax.eval_shape(lambda p: make_step(tx, extra)(p, tx.init(p)), params)
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # jax does not export it.
            raise
        return True
    return False


def mesh_steps(extra: tuple[str, ...]) -> int:
    """How many steps to compare: one topology update among them, and steps after it.

    With it a line search is given the loss from before weights were dropped, finds no step that
    falls below it, and L-BFGS divides by a move that is nothing but rounding. So line searches are
    compared before it.
    """
    return UPDATE_STEPS[0] + (0 if "value_fn" in extra else 3)


def on_one_device(tx: Any, extra: tuple[str, ...], first: Any) -> tuple[Any, int]:
    """The parameters and state after ``mesh_steps`` calls, and how many programs they took."""
    step, carry = jax.jit(make_step(tx, extra)), first
    for _ in range(mesh_steps(extra)):
        carry = step(*carry)
    return carry, step._cache_size()


def on_eight_devices(tx: Any, extra: tuple[str, ...], first: Any, kind: AxisType) -> Any:
    """Likewise on a mesh; asserts that what is kept per weight stays sharded as its weight."""
    params = place(first[0], kind)
    carry = params, jax.device_put(first[1], sx.state_shardings(tx, params))
    begin = jax.tree.map(lambda x: x.sharding, carry)
    step = jax.jit(make_step(tx, extra)).lower(*carry).compile()
    elsewhere = _not_per_weight(*first)
    for _ in range(mesh_steps(extra)):
        carry = step(*carry)
        for (path, sharding), x in zip(
            jax.tree_util.tree_leaves_with_path(begin), jax.tree.leaves(carry), strict=True
        ):
            if path not in elsewhere:
                assert sharding.is_equivalent_to(x.sharding, x.ndim), (path, x.sharding)
        # What is not kept per weight is sharded as the compiler finds best.
        carry = jax.device_put(carry, begin)
    return carry


def _not_per_weight(params: Any, state: Any) -> set[Any]:
    """Paths in ``(params, state)`` of optimizer slots that have not their parameter's shape."""
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(fast(params))}
    return {
        (jax.tree_util.SequenceKey(1), *path)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if jax.tree_util.GetAttrKey("inner_state") in path
        and not any(path[-len(end) :] == end and x.shape == shape for end, shape in shapes.items())
    }


def assert_same_run(carry: Any, other: Any) -> None:
    """The same masks, and parameters within rounding: sums over devices have another order."""
    (params, state), (other_params, other_state) = carry, other
    assert_same_bits(sx.get_masks(state), sx.get_masks(other_state))
    assert_close(params, other_params)


# What 8 steps may differ by where sums of 272 float32 values are taken in another order.
ROUNDING = 8 * 272 * 2.0**-24


def assert_close(tree: Any, other: Any) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
    ):
        where = jax.tree_util.keystr(path)
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING, err_msg=where)


# --- what must hold -----------------------------------------------------------------------------


def check(record: Record, *, finite: bool) -> None:
    """Counts, zeros and slots at every step, and weights where ``finite``."""
    assert np.asarray(record.counts_hold).all(), "a layer lost or gained active weights"
    assert np.asarray(record.zeros_hold).all(), "an inactive weight is not 0"
    assert (np.asarray(record.stale) == 0).all(), "the optimizer was given what should be reset"
    assert not finite or np.asarray(record.finite).all(), "not finite, though the dense run is"


def check_topologies(record: Record) -> None:
    """Masks change on the steps of an update and on no others, and differ between seeds.

    The record's axes are topologies, seeds, steps.
    """
    for (name, _), steps in zip(TOPOLOGIES.items(), np.asarray(record.masks_changed), strict=True):
        assert not np.delete(steps, UPDATE_STEPS, axis=1).any(), f"{name} changed masks unasked"
        assert steps[:, UPDATE_STEPS[0]].all() == (name != "static")
    masks = np.asarray(record.masks)
    assert (masks[:, 0] != masks[:, 1]).any(axis=-1).all(), "two seeds had the same masks"


def last_move(moved: Any) -> int:
    return int(np.flatnonzero(moved).max(initial=-1))


def counters(state: Any) -> dict[str, np.ndarray]:
    """Step counters of an optimizer's state, by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if getattr(path[-1], "name", None) in ("count", "step_count", "step")
    }


def savable(tree: Any) -> Any:
    """A tree with key data in the place of typed keys, which flax.serialization does not take."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def assert_same_bits(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
