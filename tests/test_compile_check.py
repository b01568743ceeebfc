"""Compiling for TPUs that are not there, and the table for a small model on fake devices."""

import json
import os
import platform
import re
import subprocess
import sys

import jax
import pytest

from experiments import compile_check, programs
from experiments.config import ConfigError

on_linux_x86 = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="libtpu is made for Linux on x86-64",
)

CHIPS, BATCH, SIZE, CHANNELS, CLASSES = 4, 64, 64, 16, 1000


def run_with_libtpu(*arguments):
    """Runs Python in an environment of its own, with libtpu where `make test` puts it."""
    paths = os.path.join(sys.prefix, "tpu"), os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_FLAGS": "",  # conftest's are for the CPU
        "JAX_OPTIMIZATION_LEVEL": "O0",  # half the time, and the program is not run
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900
    )


def products(size, channels, classes):
    """FLOPs of ResNet-50's multiply-adds on one image, and those of its first convolution.

    A tap of a kernel that lies on the padding does not count.
    """

    def convolution(size, kernel, stride, c_in, c_out):
        pad = kernel // 2
        out = (size + 2 * pad - kernel) // stride + 1
        inside = sum(
            0 <= stride * position - pad + tap < size
            for position in range(out)
            for tap in range(kernel)
        )
        return out, 2 * inside**2 * c_in * c_out

    size, first = convolution(size, 7, 2, 3, channels)
    total, c_in = first, channels
    size = (size - 1) // 2 + 1  # the max pooling
    for stage, blocks in enumerate((3, 4, 6, 3)):
        c = channels * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            before = size
            total += convolution(before, 1, 1, c_in, c)[1]
            size, flops = convolution(before, 3, stride, c, c)
            total += flops + convolution(size, 1, 1, c, 4 * c)[1]
            if block == 0:
                total += convolution(before, 1, stride, c_in, 4 * c)[1]
            c_in = 4 * c
    return total + 2 * c_in * classes, first


def test_products():
    """Published: 4.09e9 multiply-adds at 224x224, those on the padding counted (2 to 4 %)."""
    assert products(224, 64, 1000)[0] == pytest.approx(2 * 4.09e9, rel=0.04)
    assert products(224, 64, 1000)[1] == pytest.approx(2 * 118e6, rel=0.02)


