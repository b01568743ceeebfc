"""Whole models: ResNet-50 against RigL's published table, a small one against its layer list."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import sparseopt_jax as sx
from experiments import flops
from sparseopt_jax import models
from sparseopt_jax.model_flops import LayerFLOPs
from tests import helpers


@pytest.fixture(autouse=True, scope="module")
def _count_once():
    """Tracing ResNet-50 takes most of the time, and the same rows are asked for several times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "count", functools.cache(flops.count))
        yield


@functools.cache
def found():
    return flops.compare(interval=100)


def test_dense_model():
    """RigL: 8.2e9 and 3.2e18. Other counters: 4.09e9 multiply-adds in convolutions and fc."""
    assert found()["inference"] == pytest.approx(8.2e9, rel=0.01)
    assert found()["training"] == pytest.approx(3.2e18, rel=0.02)
    assert found()["inference_products"] / 2 == pytest.approx(4.09e9, abs=0.005e9)


@pytest.mark.parametrize("row", range(len(flops.PUBLISHED)))
def test_published_factors(row):
    row = found()["rows"][row]
    assert row["inference"] == pytest.approx(row["inference_published"], abs=0.01)
    assert row["inference_products"] == pytest.approx(row["inference_published"], abs=0.01)
    # The published one has been rounded to 0.01 over five runs.
    assert row["training"] == pytest.approx(row["training_published"], abs=0.005)
    # One dense gradient in 101 steps, of which the sparse ones cost three passes.
    expected = ((302 / 303) * row["inference"]) + 1 / 303
    assert row["training"] == pytest.approx(expected, rel=1e-12)


def test_layers_that_stay_dense():
    """The first under Uniform, and under ERK at 0.99; the last is masked always."""
    for published, first_is_dense in ((0.8, False), (0.99, True)):
        row = next(row for row in flops.PUBLISHED if row.sparsity == published)
        layers = flops.count(flops.distribution(row)).layers
        stem, head = layers["conv_stem/kernel"], layers["head/kernel"]
        assert (stem.sparse == stem.dense) == first_is_dense
        assert head.sparse < head.dense
    layers = flops.count(sx.Uniform(0.9, dense_first="conv_stem/kernel")).layers
    factors = {path: layer.sparse / layer.dense for path, layer in layers.items()}
    assert factors.pop("conv_stem/kernel") == 1
    assert list(factors.values()) == pytest.approx([0.1] * 53, rel=1e-3)


def test_command(tmp_path, capsys):
    """One screen, of 80 columns and 24 lines; and a file that says how it was made."""
    output = tmp_path / "flops.json"
    assert flops.main(["--interval=50", f"--output={output}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[-3:] == ["8.229e+09", "8.178e+09", "8.2e+09"]
    row = next(line.split() for line in lines if line.startswith("Uniform       0.9 "))
    assert row[:6] == ["Uniform", "0.9", "0.131", "0.126", "0.13", "+0.001"]
    assert "within 0.01" in "\n".join(lines)
    assert "NOT" not in "\n".join(lines)
    written = json.loads(output.read_text())
    assert written["command"] == "python -m experiments.flops --interval=50"
    assert len(written["rows"]) == len(flops.PUBLISHED)
    assert {"convention", "environment"} <= written.keys()


def test_verdict_says_when_a_factor_is_off():
    row = {"inference": 0.2511, "inference_published": 0.24}
    text = flops.verdict({"inference": 8.2e9, "inference_published": 8.2e9, "rows": [row]})
    assert "0.0111, NOT within 0.01" in text


def test_wrong_interval(capsys):
    with pytest.raises(SystemExit) as raised:
        flops.main(["--interval=0"])
    assert raised.value.code == 2
    assert "--interval must be at least 1, got 0" in capsys.readouterr().err


def test_resnet_against_its_layer_list():
    """ResNet-8 on 8x8 images: stages at 8, 4 and 2 pixels; each kernel runs once a pixel."""
    model, image = models.ResNet8(num_classes=10), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params, stats = variables["params"], variables["batch_stats"]
    masks = helpers.random_masks(params)

    def logits(params, batch_stats, image, train):
        return model.apply({"params": params, "batch_stats": batch_stats}, image, train=train)

    count = flops.flops(logits, params, masks, stats, image, train=False)
    side = {"conv_stem": 8, "stage1_block0": 8, "stage2_block0": 4, "stage3_block0": 2, "head": 1}
    kernels = {p: m for p, m in helpers.flat(masks).items() if p.endswith("kernel")}
    times = {path: 2 * side[path.split("/")[0]] ** 2 for path in kernels}
    assert count.layers == {
        path: LayerFLOPs(dense=times[path] * m.size, sparse=float(times[path] * m.sum()))
        for path, m in kernels.items()
    }


def test_batch_norm_is_what_its_operations_are():
    """An element's mean, scale and bias; a channel's variance + epsilon, inverse root, scale."""
    x = jax.ShapeDtypeStruct((2, 5, 5, 8), jnp.float32)
    norm = nn.BatchNorm(use_running_average=True)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    stats = variables["batch_stats"]

    def normalise(params, stats, x):
        return norm.apply({"params": params, "batch_stats": stats}, x)

    count = flops.flops(normalise, variables["params"], None, stats, x)
    assert (count.layers, count.dense) == ({}, 3 * 400 + 3 * 8)
