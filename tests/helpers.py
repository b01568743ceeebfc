"""Trees of parameters and masks, a uniformity statistic, for several tests."""

import itertools

import jax
import numpy as np


def make_params(dtype=np.float32, seed=0):
    """A small network: one convolution, two dense layers, norm, embedding and a scalar."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "Conv_0": {"kernel": normal(3, 3, 4, 10), "bias": normal(10)},
        "BatchNorm_0": {"scale": normal(10), "bias": normal(10)},
        "Dense_0": {"kernel": normal(30, 20), "bias": normal(20)},
        "Dense_1": {"kernel": normal(20, 15)},
        "Embed_0": {"embedding": normal(11, 7)},
        "temperature": normal(),
    }


KERNELS = {
    "Conv_0/kernel": (3, 3, 4, 10),
    "Dense_0/kernel": (30, 20),
    "Dense_1/kernel": (20, 15),
}


def flat(tree):
    """{path: leaf} with the '/'-joined paths of the library."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def random_masks(params, density=0.3, seed=1):
    """Masks of any counts for the kernels, all True elsewhere; not the library's."""
    rng = np.random.default_rng(seed)

    def leaf(path, w):
        prune = path[-1].key == "kernel"
        return rng.random(w.shape) < density if prune else np.ones(w.shape, bool)

    return jax.tree.map_with_path(leaf, params)


def subset_chi_square(masks, n, k):
    """Chi-square statistic of the subsets drawn against all subsets being equally likely."""
    subsets = dict.fromkeys(itertools.combinations(range(n), k), 0)
    for mask in np.asarray(masks):
        subsets[tuple(np.flatnonzero(mask).tolist())] += 1
    expected = len(masks) / len(subsets)
    return sum((c - expected) ** 2 / expected for c in subsets.values()), len(subsets) - 1


# Mean plus six standard deviations of the chi-square distribution: for the 9 to 34 degrees of
# freedom below, a right implementation exceeds it with a probability under 1e-5, and the keys
# are fixed. With 4,000 draws a subset drawn a third too often, or never, exceeds it.
def chi_square_bound(freedom):
    return freedom + 6 * np.sqrt(2 * freedom)
