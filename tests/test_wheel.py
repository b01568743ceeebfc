"""The wheel: what is in it, and that it works where only its own dependencies are installed."""

import email.parser
import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

from tests.test_docs import README, ROOT, python_blocks

FOLDERS = ("sparseopt_jax", "experiments", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore")

CHECKS = """
import importlib.metadata
import importlib.util
import pathlib

assert sx.__version__ == importlib.metadata.version("sparseopt-jax") == {version!r}
assert pathlib.Path(sx.__file__).is_relative_to({environment!r}), sx.__file__
for absent in ("flax", "orbax", "chex", "sklearn", "experiments", "tests"):
    assert importlib.util.find_spec(absent) is None, absent

# ERK at 0.9 keeps exactly a tenth of the 64 * 32 + 32 * 10 weights, and all others are 0.
masks = sx.get_masks(opt_state)
assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == 237
pruned = jax.tree.map(lambda p, m: jnp.where(m, 0, p), params, masks)
assert not any(leaf.any() for leaf in jax.tree.leaves(pruned))

try:
    import sparseopt_jax.models
except ImportError as error:
    assert error.name == "flax"
    assert "pip install 'flax" in str(error), error
else:
    raise AssertionError("sparseopt_jax.models was imported without flax")
print("works")
"""


def pip(*arguments, cwd):
    """Runs pip; returns what it said and whether it succeeded."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        cwd=cwd,
        env=environment_variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout, done.returncode == 0


def environment_variables():
    """Those of this process, without what brings in modules from elsewhere."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def build_wheel(folder):
    """Builds the wheel from a copy of the checkout, since building writes beside the sources."""
    checkout = folder / "checkout"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, checkout / name)
    # Without isolation pip downloads no build backend: the extra `test` has brought it.
    said, built = pip(
        "wheel", checkout, "--no-deps", "--no-build-isolation", "--check-build-dependencies",
        "--wheel-dir", folder / "dist", cwd=folder,
    )  # fmt: skip
    assert built, said
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def test_wheel_holds_the_library_alone(tmp_path):
    package = ROOT / "sparseopt_jax"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = [pathlib.PurePosixPath(name) for name in wheel.namelist()]
        (info,) = {name.parts[0] for name in names if name.parts[0].endswith(".dist-info")}
        metadata = email.parser.Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    held = {str(name) for name in names if name.parts[0] != info}
    assert held == sources | {"sparseopt_jax/py.typed"}
    assert f"{info}/licenses/LICENSE" in map(str, names)
    assert info == f"sparseopt_jax-{metadata['Version']}.dist-info"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.partition(">=")[0].partition("<")[0] for r in required) == ["jax", "optax"]
    assert {"experiments", "models"} <= set(metadata.get_all("Provides-Extra"))


def test_wheel_works_in_an_environment_of_its_own(tmp_path):
    wheel = build_wheel(tmp_path)
    home = tmp_path / "environment"
    venv.create(home, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        # Compiling all of jax and scipy to bytecode would take longer than the test itself.
        said, installed = pip(
            "--python", python, "install", "--no-compile", "--progress-bar=off", wheel, cwd=tmp_path
        )
        assert installed, (
            "pip could not install the wheel with jax and optax. It needs the package index that"
            f" `make test` installs from, or another that PIP_INDEX_URL names. pip said:\n{said}"
        )
        own_loop = "\n".join(python_blocks(README)[:2])  # the model, then the five lines
        version = wheel.name.split("-")[1]
        program = tmp_path / "program.py"
        checks = CHECKS.format(version=version, environment=str(home.resolve()))
        program.write_text(own_loop + checks, encoding="utf-8")
        # -I: neither this folder, nor PYTHONPATH, nor the user's own packages can be imported.
        done = subprocess.run(
            [python, "-I", "-W", "error", program],
            cwd=tmp_path,
            env=environment_variables(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "works"
    finally:
        shutil.rmtree(home)  # some 600 MB, which pytest would keep for three runs
