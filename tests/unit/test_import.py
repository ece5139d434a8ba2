"""Importing the package is cheap, and everything public is there."""

import subprocess
import sys

import modelopt_lite


def test_import_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import modelopt_lite; new = set(sys.modules) - before; "
        "heavy = {'transformers', 'triton', 'matplotlib', 'pydantic', 'rich', 'typer', 'yaml'}; "
        "loaded = heavy & {name.split('.')[0] for name in new}; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    for name in modelopt_lite.__all__:
        assert getattr(modelopt_lite, name) is not None
    assert set(modelopt_lite.__all__) == set(dir(modelopt_lite))


def test_importing_modules_does_not_hide_functions():
    """A submodule becomes an attribute of its package when imported, so none may have a public function's name."""
    code = (
        "import pkgutil, modelopt_lite; "
        "modules = {m.name for m in pkgutil.iter_modules(modelopt_lite.__path__)}; "
        "assert not modules & set(modelopt_lite.__all__), modules & set(modelopt_lite.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
