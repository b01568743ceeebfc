"""The library's rules a second time, in plain NumPy, written from the papers.

Nothing here imports jax or the library, and nothing is written for speed: sorts where the
library bisects, loops where it is vectorised, float64 where it is float32. What the two agree on
is therefore not one mistake made twice. `resnet50_layers` is a list written by hand from the
architecture (He et al. 2016, the v1.5 variant), not read off the project's model.
"""

import fnmatch
import math

import numpy as np

# --- selection -------------------------------------------------------------------------------


def rank_key(scores):
    """Scores as float64, exactly, with -0.0 made +0.0; NaN stays NaN."""
    return np.asarray(scores).astype(np.float64) + 0.0


def top_k_mask(scores, k, where=None):
    """Best k of the candidates: NaN after everything, ties to the lowest flat index."""
    values = rank_key(scores).ravel()
    candidate = np.ones(values.size, bool) if where is None else np.asarray(where, bool).ravel()
    descending = np.where(np.isnan(values), 0.0, -values)
    order = np.lexsort((np.arange(values.size), descending, np.isnan(values), ~candidate))
    chosen = np.zeros(values.size, bool)
    chosen[order[: min(int(k), int(candidate.sum()))]] = True
    return chosen.reshape(np.shape(scores))


# --- distributions ---------------------------------------------------------------------------


def erk_density(shapes, sparsity, kernel=True):
    """Density of each layer under ERK (or ER): min(1, eps * raw), eps by bisection.

    Clipping at 1 and solving for eps again until no layer is over-full has this same fixed point,
    reached here by another road.
    """
    raw, size = {}, {}
    for path, shape in shapes.items():
        ends = shape if kernel else shape[-2:]
        raw[path] = sum(ends) / math.prod(ends)
        size[path] = math.prod(shape)
    target = (1 - sparsity) * sum(size.values())
    low, high = 0.0, 1 / min(raw.values())
    for _ in range(200):
        eps = (low + high) / 2
        if sum(min(1.0, eps * raw[p]) * size[p] for p in shapes) < target:
            low = eps
        else:
            high = eps
    return {path: min(1.0, high * raw[path]) for path in shapes}


def expected_counts(density, shapes):
    """Real-valued number of weights each layer keeps."""
    return {path: density[path] * math.prod(shapes[path]) for path in shapes}


def matches(pattern, path):
    return fnmatch.fnmatchcase(path, pattern)


def resnet50_layers():
    """The 54 kernels of ResNet-50 v1.5: path -> (HWIO shape, output positions at 224x224)."""
    layers = {"conv_stem/kernel": ((7, 7, 3, 64), 112 * 112)}
    inputs = 64
    stages = ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))
    for stage, (blocks, width, side) in enumerate(stages):
        for block in range(blocks):
            # The stride sits in the 3x3 convolution (v1.5), so the first 1x1 of a stage still
            # works on the larger picture of the stage before.
            side_in = side * 2 if stage > 0 and block == 0 else side
            name = f"stage{stage}_block{block}"
            layers[f"{name}/conv1/kernel"] = ((1, 1, inputs, width), side_in**2)
            layers[f"{name}/conv2/kernel"] = ((3, 3, width, width), side**2)
            layers[f"{name}/conv3/kernel"] = ((1, 1, width, 4 * width), side**2)
            if block == 0:
                layers[f"{name}/shortcut/kernel"] = ((1, 1, inputs, 4 * width), side**2)
            inputs = 4 * width
    layers["fc/kernel"] = ((2048, 1000), 1)
    return layers


def flops_fraction(density, layers):
    """Multiply-adds of the sparse net over those of the dense one."""
    macs = {path: math.prod(shape) * positions for path, (shape, positions) in layers.items()}
    return sum(density[path] * macs[path] for path in layers) / sum(macs.values())


# --- fan-in and SparseOpt's factor -----------------------------------------------------------


def fan_in(mask, out_axes=-1):
    mask = np.asarray(mask)
    out = out_axes if isinstance(out_axes, tuple) else (out_axes,)
    out = sorted(axis % mask.ndim for axis in out)
    inner = tuple(axis for axis in range(mask.ndim) if axis not in out)
    return mask.astype(np.int64).sum(axis=inner)


def along_out_axes(values, ndim, out_axes=-1):
    """Per-neuron values, reshaped so that they broadcast against the kernel."""
    out = out_axes if isinstance(out_axes, tuple) else (out_axes,)
    out = sorted(axis % ndim for axis in out)
    shape = [1] * ndim
    for axis, length in zip(out, np.shape(values), strict=True):
        shape[axis] = length
    return np.reshape(values, shape)


