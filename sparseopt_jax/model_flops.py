"""What a model's forward pass and its training step cost, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparseopt_jax.criteria import Momentum
from sparseopt_jax.topology import Topology


@dataclass(frozen=True)
class LayerFLOPs:
    """Of the matrix products and convolutions that read one parameter.

    Attributes:
      dense: as if all of its weights were active.
      sparse: ``dense`` times the density of its mask.

    Example:
      >>> LayerFLOPs(dense=64, sparse=64 * 0.25)
      LayerFLOPs(dense=64, sparse=16.0)
    """

    dense: int
    sparse: float


@dataclass(frozen=True)
class ModelFLOPs:
    """What ``flops`` counts: one forward pass of everything that was traced, the batch included.

    Attributes:
      layers: matrix products and convolutions by the path of the parameter that they read
        (``"Dense_0/kernel"``), in the order of ``params``; parameters read by none are left out.
      activations: matrix products and convolutions that read no parameter (attention's scores).
      other: every other operation, always dense: normalisation, activation functions, additions.

    Example:
      >>> import sparseopt_jax as sx
      >>> count = ModelFLOPs({"kernel": LayerFLOPs(1000, 100.0)}, activations=0, other=10)
      >>> count.dense, count.sparse, count.training(sx.Static())
      (1010, 110.0, 330.0)
      >>> count.training(sx.RigL(interval=99, drop_fraction=0.3, end_step=1000))
      339.0
    """

    layers: Mapping[str, LayerFLOPs]
    activations: int
    other: int

    @property
    def dense(self) -> int:
        """FLOPs of the forward pass as if all weights were active (f_D in RigL)."""
        return sum(layer.dense for layer in self.layers.values()) + self.activations + self.other

    @property
    def sparse(self) -> float:
        """FLOPs of the forward pass with the masks (f_S in RigL)."""
        return sum(layer.sparse for layer in self.layers.values()) + self.activations + self.other

    def training(self, topology: Topology | None = None) -> float:
        """FLOPs of one training step, averaged over the steps between topology updates.

        The backward pass costs two forward passes, for the gradients of the activations and of the
        weights. With delta-T the topology's ``interval``:

        - dense (None): 3 f_D; ``Static``, ``SET`` and what else grows by no gradient: 3 f_S
        - ``RigL``: (3 f_S delta-T + 2 f_S + f_D) / (delta-T + 1): one step in delta-T + 1 computes
          the weights' gradient densely; with ``accumulate_steps``, that many do; with a
          ``Momentum`` all do.

        This is the theoretical count of the literature. It leaves out the optimizer, the selection
        of weights, and that updates stop at ``end_step``. What runs here is dense: JAX multiplies
        by the zeros too, and ``sparse_training`` masks a dense gradient on every step. Where the
        density changes, ``training_flops`` counts a whole run.

        Args:
          topology: such as ``Static``, ``SET`` or ``RigL``, or None for dense training.

        Returns:
          FLOPs a step, of the batch that was traced.

        Raises:
          TypeError: ``topology`` is none.
          ValueError: its density changes.

        Source: RigL (arXiv 1911.11134), appendix on the FLOPs of its methods.
        """
        if topology is None:
            return 3.0 * self.dense
        if not isinstance(topology, Topology):
            raise TypeError(
                f"topology must be a topology, or None for dense training, got {topology!r}"
            )
        if topology.needs_schedule or topology.own_schedule:
            raise ValueError(
                f"topology={topology} changes the density: training_flops counts a whole run"
            )
        if not topology.needs_dense_gradient:
            return 3.0 * self.sparse
        if isinstance(topology.grow_by, Momentum):
            return 2.0 * self.sparse + self.dense
        steps, dense_gradients = topology.interval + 1, topology.accumulate_steps
        ordinary = 3 * self.sparse * (steps - dense_gradients)
        return (ordinary + (2 * self.sparse + self.dense) * dense_gradients) / steps
