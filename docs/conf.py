"""Sphinx configuration; build with: sphinx-build -W docs docs/_build/html."""

from __future__ import annotations

from pydantic import BaseModel
from sphinx.application import Sphinx

from modelopt_lite import __version__

project = "modelopt-lite"
author = "the modelopt-lite authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "modelopt-lite"
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def is_config(obj: object) -> bool:
    """Return whether an object is a configuration class."""
    return isinstance(obj, type) and issubclass(obj, BaseModel)


def drop_signature(_app: Sphinx, what: str, *_: object) -> tuple[str, str] | None:
    """Leave out the signature of a class, which repeats its fields or attributes."""
    return ("", "") if what == "class" else None


def document_fields(_app: Sphinx, _what: str, _name: str, obj: object, _options: object, lines: list[str]) -> None:
    """List the fields of a configuration class, with defaults, from their own descriptions."""
    if not is_config(obj):
        return
    lines.append("")
    for name, field in obj.model_fields.items():
        default = "required" if field.is_required() else f"default ``{field.default}``"
        description = (field.description or "").replace("*", r"\*")
        lines.append(f":param {name}: {description} ({default})")


def setup(app: Sphinx) -> None:
    """Connect the hooks; fields come after napoleon has turned the docstring into reStructuredText."""
    app.connect("autodoc-process-signature", drop_signature)
    app.connect("autodoc-process-docstring", document_fields, priority=900)
