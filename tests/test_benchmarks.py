"""The benchmarks on tiny inputs: what they compare is equal, and what they append stays."""

import json
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    bcsr,
    convolution,
    exports,
    host,
    keep_top_k,
    measuring,
    profiles,
    removal,
    step_time,
    structures,
    topology_update,
)
from experiments.benchmarks import upstream_kernel_gradient as upstream
from sparseopt_jax import models

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_results_are_appended_a_line_each(tmp_path, capsys):
    path = tmp_path / "bench.jsonl"
    parser = measuring.parser("example", "An example.")
    for value in (1.0, np.float32(2.5)):
        argv = ["--json", str(path)] if value == 1.0 else [f"--json={path}"]
        measuring.append(parser.parse_args(argv), parser, argv, {"ratio": value})
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["ratio"], second["ratio"]) == (1.0, 2.5)
    for record in (first, second):
        assert record["benchmark"] == "example"
        assert record["command"] == "python -m experiments.benchmarks.example"
        assert record["environment"]["backend"] == "cpu"
    measuring.append(parser.parse_args([]), parser, [], {})  # nowhere to
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.jsonl"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--json={tmp_path}"])
    assert f"{tmp_path} must be a file" in capsys.readouterr().err


def test_keep_top_k_on_a_small_block(monkeypatch, capsys, tmp_path):
    """It raises by itself where a kernel has not the number of weights that it is to keep."""
    shapes = {"qkv": (32, 96), "out": (32, 32), "up": (32, 128), "down": (128, 32)}
    for name, value in (("WIDTH", 32), ("LENGTH", 8), ("KERNELS", shapes)):
        monkeypatch.setattr(keep_top_k, name, value)
    assert keep_top_k.main(["--repeats=2", "--batch_size=1", f"--json={tmp_path / 'j'}"]) == 0
    assert "12,288 weights, 1 sequences of 8" in capsys.readouterr().out
    result = json.loads((tmp_path / "j").read_text())
    assert all(result[part]["ratio"] > 0 for part in ("step", "update"))


def test_calls_take_turns():
    made = []
    seconds = measuring.alternating(
        {name: lambda name=name: made.append(name) for name in ("a", "b")}, 3
    )
    assert made == ["a", "b"] * 4  # once beforehand
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert measuring.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_compressed_kernels_are_compared_with_dense_ones(tmp_path, capsys):
    assert bcsr.main(["--sizes=32", "--repeats=1", f"--json={tmp_path / 'f'}"]) == 0
    (record,) = map(json.loads, (tmp_path / "f").read_text().splitlines())
    tried = [(row["sparsity"], row["batch"]) for row in record["rows"]]
    assert tried == [(s, b) for s in (0.9, 0.95, 0.99) for b in (1, 8, 32)]
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[:2] == ["32x32", "0.9"]
    assert [float(ratio) for ratio in row[2:]] == [round(r["ratio"], 2) for r in record["rows"][:3]]
    with pytest.raises(SystemExit, match="2"):
        bcsr.main(["--sizes=32,1"])


def test_a_model_without_dead_channels_is_compared_with_the_whole():
    model = models.ResNet((1, 1), bottleneck=True, num_classes=3, base_channels=8)
    found, result = removal.compare(model, 0.25, batch_size=2, image_size=32, repeats=1)
    assert found.widths == ((6, 6), (12, 12))
    # conv1, bn1, conv2, bn2 and conv3 of both blocks, by hand.
    lost = sum(
        inputs * (c - s) + 2 * (c - s) + 9 * (c * c - s * s) + 2 * (c - s) + 4 * c * (c - s)
        for inputs, c, s in ((8, 8, 6), (32, 16, 12))
    )
    assert result["parameters"]["whole"] - result["parameters"]["smaller"] == lost
    assert result["largest_difference"] < 1e-5


def test_formats_are_compared(monkeypatch, capsys):
    model = models.ResNet((1,), num_classes=3, base_channels=8, stem="conv3x3")
    monkeypatch.setattr(exports.models, "ResNet50", lambda: model)
    names = [name for name, needed in exports.FORMATS.items() if "tensorflow" not in needed]
    monkeypatch.setattr(
        exports, "FORMATS", {n: exports.FORMATS[n] for n in names} | {"x": ("no_x",)}
    )
    assert exports.main(["--image_size=8", "--repeats=1"]) == 0
    *rows, missing = capsys.readouterr().out.splitlines()
    assert missing == "x: left out, needs no_x"
    found = {name: row for row in rows for name in names if row.startswith(f"{name:28}")}
    assert sorted(found) == sorted(names)
    errors = [
        float(found[n].split("error")[1].split()[0])
        for n in names
        if "error       -" not in found[n]
    ]
    assert len(errors) == 4
    assert max(errors) < 1e-5


