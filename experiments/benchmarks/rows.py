"""The rows of the page of results, which `experiments.benchmarks.page` writes: an entry each."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """What a row of the page shows.

    Attributes:
      what: of what the number is, in words; no measured number.
      command: what prints it. Of its arguments those count that change what a number means
        (`page.EFFORT` has the others), and the peers that it names must have taken part.
      number: a format string, which the result fills. A field is a path in the result, or a
        quotient of paths and numbers: `{bytes[sparse]/bytes[dense]:.3f}`.
      mark: "at most N" or "at least N", of the field that `number` then begins with; "": none.
      backend: JAX's, of the machine that it is of.
      readme: whether README's table has it too.
    """

    what: str
    command: str
    number: str
    mark: str = ""
    backend: str = "cpu"
    readme: bool = False


def _sent(chips: str, program: int) -> str:
    """Of a step by `scaling`: bytes that a chip sends, and their share of the step."""
    step = f"programs[{program}][step]"
    return (
        f"{chips}: {{{step}[wire_bytes]/1e6:.1f}} MB, at most"
        f" {{{step}[share_all_links]/0.01:.2f}} %"
        f" ({{{step}[share_one_link]/0.01:.1f}} % if one of four links carried all)"
    )


def _factor(row: int) -> str:
    """A factor by `flops`, beside RigL's."""
    return (
        f"{{rows[{row}][distribution]}} {{rows[{row}][sparsity]}}: {{rows[{row}][inference]:.3f}}"
        f" ({{rows[{row}][inference_published]}})"
    )


_FLOPS = "python -m experiments.flops --interval=100"
_BENCHMARK = "python -m experiments.benchmarks"
_DIGITS = "ResNet-20 on digits, ERK 0.95, RigL, test accuracy"
_RIGL = "RigL's topology update of ResNet-50"
_SPARSE = "RigL + SparseOpt over dense"
_IMAGENET = "--config=experiments/configs/imagenet_resnet50.py --image_size=224"
_TPU = "--topology=v5e:1x1"
_MODELS = (
    ("resnet20", "ResNet-20, 32x32, batch 128", "at most 3.6"),
    ("resnet50", "ResNet-50, 64x64, batch 32", "at most 4"),
)

