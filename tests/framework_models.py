"""A small model of each framework, with what its users pass as params.

Each row of ``CASES`` states by hand which leaves are kernels, their shapes and which of their axes
index neurons. What a user of each framework has to do:

- Flax Linen, Haiku, plain containers, a FrozenDict: nothing, the params are arrays.
- Flax NNX: split off the ``nnx.Param`` variables. Paths are the same in an ``nnx.State`` of
  variables, a pure dict and ``nnx.Optimizer``.
- Equinox: give ``tx.init`` the arrays, ``eqx.filter(model, eqx.is_inexact_array)``, since a model
  also holds functions. Everything else takes the model.
- Attention without biases, in Flax: say ``out_axes``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def _data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6, 6, 1)).astype(np.float32)
    y = x.reshape(32, 36) @ rng.normal(size=(36, 3)) / 3
    return x, y.astype(np.float32)


X, Y = _data()


class Case(NamedTuple):
    """A model of one framework.

    Attributes:
      params: what its users pass to ``tx.init``.
      predict: ``(params, x) -> outputs (batch, 3)``, through the framework's own model.
      kernels: path -> (shape, axes that index neurons), by hand.
      dense: paths of all other leaves.
      out_axes: the setting that is to give those axes; None where they are to be found.
    """

    params: Any
    predict: Callable[[Any, Any], Any]
    kernels: dict[str, tuple[tuple[int, ...], Any]]
    dense: tuple[str, ...]
    out_axes: Any = None

    def loss(self, params):
        return jnp.mean((self.predict(params, X) - Y) ** 2)


def flat(tree):
    """{path: leaf} with what Flax's boxes hold in their place."""
    boxes = nnx.Variable | nn.meta.AxisMetadata
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: isinstance(node, boxes))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): inside
        for path, leaf in leaves
        for inside in (jax.tree.leaves(leaf) if isinstance(leaf, boxes) else [leaf])
    }


def arrays(tree):
    return {path: np.asarray(leaf) for path, leaf in flat(tree).items()}


# --- Flax Linen ------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=3, padding="VALID")(x)
        x = nn.tanh(nn.LayerNorm()(x)).reshape(len(x), -1)
        x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(3)(x)


LINEN_KERNELS = {
    "Conv_0/kernel": ((3, 3, 1, 6), -1),
    "Dense_0/kernel": ((24, 16), -1),
    "Dense_1/kernel": ((16, 3), -1),
}
LINEN_DENSE = (
    "Conv_0/bias",
    "LayerNorm_0/scale",
    "LayerNorm_0/bias",
    "Dense_0/bias",
    "Dense_1/bias",
)


def linen():
    net = LinenNet()
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    return Case(params, lambda p, x: net.apply({"params": p}, x), LINEN_KERNELS, LINEN_DENSE)


def frozen_dict():
    case = linen()
    return case._replace(params=flax.core.freeze(case.params))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x[..., 0]
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).reshape(len(x), -1))


# An attention's projections in Linen and in NNX: (embed, heads, head_dim), and out of it.
PROJECTIONS = ("query", "key", "value")
ATTENTION_KERNELS = {
    **{f"attention/{name}/kernel": ((6, 2, 4), (1, 2)) for name in PROJECTIONS},
    "attention/out/kernel": ((2, 4, 6), -1),
    "head/kernel": ((36, 3), -1),
}
ATTENTION_BIASES = (
    *(f"attention/{name}/bias" for name in (*PROJECTIONS, "out")),
    "head/bias",
)


def linen_attention():
    net = LinenAttention()
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    return Case(
        params,
        lambda p, x: net.apply({"params": p}, x),
        ATTENTION_KERNELS,
        (*ATTENTION_BIASES, "norm/scale", "norm/bias"),
        out_axes={f"*/{name}/kernel": (-2, -1) for name in PROJECTIONS},
    )


# --- Flax NNX --------------------------------------------------------------------------------


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 6, (3, 3), strides=3, padding="VALID", rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        # A dropout that is off: its random state is no parameter, and must stay out of params.
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(24, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.conv(x))).reshape(len(x), -1)
        return self.layers[1](self.dropout(nnx.tanh(self.layers[0](x))))


NNX_KERNELS = {
    "conv/kernel": ((3, 3, 1, 6), -1),
    "layers/0/kernel": ((24, 16), -1),
    "layers/1/kernel": ((16, 3), -1),
}
NNX_DENSE = ("conv/bias", "norm/scale", "norm/bias", "layers/0/bias", "layers/1/bias")


def _nnx(model, kernels, dense):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return Case(params, lambda p, x: nnx.merge(graphdef, p, rest)(x), kernels, dense)


def nnx_state():
    return _nnx(NNXNet(nnx.Rngs(0)), NNX_KERNELS, NNX_DENSE)


def nnx_pure_dict():
    case = nnx_state()
    return case._replace(params=nnx.to_pure_dict(case.params))


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=6, qkv_features=8, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x):
        x = x[..., 0]
        return self.head((x + self.attention(x)).reshape(len(x), -1))


def nnx_attention():
    return _nnx(NNXAttention(nnx.Rngs(0)), ATTENTION_KERNELS, ATTENTION_BIASES)