KERNELS = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {"a": (3, 3, 8, 16), "b": (40, 24)}.items()
}


def test_structures_on_small_kernels(monkeypatch, capsys, tmp_path):
    """It raises by itself where 2:4 does not keep half of the weights."""
    monkeypatch.setattr(measuring, "resnet50_params", lambda: {"b": KERNELS["b"]})
    assert structures.main(["--size=16", "--repeats=1", f"--json={tmp_path / 'j'}"]) == 0
    assert "constant_fan_in" in capsys.readouterr().out
    result = json.loads((tmp_path / "j").read_text())
    assert set(result["selection"]["ratio"]) == {"flax", "out_in"}
    assert set(result["update"]["ratio"]) == {"constant_fan_in", "ablation"}


def test_topology_updates_choose_the_same():
    programs = {name: program for name, (program, _) in topology_update.compiled(KERNELS).items()}
    arguments = topology_update.random_arguments(KERNELS)
    seconds, differing = topology_update.run(programs, arguments, repeats=2)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(programs, 2)
    assert differing == {"argsort": 0}
    masks = arguments[1]
    new = programs["argsort"](*arguments)
    assert any((new[path] != masks[path]).any() for path in KERNELS)
    swapped = {"sparseopt_jax": programs["sparseopt_jax"], "argsort": lambda *_: masks}
    with pytest.raises(AssertionError, match=r"argsort: \d+ places of a's mask differ"):
        topology_update.run(swapped, arguments, repeats=1)


def stand_in_for_jaxpruner():
    """What is called of jaxpruner, by a stable argsort in NumPy, with its rounding."""

    class RigL:
        def __init__(self, drop_fraction_fn):
            self.drop_fraction = drop_fraction_fn

        def update_state(self, state, params, grads):
            def of_layer(mask, weight, grad):
                assert mask.dtype == np.uint8
                n_active = int(mask.sum())
                n_keep = round(n_active * (1 - self.drop_fraction(state.count)))
                first = np.argsort(-np.where(mask, abs(weight), -1).ravel(), kind="stable")
                new = np.zeros(mask.size, bool)
                new[first[:n_keep]] = True
                scores = np.where(new, -1, abs(grad).ravel())
                new[np.argsort(-scores, kind="stable")[: n_active - n_keep]] = True
                return jnp.asarray(new.reshape(mask.shape), jnp.uint8)

            layers = jax.tree.map(np.asarray, (state.masks, params, grads))
            return state._replace(masks=jax.tree.map(of_layer, *layers))

    class SparseState(NamedTuple):
        masks: Any
        inner_state: Any
        count: Any

    module = types.ModuleType("jaxpruner")
    module.RigL, module.SparseState = RigL, SparseState
    return module


def test_jaxpruner_is_called_as_its_users_call_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxpruner", stand_in_for_jaxpruner())
    monkeypatch.setattr(jax, "tree_map", jax.tree.map, raising=False)
    arguments = topology_update.random_arguments(KERNELS)
    updates = topology_update.updates(["jaxpruner"])
    _, differing = topology_update.run(updates, arguments, repeats=1)
    assert list(differing) == ["argsort", "jaxpruner"]
    assert differing["argsort"] == 0
    assert differing["jaxpruner"] <= 2 * len(KERNELS)
    theirs = updates["jaxpruner"](*arguments)
    for path, mask in arguments[1].items():
        assert theirs[path].dtype == jnp.bool_
        assert theirs[path].sum() == mask.sum()


def test_the_other_process_is_given_the_same_layers():
    arguments = topology_update.random_arguments(KERNELS)
    programs = topology_update.updates()
    asked = []

    def torch(name, *words):
        asked.append((name, words))
        if name == "masks":
            return [np.asarray(mask) for mask in programs["argsort"](*arguments).values()]
        return 0.25

    seconds, differing = topology_update.run(programs, arguments, 3, torch)
    assert seconds["torch"] == [0.25] * 3
    assert differing == {"argsort": 0, "torch": 0}
    (name, (layers, drop_fraction)), *_ = asked
    assert (name, drop_fraction) == ("prepare", topology_update.DROP_FRACTION)
    for given, path in zip(layers, KERNELS, strict=True):
        for array, tree in zip(given, arguments[1:], strict=True):
            np.testing.assert_array_equal(array, tree[path])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--peers=numpy"], "--peers: numpy must be one of jaxpruner, torch"),
        (["--peers=jaxpruner"], "--peers=jaxpruner needs jaxpruner"),
        (["--peers=torch"], "--peers=torch needs torch, which cannot be imported"),
    ],
)
def test_wrong_peers_are_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr(topology_update.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        topology_update.parse(words)
    assert message in capsys.readouterr().err


def test_a_step_of_each_method(tmp_path, capsys):
    path = tmp_path / "bench.jsonl"
    words = ["--config.model=mlp", "--config.hidden=8", "--config.batch_size=4"]
    assert step_time.main([*words, "--image_size=8", "--repeats=2", f"--json={path}"]) == 0
    record = json.loads(path.read_text())
    ratios = record["ratios"]
    amortised = ratios["ordinary"] + (ratios["update"] - ratios["ordinary"]) / 100
    assert ratios["amortised"] == pytest.approx(amortised)
    assert record["config"]["hidden"] == 8
    assert f"amortised over 100 steps: {amortised:.4f}" in capsys.readouterr().out
    for spent in record["profile_ms"].values():
        assert list(spent) == ["forward", "backward", "optimizer", "other"]
        assert all(spent[part] > 0 for part in ("forward", "backward", "optimizer"))


def test_parts_of_a_program():
    """What the compiler left without a name is of what it is fused from, or of its operands."""
    text = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %dot.1 = f32[8]{0} add(%param_0, %param_0), metadata={op_name="jit(step)/jvp(MLP)/add"}
}

