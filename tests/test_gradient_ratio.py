"""The gradient ratio against a backward pass written by hand in NumPy, and against theory."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import sparseopt_jax as sx
from experiments import metrics
from experiments.config import Config, ConfigError
from experiments.data import Split
from experiments.paper import gradient_ratio
from experiments.reporting import plots
from sparseopt_jax import models

SPARSITIES = (0.0, 0.5, 0.9)
CONFIG = Config(dataset="gaussian", model="mlp", hidden=64, batch_size=64, seeds=3, seed=4)
INPUTS = 100


def batch_of(seed):
    generator = np.random.default_rng(seed)
    images = generator.normal(5.0, 2.0, (CONFIG.batch_size, 10, INPUTS // 10, 1))
    return Split(images.astype(np.float32), generator.integers(0, 10, CONFIG.batch_size))


def batches_of(seed, first_step):
    assert first_step == 0
    while True:
        yield batch_of(seed)


@pytest.fixture(scope="module")
def found():
    """Of independent inputs, as theory has them."""
    dataset = types.SimpleNamespace(
        image_shape=(10, INPUTS // 10, 1),
        num_classes=10,
        mean=np.full(1, 5, np.float32),
        std=np.full(1, 2, np.float32),
        train_batches=batches_of,
    )
    said = []
    result = gradient_ratio.measure_on(
        dataset, CONFIG, SPARSITIES, batches=1, inits=("uniform",), say=said.append
    )
    assert [text.rsplit("(")[-1] for text in said] == ["1 of 3)", "2 of 3)", "3 of 3)"]
    return result


def case(found, norm):
    (one,) = [case for case in found["cases"] if case["norm"] == norm]
    return one


def gradient_with_batch_norm(x, labels, kernel, head, bias):
    """d loss / d kernel of x -> batch norm -> ReLU -> head -> cross-entropy, float64."""
    z = x @ kernel
    root = np.sqrt(z.var(axis=0) + 1e-5)
    normal = (z - z.mean(axis=0)) / root
    logits = np.maximum(normal, 0) @ head + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    errors = (p - np.eye(10)[labels]) / len(x)
    back = (errors @ head.T) * (normal > 0)
    back = back - back.mean(axis=0) - normal * (back * normal).mean(axis=0)
    return x.T @ (back / root)


def test_ratio_with_batch_norm_against_numpy(found):
    seed = 5  # the second one
    images, labels = batch_of(seed)
    x = (images.astype(np.float64).reshape(CONFIG.batch_size, INPUTS) - 5) / 2
    weights_key, mask_key = jax.random.split(jax.random.key(seed))
    model = models.MLP((64,), kernel_init=gradient_ratio.INITS["uniform"])
    params = model.init(weights_key, images[:1])["params"]
    kernel, head, bias = (
        np.float64(params[layer][name])
        for layer, name in (("dense0", "kernel"), ("head", "kernel"), ("head", "bias"))
    )
    dense = gradient_with_batch_norm(x, labels, kernel, head, bias)
    for i, sparsity in enumerate(SPARSITIES):
        mask = np.asarray(sx.random_mask(mask_key, kernel.shape, round((1 - sparsity) * 6400)))
        sparse = gradient_with_batch_norm(x, labels, np.where(mask, kernel, 0), head, bias)
        ratio = np.linalg.norm(sparse[mask]) / np.linalg.norm(dense[mask])
        whole = np.linalg.norm(sparse[mask]) / np.linalg.norm(dense)
        one = case(found, "batch")
        assert one["ratio"][i]["values"][1] == pytest.approx(ratio, rel=1e-4)
        assert one["norm_ratio"][i]["values"][1] == pytest.approx(whole, rel=1e-4)


def test_uniform_weights_are_within_the_root_of_the_fan_in():
    weights = np.asarray(gradient_ratio.INITS["uniform"](jax.random.key(0), (400, 50), np.float32))
    assert 0.999 / 20 < np.abs(weights).max() <= 1 / 20
    assert weights.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize("norm", gradient_ratio.NORMS)
def test_dense_is_exactly_one(found, norm):
    one = case(found, norm)
    assert one["ratio"][0]["values"] == one["norm_ratio"][0]["values"] == [1.0, 1.0, 1.0]
    assert one["ratio"][0]["std"] == 0


@pytest.mark.parametrize(("norm", "exponent"), [("batch", -0.5), ("layer", -0.5), ("none", 0)])
def test_independent_inputs_give_what_theory_gives(found, norm, exponent):
    assert found["theory"] == pytest.approx([1, 2**0.5, 10**0.5])
    for sparsity, cell in zip(SPARSITIES, case(found, norm)["ratio"], strict=True):
        assert cell["mean"] == pytest.approx((1 - sparsity) ** exponent, rel=0.1)
        assert cell["mean"] == pytest.approx(np.mean(cell["values"]))
        assert cell["std"] == pytest.approx(np.std(cell["values"], ddof=1))
        assert cell["n"] == 3


def test_result_is_json_and_is_shown(found, tmp_path):
    metrics.write_json(tmp_path / "ratio.json", found)
    again = metrics.read_json(tmp_path / "ratio.json")
    assert again == found == json.loads(json.dumps(found))
    text = gradient_ratio.table(again)
    assert max(map(len, text.splitlines())) <= 100
    (row,) = [line for line in text.splitlines() if line.startswith("    0.50")]
    means = [case(found, norm)["ratio"][1]["mean"] for norm in gradient_ratio.NORMS]
    assert [cell.strip().split(" ±")[0] for cell in row.split("  ") if cell.strip()] == [
        "0.50", "1.414", *(f"{mean:.3f}" for mean in means), "1.53"
    ]  # fmt: skip
    plots.save(gradient_ratio.figure(again), tmp_path / "ratio.png")
    assert (tmp_path / "ratio.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_that_are_done_are_not_measured_again(tmp_path, monkeypatch):
    """Interrupted in the second case; further seeds join those that are there."""
    config = Config(model="mlp", hidden=8, batch_size=32, seeds=2)
    file = tmp_path / "parts.json"
    arguments = {"sparsities": (0.0, 0.5), "batches": 1, "inits": ("uniform",), "keep": file}
    over_batches, calls = gradient_ratio._over_batches, []
    make_ratios, programs = gradient_ratio.make_ratios, {}

    def made_once(dataset, hidden, norm):
        return programs.setdefault(norm, make_ratios(dataset, hidden, norm))

    def counted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return over_batches(*given)

    monkeypatch.setattr(gradient_ratio, "_over_batches", counted)
    monkeypatch.setattr(gradient_ratio, "make_ratios", made_once)
    with pytest.raises(KeyboardInterrupt):
        gradient_ratio.measure(config, **arguments)
    assert list(metrics.read_json(file)["parts"]) == [
        "uniform batch seed 0", "uniform batch seed 1", "uniform layer seed 0"
    ]  # fmt: skip
    found = gradient_ratio.measure(config, **arguments)
    assert len(calls) == 4 + 3
    whole = gradient_ratio.measure(config, **arguments | {"keep": None})
    assert len(calls) == 4 + 3 + 6
    assert found == whole
    more = dataclasses.replace(config, seeds=3)
    assert gradient_ratio.measure(more, **arguments)["cases"][0]["ratio"][0]["n"] == 3
    assert len(calls) == 4 + 3 + 6 + 3
    with pytest.raises(ConfigError, match=r"parts.json holds measurements with hidden=8, not 9"):
        gradient_ratio.measure(dataclasses.replace(config, hidden=9), **arguments)
    with pytest.raises(ConfigError, match="with batches=1, not 2; give another --workdir"):
        gradient_ratio.measure(config, **arguments | {"batches": 2})


def test_figure_has_a_line_for_each_normalisation(found):
    (axes,) = gradient_ratio.figure(found).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for norm, label in (("batch", "batch normalisation"), ("none", "no normalisation")):
        means = [cell["mean"] for cell in case(found, norm)["ratio"]]
        np.testing.assert_array_equal(lines[label].get_ydata(), means)
        np.testing.assert_array_equal(lines[label].get_xdata(), SPARSITIES)
    (published,) = [line for label, line in lines.items() if label.startswith("the paper, BN")]
    np.testing.assert_array_equal(published.get_ydata(), [1.53, 3.55])


def test_images_of_a_dataset():
    """From its config on; a single seed has no spread, and both initialisations are there."""
    config = Config(model="mlp", hidden=8, batch_size=32)
    found = gradient_ratio.measure(config, (0.0, 0.5), batches=2, say=lambda text: None)
    assert found["protocol"]["image_shape"] == [8, 8, 1]
    assert [(case["init"], case["norm"]) for case in found["cases"]] == [
        (init, norm) for init in ("uniform", "he_normal") for norm in ("batch", "layer", "none")
    ]
    for one in found["cases"]:
        dense, sparse = one["ratio"]
        assert dense["values"] == [1.0]
        assert dense["std"] is sparse["std"] is None
        # Of half of the layer's weights.
        assert one["norm_ratio"][1]["mean"] < sparse["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": ()}, "sparsities"),
        ({"sparsities": (0.5, 1.0)}, r"sparsities has 1\.0.*\[0, 1\)"),
        ({"batches": 0}, "batches=0 must be an integer of at least 1"),
        ({"batches": True}, "batches=True"),
        ({"inits": ("he",)}, "inits has 'he'.*uniform, he_normal"),
        ({"inits": ("uniform", "uniform")}, "none of them twice"),
        ({"sparsities": (0.9999,)}, "sparsities"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        gradient_ratio.measure(Config(model="mlp", hidden=4), **arguments)
