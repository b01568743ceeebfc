"""When and how the set of active weights changes: Static, SET and RigL.

A topology is a frozen value with a pure ``update(key, step, masks, params, scores) -> masks`` that
works on whatever leaves it is given. It remembers nothing: what must be kept between updates lives
in the state of ``sparse_training``. Layers are updated together, in one search or two, which keeps
the compiled program small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from sparseopt_jax.axes import AxesByPath
from sparseopt_jax.layerwise import update_layerwise
from sparseopt_jax.selection import counts, drop_and_grow, random_masks, top_k_masks
from sparseopt_jax.settings import as_bool, as_int, as_number, keep
from sparseopt_jax.stacks import Layout, Stacks

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

_MILLION = 1_000_000


class Topology(Protocol):
    """What ``sparse_training`` asks of a topology; ``Static``, ``SET`` and ``RigL`` have it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sparseopt_jax as sx
      >>> class Shifted(sx.Topology):
      ...     skip_step, grow_by, accumulate_steps = False, "gradient", 1
      ...     def is_update_step(self, step):
      ...         return step % 10 == 0
      ...     def in_accumulation_window(self, step):
      ...         return self.is_update_step(step)
      ...     def update(self, key, step, masks, params, scores, *, batch_axes=()):
      ...         return jax.tree.map(lambda mask: jnp.roll(mask, 1), masks)
      >>> masks = {"kernel": jnp.array([[True, False, False]])}
      >>> Shifted().update(None, 0, masks, masks, masks)["kernel"].tolist()
      [[False, True, False]]
    """

    @property
    def skip_step(self) -> bool:
        """Whether no weight moves on the step of an update."""
        ...

    @property
    def grow_by(self) -> str:
        """``"gradient"`` or ``"corrected_gradient"``: what ``scores`` are to be."""
        ...

    @property
    def accumulate_steps(self) -> int:
        """Over how many steps, the update's own included, ``scores`` are to be summed."""
        ...

    def is_update_step(self, step: Any) -> Any:
        """Whether the masks change on this step."""
        ...

    def in_accumulation_window(self, step: Any) -> Any:
        """Whether this step's gradient counts towards the scores of the next update."""
        ...

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        *,
        batch_axes: AxesByPath = (),
    ) -> PyTree:
        """The masks after one update."""
        ...


@dataclass(frozen=True)
class Static:
    """Masks that never change.

    Example:
      >>> import sparseopt_jax as sx
      >>> sx.Static().is_update_step(100)
      False
    """

    skip_step: ClassVar[bool] = False
    grow_by: ClassVar[str] = "gradient"
    accumulate_steps: ClassVar[int] = 1

    def is_update_step(self, step: Any) -> Any:
        """Never."""
        return False

    def in_accumulation_window(self, step: Any) -> Any:
        """Never."""
        return False

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        *,
        batch_axes: AxesByPath = (),
    ) -> PyTree:
        """The masks as they are."""
        return masks


