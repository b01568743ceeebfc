"""Leaves in boxes, in other containers, left out: what fits, what does not, and what errors say."""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparseopt_jax as sx
from tests import oracles


@flax.struct.dataclass
class Labelled:
    """A box of one's own, with what it says of its value beside it."""

    value: Any
    label: str = flax.struct.field(pytree_node=False, default="")


@jax.tree_util.register_pytree_node_class
class Nameless:
    """A box whose keys have no names."""

    def __init__(self, inside):
        self.inside = inside

    def tree_flatten(self):
        return (self.inside,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Attention(NamedTuple):
    """No box: its ``value`` is one leaf among others."""

    query: Any
    value: Any


class Lonely(NamedTuple):
    """No box either, but a container with one leaf."""

    value: Any


WEIGHT, MASK = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3), np.eye(2, 3, dtype=bool)
EXPECTED = [[1, 0, 0], [0, 5, 0]]

BOXES = {
    "none": lambda x: x,
    "nnx.Param": nnx.Param,
    "nnx.Variable": nnx.Variable,
    "optimizer's": nnx.optimizer.OptVariable,
    "partitioned": lambda x: flax.linen.Partitioned(x, names=("a", None)),
    "own": lambda x: Labelled(x, "w"),
    "nameless": Nameless,
    "twice": lambda x: nnx.Param(Labelled(x)),
}


@pytest.mark.parametrize("outer", BOXES)
@pytest.mark.parametrize("inner", BOXES)
def test_any_box_fits_any_other(outer, inner):
    params = {"layers": [{"w": BOXES[outer](jnp.asarray(WEIGHT))}], "bias": jnp.ones(3)}
    masks = {"layers": ({"w": BOXES[inner](jnp.asarray(MASK))},), "bias": jnp.ones(3, bool)}
    sparse = sx.apply_masks(params, masks)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    assert jax.tree.leaves(sparse)[1].tolist() == EXPECTED
    assert "layers/0/w  " in sx.summary(params, masks)
    assert list(sx.fan_in_statistics(masks)) == ["layers/0/w"]


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_box_says_stays_with_its_value():
    """Masks keep the parameter's box; counts and packed sets have other shapes, and none."""
    params = {"kernel": Labelled(jnp.asarray(WEIGHT), "rows"), "bias": Labelled(jnp.ones(3), "b")}
    masks = {"kernel": MASK, "bias": np.ones(3, bool)}
    topology = sx.RigL(2, 0.5, 10, accumulate_steps=2)
    tx = sx.sparse_training(optax.adam(0.1), masks=masks, topology=topology)
    state = tx.init(params)
    assert state.activity["kernel"].label == state.accumulator["kernel"].label == "rows"
    assert state.inner_state[0].mu["kernel"].label == "rows"
    assert state.fan_in == {"kernel": state.fan_in["kernel"], "bias": optax.MaskedNode()}
    assert state.fan_in["kernel"].tolist() == [[1, 1, 0]]
    assert sx.get_explored(state)["kernel"].label == "rows"
    for i in range(4):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(i + p), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert updates["kernel"].label == "rows"
    mask = np.asarray(sx.get_masks(state)["kernel"].value)
    assert mask.sum() == 2
    np.testing.assert_array_equal(np.asarray(params["kernel"].value) != 0, mask)
    # A slot of a weight that is not active is at its initial value, box or no box.
    _, state = tx.update(grads, state, params)
    moment = np.asarray(state.inner_state[0].mu["kernel"].value)
    np.testing.assert_array_equal(moment != 0, np.asarray(sx.get_masks(state)["kernel"].value))


def test_a_value_among_others_keeps_its_name():
    params = {"a": Attention(jnp.ones((3, 4)), jnp.ones((3, 4))), "b": Lonely(jnp.ones((3, 4)))}
    masks = sx.init_masks(jax.random.key(0), params, sx.Uniform(0.5, dense_first=False))
    assert list(sx.fan_in_statistics(masks)) == ["a/query", "a/value", "b/value"]
    assert jax.tree.structure(masks) == jax.tree.structure(params)


