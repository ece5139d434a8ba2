"""The methods of ``examples/own_method.py`` meet the contract."""

import importlib.util
import sys
from pathlib import Path

import pytest

from modelopt_lite import list_sparse_methods, registry
from modelopt_lite.testing import check_method


@pytest.fixture(scope="module")
def own_method():
    """The example as a module, whose methods are registered as long as this file's tests run."""
    list_sparse_methods()
    path = Path(__file__).parents[2] / "examples" / "own_method.py"
    spec = importlib.util.spec_from_file_location("own_method", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_methods", dict(registry._methods))
        patch.setitem(sys.modules, spec.name, module)  # where pydantic looks up types
        spec.loader.exec_module(module)
        yield module


def test_rule(own_method):
    check_method(own_method.Strided(stride=5))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_hook(own_method, margin):
    check_method(own_method.Threshold(margin=margin, num_sink_tokens=2), other_process=False)
