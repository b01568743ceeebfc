"""What the tests of the models share: shapes without computing, random variables, images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

KEY = jax.random.key(0)


def shapes(model, *input_shape):
    """The variables' shapes and dtypes as {path: ShapeDtypeStruct}, without computing them."""
    variables = jax.eval_shape(model.init, KEY, jnp.zeros(input_shape))
    return flatten_dict(variables, sep="/")


def random_variables(model, input_shape, seed=0):
    """Variables with every scale, bias and statistic away from 0 and 1; {path: NumPy array}."""
    rng = np.random.default_rng(seed)
    values = {}
    for path, leaf in shapes(model, *input_shape).items():
        kind = path.split("/")[-1]
        noise = rng.standard_normal(leaf.shape)
        if kind == "kernel":
            noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif kind in ("scale", "var"):
            noise = 0.5 + np.abs(noise)
        values[path] = noise.astype(np.float32)
    return values


def images(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def train_step(model):
    return jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
