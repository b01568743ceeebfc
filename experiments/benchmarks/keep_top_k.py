"""`keep_top_k` after AdamW, over AdamW alone: a training step of one block of a transformer.

    python -m experiments.benchmarks.keep_top_k [--batch_size=8] [--repeats=N] [--keep=SHARE]
        [--json=FILE]

The block is GPT-2's at a width of 1024: 12.6 M weights in four kernels, 16 heads, sequences of 256.
A step is its forward pass, the gradient, AdamW and the new weights; after it the sparse one has the
`--keep` largest of each kernel. Compiled once, with donated weights and state; steps take turns,
medians are of ratios. The optimizer's part is timed by itself as well, on gradients that are there.
By itself it takes a little longer than as part of a step, where the memory of its temporaries is
that of the backward pass.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparseopt_jax as sx
from experiments.benchmarks import measuring

WIDTH, HEADS, LENGTH = 1024, 16, 256
KERNELS = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}


def block(params: Any, x: jax.Array) -> jax.Array:
    """A block of GPT-2: attention and a perceptron, each behind a norm and beside a residual."""

    def norm(x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, axis=-1, epsilon=1e-5)

    query, key, value = (
        part.reshape(*x.shape[:2], HEADS, -1)
        for part in jnp.split(norm(x) @ params["qkv"], 3, axis=-1)
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + mixed.reshape(x.shape) @ params["out"]
    return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]


def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The squared distance of the block's outputs from others."""
    x, y = batch
    return jnp.mean(jnp.square(block(params, x) - y))


def optimizers(keep: float) -> dict[str, optax.GradientTransformation]:
    """The two."""
    kept = sx.keep_top_k(sx.Uniform(1 - keep, dense_first=False))
    return {
        "dense": optax.adamw(1e-3),
        "keep_top_k": optax.chain(optax.adamw(1e-3), kept),
    }


class Steps:
    """Compiled steps of one optimizer, and the weights and state that each replaces."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, batch: Any) -> None:
        """Compiles a whole step, and the optimizer's part of it."""
        update = measuring.update(tx)

        def whole(params: Any, state: Any, batch: Any) -> Any:
            return update(params, state, jax.grad(loss)(params, batch))

        self.params = jax.tree.map(jnp.copy, params)
        self._state = tx.init(self.params)
        self._batch = batch
        self._grads = jax.jit(jax.grad(loss))(params, batch)
        self._whole, self._update = (
            jax.jit(function, donate_argnums=(0, 1)) for function in (whole, update)
        )

    def step(self) -> Any:
        """A whole step; returns the new weights."""
        self.params, self._state = self._whole(self.params, self._state, self._batch)
        return self.params

    def update(self) -> Any:
        """The optimizer's part of a step, with gradients of the first weights."""
        self.params, self._state = self._update(self.params, self._state, self._grads)
        return self.params


def measure(batch_size: int, keep: float, repeats: int) -> dict[str, Any]:
    """Seconds and ratios; raises AssertionError where a kernel has another number of weights."""
    keys = jax.random.split(jax.random.key(0), len(KERNELS) + 2)
    params = {
        name: 0.02 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, KERNELS.items(), strict=False)
    }
    shape = batch_size, LENGTH, WIDTH
    batch = jax.random.normal(keys[-2], shape), jax.random.normal(keys[-1], shape)
    steps = {name: Steps(tx, params, batch) for name, tx in optimizers(keep).items()}
    result: dict[str, Any] = {"weights": sum(leaf.size for leaf in params.values())}
    of_part: dict[str, Callable[[Steps], Any]] = {"step": Steps.step, "update": Steps.update}
    for part, function in of_part.items():
        calls = {name: functools.partial(function, one) for name, one in steps.items()}
        seconds = measuring.alternating(calls, repeats)
        result[part] = {
            "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
            "ratio": measuring.median_ratio(seconds["keep_top_k"], seconds["dense"]),
        }
    for name, leaf in steps["keep_top_k"].params.items():
        kept, wanted = int(jnp.count_nonzero(leaf)), round(keep * leaf.size)
        assert kept == wanted, f"{name} has {kept} weights and is to have {wanted}"
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = measuring.parser("keep_top_k", "keep_top_k after AdamW, over AdamW alone.")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a step (8)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each (15)")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the weights (0.1)")
    argv = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(argv)
    if asked.batch_size < 1 or asked.repeats < 1 or not 0 < asked.keep < 1:
        parser.error("--batch_size and --repeats must be at least 1, and --keep in (0, 1)")
    result = measure(asked.batch_size, asked.keep, asked.repeats)
    print(f"{result['weights']:,} weights, {asked.batch_size} sequences of {LENGTH}")
    for part in ("step", "update"):
        medians = result[part]["median_seconds"]
        print(
            f"{part:>6}: {1e3 * medians['dense']:.1f} ms dense, {1e3 * medians['keep_top_k']:.1f}"
            f" ms with keep_top_k, ratio {result[part]['ratio']:.3f} (medians of {asked.repeats})"
        )
    measuring.append(asked, parser, argv, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