ENTRY %main (state.1: f32[8]) -> f32[8] {
  %state.1 = f32[8]{0} parameter(0), metadata={op_name="state"}
  %copy.1 = f32[8]{0} copy(%state.1)
  %fusion.1 = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%fused_computation.1
  %tanh.2 = f32[8]{0} tanh(%fusion.1), metadata={op_name="jit(step)/transpose(jvp(MLP))/tanh"}
  %copy.2 = f32[8]{0} copy(%tanh.2), backend_config={"outer_dimension_partitions":[]}
  %add.3 = f32[8]{0} add(%copy.2, %state.1), metadata={op_name="jit(step)/optimizer/add"}
  ROOT %custom.4 = f32[8]{0} custom-call(%fusion.1, %add.3), custom_call_target="x"
}
"""
    assert profiles.operations(text) == {
        "param_0": "other", "dot.1": "forward", "state.1": "other", "copy.1": "other",
        "fusion.1": "forward", "tanh.2": "backward", "copy.2": "backward", "add.3": "optimizer",
        "custom.4": "optimizer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.topology=static"], "topology=static must be set or rigl"),
        (["--config.sparsity=2"], "sparsity"),
        (["--repeats=0"], "repeats must be at least 1"),
        (["--config=none.py"], "none.py"),
    ],
)
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        step_time.main(words)
    assert message in capsys.readouterr().err


def test_what_is_dispatched_has_an_array_for_each_of_the_state():
    state = {"w": jnp.zeros((3, 4)), "mask": jnp.ones((3, 4), bool), "step": jnp.int32(7)}
    call = host.Dispatcher(state)
    for _ in range(3):
        call()
    assert jax.tree.map(lambda leaf: leaf.dtype, call.state) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    assert jax.tree.map(np.asarray, call.state) == {"w": 3.0, "mask": True, "step": 3}


def test_every_step_may_update_the_topology(tmp_path):
    words = ["--config.model=mlp", "--config.hidden=8", "--config.batch_size=4"]
    words += ["--image_size=8", "--repeats=3", "--config.update_interval=1"]
    path = tmp_path / "bench.jsonl"
    assert step_time.main([*words, f"--json={path}"]) == 0
    ratios = json.loads(path.read_text())["ratios"]
    assert ratios["amortised"] == pytest.approx(ratios["update"])


def test_gradients_over_forward_passes(tmp_path, monkeypatch):
    setting = convolution.Setting(models.ResNet8, 8, 4, 10)
    monkeypatch.setattr(convolution, "SETTINGS", {"resnet8": setting})
    ours, by_xla = (convolution.passes(setting, fast) for fast in (True, False))
    for one, other in zip(
        jax.tree.leaves(ours["gradient"]()), jax.tree.leaves(by_xla["gradient"]()), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    path = tmp_path / "bench.jsonl"
    assert convolution.main(["--models=resnet8", "--repeats=1", f"--json={path}"]) == 0
    found = json.loads(path.read_text())["resnet8"]
    seconds = found["seconds"]
    assert found["by_xla"] == seconds["gradient_by_xla"] / seconds["forward_by_xla"]
    assert found["gradient_over_forward"] == seconds["gradient"] / seconds["forward"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models=resnet18"], "--models: resnet18 must be one of resnet20, resnet50"),
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--peers=torch"], "--peers=torch needs torch and torchvision, which cannot be imported"),
    ],
)
def test_wrong_models_are_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr(convolution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        convolution.parse(words)
    assert message in capsys.readouterr().err


def test_the_case_for_upstream_computes_the_gradient():
    x, dy = np.random.default_rng(0).normal(size=(2, 16, 5, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        upstream.by_products(x, dy), upstream.by_xla(x, dy), rtol=1e-4, atol=1e-4
    )