@dataclass(frozen=True)
class _Scheduled:
    """The schedule that SET and RigL share: when to update, and how much to drop."""

    interval: int
    drop_fraction: float
    end_step: int
    begin_step: int | None = None

    def __post_init__(self) -> None:
        keep(
            self,
            interval=_as_steps("interval", self.interval, at_least=1),
            drop_fraction=as_number("drop_fraction", self.drop_fraction, "a number in (0, 1)"),
            end_step=_as_steps("end_step", self.end_step, at_least=0),
        )
        if not 0.0 < self.drop_fraction < 1.0:
            raise ValueError(
                "drop_fraction must lie in (0, 1): the share of a layer's active weights that the "
                f"first updates replace, got {self.drop_fraction}"
            )
        if self.begin_step is not None:
            keep(self, begin_step=_as_steps("begin_step", self.begin_step, at_least=0))
        if self.end_step < self._begin:
            begin = "begin_step" if self.begin_step is not None else "begin_step (one interval)"
            raise ValueError(
                f"end_step must not come before {begin}: got end_step={self.end_step}, "
                f"{begin}={self._begin}"
            )

    @property
    def _begin(self) -> int:
        return self.interval if self.begin_step is None else self.begin_step

    def is_update_step(self, step: Any) -> Any:
        """Whether ``begin_step <= step <= end_step`` at a whole number of intervals from the begin.

        Args:
          step: number of optimizer steps done before this one; an int or an integer array.
        """
        step = jnp.asarray(step)
        within = (step >= self._begin) & (step <= self.end_step)
        return within & ((step - self._begin) % self.interval == 0)

    def drop_fraction_at(self, step: Any) -> Array:
        """Cosine decay to 0 at ``end_step``: drop_fraction / 2 * (1 + cos(pi * step / end_step)).

        Rounded to six decimals, so that no count depends on the last bits of a backend's cosine.

        Args:
          step: an int or an integer array.

        Returns:
          float32 of the shape of ``step``.
        """
        return self._drop_millionths(step).astype(jnp.float32) / _MILLION

    def _drop_millionths(self, step: Any) -> Array:
        progress = jnp.clip(jnp.asarray(step).astype(jnp.float32) / max(self.end_step, 1), 0, 1)
        fraction = self.drop_fraction / 2 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.round(fraction * _MILLION).astype(jnp.int32)

    def in_accumulation_window(self, step: Any) -> Any:
        """Whether this step is one of the last ``accumulate_steps`` before, and with, an update."""
        return self.is_update_step(step)

    def _numbers(
        self, step: Any, masks: Stacks, weights: Stacks, scores: Stacks, layout: Layout
    ) -> tuple[Array, Array]:
        """How many weights of each layer are active, and how many of them to drop, both (N,).

        floor(fraction * n_active) are dropped, in integer arithmetic; none of a layer with a weight
        or score that is not finite, and none of one whose scores are all 0: a layer that no
        gradient reaches could not train what it grew.
        """
        found = [
            counts(m, ~(jnp.isfinite(w) & jnp.isfinite(s)), s != 0)
            for m, w, s in zip(masks, weights, scores, strict=True)
        ]
        n_active, n_not_finite, n_scored = (layout.total(kind) for kind in zip(*found, strict=True))
        n_drop = _millionths_of(self._drop_millionths(step), n_active)
        return n_active, jnp.where((n_not_finite > 0) | (n_scored == 0), 0, n_drop)

    def _drop_smallest(
        self,
        key: Array,
        step: Any,
        masks: Stacks,
        weights: Stacks,
        scores: Stacks,
        layout: Layout,
    ) -> tuple[Stacks, Array]:
        """Which of the weights in ``masks`` stay, and how many of each layer (N,) do not."""
        n_active, n_drop = self._numbers(step, masks, weights, scores, layout)
        k = n_active - n_drop
        return top_k_masks(weights, k, key, masks, by_magnitude=True, layout=layout), n_drop


