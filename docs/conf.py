"""The site that `make docs` builds."""

import re
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyObject

import sparseopt_jax

ROOT = Path(__file__).parent.parent

project = "sparseopt_jax"
author = "The sparseopt_jax authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

# Sphinx reads the repository's top folder (see the Makefile), and of it these pages.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/**.rst", "experiments/**.md"]
exclude_patterns = [".*", "**/.*", "runs", "data", "build", "dist", "docs/_build"]
templates_path = ["_templates"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
default_role = "literal"
highlight_language = "none"  # indented blocks are commands and what they print

# Docstrings say the types, which annotations would name by where jax and Python define them.
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpick_ignore_regex = [("py:(class|exc)", r"\w+Error|jax\..*")]  # whose sites are elsewhere
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 72

html_theme = "sphinx_book_theme"
html_title = f"sparseopt_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "front.html"}
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


def is_a_field(app, what, name, value, skip, options):
    """Leaves out the members that the list of attributes has."""
    method = callable(value) or isinstance(value, property)
    return True if what == "class" and not method else None


def prose_returns(app, what, name, value, options, lines):
    """Keeps napoleon from taking what comes before a colon for a type: Returns are sentences."""
    if "Returns:" in lines:
        # An escaped line end shows nothing.
        lines.insert(lines.index("Returns:") + 1, "  \\")


def plain_defaults(app, what, name, value, options, signature, returns):
    """Shows a class or function by its name, and of a Linen module what is ours."""
    ours = re.sub(r", parent: .*|, parent=<.*", ")", signature or "")
    return re.sub(r"<(?:class|function) '?([\w.]+)'?>", r"\1", ours) or None, returns


# These are arguments and plain words too: links only with `sx.` before or an argument behind.
ALSO_WORDS = {"density", "fan_in", "flops", "ham", "summary"}


def link_names(app, doctree):
    """Has `sx.ERK`, `ERK` and `ERK(0.9)` lead to ERK, in docstrings and on pages."""
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        found = re.fullmatch(r"(?:sx\.)?(\w+)(?:\(.*\))?", text, re.DOTALL)
        if not found or found[1] not in sparseopt_jax.__all__ or text in ALSO_WORDS:
            continue
        if isinstance(literal.parent, nodes.reference | pending_xref | nodes.title):
            continue
        target = f"sparseopt_jax.{found[1]}"
        xref = pending_xref(refdomain="py", reftype="obj", reftarget=target, refwarn=True)
        literal.replace_self(xref)
        xref += literal


def setup(app):
    (attributes,) = (kind for kind in PyObject.doc_field_types if kind.name == "variable")
    attributes.label = "Attributes"
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("doctree-read", link_names)
    app.connect("autodoc-process-docstring", prose_returns, priority=400)  # napoleon has 500
    app.connect("autodoc-skip-member", is_a_field)