def compile_narrow(path):
    """What the command prints and writes for ResNet-50 of a quarter of the channels."""
    done = run_with_libtpu(
        "-m",
        "experiments.compile_check",
        "--topology=v5e:2x2",
        f"--batch_size={BATCH}",
        f"--config.image_size={SIZE}",
        f"--config.base_channels={CHANNELS}",
        "--config.mesh_fsdp=2",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


@on_linux_x86
def test_resnet50_compiles_for_a_tpu(tmp_path):
    """One test, since it compiles for two minutes and tests of a file may run in two processes."""
    text, record = compile_narrow(tmp_path / "check.json")
    check_record(text, record)
    check_flops(record)
    check_communication(record)


def check_record(text, record):
    names = ["topology update", "evaluation", "training step"]
    assert [program["program"] for program in record["programs"]] == names
    assert [program["batch_size"] for program in record["programs"]] == [None, BATCH, BATCH]
    assert record["topology"] == "v5e:2x2"
    assert record["mesh"] == {"data": 2, "fsdp": 2}
    assert record["chips"] == CHIPS
    assert record["config"]["dtype"] == "bfloat16"
    assert record["environment"]["versions"]["libtpu"]
    rows = re.findall(r"^(?:any|64) +(\w+ \w+|\w+) +\d+ ", text, re.MULTILINE)
    assert rows == names
    for program in record["programs"]:
        assert 0 < program["peak"] < 16 * 2**30
        for kind, found in program["collectives"].items():
            assert f"{found['count']} {kind} (" in text


def check_flops(record):
    """Products are counted by hand; the rest is element by element, and less with more channels."""
    flops = {program["program"]: program["flops"] for program in record["programs"]}
    image, first = products(SIZE, CHANNELS, CLASSES)
    forward = image * BATCH / CHIPS
    assert 1 <= flops["evaluation"] / forward < 1.1
    # The input of the first convolution needs no gradient.
    passes = 3 * forward - first * BATCH / CHIPS
    assert 1 <= (flops["training step"] - flops["topology update"]) / passes < 1.2


def check_communication(record):
    """A topology update's all-reduces are those of counts; a sharded step gathers weights."""
    update, _, step = (program["collectives"] for program in record["programs"])
    assert set(update) == {"all-reduce"}
    assert update["all-reduce"]["bytes"] < 64 * 1024
    assert step["all-gather"]["bytes"] > 2**20


COPIES = """
import argparse, jax, jax.numpy as jnp
from experiments.benchmarks import measuring, update_bytes
from experiments.hlo import bytes_moved
from sparseopt_jax.tpu_layouts import least_padded

shapes = (7, 7, 3, 64), (1, 1, 256, 64), (3, 3, 64, 64), (512, 100)
params = {str(shape): jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
device = measuring.tpu(argparse.ArgumentParser(), "v5e:1x1")
compiled = update_bytes.compile_update(update_bytes.PROGRAMS["rigl"], params, device)
print(bytes_moved(compiled.as_text())["copy"])
"""


@on_linux_x86
def test_a_tpu_copies_nothing_between_updates():
    """Three of these shapes lie otherwise than by rows there; a scalar may be copied."""
    done = run_with_libtpu("-c", COPIES)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100


TOPOLOGIES = """
import dataclasses, sys
from experiments import compile_check, mesh
from experiments.config import Config, ConfigError

def answer(name, **sizes):
    try:
        devices = compile_check.topology_devices(name)
        shape = mesh.make_mesh(Config(batch_size=96, **sizes), devices).shape
        return len(devices), devices[0].device_kind, tuple(shape.values())
    except ConfigError as error:
        return str(error)

for name, sizes in {asked!r}:
    print(repr(answer(name, **dict(sizes))))
"""


@on_linux_x86
def test_topologies_and_their_meshes():
    """One device a chip; axes of the torus are split where a mesh needs it."""
    asked = {
        ("v4:2x2x1", ()): (4, "TPU v4", (4, 1)),
        ("v4:4x4x4", (("mesh_data", 2), ("mesh_fsdp", 32))): "batch_size=96 must be a multiple of",
        ("v5e:1x1", ()): (1, "TPU v5 lite", (1, 1)),
        ("v5e:4x4", (("mesh_fsdp", 2),)): (16, "TPU v5 lite", (8, 2)),
        ("v5p:2x2x4", (("mesh_fsdp", 8),)): (16, "TPU v5", (2, 8)),
        ("v6e:4x4", (("mesh_fsdp", 2),)): (16, "TPU v6 lite", (8, 2)),
        ("v6e:2x2", (("mesh_data", 3),)): "3 of 4 TPU chips form no rectangle",
        ("v4:3x2x1", ()): "libtpu: INVALID_ARGUMENT: Topology layout",
    }
    done = run_with_libtpu("-c", TOPOLOGIES.replace("{asked!r}", repr(list(asked))))
    assert done.returncode == 0, done.stderr
    answers = [eval(line) for line in done.stdout.splitlines()]
    for (name, _), expected, found in zip(asked, asked.values(), answers, strict=True):
        assert expected in found if isinstance(expected, str) else found == expected, name


@pytest.fixture
def on_cpu(monkeypatch):
    """Fake devices in the place of a topology's."""
    monkeypatch.setattr(compile_check, "topology_devices", lambda name: jax.devices()[:CHIPS])


HIDDEN = 16
MLP = ["--topology=v5e:2x2", "--config.model=mlp", f"--config.hidden={HIDDEN}",
       "--config.image_size=4", "--config.dtype=float32"]  # fmt: skip


def test_numbers_of_a_small_model(on_cpu, tmp_path, capsys):
    """Bytes and FLOPs of an MLP's evaluation, by hand, at two batch sizes."""
    path = tmp_path / "check.json"
    with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule needs it
        static = ["--config.topology=static", "--batch_size=64,256", f"--json={path}"]
        assert compile_check.main([*MLP, *static]) == 0
    record = json.loads(path.read_text())
    found = {(p["program"], p["batch_size"]): p for p in record["programs"]}
    names = ("evaluation", "training step")
    assert set(found) == {(name, batch) for name in names for batch in (64, 256)}
    weights = 48 * HIDDEN + HIDDEN * HIDDEN + HIDDEN * CLASSES
    norms = HIDDEN * 2  # of either hidden layer
    for batch in (64, 256):
        evaluation, step = (found[name, batch] for name in names)
        rows = batch // CHIPS
        # Weights; scale, bias and running statistics; the head's bias. Images are bytes; labels
        # and weights of the examples take four each.
        arguments = 4 * (weights + 4 * norms + CLASSES) + rows * (48 + 4 + 4)
        assert evaluation["arguments"] == arguments
        assert evaluation["collectives"]["all-reduce"]["bytes"] == 12
        assert 2 * rows * weights <= evaluation["flops"] < 1.5 * 2 * rows * weights
        # The gradient crosses the devices, whatever the size of the batch.
        assert step["collectives"]["all-reduce"]["bytes"] >= 4 * weights
        assert step["reused"] >= 2 * 4 * weights  # weights and momentum
        assert step["peak"] >= evaluation["peak"]
    out = capsys.readouterr().out
    assert "4 chips (cpu) of 16 GiB; data=4 fsdp=1" in out
    assert out.count("\n64 ") == out.count("\n256 ") == 2


def test_a_program_that_does_not_fit(on_cpu, tmp_path, monkeypatch, capsys):
    """The others are compiled all the same, and the exit code says that one was not."""

    class TooLarge:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 26.76G exceeds 15.75G.\nmore")

    monkeypatch.setattr(programs, "lower_step", lambda *arguments: TooLarge())
    path = tmp_path / "check.json"
    dense = ["--config.topology=dense", "--config.optimizer=sgd", "--batch_size=64"]
    with jax.numpy_dtype_promotion("standard"):
        assert compile_check.main([*MLP, *dense, f"--json={path}"]) == 1
    evaluation, step = json.loads(path.read_text())["programs"]
    assert evaluation["error"] is None
    assert step["error"] == "RESOURCE_EXHAUSTED: 26.76G exceeds 15.75G."
    assert step["peak"] is step["collectives"] is None
    assert re.search(r"^64 +training step .*26.76G exceeds 15.75G.$", capsys.readouterr().out, re.M)


CRASH = """
import os, sys
print("1024   training step  ", end="", flush=True)
sys.stderr.write("F1122 emitter.cc:1] Check failed: no window\\n  @ 0x7fa5  frame")
os.abort()
"""


def test_a_compiler_that_crashes(monkeypatch, tmp_path, capfd):
    """Its last words and the file that has all of them, in the place of hundreds of lines."""
    monkeypatch.setattr(compile_check, "_CHILD", CRASH)
    monkeypatch.setattr(compile_check.tempfile, "tempdir", str(tmp_path))
    assert compile_check.command(["--topology=v5e:4x4"]) == 1
    out, err = capfd.readouterr()
    assert out == "1024   training step  "
    (log,) = tmp_path.iterdir()
    assert "frame" in log.read_text()
    assert "SIGABRT on this program: Check failed: no window" in err
    assert str(log) in err
    assert "frame" not in err


def test_the_command_passes_on_what_it_is_told(monkeypatch, tmp_path, capfd):
    """Arguments, text, exit code; and leaves no file behind."""
    child = "import sys; print(*sys.argv[1:]); print('error: so', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(compile_check, "_CHILD", child)
    monkeypatch.setattr(compile_check.tempfile, "tempdir", str(tmp_path))
    assert compile_check.command(["--topology=v5e:4x4", "--batch_size=8"]) == 2
    assert capfd.readouterr() == ("--topology=v5e:4x4 --batch_size=8\n", "error: so\n")
    assert not list(tmp_path.iterdir())


WRONG = {
    "": "--topology is missing, e.g. --topology=v5e:4x4",
    "--topolgy=v5e:4x4": "Did you mean '--topology'?",
    "--topology=v5e:4x4 --config.bn_group=4": "Did you mean 'bn_groups'?",
    "--topology=v5e:4x4 --batch_size=1024,x": "--batch_size='x' must be an integer at least 1",
    "--topology=v5e:4x4 --batch_size=8,8": "--batch_size=8,8 names one of them twice",
    "--topology=v5e:4x4 --config.batch_size=8": "--config.batch_size: give --batch_size=8",
    "--topology=v5e:4x4 --config=none.py": "--config=none.py: no such file",
    "--topology=v5e:4x4 --json=none/x.json": "none must be a folder to write to",
    "--topology=v5e:4x4 --json=tests": "--json=tests must be a file",
    "--topology=v5e:2x2 --batch_size=6": "batch_size=6 must be a multiple of 4",
    "--topology=v5e:2x2 --config.mesh_fsdp=3": "mesh_fsdp=3 must divide 4",
    "--topology=v5e:2x2 --config.bn_groups=3": "bn_groups=3 must divide batch_size=1024",
    "--topology=v5e:2x2 --config.epochs=5": "warmup_epochs=5 must be below epochs=5",
    "--topology=v5e:2x2 --config.num_classes=10": "num_classes=10 must be 1000, or 0",
    "--topology=v5e:2x2 --config.dataset=cifar10": "dataset='cifar10' must be 'imagenet2012'",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_settings(on_cpu, words, capsys):
    assert compile_check.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert WRONG[words] in err


@pytest.mark.parametrize(
    "name",
    ["", "v5e", "4x4", "v5e:", "v7:2x2", "v5e:2", "v5e:3x3", "v5e:2x2x1", "v4:4x4", "v4:0x1x1"],
)
def test_unknown_topologies(name):
    """The message lists what is known."""
    with pytest.raises(ConfigError, match=f"^--topology={name} must be a TPU generation") as raised:
        compile_check.topology_devices(name)
    for known in ("v4:2x2x1", "v5e:4x4", "v5p:4x4x4", "v6e:16x16"):
        assert known in str(raised.value)


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert compile_check.main(["--topology=v5e:4x4"]) == 2
    assert "no module named libtpu; install it (on Linux) with pip install '.[tpu]'" in (
        capsys.readouterr().err
    )
