"""SparseOpt with HAM, and with optimizers that are invariant to the gradient's scale.

Adam and Lion normalise every weight's update: of a constant factor per neuron ahead of them nothing
is left but a trace through Adam's epsilon. Muon normalises a matrix as a whole: most of a factor
ahead of it cancels where a layer has at least as many inputs as neurons, and most of it survives
where neurons are several times as many. In these recipes ``scale_by_sparseopt`` therefore follows
the adaptive scaling, where it acts in full, and weight decay, which is not to be corrected, follows
``scale_by_sparseopt``. All of it is a chain of optax's transformations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import optax

from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.ham import ham
from sparseopt_jax.preconditioner import decay_mask, scale_by_sparseopt, sparseopt

PyTree: TypeAlias = Any


def sparseopt_ham(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = "kernels",
    *,
    alpha: float = 200.0,
    beta: float = 1e-3,
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """SparseOpt inside HAM: ``ham(sparseopt(learning_rate, ...), learning_rate, ...)``.

    HAM gets the raw gradient; SparseOpt corrects the inner step alone. Where HAM shall get the
    corrected gradient as well, put the correction ahead of both:
    ``optax.chain(scale_by_sparseopt(), ham(optax.sgd(lr, 0.9), lr))``. SparseOpt's paper reports
    accuracies of the two together without saying which of these it used.

    Args:
      learning_rate: a number or an optax schedule, for both.
      momentum: as in ``sparseopt``.
      nesterov: as in ``sparseopt``.
      weight_decay: as in ``sparseopt``.
      mask: which leaves decay, as in ``sparseopt``.
      alpha: as in ``ham``.
      beta: as in ``ham``.
      average_over: see ``scale_by_sparseopt``.
      out_axes: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A gradient transformation; wrap it in ``sparse_training`` or pass ``masks`` to its ``update``.

    Raises:
      TypeError, ValueError: as ``ham`` and ``scale_by_sparseopt``.

    Source: SparseOpt (arXiv 2605.27541), its experiments with HAM; HAM (arXiv 2506.02630).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> grads = {"kernel": jnp.full((4, 2), 0.1)}
      >>> masks = {"kernel": jnp.ones((4, 2), bool)}
      >>> tx = sx.sparseopt_ham(0.1)
      >>> updates, state = tx.update(grads, tx.init(params), params, masks=masks)
      >>> round(float(updates["kernel"][0, 0]), 4)  # 0.99 / e**2 - 1
      -0.866
    """
    inner = sparseopt(
        learning_rate,
        momentum,
        nesterov,
        weight_decay,
        mask,
        average_over=average_over,
        out_axes=out_axes,
        layers=layers,
        batch_axes=batch_axes,
    )
    return ham(inner, learning_rate, alpha, beta)


def sparseopt_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """AdamW with SparseOpt's factor after Adam's scaling; with dense masks ``optax.adamw``.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment under the root.
      mu_dtype: dtype of the first moment; None for that of the parameters.
      weight_decay: factor of the decoupled weight decay, which SparseOpt does not scale.
      mask: which leaves decay, as in ``optax.adamw``: by default all, biases too.
      nesterov: whether to use Nesterov's momentum (NAdamW).
      average_over: see ``scale_by_sparseopt``.
      out_axes: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A gradient transformation; wrap it in ``sparse_training`` or pass ``masks`` to its ``update``.

    Raises:
      TypeError, ValueError: as ``scale_by_sparseopt``.

    Source: SparseOpt (arXiv 2605.27541) for the factor, its place is this library's choice; AdamW
    (arXiv 1711.05101).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((16, 4))}
      >>> tx = sx.sparse_training(
      ...     sx.sparseopt_adamw(1e-3), distribution=sx.ERK(0.75), topology=sx.Static()
      ... )
      >>> opt_state = tx.init(params)
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      16
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_sparseopt(average_over, out_axes, layers, batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay, decay_mask(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )


def sparseopt_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """Lion with SparseOpt's factor after the sign; with dense masks ``optax.lion``.

    Args:
      learning_rate: a number or an optax schedule.
      b1: weight of the momentum where it meets the gradient.
      b2: decay of the momentum.
      mu_dtype: dtype of the momentum; None for that of the parameters.
      weight_decay: factor of the decoupled weight decay, which SparseOpt does not scale.
      mask: which leaves decay, as in ``optax.lion``: by default all, biases too.
      average_over: see ``scale_by_sparseopt``.
      out_axes: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A gradient transformation; wrap it in ``sparse_training`` or pass ``masks`` to its ``update``.

    Raises:
      TypeError, ValueError: as ``scale_by_sparseopt``.

    Source: SparseOpt (arXiv 2605.27541) for the factor, its place is this library's choice; Lion
    (arXiv 2302.06675).

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> masks = {"kernel": jnp.array([[True, True], [True, False], [True, False], [True, False]])}
      >>> tx = sx.sparseopt_lion(1.0, weight_decay=0.0, average_over=None)
      >>> updates, state = tx.update(params, tx.init(params), params, masks=masks)
      >>> updates["kernel"][0].tolist()
      [-1.0, -0.5]
    """
    return optax.chain(
        optax.scale_by_lion(b1, b2, mu_dtype),
        scale_by_sparseopt(average_over, out_axes, layers, batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay, decay_mask(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )


def sparseopt_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Sequence[Any] | str = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps_root: float = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: float | None = None,
    average_over: str | None = "layer",
    out_axes: AxesByPath | None = None,
    layers: Callable[[str], bool] | None = None,
    batch_axes: AxesByPath = (),
) -> optax.GradientTransformationExtraArgs:
    """Muon with SparseOpt's factor after it; with dense masks ``optax.contrib.muon``.

    Matrices get Muon, all other leaves Adam, and the kernels of both SparseOpt's factor. After it
    the updates of a layer are no longer orthogonal.

    Args:
      learning_rate: a number or an optax schedule.
      ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of a preset.
      ns_steps: number of its iterations.
      beta: decay of Muon's momentum.
      eps: added to the norms that Muon and Adam divide by.
      weight_decay: factor of the decoupled decay of Muon's leaves, which SparseOpt does not scale.
      weight_decay_mask: which of Muon's leaves decay; None for all.
      mu_dtype: dtype of the momentum and of Adam's first moment; None for that of the parameters.
      nesterov: whether to use Nesterov's momentum, in both.
      adaptive: whether to scale Muon's updates by the dual norm of what they were made from.
      preconditioning: what precedes the iteration: "frobenius", "spectral", "aol" or "schatten".
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps_root: added to the second moment under the root.
      adam_weight_decay: factor of the decoupled decay of Adam's leaves.
      adam_learning_rate: a rate for Adam's leaves; None for ``learning_rate``.
      muon_weight_dimension_numbers: which leaves get Muon, and as which matrices: a tree (or a
        prefix, or a function of the parameters) of ``optax.contrib.MuonDimensionNumbers``, None for
        leaves that get Adam. By default leaves of two dimensions get Muon. A convolution of shape
        (height, width, in, out) is a matrix by ``MuonDimensionNumbers((0, 1, 2), 3)``.
      consistent_rms: bring Muon's updates to about this root mean square, whatever their shape.
      average_over: see ``scale_by_sparseopt``.
      out_axes: see ``scale_by_sparseopt``.
      layers: see ``scale_by_sparseopt``.
      batch_axes: see ``scale_by_sparseopt``.

    Returns:
      A gradient transformation; wrap it in ``sparse_training`` or pass ``masks`` to its ``update``.

    Raises:
      TypeError, ValueError: as ``scale_by_sparseopt`` and ``optax.contrib.muon``.

    Source: SparseOpt (arXiv 2605.27541) for the factor, its place is this library's choice; Muon is
    Scalable for LLM Training (arXiv 2502.16982), and optax's documentation of ``contrib.muon``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> params = {"kernel": jnp.ones((16, 4)), "bias": jnp.zeros(4)}
      >>> tx = sx.sparse_training(
      ...     sx.sparseopt_muon(0.02), distribution=sx.ERK(0.75), topology=sx.Static()
      ... )
      >>> opt_state = tx.init(params)
      >>> int(sx.get_masks(opt_state)["kernel"].sum())
      16
    """
    dimension_numbers = _for_any_tree(muon_weight_dimension_numbers)
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate
    return optax.chain(
        # With a rate of -1 and no decay it is its directions alone: times -(-1), exactly.
        optax.contrib.muon(
            learning_rate=-1.0,
            ns_coeffs=ns_coeffs,
            ns_steps=ns_steps,
            beta=beta,
            eps=eps,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
            adam_eps_root=adam_eps_root,
            muon_weight_dimension_numbers=dimension_numbers,
            consistent_rms=consistent_rms,
        ),
        scale_by_sparseopt(average_over, out_axes, layers, batch_axes=batch_axes),
        optax.partition(
            {
                "muon": optax.chain(
                    optax.add_decayed_weights(weight_decay, weight_decay_mask),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                "adam": optax.chain(
                    optax.add_decayed_weights(adam_weight_decay),
                    optax.scale_by_learning_rate(adam_learning_rate),
                ),
            },
            lambda params: _muon_labels(params, dimension_numbers),
        ),
    )


def _for_any_tree(dimension_numbers: Any) -> Any:
    """The same as a function, which also takes the empty tree that optax.tree.map_params passes."""
    if dimension_numbers is None:
        return None

    def of(params: PyTree) -> PyTree:
        if not jax.tree.leaves(params):
            return params
        return dimension_numbers(params) if callable(dimension_numbers) else dimension_numbers

    return of


def _muon_labels(params: PyTree, dimension_numbers: Callable[[PyTree], PyTree] | None) -> PyTree:
    """Which leaves get "muon" and which "adam", by the rule of ``optax.contrib.muon``."""
    if dimension_numbers is None:
        return jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params)

    def label(numbers: Any, part: PyTree) -> PyTree:
        return jax.tree.map(lambda _: "adam" if numbers is None else "muon", part)

    def is_entry(node: Any) -> bool:
        return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)

    return jax.tree.map(label, dimension_numbers(params), params, is_leaf=is_entry)
