"""The configuration of an experiment.

A config is a frozen, typed value. The type of a field says which values it takes, and a config
with a wrong value cannot be made. How it is read from the command line: `command_line.py`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

OptimizerName = Literal["sgd", "sparseopt", "ham", "sparseopt_ham"]
MethodName = Literal["dense", "sgd", "sparseopt", "ham", "sparseopt_ham"]
LoggerName = Literal["tensorboard", "wandb"]


class ConfigError(ValueError):
    """A wrong setting; its message is all that the user has to read.

    Attributes:
      changes: values of fields with which it would work, where that can be told.
      stand_ins: names in capitals for values that the user alone knows, by field.
    """

    def __init__(
        self,
        message: str,
        changes: Mapping[str, Any] = types.MappingProxyType({}),
        stand_ins: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        """Keeps all three."""
        super().__init__(message)
        self.changes, self.stand_ins = dict(changes), dict(stand_ins)


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of the numbers a field takes, e.g. `[0, 1)`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies in the interval; NaN does not."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        """The interval in words, e.g. `in [0, 1)` or `at least 1`."""
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        brackets = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"


_POSITIVE = Range(1)
_NON_NEGATIVE = Range(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: data, model, sparsity, optimizer, and how long and how often to train.

    Raises:
      ConfigError: a field has a value of the wrong type or outside its range, or two fields
        contradict each other; the message names field, value and what would be right.
    """

    # Data and model.
    dataset: Annotated[
        str,
        "digits; folder (of class folders, in data_dir); or a dataset of tensorflow-datasets that"
        " `python -m experiments.prepare` has prepared, e.g. cifar100, fashion_mnist, imagenet2012",
    ] = "digits"
    data_dir: Annotated[str, "folder of datasets that are read from disk (digits is not)"] = ""
    train_split: Annotated[str, "split to train on, e.g. train or train[:90%]"] = "train"
    test_split: Annotated[str, "split to evaluate on; empty: test, or else validation"] = ""
    label: Annotated[str, "which label to learn, e.g. cifar100's label or coarse_label"] = "label"
    num_classes: Annotated[
        int, "outputs of the model; has to be the dataset's number of classes, or 0", Range(0)
    ] = 0
    storage: Annotated[
        Literal["auto", "device", "stream"],
        "device: the whole dataset in the accelerator's memory; stream: decoded batch by batch;"
        " auto: device where all images have one shape and fit",
    ] = "auto"
    augmentation: Annotated[
        Literal["auto", "none", "crop", "crop_flip", "random_resized_crop"],
        "crop: pad 4, crop at random; crop_flip: also mirror; random_resized_crop: of streamed"
        " images, mirrored too; auto: none for digits and the MNIST family's figures, else"
        " crop_flip, or random_resized_crop where streamed",
    ] = "auto"
    pool: Annotated[
        int,
        "average-pools images on the device over squares of so many pixels a side, e.g. 2: from"
        " 28x28 to 14x14",
        _POSITIVE,
    ] = 1
    pairs: Annotated[
        bool, "shows two images side by side, to be told both: the number of classes squared"
    ] = False
    image_size: Annotated[int, "height and width that streamed images are scaled to", _POSITIVE] = (
        224
    )
    max_corrupt: Annotated[
        int, "how many images that cannot be decoded may be left out, counted in the log", Range(0)
    ] = 0
    loader_threads: Annotated[
        int, "threads that decode streamed images, in each process; 0: one a core", Range(0)
    ] = 0
    loader_processes: Annotated[
        int, "processes that decode streamed images; 0: the threads of this one", Range(0)
    ] = 0
    model: Annotated[
        Literal["resnet8", "resnet20", "resnet18", "resnet50", "mlp"],
        "architecture; resnet18 and resnet50 are for images of about 224x224 pixels",
    ] = "resnet20"
    width: Annotated[int, "multiplies the channels of a ResNet's convolutions", _POSITIVE] = 1
    base_channels: Annotated[
        int, "channels of a ResNet's first stage at width 1; 0: the architecture's own", Range(0)
    ] = 0
    hidden: Annotated[int, "units in each of the MLP's two hidden layers", _POSITIVE] = 512
    shortcut: Annotated[
        Literal["conv3x3", "conv1x1", "identity"],
        "how ResNet-8 and -20 match shapes between stages; identity subsamples and pads with 0",
    ] = "conv3x3"
    init: Annotated[
        Literal["he_normal", "sparse_he_normal"],
        "initial weights; sparse_he_normal has each neuron's variance account for its fan-in",
    ] = "he_normal"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        "precision that the model computes in; weights and statistics are float32 always",
    ] = "float32"
    bn_groups: Annotated[
        int,
        "groups of a batch with their own batch-normalisation statistics; the number of devices"
        " gives the per-device statistics of many published results, on any mesh",
        _POSITIVE,
    ] = 1

    # Sparsity.
    sparsity: Annotated[
        float, "fraction of the weights that are zero", Range(0, 1, open_high=True)
    ] = 0.95
    distribution: Annotated[
        Literal["uniform", "er", "erk"], "how the sparsity is spread over the layers"
    ] = "erk"
    fan_in_spread: Annotated[
        float,
        "unequal fan-ins at the start: standard deviation, over a layer's neurons, of the log of"
        " how likely a neuron's weights are to be kept; 0: all weights alike",
        _NON_NEGATIVE,
    ] = 0.0
    topology: Annotated[
        Literal["static", "set", "rigl", "dense"], "how the masks change; dense has no masks"
    ] = "rigl"
    update_interval: Annotated[int, "steps between topology updates (delta-T)", _POSITIVE] = 100
    drop_fraction: Annotated[
        float,
        "fraction of a layer's active weights that the first update moves; decays by a cosine",
        Range(0, 1, open_low=True, open_high=True),
    ] = 0.3
    update_end: Annotated[
        float, "fraction of the run after which the masks stay", Range(0, 1, open_low=True)
    ] = 0.75
    grow_by: Annotated[
        Literal["gradient", "corrected_gradient"],
        "what RigL grows by: the raw gradient, or SparseOpt's (the paper's ablation)",
    ] = "gradient"

    # Optimizer.
    optimizer: Annotated[OptimizerName, "optimizer of a single method"] = "sparseopt"
    average_over: Annotated[
        Literal["layer", "network", "none"], "what SparseOpt's average sparsity is taken over"
    ] = "layer"
    correct: Annotated[
        Literal["all", "normalised"],
        "layers that SparseOpt corrects: all sparse ones, as in the paper, or those alone that a"
        " normalisation follows, which the last layer is not among",
    ] = "all"
    rescale: Annotated[
        Literal["none", "raw_norm", "unit_norm"],
        "norm of the gradient, over all parameters, once it is corrected: its own; that of the"
        " gradient before, so that only the direction differs; or 1, for SGD too",
    ] = "none"
    ham_alpha: Annotated[float, "strength of HAM's multiplicative step", _NON_NEGATIVE] = 200.0
    ham_beta: Annotated[float, "decay rate of HAM's multiplicative step", _NON_NEGATIVE] = 1e-3
    learning_rate: Annotated[float, "peak learning rate", Range(0, open_low=True)] = 0.1
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], "decay of the learning rate, to 0 at the end"
    ] = "cosine"
    warmup_epochs: Annotated[float, "epochs of linear warm-up from 0", _NON_NEGATIVE] = 0.0
    momentum: Annotated[float, "momentum of SGD", Range(0, 1, open_high=True)] = 0.9
    nesterov: Annotated[bool, "Nesterov's momentum"] = False
    weight_decay: Annotated[
        float, "decay of kernels (tensors of two and more dimensions)", _NON_NEGATIVE
    ] = 5e-4
    label_smoothing: Annotated[
        float, "probability spread evenly over all classes", Range(0, 1, open_high=True)
    ] = 0.0

    # The run.
    epochs: Annotated[int, "passes over the training images", _POSITIVE] = 20
    steps: Annotated[
        int, "stop after so many steps, schedules as for the whole run; -1: all", Range(-1)
    ] = -1
    batch_size: Annotated[int, "images in a step", _POSITIVE] = 128
    steps_per_call: Annotated[
        int,
        "training steps in one compiled loop, where the dataset is on the device; 0: 10 on an"
        " accelerator, 1 on a CPU (convolutions in a loop are slow there)",
        Range(0),
    ] = 0
    seed: Annotated[int, "seed of the first run", Range(0, 2**31 - 1)] = 0
    seeds: Annotated[int, "how many runs per method, from seed on", _POSITIVE] = 1
    compare: Annotated[
        tuple[MethodName, ...],
        "methods to run side by side, e.g. dense,sgd,sparseopt; empty: only the one configured",
    ] = ()
    batch_runs: Annotated[
        Literal["auto", "yes", "no"],
        "train all methods and seeds in one program, for models too small to fill an accelerator;"
        " auto: on one accelerator with the dataset in its memory, for resnet8, resnet20 and mlp",
    ] = "auto"
    eval_every: Annotated[int, "epochs between evaluations", _POSITIVE] = 1
    eval_steps: Annotated[
        int, "steps between further evaluations, for curves within an epoch; 0: none", Range(0)
    ] = 0
    log_every: Annotated[int, "steps between lines in metrics.jsonl", _POSITIVE] = 10
    loggers: Annotated[
        tuple[LoggerName, ...],
        "where the lines of metrics.jsonl go as well, e.g. tensorboard,wandb",
    ] = ()
    diagnostics_every: Annotated[
        int,
        "epochs between measurements of fan-in and gradient skew; 0: never",
        Range(0),
    ] = 1
    hessian_every: Annotated[
        int, "epochs between measurements of the Hessian's top eigenvalue; 0: never", Range(0)
    ] = 0
    checkpoint_every: Annotated[
        int,
        "steps between checkpoints, besides the one at the end and the one when asked to stop;"
        " 0: only those",
        Range(0),
    ] = 500
    keep_last: Annotated[int, "checkpoints of a run to keep, from the newest on", _POSITIVE] = 2
    keep_best: Annotated[
        bool, "also write a checkpoint at an evaluation better than all before, and keep the best"
    ] = True

    # The devices.
    mesh_data: Annotated[
        int, "devices over which batches alone are shared out; -1: all that are left", Range(-1)
    ] = -1
    mesh_fsdp: Annotated[
        int,
        "devices over which parameters, masks and optimizer state are sharded (and batches shared"
        " out too); -1: all that are left",
        Range(-1),
    ] = 1

    def __post_init__(self) -> None:
        """Checks every field, then what the fields mean together."""
        for name, spec in SPECS.items():
            object.__setattr__(self, name, spec.check(getattr(self, name)))
        if self.steps == 0:
            raise ConfigError("steps=0 trains nothing; it must be at least 1, or -1 for all")
        for name in ("compare", "loggers"):
            names = getattr(self, name)
            if len(set(names)) < len(names):
                raise ConfigError(f"{name}={','.join(names)} names one of them twice")
        for name in ("mesh_data", "mesh_fsdp"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name}=0 must be at least 1, or -1 for all devices left")
        if self.mesh_data == self.mesh_fsdp == -1:
            raise ConfigError("mesh_data=-1 and mesh_fsdp=-1: only one of them can take the rest")
        if self.batch_size % self.bn_groups:
            raise ConfigError(
                f"bn_groups={self.bn_groups} must divide batch_size={self.batch_size}"
            )
        if self.topology == "dense":
            sparse = [name for name in self.compare if name != "dense"]
            if sparse:
                raise ConfigError(
                    f"topology='dense' has no masks, but compare names {', '.join(sparse)};"
                    " set compare=dense, or topology to static, set or rigl"
                )
            if not self.compare and self.optimizer != "sgd":
                raise ConfigError(
                    f"topology='dense' trains with SGD, not with optimizer={self.optimizer!r};"
                    " set optimizer=sgd (without masks sparseopt is the same)"
                )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Config:
        """A config as `config.json` has it; a field that is newer than the file has its default."""
        return cls(**{name: content.get(name, spec.default) for name, spec in SPECS.items()})

    def methods(self) -> tuple[str, ...]:
        """Names of the methods to run, in order."""
        if self.compare:
            return self.compare
        return ("dense",) if self.topology == "dense" else (self.optimizer,)

    def runs(self) -> list[tuple[str, int]]:
        """Method and seed of each run, in order."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(method, seed) for method in self.methods() for seed in seeds]

    def for_method(self, method: str) -> Config:
        """The config of one method alone, e.g. `config.for_method("dense")`."""
        if method == "dense":
            return dataclasses.replace(self, compare=(), topology="dense", optimizer="sgd")
        optimizer = typing.cast(OptimizerName, method)
        return dataclasses.replace(self, compare=(), optimizer=optimizer)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one field takes: its type, its range or choices, its one-line description."""

    name: str
    kind: type
    choices: tuple[str, ...]
    limits: Range | None
    help: str
    default: Any

    def allowed(self) -> str:
        """The right values in words."""
        if self.kind is tuple:
            return "a list separated by commas, of " + ", ".join(self.choices)
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind is bool:
            return "true or false"
        noun = {int: "an integer", float: "a number", str: "text"}[self.kind]
        return f"{noun} {self.limits}" if self.limits else noun

    def check(self, value: Any) -> Any:
        """`value` in the field's own type; raises ConfigError where that cannot be."""
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        right = isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))
        if right and self.choices:
            chosen = value if self.kind is tuple else (value,)
            right = all(isinstance(item, str) and item in self.choices for item in chosen)
        if right and self.limits is not None:
            right = value in self.limits
        if not right:
            raise ConfigError(f"{self.name}={value!r} must be {self.allowed()}")
        return value

    def parse(self, text: str) -> Any:
        """The value that `text` stands for on the command line; raises ConfigError."""
        value: Any = text
        try:
            if self.kind is bool:
                value = {"true": True, "false": False}[text.strip().lower()]
            elif self.kind is tuple:
                value = tuple(item.strip() for item in text.split(",") if item.strip())
            elif self.kind is not str:
                value = self.kind(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{self.name}={text!r} must be {self.allowed()}") from None
        return self.check(value)


def _specs() -> types.MappingProxyType[str, Spec]:
    hints = typing.get_type_hints(Config, include_extras=True)
    specs = {}
    for field in dataclasses.fields(Config):
        kind, *notes = get_args(hints[field.name])
        choices: tuple[str, ...] = ()
        if get_origin(kind) is tuple:
            kind, choices = tuple, get_args(get_args(kind)[0])
        elif get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        limits = next((note for note in notes if isinstance(note, Range)), None)
        specs[field.name] = Spec(field.name, kind, choices, limits, notes[0], field.default)
    return types.MappingProxyType(specs)


SPECS = _specs()
"""What every field of `Config` takes, by name, in order."""
