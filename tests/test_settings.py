"""Numbers and flags in settings: Python's, NumPy's and JAX's, kept as Python's."""

import fractions

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sparseopt_jax as sx
from sparseopt_jax import models
from sparseopt_jax.diagnostics import hessian_top_eigenvalue

INTS = (np.int64, np.uint8, lambda n: np.array(n), lambda n: jnp.asarray(n, jnp.int32))
FLOATS = (np.float64, np.float32, ml_dtypes.bfloat16, lambda x: jnp.asarray(x), fractions.Fraction)
BOOLS = (np.bool_, lambda b: np.array(b), lambda b: jnp.asarray(b))

SHAPES = {"a/kernel": (20, 30), "b/kernel": (30, 40)}

# Makes of each value: of an int of 3, of a float of 0.5, or of a flag that is True.
OF_INT = {
    "interval": lambda n: sx.SET(n, 0.5, 100),
    "end_step": lambda n: sx.RigL(1, 0.5, n),
    "begin_step": lambda n: sx.RigL(1, 0.5, 100, begin_step=n),
    "accumulate_steps": lambda n: sx.RigL(10, 0.5, 100, accumulate_steps=n),
    "features": lambda n: models.MLP(features=(n, 8)),
    "num_classes": lambda n: models.ResNet20(num_classes=n),
    "stage_sizes": lambda n: models.ResNet((2, n)),
}
OF_FLOAT = {
    "drop_fraction": lambda x: sx.SET(10, x, 100),
    "Uniform": lambda x: sx.Uniform(x, overrides={"a": x}),
    "ER": lambda x: sx.ER(x, overrides={"a": x}),
    "ERK": lambda x: sx.ERK(x, overrides={"a": x}),
    "PerLayer": lambda x: sx.PerLayer({"a/*": x}),
}
OF_BOOL = {
    "SET": lambda b: sx.SET(10, 0.5, 100, skip_step=b),
    "RigL": lambda b: sx.RigL(10, 0.5, 100, skip_step=b),
    "dense_first": lambda b: sx.Uniform(0.5, dense_first=b),
}


@pytest.mark.parametrize(
    ("make", "value", "kinds"),
    [(make, 3, INTS) for make in OF_INT.values()]
    + [(make, 0.5, FLOATS) for make in OF_FLOAT.values()]
    + [(make, True, BOOLS) for make in OF_BOOL.values()],
    ids=[*OF_INT, *OF_FLOAT, *OF_BOOL],
)
def test_scalars_are_kept_as_python_numbers(make, value, kinds):
    expected = make(value)
    for kind in kinds:
        got = make(kind(value))
        assert got == expected
        assert repr(got) == repr(expected)
        assert hash(got) == hash(expected)


@pytest.mark.parametrize("integer", INTS)
def test_integers_in_functions(integer):
    mask = np.random.default_rng(0).random((4, 5, 6)) < 0.4
    expected = sx.fan_in(mask, (0, 2), 1)
    for axes in ((integer(0), integer(2)), np.array([0, 2]), jnp.asarray([0, 2])):
        np.testing.assert_array_equal(sx.fan_in(mask, axes, integer(1)), expected)
    assert sx.top_k_mask(jnp.arange(5.0), integer(2)).tolist() == [False] * 3 + [True] * 2
    assert int(sx.random_mask(jax.random.key(0), (5,), integer(2)).sum()) == 2
    hessian_top_eigenvalue(
        lambda w: jnp.sum(w**2), jnp.ones(3), jax.random.key(0), iterations=integer(1)
    )
    tx = sx.sparse_training(
        sx.sparseopt(0.1, out_axes={"*": integer(0)}),
        distribution=sx.ERK(0.5),
        topology=sx.Static(),
        seed=integer(3),
        out_axes=integer(0),
        automatic=np.True_,
    )
    assert tx.init({"w": jnp.ones((4, 6))}).fan_in["w"].shape == (4, 1)


def test_counts_of_numpy_sparsities():
    assert sx.ERK(np.float32(0.5)).layer_counts(SHAPES) == sx.ERK(0.5).layer_counts(SHAPES)
    assert type(sx.ERK(jnp.float32(0.5)).sparsity) is float


SQUARE = np.ones((2, 2), bool)
NO_SETTINGS = [
    (lambda x: sx.SET(x, 0.5, 100), "interval must be an int", (2.0, np.float32(2), True, "2")),
    (lambda x: sx.RigL(1, 0.5, x), "end_step must be an int", (np.ones(1, int), np.True_, None)),
    (lambda x: sx.RigL(1, x, 9), "drop_fraction must be a number in", (True, "0.5", 0.5j)),
    (sx.ERK, "sparsity must be a number in", (np.True_, np.array([0.5]), "0.5", None)),
    (lambda x: sx.ER(0.5, {"a": x}), r"overrides\['a'\] must be a number in", (None, np.ones(1))),
    (lambda x: sx.fan_in(SQUARE, x), "out_axes must be an int", (1.0, np.True_, None, SQUARE)),
    (lambda x: sx.SET(1, 0.5, 9, skip_step=x), "skip_step must be True or False", (1, np.int8(1))),
    (lambda x: sx.Uniform(0.5, x), "dense_first must be True, False or", (1, None, np.ones(1))),
    (lambda x: models.MLP(bn_groups=x), "bn_groups must be an int", (1.0, np.True_, "1")),
]


@pytest.mark.parametrize(("make", "message", "values"), NO_SETTINGS)
def test_what_is_no_such_scalar(make, message, values):
    for value in values:
        with pytest.raises(TypeError, match=message):
            make(value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: sx.ERK(x), "sparsity"),
        (lambda x: sx.PerLayer({"a": x}), r"sparsities\['a'\]"),
        (lambda x: sx.SET(x.astype(int), 0.5, 100), "interval"),
        (lambda x: sx.SET(1, x, 100), "drop_fraction"),
        (lambda x: sx.RigL(1, 0.5, 100, skip_step=x > 0), "skip_step"),
        (lambda x: sx.Uniform(0.5, dense_first=x > 0), "dense_first"),
        (lambda x: sx.fan_in(np.ones((2, 2), bool), x.astype(int)), "out_axes"),
        (lambda x: sx.fan_in(np.ones((2, 2), bool), x.astype(int)[None]), "out_axes"),
    ],
)
def test_traced_values_are_no_settings(make, name):
    def function(x):
        make(x)
        return x

    with pytest.raises(TypeError, match=f"{name} is traced.* static"):
        jax.jit(function)(0.5)


@pytest.mark.parametrize("name", ["interval", "end_step", "begin_step", "accumulate_steps"])
def test_more_steps_than_int32_counts(name):
    options = {"interval": 10, "drop_fraction": 0.5, "end_step": 2**31 - 1}
    assert not sx.RigL(**options).is_update_step(5)
    with pytest.raises(ValueError, match=f"{name} must be at most 2147483647, got 2147483648"):
        sx.RigL(**{**options, name: np.int64(2**31)})
