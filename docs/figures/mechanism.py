"""Draws mechanism.png: what batch normalisation does to the gradients of a sparse layer.

512 inputs, 64 neurons with densities from 0.02 to 1, batch 4096, batch normalisation, ReLU and a
linear readout, before the first step; each neuron's gradient over its active weights, in proportion
to that of the dense network with the same weights.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import sparseopt_jax as sx

INPUTS, NEURONS, BATCH, CLASSES = 512, 64, 4096, 10
LOOKS = {"raw": ("#D55E00", "o"), "corrected by SparseOpt": ("#0072B2", "s")}


def gradients():
    """The mask (inputs, neurons), the kernel's gradient, raw and corrected, and the dense one."""
    rng = np.random.default_rng(0)
    fan_in = np.round(np.linspace(0.02, 1, NEURONS) * INPUTS)
    mask = np.argsort(rng.random((INPUTS, NEURONS)), axis=0) < fan_in
    x, kernel, readout, teacher = (
        rng.normal(size=shape, scale=std).astype(np.float32)
        for shape, std in (
            ((BATCH, INPUTS), 1),
            ((INPUTS, NEURONS), (2 / INPUTS) ** 0.5),
            ((NEURONS, CLASSES), (1 / NEURONS) ** 0.5),
            ((INPUTS, CLASSES), 1),
        )
    )
    labels = (x @ teacher).argmax(axis=1)

    @jax.jit
    @jax.grad
    def gradient(kernel):
        normalised = jax.nn.standardize(x @ kernel, axis=0, epsilon=1e-5)
        logits = jax.nn.relu(normalised) @ readout
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    raw = {"kernel": gradient(np.where(mask, kernel, np.float32(0)))}
    tx = sx.scale_by_sparseopt()
    corrected, _ = tx.update(raw, tx.init(raw), masks={"kernel": mask})
    return mask, *map(np.asarray, (raw["kernel"], corrected["kernel"], gradient(kernel)))


def over_dense():
    """Fan-in (neurons,), and the norms of both gradients over the dense network's, by name."""
    mask, *each = gradients()
    raw, corrected, dense = (np.sqrt((np.where(mask, g, 0) ** 2).sum(axis=0)) for g in each)
    return mask.sum(axis=0), dict(zip(LOOKS, (raw / dense, corrected / dense), strict=True))


def figure():
    """A point a neuron, and what theory expects of them: no line is fitted."""
    fan_in, ratios = over_dense()
    drawing = Figure(figsize=(7, 3.4), layout="constrained")
    axes = drawing.subplots()
    theory = ((INPUTS / fan_in) ** 0.5, np.full(NEURONS, (INPUTS / fan_in.mean()) ** 0.5))
    for name, expected in zip(LOOKS, theory, strict=True):
        colour, marker = LOOKS[name]
        axes.plot(fan_in, expected, color=colour, lw=1)
        axes.plot(fan_in, ratios[name], marker, color=colour, ms=4, label=name)
    axes.set_title("Behind batch norm, neurons with few weights get large gradients", size="medium")
    axes.set(
        xlabel="fan-in: active incoming weights of the neuron, of 512",
        ylabel="gradient, sparse over dense",
        xscale="log",
        yscale="log",
        xticks=[10, 20, 50, 100, 200, 500],
        yticks=[1, 2, 5],
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(frameon=False, title="lines: theory")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"), dpi=120)
