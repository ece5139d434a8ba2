"""Blocks of keys, point by point of ``docs/semantics.md``: brute force = oracle = torch backend."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from block_cases import GRIDS, assert_same_counts, counts_by_oracle, kept_by_brute_force, plans, requests, with_lists
from cases import one_sequence
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelopt_lite.kernels import KeyBlocks, attention, blocked, choice, compute, count_kept, request_statistics
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.reference import attention_reference, kept_scores, listed_blocks
from modelopt_lite.kernels.selection import select_blocks
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE, AttentionPlan, BlockSelector, SkipRule

# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most 90 keys.
FP32 = {"rtol": 1e-5, "atol": 1e-5}

many_cases = settings(max_examples=30, deadline=None)
few_cases = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def tiles_smaller_than_sequences():
    """Let short sequences cross the borders of tiles and of parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "QUERY_BLOCK", 16)
        patch.setattr(blocked, "TILE_SCORES", 1024)
        yield


def sums(view):
    """Score a block by the sum of all its scores with the queries, exact in every precision."""
    size, rows = view.request.grid
    scores = view.scores(view.q, view.k).masked_fill(~view.visible, 0.0)
    return view.queries_in(rows) @ scores @ view.keys_in(size).T


def at_least_the_mean(scores, seen, forced):
    """Keep blocks with at least the mean score of those that are seen."""
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return scores >= mean


@st.composite
def selectors(draw):
    size, rows = draw(st.sampled_from(GRIDS))
    numbers = {name: draw(st.integers(0, 2)) for name in ("first_blocks", "recent_blocks")}
    return BlockSelector(sums, at_least_the_mean, None, size, rows, per_kv_head=draw(st.booleans()), **numbers)


@st.composite
def skipping(draw, selector=None):
    """A plan with a skip rule, whose threshold no exact score meets."""
    grid = draw(st.sampled_from(GRIDS)) if selector is None else (selector.block_size, selector.block_rows)
    thresholds = st.sampled_from([0.01, 0.2, 0.7, 0.95])
    rule = SkipRule(draw(thresholds), *grid, draw(st.none() | thresholds))
    return draw(plans(skip=rule, blocks=selector))


def kept_by_oracle(request):
    """Yield each sequence's kept keys, ``[query_heads, len_q, len_k]``."""
    for number, sequence in enumerate(request.sequences()):
        q, k = request.q[sequence.queries].double(), request.k[sequence.keys].double()
        listed = listed_blocks(request, number)
        scores = kept_scores(q, k, request, sequence.first_q, sequence.first_k, listed)
        yield scores > -torch.inf


