"""``check_method``: built-in methods pass, and methods that are wrong in one way fail with a sentence about it."""

import dataclasses
import importlib
import itertools
import math
import os
import re
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import ConfigDict, Field, field_validator

from modelopt_lite import list_sparse_methods, register_sparse_method, registry
from modelopt_lite.kernels.language import jit, tl
from modelopt_lite.methods import (
    BlockMethod,
    Combined,
    FlashPrefill,
    SinkWindow,
    SkipSoftmax,
    SparseSoftmax,
    XAttention,
)
from modelopt_lite.methods.base import SparseAttentionMethod
from modelopt_lite.plan import AttentionPlan, SkipRule
from modelopt_lite.testing import check_method

BUILT_IN = [cls for cls in list_sparse_methods().values() if cls is not Combined]
SETTINGS = [
    FlashPrefill(alpha=0.6, first_blocks=0, recent_blocks=0, per_kv_head=True),
    XAttention(stride=16, threshold=0.6, block_size=64, num_sink_tokens=4, dense_window_size=16),
    SkipSoftmax(threshold=0.3, block_size=32, block_rows=64),
    SinkWindow(num_sink_tokens=0, dense_window_size=7),
    Combined(methods=(FlashPrefill(), SkipSoftmax(threshold=0.1))),
    Combined(methods=(FlashPrefill(alpha=0.9), SparseSoftmax(sparsity_n=1), SkipSoftmax())),
]


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.mark.parametrize("method", [*BUILT_IN, *SETTINGS], ids=lambda method: getattr(method, "__name__", None))
def test_built_in_methods(method):
    report = check_method(method, other_process=False)
    assert report.checked[-1] == "statistics"
    assert "what the rule decides" not in report.not_run


def test_another_process():
    report = check_method(SkipSoftmax)
    assert report.checked[-1] == "another process"
    assert "another process" not in report.not_run
    assert str(report).startswith("SkipSoftmax(method='skip_softmax', ")


def test_what_is_no_method():
    for wrong in (SkipSoftmax.plan, dict, 3):
        with pytest.raises(
            TypeError, match="is not a method; give a subclass of SparseAttentionMethod, or an instance"
        ):
            check_method(wrong)
    with pytest.raises(
        TypeError, match="Combined cannot be made from its defaults alone .* give check_method an instance"
    ):
        check_method(Combined)


class Rule(SparseAttentionMethod):
    """A method that is right: those keys of a group that score within ``margin`` of its largest."""

    group_size: ClassVar[int] = 4
    method: Literal["rule"] = "rule"
    margin: float = Field(default=1.0, ge=0)

    def reference(self, scores, q_pos, k_pos):
        return scores >= scores.amax(-1, keepdim=True) - self.margin


@jit
def rule_hook(scores, q_pos, k_pos, args):
    a, b, c, d = scores
    least = tl.maximum(tl.maximum(a, b), tl.maximum(c, d)) - args[0]
    return a >= least, b >= least, c >= least, d >= least


@jit
def one_tile_hook(scores, q_pos, k_pos, args):
    return (scores[0] >= args[0],)


@jit
def first_keys_hook(scores, q_pos, k_pos, args):
    a, b, c, d = scores
    least = tl.maximum(a, b) - args[0]
    return a >= least, b >= least, c >= least, d >= least


class WithPlan(Rule):
    """A rule whose plan has other fields."""

    changes: ClassVar[dict] = {}

    def plan(self):
        return dataclasses.replace(super().plan(), **self.changes)


class Right(WithPlan):
    method: Literal["right"] = "right"
    changes: ClassVar[dict] = {"score_hook": rule_hook, "hook_args": (1.0,), "keeps_group_max": True}


@pytest.mark.usefixtures("own_registry")
def test_a_method_with_a_hook():
    report = check_method(register_sparse_method(Right), other_process=False)
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert not [name for name in report.not_run if "kernel" in name]


def rule(reference, **fields):
    """Make a class with another rule."""
    return type("Broken", (Rule,), {"reference": reference, "__annotations__": {}, "__module__": __name__, **fields})


def planned(**changes):
    return type("Broken", (WithPlan,), {"changes": changes, "__annotations__": {"changes": ClassVar[dict]}})


def in_place(self, scores, q_pos, k_pos):
    scores -= scores.amax(-1, keepdim=True)
    return scores >= -self.margin


