"""Sums of active gradients alone: the same numbers, and bytes on the wire by the density."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import sparseopt_jax as sx
from experiments.hlo import collectives

SAME, OWN = PartitionSpec(), PartitionSpec("data")
PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (32, 10))},
}
MASKS = sx.init_masks(jax.random.key(2), PARAMS, sx.Uniform(0.95, dense_first=False))
COUNTS = sx.active_counts(MASKS)
X = jax.random.normal(jax.random.key(3), (32, 64))
Y = jnp.arange(32) % 10


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    logits = hidden @ params["b"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()


def mapped(function, in_specs, out_specs=SAME, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


def own_gradient(params, x, y):
    return jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), x, y)


def dense_step(params, x, y):
    return jax.lax.psum(own_gradient(params, x, y), "data")


def active_step(params, masks, indices, x, y):
    grads = own_gradient(params, x, y)
    return sx.psum_active(grads, masks, COUNTS, "data", indices=indices)


SPECS = (SAME, SAME, SAME, OWN, OWN)


@pytest.fixture(scope="module")
def dense():
    return mapped(dense_step, (SAME, OWN, OWN)).lower(PARAMS, X, Y).compile()


def test_counts_and_indices():
    sizes = {path: int(leaf["kernel"].sum()) for path, leaf in MASKS.items()}
    assert {f"{path}/kernel": count for path, count in sizes.items()} == COUNTS
    indices = jax.jit(lambda masks: sx.active_indices(masks, COUNTS))(MASKS)
    for path in "ab":
        expected = np.flatnonzero(np.asarray(MASKS[path]["kernel"]))
        np.testing.assert_array_equal(indices[f"{path}/kernel"], expected)
        assert indices[f"{path}/kernel"].dtype == jnp.int32


@pytest.mark.parametrize("kept", [True, False], ids=["kept indices", "indices computed"])
def test_sums_are_psums_bit_for_bit_where_active(dense, kept):
    indices = sx.active_indices(MASKS, COUNTS) if kept else None
    active = mapped(active_step, SPECS).lower(PARAMS, MASKS, indices, X, Y).compile()
    found, whole = active(PARAMS, MASKS, indices, X, Y), dense(PARAMS, X, Y)
    assert all(np.count_nonzero(leaf) > leaf.size / 2 for leaf in jax.tree.leaves(whole))
    expected = jax.tree.map(lambda g, m: np.where(m, g, 0), whole, MASKS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # One operation, of the active weights and the bias.
    sent, all_of_it = (collectives(program.as_text()) for program in (active, dense))
    assert all_of_it["all-reduce"].bytes == 4 * (64 * 32 + 32 + 32 * 10)
    assert sent.keys() == {"all-reduce"}
    assert sent["all-reduce"].bytes == 4 * (sum(COUNTS.values()) + 32)


def test_masks_that_move_compile_nothing():
    step = mapped(active_step, SPECS)
    for seed in range(3):
        masks = sx.init_masks(jax.random.key(seed), PARAMS, sx.Uniform(0.95, dense_first=False))
        found = step(PARAMS, masks, sx.active_indices(masks, COUNTS), X, Y)
        jax.tree.map(lambda g, m: np.testing.assert_array_equal(np.where(m, 0, g), 0), found, masks)
    assert step._cache_size() == 1


def test_training_is_that_with_whole_gradients():
    """RigL sums all of it on the steps on which it grows; parameters are equal bit for bit."""
    topology = sx.RigL(interval=2, drop_fraction=0.3, end_step=9)
    tx = sx.sparse_training(sx.sparseopt(0.01), masks=MASKS, topology=topology)

    def step(active, params, opt_state, indices, x, y):
        grads = own_gradient(params, x, y)

        def whole(grads):
            return jax.lax.psum(grads, "data")

        def sparse(grads):
            return sx.psum_active(grads, None, COUNTS, "data", indices=indices)

        due = topology.in_accumulation_window(opt_state.step)
        grads = jax.lax.cond(due, whole, sparse, grads) if active else whole(grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        masks = sx.get_masks(opt_state)
        indices = jax.lax.cond(due, lambda: sx.active_indices(masks, COUNTS), lambda: indices)
        return optax.apply_updates(params, updates), opt_state, indices

    ends = []
    for active in (False, True):

        def one(*args, active=active):
            return step(active, *args)

        program = mapped(one, (SAME, SAME, SAME, OWN, OWN))
        state = sx.apply_masks(PARAMS, MASKS), tx.init(PARAMS), sx.active_indices(MASKS, COUNTS)
        for _ in range(5):
            state = program(*state, X, Y)
        ends.append(state)
    jax.tree.map(np.testing.assert_array_equal, *ends)
    moved = sx.mask_churn(sx.get_masks(ends[0][1]), MASKS).total
    assert moved > 0


def test_gradients_that_autodiff_has_summed_are_refused():
    """They would be summed again, and all that is saved would have been sent before."""

    def step(params, x, y):
        return sx.psum_active(jax.grad(loss)(params, x, y), MASKS, COUNTS, "data")

    with pytest.raises(ValueError, match=r"does not vary over data.*pcast\(params, 'data'"):
        mapped(step, (SAME, OWN, OWN))(PARAMS, X, Y)
    # Without shard_map's checks autodiff sums nothing, and types tell nothing.
    found = mapped(step, (SAME, OWN, OWN), check_vma=False)(PARAMS, X, Y)
    expected = jax.tree.map(lambda g, m: np.where(m, g, 0), jax.grad(loss)(PARAMS, X, Y), MASKS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_under_vmap_boxes_and_half_precision():
    """No mesh at all: an axis of vmap; gradients in the boxes of Flax."""
    state = nnx.state(nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), nnx.Param)
    masks = sx.init_masks(jax.random.key(0), state, sx.Uniform(0.5, dense_first=False))
    counts = sx.active_counts(masks)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), state)
    found = jax.vmap(
        lambda grads: sx.psum_active(grads, masks, counts, "x"), axis_name="x", out_axes=None
    )(two)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    expected = jax.tree.map(lambda leaf, mask: jnp.where(mask, 3 * leaf, 0), state, masks)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_arguments():
    mask = {"w": jnp.eye(3, dtype=bool)}
    for call, error, message in (
        (lambda: sx.active_counts({"w": jnp.eye(3)}), TypeError, "'w' must be a bool array"),
        (lambda: jax.jit(sx.active_counts)(mask), TypeError, "call it outside of jax.jit"),
        (lambda: sx.active_indices(mask, {"v": 3}), ValueError, "counts has 'v', masks have"),
        (lambda: sx.active_indices(mask, {"w": 2}), ValueError, "3 active weights, counts says 2"),
    ):
        with pytest.raises(error, match=message):
            call()

    def summed(masks, counts, **options):
        function = lambda g: sx.psum_active({"w": g}, masks, counts, "x", **options)  # noqa: E731
        return jax.vmap(function, axis_name="x")(jnp.ones((2, 3, 3)))

    with pytest.raises(ValueError, match="counts has v, grads have only w"):
        summed(mask, {"v": 3})
    with pytest.raises(ValueError, match=r"indices of 'w' have shape \(2,\), counts says 3"):
        summed(mask, {"w": 3}, indices={"w": jnp.arange(2)})
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), but its parameter has \(3, 3\)"):
        summed({"w": jnp.eye(2, dtype=bool)}, {"w": 2})
