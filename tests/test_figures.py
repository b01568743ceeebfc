"""The gallery's figures: each has a script that draws it, and shows what was measured."""

import runpy

import matplotlib.image
import numpy as np
import pytest

from tests import test_gradient_direction
from tests.test_docs import README, ROOT, TEXTS

FOLDER = ROOT / "docs" / "figures"
FIGURES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_a_script_that_draws_them(name):
    script, picture = (FOLDER / f"{name}.{kind}" for kind in ("py", "png"))
    assert picture.stat().st_size < 60_000
    drawing = runpy.run_path(str(script))["figure"]()
    pixels = matplotlib.image.imread(picture)
    np.testing.assert_array_equal(pixels.shape[1::-1], drawing.get_size_inches() * 120)
    assert drawing.get_suptitle() or all(axes.get_title() for axes in drawing.axes)
    bottom_left = drawing.axes[-1], drawing.axes[0]
    assert bottom_left[0].get_xlabel()
    assert bottom_left[1].get_ylabel()
    gallery = TEXTS["docs/gallery.md"]
    assert f"](figures/{name}.png)" in gallery
    assert f"    python docs/figures/{name}.py\n" in gallery


def test_every_picture_has_a_script():
    assert sorted(path.stem for path in FOLDER.glob("*.png")) == FIGURES
    assert "](docs/figures/mechanism.png)" in README


def test_the_mechanism_s_points_are_those_of_the_measurement():
    """Against tests/test_gradient_direction.py, other draws of the same layer: slope and level."""
    figure = runpy.run_path(str(FOLDER / "mechanism.py"))
    fan_in, ratios = figure["over_dense"]()
    mask, *each = test_gradient_direction.gradients(0, "batch")
    norms = [np.linalg.norm(np.where(mask, gradient, 0), axis=0) for gradient in each]
    for drawn, measured in zip(ratios.values(), (norms[0], norms[1]), strict=True):
        measured = measured / norms[2]
        line = np.polyfit(np.log(fan_in / figure["INPUTS"]), np.log(drawn), 1)
        other = np.polyfit(np.log(mask.mean(axis=0)), np.log(measured), 1)
        np.testing.assert_allclose(line, other, atol=0.06)


def test_the_schedules_panels_begin_dense_and_end_at_a_tenth():
    script = runpy.run_path(str(FOLDER / "schedules.py"))
    shares = {name: script["density"](each) for name, each in script["SCHEDULES"].items()}
    assert len(shares) == 4
    for share in shares.values():
        assert (share[0], share[-1]) == (1, 0.1)
    # Half way from 100 to 700: 1/8 and 1/2 of the way from 1 to 0.1 are ahead.
    assert shares["Cubic(100, 700)"][400] == pytest.approx(0.1 + 0.9 / 8, abs=1e-3)
    assert shares["Linear(100, 700)"][400] == pytest.approx(0.55, abs=1e-3)
