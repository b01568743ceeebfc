"""Patterns over paths: in overrides, PerLayer and axes, against fnmatch and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt_jax as sx
from tests import oracles

# Pattern, the paths that it means, and others.
TABLE = [
    ("h[0]/w", ["h[0]/w"], ["h0/w", "h[1]/w", "h[0]/w/0"]),
    ("h[0]/*", ["h[0]/w", "h[0]/a/w"], ["h[1]/w", "h[00]/w"]),
    ("h[?]/w", ["h[0]/w", "h[1]/w"], ["h0/w", "h[10]/w"]),
    ("*[1].weight", [".layers[1].weight", ".heads[1].weight"], [".layers[0].weight"]),
    ("*['kernel']", ["['a']['kernel']"], ["['a']['bias']"]),
    ("h[[]0]/w", ["h[0]/w"], ["h[1]/w"]),
    ("layers[[][01]]/w", ["layers[0]/w", "layers[1]/w"], ["layers[2]/w"]),
    ("Dense_[01]/*", ["Dense_0/kernel", "Dense_1/kernel"], ["Dense_2/kernel"]),
    ("Dense_[!0]/*", ["Dense_1/kernel"], ["Dense_0/kernel"]),
    ("[", ["["], ["]", "a"]),
    ("a?[*", ["ab[c", "a/["], ["a[", "ab"]),
    ("", [""], ["a"]),
]


@pytest.mark.parametrize(("pattern", "meant", "others"), TABLE, ids=[row[0] for row in TABLE])
def test_patterns_mean_the_layers_that_they_name(pattern, meant, others):
    shapes = dict.fromkeys(others + meant, (10, 10))
    expected = {path: 20 if path in meant else 100 for path in shapes}
    assert sx.PerLayer({pattern: 0.8}).layer_counts(shapes) == expected
    uniform = sx.Uniform(0, dense_first=False, overrides={pattern: 0.8})
    assert uniform.layer_counts(shapes) == expected
    erk = sx.ERK(0.5, overrides={pattern: 0.8}).layer_counts(shapes)
    assert erk == {path: 20 if path in meant else 50 for path in shapes}
    for path in meant:
        check_axes(pattern, path, 0)


def check_axes(pattern, path, axis):
    """The fan-in at ``path`` under this pattern for its out axis is that along ``axis``."""
    mask = np.arange(12).reshape(3, 4) % 5 < 2
    for out_axes in ({pattern: 0}, {pattern: np.int64(-2), "*": 1}):
        tx = sx.sparse_training(
            sx.sparseopt(0.1), masks={path: mask}, topology=sx.Static(), out_axes=out_axes
        )
        count = tx.init({path: jnp.ones((3, 4))}).fan_in[path]
        np.testing.assert_array_equal(np.ravel(count), oracles.fan_in(mask, axis))


def test_the_first_pattern_that_matches_counts():
    shapes = {"h[0]/w": (10, 10), "h[1]/w": (10, 10)}
    patterns = {"h[0]/*": 0.5, "h*": 0.8, "h[1]/w": 0.9}
    assert sx.PerLayer(patterns).layer_counts(shapes) == {"h[0]/w": 50, "h[1]/w": 20}


def test_plain_patterns_are_those_of_fnmatch():
    paths = ["", "a", "a/b", "ab", "a/b/c", "A", "b.a", "Dense_0/kernel", "Dense_10/kernel"]
    for pattern in ["*", "a*", "?", "*/?", "a/*", "*b*", "Dense_?/*", "[ab]*", "[!a]*", "[a-c]"]:
        meant = [path for path in paths if oracles.matches(pattern, path)]
        shapes = dict.fromkeys(paths, (4, 4))
        counts = sx.PerLayer({pattern: 0.5}).layer_counts(shapes)
        assert [path for path, count in counts.items() if count == 8] == meant, pattern


def test_a_pattern_with_brackets_that_matches_nothing():
    with pytest.raises(
        ValueError, match=r"pattern 'h\[2\]/w' matches none of the layers: h\[0\]/w"
    ):
        sx.ERK(0.5, overrides={"h[2]/w": 0.1}).layer_counts({"h[0]/w": (4, 4)})
    tx = sx.sparse_training(
        sx.sparseopt(0.1),
        distribution=sx.ERK(0.5),
        topology=sx.Static(),
        batch_axes={"h[2]/w": 0},
    )
    with pytest.raises(
        ValueError, match=r"pattern 'h\[2\]/w' matches none of the leaves: h\[0\]/w"
    ):
        tx.init({"h[0]/w": jnp.ones((4, 4))})