def sparseopt_factors(masks, average_over="layer", out_axes=-1):
    """{path: mask} -> {path: factor that broadcasts against the kernel}, float64.

    1 - s_i is fan_in_i / N; the factor is sqrt(1 - s_i) / sqrt(1 - s_avg), and 1 where a layer is
    dense. A neuron without weights has the factor 0, whatever the average is.
    """
    one_minus_s = {}
    for path, mask in masks.items():
        if not mask.all():
            count = fan_in(mask, out_axes)
            one_minus_s[path] = count / (mask.size / count.size)
    everywhere = np.concatenate([v.ravel() for v in one_minus_s.values()] or [np.ones(1)]).mean()
    factors = {}
    for path, mask in masks.items():
        if path not in one_minus_s:
            factors[path] = np.ones((1,) * mask.ndim)
            continue
        own = one_minus_s[path]
        average = {"layer": own.mean(), "network": everywhere, None: 1.0}[average_over]
        ratio = own / average if average > 0 else np.zeros_like(own)
        factors[path] = along_out_axes(np.sqrt(ratio), mask.ndim, out_axes)
    return factors


class SGD:
    """SGD with momentum as PyTorch and optax state it, after SparseOpt's factor; float64."""

    def __init__(self, learning_rate, momentum, nesterov, weight_decay, average_over="layer"):
        self.rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov
        self.weight_decay, self.average_over = weight_decay, average_over
        self.velocity, self.count = {}, 0

    def step(self, params, grads, masks):
        """One step; the rate is a float or a function of the step number."""
        factors = sparseopt_factors(masks, self.average_over)
        rate = self.rate(self.count) if callable(self.rate) else self.rate
        self.count += 1
        new = {}
        for path, w in params.items():
            g = grads[path] * factors[path]
            if w.ndim >= 2:
                g = g + self.weight_decay * w
            v = self.momentum * self.velocity.get(path, np.zeros_like(w)) + g
            self.velocity[path] = v
            new[path] = w - rate * (g + self.momentum * v if self.nesterov else v)
        return new


# --- topology --------------------------------------------------------------------------------


def drop_fraction_at(drop_fraction, end_step, step):
    return drop_fraction / 2 * (1 + math.cos(math.pi * step / end_step))


def n_drop(fraction, n_active):
    """floor(fraction * n_active), the product in float32 as everywhere in the project."""
    return int(np.floor(np.float32(fraction) * np.float32(n_active)))


def kept_by_magnitude(mask, w, fraction):
    drop = n_drop(fraction, mask.sum())
    return top_k_mask(np.abs(rank_key(w)), mask.sum() - drop, where=mask), drop


def kept_by_sign(mask, w, fraction):
    """Mocanu's rule: a fraction of the positive and a fraction of the negative weights go.

    Those nearest to zero on either side: the smallest positive, the largest negative ones.
    """
    kept = np.zeros_like(mask)
    for side in (mask & (w > 0), mask & (w < 0)):
        drop = n_drop(fraction, side.sum())
        kept |= top_k_mask(np.abs(rank_key(w)), side.sum() - drop, where=side)
    return kept, int(mask.sum() - kept.sum())


def rigl_layer(mask, w, score, fraction):
    """One layer's new mask and the kept weights; ties, if any, to the lowest index."""
    if mask.all() or not (np.isfinite(rank_key(w)).all() and np.isfinite(rank_key(score)).all()):
        return mask.copy(), mask.copy()
    kept, drop = kept_by_magnitude(mask, w, fraction)
    return kept | top_k_mask(np.abs(rank_key(score)), drop, where=~kept), kept


def check_update(old, new, w, score, fraction):
    """Assert what every RigL update must satisfy, however its ties were broken.

    `score` None: random growth (SET), where only the drop side is determined.
    """
    old, new = np.asarray(old), np.asarray(new)
    assert new.dtype == np.bool_
    assert new.shape == old.shape
    assert new.sum() == old.sum()
    finite = np.isfinite(rank_key(w)).all()
    finite = finite and (score is None or np.isfinite(rank_key(score)).all())
    drop = n_drop(fraction, old.sum())
    if not finite or drop == 0 or old.all():
        np.testing.assert_array_equal(new, old)
        return
    keep = int(old.sum()) - drop
    size = np.abs(rank_key(w))
    threshold = np.sort(size[old])[::-1][keep - 1] if keep else np.inf
    surely_kept = old & (size > threshold)
    perhaps_kept = old & (size == threshold)
    assert new[surely_kept].all()
    assert (new & perhaps_kept).sum() >= keep - surely_kept.sum()
    if score is None:
        return
    # Whatever was left out must not have outranked anything that was certainly grown.
    gain = np.abs(rank_key(score))
    surely_grown = new & ~surely_kept & ~perhaps_kept
    if surely_grown.any() and (~new).any():
        assert gain[~new].max() <= gain[surely_grown].min()
