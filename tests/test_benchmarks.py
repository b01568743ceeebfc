"""The benchmarks on tiny inputs: what they compare is equal, and what they append stays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import host, measuring, profiles, step_time, topology_update

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


def test_calls_take_turns():
    made = []
    seconds = measuring.alternating(
        {name: lambda name=name: made.append(name) for name in ("a", "b")}, 3
    )
    assert made == ["a", "b"] * 4  # once beforehand
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert measuring.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_both_topology_updates_choose_the_same():
    shapes = {"a": (3, 3, 8, 16), "b": (40, 24)}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    found = topology_update.compiled(params)
    arguments = topology_update.random_arguments(params)
    programs = {name: program for name, (program, _) in found.items()}
    seconds = topology_update.run(programs, arguments, repeats=2)  # it compares them
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(programs, 2)
    masks = arguments[1]
    new = programs["argsort"](*arguments)
    assert any((new[path] != masks[path]).any() for path in shapes)
    swapped = {"sparseopt_jax": programs["sparseopt_jax"], "argsort": lambda *_: masks}
    with pytest.raises(AssertionError):
        topology_update.run(swapped, arguments, repeats=1)


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
