"""Data: sources of images, on the device or streamed; `load` is where to start."""

from experiments.data.corrupt import CorruptExamples
from experiments.data.errors import CorruptImageError, DataError
from experiments.data.loading import (
    Data,
    DeviceData,
    Facts,
    Shapes,
    StreamedData,
    load,
    steps_per_epoch,
)
from experiments.data.on_device import EvalBatch, Split

__all__ = [
    "CorruptExamples",
    "CorruptImageError",
    "Data",
    "DataError",
    "DeviceData",
    "EvalBatch",
    "Facts",
    "Shapes",
    "Split",
    "StreamedData",
    "load",
    "steps_per_epoch",
]
