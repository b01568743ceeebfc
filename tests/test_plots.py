"""What the figures of a report draw, read back from Matplotlib's own objects."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.reporting import plots
from experiments.reporting.plots import Curve, Point

EPOCHS = np.array([1.0, 2.0, 3.0])
MEAN = np.array([50, 60, 80])
TWO_RUNS = Curve(EPOCHS, np.array([[40.0, 60, 60], [60, 60, 100]]))
ROOT_2 = np.sqrt(2)
T_1 = 12.706205  # Student's t at 0.975 with 1 degree of freedom, from a printed table


def bands(axes):
    """Lower and upper edge of every band, by its x."""
    found = []
    for band in axes.collections:
        vertices = band.get_paths()[0].vertices
        xs = sorted(set(vertices[:, 0]))
        edges = [vertices[vertices[:, 0] == x, 1] for x in xs]
        found.append((xs, [e.min() for e in edges], [e.max() for e in edges]))
    return found


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()], found.get_title().get_text()


def test_a_curve_is_the_mean_with_its_standard_deviation():
    one_run = Curve(EPOCHS, np.array([[10.0, 20, 30]]))
    panels = {"rigl": {"sgd": TWO_RUNS, "sparseopt": one_run}, "set": {"sparseopt": TWO_RUNS}}
    figure = plots.curves(panels, "test accuracy (%)", "a sweep")
    left, right = figure.axes
    sgd, sparseopt = left.lines
    np.testing.assert_allclose(sgd.get_xydata(), np.transpose([EPOCHS, MEAN]))
    np.testing.assert_allclose(sparseopt.get_ydata(), [10, 20, 30])
    for line, method in ((sgd, "sgd"), (sparseopt, "sparseopt"), (right.lines[0], "sparseopt")):
        assert line.get_color() == plots.STYLES[method][0]
    xs, low, high = bands(left)[0]
    np.testing.assert_allclose(xs, EPOCHS)
    spread = np.array([10, 0, 20]) * ROOT_2  # divided by n - 1 = 1
    np.testing.assert_allclose(low, MEAN - spread)
    np.testing.assert_allclose(high, MEAN + spread)
    assert left.get_title() == "rigl (n = 2 sgd, 1 sparseopt)"
    assert right.get_title() == "set (n = 2)"
    assert legend(figure)[0] == ["sgd", "sparseopt"]
    assert left.get_ylabel() == "test accuracy (%)"
    assert left.get_xlabel() == right.get_xlabel() == "epoch"
    assert figure.get_suptitle() == "a sweep"


def test_a_difference_has_its_confidence_interval_and_a_line_at_0():
    figure = plots.curves({"": {"sparseopt - sgd": TWO_RUNS}}, "difference", band="ci95")
    (axes,) = figure.axes
    zero, mean = axes.lines
    np.testing.assert_allclose(zero.get_ydata(), 0)
    np.testing.assert_allclose(mean.get_ydata(), MEAN)
    half = T_1 * np.array([10, 0, 20])  # t * std / sqrt(2), std being sqrt(2) times this
    (band,) = bands(axes)
    np.testing.assert_allclose(band[1], MEAN - half, rtol=1e-6)
    np.testing.assert_allclose(band[2], MEAN + half, rtol=1e-6)
    bottom, top = axes.get_ylim()
    assert bottom < min(band[1])
    assert top > max(band[2])
    assert mean.get_color() == plots.STYLES["sparseopt"][0]


def test_the_axis_of_accuracies_shows_what_comes_after_the_first_third():
    x = np.arange(1.0, 13)
    values = np.where(x < 4, 10.0, 80 + x)
    figure = plots.curves({"": {"sgd": Curve(x, values[None])}}, "accuracy", top=100)
    bottom, top = figure.axes[0].get_ylim()
    assert 70 < bottom < 84
    assert 92 < top <= 100.3
    assert "first points lie beyond the axis" in legend(figure)[1]
    everything = plots.curves({"": {"sgd": Curve(x, values[None])}}, "ITOP rate")
    assert everything.axes[0].get_ylim()[0] < 10
    assert "beyond" not in legend(everything)[1]


def test_a_band_stays_below_what_is_possible_and_above_0_on_a_logarithmic_axis():
    figure = plots.curves({"": {"sgd": TWO_RUNS}}, "accuracy", top=100)
    assert max(bands(figure.axes[0])[0][2]) == 100
    wide = Curve(EPOCHS, np.array([[0.1, 0.1, 0.1], [4.0, 2.0, 1.0]]))
    figure = plots.curves({"": {"sgd": wide}}, "loss", log=True)
    assert figure.axes[0].get_yscale() == "log"
    assert min(bands(figure.axes[0])[0][1]) > 0


@pytest.mark.parametrize("low", [0.9, 0.5, 0.1, 0.02, 1e-3, 1e-6])
def test_a_logarithmic_axis_has_a_few_numbers_whatever_its_range(low):
    curve = Curve(EPOCHS, np.array([[2.0, low, low]]))
    figure = plots.curves({"": {"sgd": curve}}, "loss", log=True)
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    assert bottom <= low
    assert top >= 2
    shown = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
    assert 3 <= len(shown) <= 9


def test_known_methods_keep_their_style_and_others_get_their_own():
    names = ["sgd", *(f"arm {i}" for i in range(30)), "sparseopt_ham", "sparseopt - sgd"]
    found = plots.styles(names)
    assert list(found) == names
    assert found["sgd"] == plots.STYLES["sgd"]
    assert found["sparseopt - sgd"] == plots.STYLES["sparseopt"]
    assert len({found[name] for name in names[:-1]}) == len(names) - 1
    assert {"dense", "sgd", "sparseopt", "ham", "sparseopt_ham"} <= set(plots.STYLES)
    assert len({line for _, line in plots.STYLES.values()}) == len(plots.STYLES)
    many = plots.styles(f"arm {i}" for i in range(100))
    assert len(many) == 100


def test_accuracy_against_flops():
    dense = [[Point(1000.0, np.array([90.0, 92.0]), "")]]
    short, long = Point(10.0, np.array([70.0, 72]), "0.9"), Point(20.0, np.array([80.0]), "0.9")
    panels = {"RigL": {"dense": dense, "sgd": [[short, long]]}, "SET": {"dense": dense}}
    figure = plots.flops(panels, "test accuracy (%)")
    left, right = figure.axes
    assert left.get_xscale() == "log"
    drawn = [container.lines[0].get_xydata() for container in left.containers]
    np.testing.assert_allclose(drawn[0], [[1000, 91]])
    np.testing.assert_allclose(drawn[1], [[10, 71], [20, 80]])
    np.testing.assert_allclose(right.containers[0].lines[0].get_xydata(), [[1000, 91]])
    (bars,) = left.containers[1].lines[2]
    first, second = bars.get_segments()
    np.testing.assert_allclose(first[:, 1], [71 - ROOT_2, 71 + ROOT_2])
    np.testing.assert_allclose(second[:, 1], [80, 80])  # one run has no spread
    labels = {text.get_text(): text.xy for text in left.texts}
    assert labels["0.9"] == pytest.approx((10, 71 - ROOT_2))


def test_methods_of_equal_flops_are_side_by_side():
    point = Point(10.0, np.array([70.0]), "0.9")
    figure = plots.flops({"RigL": {"sgd": [[point]], "sparseopt": [[point]]}}, "accuracy")
    xs = [c.lines[0].get_xdata()[0] for c in figure.axes[0].containers]
    assert 9.5 < xs[0] < 10 < xs[1] < 10.5
    assert xs[0] * xs[1] == pytest.approx(100)


def colours_in(figure, panel):
    """The colours that cover at least 30 pixels of a panel, as it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    left, bottom, right, top = panel.get_window_extent().extents.astype(int)
    pixels = pixels[len(pixels) - top : len(pixels) - bottom, left:right].reshape(-1, 3).astype(int)
    names = {}
    for name, colour in plots.COLOURS.items():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        names[name] = int((abs(pixels - wanted).max(-1) < 12).sum())
    return {name for name, count in names.items() if count >= 30}


