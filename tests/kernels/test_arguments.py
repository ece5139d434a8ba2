"""Wrong arguments of ``attention`` are refused before any work, by name."""

import re

import pytest
import torch

from modelopt_lite import UnsupportedError
from modelopt_lite.kernels import attention
from modelopt_lite.plan import DENSE, AttentionPlan


def arguments(**changes):
    defaults = {
        "q": torch.randn(10, 4, 8),
        "k": torch.randn(10, 2, 8),
        "v": torch.randn(10, 2, 6),
        "b_start_loc": torch.tensor([0, 4]),
        "b_seq_len": torch.tensor([4, 6]),
        "max_input_len": 6,
    }
    return {**defaults, **changes}


def test_good_arguments():
    assert attention(**arguments()).shape == (10, 4, 6)
    output, lse = attention(**arguments(), return_lse=True)
    assert output.shape == (10, 4, 6)
    assert lse.shape == (10, 4)


KEYS = {"b_start_loc_k": torch.tensor([0, 4]), "b_seq_len_k": torch.tensor([4, 6]), "max_input_len_k": 6}

BAD = {
    "two dimensions": ({"q": torch.randn(10, 8)}, "q: float32 [10, 8] on cpu; must be [tokens, heads, dim]"),
    "not a tensor": ({"k": [1.0]}, "k: [1.0]; must be [tokens, heads, dim]"),
    "integers": ({"v": torch.ones(10, 2, 6, dtype=torch.int32)}, "v: int32 [10, 2, 6] on cpu; must be"),
    "two types": (
        {"k": torch.randn(10, 2, 8).half()},
        "k: float16 [10, 2, 8] on cpu; must have the type and device of q",
    ),
    "two devices": ({"k": torch.randn(10, 2, 8, device="meta")}, "k: float32 [10, 2, 8] on meta; must have"),
    "head_dim": ({"k": torch.randn(10, 2, 9)}, "k: head_dim is 9; must be that of q, 8"),
    "values": ({"v": torch.randn(10, 1, 6)}, "v: float32 [10, 1, 6] on cpu; must have the tokens and heads of k"),
    "heads": ({"q": torch.randn(10, 3, 8)}, "q: 3 query heads are not allowed; a multiple of the 2 key/value heads"),
    "no heads": ({"q": torch.randn(10, 0, 8)}, "q: float32 [10, 0, 8] on cpu; needs at least one head"),
    "rows": ({"q": torch.randn(11, 4, 8)}, "k: 10 rows, q has 11; then b_start_loc_k is needed"),
    "starts type": (
        {"b_start_loc": torch.tensor([0.0, 4.0])},
        "b_start_loc: float32 [2] on cpu; must be int32 or int64",
    ),
    "starts list": ({"b_start_loc": [0, 4]}, "b_start_loc: [0, 4]; must be int32 or int64"),
    "batch": ({"b_seq_len": torch.tensor([4])}, "b_seq_len: 1 sequences; b_start_loc has 2"),
    "longest": ({"max_input_len": 6.0}, "max_input_len: 6.0 is not allowed"),
    "too long": ({"max_input_len": 5}, "b_seq_len[1]: 6 is not allowed; 0 to max_input_len = 5"),
    "negative length": ({"b_seq_len": torch.tensor([-1, 6])}, "b_seq_len[0]: -1 is not allowed"),
    "negative start": ({"b_start_loc": torch.tensor([-1, 4])}, "b_start_loc[0]: rows -1 to 3 are not allowed"),
    "past the end": (
        {"b_start_loc": torch.tensor([0, 5])},
        "b_start_loc[1]: rows 5 to 11 are not allowed; there are 10",
    ),
    "overlap": ({"b_start_loc": torch.tensor([0, 3])}, "b_start_loc: row 3 belongs to two sequences"),
    "some of the keys": ({"b_start_loc_k": torch.tensor([0, 4])}, "b_seq_len_k, max_input_len_k: some are missing"),
    "key batch": (
        {**KEYS, "b_start_loc_k": torch.tensor([0]), "b_seq_len_k": torch.tensor([4])},
        "b_start_loc_k: 1 sequences; must be 2",
    ),
    "fewer keys": (
        {**KEYS, "b_seq_len_k": torch.tensor([3, 6])},
        "b_seq_len_k[0]: 3 is not allowed; if causal, at least the 4 queries",
    ),
    "is_causal": ({"is_causal": 1}, "is_causal: 1 is not allowed"),
    "scale": ({"softmax_scale": 0.0}, "softmax_scale: 0.0 is not allowed; a finite number > 0"),
    "scale nan": ({"softmax_scale": float("nan")}, "softmax_scale: nan is not allowed"),
    "m": ({"sparsity_m": 5}, "sparsity_m: 5 is not allowed; one of 2, 4, 8, 16"),
    "n": ({"sparsity_n": 5}, "sparsity_n: 5 is not allowed; an integer from 0 (dense) to sparsity_m = 4"),
    "n type": ({"sparsity_n": 2.0}, "sparsity_n: 2.0 is not allowed; an integer >= 0"),
    "n bool": ({"sparsity_n": True}, "sparsity_n: True is not allowed"),
    "sinks": ({"num_sink_tokens": -1}, "num_sink_tokens: -1 is not allowed"),
    "window": ({"dense_window_size": -1}, "dense_window_size: -1 is not allowed"),
    "plan type": ({"plan": "2:4"}, "plan: '2:4' is not allowed; an AttentionPlan"),
    "plan and numbers": ({"plan": DENSE, "sparsity_n": 2}, "sparsity_n: not allowed together with plan"),
    "sliding window": ({"sliding_window": 0}, "sliding_window: 0 is not allowed; an integer >= 1"),
    "first keys": ({"b_first_k": torch.tensor([0, -1])}, "b_first_k[1]: -1 is not allowed; >= 0"),
    "first queries": ({"b_first_q": torch.tensor([0])}, "b_first_q: 1 sequences; must be 2"),
    "softcap": ({"softcap": 0}, "softcap: 0 is not allowed; a finite number > 0"),
    "s_aux": ({"s_aux": torch.randn(3)}, "s_aux: float32 [3] on cpu; must be floating-point [query_heads = 4]"),
    "s_aux list": ({"s_aux": [0.0] * 4}, "s_aux: [0.0, 0.0, 0.0, 0.0]; must be floating-point"),
    "first keys list": ({"b_first_k": [0, 0]}, "b_first_k: [0, 0]; must be int32 or int64"),
    "backend": ({"backend": "cuda"}, "backend: 'cuda' is not allowed; one of ('auto', 'triton', 'torch')"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**arguments(**changes))


BAD_PLANS = {
    "group": ({"group": 3}, "plan.group: 3 is not allowed"),
    "keeps top": ({"group": 4, "keeps_top": 5}, "plan.keeps_top: 5 is not allowed; 0 to plan.group = 4"),
    "sinks": ({"num_sink_tokens": -1}, "plan.num_sink_tokens: -1 is not allowed"),
    "quick hook alone": ({"quick_hook": object()}, "plan.quick_hook: a rule that may be wrong needs the right one in"),
    "quick hook without the maximum": (
        {"quick_hook": object(), "score_hook": object(), "keep": lambda s, q, k: s == s},
        "plan.quick_hook: weights are relative to the largest score; needs plan.keeps_group_max",
    ),
    "quick hook without a number": (
        {"quick_hook": object(), "score_hook": object(), "keep": lambda s, q, k: s == s, "keeps_group_max": True},
        "plan.quick_hook: what it keeps is counted; needs plan.keeps_top",
    ),
    "hook alone": ({"score_hook": object()}, "plan.score_hook: a fused rule needs its PyTorch twin in plan.keep"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_bad_plans(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionPlan(**fields)


def test_a_backend_that_cannot_run_is_refused():
    double = {name: x.double() if name in ("q", "k", "v") else x for name, x in arguments().items()}
    with pytest.raises(UnsupportedError, match="backend: 'triton' cannot run this: q is torch.float64"):
        attention(**double, backend="triton")


def keep_near_the_row_maximum(scores, q_pos, k_pos):
    return scores > scores.amax((-1, -2), keepdim=True) - 2.0


def keep_top_groups(scores, q_pos, k_pos):
    pooled = scores.nan_to_num(neginf=-1e4).mean(-1)
    return (pooled >= pooled.topk(min(8, pooled.shape[-1]), -1).values[..., -1:])[..., None].expand(scores.shape)


def keep_above_the_mean_of_queries(scores, q_pos, k_pos):
    return scores > scores.nan_to_num(neginf=0.0).mean(-3, keepdim=True)


WRONG_RULES = {
    "row maximum": (keep_near_the_row_maximum, "keeps other keys if it sees fewer groups"),
    "top groups": (keep_top_groups, "keeps other keys if it sees fewer groups"),
    "other queries": (keep_above_the_mean_of_queries, "keeps other keys if it sees fewer queries"),
    "numbers": (lambda scores, q_pos, k_pos: scores, "must return booleans of the shape of the scores"),
    "shape": (lambda scores, q_pos, k_pos: (q_pos - k_pos) % 2 == 0, "must return booleans of the shape of the scores"),
    "nothing": (lambda scores, q_pos, k_pos: None, "returns None"),
}


@pytest.mark.parametrize(("rule", "message"), WRONG_RULES.values(), ids=WRONG_RULES.keys())
@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_rule_that_looks_beyond_its_group_is_refused(rule, message, group):
    """At every use, as the tile size would decide what it keeps."""
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=message):
            attention(**arguments(), plan=AttentionPlan(keep=rule, group=group))


def test_rules_of_one_group_are_let_through():
    for rule in (
        lambda scores, q_pos, k_pos: scores > 0,
        lambda scores, q_pos, k_pos: scores > scores.amax(-1, keepdim=True) - 0.5,
        lambda scores, q_pos, k_pos: ((q_pos - k_pos) % 3 == 0).expand(scores.shape),
    ):
        attention(**arguments(), plan=AttentionPlan(keep=rule, group=4))
