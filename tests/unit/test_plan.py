"""Plans: one object for equal configurations, and names that mean the same in every process or are refused."""

import copy
import pickle  # noqa: TID251 # users do
import re
from typing import Literal

import pytest

import modelopt_lite as mtsa
from modelopt_lite import UnsupportedError, registry
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow, SparseSoftmax
from modelopt_lite.plan import DENSE, AttentionPlan, plan_by_name


@pytest.fixture
def registered(monkeypatch):
    """Register methods for one test."""
    mtsa.list_sparse_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def every_fourth():
    """Define a method, again at every call, as a notebook's cell does."""

    class EveryFourth(mtsa.SparseAttentionMethod):
        """Keep what lies a multiple of four behind."""

        method: Literal["every_fourth"] = "every_fourth"

        def reference(self, scores, q_pos, k_pos):
            return ((q_pos - k_pos) % 4 == 0).expand(scores.shape)

    return EveryFourth


def by_hand():
    return AttentionPlan(keep=lambda scores, q_pos, k_pos: scores > 0)


@pytest.mark.parametrize("cls", [SparseSoftmax, SinkWindow])
def test_equal_configurations_share_one_plan(cls):
    plan = cls(num_sink_tokens=3).shared_plan()
    for same in (cls(num_sink_tokens=3), cls(num_sink_tokens=3, backend="torch"), cls(num_sink_tokens=3, enable=False)):
        assert same.shared_plan() is plan
    assert cls(num_sink_tokens=4).shared_plan() is not plan
    assert plan_by_name(plan.name) is plan


def test_aliases_and_defaults_are_one_configuration():
    plan = SparseSoftmax().shared_plan()
    assert SparseSoftmax(method="triton_sparse_softmax", sparsity_m=4).shared_plan() is plan
    assert top_n_plan(2, 4, 0, 64) is plan


def test_keeping_all_is_the_dense_plan():
    assert SparseSoftmax(sparsity_n=4).shared_plan() is top_n_plan(0, 4, 0, 64) is DENSE
    assert DENSE.name == "dense"


@pytest.mark.parametrize(
    "plan", [SparseSoftmax().shared_plan(), SinkWindow().shared_plan(), DENSE], ids=["2:4", "sink_window", "dense"]
)
def test_copies_are_the_plan_itself(plan):
    assert copy.copy(plan) is plan
    assert copy.deepcopy([plan])[0] is plan
    assert pickle.loads(pickle.dumps(plan)) is plan  # noqa: S301


def test_a_plan_made_by_hand_stays_in_its_process():
    plan = by_hand()
    assert plan.is_by_hand
    assert plan_by_name(plan.name) is plan
    assert copy.copy(plan) is copy.deepcopy(plan) is plan
    with pytest.raises(UnsupportedError, match="made by hand cannot be pickled, .* registered method"):
        pickle.dumps(plan)


def test_a_plan_made_by_hand_is_not_kept():
    name = by_hand().name
    with pytest.raises(
        UnsupportedError, match=r"made by hand, in another process or no longer there.* registered method"
    ):
        plan_by_name(name)


UNKNOWN = {
    "another process": ("by hand 0123456789abcdef 7", "an AttentionPlan that was made by hand, in another process"),
    "no such method": ('{"method":"nowhere"}', "'nowhere' is not a registered sparse method; installed: combined"),
    "no such field": ('{"method":"sparse_softmax","width":3}', "width"),
    "a bad value": ('{"method":"sparse_softmax","sparsity_m":5}', "sparsity_m"),
    "no method": ("{}", "which this process cannot make"),
    "no configuration": ("17", "which this process cannot make"),
    "defined again": ('{"method":"sparse_softmax"} 2', "had been defined again in the process that made the program"),
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_names_are_refused(name, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        plan_by_name(name)


@pytest.mark.usefixtures("registered")
def test_a_method_of_ones_own_has_a_name_for_other_processes():
    method = mtsa.register_sparse_method(every_fourth())(dense_window_size=5)
    plan = method.shared_plan()
    assert not plan.is_by_hand
    assert plan.name == '{"dense_window_size":5,"method":"every_fourth","num_sink_tokens":0}'


@pytest.mark.usefixtures("registered")
def test_a_class_that_is_defined_again_has_its_own_plan():
    classes = [every_fourth() for _ in range(3)]
    plans = [cls(dense_window_size=6).shared_plan() for cls in classes]
    assert len({plan.name for plan in plans}) == 3
    for cls, plan in zip(classes, plans, strict=True):
        assert plan.made_by is cls
        assert cls(dense_window_size=6).shared_plan() is plan
        assert plan_by_name(plan.name) is plan
