"""The models' forward pass and normalisation against a second implementation in plain NumPy."""

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from sparseopt_jax import models
from sparseopt_jax.models.resnet import ResidualBlock
from tests.model_variables import KEY, images, random_variables, train_step

# The forward pass in evaluation mode, in float64. The names of layers are those of the models.


def conv(x, kernel, stride):
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] - size + 1, stride)
    columns = range(0, x.shape[2] - size + 1, stride)
    out = np.zeros((x.shape[0], len(rows), len(columns), kernel.shape[-1]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = x[:, row : row + size, column : column + size, :]
            out[:, i, j] = window.reshape(len(x), -1) @ kernel.reshape(-1, kernel.shape[-1])
    return out


def max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = range(0, x.shape[1] - 2, 2), range(0, x.shape[2] - 2, 2)
    pooled = [[x[:, r : r + 3, c : c + 3].max(axis=(1, 2)) for c in columns] for r in rows]
    return np.transpose(pooled, (2, 0, 1, 3))


def batch_norm(x, values, path):
    mean, var = values[f"batch_stats/{path}/mean"], values[f"batch_stats/{path}/var"]
    scale, bias = values[f"params/{path}/scale"], values[f"params/{path}/bias"]
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def block(x, values, path, stride, bottleneck, shortcut):
    def conv_bn(x, suffix, stride):
        x = conv(x, values[f"params/{path}/conv{suffix}/kernel"], stride)
        return batch_norm(x, values, f"{path}/bn{suffix}")

    if bottleneck:
        y = np.maximum(conv_bn(x, 1, 1), 0)
        y = np.maximum(conv_bn(y, 2, stride), 0)
        y = conv_bn(y, 3, 1)
    else:
        y = np.maximum(conv_bn(x, 1, stride), 0)
        y = conv_bn(y, 2, 1)
    if x.shape != y.shape:
        if shortcut == "identity":
            padded = np.zeros(y.shape)
            padded[..., : x.shape[-1]] = x[:, ::stride, ::stride]
            x = padded
        else:
            x = conv_bn(x, "_shortcut", stride)
    return np.maximum(x + y, 0)


def resnet(x, values, model):
    large = model.stem == "conv7x7_pool"
    x = conv(x, values["params/conv_stem/kernel"], 2 if large else 1)
    x = np.maximum(batch_norm(x, values, "bn_stem"), 0)
    if large:
        x = max_pool(x)
    for stage, blocks in enumerate(model.stage_sizes, start=1):
        for i in range(blocks):
            stride = 2 if stage > 1 and i == 0 else 1
            path = f"stage{stage}_block{i}"
            x = block(x, values, path, stride, model.bottleneck, model.shortcut)
    return x.mean(axis=(1, 2)) @ values["params/head/kernel"] + values["params/head/bias"]


RESNETS = {
    "conv3x3": (models.ResNet8(num_classes=5, base_channels=4), (2, 8, 8, 1)),
    "conv1x1": (models.ResNet8(5, shortcut="conv1x1", base_channels=3, width=2), (2, 9, 8, 3)),
    "identity": (models.ResNet8(5, shortcut="identity", base_channels=4), (2, 11, 10, 3)),
    "resnet18": (models.ResNet18(num_classes=5, base_channels=3), (2, 40, 32, 3)),
    "bottleneck": (
        models.ResNet((1, 2), bottleneck=True, num_classes=5, base_channels=3),
        (2, 32, 33, 3),
    ),
}


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_forward_pass_against_numpy(name):
    model, shape = RESNETS[name]
    values, x = random_variables(model, shape), images(*shape)
    logits = jax.jit(model.apply)(unflatten_dict(values, sep="/"), x)
    expected = resnet(x, values, model)
    assert logits.shape == (shape[0], 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_identity_shortcut_subsamples_and_pads_with_zeros(stride):
    # With scale and bias 0 in the last normalisation the block is relu(shortcut).
    model = ResidualBlock(6, stride=stride, shortcut="identity", zero_init_residual=True)
    x = images(2, 7, 8, 4)
    out = jax.jit(lambda x: model.apply(model.init(KEY, x), x))(x)
    expected = np.zeros((2, *x[0, ::stride, ::stride, 0].shape, 6), np.float32)
    expected[..., :4] = np.maximum(x[:, ::stride, ::stride], 0)
    np.testing.assert_array_equal(out, expected)


# --- normalisation ---------------------------------------------------------------------------


def test_batch_norm_against_numpy_over_two_steps():
    model = models.MLP((6, 5), num_classes=3)
    values = random_variables(model, (16, 2, 4))
    variables = unflatten_dict(values, sep="/")
    values = {path: np.float64(value) for path, value in values.items()}
    step = train_step(model)
    for seed in (1, 2):
        x = 3 + 2 * images(16, 2, 4, seed=seed)
        logits, new = step(variables, x)
        variables = variables | new
        y = np.float64(x).reshape(16, 8)
        for layer in (0, 1):
            y = y @ values[f"params/dense{layer}/kernel"]
            mean, var = y.mean(axis=0), y.var(axis=0)
            for name, value in (("mean", mean), ("var", var)):
                path = f"batch_stats/norm{layer}/{name}"
                values[path] = 0.9 * values[path] + 0.1 * value
                running = variables["batch_stats"][f"norm{layer}"][name]
                np.testing.assert_allclose(running, values[path], rtol=1e-4, atol=1e-5)
            y = (y - mean) / np.sqrt(var + 1e-5)
            y = y * values[f"params/norm{layer}/scale"] + values[f"params/norm{layer}/bias"]
            y = np.maximum(y, 0)
        y = y @ values["params/head/kernel"] + values["params/head/bias"]
        np.testing.assert_allclose(logits, y, rtol=1e-3, atol=1e-3)


def test_convolutions_are_normalised_over_batch_and_space():
    model = models.ResNet((1,), num_classes=3, base_channels=4, stem="conv3x3")
    values, x = random_variables(model, (4, 8, 6, 2)), 1 + images(4, 8, 6, 2)
    _, new = train_step(model)(unflatten_dict(values, sep="/"), x)
    y = conv(x, values["params/conv_stem/kernel"], 1)
    for name, value in (("mean", y.mean(axis=(0, 1, 2))), ("var", y.var(axis=(0, 1, 2)))):
        expected = 0.9 * values[f"batch_stats/bn_stem/{name}"] + 0.1 * value
        np.testing.assert_allclose(new["batch_stats"]["bn_stem"][name], expected, rtol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_mlp_in_evaluation_against_numpy(norm):
    model = models.MLP((6,), num_classes=3, norm=norm)
    values, x = random_variables(model, (5, 4, 2)), images(5, 4, 2)
    logits = jax.jit(model.apply)(unflatten_dict(values, sep="/"), x)
    y = x.reshape(5, 8) @ values["params/dense0/kernel"]
    if norm == "none":
        y = y + values["params/dense0/bias"]
    elif norm == "batch":
        y = batch_norm(y, values, "norm0")
    else:
        y = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(y.var(axis=1, keepdims=True) + 1e-5)
        y = y * values["params/norm0/scale"] + values["params/norm0/bias"]
    expected = np.maximum(y, 0) @ values["params/head/kernel"] + values["params/head/bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
