"""What the pages and docstrings say works: code blocks, commands, links, and each public name."""

import dataclasses
import doctest
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import sparseopt_jax
from experiments.config import SPECS

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md")
}
README = TEXTS["README.md"]


def python_blocks(text):
    """The fenced Python blocks of a page, those within a list item dedented."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


WITH_BLOCKS = [name for name, text in TEXTS.items() if python_blocks(text)]


def test_the_readme_has_blocks_and_every_fence_is_one_of_them():
    """A block under another label, or none, would be shown and never run."""
    assert len(python_blocks(README)) >= 3
    for name, text in TEXTS.items():
        fences = re.findall(r"^\s*(?:```|~~~)(.*)$", text, re.MULTILINE)
        assert fences == ["python", ""] * len(python_blocks(text)), name


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_run(name, tmp_path):
    """In order, as one program: a later block may use what an earlier one defined."""
    program = tmp_path / "blocks.py"
    program.write_text("\n".join(python_blocks(TEXTS[name])), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_pages_link_only_to_files_that_are_there():
    links = {
        (name, link)
        for name, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)#]+)\)", text)
        if "://" not in link
    }
    assert links
    assert not [(n, link) for n, link in links if not (ROOT / n).parent.joinpath(link).exists()]


MODULES = sorted(
    {m for text in TEXTS.values() for m in re.findall(r"python -m (experiments(?:\.\w+)+)", text)}
)


@pytest.mark.parametrize("module", MODULES)
def test_commands_of_the_pages_answer_help(module):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout + done.stderr


def test_commands_of_the_pages_name_configs_fields_and_targets_that_are_there():
    pages = "\n".join(TEXTS.values())
    assert MODULES
    configs = set(re.findall(r"--config=([\w./]+\.py)", pages))
    fields = set(re.findall(r"--config\.([a-z]\w*)", pages))
    makes = set(re.findall(r"^    make (\w+)|`make (\w+)`", pages, re.MULTILINE))
    targets = {name for pair in makes for name in pair if name}
    assert configs
    assert fields
    assert targets >= {"demo", "test"}
    assert not [path for path in configs if not (ROOT / path).is_file()]
    assert not fields - set(SPECS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not targets - set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


# Each name that `import sparseopt_jax as sx` gives, apart from the submodules.
PUBLIC = {
    name: value
    for name, value in vars(sparseopt_jax).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}

# Functions that no argument of the documented type makes fail.
RAISES_NOTHING = {"default_prunable"}


def sections(docstring):
    """The Google-style sections of a docstring by heading, each with its text."""
    parts = re.split(r"^([A-Z][a-z]+):(?=\s)", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section):
    """The names that a section like ``Args`` describes."""
    lines = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, re.MULTILINE)
    return {name.lstrip("*") for line in lines for name in line.split(", ")}


def faults(name, value):
    """What the docstring of a public function or class lacks, as a list of phrases."""
    docstring = inspect.cleandoc(value.__doc__ or "")  # its own: getdoc would inherit one
    if not docstring:
        return ["a docstring"]
    # The class that an exception derives from says what it is; it has no example of its own.
    if inspect.isclass(value) and issubclass(value, BaseException):
        return []
    found = sections(docstring)
    lacking = []
    examples = doctest.DocTestParser().get_examples(found.get("Example", ""))
    if not [example for example in examples if doctest.SKIP not in example.options]:
        lacking.append("an Example that runs")
    if inspect.isclass(value):
        heading, checked = "Attributes", hasattr(value, "__post_init__")
        names = (
            {field.name for field in dataclasses.fields(value)}
            if dataclasses.is_dataclass(value)
            else set(inspect.get_annotations(value))
        )
    else:
        heading, names = "Args", set(inspect.signature(value).parameters)
        checked = bool(names) and name not in RAISES_NOTHING
        if inspect.signature(value).return_annotation not in (None, "None"):
            lacking += [] if "Returns" in found else ["Returns"]
    described = entries(found.get(heading, ""))
    lacking += [f"{each} under {heading}" for each in sorted(names - described)]
    lacking += [f"an argument for its {heading} entry {n}" for n in sorted(described - names)]
    if checked and "Raises" not in found:
        lacking.append("Raises")
    return lacking


def test_public_docstrings_are_complete():
    assert {"sparse_training", "sparseopt", "ERK", "RigL", "get_masks"} <= set(PUBLIC)
    unexpected = [n for n, v in PUBLIC.items() if not (inspect.isclass(v) or inspect.isfunction(v))]
    assert not unexpected, "functions and classes are public, nothing else"
    lacking = {name: faults(name, value) for name, value in sorted(PUBLIC.items())}
    lacking = {name: phrases for name, phrases in lacking.items() if phrases}
    assert not lacking, "\n".join(f"{n} lacks {', '.join(f)}" for n, f in lacking.items())


def test_faults_are_found():
    """The check itself, on a function that has every fault, and on one that has none."""

    def bad(x: int, y: int) -> int:
        """Adds.

        Args:
          x: an int.
          z: gone since.
        """
        return x + y

    def good(x: int, *rest: int) -> int:
        """Adds.

        Args:
          x, *rest: ints.

        Returns:
          An int.

        Raises:
          TypeError: x is a str.

        Example:
          >>> 1 + 1
          2
        """
        return x + sum(rest)

    assert faults("bad", bad) == [
        "an Example that runs",
        "Returns",
        "y under Args",
        "an argument for its Args entry z",
        "Raises",
    ]
    assert faults("good", good) == []
    assert faults("f", lambda: None) == ["a docstring"]


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sparseopt_jax.__version__ == project["version"]
    changelog = TEXTS["CHANGELOG.md"]
    assert re.search(rf"^## {re.escape(project['version'])}\b", changelog, re.MULTILINE)
