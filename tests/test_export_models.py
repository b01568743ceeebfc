"""Models in the formats of others: run by their own runtimes, and against tables by hand."""

import importlib.util
import math
import re
import sys

import jax
import jax.export
import numpy as np
import onnx
import onnxruntime
import pytest
from flax.traverse_util import unflatten_dict

from sparseopt_jax import models
from sparseopt_jax.models import export
from tests.export_cases import MODELS, sparse_model
from tests.model_variables import images, random_variables
from tests.test_docs import PROJECT

# --- StableHLO -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv3x3", "layer norm"])
@pytest.mark.parametrize("constants", [True, False])
def test_stablehlo_gives_the_same_bits_for_batches_of_any_size(name, constants):
    model, variables, x, expected = sparse_model(name)
    content = export.to_stablehlo(model, variables, x.shape[1:], constants=constants)
    program = jax.export.deserialize(bytearray(content))
    assert set(program.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    arguments = () if constants else (variables,)
    if constants:  # of which XLA computes what it can beforehand
        expected = jax.jit(lambda x: model.apply(variables, x))(x)
    np.testing.assert_array_equal(program.call(*arguments, x), expected)
    np.testing.assert_allclose(program.call(*arguments, x[:1]), expected[:1], rtol=1e-5, atol=1e-5)


def test_stablehlo_without_constants_is_small():
    wide = models.MLP((600,), num_classes=3)
    variables = unflatten_dict(random_variables(wide, (1, 500)), sep="/")
    whole = export.to_stablehlo(wide, variables, (500,))
    assert len(whole) > 4 * 600 * 500
    assert len(export.to_stablehlo(wide, variables, (500,), constants=False)) < 30_000


# --- PyTorch ---------------------------------------------------------------------------------


def torchvision_resnet50():
    """{name: shape} of the state dict of torchvision's resnet50, by the rule of its modules."""
    table = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}

    def conv_bn(conv, bn, out, c_in, size):
        table[f"{conv}.weight"] = (out, c_in, size, size)
        vectors = ("weight", "bias", "running_mean", "running_var")
        table.update({f"{bn}.{name}": (out,) for name in vectors})
        table[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7)
    c_in = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            conv_bn(f"{name}.conv1", f"{name}.bn1", width, c_in, 1)
            conv_bn(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            conv_bn(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_bn(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, c_in, 1)
            c_in = 4 * width
    return table


def test_state_dict_of_resnet50_against_the_table_of_torchvision():
    table = torchvision_resnet50()
    assert len(table) == 320
    vectors = ("running_mean", "running_var", "num_batches_tracked")
    learnt = [shape for name, shape in table.items() if not name.endswith(vectors)]
    assert sum(map(math.prod, learnt)) == 25_557_032  # what torchvision publishes
    model = models.ResNet50()
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    state = export.to_pytorch(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape), like))
    assert {name: array.shape for name, array in state.items()} == table
    counters = {name for name in table if name.endswith("num_batches_tracked")}
    assert {name for name, array in state.items() if array.dtype == np.int64} == counters
    assert {array.dtype for name, array in state.items() if name not in counters} == {
        np.dtype(np.float32)
    }


def torch_conv(x, weight, stride):
    """PyTorch's Conv2d of (batch, channels, height, width), padded by half of the kernel."""
    size = weight.shape[-1]
    x = np.pad(np.float64(x), ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], weight)


def torchvision_forward(state, x, blocks):
    """The forward pass of torchvision's ResNet of bottlenecks, in NumPy, from its state dict."""

    def conv_bn(x, conv, bn, stride=1):
        x = torch_conv(x, state[f"{conv}.weight"], stride)
        weight, bias, mean, var = (
            state[f"{bn}.{name}"][:, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = np.maximum(conv_bn(x, "conv1", "bn1", 2), 0)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))  # of what is not negative
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    x = x.max((-2, -1))
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(conv_bn(x, f"{name}.conv1", f"{name}.bn1"), 0)
            y = np.maximum(conv_bn(y, f"{name}.conv2", f"{name}.bn2", stride), 0)
            y = conv_bn(y, f"{name}.conv3", f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_state_dict_in_the_forward_pass_of_torchvision():
    model, variables, x, expected = sparse_model("bottleneck")
    state = export.to_pytorch(model, variables)
    found = torchvision_forward(state, x.transpose(0, 3, 1, 2), model.stage_sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
def test_state_dict_in_torchvision():
    import torch
    import torchvision.models.resnet as theirs

    # The two networks have these four stages, whatever their depth.
    model, shape = models.ResNet((1, 1, 1, 1), bottleneck=True, num_classes=5), (2, 65, 64, 3)
    values, x = random_variables(model, shape), images(*shape)
    variables = unflatten_dict(values, sep="/")
    state = export.to_pytorch(model, variables)
    network = theirs.ResNet(theirs.Bottleneck, [1, 1, 1, 1], num_classes=5).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with torch.no_grad():
        found = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(found).max())


@pytest.mark.parametrize("name", ["mlp", "layer norm", "no norm"])
def test_state_dict_of_an_mlp_in_a_forward_pass_of_its_own(name):
    model, variables, x, expected = sparse_model(name)
    state, x = export.to_pytorch(model, variables), np.float64(x.reshape(len(x), -1))
    for i in range(len(model.features)):
        x = x @ state[f"dense{i}.weight"].T + state.get(f"dense{i}.bias", 0)
        if model.norm != "none":
            mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            mean, var = (
                state.get(f"norm{i}.running_{name}", own)
                for name, own in (("mean", mean), ("var", var))
            )
            x = (x - mean) / np.sqrt(var + 1e-5) * state[f"norm{i}.weight"] + state[f"norm{i}.bias"]
        x = np.maximum(x, 0)
    np.testing.assert_allclose(
        x @ state["head.weight"].T + state["head.bias"], expected, rtol=1e-4, atol=1e-4
    )


# --- ONNX ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_computes_what_the_model_does(name):
    model, variables, x, expected = sparse_model(name)
    content = export.to_onnx(model, variables, x.shape[1:])
    dense = export.to_onnx(model, variables, x.shape[1:], sparse=False)
    onnx.checker.check_model(content)
    onnx.checker.check_model(dense, full_check=True)
    session, other = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for file in (content, dense)
    )
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("x", ["batch", *x.shape[1:]])
    assert (result.name, result.shape) == ("logits", ["batch", model.num_classes])
    scale = np.abs(expected).max()
    for examples in (x, x[:1]):
        (found,) = session.run(None, {"x": examples})
        np.testing.assert_allclose(found, expected[: len(examples)], rtol=0, atol=1e-5 * scale)
        np.testing.assert_array_equal(found, other.run(None, {"x": examples})[0])


