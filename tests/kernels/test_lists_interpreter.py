"""The portable kernels with lists of key blocks against the oracle, run by Triton's interpreter; tiles are small."""

import dataclasses
import math
import os

import pytest
import torch
from block_cases import shape_of_lists, with_lists
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backward_interpreter import DESCRIPTORS, POINTERS
from test_backward_interpreter import check as check_gradients
from test_forward_interpreter import FROZEN, ORDINARY, check, n_of_m, sequences

from modelopt_lite.kernels import KeyBlocks, attention
from modelopt_lite.kernels.portable.launch import KEY_SETTINGS, QUERY_SETTINGS, SETTINGS, fitted
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, AttentionPlan, SkipRule

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    # Rows that keep nothing divide by zero on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

EXEMPT = dataclasses.replace(DENSE, num_sink_tokens=3, dense_window_size=5)
LENGTHS = [(1, 1), (37, 37), (0, 5), (20, 53)]
PLANS = {
    "dense": DENSE,
    "exempt": EXEMPT,
    "2:4": n_of_m(2, 4),
    "2:4 exempt": n_of_m(2, 4, 3, 5),
    "nothing": SinkWindow(num_sink_tokens=17, dense_window_size=3).plan(),
    "sparse decode": dataclasses.replace(n_of_m(1, 4, 1, 3), sparse_decode=True),
}


def listed(request, block_size=16, block_rows=16, share=0.4, per_kv_head=False):
    """Return a request with random lists that hold about a share of all key blocks, seen or not."""
    heads = request.k.shape[1] if per_kv_head else request.q.shape[1]
    generator = torch.Generator().manual_seed(1)
    masks = [
        torch.rand(heads, *shape, generator=generator) < share
        for shape in shape_of_lists(request, block_size, block_rows)
    ]
    return request._replace(blocks=KeyBlocks.from_masks(masks, block_size, block_rows))


@st.composite
def plans(draw):
    """Draw a plan with N:M or without a rule, with sinks and dense window."""
    sinks, window = draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 3, 16, 40]))
    plan = draw(st.sampled_from([DENSE, n_of_m(2, 4), n_of_m(2, 8)]))
    return dataclasses.replace(
        plan, num_sink_tokens=sinks, dense_window_size=window, sparse_decode=draw(st.booleans())
    )  # fmt: skip


@given(plans().flatmap(lambda plan: with_lists(longest=60, batch=2, plan=plan)), st.sampled_from([ORDINARY, FROZEN]))
@settings(max_examples=20, deadline=None)
def test_forward_equals_oracle(request, kernel_settings):
    check(request, kernel_settings)


@given(
    plans().flatmap(lambda plan: with_lists(longest=50, batch=2, plan=plan)),
    st.sampled_from([POINTERS, DESCRIPTORS]),
)
@settings(max_examples=12, deadline=None)
def test_gradients_equal_the_oracles(request, kernel_settings):
    check_gradients(request, kernel_settings)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("plan", PLANS)
def test_forward(plan, share):
    check(listed(sequences(LENGTHS, plan=PLANS[plan]), share=share), FROZEN)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("plan", ["dense", "2:4 exempt", "nothing"])
def test_gradients(plan, share):
    check_gradients(listed(sequences(LENGTHS, plan=PLANS[plan]), share=share), POINTERS)


@pytest.mark.parametrize("grid", [(32, 32), (16, 64), (48, 48)])
def test_grids(grid):
    """Tiles are smaller than blocks, or become so."""
    request = listed(sequences([(40, 75), (33, 33)], (4, 2), plan=EXEMPT), *grid, 0.5, per_kv_head=True)
    rows = torch.randperm(len(request.q), generator=torch.Generator().manual_seed(0))
    for each in (request, request._replace(output_rows=rows)):
        check(each, FROZEN._replace(block_m=32, block_n=32))
    check_gradients(request, DESCRIPTORS)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False},
        {"sliding_window": 19},
        {"softcap": 2.0, "s_aux": torch.tensor([0.5, -1.0])},
        {"first_q": torch.tensor([40, 3]), "first_k": torch.tensor([5, 19])},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("plan", ["dense", "2:4 exempt"])
def test_options(plan, options):
    request = listed(sequences([(33, 41), (20, 53)], plan=PLANS[plan], **options))
    check(request, ORDINARY)
    check_gradients(request, POINTERS)


def test_one_block():
    """Every query block looks at its second key block alone, so that all before it keep nothing."""
    request = sequences([(70, 70)])
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[:, :, 1] = True
    request = request._replace(blocks=KeyBlocks.from_masks([mask], 16, 16))
    check(request, ORDINARY)
    check_gradients(request, POINTERS)


def test_methods_reach_the_kernels():
    """A plan that chooses blocks runs on GPU kernels, which are given its lists."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, 2, 16, generator=generator) for _ in range(3))
    packing = (torch.tensor([0]), torch.tensor([48]), 48)
    plan = AttentionPlan(skip=SkipRule(0.5, block_size=16, block_rows=16))
    ours, theirs = (attention(q, k, v, *packing, plan=plan, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("table", [SETTINGS, QUERY_SETTINGS, KEY_SETTINGS], ids=["forward", "queries", "keys"])
@pytest.mark.parametrize(("size", "rows"), [(16, 16), (48, 48), (64, 128), (128, 128), (128, 384)])
def test_tiles_divide_blocks(table, size, rows):
    none = torch.empty(0, dtype=torch.int32)
    for row in table:
        found = fitted(row.settings, KeyBlocks(none, none, none, size, rows))
        assert size % found.block_n == rows % found.block_m == 0
        assert found.block_n >= 16
        assert math.log2(found.block_m).is_integer()
