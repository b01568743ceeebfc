"""Topologies that drop some weights and grow others: SET and RigL.

Layers are updated together, in one search or two, which keeps the compiled program small.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.criteria import (
    DropBy,
    GrowBy,
    Momentum,
    check_drop_by,
    check_grow_by,
    drop_scores,
)
from sparseopt_jax.group_selection import Amounts, update_groups
from sparseopt_jax.layerwise import Operands, update_layerwise
from sparseopt_jax.schedules import MILLION, millionths_of
from sparseopt_jax.selection import counts, drop_and_grow, random_masks, top_k_masks
from sparseopt_jax.settings import (
    MOST_STEPS,
    as_bool,
    as_int,
    as_number,
    as_step,
    as_total_steps,
    check_function,
    keep,
)
from sparseopt_jax.stacks import Stacks
from sparseopt_jax.structures import Structure
from sparseopt_jax.topology import Topology

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

_SIGN = (
    "drop_by='sign' drops among single weights of each sign, as many as it grows, and does not go "
    "with {}; drop_by='magnitude' does"
)


class Layerwise(Topology):
    """A topology that updates each layer by itself, by numbers of weights to keep and to grow."""

    drop_by: DropBy = "magnitude"
    # What grows: by "scores", at "random", or None, nothing.
    _grow: ClassVar[str | None] = "scores"

    @property
    def needs_dense_gradient(self) -> bool:  # type: ignore[override]
        """Where growth goes by scores."""
        return self._grow == "scores"

    @property
    def _reads_scores(self) -> bool:
        """Whether layers depend on the scores, be it to stay as they are where there are none."""
        return True

    @abstractmethod
    def _amounts(self, step: Any, n_active: Array, n_total: Array) -> tuple[Array, Array]:
        """How many weights of each layer stay, and how many go to make room for others.

        Args:
          step: the training step.
          n_active: int32 (N,), how many are active.
          n_total: int32 (N,), how many there are to be.
        """

    def amounts(self, step: Any, of: Operands, masks: Stacks | None = None) -> Amounts:
        """How many members of each layer stay, go and are to be there in all.

        A layer with a weight or score that is not finite stays as it is. So does one whose scores
        are all 0: a layer that no gradient reaches could not train what it grew.
        """
        scores = of.scores if self._reads_scores else [jnp.ones((), w.dtype) for w in of.weights]
        found = [
            counts(m, ~(jnp.isfinite(w) & jnp.isfinite(s)), jnp.broadcast_to(s != 0, m.shape))
            for m, w, s in zip(masks or of.masks, of.weights, scores, strict=True)
        ]
        n_active, n_not_finite, n_scored = (
            of.layout.total(kind) for kind in zip(*found, strict=True)
        )
        n_total = n_active if of.planned is None else of.planned
        n_keep, n_drop = self._amounts(step, n_active, n_total)
        stay = (n_not_finite > 0) | (n_scored == 0)
        return Amounts(
            jnp.where(stay, n_active, n_keep),
            jnp.where(stay, 0, n_drop),
            jnp.where(stay, n_active, n_total),
            stay,
        )

    def drop_scores(self, weight: Array, score: Array) -> Array:
        """What to drop by, of one leaf: the smallest magnitudes."""
        return drop_scores(self.drop_by, weight, score)

    def update_layers(self, key: Array, step: Any, of: Operands) -> Stacks:
        """Of layers that are one group each."""
        amounts = self.amounts(step, of)
        n_grow = amounts.n_total - amounts.n_keep
        if self._grow == "scores":
            return drop_and_grow(
                key, of.masks, of.weights, of.scores, amounts.n_keep, n_grow, of.layout
            )
        drop_key, grow_key = jax.random.split(key)
        kept = self._kept(drop_key, of, amounts.n_keep)
        return kept if self._grow is None else _grown(grow_key, of, kept, n_grow)

    def _kept(self, key: Array, of: Operands, n_keep: Array, masks: Stacks | None = None) -> Stacks:
        where = of.masks if masks is None else masks
        return top_k_masks(of.weights, n_keep, key, where, by_magnitude=True, layout=of.layout)

    def update_groups(self, key: Array, step: Any, of: Operands, structure: Structure) -> Stacks:
        """Of layers that are several groups each."""
        amounts = self.amounts(step, of)
        return update_groups(
            key, of.masks, of.weights, of.scores, amounts, structure, grow=self._grow
        )

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        layers: PyTree | None = None,
    ) -> PyTree:
        """One update, whatever the schedule says; pure, and safe under jit, vmap and scan.

        Args:
          key: a JAX random key, for ties and for what is random.
          step: the training step; may be traced.
          masks: bool arrays.
          params: floating arrays of the same paths and shapes, held in any way.
          scores: likewise, what to grow by: the gradient with respect to all weights, also those
            that are not active. Ranked by absolute value.
          layers: a ``Layer`` in the place of each mask, see ``describe_layers``, which is the
            default. Each layer of a stack is updated on its own.

        Returns:
          Masks with the same number of active weights in every layer, or as many as planned.

        Raises:
          TypeError: a mask is not bool, or params or scores are not floating.
          ValueError: structure or shapes differ, or a pattern does not fit.
        """
        return update_layerwise(self, key, step, masks, params, scores, layers)


def _grown(key: Array, of: Operands, kept: Stacks, n_grow: Array) -> Stacks:
    grown = random_masks(key, of.layout, n_grow, kept, without=True)
    return [k | g for k, g in zip(kept, grown, strict=True)]


@dataclass(frozen=True)
class _DropAndGrow(Layerwise):
    """What SET and RigL share: when to update, and how much to drop."""

    interval: int
    drop_fraction: float | Callable[[Any], Any]
    end_step: int | float
    begin_step: int | float | None = None

    def __post_init__(self) -> None:
        check_steps(self)
        if callable(self.drop_fraction):
            check_function("drop_fraction", self.drop_fraction, "step")
            return
        keep(
            self,
            drop_fraction=as_number(
                "drop_fraction", self.drop_fraction, "a number in (0, 1), or a function of the step"
            ),
        )
        if not 0.0 < self.drop_fraction < 1.0:
            raise ValueError(
                "drop_fraction must lie in (0, 1): the share of a layer's active weights that the "
                f"first updates replace, got {self.drop_fraction}"
            )

    def drop_fraction_at(self, step: Any) -> Array:
        """Cosine decay to 0 at ``end_step``: drop_fraction / 2 * (1 + cos(pi * step / end_step)).

        Or what a schedule gives. Rounded to six decimals, so that no count depends on the last bits
        of a backend's arithmetic.

        Args:
          step: an int or an integer array.

        Returns:
          float32 of the shape of ``step``.
        """
        return self._drop_millionths(step).astype(jnp.float32) / MILLION

    def _drop_millionths(self, step: Any) -> Array:
        step = jnp.asarray(step)
        if callable(self.drop_fraction):
            fraction = jnp.clip(jnp.asarray(self.drop_fraction(step), jnp.float32), 0, 1)
        else:
            progress = jnp.clip(step.astype(jnp.float32) / max(self.end_step, 1), 0, 1)
            fraction = self.drop_fraction / 2 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.round(fraction * MILLION).astype(jnp.int32)

    def _amounts(self, step: Any, n_active: Array, n_total: Array) -> tuple[Array, Array]:
        """floor(fraction * n) go, in integer arithmetic."""
        n = jnp.minimum(n_active, n_total)
        n_drop = millionths_of(self._drop_millionths(step), n)
        return n - n_drop, n_drop


@dataclass(frozen=True)
class SET(_DropAndGrow):
    """Sparse evolutionary training: drop the smallest weights, grow at random.

    Attributes:
      interval: steps between updates (delta-T), at least 1.
      drop_fraction: share of a layer's active weights that an update replaces, in (0, 1), decayed
        by a cosine to 0 at ``end_step``; or any schedule, a function of the step, in [0, 1].
      end_step: last step on which an update may fall, inclusive; an int, or a share of
        ``total_steps`` in [0, 1].
      begin_step: first step on which one falls, likewise; one interval by default.
      drop_by: ``"magnitude"`` drops the smallest absolute values, as RigL's variant of SET does;
        ``"sign"`` drops the given share of the positive weights, the smallest of them, and of the
        negative weights, the largest of them, as Mocanu's original (active weights that are
        exactly zero have no sign and stay); others as of ``RigL``.
      skip_step: on the step of an update, move no weight.
      total_steps: the length of the run, where steps are shares of it.

    A weight that was dropped may be among those grown in the same update; it then keeps its value
    and its optimizer state. Ties are broken at random. A layer with a weight or gradient that is
    not finite, or whose gradient is zero everywhere, keeps its topology on that update.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: interval < 1, drop_fraction outside (0, 1), end before begin, unknown drop_by, or
        more steps than int32 counts.

    Source: Mocanu et al. (arXiv 1707.04780), algorithm 2; RigL (arXiv 1911.11134), table 1.

    Example:
      >>> import sparseopt_jax as sx
      >>> topology = sx.SET(interval=100, drop_fraction=0.3, end_step=1000)
      >>> bool(topology.is_update_step(0)), bool(topology.is_update_step(1000))
      (False, True)
    """

    drop_by: DropBy = "magnitude"
    skip_step: bool = False
    total_steps: int | None = None
    grow_by = "gradient"
    accumulate_steps = 1
    _grow: ClassVar[str | None] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_drop_by(self.drop_by, ("magnitude", "sign", "saliency", "random"))
        keep(self, skip_step=as_bool("skip_step", self.skip_step))

    def drop_scores(self, weight: Array, score: Array) -> Array:
        """What to drop by, of one leaf."""
        return weight if self.drop_by == "sign" else super().drop_scores(weight, score)

    def update_layers(self, key: Array, step: Any, of: Operands) -> Stacks:
        """Of layers that are one group each."""
        if self.drop_by != "sign":
            return super().update_layers(key, step, of)
        drop_key, grow_key = jax.random.split(key)
        pairs = list(zip(of.masks, of.weights, strict=True))
        kept, n_drop = of.masks, jnp.int32(0)
        for own_key, signed in zip(
            jax.random.split(drop_key),
            ([m & (w > 0) for m, w in pairs], [m & (w < 0) for m, w in pairs]),
            strict=True,
        ):
            # What compares as neither, subnormal numbers on some backends included, stays.
            amounts = self.amounts(step, of, signed)
            stays = self._kept(own_key, of, amounts.n_keep, signed)
            kept = [m & ~(s & ~still) for m, s, still in zip(kept, signed, stays, strict=True)]
            n_drop += amounts.n_drop
        return _grown(grow_key, of, kept, n_drop)

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        layers: PyTree | None = None,
    ) -> PyTree:
        """As ``RigL.update``."""
        for layer in jax.tree.leaves(layers) if self.drop_by == "sign" else ():
            if layer.structure is not None or layer.planned is not None:
                what = layer.structure or "a density schedule"
                raise ValueError(_SIGN.format(f"{what} of {layer.path!r}"))
        return super().update(key, step, masks, params, scores, layers)


@dataclass(frozen=True)
class RigL(_DropAndGrow):
    """Drop the smallest weights, grow where the gradient is largest.

    Attributes:
      interval: steps between updates (delta-T), at least 1.
      drop_fraction: as of ``SET``.
      end_step: as of ``SET``.
      begin_step: as of ``SET``; RigL's original: 0.
      grow_by: ``"gradient"`` ranks by the raw gradient; ``"corrected_gradient"`` by the one that
        SparseOpt corrects (D g), the ablation of its paper; ``Momentum()`` by an average of the
        gradient, as SNFS; ``"random"`` as SET.
      accumulate_steps: sum the gradient over this many steps, the update's own included, before
        ranking it; at most ``interval``. More than 1 keeps one more array of the parameters' size.
      skip_step: on the step of an update, move no weight, as RigL's original.
      drop_by: ``"magnitude"`` drops the smallest weights, ``"saliency"`` where weight times
        gradient is smallest, ``"random"`` any; or a function ``(weight, gradient) -> score``, of
        which the smallest magnitudes are dropped.
      total_steps: as of ``SET``.

    With a density schedule of ``sparse_training`` a layer loses, by the same criterion, what it has
    too much before that share of the rest is replaced, which is GraNet.

    A weight that was dropped may be among those grown in the same update; it then keeps its value
    and its optimizer state. Other grown weights start at zero. Ties are broken at random. A layer
    with a weight or gradient that is not finite, or whose gradient is zero everywhere, keeps its
    topology on that update.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: interval < 1, drop_fraction outside (0, 1), end before begin, unknown grow_by,
        unknown drop_by, accumulate_steps outside [1, interval], or more steps than int32 counts.

    Source: Evci et al., RigL (arXiv 1911.11134), algorithm 1; for ``grow_by`` SparseOpt
    (arXiv 2605.27541), the ITOP ablation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> masks = {"kernel": jnp.array([[True, True], [False, False]])}
      >>> params = {"kernel": jnp.array([[0.1, 2.0], [0.0, 0.0]])}
      >>> grads = {"kernel": jnp.array([[0.0, 1.0], [0.0, -3.0]])}
      >>> topology = sx.RigL(interval=1, drop_fraction=0.6, end_step=100)
      >>> topology.update(jax.random.key(0), 1, masks, params, grads)["kernel"].tolist()
      [[False, True], [False, True]]
    """

    grow_by: GrowBy = "gradient"
    accumulate_steps: int = 1
    skip_step: bool = False
    drop_by: DropBy = "magnitude"
    total_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grow_by(self.grow_by, ("gradient", "corrected_gradient", "random"))
        check_drop_by(self.drop_by, ("magnitude", "saliency", "random"))
        keep(
            self,
            accumulate_steps=as_int("accumulate_steps", self.accumulate_steps, 1, MOST_STEPS),
            skip_step=as_bool("skip_step", self.skip_step),
        )
        if self.accumulate_steps > self.interval:
            raise ValueError(
                f"accumulate_steps must not exceed interval={self.interval}, "
                f"got {self.accumulate_steps}"
            )
        if isinstance(self.grow_by, Momentum) and self.accumulate_steps > 1:
            raise ValueError(
                f"accumulate_steps must be 1 with grow_by={self.grow_by}, which averages over all "
                f"steps, got {self.accumulate_steps}"
            )

    @property
    def _grow(self) -> str:  # type: ignore[override]
        return "random" if self.grow_by == "random" else "scores"


def check_steps(topology: Any) -> None:
    """Checks the steps of a topology, and keeps them as ints."""
    keep(topology, total_steps=as_total_steps(topology.total_steps))
    keep(
        topology,
        interval=as_int("interval", topology.interval, 1, MOST_STEPS),
        end_step=as_step("end_step", topology.end_step, topology.total_steps),
    )
    begin = "begin_step (one interval)"
    if topology.begin_step is not None:
        begin = "begin_step"
        keep(topology, begin_step=as_step(begin, topology.begin_step, topology.total_steps))
    if topology.end_step < topology.first_update:
        raise ValueError(
            f"end_step must not come before {begin}: got end_step={topology.end_step}, "
            f"{begin}={topology.first_update}"
        )
