"""Masks of the user beside a structure, how axes are split and counts rounded, and bad input."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import sparseopt_jax as sx

pytestmark = pytest.mark.usefixtures("standard_promotion")

# --- masks of the user ------------------------------------------------------------------------


def with_masks(masks, structure, topology=None):
    topology = sx.RigL(1, 0.5, 100) if topology is None else topology
    return sx.sparse_training(optax.sgd(0.1), masks=masks, topology=topology, structure=structure)


def test_given_masks_keep_pattern_and_counts():
    """Of a 1:4 mask beside a dense layer that does not fit; a fan-in with neurons left out."""
    params = {"nm": jnp.ones((8, 6)), "dense": jnp.ones((5, 3)), "fan": jnp.ones((9, 4))}
    masks = {
        "nm": jnp.asarray(np.arange(8)[:, None] % 4 == np.arange(6) % 4),
        "dense": jnp.ones((5, 3), bool),
        "fan": jnp.asarray(np.arange(9)[:, None] < [5, 0, 5, 5]),
    }
    structure = {"fan": sx.ConstantFanIn(ablate=0.01), "*": sx.NM(1, 4)}
    tx = with_masks(masks, structure)
    state = jax.jit(tx.init)(params)
    jax.tree.map(lambda m: m.delete(), masks)  # A copy is kept of what is needed.
    update = jax.jit(lambda g, s, p: tx.update(g, s, p)[1])
    for i in range(4):
        rng = np.random.default_rng(i)
        grads = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in params.items()}
        state = update(grads, state, sx.apply_masks(params, sx.get_masks(state)))
        new = sx.get_masks(state)
        assert (new["nm"].reshape(2, 4, 6).sum(1) == 1).all()
        assert new["dense"].all()
        fan_in = new["fan"].sum(0)
        left = int((fan_in > 0).sum())
        assert (fan_in[fan_in > 0] == 15 // left).all()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (sx.NM(2, 4), r"'w': NM\(n=2, m=4\) must keep 0.5 of the weights, 24 of 48, got 12"),
        (sx.NM(1, 4), r"pattern of NM\(n=1, m=4\): of each 4 between 0 and 4 are active"),
        (sx.Blocks((4, 2)), r"together are active in part; init_masks and masks_from_scores make"),
        (sx.Neurons(), "are active in part"),
        (sx.ConstantFanIn(), "of each 8 between 0 and 4 are active"),
        (sx.ConstantFanIn(ablate=0.5), "of each 8 between 2 and 4 are active"),
    ],
)
def test_given_masks_without_the_pattern(structure, message):
    tx = with_masks({"w": np.arange(8)[:, None] < [4, 4, 0, 2, 2, 0]}, structure)
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.ones((8, 6))})


@pytest.mark.parametrize("structure", [sx.NM(2, 4), sx.Blocks((2, 2)), sx.Neurons()], ids=str)
def test_an_update_gives_the_pattern_to_masks_that_could_not_be_looked_at(structure):
    """Traced ones; the number of weights is rounded as from a distribution."""
    mask = np.random.default_rng(0).permutation(48).reshape(8, 6) < 24
    params = {"w": jnp.arange(1.0, 49).reshape(8, 6)}

    @jax.jit
    def updated(mask):
        tx = with_masks({"w": mask}, structure)
        state = tx.init(params)._replace(step=jnp.int32(1))
        weights = sx.apply_masks(params, sx.get_masks(state))
        return sx.get_masks(tx.update(params, state, weights)[1])["w"]

    new = np.asarray(updated(mask))
    assert new.sum() == 24
    if isinstance(structure, sx.NM):
        assert (new.reshape(2, 4, 6).sum(1) == 2).all()
    elif isinstance(structure, sx.Blocks):
        assert np.isin(new.reshape(4, 2, 3, 2).sum((1, 3)), [0, 4]).all()
    else:
        assert np.isin(new.sum(0), [0, 8]).all()


# --- splits -----------------------------------------------------------------------------------


@st.composite
def splits(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(shape))] * 2)))
    return sx.Split(shape, tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]))


@settings(max_examples=15)
@given(splits(), st.integers(1, 3))
def test_arranged_and_restored_are_inverse(split, n):
    layers = np.arange(n * math.prod(split.shape)).reshape(n, -1)
    arranged = split.arranged(jnp.asarray(layers))
    assert arranged.shape == (n, *split.sizes)
    order = (*split.groups, *split.members, *split.weights)
    for layer, own in zip(layers, arranged, strict=True):
        parts = np.transpose(layer.reshape(split.shape), order)
        np.testing.assert_array_equal(own, parts.reshape(split.sizes))
    np.testing.assert_array_equal(split.restored(arranged, layers.shape[1:]), layers)
    # Of members alone each weight has that of its member.
    chosen = arranged[..., 0] % 2 == 0
    full = split.arranged(split.restored(chosen, layers.shape[1:]))
    np.testing.assert_array_equal(full, np.broadcast_to(chosen[..., None], full.shape))


@given(splits(), st.data())
def test_members_are_rounded_as_documented(split, data):
    groups, of_group, weights = split.sizes
    count = data.draw(st.integers(1, math.prod(split.shape)))
    found = split.members_of(count)
    kept = [groups * m * weights for m in range(1, of_group + 1)]
    if groups == 1:
        assert abs(kept[found - 1] - count) == min(abs(k - count) for k in kept)
    else:
        assert kept[found - 1] == max([k for k in kept if k <= count], default=kept[0])
    assert split.members_of(jnp.array([count]))[0] == found


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sx.NM(3, 2), ValueError, "n must be at most m=2, got 3"),
        (lambda: sx.NM(0, 2), ValueError, "n must be at least 1"),
        (lambda: sx.NM(2.0, 4), TypeError, "n must be an int"),
        (lambda: sx.Blocks(4), TypeError, r"shape must be a pair \(inputs, neurons\), got 4"),
        (lambda: sx.Blocks((4, 0)), ValueError, "shape must be at least 1"),
        (lambda: sx.ConstantFanIn(0), ValueError, "ablate must be positive and finite.*got 0"),
        (lambda: sx.ConstantFanIn(float("nan")), ValueError, "ablate must be positive.*got nan"),
        (lambda: sx.ConstantFanIn("0.3"), TypeError, "ablate must be a number, or None"),
        (lambda: sx.ConstantFanIn(0.3, 1), TypeError, "of_dense must be"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


HALF = sx.Uniform(0.5, dense_first=False)


@pytest.mark.parametrize(
    ("structure", "distribution", "message"),
    [
        (
            sx.NM(2, 4),
            HALF,
            r"structure of 'b': m=4 must divide axis 0, that of the inputs, of a kernel \(6, 4\): "
            "6 is no multiple of 4. Name the layers that it is for, structure=",
        ),
        (
            sx.NM(2, 3),
            sx.ERK(0.5),
            r"structure of '\w': NM\(n=2, m=3\) must keep 0.6667 of the weights, \d+ of \d+, got "
            r"\d+; Uniform\(1 - 2 / 3\) fits",
        ),
        (sx.NM(1, 2), sx.Global(0.5), r"'a': NM.* counts by scores; Uniform\(1 - 1 / 2\) fits"),
        (
            sx.Blocks((4, 4)),
            HALF,
            r"of 'b': Blocks\(shape=\(4, 4\)\) must divide axis 0, that of the inputs, of a kernel "
            r"\(6, 4\)",
        ),
        (sx.Blocks((2, 3)), HALF, r"divide axis 1, that of the neurons, of a kernel \(12, 8\)"),
        ({"c*": sx.NM(1, 2)}, HALF, r"structure pattern 'c\*' matches none of the layers: a, b"),
    ],
)
def test_patterns_that_do_not_fit(structure, distribution, message):
    params = {"a": jnp.ones((12, 8)), "b": jnp.ones((6, 4))}
    tx = sx.sparse_training(
        optax.sgd(0.1), distribution=distribution, topology=sx.Static(), structure=structure
    )
    for call in (
        lambda: tx.init(params),
        lambda: sx.init_masks(jax.random.key(0), params, distribution, structure=structure),
        lambda: sx.masks_from_scores(params, distribution, structure),
        lambda: sx.keep_top_k(distribution, structure=structure).init(params),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_no_structure():
    params = {"a": jnp.ones((12, 8))}
    masks = {"a": jnp.ones((12, 8), bool)}
    options = {"distribution": HALF, "topology": sx.Static()}
    for call in (
        lambda s: sx.sparse_training(optax.sgd(0.1), structure=s, **options),
        lambda s: sx.init_masks(jax.random.key(0), params, HALF, structure=s),
        lambda s: sx.masks_from_scores(params, HALF, s),
        lambda s: sx.keep_top_k(HALF, structure=s),
        lambda s: sx.describe_layers(masks, structure=s),
    ):
        for wrong in ("2:4", sx.NM, {"*": (2, 4)}):
            with pytest.raises(TypeError, match=r"structure must be a value such as NM\(2, 4\)"):
                call(wrong)
        with pytest.raises(TypeError, match="structure patterns must be strings, got 0"):
            call({0: sx.NM(2, 4)})


@pytest.mark.parametrize("structure", [sx.NM(2, 4), sx.Neurons()], ids=str)
def test_dropping_by_sign_goes_with_no_structure(structure):
    topology = sx.SET(1, 0.3, 10, drop_by="sign")
    with pytest.raises(ValueError, match="drop_by='sign' drops single weights by their sign"):
        sx.sparse_training(
            optax.sgd(0.1), distribution=HALF, topology=topology, structure=structure
        )
    trees = {"w": jnp.ones((8, 8), bool)}, {"w": jnp.ones((8, 8))}, {"w": jnp.ones((8, 8))}
    layers = sx.describe_layers(trees[0], structure=structure)
    with pytest.raises(ValueError, match=r"does not go with .* of 'w'; drop_by='magnitude' does"):
        topology.update(jax.random.key(0), 1, *trees, layers)