def test_leaves_without_a_mask_stay_as_they_are():
    """None in Equinox's way, ``MaskedNode`` in optax's, also for a whole branch."""
    params = {"a": {"w": jnp.asarray(WEIGHT)}, "b": {"w": jnp.asarray(WEIGHT)}, "f": jnp.tanh}
    for nothing in (None, optax.MaskedNode()):
        masks = {"a": {"w": MASK}, "b": nothing, "f": nothing}
        sparse = sx.apply_masks(params, masks)
        assert sparse["a"]["w"].tolist() == EXPECTED
        assert sparse["b"]["w"] is params["b"]["w"]
        assert sparse["f"] is jnp.tanh
    # Masks of leaves that a part of the model has not.
    part = {"a": {"w": jnp.asarray(WEIGHT)}, "b": None, "f": None}
    masks = {"a": {"w": MASK}, "b": {"w": MASK}, "f": None}
    assert sx.apply_masks(part, masks)["a"]["w"].tolist() == EXPECTED


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": {"w": MASK}}, r"missing: b/w; not in params: none\. .*nnx.state\(model, nnx.Param"),
        ({"a": {"w": MASK}, "b": {"v": MASK}}, "missing: b/w; not in params: b/v"),
        ({"a": {"w": nnx.Param({"x": MASK})}, "b": {"w": MASK}}, "missing: a/w; .*: a/w/x"),
        ({"a": {"w": MASK}, "b": {"w": MASK.T}}, r"'b/w' has shape \(3, 2\), but"),
        (None, "masks must have the tree structure of params, got None"),
        ({"a": {"w": MASK}, "b": {"w": MASK}, "b/w": MASK}, "two leaves have the path 'b/w'"),
    ],
)
def test_what_differs_is_named(masks, message):
    params = {"a": {"w": nnx.Param(jnp.asarray(WEIGHT))}, "b": {"w": jnp.asarray(WEIGHT)}}
    for function in (sx.apply_masks, sx.summary, sx.scale_to_fan_in):
        with pytest.raises(ValueError, match=message):
            function(params, masks)
    with pytest.raises(ValueError, match=message):
        sx.check_masks(masks, params)


def test_a_state_is_given_what_init_was_given():
    params = {"a": {"w": jnp.asarray(WEIGHT)}, "b": jnp.ones(3)}
    tx = sx.sparse_training(optax.sgd(0.1), distribution=sx.ERK(0.5), topology=sx.Static())
    state = tx.init(params)
    with pytest.raises(ValueError, match="missing: none; not in params: c"):
        sx.set_masks(state, sx.get_masks(state) | {"c": MASK})
    with pytest.raises(ValueError, match="missing: b; not"):
        sx.set_masks(state, sx.get_masks(state) | {"b": None})
    with pytest.raises(ValueError, match="missing: c; not in params: none"):
        tx.update(params | {"c": jnp.ones(3)}, state, params)


def test_links_and_ham_take_a_whole_model():
    """Gradients are None where the model holds a function, as Equinox gives them."""
    params = {"w": nnx.Param(jnp.asarray(WEIGHT)), "f": jnp.tanh}
    grads = {"w": nnx.Param(jnp.asarray(np.cos(WEIGHT))), "f": None}
    masks = {"w": MASK, "f": None}
    links = optax.chain(
        sx.zero_inactive(), sx.scale_by_sparseopt(None), optax.scale(-1.0), sx.keep_params_masked()
    )
    updates, _ = links.update(grads, links.init(grads), params, masks=masks)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    factor = oracles.sparseopt_factors({"w": MASK}, None)["w"]
    expected = np.where(MASK, -factor * np.cos(WEIGHT), -WEIGHT)
    np.testing.assert_allclose(updates["w"].get_value(), expected, rtol=1e-6)
    # Without its multiplication HAM is the optimizer inside.
    ham, sgd = sx.ham(optax.sgd(0.5), 0.5, alpha=0, beta=0), optax.sgd(0.5)
    updates, _ = ham.update(grads, ham.init(grads), params)
    plain, _ = sgd.update(grads, sgd.init(grads), params)
    jax.tree.map(np.testing.assert_array_equal, updates, plain)