def fails(self, scores, q_pos, k_pos):
    raise IndexError("there is no such key")


RULES = {
    "returns nothing": (lambda self, s, q, k: None, "rule", "returns None; it must return a tensor; is there a return"),
    "returns scores": (lambda self, s, q, k: s, "rule", "returns float32 [5, 9, 4] on cpu; it must return booleans"),
    "wrong shape": (
        lambda self, s, q, k: (q - k) % 3 == 0,
        "rule",
        "returns bool [5, 9, 4] on cpu; it must return the shape [2, 5, 9, 4], the shape of the scores; .expand()",
    ),
    "in place": (in_place, "rule", "changes the scores that it is given; it must work on a copy"),
    "raises": (fails, "rule", "raises IndexError: there is no such key"),
    "another device": (
        lambda self, s, q, k: torch.zeros(s.shape, dtype=torch.bool),
        "rule",
        "returns a tensor on cpu for scores on another device; use device=scores.device",
    ),
    "constant of the CPU": (
        lambda self, s, q, k: s > torch.zeros(s.shape[-1]),
        "rule",
        "fails on tensors of a device without values",
    ),
    "reads a value": (
        lambda self, s, q, k: s > float(q.sum()),
        "rule",
        "make tensors with device=scores.device, and read no value back, because that waits for the GPU",
    ),
    "maximum of the row": (
        lambda self, s, q, k: s >= s.amax((-1, -2), keepdim=True) - 1,
        "rule",
        "keeps other keys if it sees fewer groups at a time, so that the tile size would decide",
    ),
    "other queries": (
        lambda self, s, q, k: s >= s.nan_to_num(neginf=0.0).mean(-3, keepdim=True),
        "rule",
        "keeps other keys if it sees fewer queries at a time",
    ),
    "other heads": (
        lambda self, s, q, k: s >= s.flatten(0, -4).nan_to_num(neginf=0.0).mean(0) if s.dim() > 3 else s > 0,
        "rule",
        "keeps other keys if it sees fewer heads at a time",
    ),
    "random": (
        lambda self, s, q, k: torch.rand_like(s) < 0.5,
        "rule",
        "keeps other keys when it is called again with the same scores",
    ),
}
PLANS = {
    "hook of other numbers": (
        planned(score_hook=rule_hook, hook_args=(2.0,)),
        "output of every kernel",
        "the hook decides otherwise where the reference drops key",
    ),
    "hook of other keys": (
        planned(score_hook=first_keys_hook, hook_args=(1.0,)),
        "output of every kernel",
        "the portable kernel with tiles of 32 x 32, float32, 0 sinks and a dense window of 0: the output differs from",
    ),
    "hook without all tiles": (
        planned(score_hook=one_tile_hook, hook_args=(1.0,)),
        "output of every kernel",
        "Error: ",
    ),
    "plain hook": (planned(score_hook=rule_hook.fn), "plan", "score_hook is a plain function; write @jit of"),
    "largest": (
        type("Broken", (planned(keeps_group_max=True),), {"reference": lambda self, s, q, k: s < 0}),
        "promises of the plan",
        "promises keeps_group_max, and <lambda>() drops the largest",
    ),
    "scale": (planned(scale_free=True), "promises of the plan", "keeps other keys if all scores are times 0.25"),
    "nothing": (planned(keeps_nothing=True), "promises of the plan", "promises keeps_nothing, and"),
    "top": (planned(keeps_top=2), "promises of the plan", "promises keeps_top = 2, and"),
    "window": (planned(dense_window_size=3), "plan", "has dense_window_size = 3, and the configuration 64; hand it on"),
}


class NoPlan(Rule):
    def plan(self):
        return None


class BadThreshold(SkipSoftmax):
    method: Literal["bad_threshold"] = "bad_threshold"

    def plan(self):
        return AttentionPlan(skip=SkipRule(-self.threshold))


class SinksOfAnother(SkipSoftmax):
    method: Literal["sinks_of_another"] = "sinks_of_another"

    def plan(self):
        return AttentionPlan(skip=SkipRule(self.threshold, self.block_size, self.block_rows))


class Doubled(Rule):
    method: Literal["doubled"] = "doubled"

    @field_validator("margin")
    @classmethod
    def _twice(cls, margin):
        return 2 * margin


class Infinite(Rule):
    method: Literal["infinite"] = "infinite"
    margin: float = math.inf