STYLED = {
    "sgd": "vermilion", "sparseopt": "blue", "ham": "orange", "sparseopt_ham": "green",
    "dense": "black",
}  # fmt: skip


@pytest.mark.parametrize("points", [1, 3, 40])
def test_equal_curves_are_all_to_be_seen(points):
    x = np.arange(1.0, points + 1)
    curve = Curve(x, (90 - 40 / x)[None])
    pair = plots.curves({"": {"sgd": curve, "sparseopt": curve}}, "accuracy", top=100)
    assert colours_in(pair, pair.axes[0]) == {"vermilion", "blue"}
    if points > 1:
        everything = plots.curves({"": dict.fromkeys(STYLED, curve)}, "loss", log=True)
        assert colours_in(everything, everything.axes[0]) >= set(STYLED.values())


def test_equal_fan_ins_and_ends_are_all_to_be_seen():
    fan_in = {"head/kernel": np.array([[2, 2, 3, 5]])}
    after = {"sgd": fan_in, "sparseopt": fan_in, "ham": fan_in}
    figure = plots.fan_in(fan_in, after, {"head/kernel": 9}, "static masks")
    assert colours_in(figure, figure.axes[0]) >= {"vermilion", "blue", "orange"}
    line = [[Point(10.0, np.array([70.0]), "0.9"), Point(20.0, np.array([70.0]), "0.9")]]
    figure = plots.flops({"RigL": {"sgd": line, "sparseopt": line}}, "accuracy")
    assert colours_in(figure, figure.axes[0]) >= {"vermilion", "blue"}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("epoch", [1.0, 100.0, 0.25])
def test_a_curve_of_one_point_has_an_axis_that_says_something(epoch, log):
    """From 0, or half, to beyond the point."""
    point = Curve(np.array([epoch]), np.array([[1.0]]))
    figure = plots.curves({"": {"sgd": point, "sparseopt": point}}, "loss", log=log)
    left, right = figure.axes[0].get_xlim()
    assert left == 0
    assert epoch < right <= 1.5 * epoch
    bottom, top = figure.axes[0].get_ylim()
    assert 0.4 < bottom < 0.7
    assert 1.4 < top < 2


def test_fan_in_counts_neurons_in_percent():
    before = {"head/kernel": np.array([[2, 2, 3, 5], [2, 2, 3, 5]])}
    after = {"ours": {"head/kernel": np.array([2, 3, 3, 3])}}
    figure = plots.fan_in(before, after, {"head/kernel": 9}, "a model")
    (axes,) = figure.axes
    bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in axes.patches[:-1]}
    heights = {int(x): height for x, height in bars.items() if height}
    assert heights == {2: 50, 3: 25, 5: 25}
    outline = axes.patches[-1].get_xy()  # a step at 2 and a higher one at 3
    assert set(outline[:, 1]) == {0, 25, 75}
    assert axes.get_title() == "head\n4 neurons, dense fan-in 9"


def test_save_writes_the_whole_picture(tmp_path):
    figure = plots.curves({"": {"sgd": TWO_RUNS}}, "accuracy")
    plots.save(figure, tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    height, width, _ = matplotlib.image.imread(tmp_path / "picture.png").shape
    assert (width, height) == (7 * 150, 4.5 * 150)
