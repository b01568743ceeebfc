"""The gradient of a 3x3 kernel on a CPU, as XLA computes it and as products of blocks of the batch.

    python experiments/benchmarks/upstream_kernel_gradient.py

It needs jax alone, and prints processor-milliseconds: medians of calls that take turns.
"""

import statistics
import time

import jax
import jax.numpy as jnp


@jax.jit
def by_xla(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The transpose of the convolution in its kernel."""

    def convolve(kernel: jax.Array) -> jax.Array:
        layouts = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layouts)

    return jax.linear_transpose(convolve, jnp.zeros((3, 3, x.shape[3], dy.shape[3])))(dy)[0]


@jax.jit
def by_products(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of each block one product: three shifts of x across, times three of dy up and down."""
    (_, height, width, c_in), c_out, blocks = x.shape, dy.shape[3], 16

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x = jnp.pad(block[0], ((0, 0), (0, 0), (1, 1), (0, 0)))
        dy = jnp.pad(block[1], ((0, 0), (1, 1), (0, 0), (0, 0)))
        across = jnp.concatenate([x[:, :, i : i + width] for i in range(3)], 3)
        down = jnp.concatenate([dy[:, 2 - i : 2 - i + height] for i in range(3)], 3)
        return total + jnp.einsum("bhwi,bhwo->io", across, down), None

    in_blocks = jax.tree.map(lambda a: a.reshape(blocks, -1, *a.shape[1:]), (x, dy))
    total, _ = jax.lax.scan(add, jnp.zeros((3 * c_in, 3 * c_out)), in_blocks)
    return total.reshape(3, c_in, 3, c_out).transpose(2, 0, 1, 3)


if __name__ == "__main__":
    for batch, size, channels in ((128, 32, 16), (128, 16, 32), (128, 8, 64), (32, 28, 128)):
        x, dy = jax.random.normal(jax.random.key(0), (2, batch, size, size, channels))
        assert jnp.allclose(by_xla(x, dy), by_products(x, dy), rtol=1e-3, atol=1e-2)
        milliseconds: dict[str, list[float]] = {"by_xla": [], "by_products": []}
        for _ in range(15):
            for name, gradient in (("by_xla", by_xla), ("by_products", by_products)):
                begin = time.process_time()
                gradient(x, dy).block_until_ready()
                milliseconds[name].append(1e3 * (time.process_time() - begin))
        medians = {name: round(statistics.median(ms), 1) for name, ms in milliseconds.items()}
        print(f"batch {batch}, {size}x{size}, {channels} channels: {medians}", flush=True)
