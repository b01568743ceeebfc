"""Two real processes with two devices each: killed, stopped, and continued; against one process."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import sparseopt_jax as sx
from experiments import data, distributed, metrics, programs
from experiments.config import Config, ConfigError
from tests import train_runs

REPOSITORY = pathlib.Path(__file__).parents[1]
# At 0.9 there are neurons with three inputs, of which nearly all are black: what normalises them
# enlarges the rounding of another order of additions to a thousandth within a few steps.
CONFIG = Config(
    model="mlp", hidden=64, sparsity=0.8, update_interval=4, epochs=5, batch_size=128,
    checkpoint_every=10, keep_best=False, diagnostics_every=0, mesh_data=2, mesh_fsdp=2,
)  # fmt: skip
RUN = "runs/sparseopt-seed0"
SIGNAL_ITSELF = """
import os, runpy, sys
from experiments import stepping
number, step, single = int(sys.argv.pop(1)), int(sys.argv.pop(1)), stepping.Stepper._single

def signalled(self, state):
    if self.step + 1 == step:
        os.kill(os.getpid(), number)
    return single(self, state)

stepping.Stepper._single = signalled
sys.argv[0] = "train"
runpy.run_module("experiments.train", run_name="__main__")
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(arguments, port, signalled=None):
    """Two processes as Open MPI starts them; the second gets a signal, at a step, from itself."""
    started = []
    for rank in range(2):
        program = ["-m", "experiments.train"]
        if signalled and rank == 1:
            program = ["-c", SIGNAL_ITSELF, *map(str, signalled)]
        environment = dict(
            os.environ,
            OMPI_MCA_orte_hnp_uri="1234.0;tcp://127.0.0.1:9",
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
            JAX_COORDINATOR_PORT=str(port),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS="--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2",
        )
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments],
                env=environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def run(arguments, signalled=None):
    """Exit codes of both processes, and what they said."""
    started = start(arguments, free_port(), signalled)
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    with train_runs.standard_promotion(), train_runs.compiled_once():
        yield


def test_two_processes_killed_stopped_and_continued_equal_one(tmp_path, capsys):
    folder = tmp_path / "two"
    arguments = train_runs.command(folder, CONFIG)

    codes, said = run(arguments, signalled=(signal.SIGKILL, 26))
    assert codes[1] == -signal.SIGKILL
    # It ends by the error of a collective, or, where it waits for something else, by JAX's own
    # watch over the processes, which aborts it.
    if codes[0] == -signal.SIGABRT:
        assert "another task died" in said[0]
    else:
        assert codes[0] == distributed.LOST, said[0]
        assert "process 0 has lost another one" in said[0]
        assert f"--workdir={folder}" in said[0]
    assert not (folder / RUN / "result.json").exists()
    assert {path.name for path in (folder / RUN / "checkpoints").iterdir()} >= {"10"}

    codes, said = run(arguments, signalled=(signal.SIGTERM, 36))
    assert codes == [143, 143], said
    assert "continuing from step" in said[0]
    assert "stopped and saved: sparseopt seed 0, at step" in said[0]
    steps = {int(path.name) for path in (folder / RUN / "checkpoints").iterdir()}
    assert max(steps) >= 36

    assert "4 device(s) (cpu), data=2 fsdp=2, 2 processes" in said[0]

    # From two processes to one; and one from the first step on.
    assert train_runs.train_here(folder, CONFIG) == 0
    assert f"continuing from step {max(steps)}" in capsys.readouterr().out
    alone = tmp_path / "one"
    assert train_runs.train_here(alone, CONFIG) == 0
    ours, theirs = (train_runs.read_lines(f / RUN / "metrics.jsonl") for f in (folder, alone))
    assert [(x["kind"], x["step"]) for x in ours] == [(x["kind"], x["step"]) for x in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "test_loss", "gradient_norm"):
            np.testing.assert_allclose(mine.get(name, 0), other.get(name, 0), rtol=1e-3)

    dataset = data.load(CONFIG)
    model = programs.compile_model(CONFIG, dataset)
    state = programs.compile_method(CONFIG, dataset, model).functions.state
    shapes = {"state": state, "logged_masks": sx.get_masks(state.opt_state)}
    two, one = (train_runs.last_checkpoint(f, "sparseopt", 0, shapes) for f in (folder, alone))
    assert two.step == one.step == 55
    masks = [
        metrics.path_leaves(sx.get_masks(each.arrays["state"].opt_state)) for each in (two, one)
    ]
    kernels = [path for path in masks[0] if path.endswith("kernel")]
    same = sum(int((masks[0][path] & masks[1][path]).sum()) for path in kernels)
    assert same >= 0.999 * sum(int(masks[1][path].sum()) for path in kernels)
    weights, reference = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each.arrays["state"].params)])
        for each in (two, one)
    )
    assert np.linalg.norm(weights - reference) < 1e-3 * np.linalg.norm(reference)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "is set but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            r"JAX_PROCESS_ID=2 must be in \[0, 2\)",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "2"},
            "JAX_NUM_PROCESSES='two' must be an integer",
        ),
    ],
)
def test_variables_that_contradict_each_other_are_refused(variables, named, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        distributed.initialize()


def test_one_process_stays_alone():
    """Without a cluster nothing is initialised, so the command runs as it is."""
    program = (
        "from experiments import distributed; import jax; distributed.initialize();"
        "print(jax.distributed.is_initialized(), jax.process_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "1"], done.stderr
