"""What the README says works: its Python blocks run, in order, as one program."""

import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_blocks_run(tmp_path):
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert len(blocks) >= 3
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "error", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_only_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_import_needs_neither_flax_nor_the_experiments():
    """In an interpreter that has jax and optax loaded, the library brings in only itself."""
    code = (
        "import sys, jax, jax.numpy, optax; before = set(sys.modules); import sparseopt_jax;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    standard = set(sys.stdlib_module_names)
    assert set(done.stdout.split()) - standard == {"sparseopt_jax"}


def test_versions_agree():
    import sparseopt_jax

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sparseopt_jax.__version__ == project["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(project['version'])}\b", changelog, re.MULTILINE)
