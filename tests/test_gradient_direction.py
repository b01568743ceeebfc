"""SparseOpt's gain on a constructed case: the gradient's direction against the dense net's."""

import jax
import numpy as np
import optax
import pytest

import sparseopt_jax as sx

INPUTS, NEURONS, BATCH, CLASSES = 512, 64, 4096, 10


def normalised(z, norm):
    """Pre-activations (batch, neurons) normalised over the batch, over the neurons, or not."""
    if norm == "batch":
        return jax.nn.standardize(z, axis=0, epsilon=1e-5)
    if norm == "layer":
        return jax.nn.standardize(z, axis=1, epsilon=1e-5)
    if norm == "group":
        groups = z.reshape(len(z), 8, -1)
        return jax.nn.standardize(groups, axis=2, epsilon=1e-5).reshape(z.shape)
    return z


def gradients(seed, norm):
    """One layer of 64 neurons with densities from 0.02 to 1, then ReLU and a linear readout.

    Densities are in random order, so that neurons of a group differ as those of the layer do.

    Returns the mask, the gradient of the sparse net, the same corrected by SparseOpt, and the
    gradient of the dense net with the same weights.
    """
    rng = np.random.default_rng(seed)
    fan_in = rng.permutation(np.round(np.linspace(0.02, 1, NEURONS) * INPUTS))
    mask = np.argsort(rng.random((INPUTS, NEURONS)), axis=0) < fan_in
    x, w, readout, teacher = (
        rng.normal(size=shape, scale=std).astype(np.float32)
        for shape, std in (
            ((BATCH, INPUTS), 1),
            ((INPUTS, NEURONS), (2 / INPUTS) ** 0.5),
            ((NEURONS, CLASSES), (1 / NEURONS) ** 0.5),
            ((INPUTS, CLASSES), 1),
        )
    )
    labels = (x @ teacher).argmax(axis=1)

    @jax.jit
    @jax.grad
    def gradient(w):
        logits = jax.nn.relu(normalised(x @ w, norm)) @ readout
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    dense, raw = gradient(w), gradient(np.where(mask, w, np.float32(0)))
    corrected = correct(raw, mask)
    return (mask, *(np.asarray(g, np.float64) for g in (raw, corrected, dense)))


def correct(gradient, mask):
    tx = sx.scale_by_sparseopt()
    grads = {"kernel": gradient}
    return tx.update(grads, tx.init(grads), masks={"kernel": mask})[0]["kernel"]


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def measure(norm):
    """Rows of seeds: slope, cosines of per-neuron norms, cosines of the gradients themselves.

    All over active weights; each cosine to the dense net, raw and corrected.
    """
    rows = []
    for seed in range(4):
        mask, *grads = gradients(seed, norm)
        raw, corrected, dense = (np.where(mask, g, 0) for g in grads)
        lengths = [np.sqrt((g**2).sum(axis=0)) for g in (raw, corrected, dense)]
        slope, _ = np.polyfit(np.log(mask.mean(axis=0)), np.log(lengths[0] / lengths[2]), 1)
        rows.append(
            [
                slope,
                cosine(lengths[0], lengths[2]),
                cosine(lengths[1], lengths[2]),
                cosine(raw, dense),
                cosine(corrected, dense),
            ]
        )
    return np.array(rows).T


def test_with_batch_norm_the_corrected_gradient_is_closer_to_the_dense_one():
    """Theory: a neuron's gradient grows as its density to the power -1/2.

    Seeds differ by 0.02 in the slope, so the mean of four is within 0.05 of the theory; the
    norms' cosines were 0.95 and 0.999, the gradients' 0.84 and 0.89, by 0.02 from seed to seed.
    """
    slope, raw_norms, corrected_norms, raw, corrected = measure("batch")
    assert abs(slope.mean() + 0.5) < 0.05
    assert (raw_norms < 0.97).all()
    assert (corrected_norms > 0.995).all()
    assert (corrected > raw + 0.03).all()


def test_without_batch_norm_there_is_nothing_to_correct():
    """The norms already agree (0.998, corrected 0.98), and correcting turns the gradient away."""
    slope, raw_norms, corrected_norms, raw, corrected = measure(None)
    assert abs(slope.mean()) < 0.1
    assert (raw_norms > 0.99).all()
    assert (corrected_norms < raw_norms).all()
    assert corrected.mean() < raw.mean()


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_norms_over_neurons_amplify_a_layer_not_single_neurons(norm):
    """They divide all neurons of an example by one number, so the gradient is not rotated.

    The layer's gradient is longer, by about 1 / sqrt(1 - s_avg) = 1.40, and that is no matter of
    direction; the per-neuron correction turns it away. Slopes were -0.06 and -0.12.
    """
    slope, raw_norms, corrected_norms, raw, corrected = measure(norm)
    assert abs(slope.mean()) < 0.2
    assert (raw_norms > 0.99).all()
    assert (corrected_norms < raw_norms).all()
    assert corrected.mean() < raw.mean()
    mask, sparse, _, dense = gradients(0, norm)
    amplified = np.linalg.norm(sparse[mask]) / np.linalg.norm(dense[mask])
    np.testing.assert_allclose(amplified, mask.mean() ** -0.5, rtol=0.05)
