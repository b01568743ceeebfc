"""Settings for all tests: eight CPU devices, strict NumPy semantics, repeatable hypothesis."""

import importlib.metadata
import os
import re
import tempfile

# Both are read when jax starts its backend, so they are set before anything imports it. The
# tests compare one device with eight, on any machine: an accelerator is not asked for. Compiling
# takes most of their time, and half of that goes into machine code that hardly runs: level 0 of
# LLVM, behind all of XLA's own passes. Of the rest nearly half goes into how jaxlib 0.10 emits
# fusions; later ones do not know the flag, and a process ends at one that it does not know. Flags
# that are set outside come later and win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import hypothesis
import jax
import pytest

# Implicit broadcasting between ranks and silent dtype promotion hide bugs: both raise.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Derandomised unless asked otherwise, so that a failure anywhere is a failure everywhere:
# HYPOTHESIS_PROFILE=explore looks at new examples on every run, and at more of them.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# What of `experiments` the library's own tests may use: it reads programs that were compiled, and
# needs no more to be installed than they do. Matplotlib comes with `experiments` too.
OF_EXPERIMENTS = re.compile(
    r"^(?:from|import) (?:matplotlib"
    r"|experiments(?!\.hlo import|\.benchmarks import measuring, update_bytes$))",
    re.MULTILINE,
)


def pytest_addoption(parser):
    parser.addoption(
        "--library",
        action="store_true",
        help="only files that test sparseopt_jax: none that imports experiments or matplotlib",
    )


def pytest_ignore_collect(collection_path, config):
    if not config.getoption("library") or collection_path.suffix != ".py":
        return None
    return True if OF_EXPERIMENTS.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_configure(config):
    """What takes longest to compile is compiled once a session, in a folder that goes with it.

    Workers, and the processes that tests start, are told by their environment.
    """
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(
            prefix="sparseopt_jax-tests-", ignore_cleanup_errors=True
        )
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        jax.config.update("jax_compilation_cache_dir", folder.name)


@pytest.fixture
def standard_promotion():
    """Several of optax's own optimizers mix dtypes, so strict promotion ends at their door."""
    with jax.numpy_dtype_promotion("standard"):
        yield