@dataclass(frozen=True)
class SET(_Scheduled):
    """Sparse evolutionary training: drop the smallest weights, grow at random.

    Attributes:
      interval: steps between updates (delta-T), at least 1.
      drop_fraction: share of a layer's active weights that an update replaces, in (0, 1), decayed
        by a cosine to 0 at ``end_step``.
      end_step: last step on which an update may fall, inclusive.
      begin_step: first step on which one falls; one interval by default.
      drop_by: ``"magnitude"`` drops the smallest absolute values, as RigL's variant of SET does;
        ``"sign"`` drops the given share of the positive weights, the smallest of them, and of the
        negative weights, the largest of them, as Mocanu's original (active weights that are
        exactly zero have no sign and stay).
      skip_step: on the step of an update, move no weight.

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

    drop_by: str = "magnitude"
    skip_step: bool = False
    grow_by: ClassVar[str] = "gradient"
    accumulate_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("drop_by", self.drop_by, ("magnitude", "sign"))
        keep(self, skip_step=as_bool("skip_step", self.skip_step))

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        *,
        batch_axes: AxesByPath = (),
    ) -> PyTree:
        """One update; see ``RigL.update``. ``scores`` only tell which layers stay."""

        def update_layers(
            key: Array,
            step: Any,
            masks: Stacks,
            weights: Stacks,
            scores: Stacks,
            layout: Layout,
        ) -> Stacks:
            drop_key, grow_key = jax.random.split(key)
            if self.drop_by == "magnitude":
                kept, n_drop = self._drop_smallest(drop_key, step, masks, weights, scores, layout)
            else:
                keys = jax.random.split(drop_key)
                pairs = list(zip(masks, weights, strict=True))
                positive = [m & (w > 0) for m, w in pairs]
                negative = [m & (w < 0) for m, w in pairs]
                kept_positive, n_positive = self._drop_smallest(
                    keys[0], step, positive, weights, scores, layout
                )
                kept_negative, n_negative = self._drop_smallest(
                    keys[1], step, negative, weights, scores, layout
                )
                # What compares as neither, subnormal numbers on some backends included, stays.
                dropped = [
                    (p & ~kp) | (n & ~kn)
                    for p, kp, n, kn in zip(
                        positive, kept_positive, negative, kept_negative, strict=True
                    )
                ]
                kept = [m & ~d for m, d in zip(masks, dropped, strict=True)]
                n_drop = n_positive + n_negative
            grown = random_masks(grow_key, layout, n_drop, kept, without=True)
            return [k | g for k, g in zip(kept, grown, strict=True)]

        return update_layerwise(update_layers, key, step, masks, params, scores, batch_axes)


@dataclass(frozen=True)
class RigL(_Scheduled):
    """Drop the smallest weights, grow where the gradient is largest.

    Attributes:
      interval: steps between updates (delta-T), at least 1.
      drop_fraction: share of a layer's active weights that an update replaces, in (0, 1), decayed
        by a cosine to 0 at ``end_step``.
      end_step: last step on which an update may fall, inclusive.
      begin_step: first step on which one falls; one interval by default (RigL's original: 0).
      grow_by: ``"gradient"`` ranks by the raw gradient; ``"corrected_gradient"`` by the one that
        SparseOpt corrects (D g), the ablation of its paper.
      accumulate_steps: sum the gradient over this many steps, the update's own included, before
        ranking it; at most ``interval``. More than 1 keeps one more array of the parameters' size.
      skip_step: on the step of an update, move no weight, as RigL's original.

    A weight that was dropped may be among those grown in the same update; it then keeps its value
    and its optimizer state. Other grown weights start at zero. Ties are broken at random. A layer
    with a weight or gradient that is not finite, or whose gradient is zero everywhere, keeps its
    topology on that update.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: interval < 1, drop_fraction outside (0, 1), end before begin, unknown grow_by,
        accumulate_steps outside [1, interval], or more steps than int32 counts.

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

    grow_by: str = "gradient"
    accumulate_steps: int = 1
    skip_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("grow_by", self.grow_by, ("gradient", "corrected_gradient"))
        keep(
            self,
            accumulate_steps=_as_steps("accumulate_steps", self.accumulate_steps, at_least=1),
            skip_step=as_bool("skip_step", self.skip_step),
        )
        if self.accumulate_steps > self.interval:
            raise ValueError(
                f"accumulate_steps must not exceed interval={self.interval}, "
                f"got {self.accumulate_steps}"
            )

    def in_accumulation_window(self, step: Any) -> Any:
        """Whether this step is one of the last ``accumulate_steps`` before, and with, an update."""
        step = jnp.asarray(step)
        to_next = (self._begin - step) % self.interval
        next_update = jnp.maximum(step + to_next, self._begin)
        return (next_update - step < self.accumulate_steps) & (next_update <= self.end_step)

    def update(
        self,
        key: Array,
        step: Any,
        masks: PyTree,
        params: PyTree,
        scores: PyTree,
        *,
        batch_axes: AxesByPath = (),
    ) -> PyTree:
        """One update, whatever the schedule says; pure, and safe under jit, vmap and scan.

        Args:
          key: a JAX random key, for ties.
          step: the training step, which sets the drop fraction; may be traced.
          masks: bool arrays.
          params: floating arrays of the same paths and shapes, held in any way.
          scores: likewise, what to grow by: the gradient with respect to all weights, also those
            that are not active. Ranked by absolute value.
          batch_axes: the axis or axes that index the layers of a stacked leaf, or a mapping from
            glob patterns over paths to them; each layer of a stack is updated on its own.

        Returns:
          Masks with the same number of active weights in every layer.

        Raises:
          TypeError: a mask is not bool, or params or scores are not floating.
          ValueError: structure or shapes differ.
        """

        def update_layers(
            key: Array,
            step: Any,
            masks: Stacks,
            weights: Stacks,
            scores: Stacks,
            layout: Layout,
        ) -> Stacks:
            numbers = self._numbers(step, masks, weights, scores, layout)
            return drop_and_grow(key, masks, weights, scores, *numbers, layout)

        return update_layerwise(update_layers, key, step, masks, params, scores, batch_axes)


def _millionths_of(millionths: Array, n: Array) -> Array:
    """floor(millionths * n / 10**6) of int32 up to 10**6 and 2**31 - 1, without overflow.

    With n = q * 10**6 + r and r = 1000 * r1 + r0, every product and sum below fits.
    """
    quotient, remainder = n // _MILLION, n % _MILLION
    high, low = millionths * (remainder // 1000), millionths * (remainder % 1000)
    return millionths * quotient + high // 1000 + (high % 1000 * 1000 + low) // _MILLION


def _as_steps(name: str, value: Any, at_least: int) -> int:
    """A number of steps, which are counted in int32."""
    return as_int(name, value, at_least, at_most=2**31 - 1)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
