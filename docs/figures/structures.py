"""Draws structures.png: which weights of one kernel each structure keeps."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import sparseopt_jax as sx

SIZE, SPARSITY = 16, 0.5
STRUCTURES = {
    "no structure": None,
    "NM(2, 4)": sx.NM(2, 4),
    "Blocks((4, 2))": sx.Blocks((4, 2)),
    "Neurons()": sx.Neurons(),
    "ConstantFanIn()": sx.ConstantFanIn(),
}


def masks():
    """The mask of each structure: half of the weights of one random kernel, by magnitude."""
    kernel = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    half = sx.Uniform(SPARSITY, dense_first=False)
    return {
        name: np.asarray(sx.masks_from_scores({"kernel": abs(kernel)}, half, structure)["kernel"])
        for name, structure in STRUCTURES.items()
    }


def figure():
    """Above, the masks; below, how many weights each neuron has left."""
    drawing = Figure(figsize=(10, 3.1), layout="constrained")
    drawing.suptitle("In which pattern: half of a 16 x 16 kernel (blue: active)")
    rows = drawing.subplots(
        2, len(STRUCTURES), sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    for (name, mask), above, below in zip(masks().items(), *rows, strict=True):
        above.pcolormesh(mask, cmap="Blues", vmin=0, vmax=1.3, edgecolor="white", linewidth=0.4)
        above.set(title=name, aspect="equal", ylim=(SIZE, 0), xticks=[], yticks=[])
        below.bar(np.arange(SIZE) + 0.5, mask.sum(axis=0), color="#0072B2", width=0.8)
        below.set(xlabel="neuron", ylim=(0, SIZE), yticks=[0, SIZE // 2, SIZE])
        below.spines[["top", "right"]].set_visible(False)
    rows[0, 0].set_ylabel("input")
    rows[1, 0].set_ylabel("fan-in")
    return drawing


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"), dpi=120)
