"""Each line of the tables in docs/guides is run."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import sparseopt_jax as sx

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "guides" / "coming_from.md"
CELLS = [
    code
    for row in re.findall(r"^\| .* \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    for code in re.findall(r"`([^`]*sx\.[^`]*\(.*?)`", row)
    if "..." not in code
]


@pytest.fixture(scope="module")
def names():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 16, 12)) / 4},
        "hidden": {"kernel": jax.random.normal(keys[1], (16, 12)) / 4},
        "head": {"kernel": jax.random.normal(keys[2], (12, 8)) / 4},
    }

    def loss(params):
        hidden = jnp.tanh(jnp.ones((4, 16)) @ params["hidden"]["kernel"])
        for kernel in params["layers"]["kernel"]:
            hidden *= jnp.tanh(jnp.ones((4, 16)) @ kernel)
        return jnp.mean((hidden @ params["head"]["kernel"]) ** 2)

    return {
        "sx": sx, "jax": jax, "jnp": jnp, "optax": optax, "params": params, "loss": loss,
        "grads": jax.grad(loss)(params), "masks": jax.tree.map(lambda p: p > 0, params),
        "key": keys[0],
    }  # fmt: skip


def test_the_lines_are_found():
    assert len(CELLS) > 25
    assert all(f"sx.{name}" in " ".join(CELLS) for name in ("Prune", "ACDC", "NM", "keep_top_k"))


@pytest.mark.parametrize("code", CELLS)
@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it
def test_a_line_of_the_table(code, names):
    params, grads = names["params"], names["grads"]
    if code.startswith("sx."):
        result = eval(code, names)
        assert isinstance(result, str) or jax.tree.structure(result) == jax.tree.structure(params)
        return
    if code.startswith("optax."):
        tx = eval(code, names)
    else:
        tx = sx.sparse_training(optax.sgd(0.1), **eval(f"dict({code})", names))
    opt_state = tx.init(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    after = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    if not code.startswith("optax."):
        after, opt_state = sx.update_topology(tx, opt_state, after, grads)
        outside = jax.tree.map(lambda p, m: jnp.where(m, 0, p), after, sx.get_masks(opt_state))
        assert not any(leaf.any() for leaf in jax.tree.leaves(outside))
