"""What the pages and docstrings say works: code blocks, commands, links, and each public name."""

import dataclasses
import doctest
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import tomllib

import pytest

import sparseopt_jax
from experiments.config import SPECS

ROOT = pathlib.Path(__file__).parent.parent
GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md", *GUIDES)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
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


def test_a_file_of_the_library_imports_only_from_files_above_it_in_the_list():
    text = TEXTS["CONTRIBUTING.md"]
    rooms = text[text.index("    sparseopt_jax/ ") : text.index("      models/ ")]
    order = list(dict.fromkeys(re.findall(r"\b([a-z_]+)\.py", rooms)))
    files = {path.stem: path for path in (ROOT / "sparseopt_jax").glob("*.py")}
    assert sorted(order) == sorted(files.keys() - {"__init__"})
    for place, name in enumerate(order):
        source = files[name].read_text(encoding="utf-8")
        used = re.findall(r"^ *from sparseopt_jax\.(\w+) import", source, re.MULTILINE)
        used += re.findall(r"^ *from sparseopt_jax import (\w+)", source, re.MULTILINE)
        below = [other for other in used if other in order[place:]]
        assert not below, f"{name} imports {', '.join(below)}"


def shown_outputs(text):
    """For each block, the indented lines that follow it: what the page says that it prints."""
    found = re.findall(
        r"^( *)```python\n.*?^\1```\n((?:\n*\1    [^\n]*\n)*)", text, re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}    ", "", shown, flags=re.MULTILINE) for indent, shown in found]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_run_and_print_what_the_page_shows(name, tmp_path):
    """In order, as one program: a later block may use what an earlier one defined."""
    program, end = tmp_path / "blocks.py", "-- end of block --"
    blocks = [f"{block}\nprint({end!r})\n" for block in python_blocks(TEXTS[name])]
    program.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "utf8", program],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    printed = [output.strip() for output in done.stdout.split(f"{end}\n")[:-1]]
    assert printed == [output.strip() for output in shown_outputs(TEXTS[name])]


def test_outputs_are_found_on_a_page():
    fence = "```"
    page = f"""
{fence}python
print(1)
{fence}

    1
      2

    3

And:

   {fence}python
   {fence}

   text

   {fence}python
   print(3)
   {fence}

       3

    no output
"""
    assert [shown.strip() for shown in shown_outputs(page)] == ["1\n  2\n\n3", "", "3"]
    assert any(shown_outputs(README))


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


def test_help_and_dir_show_the_public_names():
    assert sparseopt_jax.__all__ == dir(sparseopt_jax) == sorted(PUBLIC)
    text = pydoc.plain(pydoc.render_doc(sparseopt_jax))
    assert not [name for name in PUBLIC if not re.search(rf"^    (class )?{name}\b", text, re.M)]
    namespace = {}
    exec("from sparseopt_jax import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)


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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_no_page_and_no_message_installs_the_project_by_name():
    """It is installed from a clone: no index has its name."""
    files = [f for kind in ("*.py", "*.sh", "*.md") for f in (ROOT / "experiments").rglob(kind)]
    files += [*(ROOT / "sparseopt_jax").rglob("*.py"), *(ROOT / name for name in TEXTS)]
    by_name = re.compile(rf"pip install[^\n]*{PROJECT['name']}|{PROJECT['name']}\[")
    assert not [file for file in files if by_name.search(file.read_text(encoding="utf-8"))]
    (flax,) = PROJECT["optional-dependencies"]["models"]
    models = ROOT / "sparseopt_jax" / "models" / "__init__.py"
    assert f"pip install '{flax}'" in models.read_text(encoding="utf-8")


def test_urls_lead_to_what_the_readme_cites():
    (paper,) = PROJECT["urls"].values()
    assert f"arXiv {paper.removeprefix('https://arxiv.org/abs/')}" in README


def test_versions_agree():
    assert sparseopt_jax.__version__ == PROJECT["version"]
    changelog = TEXTS["CHANGELOG.md"]
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", changelog, re.MULTILINE)
