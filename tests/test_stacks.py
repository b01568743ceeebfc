"""Leaves by turns in the rows of one array: the masks of stacks, and tables worked by hand."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from sparseopt_jax import bins, layerwise
from sparseopt_jax.outlining import outlined
from sparseopt_jax.stacks import Stacked

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
# With as many weights for each layer as a density schedule says.
PLANNED = {"gmp": sx.Prune(1, 100), "granet": sx.RigL(1, 0.4, 100)}


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
@pytest.mark.parametrize("name", [*TOPOLOGIES, *PLANNED])
def test_rows_and_stacks_give_the_same_masks(name, kind, monkeypatch):
    """Also under vmap; here with bins of two rows of 128, and one leaf too large for them."""
    monkeypatch.setattr(layerwise, "_LARGEST_STACKED", 500)
    monkeypatch.setattr(layerwise, "_LARGEST_IN_BINS", 500)
    monkeypatch.setattr(bins, "_WIDTH", 128)
    monkeypatch.setattr(bins, "_HEIGHT", 2)
    trees = inputs(kind)

    def update(key):
        layers = sx.describe_layers(trees[0], batch_axes={"stack": 0})
        if name in PLANNED:
            layers = {
                n: dataclasses.replace(layer, planned=layer.count(trees[0][n]) * 3 // 4)
                for n, layer in layers.items()
            }
        return (TOPOLOGIES | PLANNED)[name].update(key, 1, *trees, layers)

    keys = jax.random.split(jax.random.key(3), 2)
    stacked = jax.jit(jax.vmap(update))(keys)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = jax.jit(jax.vmap(lambda key: update(key)))(keys)
    text = jax.jit(lambda key: update(key)).lower(keys[0]).as_text()
    assert "x128xf32" in text  # the array of rows is there
    jax.tree.map(np.testing.assert_array_equal, rows, stacked)
    for n, mask in trees[0].items():
        stays = kind == "nan" and n == "b" and name != "gmp"  # which reads no gradient
        changed = (np.asarray(rows[n]) != np.asarray(mask)).any()
        assert changed == (not stays and (n != "one" or name in PLANNED))
        if name in PLANNED and not stays:
            wanted = 3 * np.asarray(mask).sum(axis=(1, 2) if n == "stack" else None) // 4
            found = np.asarray(rows[n]).reshape(2, *([3, -1] if n == "stack" else [-1]))
            np.testing.assert_array_equal(found.sum(axis=-1), [wanted, wanted])


def test_without_jit_stacks_are_taken(monkeypatch):
    """Where each operation is compiled by itself there is nothing to gain."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    trees = inputs("normal")
    key = jax.random.key(0)
    eager = sx.RigL(1, 0.4, 100).update(key, 1, *trees)
    jitted = jax.jit(lambda key: sx.RigL(1, 0.4, 100).update(key, 1, *trees))(key)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_bins_by_hand(monkeypatch):
    """Rows of four: a leaf of two layers of three elements, one of five elements, one of ten."""
    monkeypatch.setattr(bins, "_WIDTH", 4)
    monkeypatch.setattr(bins, "_HEIGHT", 1)
    leaves = [
        jnp.arange(1, 7).reshape(2, 3, 1),
        jnp.arange(7, 12)[None],
        jnp.arange(12, 22).reshape(1, 2, 5),
    ]
    order = [[4, 5], [6], [7]]
    seen = []

    def function(layout, numbers, first, second):
        """Ten times the number of the layer's words, the index in it, and what is there."""
        assert (layout.drawn, layout.width) == (8, 4)
        (number,), (index,) = layout.own(layout.order), layout.indices(jnp.uint32(0))
        (within,), total = layout.within(), layout.total([first.sum(1)])
        seen.append(jax.typeof(first).shape)
        jax.debug.callback(lambda *x: seen.append([y.tolist() for y in x]), first, within, total)
        return jnp.where(within, 1000 * number + 100 * index.astype(int) + second, -1)

    found = bins.in_bins(function, [leaves, leaves], order, 8)
    jax.effects_barrier()
    assert [leaf.tolist() for leaf in found] == [
        [[[4001], [4102], [4203]], [[5004], [5105], [5206]]],
        [[6007, 6108, 6209, 6310, 6411]],
        [[[7012, 7113, 7214, 7315, 7416], [7517, 7618, 7719, 7820, 7921]]],
    ]
    # The largest leaf makes the bins, of three rows; the others take the next two.
    shape, largest, second, third = seen
    assert shape == (3, 4)
    assert largest[0] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 0, 0]]
    assert second[0] == [[1, 2, 3, 0], [4, 5, 6, 0], [0, 0, 0, 0]]
    assert third[0] == [[7, 8, 9, 10], [11, 0, 0, 0], [0, 0, 0, 0]]
    assert [sum(map(sum, within)) for _, within, _ in (largest, second, third)] == [10, 6, 5]
    assert [total for *_, total in (largest, second, third)] == [[165, 0], [6, 15], [45, 0]]


def test_layers_keep_their_random_words():
    key = jax.random.key(0)
    words = Stacked.of((4, 3), (1, 2, 2)).random_words(key)
    assert words.shape == (2, 5)
    own = Stacked(((2, 2, 2),), 5, (4, 0)).random_words(key)
    np.testing.assert_array_equal(own, words[:, np.array([4, 0])])


def test_outlined_calls_have_the_same_kernels():
    """Of which a CPU's compiler makes one; inlined, each has its own constant."""

    def row(array, i):
        return 3 * array[i] + 1

    def kernels(function):
        rows = jax.jit(lambda array: [function(array, i) for i in range(4)])
        text = rows.lower(jnp.ones((4, 5))).compile().as_text()
        bodies = re.findall(r"^%\S*fused_computation\S* [^{]*\{\n(.*?)^\}", text, re.M | re.S)
        return {re.sub(r"%[^\s,()]+|, metadata=\{.*?\}", "", body) for body in bodies}

    assert len(kernels(row)) == 4
    assert len(kernels(partial(outlined, row))) == 1
    array = jnp.arange(20.0).reshape(4, 5)
    assert outlined(row, array, 2).tolist() == row(array, 2).tolist()
