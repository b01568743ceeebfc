"""Which axes index neurons where nothing is said: against what layers compute, and by hand."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from tests import oracles
from tests.framework_models import flat

KEY = jax.random.key(0)


def fan_in_at_init(params, **settings):
    """By path, the active fan-in that ``sparse_training`` counts of random masks, and the masks."""
    tx = sx.sparse_training(
        optax.sgd(0.1),
        distribution=sx.Uniform(0.4, dense_first=False),
        topology=sx.Static(),
        prunable=lambda path, leaf: leaf.ndim >= 2 and "bias" not in path,
        **settings,
    )
    state = tx.init(params)
    return flat(state.fan_in), flat(sx.get_masks(state))


# --- against what layers compute -------------------------------------------------------------

# Each with an input of ones that just fills one window, so that with a kernel of zeros and ones a
# neuron's output is its number of active incoming weights.
EQUINOX_LAYERS = {
    "linear": (eqx.nn.Linear(7, 5, use_bias=False, key=KEY), (7,)),
    "linear_with_bias": (eqx.nn.Linear(7, 5, key=KEY), (7,)),
    "square": (eqx.nn.Linear(6, 6, key=KEY), (6,)),
    "conv": (eqx.nn.Conv2d(4, 5, (3, 2), use_bias=False, key=KEY), (4, 3, 2)),
    "conv_with_bias": (eqx.nn.Conv2d(3, 3, 3, key=KEY), (3, 3, 3)),
    "grouped": (eqx.nn.Conv1d(4, 6, 3, groups=2, use_bias=False, key=KEY), (4, 3)),
    "depthwise": (eqx.nn.Conv1d(4, 4, 3, groups=4, key=KEY), (4, 3)),
    "transposed": (eqx.nn.ConvTranspose1d(4, 5, 3, padding="SAME", key=KEY), (4, 9)),
}


@pytest.mark.parametrize("name", EQUINOX_LAYERS)
def test_equinox_layers(name):
    layer, shape = EQUINOX_LAYERS[name]
    counts, masks = fan_in_at_init(eqx.filter(layer, eqx.is_inexact_array))
    layer = eqx.tree_at(lambda m: m.weight, layer, jnp.float32(masks["weight"]))
    if layer.bias is not None:
        layer = eqx.tree_at(lambda m: m.bias, layer, jnp.zeros_like(layer.bias))
    output = np.asarray(layer(jnp.ones(shape)))
    if name == "transposed":
        output = output[:, 4]  # in the middle, where the whole window reaches
    assert counts["weight"].shape == (len(output),) + (1,) * (masks["weight"].ndim - 1)
    np.testing.assert_array_equal(counts["weight"].ravel(), output.ravel())


FLAX_LAYERS = {
    "dense": (nn.Dense(5), (7,)),
    "conv": (nn.Conv(3, (3,), padding="VALID"), (1, 3, 3)),
    "dense_general": (nn.DenseGeneral((2, 3)), (6,)),
    "dense_general_in": (nn.DenseGeneral(5, axis=(-2, -1)), (5, 3)),
    "transposed_kernel": (
        nn.ConvTranspose(5, (3,), padding="SAME", transpose_kernel=True),
        (1, 9, 4),
    ),
}


@pytest.mark.parametrize("name", FLAX_LAYERS)
def test_flax_layers_with_their_bias(name):
    module, shape = FLAX_LAYERS[name]
    params = module.init(KEY, jnp.ones(shape))["params"]
    counts, masks = fan_in_at_init(params)
    params = {"kernel": jnp.float32(masks["kernel"]), "bias": params["bias"]}
    output = np.asarray(module.apply({"params": params}, jnp.ones(shape)))
    if name == "transposed_kernel":
        output = output[0, 4]
    np.testing.assert_array_equal(counts["kernel"].ravel(), output.ravel())


def test_recurrent_cells_of_equinox():
    counts, masks = fan_in_at_init(eqx.filter(eqx.nn.LSTMCell(3, 5, key=KEY), eqx.is_array))
    assert {path: count.shape for path, count in counts.items()} == {
        "weight_ih": (20, 1),
        "weight_hh": (20, 1),
    }
    np.testing.assert_array_equal(counts["weight_hh"][:, 0], masks["weight_hh"].sum(1))


def test_a_stack_of_equinox_layers():
    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(7, 5, key=key))(jax.random.split(KEY, 3))
    counts, masks = fan_in_at_init(eqx.filter(stacked, eqx.is_array), batch_axes=0)
    np.testing.assert_array_equal(counts["weight"][..., 0], masks["weight"].sum(2))


# --- by hand ---------------------------------------------------------------------------------


def ones(*shape):
    return jnp.ones(shape)


class OutIn(eqx.Module):
    """A module of one's own without a bias, in Equinox's convention."""

    weight: jax.Array


BY_HAND = {
    # PyTorch's names, as dictionaries or joined by dots.
    "torch": ({"fc": {"weight": ones(5, 7), "bias": ones(5)}}, {"fc/weight": (5, 1)}),
    "dots": (
        # Nothing tells of the square kernel and the convolution but the kernel beside them.
        {
            "fc.weight": ones(5, 7),
            "fc.bias": ones(5),
            "square.weight": ones(6, 6),
            "square.bias": ones(6),
            "conv.weight": ones(4, 3, 2, 2),
        },
        {"fc.weight": (5, 1), "square.weight": (6, 1), "conv.weight": (4, 1, 1, 1)},
    ),
    "jax's own": (
        # Pairs of (out, in) and (out,), as in the tutorial that multiplies jnp.dot(w, x) + b.
        [(ones(6, 7), ones(6)), (ones(6, 6), ones(6)), (ones(2, 6), ones(2))],
        {"0/0": (6, 1), "1/0": (6, 1), "2/0": (2, 1)},
    ),
    "w": ({"w": ones(5, 7), "b": ones(5)}, {"w": (5, 1)}),
    "in, out": (
        {"a": {"weight": ones(7, 5), "bias": ones(5)}, "b": {"weight": ones(4, 4)}},
        {"a/weight": (1, 5), "b/weight": (1, 4)},
    ),
    "equinox": ({"a": OutIn(ones(5, 7))}, {"a/weight": (5, 1)}),
    "one neuron": ({"w": ones(1, 7), "b": ones(1)}, {"w": (1, 1)}),
    # No evidence: a layer that is called b, a bias beside two kernels, and one of another name.
    "names": ({"w": ones(8, 4), "b": ones(4, 8)}, {"w": (1, 4), "b": (1, 8)}),
    "several": (
        {"w": ones(8, 4), "kernel": ones(4, 8), "bias": ones(8)},
        {"w": (1, 4), "kernel": (1, 8)},
    ),
    "scale": ({"kernel": ones(5, 7), "scale": ones(5)}, {"kernel": (1, 7)}),
    "stack": ({"kernel": ones(5, 7), "bias": ones(5, 7)}, {"kernel": (1, 7)}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_axes_by_hand(name):
    params, expected = BY_HAND[name]
    counts, masks = fan_in_at_init(params)
    assert {path: count.shape for path, count in counts.items()} == expected
    for path, count in counts.items():
        axes = tuple(i for i, size in enumerate(expected[path]) if size == 1)
        np.testing.assert_array_equal(count, masks[path].sum(axes, keepdims=True), err_msg=path)


def test_what_is_said_goes_before_what_is_found():
    params = {"a": {"weight": ones(5, 7), "bias": ones(5)}, "b": {"weight": ones(5, 7)}}
    for out_axes, expected in (
        (-1, {"a/weight": (1, 7), "b/weight": (1, 7)}),
        ({"a/*": -1, "b/*": 0}, {"a/weight": (1, 7), "b/weight": (5, 1)}),
        # Of the other kernel the tree tells.
        ({"b/*": -1}, {"a/weight": (5, 1), "b/weight": (1, 7)}),
    ):
        counts, _ = fan_in_at_init(params, out_axes=out_axes)
        assert {path: count.shape for path, count in counts.items()} == expected, out_axes


def test_a_weight_of_unknown_layout_is_warned_of_once_and_never_on_a_step():
    params = {"fc": {"weight": ones(5, 7)}, "norm": {"weight": ones(7)}}
    with pytest.warns(UserWarning, match=r"out_axes: .* of 'fc/weight' \(5x7\).*out_axes=0"):
        sx.fan_in_statistics(jax.tree.map(lambda p: p > 0, params))
    tx = sx.sparse_training(
        sx.sparseopt(0.1), distribution=sx.ERK(0.5), topology=sx.RigL(1, 0.3, 9)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(params)
        assert len(caught) == 1
        _, state = tx.update(params, state, params)
        sx.set_masks(state, sx.get_masks(state))
        assert len(caught) == 1
    for out_axes in (0, -1, {"fc/*": 0}):
        fan_in_at_init(params, out_axes=out_axes)  # Warnings are errors here.


@pytest.mark.parametrize("average_over", ["layer", "network", None])
def test_the_correction_takes_the_axes_of_sparse_training(average_over):
    """Said once, outside; a setting of its own goes before."""
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < 0.5
    params = {"k": jnp.float32(np.where(mask, rng.normal(size=(5, 7)), 0))}
    for outer, inner, axis in ((0, None, 0), (-1, None, -1), (0, -1, -1), (None, {"k": 0}, 0)):
        tx = sx.sparse_training(
            optax.chain(sx.scale_by_sparseopt(average_over, inner), optax.scale(-1.0)),
            masks={"k": mask},
            topology=sx.Static(),
            out_axes=outer,
        )
        updates, _ = tx.update(params, tx.init(params), params)
        factor = oracles.sparseopt_factors({"k": mask}, average_over, axis)["k"]
        np.testing.assert_allclose(updates["k"], -params["k"] * factor, rtol=1e-6)


def test_a_bias_that_optax_hides_still_tells():
    params = {"weight": ones(5, 7), "bias": ones(5)}
    masks = {"weight": np.random.default_rng(0).random((5, 7)) < 0.5, "bias": np.ones(5, bool)}
    tx = optax.masked(sx.scale_by_sparseopt(), {"weight": True, "bias": False})
    updates, _ = tx.update(params, tx.init(params), masks=masks)
    factor = oracles.sparseopt_factors({"w": masks["weight"]}, "layer", 0)["w"]
    np.testing.assert_allclose(updates["weight"], np.broadcast_to(factor, (5, 7)), rtol=1e-6)


def test_distributions_see_window_in_and_out_whatever_the_layout():
    """ER leaves out the window, and Uniform's first layer has the fewest inputs."""
    flax = {"a": {"kernel": ones(3, 3, 1, 6), "bias": ones(6)}, "b": {"kernel": ones(2, 5, 4, 8)}}
    torch = {
        "a": {"weight": ones(6, 1, 3, 3), "bias": ones(6)},
        "b": {"weight": ones(8, 4, 2, 5)},
    }

    def counts(params, distribution, **settings):
        masks = sx.init_masks(KEY, params, distribution, **settings)
        return [int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim > 1]

    for distribution in (sx.ER(0.6), sx.Uniform(0.6), sx.ERK(0.6)):
        assert counts(flax, distribution) == counts(torch, distribution), distribution
    assert counts(torch, sx.ER(0.6), out_axes=0) == counts(flax, sx.ER(0.6))
    assert counts(torch, sx.ER(0.6), out_axes=-1) != counts(flax, sx.ER(0.6))
