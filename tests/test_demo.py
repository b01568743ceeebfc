"""The demo's ending, at tiny size: numbers against NumPy, the figure, and the table of layers."""

import contextlib
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import data, demo, functions, mechanism, programs, train
from experiments.config import Config
from sparseopt_jax.model_flops import LayerFLOPs, ModelFLOPs
from tests import oracles, train_runs

CONFIG = Config(
    mesh_data=1,
    model="mlp",
    hidden=16,
    sparsity=0.8,
    topology="static",
    batch_size=480,
    epochs=1,
    seeds=2,
    compare=("dense", "sgd", "sparseopt"),
    diagnostics_every=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch, train_runs.standard_promotion():
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(said := _Text()):
            assert demo.main(train_runs.command(folder, CONFIG)) == 0
    return folder, said.text


class _Text:
    """Keeps what is written to it."""

    text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing waits."""


def start_and_gradients(seed):
    """Masks of a run, and the gradient of each batch of its first epoch, by path."""
    dataset = data.load(CONFIG)
    model = functions.model_functions(CONFIG, dataset)
    method = functions.method_functions(CONFIG.for_method("sgd"), dataset, model)
    state = jax.jit(method.start)(*jax.jit(model.init)(seed), seed)
    names = {path: path.split("/")[0] for path in model.layers}
    masks = {path: np.asarray(state.params[names[path]]["kernel"]) != 0 for path in names}
    gradient = jax.jit(jax.grad(lambda *arguments: method.loss(*arguments)[0]))
    batches = dataset.train_batches(seed, 0)
    gradients = []
    for _ in range(dataset.steps_per_epoch):
        one = jax.device_get(gradient(state.params, state.batch_stats, *next(batches)))
        gradients.append({path: one[name]["kernel"] for path, name in names.items()})
    return masks, gradients


def slope_by_least_squares(seed):
    """The slopes of `mechanism`, raw and corrected, by a regression with an intercept a layer."""
    masks, gradients = start_and_gradients(seed)
    factors = oracles.sparseopt_factors(masks)
    rows, raw, corrected = [], [], []
    layers = [path for path in masks if not path.startswith("head") and not masks[path].all()]
    assert len(layers) > 1
    for index, path in enumerate(layers):
        for neuron in range(masks[path].shape[-1]):
            active = masks[path][:, neuron]
            if not active.any():
                continue
            each = [g[path][active, neuron].astype(np.float64) for g in gradients]
            size = np.sqrt(np.mean(np.square(each)))
            factor = np.broadcast_to(factors[path], masks[path].shape)[0, neuron]
            rows.append([np.log(active.sum()), *np.eye(len(layers))[index]])
            raw.append(np.log(size))
            corrected.append(np.log(size * factor))
    return [np.linalg.lstsq(np.array(rows), np.array(y))[0][0] for y in (raw, corrected)]


def test_the_slopes_are_those_of_a_regression(finished):
    folder, _ = finished
    slopes = json.loads((folder / "mechanism.json").read_text())
    expected = np.array([slope_by_least_squares(seed) for seed in range(CONFIG.seeds)])
    assert expected.std() > 0
    for column, name in enumerate(("raw", "corrected")):
        np.testing.assert_allclose(slopes[name]["values"], expected[:, column], atol=1e-4)
        np.testing.assert_allclose(slopes[name]["mean"], expected[:, column].mean(), atol=1e-4)
    assert (slopes["raw"]["theory"], slopes["corrected"]["theory"]) == (-0.5, 0)


def test_gradients_that_follow_the_theory_have_its_slopes():
    """Of two layers of other sizes; -1/2 raw and 0 corrected, up to float32."""
    rng = np.random.default_rng(0)
    masks = {name: rng.random((30, 12)) < share for name, share in (("a", 0.3), ("b", 0.7))}
    masks |= {"head/kernel": np.ones((12, 3), bool)}
    gradient = {
        name: np.float32(rng.choice([-size, size], mask.shape) / np.sqrt(mask.sum(0)))
        for size, (name, mask) in zip((1.0, 5.0, 1.0), masks.items(), strict=True)
    }
    sums = jax.device_get(mechanism.squares(gradient, masks))
    assert set(sums) == {"a", "b"}
    slopes = mechanism.slopes([mechanism.by_neuron(sums, masks)])
    assert slopes["raw"]["values"] == pytest.approx([-0.5], abs=1e-5)
    assert slopes["corrected"]["values"] == pytest.approx([0], abs=1e-5)


def test_the_figure_is_labelled_and_has_the_line_of_the_theory(finished):
    folder, _ = finished
    pixels = matplotlib.image.imread(folder / "mechanism.png")
    assert pixels.shape[:2] == (750, 1500)
    assert pixels.std() > 0.05
    layer = mechanism.Neurons(np.array([2, 4, 8, 9]), np.array([3.0, 2, 1, 0]), np.ones(4))
    figure = mechanism.figure([[layer], [layer]], "some net")
    assert figure.get_suptitle() == "some net"
    raw, corrected = figure.axes
    assert raw.get_title() == "raw gradient: slope -0.79 ± 0.00, n = 2"
    assert "gradient's norm per active weight" in raw.get_ylabel()
    for axes, power in ((raw, -0.5), (corrected, 0)):
        assert "fan-in" in axes.get_xlabel()
        (line,) = (line for line in axes.lines if line.get_label().startswith("theory"))
        x, y = np.log(line.get_data())
        np.testing.assert_allclose(np.diff(y) / np.diff(x), power, atol=1e-12)
    neurons = next(line for line in raw.lines if line.get_label() == "a neuron")
    assert len(neurons.get_xdata()) == 6  # a gradient of 0 has no logarithm


def test_what_is_printed(finished):
    """Numbers of the table are those of the results, and of FLOPs by hand: 2 a weight and image."""
    folder, text = finished
    lines = [line.split() for line in text.splitlines()]
    slopes = json.loads((folder / "mechanism.json").read_text())
    for name, row in slopes.items():
        (line,) = (line for line in lines if line[:1] == [name])
        assert line[1:4] == [f"{row['mean']:+.2f}", "±", f"{row['std']:.2f}"]
    runs = json.loads((folder / "result.json").read_text())["runs"]
    (head,) = (line for line in lines if line[:1] == ["head"])
    weights = 10 * 16
    assert head[1:3] == ["16x10", f"{weights}"]
    assert head[-3] == f"{2 * weights / 1e6:.3f}"
    (everything,) = (line for line in lines if line[:1] == ["all"])
    last, flops = runs[-1], runs[-1]["flops_per_example"]
    assert everything[1:3] == [f"{last['maskable_weights']:,}", f"{last['active_weights']:,}"]
    assert everything[-1] == f"{flops['forward'] / flops['forward_dense']:.3f}"
    for name in ("mechanism.png", "mechanism.json", "model.compact"):
        assert str(folder / name) in text
    assert text.rstrip().endswith(f"run folder: {folder}")
    assert max(map(len, text.splitlines())) - len(str(folder)) < 100


def test_layers_of_a_stage_and_shape_share_a_row():
    fan_ins = {
        "conv_stem/kernel": np.array([9, 9]),
        "stage1_block0/conv1/kernel": np.array([1, 4]),
        "stage1_block1/conv1/kernel": np.array([3, 2]),
        "stage2_block0/conv1/kernel": np.array([5, 0]),
    }
    shapes = dict.fromkeys(fan_ins, (3, 3, 2, 2)) | {"conv_stem/kernel": (3, 3, 1, 2)}
    flops = {path: LayerFLOPs(10**6, 10**6 * (i + 1) / 10) for i, path in enumerate(fan_ins)}
    table = demo.layer_table(fan_ins, shapes, ModelFLOPs(flops, 0, 0))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert rows["conv_stem"][:5] == ["3x3x1x2", "18", "18", "1.000", "9..9"]
    together = rows["stage1_block*"]
    assert together == ["(2)", "3x3x2x2", "72", "10", "0.139", "1..4", "2.000", "0.500", "0.250"]
    assert rows["stage2_block0/conv1"][:5] == ["3x3x2x2", "36", "5", "0.139", "0..5"]
    assert rows["all"] == ["126", "33", "0.262", "4.000", "1.000", "0.250"]


def test_dense_runs_have_nothing_to_show(tmp_path):
    dense = Config(model="mlp", compare=("dense",))
    assert "No method is sparse" in demo.ending(dense, tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_the_first_run_does_not_wait_for_the_methods_of_later_ones(tmp_path, monkeypatch):
    """The second method is compiled only once the first one's run is over."""
    over, compile_method, train_run = threading.Event(), train.compile_method, train.Run.train

    def compile_later(config, *arguments):
        if config.methods() == ("sgd",):
            assert over.wait(120)
        return compile_method(config, *arguments)

    def trained(run):
        train_run(run)
        over.set()

    monkeypatch.setattr(train, "compile_method", compile_later)
    monkeypatch.setattr(train.Run, "train", trained)
    with train_runs.standard_promotion():
        overrides = ("--config.seeds=1", "--config.compare=dense,sgd", "--config.steps=1")
        assert train_runs.train_here(tmp_path / "run", CONFIG, *overrides) == 0


@pytest.mark.parametrize(
    ("folder", "place"), [("runs/a", "runs"), ("elsewhere", "elsewhere"), ("runs/a/b", "runs/a/b")]
)
def test_work_folders_in_runs_share_a_compilation_cache(folder, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with programs.kept_in(pathlib.Path(folder)):
            kept = pathlib.Path(jax.config.jax_compilation_cache_dir)
            assert kept == tmp_path / place / "compilation_cache"
            jax.jit(lambda x: x + jnp.float32(0.625))(jnp.float32(1))
            assert list(kept.iterdir())
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
