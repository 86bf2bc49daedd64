"""How the documentation site is built: ``make docs``. Nothing here, and nothing on the pages, needs a network."""

import enum
import importlib
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from docutils.utils.math import MathError  # type: ignore[import-untyped]
from docutils.utils.math.latex2mathml import tex2mathml  # type: ignore[import-untyped]
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
if find_spec("triton"):  # kernels are documented as the functions that they are written as, with their docstrings
    os.environ["TRITON_INTERPRET"] = "1"
    triton: Any = importlib.import_module("triton")
    triton.jit = lambda function=None, **options: function or (lambda function: function)
logger = logging.getLogger(__name__)

project = "PageBrain"
author = copyright = "The PageBrain authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "performance/README.md", "README.md"]
# A name that leads nowhere is an error. Only types of other projects, which signatures are full of, have no page here.
nitpicky = True
# Names of other projects, and type variables.
nitpick_ignore_regex = [(r"py:(class|obj|exc)", r"(?!pagebrain\.|chapters\.).*|.*\.(Result|Score)")]

# Pages and notebooks. Notebooks are shown as they were run and saved.
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that do not say: commands, output, formulas
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["myst.header"]  # a notebook may go from its title to an exercise without a section between
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # by default it comes from a server elsewhere
html_math_renderer = "mathml"

# The API reference.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_mock_imports = [] if find_spec("triton") else ["triton"]  # there is none for macOS, where the site is built too
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_custom_sections = [("Attributes", "params_style")]  # as they stand: "keys, values: ..." is one entry
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "PageBrain"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # one search field is enough, the one at the side
}


def copy_notebooks(app: Sphinx) -> None:
    """Bring the notebooks under ``docs/``, where Sphinx looks. Their links to files of the repository stay right."""
    target = DOCS / "_notebooks"
    target.mkdir(exist_ok=True)
    sources = {path.name: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    for stale in target.glob("*.ipynb"):
        if stale.name not in sources:
            stale.unlink()
    for name, path in sources.items():
        text = path.read_text(encoding="utf-8").replace("](../", "](../../")
        copied = target / name
        if not copied.is_file() or copied.read_text(encoding="utf-8") != text:  # or Sphinx would read it again
            copied.write_text(text, encoding="utf-8")


def open_line(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from taking the first words of a property's docstring, up to a colon, for its type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def without_arguments(
    app: Sphinx, what: str, name: str, found: object, options: object, signature: str, annotation: str
) -> tuple[str, str] | None:
    """Show a protocol or an enumeration without its base class's arguments: it is not called."""
    is_shape = getattr(found, "_is_protocol", False) or (isinstance(found, type) and issubclass(found, enum.Enum))
    return ("", "") if what == "class" and is_shape else None


def where_defined(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Resolve a name as it is imported somewhere, such as ``pagebrain.LLM``, to where it is defined."""
    target = str(node.get("reftarget", ""))
    for name in (target, f"{node.get('py:module')}.{target}"):
        if node.get("refdomain") == "py" and name.startswith(("pagebrain.", "chapters.")):
            found = _import(name)
            home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
            resolved = env.get_domain("py").resolve_any_xref(env, node["refdoc"], app.builder, home, node, contnode)
            if resolved:
                return resolved[0][1]
    return None


def _import(name: str) -> object:
    """The object of a dotted name; ``None`` if there is none."""
    module_name, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute, None)
    except ImportError:
        return getattr(_import(module_name), attribute, None) if module_name else None


def visit_math(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers set themselves: no script, no font, no server."""
    is_block = isinstance(node, nodes.math_block)
    code = re.sub(r"\\(begin|end)\{(align|equation|gather)\*?\}", "", node.astext()).strip()
    code = code.replace(r"\dots", r"\ldots")  # the one common command that docutils does not know
    try:
        mathml = tex2mathml(code, as_block=is_block)
    except MathError as error:
        logger.warning("this formula cannot be written as MathML: %s: %s", error, code, location=node)
        mathml = translator.starttag(node, "code", "") + translator.encode(code) + "</code>"
    translator.body.append(f'<div class="formula">{mathml}</div>\n' if is_block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", open_line, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", without_arguments)
    app.connect("missing-reference", where_defined)
