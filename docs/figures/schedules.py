"""Draws schedules.png: the density of a layer over the steps, by schedule."""

from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import sparseopt_jax as sx

STEPS, DENSE, SPARSE = 1000, 1000, 100
SCHEDULES = {
    "Cubic(100, 700)": sx.Cubic(100, 700),
    "Linear(100, 700)": sx.Linear(100, 700),
    "OneShot(400)": sx.OneShot(400),
    "ACDC(100, 700)": sx.ACDC(interval=100, end_step=700).own_schedule,
}


def density(schedule):
    """The share of a layer's weights that are active, at each step."""
    counts = jax.vmap(schedule.count_at, (0, None, None))(np.arange(STEPS + 1), DENSE, SPARSE)
    return np.asarray(counts) / DENSE


def figure():
    """A panel a schedule; the layer is dense at first and keeps a tenth in the end."""
    drawing = Figure(figsize=(10, 2.6), layout="constrained")
    drawing.suptitle("How much over time: from dense to a tenth of the weights")
    panels = drawing.subplots(1, len(SCHEDULES), sharey=True)
    for axes, (name, schedule) in zip(panels, SCHEDULES.items(), strict=True):
        share = density(schedule)
        axes.fill_between(np.arange(STEPS + 1), share, color="#0072B2", alpha=0.2, lw=0)
        axes.plot(share, color="#0072B2")
        axes.set(title=name, xlabel="step", xticks=(0, 400, 800))
        axes.set(xlim=(0, STEPS), ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("density")
    return drawing


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"), dpi=120)
