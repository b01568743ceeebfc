"""RigL's topology update by other libraries, for `topology_update`; neither is required here.

jaxpruner (from its repository) is called as its users call it; torch does by `topk` what a
PyTorch implementation of RigL does, a layer after the other.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def jaxpruner_update(drop_fraction: float, step: int) -> Any:
    """A function (key, masks, params, grads) -> masks that is jaxpruner's RigL.

    It calls `jax.tree_map`, which JAX no longer has: that name is lent to it here.

    Args:
      drop_fraction: of the active weights of each layer. jaxpruner rounds to the nearest number
        in float32, so that it may keep one weight more or less than a rounded-down count.
      step: of the update.
    """
    jaxpruner = importlib.import_module("jaxpruner")
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree.map  # type: ignore[attr-defined]
    rigl = jaxpruner.RigL(drop_fraction_fn=lambda _: drop_fraction)

    def update(key: jax.Array, masks: Any, params: Any, grads: Any) -> Any:
        del key  # ties go to the first index
        state = jaxpruner.SparseState(
            masks=jax.tree.map(lambda mask: mask.astype(jnp.uint8), masks),
            inner_state=(),
            count=jnp.int32(step),
        )
        new = rigl.update_state(state, params, grads).masks
        return jax.tree.map(lambda mask: mask.astype(jnp.bool_), new)

    return update


class TorchUpdate:
    """RigL's topology update with `torch.topk`, in a process of its own (`workers.Side`).

    The numbers to keep and to grow are known beforehand, so that nothing waits for the device.
    """

    def __init__(self) -> None:
        """Chooses the GPU where there is one."""
        self._torch: Any = importlib.import_module("torch")
        self._device = self._torch.device("cuda" if self._torch.cuda.is_available() else "cpu")
        self._layers: list[tuple[Any, ...]] = []
        self._masks: list[Any] = []

    def environment(self) -> dict[str, Any]:
        """Version and device."""
        cuda = self._device.type == "cuda"
        return {
            "torch": self._torch.__version__,
            "device": self._torch.cuda.get_device_name() if cuda else "cpu",
        }

    def prepare(self, layers: Sequence[tuple[np.ndarray, ...]], drop_fraction: float) -> None:
        """Takes masks, weights and gradients of each layer to the device."""
        for mask, weight, grad in layers:
            n_active = int(mask.sum())
            n_drop = int(drop_fraction * n_active)
            arrays = (self._torch.tensor(a, device=self._device) for a in (mask, weight, grad))
            self._layers.append((*arrays, n_active - n_drop, n_drop))

    def run(self) -> float:
        """Seconds of one update of all layers."""
        self._wait()
        begin = time.perf_counter()
        self._masks = [self._updated(*layer) for layer in self._layers]
        self._wait()
        return time.perf_counter() - begin

    def masks(self) -> list[np.ndarray]:
        """The new masks of the last update."""
        return [mask.cpu().numpy() for mask in self._masks]

    def _updated(self, mask: Any, weight: Any, grad: Any, n_keep: int, n_grow: int) -> Any:
        torch = self._torch
        new = torch.zeros(mask.numel(), dtype=torch.bool, device=self._device)
        scores = torch.where(mask, weight.abs(), -1.0).flatten()
        new[torch.topk(scores, n_keep, sorted=False).indices] = True
        scores = torch.where(new, -1.0, grad.abs().flatten())
        new[torch.topk(scores, n_grow, sorted=False).indices] = True
        return new.view(mask.shape)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
