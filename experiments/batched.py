"""Methods and seeds of one setting in one program, for models too small to fill an accelerator.

The forward and the backward pass are mapped (`jax.vmap`) over methods and seeds, since all of them
have parameters of the same shapes; each method's optimizer is mapped over its seeds. Every seed
has its own batches, the same for all methods, which the program takes from the images on the
device. Topology updates are a program of their own, called on the steps where they are due.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt_jax as sx
from experiments import build, data
from experiments import mesh as meshes
from experiments.config import Config
from experiments.functions import SEED, MethodFunctions, State, method_functions
from experiments.programs import ModelPrograms, compile_fast, on_first_call
from experiments.run_batch import Measured, Member
from experiments.stepping import bound_in_flight


class BatchedState(NamedTuple):
    """All that a training step changes.

    Attributes:
      params: pytree of arrays with leading axes (methods, seeds).
      batch_stats: likewise.
      opt_states: of each method, with a leading axis of seeds.
    """

    params: Any
    batch_stats: Any
    opt_states: tuple[Any, ...]


class Batched:
    """A `RunBatch` of every one of some methods with every one of some seeds, on one device."""

    def __init__(
        self,
        members: Sequence[Member],
        model: ModelPrograms,
        dataset: data.DeviceData,
        steps_per_call: int,
    ) -> None:
        """Compiles the programs.

        Args:
          members: the runs, those of a method together and with the same seeds in the same order.
          model: the compiled programs of the model.
          dataset: on the device.
          steps_per_call: steps of one compiled loop.
        """
        begin = time.monotonic()
        self.members: Sequence[Member] = tuple(members)
        self.model, self._dataset = model, dataset
        groups = [list(of) for _, of in itertools.groupby(members, key=lambda m: m.method)]
        self._seeds = np.array([member.seed for member in groups[0]], np.int32)
        assert all([m.seed for m in of] == self._seeds.tolist() for of in groups)
        self._methods: list[MethodFunctions] = [
            method_functions(of[0].config, dataset, model.functions, automatic=False)
            for of in groups
        ]
        self._sparse = [of[0].config.topology != "dense" for of in groups]
        self._due = self._update_steps([of[0].config for of in groups])
        self.steps_per_call = steps_per_call
        replicated = meshes.replicated(dataset.mesh)
        self._put = functools.partial(jax.device_put, device=replicated)
        seeds = meshes.struct(self._seeds.shape, jnp.int32, replicated)
        self._start = compile_fast(dataset.mesh, self._start_all, seeds, out_shardings=replicated)
        self.shapes = meshes.abstract(jax.eval_shape(self._start_all, seeds), replicated)
        self.mask_shapes = self.masks(self.shapes)
        orders = meshes.struct((len(self._seeds), dataset.train_examples), jnp.int32, replicated)
        place = (meshes.abstract(dataset.train, replicated), orders, seeds, SEED, SEED)

        def compiled(program: tuple[int, bool]) -> Any:
            steps = jax.jit(self._steps(*program), donate_argnums=0, out_shardings=replicated)
            return steps.lower(self.shapes, *place).compile()

        # One step, a loop of steps, a step that changes the topology.
        wanted = [(1, False), (steps_per_call, False), (1, bool(self._due))]
        different = list(dict.fromkeys(wanted))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each compilation takes one core
            programs = dict(zip(different, pool.map(compiled, different), strict=True))
        self.one, self.several, self.with_topology = (programs[program] for program in wanted)
        self.take = jax.jit(self._take)
        self._evaluate = jax.jit(_over_runs(model.functions.evaluate, batch_per_seed=False))
        self._measure = compile_fast(
            dataset.mesh, self._measure_all, self.shapes.opt_states, self.mask_shapes,
            out_shardings=replicated,
        )  # fmt: skip
        self._diagnose = on_first_call(
            dataset.mesh, functools.partial(self._each_method, "diagnose")
        )
        self._sharpness = jax.jit(functools.partial(self._each_method, "sharpness"))
        self.seconds = time.monotonic() - begin

    def _update_steps(self, configs: Sequence[Config]) -> frozenset[int]:
        """The steps that change the topology, the same ones for all methods that have masks."""
        sparse = [config for config in configs if config.topology != "dense"]
        if not sparse:
            return frozenset()
        per_epoch = data.steps_per_epoch(sparse[0], self._dataset)
        topology = build.make_topology(sparse[0], per_epoch)
        steps = np.arange(sparse[0].epochs * per_epoch)
        due = np.broadcast_to(np.asarray(topology.is_update_step(steps)), steps.shape)
        return frozenset(steps[due].tolist())

    def _start_all(self, seeds: jax.Array) -> BatchedState:
        weights = jax.vmap(self.model.functions.init)(seeds)
        states = [jax.vmap(method.start)(*weights, seeds) for method in self._methods]
        return BatchedState(
            _stack([state.params for state in states]),
            _stack([state.batch_stats for state in states]),
            tuple(state.opt_state for state in states),
        )

    def _take(
        self,
        split: data.Split,
        orders: jax.Array,
        seeds: jax.Array,
        epoch: jax.Array,
        index: jax.Array,
    ) -> data.Split:
        """The batch of every seed, (seeds, batch, ...)."""
        axes = (None, 0, 0, None, None)
        batches: data.Split = jax.vmap(self._dataset.take_batch, axes)(
            split, orders, seeds, epoch, index
        )
        return batches

    def _steps(self, count: int, topology_update: bool) -> Callable[..., Any]:
        """A function of `count` steps; the first one may be due for a topology update."""

        def steps(
            state: BatchedState,
            split: data.Split,
            orders: jax.Array,
            seeds: jax.Array,
            epoch: jax.Array,
            index: jax.Array,
        ) -> tuple[BatchedState, dict[str, jax.Array]]:
            def body(state: BatchedState, i: jax.Array) -> tuple[BatchedState, Any]:
                return self._step(
                    state, self._take(split, orders, seeds, epoch, i), topology_update
                )

            return jax.lax.scan(body, state, index + jnp.arange(count))

        return steps

    def _step(
        self, state: BatchedState, batch: data.Split, topology_update: bool
    ) -> tuple[BatchedState, dict[str, jax.Array]]:
        differentiated = jax.value_and_grad(self._methods[0].loss, has_aux=True)
        (loss, (logits, batch_stats)), gradients = _over_runs(differentiated)(
            state.params, state.batch_stats, *batch
        )
        stepped = []
        for i, (method, sparse) in enumerate(zip(self._methods, self._sparse, strict=True)):
            params, gradient = _at(state.params, i), _at(gradients, i)
            opt_state = state.opt_states[i]
            if sparse and topology_update:
                # The norm in the log is of the masks that the loss was taken with.
                norm = jax.vmap(_active_norm)(gradient, opt_state)
                params, opt_state = jax.vmap(_topology_updated(method))(params, opt_state, gradient)
                params, opt_state, _ = jax.vmap(method.apply)(params, opt_state, gradient)
            else:
                params, opt_state, norm = jax.vmap(method.apply)(params, opt_state, gradient)
            stepped.append((params, opt_state, norm))
        params, opt_states, norms = zip(*stepped, strict=True)
        measured = {
            "loss": loss,
            "train_accuracy": (logits.argmax(-1) == batch.labels[None]).mean(-1, jnp.float32),
            "gradient_norm": jnp.stack(norms),
        }
        return BatchedState(_stack(params), batch_stats, opt_states), measured

    def _measure_all(self, opt_states: tuple[Any, ...], earlier: Any) -> tuple[Any, Any]:
        measured, copies = [], []
        sparse = [i for i, is_sparse in enumerate(self._sparse) if is_sparse]
        for i, before in zip(sparse, earlier, strict=True):
            *values, masks = jax.vmap(self._methods[i].measure)(opt_states[i], before)
            measured.append(values)
            copies.append(masks)
        return measured, tuple(copies)

    def _each_method(self, name: str, state: BatchedState, batch: data.Split) -> list[Any]:
        measured = []
        for i, method in enumerate(self._methods):
            one = State(_at(state.params, i), _at(state.batch_stats, i), state.opt_states[i])
            measured.append(jax.vmap(getattr(method, name))(one, *batch))
        return measured

    def _per_member(self, of_methods: Sequence[Any]) -> list[dict[str, Any]]:
        """Of what every method gives, with a leading axis of seeds, the part of each member."""
        fetched = jax.device_get(of_methods)
        return [_at(of, i) for of in fetched for i in range(len(self._seeds))]

    def start(self) -> BatchedState:
        """As `RunBatch.start`."""
        state: BatchedState = self._start(self._put(self._seeds))
        return state

    def stepper(self, step: int) -> BatchedStepper:
        """As `RunBatch.stepper`."""
        return BatchedStepper(self, self._dataset, self._put, self._seeds, step)

    def is_topology_update(self, step: int) -> bool:
        """Whether the topology changes in the step after `step`."""
        return step in self._due

    def masks(self, state: Any) -> tuple[Any, ...]:
        """As `RunBatch.masks`: of each sparse method, with a leading axis of seeds."""
        states = zip(self._sparse, state.opt_states, strict=True)
        return tuple(sx.get_masks(opt_state) for sparse, opt_state in states if sparse)

    def measure(self, state: BatchedState, earlier: Any) -> tuple[list[Measured], Any]:
        """As `RunBatch.measure`."""
        measured, copies = self._measure(state.opt_states, earlier)
        of_sparse = iter(jax.device_get(measured))
        dense = Measured(sum(self.model.layers.values()), None, None)
        rows: list[Measured] = []
        for sparse in self._sparse:
            if not sparse:
                rows += [dense] * len(self._seeds)
                continue
            rows += [
                Measured(int(active), float(churn), float(rate))
                for active, churn, rate in zip(*next(of_sparse), strict=True)
            ]
        return rows, copies

    def evaluate(self, state: BatchedState, batch: data.EvalBatch) -> tuple[jax.Array, ...]:
        """As `RunBatch.evaluate`; arrays (methods, seeds)."""
        sums: tuple[jax.Array, ...] = self._evaluate(state.params, state.batch_stats, batch)
        return sums

    def diagnose(self, state: BatchedState, batch: data.Split) -> list[dict[str, Any]]:
        """As `RunBatch.diagnose`."""
        return self._per_member(self._diagnose(state, batch))

    def sharpness(self, state: BatchedState, batch: data.Split) -> list[dict[str, Any]]:
        """As `RunBatch.sharpness`."""
        return self._per_member(self._sharpness(state, batch))

    def params_of(self, state: BatchedState, index: int) -> Any:
        """As `RunBatch.params_of`."""
        method, seed = divmod(index, len(self._seeds))
        return jax.device_get(_at(_at(state.params, method), seed))

    def masks_of(self, state: BatchedState, index: int) -> Any:
        """As `RunBatch.masks_of`."""
        method, seed = divmod(index, len(self._seeds))
        if not self._sparse[method]:
            return None
        return jax.device_get(_at(sx.get_masks(state.opt_states[method]), seed))

    def learning_rate(self, step: int) -> float:
        """As `RunBatch.learning_rate`."""
        return float(self._methods[0].learning_rate(step))

    def locate(self, stepper: Any, state: Any, last_step: int) -> str:
        """As `RunBatch.locate`; it cannot tell: a run that is mapped has no steps of its own."""
        return "trained alone, with batch_runs=no, it will say in which layer that began"


class BatchedStepper:
    """Takes the steps of a `Batched`; see `run_batch.Steps`.

    Attributes:
      step: how many steps are done.
      data_seconds: 0; batches are taken within the program.
    """

    def __init__(
        self,
        run_batch: Batched,
        dataset: data.DeviceData,
        put: Callable[[Any], jax.Array],
        seeds: np.ndarray,
        step: int,
    ) -> None:
        """Prepares for the steps after `step`; `put` places an array as the programs want it."""
        self._run_batch, self._dataset, self._put = run_batch, dataset, put
        self._seeds, self._on_device = seeds, put(seeds)
        self.step, self.data_seconds = step, 0.0
        self._orders: tuple[int, jax.Array] | None = None

    def advance(
        self, state: BatchedState, count: int, stop: Callable[[], bool] = lambda: False
    ) -> tuple[BatchedState, list[dict[str, jax.Array]]]:
        """As `run_batch.Steps.advance`; metrics are (steps, methods, seeds)."""
        run_batch, end = self._run_batch, self.step + count
        metrics: list[dict[str, jax.Array]] = []
        while self.step < end:
            place = self._place(self.step)
            if run_batch.is_topology_update(self.step):
                program, taken = run_batch.with_topology, 1
            elif self._ordinary(end):
                program, taken = run_batch.several, run_batch.steps_per_call
            else:
                program, taken = run_batch.one, 1
            state, measured = program(state, self._dataset.train, *place)
            self.step += taken
            metrics.append(measured)
            bound_in_flight(metrics)
            if stop():
                break
        return state, metrics

    def _ordinary(self, end: int) -> bool:
        """Whether the steps of a whole loop are left, none of them a topology update."""
        last = self.step + self._run_batch.steps_per_call
        return last <= end and not any(
            self._run_batch.is_topology_update(step) for step in range(self.step, last)
        )

    def _place(self, step: int) -> tuple[Any, ...]:
        """Orders, seeds, epoch and index of the batch of the step after `step`."""
        epoch, index = divmod(step, self._dataset.steps_per_epoch)
        if self._orders is None or self._orders[0] != epoch:
            orders = [self._dataset.epoch_order(int(seed), epoch) for seed in self._seeds]
            self._orders = epoch, self._put(jnp.stack(orders))
        return self._orders[1], self._on_device, np.int32(epoch), np.int32(index)

    def last_batch(self) -> data.Split:
        """As `run_batch.Steps.last_batch`: (seeds, batch, ...)."""
        batch: data.Split = self._run_batch.take(self._dataset.train, *self._place(self.step - 1))
        return batch

    def close(self) -> None:
        """Nothing reads ahead."""


def _over_runs(function: Callable[..., Any], batch_per_seed: bool = True) -> Callable[..., Any]:
    """`function` of params, batch_stats and a batch, over methods and seeds.

    All methods have one batch; each seed has its own, or all of them the same.
    """

    def over(params: Any, batch_stats: Any, *batch: Any) -> Any:
        methods, seeds = jax.tree.leaves(params)[0].shape[:2]

        def merged(tree: Any) -> Any:
            return jax.tree.map(lambda a: a.reshape(methods * seeds, *a.shape[2:]), tree)

        def of_each_run(tree: Any) -> Any:
            shown = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (methods, *a.shape)), tree)
            return merged(shown)

        # One mapped axis: JAX cannot map the gradient of a convolution twice.
        axis = 0 if batch_per_seed else None
        if batch_per_seed:
            batch = of_each_run(batch)
        mapped = jax.vmap(function, (0, 0) + (axis,) * len(batch))
        results = mapped(merged(params), merged(batch_stats), *batch)
        return jax.tree.map(lambda a: a.reshape(methods, seeds, *a.shape[1:]), results)

    return over


def _topology_updated(method: MethodFunctions) -> Callable[..., Any]:
    def update(params: Any, opt_state: Any, gradient: Any) -> tuple[Any, Any]:
        return sx.update_topology(method.tx, opt_state, params, gradient)

    return update


def _active_norm(gradient: Any, opt_state: Any) -> jax.Array:
    return sx.gradient_norm(gradient, sx.get_masks(opt_state))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