ROWS = (
    Row(
        f"{_RIGL}, over ours: the time of one by argsort",
        f"{_BENCHMARK}.topology_update",
        "{ratios[argsort][seconds]:.1f} ({median_seconds[sparseopt_jax]:.2f} s against"
        " {median_seconds[argsort]:.1f} s)",
        "at least 20",
        readme=True,
    ),
    Row(
        f"{_RIGL}, over ours: the time of jaxpruner's",
        f"{_BENCHMARK}.topology_update --peers=jaxpruner",
        "{ratios[jaxpruner][seconds]:.1f} ({median_seconds[sparseopt_jax]:.2f} s against"
        " {median_seconds[jaxpruner]:.1f} s; masks differ in {masks_differ[jaxpruner]} places)",
        readme=True,
    ),
    Row(
        f"{_RIGL}, over ours: the time of one by `torch.topk`",
        f"{_BENCHMARK}.topology_update --peers=torch",
        "{ratios[torch][seconds]:.1f} ({median_seconds[sparseopt_jax]:.2f} s against"
        " {median_seconds[torch]:.2f} s; masks differ in {masks_differ[torch]} places)",
        readme=True,
    ),
    Row(
        "the same on a GPU",
        f"{_BENCHMARK}.topology_update --peers=torch",
        "{ratios[torch][seconds]:.2f}",
        backend="gpu",
    ),
    Row(
        "temporaries of our topology update over those of argsort's",
        f"{_BENCHMARK}.topology_update",
        "{ratios[argsort][temporary_bytes]:.3f} ({costs[sparseopt_jax][temporary_bytes]/1e6:.0f}"
        " against {costs[argsort][temporary_bytes]/1e6:.0f} MB)",
        "at most 0.1",
    ),
    Row(
        "the same, compiled for a TPU v5e",
        f"{_BENCHMARK}.topology_update {_TPU}",
        "{ratios[argsort][temporary_bytes]:.2f} ({costs[sparseopt_jax][temporary_bytes]/1e6:.0f}"
        " against {costs[argsort][temporary_bytes]/1e6:.0f} MB)",
        "at most 0.1",
    ),
    Row(
        "topology update by argsort: its time to compile over ours",
        f"{_BENCHMARK}.topology_update",
        "{ratios[argsort][compile_seconds]:.2f} ({costs[argsort][compile_seconds]:.1f} against"
        " {costs[sparseopt_jax][compile_seconds]:.1f} s)",
    ),
    Row(
        "the same, compiled for a TPU v5e",
        f"{_BENCHMARK}.topology_update {_TPU}",
        "{ratios[argsort][compile_seconds]:.1f} ({costs[argsort][compile_seconds]:.1f} against"
        " {costs[sparseopt_jax][compile_seconds]:.1f} s)",
        "at least 10",
    ),
    Row(
        "topology update of jaxpruner, over ours: time to compile",
        f"{_BENCHMARK}.topology_update --peers=jaxpruner",
        "{ratios[jaxpruner][compile_seconds]:.2f}",
    ),
    Row(
        "the same, compiled for a TPU v5e",
        f"{_BENCHMARK}.topology_update --peers=jaxpruner {_TPU}",
        "{ratios[jaxpruner][compile_seconds]:.1f}",
    ),
    Row(
        "the k largest of all kernels of ResNet-50, argsort over `top_k_mask`",
        f"{_BENCHMARK}.selection",
        "{ratio:.1f} ({total_seconds[argsort]:.2f} against {total_seconds[top_k_mask]:.2f} s)",
    ),
    *(
        Row(
            f"gradient of {name} over its forward pass, processor time",
            f"{_BENCHMARK}.convolution",
            f"{{{key}[gradient_over_forward]:.2f}} (XLA's own convolutions {{{key}[by_xla]:.2f}},"
            f" whose gradient takes {{{key}[gradient_by_xla_over_ours]:.2f}} times as long)",
            mark,
        )
        for key, name, mark in _MODELS
    ),
    *(
        Row(
            f"train step of {name}, dense, over PyTorch's on the same CPU, processor time",
            f"{_BENCHMARK}.convolution --peers=torch",
            f"{{{key}[step][ours_over_torch]:.2f}} ({{{key}[step][seconds][ours]:.2f}} against"
            f" {{{key}[step][seconds][torch]:.2f}} s)",
            "at most 1.2",
        )
        for key, name, _ in _MODELS
    ),
    Row(
        "dense layers at 0.95, batches of 8 and 32: time of the dense product over that of"
        " `sx.bcsr_matmul`",
        f"{_BENCHMARK}.bcsr",
        "{at_095[min]:.1f} to {at_095[max]:.1f}",
        "at least 3",
    ),
    Row(
        "forward pass of ResNet-50 over that without its dead channels, half of the inner ones",
        f"{_BENCHMARK}.removal",
        "{ratio:.2f} ({median_seconds[whole]:.2f} against {median_seconds[smaller]:.2f} s)",
    ),
    Row(
        f"train step of ResNet-20 at 32x32, {_SPARSE}, topology updates every 100 steps",
        f"{_BENCHMARK}.step_time",
        "{ratios[amortised]:.3f} (of {dense_seconds:.2f} s; an ordinary step"
        " {ratios[ordinary]:.3f}, one with an update {ratios[update]:.3f})",
        "at most 1.03",
        readme=True,
    ),
    *(
        Row(
            f"where a step of it goes, {method}, ms over all threads",
            f"{_BENCHMARK}.step_time",
            f"forward {{profile_ms[{name}][forward]:,.0f}}, backward {{profile_ms[{name}]"
            f"[backward]:,.0f}}, optimizer and masks {{profile_ms[{name}][optimizer]:.1f}},"
            f" other {{profile_ms[{name}][other]:.1f}}",
        )
        for name, method in (("dense", "dense, SGD"), ("sparse", "RigL + SparseOpt"))
    ),
    Row(
        f"train step of ResNet-50, bfloat16, batch 256, GPU, {_SPARSE}",
        f"{_BENCHMARK}.step_time {_IMAGENET} --config.batch_size=256",
        "{ratios[amortised]:.3f} (of {dense_seconds:.3f} s)",
        "at most 1.01",
        backend="gpu",
    ),
    Row(
        "`masks_from_scores` with `NM(2, 4)` of a 4096x4096 kernel, over one pass over it, time",
        f"{_BENCHMARK}.structures",
        "{selection[ratio][flax]:.2f} (of (out, in): {selection[ratio][out_in]:.2f})",
        "at most 2",
    ),
    Row(
        "RigL's topology update of ResNet-50 with `ConstantFanIn()`, over that without a structure,"
        " time",
        f"{_BENCHMARK}.structures",
        "{update[ratio][constant_fan_in]:.2f} (with ablation {update[ratio][ablation]:.2f})",
        "at most 1",
    ),
    Row(
        "train step of a GPT-like block, 12.6 M weights, 8 x 256 tokens, AdamW and `keep_top_k` at"
        " 0.1 over AdamW alone",
        f"{_BENCHMARK}.keep_top_k",
        "{step[ratio]:.3f} (of {step[median_seconds][dense]:.2f} s; the optimizer's part by itself"
        " {update[median_seconds][keep_top_k]/0.001:.0f} against"
        " {update[median_seconds][dense]/0.001:.0f} ms)",
        "at most 1.15",
    ),
    Row(
        "bytes of the update of ResNet-50, SparseOpt with static masks over dense SGD",
        f"{_BENCHMARK}.update_bytes",
        "{programs[static][moved_over_dense]:.3f}",
        "at most 1.075",
        readme=True,
    ),
    Row(
        "the same between RigL's topology updates, over static masks",
        f"{_BENCHMARK}.update_bytes",
        "{programs[rigl][moved]/programs[static][moved]:.3f}",
        "at most 1",
        readme=True,
    ),
    Row(
        "bytes of the update, compiled for a TPU v5e, static masks over dense SGD",
        f"{_BENCHMARK}.update_bytes {_TPU}",
        "{programs[static][moved_over_dense]:.3f} (copies of"
        " {programs[static][copied]/1e6:.0f} MB)",
    ),
    Row(
        "the same between RigL's topology updates, over static masks",
        f"{_BENCHMARK}.update_bytes {_TPU}",
        "{programs[rigl][moved]/programs[static][moved]:.3f} (copies of"
        " {programs[rigl][copied]/1e6:.0f} MB)",
        "at most 1",
    ),
    Row(
        f"peak memory of the train step of ResNet-50, float32, batch 64, {_SPARSE}",
        f"{_BENCHMARK}.memory",
        "{ratios[peak]:.3f} ({train_step[sparse][peak]/1e9:.2f} against"
        " {train_step[dense][peak]/1e9:.2f} GB)",
        "at most 1.05",
    ),
    Row(
        "checkpoint on disk, ERK 0.95 over dense",
        f"{_BENCHMARK}.memory",
        "{ratios[checkpoint]:.3f} ({checkpoint_bytes[sparse]/1e6:.1f} against"
        " {checkpoint_bytes[dense]/1e6:.1f} MB)",
        "at most 0.25",
    ),
    Row(
        "dispatch of a step with ResNet-50's sparse state, ms",
        f"{_BENCHMARK}.host",
        "{dispatch_ms[sparse]:.1f} for {arrays[sparse]} arrays",
        "at most 1.5",
    ),
    Row(
        "the same over dense",
        f"{_BENCHMARK}.host",
        "{dispatch_ms[sparse]/dispatch_ms[dense]:.2f} (dense {dispatch_ms[dense]:.1f} ms for"
        " {arrays[dense]} arrays)",
        "at most 1.5",
    ),
    Row(
        "`import sparseopt_jax` on top of jax and optax, s",
        f"{_BENCHMARK}.host",
        "{import_seconds:.3f}",
        "at most 0.2",
    ),
    Row(
        f"time to compile the train step of ResNet-50, {_SPARSE}",
        f"{_BENCHMARK}.host",
        "{ratios[compile_seconds]:.2f} ({compile_seconds[sparse]:.1f} against"
        " {compile_seconds[dense]:.1f} s)",
        "at most 1.5",
    ),
    Row(
        "training of ResNet-50 on a GPU, images/s over PyTorch's at the best batch of each",
        f"{_BENCHMARK}.against_torch --model=resnet50",
        "{methods[sparse][ratio]:.2f} (dense {methods[dense][ratio]:.2f})",
        "at least 1",
        backend="gpu",
    ),
    Row(
        "training of ResNet-20 at 32x32 on a GPU, epochs/s over PyTorch's with CUDA graphs",
        f"{_BENCHMARK}.against_torch --model=resnet20",
        "{methods[sparse][ratio]:.2f} (dense {methods[dense][ratio]:.2f})",
        "at least 1.5",
        backend="gpu",
    ),
    Row(
        "the same, eight seeds in one program",
        f"{_BENCHMARK}.against_torch --model=resnet20",
        "{methods[sparse_8_seeds][ratio]:.2f} (dense {methods[dense_8_seeds][ratio]:.2f})",
        "at least 4",
        backend="gpu",
    ),
    Row(
        "what a TPU v5e chip sends in a step of ResNet-50, 128 images a chip, data parallel",
        f"{_BENCHMARK}.scaling --topologies=v5e:2x4",
        _sent("8 chips", 0),
    ),
    Row("the same", f"{_BENCHMARK}.scaling", _sent("64 chips", 3)),
    Row(
        "the same with parameters over all chips (fsdp)",
        f"{_BENCHMARK}.scaling --topologies=v5e:2x4",
        _sent("8 chips", 1),
    ),
    Row("the same", f"{_BENCHMARK}.scaling", _sent("64 chips", 4)),
    Row(
        "what it sends for a topology update, fsdp, one pass of each search, MB",
        f"{_BENCHMARK}.scaling",
        "8 chips: {programs[2][update][wire_bytes]/1e6:.3f}, 64 chips:"
        " {programs[4][update][wire_bytes]/1e6:.3f}",
    ),
    *(
        Row(
            "streamed JPEGs (500x375, 110 KB) over tf.data on the same files, images a second;"
            f" tf.data resizes {name}",
            f"{_BENCHMARK}.input_pipeline",
            f"{{ratio[tf.data {name}]:.2f}} (of {{images_per_second[tf.data {name}]:,.0f}})",
            "at least 2",
        )
        for name in ("bicubic", "bilinear")
    ),
    Row(
        "images on the device: the batches of a CIFAR-size epoch, without a model, over ResNet-20's"
        " training steps",
        f"{_BENCHMARK}.input_pipeline",
        "{on_device[share_of_training]/0.01:.2f} %"
        " ({on_device[epoch_seconds_without_model]:.2f} s an epoch)",
    ),
    Row(
        "FLOPs of sparse ResNet-50 over dense (RigL's published)",
        _FLOPS,
        ", ".join(map(_factor, (0, 1, 5, 6))),
        readme=True,
    ),
    Row("the same", _FLOPS, ", ".join(map(_factor, (2, 3, 4, 7, 8)))),
    Row(
        "FLOPs of dense ResNet-50 over RigL's published",
        _FLOPS,
        "{inference/inference_published:.3f}",
    ),
    Row(
        f"{_DIGITS}, SparseOpt minus SGD",
        "make demo",
        "{summary[paired][sparseopt - sgd][test_accuracy][mean]/0.01:+.2f} points, 95 % CI"
        " [{summary[paired][sparseopt - sgd][test_accuracy][ci95][0]/0.01:+.2f},"
        " {summary[paired][sparseopt - sgd][test_accuracy][ci95][1]/0.01:+.2f}],"
        " n = {summary[paired][sparseopt - sgd][test_accuracy][n]}",
        readme=True,
    ),
    Row(
        f"{_DIGITS}, %",
        "make demo",
        ", ".join(
            f"{name} {{summary[methods][{name}][test_accuracy][mean]/0.01:.2f}}"
            f" ± {{summary[methods][{name}][test_accuracy][std]/0.01:.2f}}"
            for name in ("dense", "sgd", "sparseopt")
        ),
    ),
)
