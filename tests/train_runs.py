"""Training runs by the command, in this process, and what they left; shared by several tests."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal

import jax

from experiments import stepping, train, workdir
from experiments.checkpoint import Checkpoints

TIMING = ("timing", "examples_per_second", "step_seconds", "data_wait_seconds", "environment")
FILE = """from experiments.config import Config

def get_config():
    return {config!r}
"""


def command(folder, config, *overrides):
    """The arguments of `experiments.train`, with `config` in a file beside the folder."""
    path = pathlib.Path(folder).with_suffix(".py")
    path.write_text(FILE.format(config=config))
    return [f"--config={path}", f"--workdir={folder}", *overrides]


def train_here(folder, config, *overrides):
    """Runs the command in this process; returns its exit code."""
    return train.main(command(folder, config, *overrides))


@contextlib.contextmanager
def standard_promotion():
    """optax's cosine schedule takes the minimum of an int32 and a float.

    Set for all threads, since compilation runs in others.
    """
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


@contextlib.contextmanager
def compiled_once():
    """Programs are compiled once for all runs of the body that need the same ones."""
    cache = {}

    def once(function):
        def cached(config, dataset, *model):
            # Which runs a grid has, and what is logged and kept of them, is in no program.
            runs = {"seed": 0, "seeds": 1, "compare": (), "checkpoint_every": 0, "steps": -1}
            key = function, dataclasses.replace(config, **runs), dataset.mesh
            if key not in cache:
                cache[key] = function(config, dataset, *model)
            return cache[key]

        return cached

    before = train.compile_model, train.compile_method
    train.compile_model, train.compile_method = map(once, before)
    try:
        yield
    finally:
        train.compile_model, train.compile_method = before


@contextlib.contextmanager
def sigterm_in_step(step):
    """This process gets a SIGTERM while it takes the given step."""
    single = stepping.Stepper._single

    def signalled(self, state):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return single(self, state)

    stepping.Stepper._single = signalled
    try:
        yield
    finally:
        stepping.Stepper._single = single


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(record):
    """What does not depend on how fast the machine is."""
    return {k: v for k, v in record.items() if k not in TIMING}


def last_checkpoint(folder, method, seed, shapes):
    """Arrays and notes of a run's newest checkpoint, in the shapes and shardings given."""
    path = workdir.run_folder(pathlib.Path(folder), method, seed) / "checkpoints"
    with Checkpoints(path, keep_last=9, keep_best=False) as checkpoints:
        return checkpoints.restore(shapes)
