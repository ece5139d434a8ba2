"""The registry: names, duplicates, plug-ins."""

import logging
import sys
from importlib.metadata import EntryPoint
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelopt_lite import (
    ConfigError,
    SparseAttentionMethod,
    SparseSoftmax,
    SparsityConfig,
    get_sparse_method,
    list_sparse_methods,
    register_sparse_method,
    registry,
)


@pytest.fixture
def own_registry(monkeypatch):
    """Let a test register methods without leaving them behind."""
    list_sparse_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def test_builtin_methods():
    assert list_sparse_methods()["sparse_softmax"] is SparseSoftmax
    assert get_sparse_method("triton_sparse_softmax") is SparseSoftmax
    assert "triton_sparse_softmax" not in list_sparse_methods()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"'top_k' is not a registered .*; installed: sink_window, sparse_softmax"):
        get_sparse_method("top_k")


@pytest.mark.usefixtures("own_registry")
def test_a_new_method_is_one_class():
    @register_sparse_method
    class Strided(SparseAttentionMethod):
        """Keep every ``stride``-th key."""

        method: Literal["strided"] = "strided"
        stride: int = 2

        def reference(self, scores, q_pos, k_pos):
            return (k_pos % self.stride == 0).expand_as(scores)

    assert get_sparse_method("strided") is Strided
    config = SparsityConfig.load({"sparse_cfg": {"*": {"method": "strided", "stride": 3, "num_sink_tokens": 1}}})
    assert config.sparse_cfg["*"] == Strided(stride=3, num_sink_tokens=1)
    assert SparsityConfig.load(config.model_dump()) == config
    assert "Strided" in SparsityConfig.model_json_schema()["$defs"]
    plan = config.sparse_cfg["*"].plan()
    assert (plan.group, plan.num_sink_tokens, plan.dense_window_size) == (1, 1, 64)
    kept = plan.keep(torch.zeros(1, 4, 1), torch.tensor(3), torch.arange(4)[:, None])
    assert kept.flatten().tolist() == [True, False, False, True]
    with pytest.raises(ConfigError, match=r"sparse_cfg\.\*\.stride: 'x' is not allowed"):
        SparsityConfig.load({"sparse_cfg": {"*": {"method": "strided", "stride": "x"}}})


@pytest.mark.usefixtures("own_registry")
def test_duplicates_are_refused():
    class Twin(SparseAttentionMethod):
        method: Literal["twin", "sparse_softmax"] = "twin"

    with pytest.raises(ValueError, match=r"'sparse_softmax' is already registered by .*SparseSoftmax"):
        register_sparse_method(Twin)
    assert "twin" not in list_sparse_methods()


CELL = """
@register_sparse_method
class Method(SparseAttentionMethod):
    method: Literal{names} = {names}[0]
"""


def define(place, *names):
    """Run a notebook cell that defines a method."""
    scope = {
        "__name__": place,
        "Literal": Literal,
        "SparseAttentionMethod": SparseAttentionMethod,
        "register_sparse_method": register_sparse_method,
    }
    exec(CELL.format(names=list(names)), scope)
    return scope["Method"]


@pytest.mark.usefixtures("own_registry")
@given(
    st.lists(
        st.tuples(st.sampled_from(["here", "there"]), st.lists(st.sampled_from("abc"), min_size=1, unique=True)),
        max_size=6,
    )
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_class_defined_again_in_the_same_place_replaces_the_old_one(cells):
    """Under all of its names; one from another place is refused, and changes nothing."""
    registry._methods.clear()
    wanted = {}
    for place, names in cells:
        owners = {wanted[name].__module__ for name in names if name in wanted}
        if owners - {place}:
            with pytest.raises(ValueError, match="is already registered by"):
                define(place, *names)
        else:
            old = {wanted[name] for name in names if name in wanted}
            made = define(place, *names)
            wanted = {name: cls for name, cls in wanted.items() if cls not in old} | dict.fromkeys(names, made)
        assert registry._methods == wanted


def test_a_method_needs_a_literal_name():
    class Nameless(SparseAttentionMethod):
        pass

    with pytest.raises(TypeError, match=r"Nameless.method must be annotated as Literal"):
        register_sparse_method(Nameless)


def test_a_method_without_a_rule_says_so():
    class Empty(SparseAttentionMethod):
        method: Literal["empty"] = "empty"

    with pytest.raises(NotImplementedError, match=r"Empty"):
        Empty().plan().keep(torch.zeros(1, 1, 1), torch.tensor(0), torch.tensor([[0]]))


GOOD_PLUGIN = """
from typing import Literal
from modelopt_lite import SparseAttentionMethod, register_sparse_method

@register_sparse_method
class FromPlugin(SparseAttentionMethod):
    method: Literal["from_plugin"] = "from_plugin"
"""


@pytest.mark.usefixtures("own_registry")
def test_plugins_are_found_and_a_broken_one_is_reported(tmp_path, monkeypatch, caplog):
    (tmp_path / "good_plugin.py").write_text(GOOD_PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("import does_not_exist_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("broken", "broken_plugin", registry.ENTRY_POINT_GROUP),
        EntryPoint("good", "good_plugin", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    registry._load_installed_methods.cache_clear()
    with caplog.at_level(logging.WARNING):
        methods = list_sparse_methods()
    assert "from_plugin" in methods
    assert "sparse_softmax" in methods
    (record,) = caplog.records
    assert "'broken' (broken_plugin)" in record.getMessage()
    assert "does_not_exist_anywhere" in record.getMessage()
    sys.modules.pop("good_plugin")
