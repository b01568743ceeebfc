"""What a config's optimizer does to a gradient, and how unequal masks are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt_jax as sx
from experiments import build
from experiments.config import Config

SHAPES = {"conv/kernel": (3, 3, 8, 16), "head/kernel": (16, 10)}


@pytest.fixture(scope="module")
def tree():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        path.split("/")[0]: {"kernel": jax.random.normal(key, shape)}
        for (path, shape), key in zip(SHAPES.items(), keys, strict=True)
    } | {"norm": {"scale": jnp.arange(16.0)}}


def first_update(config, params):
    """The first update without momentum or decay, at learning rate 1, and the masks."""
    options = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "schedule": "constant"}
    tx = build.make_optimizer(Config(topology="static", sparsity=0.8, **options, **config), 10)
    state = tx.init(params)
    masks = sx.get_masks(state)
    params = sx.apply_masks(params, masks)
    return jax.tree.map(jnp.negative, jax.jit(tx.update)(params, state, params)[0]), masks, params


def test_rescale_raw_norm_changes_the_direction_only(tree):
    plain, _, gradient = first_update({"optimizer": "sparseopt"}, tree)
    kept, _, _ = first_update({"optimizer": "sparseopt", "rescale": "raw_norm"}, tree)
    assert abs(optax.tree.norm(plain) / optax.tree.norm(gradient) - 1) > 1e-3
    np.testing.assert_allclose(optax.tree.norm(kept), optax.tree.norm(gradient), rtol=1e-5)
    ratio = optax.tree.norm(gradient) / optax.tree.norm(plain)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other * ratio, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "sparseopt"])
def test_rescale_unit_norm(tree, optimizer):
    scaled, _, _ = first_update({"optimizer": optimizer, "rescale": "unit_norm"}, tree)
    np.testing.assert_allclose(optax.tree.norm(scaled), 1.0, rtol=1e-5)


def test_correct_normalised_leaves_the_head_alone(tree):
    every, masks, gradient = first_update({"optimizer": "sparseopt"}, tree)
    some, _, _ = first_update({"optimizer": "sparseopt", "correct": "normalised"}, tree)
    np.testing.assert_array_equal(some["head"]["kernel"], gradient["head"]["kernel"])
    assert not np.array_equal(every["head"]["kernel"], gradient["head"]["kernel"])
    np.testing.assert_array_equal(some["conv"]["kernel"], every["conv"]["kernel"])
    fan_in = np.asarray(masks["conv"]["kernel"]).sum((0, 1, 2))
    expected = np.asarray(gradient["conv"]["kernel"]) * np.sqrt(fan_in / fan_in.mean())
    np.testing.assert_allclose(every["conv"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_unequal_masks_keep_the_count_and_spread_the_fan_in(spread):
    mask = np.zeros(64 * 256, bool)
    mask[: mask.size // 10] = True
    masks = {"sparse": jnp.asarray(mask.reshape(64, 256)), "dense": jnp.ones(5, bool)}
    drawn = jax.jit(build.unequal_masks)(masks, spread, jax.random.key(3))
    assert drawn["dense"].all()
    fan_in = np.asarray(drawn["sparse"]).sum(0)
    assert fan_in.sum() == mask.sum()
    # Hypergeometric where all weights are alike: variance 6.4 * 0.9. With a spread of 1, log-normal
    # weights have standard deviation over mean sqrt(e - 1) = 1.31, of which saturation takes some.
    relative = fan_in.std() / fan_in.mean()
    assert 0.32 < relative < 0.43 if spread == 0 else 0.9 < relative < 1.31


@pytest.mark.parametrize("optimizer", ["sgd", "sparseopt", "ham", "sparseopt_ham"])
def test_the_optimizers_are_the_library_s_recipes(tree, optimizer):
    """Bit for bit, over three steps."""
    config = Config(
        topology="static", sparsity=0.8, optimizer=optimizer, schedule="constant", ham_alpha=2.0,
        average_over="network", weight_decay=0.01,
    )  # fmt: skip
    options = {"momentum": 0.9, "weight_decay": 0.01, "average_over": "network"}
    sgd = optax.chain(
        optax.add_decayed_weights(0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.sgd(0.1, 0.9),
    )
    ham = {"alpha": 2.0, "beta": 1e-3}
    recipe = {
        "sgd": sgd,
        "sparseopt": sx.sparseopt(0.1, **options),
        "ham": sx.ham(sgd, 0.1, **ham),
        "sparseopt_ham": sx.sparseopt_ham(0.1, **options, **ham),
    }[optimizer]
    sparse = {"distribution": sx.ERK(0.8), "topology": sx.Static(), "seed": 0}
    found = []
    for tx in (build.make_optimizer(config, 10), sx.sparse_training(recipe, **sparse)):
        state = tx.init(tree)
        params = sx.apply_masks(tree, sx.get_masks(state))
        for _ in range(3):
            gradient = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        found.append(params)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)
