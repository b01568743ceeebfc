"""The site's sources, which need no build: a line for each public name; and the citation."""

import pathlib
import re

import yaml

import sparseopt_jax as sx
from sparseopt_jax import models
from tests.test_docs import PROJECT, README, ROOT, TEXTS

DOCS = ROOT / "docs"


def documented(text):
    """The names that an API page documents, each with its module and the directive's kind."""
    found, module = [], None
    for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", text, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        else:
            found.append((module, directive.removeprefix("auto"), name))
    return found


PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.rst")}
NAMES = [entry for text in PAGES.values() for entry in documented(text)]


def kind(value):
    if not isinstance(value, type):
        return "function"
    return "exception" if issubclass(value, BaseException) else "class"


def test_each_public_name_is_on_one_api_page_as_what_it_is():
    public = [("sparseopt_jax", kind(getattr(sx, name)), name) for name in sx.__all__]
    public += [
        ("sparseopt_jax.models", kind(value), name)
        for name, value in vars(models).items()
        if getattr(value, "__module__", "").startswith("sparseopt_jax")
    ]
    assert sorted(NAMES) == sorted(public)


def test_names_are_found_on_a_page():
    page = (
        ".. currentmodule:: a.b\n\n.. autoclass:: C\n.. autofunction:: f\n\ntext .. autoclass:: D\n"
    )
    assert documented(page) == [("a.b", "class", "C"), ("a.b", "function", "f")]


def test_the_index_leads_to_every_page():
    index = TEXTS["docs/index.md"]
    trees = re.findall(r"^:::\{toctree\}\n(.*?)^:::$", index, re.DOTALL | re.MULTILINE)
    entries = {e for tree in trees for e in tree.splitlines() if e and not e.startswith(":")}
    entries = {re.sub(r".*<(.*)>", r"\1", entry) for entry in entries}
    assert {f"api/{page}" for page in PAGES} <= entries
    assert {"guides/*", "gallery", "/README", "/CHANGELOG"} <= entries
    linked = set(re.findall(r"\]\((api/[^)]*)\)", index))
    assert linked == {f"api/{page}.rst" for page in PAGES}


def test_citation_is_complete_and_agrees_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["title"] == f"sparseopt_jax: {PROJECT['description']}"
    assert citation["authors"] == [{"name": "The sparseopt_jax authors"}]
    (paper,) = PROJECT["urls"].values()
    arxiv = pathlib.PurePosixPath(paper).name
    assert f"arXiv {arxiv}" in citation["message"]
    bibtex = README[README.index("## Citing") :]
    assert f"version = {{{PROJECT['version']}}}" in bibtex
    assert f"{{{citation['title']}}}" in bibtex
    assert f"{{{arxiv}}}" in bibtex
