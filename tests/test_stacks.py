"""Layers in rows of one array: the same masks as in stacks, and tables worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from sparseopt_jax import layerwise
from sparseopt_jax.stacks import Layout, Rows

# A stack of three layers, small ones of several shapes, one of them exactly as wide as a row, one
# that is too large for the rows, and one of another dtype.
SHAPES = {
    "a": (3, 3, 4, 5),
    "b": (7, 11),
    "exact": (4, 32),
    "half": (6, 9),
    "large": (16, 40),
    "one": (1, 1),
    "stack": (3, 8, 5),
    "twin": (7, 11),
}
TOPOLOGIES = {
    "rigl": sx.RigL(1, 0.4, 100),
    "set": sx.SET(1, 0.4, 100),
    "sign": sx.SET(1, 0.4, 100, drop_by="sign"),
}


def inputs(kind):
    rng = np.random.default_rng(0)
    masks = {n: jnp.asarray(rng.random(s) < 0.4) for n, s in SHAPES.items()}
    masks["one"] = jnp.ones((1, 1), bool)

    def tree():
        drawn = {n: rng.normal(size=s) for n, s in SHAPES.items()}
        if kind == "ties":  # with zeros on both sides of the masks
            drawn = {n: x.round(0) for n, x in drawn.items()}
        return {
            n: jnp.asarray(x, jnp.bfloat16 if n == "half" else jnp.float32)
            for n, x in drawn.items()
        }

    params, scores = tree(), tree()
    if kind == "nan":
        scores["b"] = scores["b"].at[0, 0].set(jnp.nan)
    return masks, params, scores


@pytest.mark.parametrize("kind", ["normal", "ties", "nan"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_rows_and_stacks_give_the_same_masks(name, kind, monkeypatch):
    """Also under vmap; here with rows of 128 and leaves of up to 500 elements in them."""
    monkeypatch.setattr(layerwise, "_LARGEST_STACKED", 500)
    monkeypatch.setattr(layerwise, "_WIDTH", 128)
    trees = inputs(kind)

    def update(key):
        layers = sx.describe_layers(trees[0], batch_axes={"stack": 0})
        return TOPOLOGIES[name].update(key, 1, *trees, layers)

    keys = jax.random.split(jax.random.key(3), 2)
    stacked = jax.jit(jax.vmap(update))(keys)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = jax.jit(jax.vmap(lambda key: update(key)))(keys)
    text = jax.jit(lambda key: update(key)).lower(keys[0]).as_text()
    assert "x128xf32" in text  # the array of rows is there
    jax.tree.map(np.testing.assert_array_equal, rows, stacked)
    for n, mask in trees[0].items():
        assert (np.asarray(rows[n]) != np.asarray(mask)).any() == (
            n != "one" and not (kind == "nan" and n == "b")
        )


def test_without_jit_stacks_are_taken(monkeypatch):
    """Where each operation is compiled by itself there is nothing to gain."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    trees = inputs("normal")
    key = jax.random.key(0)
    eager = sx.RigL(1, 0.4, 100).update(key, 1, *trees)
    jitted = jax.jit(lambda key: sx.RigL(1, 0.4, 100).update(key, 1, *trees))(key)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_rows_by_hand():
    """A leaf of two layers of three elements, and a layer of five, in rows of four."""
    rows = Rows(((2, 3), (1, 5)), 4)
    assert rows.sizes == [3, 3, 5]
    assert rows.shape == (4, 4)
    array = rows.to_rows([jnp.arange(1, 7).reshape(2, 3, 1), jnp.arange(7, 12)])
    assert array.tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [7, 8, 9, 10], [11, 0, 0, 0]]
    first, second = rows.from_rows(array)
    assert first.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert second.tolist() == [[7, 8, 9, 10, 11]]
    layout = Layout(((2, 2, 2), rows.shape), (None, rows), (4, 0, 1, 2, 3))
    assert layout.sizes == [4, 4, 3, 3, 5]
    stack, own = layout.own(jnp.array([10, 20, 30, 40, 50]))
    assert stack.ravel().tolist() == [10, 20]
    assert own.ravel().tolist() == [30, 40, 50, 50]
    _, index = layout.indices(jnp.array([0, 0, 100, 200, 300], jnp.uint32))
    assert index[2:].tolist() == [[300, 301, 302, 303], [304, 305, 306, 307]]
    nothing, within = layout.within()
    assert nothing is None
    assert within.sum(1).tolist() == [3, 3, 4, 1]
    total = layout.total([jnp.array([1, 2]), jnp.array([3, 4, 5, 6])])
    assert total.tolist() == [1, 2, 3, 4, 11]
    key = jax.random.key(0)
    plain = Layout(((5, 1),), (None,)).random_words(key)
    np.testing.assert_array_equal(layout.random_words(key), plain[:, np.array([4, 0, 1, 2, 3])])