def check_oracle(request, listed_of):
    """Hold the oracle against the brute force; ``listed_of(number)`` are a sequence's lists for every query head."""
    for number, (sequence, kept) in enumerate(zip(request.sequences(), kept_by_oracle(request), strict=True)):
        listed = listed_of(number)
        for head in range(request.q.shape[1]):
            mine = None if listed is None else listed[head * len(listed) // request.q.shape[1]]
            expected = kept_by_brute_force(request, number, mine, request.grid, head)
            found = [(row.nonzero().flatten() + sequence.first_k).tolist() for row in kept[head]]
            assert found == expected


def check_backend(request):
    """Hold the torch backend's output, gradients and statistics against the oracle."""
    inputs = [request.q, request.k, request.v, *([] if request.s_aux is None else [request.s_aux])]
    inputs = [x.requires_grad_() for x in inputs]
    output, lse = compute(request, "torch")
    with torch.no_grad():
        alone, lse_alone = compute(request, "torch")
    expected, expected_lse = attention_reference(request)
    torch.testing.assert_close(output, expected.float(), **FP32)
    torch.testing.assert_close(lse, expected_lse.float(), **FP32)
    assert torch.equal(alone, output)
    assert torch.equal(lse_alone, lse)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    direction = direction.masked_fill((expected_lse == -torch.inf)[..., None], torch.nan)
    found = torch.autograd.grad(output, inputs, direction)
    wanted = torch.autograd.grad(expected, inputs, direction.double())
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    check_statistics(request)


def check_statistics(request):
    request = request._replace(v=request.k, s_aux=None)
    expected = counts_by_oracle(request)
    assert_same_counts(count_kept(request), expected)
    found = request_statistics(request)
    assert torch.equal(torch.stack(found[:3]), expected[:, :3].sum(0).long())
    assert torch.equal(found.kept_by_head, expected[:, 2].long())


@given(with_lists(longest=40, batch=2))
@many_cases
def test_oracle_with_lists(request):
    check_oracle(request, lambda number: listed_blocks(request, number))


@given(with_lists())
@many_cases
def test_torch_backend_with_lists(request):
    check_backend(request)


@given(skipping().flatmap(lambda plan: requests(longest=40, batch=2, plan=plan)))
@many_cases
def test_oracle_skips(request):
    check_oracle(request, lambda number: None)


@given(skipping().flatmap(lambda plan: requests(plan=plan)))
@many_cases
def test_torch_backend_skips(request):
    check_backend(request)


@given(selectors().flatmap(lambda selector: plans(blocks=selector)).flatmap(lambda plan: requests(plan=plan)))
@many_cases
def test_torch_backend_with_a_selector(request):
    check_backend(request)
    check_counts(request)


@given(selectors().flatmap(skipping).flatmap(lambda plan: requests(plan=plan)))
@many_cases
def test_torch_backend_with_selector_and_skip_rule(request):
    check_backend(request)
    check_counts(request)


def check_counts(request):
    """Count blocks from the lists, and what a selector alone would list."""
    found = request_statistics(request._replace(v=request.k, s_aux=None))
    heads = request.q.shape[1]
    blocks = select_blocks(request)
    without_skip = select_blocks(request._replace(plan=dataclasses.replace(request.plan, skip=None)))
    visited, selected = (x.counts.sum() * (heads // len(x.counts)) for x in (blocks, without_skip))
    assert found.blocks_visited == visited
    assert found.blocks_skipped == selected - visited
    assert found.blocks >= selected
    assert found.blocks == heads * BlockGrid(request, *request.grid).seen().sum()
    by_head = blocks.counts.sum(1).repeat_interleave(heads // len(blocks.counts))
    assert torch.equal(found.blocks_visited_by_head, by_head)
    for name in ("kept", "mass", "blocks_visited", "blocks_skipped"):
        torch.testing.assert_close(getattr(found, f"{name}_by_head").sum(), getattr(found, name))
    expected = torch.zeros(heads, dtype=torch.int64)
    for number, x in enumerate(request.sequences()):
        listed = listed_blocks(request._replace(blocks=blocks), number)
        q, k = request.q[x.queries].double(), request.k[x.keys].double()
        expected += (kept_scores(q, k, request, x.first_q, x.first_k, listed) > -torch.inf).sum((1, 2))
    assert torch.equal(found.kept_by_head, expected)


@given(selectors().flatmap(lambda selector: plans(blocks=selector)).flatmap(lambda plan: requests(plan=plan)))
@many_cases
def test_forced_blocks_and_decode(request):
    """What is forced is listed wherever a query sees any of it, and nothing that no query sees."""
    selector, blocks = request.plan.blocks, select_blocks(request)
    size, rows = request.grid
    for number, (queries, keys, first_q, first_k) in enumerate(request.sequences()):
        listed = blocks.mask()[:, int(blocks.starts[number]) :]
        len_q = queries.stop - queries.start
        seen = {}
        for i in range(len_q):
            for j in range(first_k, first_k + keys.stop - keys.start):
                p = first_q + i
                near = request.sliding_window is None or abs(p - j) < request.sliding_window
                if near and (j <= p or not request.is_causal):
                    seen[p // rows, j // size] = True
        for row in range(first_q // rows, (first_q + len_q - 1) // rows + 1 if len_q else 0):
            for column in range(listed.shape[2]):
                block = column + first_k // size
                mine = listed[:, row - first_q // rows, column]
                last_diagonal = (row + 1) * rows // size - 1
                first_recent = row * rows // size - selector.recent_blocks + 1
                is_recent = selector.recent_blocks and first_recent <= block <= last_diagonal
                if (row, block) not in seen:
                    assert not mine.any()
                elif block < selector.first_blocks or is_recent or (len_q == 1 and not request.plan.sparse_decode):
                    assert mine.all()


@given(selectors().flatmap(skipping).flatmap(lambda plan: requests(plan=plan, causal=True, batch=1)), st.data())
@few_cases
def test_chunks_of_whole_query_blocks(request, data):
    """Chunked prefill equals one prefill, where chunks end at the end of a query block."""
    _, rows = request.grid
    plan = dataclasses.replace(request.plan, sparse_decode=True)  # or a chunk of one token would be decode
    len_k = int(request.lengths_k[0])
    keys = slice(int(request.starts_k[0]), int(request.starts_k[0]) + len_k)
    k, v = request.k[keys], request.v[keys]
    q = torch.randint(-2, 3, (len_k, *request.q.shape[1:])) / 2
    zero = torch.zeros(1, dtype=torch.int64)

    def prefill(start, stop):
        return compute(
            request._replace(
                q=q[start:stop], k=k[:stop], v=v[:stop], plan=plan, first_q=None, first_k=None,
                starts_q=zero, lengths_q=zero + stop - start, max_q=stop - start,
                starts_k=zero, lengths_k=zero + stop, max_k=stop,
            )
        )[0]  # fmt: skip

    inside = data.draw(st.sets(st.sampled_from(range(rows, len_k, rows)))) if len_k > rows else set()
    cuts = sorted({0, len_k, *inside})
    chunks = [prefill(start, stop) for start, stop in pairwise(cuts)]
    if chunks:
        torch.testing.assert_close(torch.cat(chunks), prefill(0, len_k), **FP32)


@given(selectors().flatmap(skipping).flatmap(lambda plan: requests(plan=plan)))
@few_cases
def test_batch_mates_do_not_matter(request):
    together, _ = compute(request)
    fields = ("starts_q", "lengths_q", "starts_k", "lengths_k", "first_q", "first_k")
    for number, sequence in enumerate(request.sequences()):
        only = {name: x[number : number + 1] for name in fields if (x := getattr(request, name)) is not None}
        alone, _ = compute(request._replace(**only))
        torch.testing.assert_close(alone[sequence.queries], together[sequence.queries], **FP32)


@given(with_lists())
@many_cases
def test_transposed_lists(request):
    """Each key block's query blocks, sequence by sequence, are those that list it."""
    blocks, mask = request.blocks, request.blocks.mask()
    begins, indices = blocks.transposed()
    ends = [*blocks.starts.tolist()[1:], mask.shape[1]]
    for head in range(mask.shape[0]):
        for column in range(mask.shape[2]):
            for number, (start, end) in enumerate(zip(blocks.starts.tolist(), ends, strict=True)):
                begin, stop = begins[head, column, number : number + 2].tolist()
                expected = [row for row in range(start, end) if mask[head, row, column]]
                assert indices[head, column, begin:stop].tolist() == expected


def test_lists_of_a_mask():
    mask = torch.tensor([[[True, False, True], [False, False, False]], [[True, True, True], [False, True, False]]])
    blocks = KeyBlocks.from_mask(mask, torch.tensor([0]), 16, 32)
    assert blocks.counts.tolist() == [[2, 0], [3, 1]]
    assert blocks.indices[0, 0, :2].tolist() == [0, 2]
    assert blocks.indices[1, 1, :1].tolist() == [1]
    assert torch.equal(blocks.mask(), mask)


@given(requests())
@many_cases
def test_grid_equals_positions(request):
    """Blocks of all sequences, and which of them see which, from every query and key by itself."""
    for size, rows in GRIDS:
        grid = BlockGrid(request, size, rows)
        seen = grid.seen()
        number, expected = 0, torch.zeros_like(seen)
        for sequence, (queries, keys, first_q, first_k) in enumerate(request.sequences()):
            positions = range(first_q, first_q + queries.stop - queries.start)
            for block in sorted({p // rows for p in positions}):
                mine = [p for p in positions if p // rows == block]
                assert (int(grid.low_q[number]), int(grid.high_q[number])) == (mine[0], mine[-1])
                assert grid.sequence[number] == sequence
                for p in mine:
                    for j in range(first_k, first_k + keys.stop - keys.start):
                        near = request.sliding_window is None or abs(p - j) < request.sliding_window
                        if near and (j <= p or not request.is_causal):
                            expected[number, j // size - first_k // size] = True
                number += 1
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("with_skip", [False, True])
def test_operators_are_well_formed(with_skip):
    """PyTorch's own checks of both operators: schema, fake shapes, autograd registration, tracing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(90, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    starts, lengths = torch.tensor([0, 50]), torch.tensor([50, 40])
    selector = BlockSelector(sums, at_least_the_mean, None, 16, 16, per_kv_head=True)
    plan = AttentionPlan(blocks=selector, skip=SkipRule(0.3, 16, 16) if with_skip else None)
    packing = {"starts_q": starts, "lengths_q": lengths, "max_q": 50, "starts_k": starts, "lengths_k": lengths}
    masks = {"is_causal": True, "softmax_scale": 0.3, "sliding_window": None, "softcap": None, "plan": plan}
    request = blocked.AttentionRequest(q=q, k=k, v=v, s_aux=None, max_k=50, **packing, **masks, with_lse=True)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in request.flatten()]
    torch.library.opcheck(torch.ops.modelopt_lite.select_blocks.default, tuple(arguments))
    listed = request._replace(blocks=select_blocks(request))
    torch.library.opcheck(torch.ops.modelopt_lite.attention.default, (*listed.flatten(), "torch"))


def lists(**changes):
    blocks = KeyBlocks.from_mask(torch.ones(2, 3, 3, dtype=torch.bool).tril(), torch.tensor([0]), 16, 16)
    return blocks._replace(**changes)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("all", "blocks: 'all' is not allowed; KeyBlocks"),
        (lists(block_size=24), "blocks.block_size: 24 is not allowed; a multiple of 16"),
        (lists(block_rows=24), "blocks.block_rows: 24 is not allowed; a multiple of block_size = 16"),
        (lists(starts=torch.tensor([0])), "blocks.starts: int64 .* must be int32 with 1 dimensions"),
        (lists(counts=torch.ones(3, 3, dtype=torch.int32)), r"blocks: counts are int32 \[3, 3\]"),
        (
            lists(starts=torch.tensor([1], dtype=torch.int32)),
            r"blocks.starts\[0\]: 1 is not allowed; .* 3 query blocks",
        ),
        (
            lists(counts=torch.full((2, 3), 4, dtype=torch.int32)),
            "blocks.counts: of sequence 0, not all are from 0 to 3",
        ),
        (lists(indices=lists().indices + 1), "blocks.indices: of sequence 0, not all are from 0 to 2, its key blocks"),
        (lists(indices=lists().indices.flip(-1)), "blocks.indices: of sequence 0, not all are in ascending order"),
    ],
)
def test_lists_that_are_wrong(blocks, message):
    q = torch.randn(48, 2, 8)
    packing = (torch.tensor([0]), torch.tensor([48]), 48)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, *packing, blocks=blocks)


def test_lists_and_a_plan_that_chooses():
    q = torch.randn(48, 2, 8)
    packing = (torch.tensor([0]), torch.tensor([48]), 48)
    with pytest.raises(ValueError, match="blocks: not allowed together with a plan that chooses blocks itself"):
        attention(q, q, q, *packing, blocks=lists(), plan=AttentionPlan(skip=SkipRule(0.1)))


def test_decode_alone_chooses_nothing(monkeypatch):
    """Where every sequence has one query, no selector runs, so that decode costs what it costs without one."""
    plan = AttentionPlan(blocks=BlockSelector(sums, at_least_the_mean, block_size=16, block_rows=16))
    monkeypatch.setattr(choice, "select_blocks", None)
    q, k = torch.randn(2, 2, 8), torch.randn(60, 2, 8)
    ones, starts_k, lengths_k = torch.ones(2, dtype=torch.int64), torch.tensor([0, 40]), torch.tensor([40, 20])
    packing = (torch.arange(2), ones, 1, True, None, starts_k, lengths_k, 40)
    assert torch.equal(attention(q, k, k, *packing, plan=plan), attention(q, k, k, *packing, plan=DENSE))


def test_plans_that_are_wrong():
    with pytest.raises(ValueError, match=r"selector.block_size: 24 is not allowed; a multiple of 16"):
        BlockSelector(sums, at_least_the_mean, block_size=24)
    with pytest.raises(ValueError, match=r"selector.block_rows: 64 is not allowed; a multiple of block_size = 128"):
        BlockSelector(sums, at_least_the_mean, block_rows=64)
    with pytest.raises(ValueError, match=r"skip.threshold: 0.0 is not allowed; a number > 0"):
        SkipRule(0.0)
    selector = BlockSelector(sums, at_least_the_mean, block_size=64)
    with pytest.raises(ValueError, match=r"plan.skip: \(block_size, block_rows\) = \(128, 128\) is not allowed"):
        AttentionPlan(blocks=selector, skip=SkipRule(0.1))


@given(
    st.sampled_from(GRIDS),
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(1, 130),
    st.booleans(),
    st.none() | st.integers(1, 99),
)
@settings(max_examples=100, deadline=None)
def test_where_all_blocks_are_forced(sizes, first_blocks, recent_blocks, keys, is_causal, sliding_window):  # fmt: skip
    """Then nothing is to be chosen, in whole sequences and in their last chunks; else there is a block to choose."""
    selector = BlockSelector(sums, at_least_the_mean, None, *sizes, first_blocks, recent_blocks)
    q = torch.zeros(keys, 1, 8)
    options = {
        "is_causal": is_causal,
        "sliding_window": sliding_window,
        "plan": AttentionPlan(blocks=selector, sparse_decode=True),
    }
    for queries in {keys, (keys + 1) // 2}:
        grid = BlockGrid(one_sequence(q[:queries], q, q, **options), *sizes)
        seen, forced = grid.marked(first_blocks, recent_blocks)
        if selector.forces_all(keys, is_causal):
            assert torch.equal(seen, forced)
        elif queries == keys and sliding_window is None and (is_causal or keys > sizes[1]):
            assert not torch.equal(seen, forced)


@given(requests(longest=40), st.integers(0, 2), st.integers(0, 3), st.booleans())
@many_cases
def test_plan_of_short_sequences_keeps_the_same(request, first_blocks, recent_blocks, has_rule):
    selector = BlockSelector(sums, at_least_the_mean, None, 16, 16, first_blocks, recent_blocks)
    rule = top_n_plan(2, 4, 1, 3) if has_rule else DENSE
    plan = dataclasses.replace(rule, blocks=selector, skip=SkipRule(0.5, 16, 16) if recent_blocks == 2 else None)
    request = request._replace(plan=plan, first_q=None, first_k=None)
    assume(not request.is_causal or bool((request.lengths_q <= request.lengths_k).all()))
    short = plan.for_keys(request.max_k, request.is_causal)
    assert short.name == plan.name or not short.chooses_blocks
    expected, _ = attention_reference(request)
    found, _ = attention_reference(request._replace(plan=short))
    torch.testing.assert_close(found, expected, **FP32)


@given(selectors().flatmap(skipping).flatmap(lambda plan: requests(plan=plan)), st.integers(2, 5))
@few_cases
def test_several_query_blocks_at_a_time_skip_alike(request, step):
    assume(request.first_k is None and request.plan.keep is None)
    expected = select_blocks(request).mask()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelopt_lite.kernels.selection._rows_at_a_time", lambda *_: step)
        assert torch.equal(select_blocks(request).mask(), expected)


@given(st.lists(selectors().flatmap(lambda x: requests(plan=AttentionPlan(blocks=x))), min_size=2, max_size=4))
@few_cases
def test_what_calls_share_changes_nothing(calls):
    """Also where calls have some of their tensors in common, and others not."""
    shared = {}
    calls += [call._replace(lengths_q=call.lengths_q.masked_fill(call.lengths_q == 1, 0)) for call in calls]
    calls += [call._replace(plan=calls[0].plan, is_causal=True, sliding_window=7) for call in calls]
    for call in [*calls, *calls]:
        for found, expected in zip(select_blocks(call._replace(grids=shared)), select_blocks(call), strict=True):
            assert not isinstance(found, torch.Tensor) or torch.equal(found, expected)
    assert shared