def test_onnx_initializers_are_sparse_where_that_is_smaller():
    model = models.MLP((64, 64, 64), num_classes=64, norm="none")
    values = random_variables(model, (1, 64))
    rng = np.random.default_rng(0)
    for layer, density in (("dense0", 0.3), ("dense1", 0.4), ("dense2", 0.0)):
        values[f"params/{layer}/kernel"] *= rng.random((64, 64)) < density
    variables = unflatten_dict(values, sep="/")
    graph = onnx.load_from_string(export.to_onnx(model, variables, (64,))).graph
    assert [tensor.values.name for tensor in graph.sparse_initializer] == [
        "dense0/kernel",
        "dense2/kernel",
    ]
    for tensor in graph.sparse_initializer:
        kernel = values[f"params/{tensor.values.name}"]
        positions = onnx.numpy_helper.to_array(tensor.indices)
        assert list(tensor.dims) == [64, 64]
        np.testing.assert_array_equal(positions, np.flatnonzero(kernel))
        found = onnx.numpy_helper.to_array(tensor.values)
        np.testing.assert_array_equal(found, kernel.reshape(-1)[positions])
    assert {"dense1/kernel", "head/kernel"} < {each.name for each in graph.initializer}


def test_onnx_says_when_it_cannot(monkeypatch):
    model, variables, x, _ = sparse_model("mlp")
    with monkeypatch.context() as patch:
        patch.setattr("sparseopt_jax.models.export.onnx._LARGEST", 100)
        with pytest.raises(ValueError, match="an ONNX file holds at most 100"):
            export.to_onnx(model, variables, x.shape[1:])
    monkeypatch.setitem(sys.modules, "onnx", None)
    (onnx_,) = PROJECT["optional-dependencies"]["onnx"]
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"pip install '{onnx_}'")):
        export.to_onnx(model, variables, x.shape[1:])


# --- arguments -------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_named():
    model, variables, x, _ = sparse_model("conv3x3")
    shape = x.shape[1:]
    without = {"params": variables["params"]}
    other = unflatten_dict(random_variables(models.ResNet8(6, base_channels=4), x.shape), sep="/")
    for arguments, error, message in (
        ((object(), variables, shape), TypeError, "model must be an MLP or ResNet"),
        ((model, variables, 8), TypeError, "input_shape must be the shape of one example"),
        ((model, variables, (8, 0, 1)), ValueError, r"input_shape\[1\]"),
        ((model, variables, (8, 8.0, 1)), TypeError, r"input_shape\[1\]"),
        ((model, variables, (8, 8)), ValueError, r"\(height, width, channels\), got \(8, 8\)"),
        ((model, variables, (8, 8, 3)), ValueError, "'params/conv_stem/kernel' of shape"),
        ((model, without, shape), ValueError, "variables have no 'batch_stats/bn_stem/mean'"),
        ((model, variables | {"more": {"a": 1.0}}, shape), ValueError, "variables have 'more/a'"),
        ((model, other, shape), ValueError, r"'params/head/.* has \((16, )?5,?\) there"),
        ((model, [1], shape), TypeError, "variables must be what model.init returns"),
    ):
        for function in (export.to_stablehlo, export.to_onnx):
            with pytest.raises(error, match=message):
                function(*arguments)
    for platforms in (("gpu",), (), ("cpu", "nope"), [1]):
        with pytest.raises(ValueError, match=r"platforms must be some of cpu, cuda, rocm, tpu"):
            export.to_stablehlo(model, variables, shape, platforms=platforms)
    for function in (export.to_stablehlo, export.to_onnx):
        with pytest.raises(TypeError, match="variables have 'batch_stats/bn_stem/mean' traced"):
            jax.eval_shape(lambda v, function=function: function(model, v, shape), variables)
    for arguments, error, message in (
        ((object(), variables), TypeError, "model must be an MLP or ResNet"),
        ((model, [1]), TypeError, "variables must be what model.init returns"),
        ((model, {}), ValueError, "variables have no 'batch_stats/bn_stem/mean'"),
        ((model, other), ValueError, r"'params/head/.* has \((16, )?5,?\) there"),
    ):
        with pytest.raises(error, match=message):
            export.to_pytorch(*arguments)
    with pytest.raises(ValueError, match=r"at least one axis, got \(\)"):
        export.to_stablehlo(*sparse_model("mlp")[:2], ())