class Mutable(Rule):
    model_config = ConfigDict(frozen=False)
    method: Literal["mutable"] = "mutable"


class Numbered(Rule):
    method: Literal["numbered"] = "numbered"
    numbers: ClassVar = itertools.count()

    def identity(self):
        return {**super().identity(), "number": next(self.numbers)}


CLASSES = {
    "no plan": (NoPlan, "plan", "NoPlan.plan() returns None; it must return an AttentionPlan"),
    "threshold": (BadThreshold, "plan", "raises ValueError: skip.threshold: -0.03 is not allowed"),
    "sinks": (SinksOfAnother, "plan", "has num_sink_tokens = 0, and the configuration 4; hand it on with"),
    "doubled": (Doubled, "configuration", "written to JSON and loaded again, it is another configuration: Doubled("),
    "infinite": (Infinite, "configuration", "cannot be written as JSON: Out of range float values"),
    "mutable": (Mutable, "configuration", "model_config has frozen=False; leave it at True"),
    "numbered": (Numbered, "plan", "an equal configuration has a plan of another name; identity() must depend on the"),
}


class Selector(BlockMethod):
    """A selector that is right: blocks whose mean key scores within ``margin`` of the best one."""

    method: Literal["selector"] = "selector"
    margin: float = Field(default=2.0, ge=0)

    def reference_scores(self, view):
        in_block, of_block = view.keys_in(self.block_size), view.queries_in(self.block_rows)
        means = torch.einsum("bk,khd->bhd", in_block / in_block.sum(-1, keepdim=True), view.k)
        return (of_block / of_block.sum(-1, keepdim=True)) @ view.scores(view.q, means)

    def scores(self, grid):
        number = (grid.high_q - grid.low_q + 1).clamp(min=1)
        (part,) = grid.parts(1)
        means = part.scores(part.queries(), part.of_keys(grid.mean_keys())).sum(-2)
        return (means / number[:, None, None, None]).flatten(1, 2).transpose(0, 1)

    def choose(self, scores, seen, forced):
        return scores >= scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True) - self.margin


def selector(**functions):
    return type("Broken", (Selector,), functions)


def of_all_keys(self, view):
    scores = Selector.reference_scores(self, view)
    return scores + 8 * torch.cos(torch.arange(scores.shape[-1]) * len(view.k))


def of_all_heads(self, view):
    return Selector.reference_scores(self, view).mean(0, keepdim=True).expand(view.q.shape[1], -1, -1)


def with_keys_of_other_heads(self, view):
    k = view.k.roll(1, 1) if view.k.shape[1] < view.q.shape[1] and view.k.shape[1] > 1 else view.k
    return Selector.reference_scores(self, view._replace(k=k))


def without_softcap(self, grid):
    (part,) = grid.parts(1)
    k = part.of_keys(grid.mean_keys()).permute(0, 2, 3, 1)[:, :, None]
    number = (grid.high_q - grid.low_q + 1).clamp(min=1)
    means = (grid.request.softmax_scale * part.queries() @ k).sum(-2) / number[:, None, None, None]
    return means.flatten(1, 2).transpose(0, 1)


def of_the_first_sequence(self, grid):
    (part,) = grid.parts(1)
    return part.scores(part.queries(), grid.mean_keys()[:1]).mean(-2).flatten(1, 2).transpose(0, 1)


def waits(self, grid):
    longest = int(grid.request.lengths_q.max())
    return Selector.scores(self, grid) + 0.0 * longest


