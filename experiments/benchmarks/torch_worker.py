"""The PyTorch side of `against_torch`: ResNet-50 of torchvision, and the ResNet-20 of this library.

torch and torchvision are no requirement of this project: this module is imported only in the
process that measures them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

MEAN, STD = 127.5, 60.0


def _torch() -> Any:
    return importlib.import_module("torch")


class TorchWorker:
    """Compiles trainings and times their steps; each case is a mapping, see `against_torch`."""

    def __init__(self) -> None:
        """Chooses the GPU where there is one, and TF32 for float32, as JAX does on one."""
        torch = _torch()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        self._step: Callable[[], Any] | None = None

    def environment(self) -> dict[str, Any]:
        """Versions and the device."""
        torch, cuda = _torch(), self._device.type == "cuda"
        return {
            "torch": torch.__version__,
            "torchvision": importlib.import_module("torchvision").__version__,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }

    def prepare(self, case: dict[str, Any]) -> float:
        """Compiles a case and takes a few steps; returns the seconds that took."""
        begin = time.perf_counter()
        make = self._resnet50 if case["model"] == "resnet50" else self._resnet20
        self._step = make(case)
        # Compilation, the choice of algorithms, and the capture of graphs take several steps.
        self.run(case, 5)
        return time.perf_counter() - begin

    def run(self, case: dict[str, Any], steps: int) -> float:
        """Seconds of a number of steps."""
        assert self._step is not None
        self._wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return time.perf_counter() - begin

    def processor_seconds(self, case: dict[str, Any], steps: int) -> float:
        """The same over all threads of this process."""
        begin = time.process_time()
        self.run(case, steps)
        return time.process_time() - begin

    def parameters(self, case: dict[str, Any]) -> int:
        """How many numbers the model of a case trains."""
        model = _resnet50(case) if case["model"] == "resnet50" else _resnet20(case)
        return sum(parameter.numel() for parameter in model.parameters())

    def drop(self) -> None:
        """Gives back the memory of the last case."""
        torch = _torch()
        self._step = None
        torch._dynamo.reset()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            _torch().cuda.synchronize()

    def _trained(self, model: Any, case: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        """The optimizer, and the loss of a batch of floats under autocast."""
        torch = _torch()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True,
            fused=self._device.type == "cuda",
        )  # fmt: skip
        low = case["dtype"] == "bfloat16"

        def loss(images: Any, labels: Any) -> Any:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
                logits = model(images)
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        return optimizer, loss

    def _resnet50(self, case: dict[str, Any]) -> Callable[[], Any]:
        torch = _torch()
        model = _resnet50(case).to(self._device, memory_format=torch.channels_last)
        optimizer, loss = self._trained(model, case)
        shape = case["batch_size"], 3, case["image_size"], case["image_size"]
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, shape[:1], device=self._device)

        def forward(images: Any, labels: Any) -> Any:
            return loss((images.float() - MEAN) / STD, labels)

        compiled = torch.compile(forward)

        def step() -> None:
            compiled(images, labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _resnet20(self, case: dict[str, Any]) -> Callable[[], Any]:
        """Images stay on the device; batches are gathered, cropped and flipped there."""
        torch = _torch()
        model = _resnet20(case).to(self._device, memory_format=torch.channels_last)
        optimizer, loss = self._trained(model, case)
        size, batch, examples = case["image_size"], case["batch_size"], case["examples"]
        every = torch.randint(0, 256, (examples, 3, size, size), dtype=torch.uint8)
        every = torch.nn.functional.pad(every, (4, 4, 4, 4)).to(self._device)
        every_label = torch.randint(0, 10, (examples,), device=self._device)
        order, at = torch.randperm(examples, device=self._device), 0

        def forward(chosen: Any, shifts: Any, flips: Any) -> Any:
            rows = torch.arange(size, device=self._device)
            down, across = shifts[0][:, None] + rows, shifts[1][:, None] + rows
            across = torch.where(flips[:, None], across.flip(1), across)
            cropped = every[chosen[:, None, None], :, down[:, :, None], across[:, None, :]]
            images = cropped.permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
            return loss((images.float() - MEAN) / STD, every_label[chosen])

        # CUDA graphs where there is CUDA.
        mode = "reduce-overhead" if self._device.type == "cuda" else "default"
        compiled = torch.compile(forward, mode=mode)

        def step() -> None:
            nonlocal order, at
            if at + batch > examples:
                order, at = torch.randperm(examples, device=self._device), 0
            chosen = order[at : at + batch]
            at += batch
            shifts = torch.randint(0, 9, (2, batch), device=self._device)
            flips = torch.rand(batch, device=self._device) < 0.5
            compiled(chosen, shifts, flips).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def _resnet50(case: dict[str, Any]) -> Any:
    return importlib.import_module("torchvision").models.resnet50()


def _resnet20(case: dict[str, Any]) -> Any:
    """`sparseopt_jax.models.ResNet20` in PyTorch, with its 3x3 convolutions as shortcuts."""
    nn = _torch().nn

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, given: int, channels: int, stride: int) -> None:
            super().__init__()
            self.first = _conv_norm(nn, given, channels, stride)
            self.second = _conv_norm(nn, channels, channels, 1)
            changes = stride != 1 or given != channels
            self.shortcut = _conv_norm(nn, given, channels, stride) if changes else nn.Identity()

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(
                self.second(nn.functional.relu(self.first(x))) + self.shortcut(x)
            )

    parts, given = [_conv_norm(nn, 3, 16, 1), nn.ReLU()], 16
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            parts.append(Block(given, channels, 2 if stage > 0 and block == 0 else 1))
            given = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _conv_norm(nn: Any, given: int, channels: int, stride: int) -> Any:
    return nn.Sequential(
        nn.Conv2d(given, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
    )