# --- Equinox ---------------------------------------------------------------------------------


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    layers: list
    activation: Callable
    side: int = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(1, 6, 3, stride=3, key=keys[0])
        self.norm = eqx.nn.GroupNorm(1, 6)
        # Without a bias the field is None, which is no leaf.
        self.layers = [
            eqx.nn.Linear(24, 16, key=keys[1]),
            eqx.nn.Linear(16, 3, use_bias=False, key=keys[2]),
        ]
        # A function is a leaf of the model, and no parameter.
        self.activation = jnp.tanh
        self.side = 6

    def __call__(self, x):
        x = self.activation(self.norm(self.conv(x.reshape(1, self.side, self.side)))).ravel()
        return self.layers[1](self.activation(self.layers[0](x)))


def _equinox(model, kernels, dense):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Case(params, predict, kernels, dense)


def equinox():
    kernels = {
        "conv/weight": ((6, 1, 3, 3), 0),
        "layers/0/weight": ((16, 24), 0),
        "layers/1/weight": ((3, 16), 0),
    }
    # The convolution's bias has three dimensions, (6, 1, 1).
    dense = ("conv/bias", "norm/weight", "norm/bias", "layers/0/bias")
    return _equinox(EquinoxNet(jax.random.key(0)), kernels, dense)


class EquinoxAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 6, use_query_bias=True, key=keys[0])
        self.norm = eqx.nn.LayerNorm((6, 6))
        self.head = eqx.nn.Linear(36, 3, key=keys[1])

    def __call__(self, x):
        x = x[..., 0]
        return self.head(self.norm(x + self.attention(x, x, x)).ravel())


def equinox_attention():
    names = ("query", "key", "value", "output")
    kernels = {f"attention/{name}_proj/weight": ((6, 6), 0) for name in names}
    kernels |= {"head/weight": ((3, 36), 0)}
    # This layer norm's weight has two dimensions; "norm" in its path tells it from a kernel.
    dense = ("attention/query_proj/bias", "norm/weight", "norm/bias", "head/bias")
    return _equinox(EquinoxAttention(jax.random.key(0)), kernels, dense)


# --- Haiku -----------------------------------------------------------------------------------


def haiku():
    def forward(x):
        x = hk.Conv2D(6, 3, stride=3, padding="VALID")(x)
        x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
        return hk.nets.MLP([16, 3], activation=jnp.tanh)(jnp.tanh(x).reshape(len(x), -1))

    net = hk.without_apply_rng(hk.transform(forward))
    kernels = {
        "conv2_d/w": ((3, 3, 1, 6), -1),
        "mlp/~/linear_0/w": ((24, 16), -1),
        "mlp/~/linear_1/w": ((16, 3), -1),
    }
    dense = (
        "conv2_d/b",
        "layer_norm/scale",
        "layer_norm/offset",
        "mlp/~/linear_0/b",
        "mlp/~/linear_1/b",
    )
    return Case(jax.jit(net.init)(jax.random.key(0), X), net.apply, kernels, dense)


# --- no framework ----------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def _multilayer_perceptron(params, x):
    (w0, b0), (w1, b1) = params
    return jax.nn.relu(x.reshape(len(x), -1) @ w0 + b0[None]) @ w1 + b1[None]


def _weights(*shapes):
    rng = np.random.default_rng(1)
    return [(rng.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for s in shapes]


def _plain(params, predict, names):
    w0, b0, w1, b1 = names
    return Case(params, predict, {w0: ((36, 16), -1), w1: ((16, 3), -1)}, (b0, b1))


def _layers():
    w0, w1 = map(jnp.asarray, _weights((36, 16), (16, 3)))
    return (w0, jnp.zeros(16)), (w1, jnp.zeros(3))


def plain_dict():
    params = {name: {"w": w, "b": b} for name, (w, b) in zip("io", _layers(), strict=True)}

    def predict(p, x):
        return _multilayer_perceptron(((p["i"]["w"], p["i"]["b"]), (p["o"]["w"], p["o"]["b"])), x)

    return _plain(params, predict, ("i/w", "i/b", "o/w", "o/b"))


def lists():
    params = [list(layer) for layer in _layers()]
    return _plain(params, _multilayer_perceptron, ("0/0", "0/1", "1/0", "1/1"))


def tuples():
    return _plain(_layers(), _multilayer_perceptron, ("0/0", "0/1", "1/0", "1/1"))


def named_tuples():
    params = tuple(Layer(*layer) for layer in _layers())
    names = ("0/kernel", "0/bias", "1/kernel", "1/bias")
    return _plain(params, _multilayer_perceptron, names)


def numpy_arrays():
    """Weights as they come from a file: NumPy arrays go in, jax arrays come out."""
    case = named_tuples()
    return case._replace(params=jax.tree.map(np.asarray, case.params))


def single_array():
    (w,) = _weights((36, 3))
    return Case(
        jnp.asarray(w), lambda p, x: x.reshape(len(x), -1) @ p, {"": ((36, 3), -1)}, dense=()
    )


CASES = (
    linen,
    linen_attention,
    frozen_dict,
    nnx_state,
    nnx_pure_dict,
    nnx_attention,
    equinox,
    equinox_attention,
    haiku,
    plain_dict,
    lists,
    tuples,
    named_tuples,
    numpy_arrays,
    single_array,
)