SELECTORS = {
    "wrong shape": (
        selector(reference_scores=lambda self, view: Selector.reference_scores(self, view)[0]),
        "choice of blocks",
        "returns float64 [5, 9] on cpu; it must return the shape [4, 5, 9], [query_heads, query_blocks",
    ),
    "integers": (
        selector(reference_scores=lambda self, view: Selector.reference_scores(self, view).long()),
        "choice of blocks",
        "it must return floating-point numbers",
    ),
    "NaN": (
        selector(reference_scores=lambda self, view: Selector.reference_scores(self, view).sqrt()),
        "choice of blocks",
        "every block of which a query sees a key needs a number",
    ),
    "all keys": (
        selector(reference_scores=of_all_keys),
        "choice of blocks",
        "keeps other blocks if the prefill comes in chunks",
    ),
    "all heads": (selector(reference_scores=of_all_heads), "choice of blocks", "looks at other heads"),
    "keys of other heads": (
        selector(reference_scores=with_keys_of_other_heads),
        "choice of blocks",
        "is wrong about query heads that share keys",
    ),
    "chooses numbers": (
        selector(choose=lambda self, scores, seen, forced: scores),
        "choice of blocks",
        "it must return booleans, such as a comparison gives",
    ),
    "best of all rows": (
        selector(choose=lambda self, s, seen, forced: s >= s.masked_fill(~seen, -99).amax((-1, -2), keepdim=True) - 2),
        "choice of blocks",
        "keeps other blocks if it sees fewer query blocks at a time",
    ),
    "best of all heads": (
        selector(choose=lambda self, s, seen, forced: s >= s.masked_fill(~seen, -99).amax((0, -1), keepdim=True) - 2),
        "choice of blocks",
        "keeps other blocks if it sees fewer heads at a time",
    ),
    "blocks not seen": (
        selector(choose=lambda self, s, seen, forced: s >= s.amax(-1, keepdim=True) - 2),
        "choice of blocks",
        "keeps other blocks if blocks that no query sees have other scores, which may be anything",
    ),
    "share of all blocks": (
        selector(choose=lambda self, s, seen, f: s.masked_fill(~seen, -99).argsort(-1).argsort(-1) > s.shape[-1] * 0.7),
        "choice of blocks",
        "keeps other blocks if there are more key blocks that no query sees, as in a batch",
    ),
    "no softcap": (
        selector(scores=without_softcap),
        "fast choice of blocks",
        "leads to other blocks than the reference, with softcap and sliding window: by the reference sequence",
    ),
    "one sequence": (
        selector(scores=of_the_first_sequence),
        "fast choice of blocks",
        "leads to other blocks than the reference, for a batch of sequences of different lengths with padding",
    ),
    "waits": (selector(scores=waits), "fast choice of blocks", "read no value back, because that waits for the GPU"),
    "raises": (
        selector(scores=lambda self, grid: grid.no_such_thing),
        "fast choice of blocks",
        "raises AttributeError",
    ),
}
BROKEN = {
    **{f"rule, {name}": (rule(function), *rest) for name, (function, *rest) in RULES.items()},
    **PLANS,
    **CLASSES,
    **{f"selector, {name}": case for name, case in SELECTORS.items()},
}


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("cls", "part", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_methods(cls, part, sentence):
    """Each fails in the part that it breaks, in words that say how."""
    if part == "output of every kernel" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    with pytest.raises(AssertionError, match=re.escape(sentence)) as caught:
        check_method(register_sparse_method(cls), other_process=False)
    assert f" breaks the contract, {part}:\n- " in str(caught.value)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("cls", [Rule, Selector])
def test_what_they_are_made_from_is_right(cls):
    check_method(register_sparse_method(cls), other_process=False)


OF_ONE_PROCESS = """
import os
from typing import Literal
from modelopt_lite import SparseAttentionMethod, register_sparse_method

@register_sparse_method
class OfOneProcess(SparseAttentionMethod):
    method: Literal["of_one_process"] = "of_one_process"

    def reference(self, scores, q_pos, k_pos):
        return scores > (0.0 if os.getpid() == int(os.environ["THE_PROCESS"]) else 1.0)
"""


@pytest.mark.usefixtures("own_registry")
def test_a_plan_that_depends_on_more_than_its_settings(tmp_path, monkeypatch):
    (tmp_path / "of_one_process.py").write_text(OF_ONE_PROCESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("THE_PROCESS", str(os.getpid()))
    module = importlib.import_module("of_one_process")
    with pytest.raises(AssertionError, match="the plan .* keeps other keys in another process; it must depend on the"):
        check_method(module.OfOneProcess)


@pytest.mark.usefixtures("own_registry")
def test_a_method_that_is_not_registered():
    message = "'rule' is not a registered sparse method; .*; write @register_sparse_method before the class"
    with pytest.raises(AssertionError, match=message):
        check_method(Rule)


@pytest.mark.usefixtures("own_registry")
def test_a_method_that_decides_nothing():
    report = check_method(register_sparse_method(rule(lambda self, s, q, k: torch.ones_like(s, dtype=torch.bool))))
    assert report.not_run["what the rule decides"].startswith("it drops no score of the random inputs")
