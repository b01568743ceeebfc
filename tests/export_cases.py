"""What the tests of exports share: small sparse models, and what they make of examples."""

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sparseopt_jax import models
from tests.model_variables import images, random_variables

# Each shortcut, both stems and blocks, odd sizes under strides of 2, and every normalisation.
MODELS = {
    "conv3x3": (models.ResNet8(num_classes=5, base_channels=4), (9, 8, 1)),
    "identity": (models.ResNet8(5, shortcut="identity", base_channels=4), (11, 10, 3)),
    "bottleneck": (
        models.ResNet((1, 2), bottleneck=True, num_classes=5, base_channels=3),
        (32, 33, 3),
    ),
    "inner channels": (
        models.ResNet(
            (1, 1),
            True,
            num_classes=5,
            base_channels=4,
            stem="conv3x3",
            inner_channels=((2, 3), (5, 1)),
        ),
        (8, 7, 3),
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
