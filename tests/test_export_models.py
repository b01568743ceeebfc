"""Models in the formats of others: run by their own runtimes, and against tables by hand."""

import jax
import jax.export
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from sparseopt_jax import models
from sparseopt_jax.models import export
from tests.model_variables import images, random_variables

# Each shortcut, both stems and blocks, odd sizes under strides of 2, and every normalisation.
MODELS = {
    "conv3x3": (models.ResNet8(num_classes=5, base_channels=4), (9, 8, 1)),
    "identity": (models.ResNet8(5, shortcut="identity", base_channels=4), (11, 10, 3)),
    "bottleneck": (
        models.ResNet((1, 2), bottleneck=True, num_classes=5, base_channels=3),
        (32, 33, 3),
    ),
    "mlp": (models.MLP((6, 5), num_classes=3), (4, 3)),
    "layer norm": (models.MLP((6,), num_classes=3, norm="layer"), (4,)),
    "no norm": (models.MLP((6,), num_classes=3, norm="none"), (4,)),
}


def sparse_model(name, density=0.2):
    """A model, its variables with most weights 0, examples and what the model makes of them."""
    model, shape = MODELS[name]
    values = random_variables(model, (2, *shape))
    rng = np.random.default_rng(3)
    for path, value in values.items():
        if path.endswith("kernel"):
            value *= rng.random(value.shape) < density
    variables, x = unflatten_dict(values, sep="/"), images(3, *shape)
    return model, variables, x, np.asarray(jax.jit(model.apply)(variables, x))


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
        with pytest.raises(error, match=message):
            export.to_stablehlo(*arguments)
    with pytest.raises(ValueError, match=r"at least one axis, got \(\)"):
        export.to_stablehlo(*sparse_model("mlp")[:2], ())
