"""Random attention calls that choose blocks of keys, and the same choice key by key in Python loops."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from modelopt_lite.kernels import AttentionRequest, KeyBlocks
from modelopt_lite.kernels.blocks import BlockGrid
from modelopt_lite.kernels.reference import kept_scores, listed_blocks
from modelopt_lite.kernels.selection import _log_thresholds
from modelopt_lite.kernels.statistics import COUNTS, MASS
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE, AttentionPlan

SCALE = 0.25  # a power of two: scores of the inputs below are exact in every precision
GRIDS = ((16, 16), (16, 32), (32, 32), (16, 64))  # keys in a key block, positions in a query block


@st.composite
def requests(
    draw: st.DrawFn, longest: int = 90, batch: int = 3, plan: AttentionPlan | None = None, causal: bool | None = None
) -> AttentionRequest:
    """Draw a call: ragged lengths with 0 and 1 among them, suffix queries, any heads, masks, positions and rule.

    Queries and keys are small multiples of 1/2, so that all scores are exact and many of them equal. Rows of no
    sequence hold NaN.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_causal = draw(st.booleans()) if causal is None else causal
    lengths_k = draw(st.lists(st.integers(0, longest), min_size=1, max_size=batch))
    lengths_q = [draw(st.just(n) | st.integers(0, n if is_causal else longest)) for n in lengths_k]
    kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def packed(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
        starts, row = [], 0
        for length in lengths:
            row += draw(st.integers(0, 2))
            starts.append(row)
            row += length
        return torch.tensor(starts), torch.tensor(lengths), row + draw(st.integers(0, 2))

    def tensor(starts: Tensor, lengths: Tensor, rows: int, heads: int, exact: bool) -> Tensor:
        x = torch.full((rows, heads, 8), torch.nan)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            shape = (length, heads, 8)
            values = torch.randint(-2, 3, shape, generator=generator) / 2
            x[start : start + length] = values if exact else torch.randn(shape, generator=generator)
        return x

    starts_q, len_q, rows_q = packed(lengths_q)
    starts_k, len_k, rows_k = packed(lengths_k)
    has_positions = draw(st.booleans())
    if plan is None:
        plan = draw(plans())
    return AttentionRequest(
        q=tensor(starts_q, len_q, rows_q, kv_heads * repeat, exact=True),
        k=tensor(starts_k, len_k, rows_k, kv_heads, exact=True),
        v=tensor(starts_k, len_k, rows_k, kv_heads, exact=False),
        s_aux=draw(st.none() | st.just(torch.randn(kv_heads * repeat, generator=generator))),
        starts_q=starts_q,
        lengths_q=len_q,
        max_q=max(lengths_q) + draw(st.integers(0, 1)),
        starts_k=starts_k,
        lengths_k=len_k,
        max_k=max(lengths_k) + draw(st.integers(0, 1)),
        is_causal=is_causal,
        softmax_scale=SCALE,
        sliding_window=draw(st.none() | st.integers(1, longest)),
        softcap=draw(st.none() | st.just(2.0)),
        plan=plan,
        first_q=_maybe_positions(draw, has_positions, lengths_q, longest),
        first_k=_maybe_positions(draw, has_positions, lengths_k, 40),
        with_lse=True,
    )


def _maybe_positions(draw: st.DrawFn, wanted: bool, lengths: list[int], highest: int) -> Tensor | None:
    if not wanted or draw(st.booleans()):
        return None
    return torch.tensor([draw(st.integers(0, highest)) for _ in lengths])


@st.composite
def plans(draw: st.DrawFn, **fields: object) -> AttentionPlan:
    """Draw a plan with N:M or without a rule, with sinks and dense window."""
    sinks, window = draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 3, 16, 40]))
    sparse_decode = draw(st.booleans())
    if draw(st.booleans()):
        rule = top_n_plan(2, draw(st.sampled_from([4, 8])), sinks, window)
        fields = {"keep": rule.keep, "group": rule.group, **fields}
    return AttentionPlan(num_sink_tokens=sinks, dense_window_size=window, sparse_decode=sparse_decode, **fields)


def shape_of_lists(request: AttentionRequest, block_size: int, block_rows: int) -> list[tuple[int, int]]:
    """Return how many query blocks and key blocks each sequence has."""
    found = []
    for queries, keys, first_q, first_k in request.sequences():
        rows = {(first_q + i) // block_rows for i in range(queries.stop - queries.start)}
        columns = {(first_k + j) // block_size for j in range(keys.stop - keys.start)}
        found.append((len(rows), len(columns)))
    return found


@st.composite
def with_lists(draw: st.DrawFn, **options: object) -> AttentionRequest:
    """Draw a call with lists of its own: random ones, empty and full ones."""
    request = draw(requests(**options))
    block_size, block_rows = draw(st.sampled_from(GRIDS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = draw(st.sampled_from([request.q.shape[1], request.k.shape[1]]))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    masks = [
        torch.rand(heads, *shape, generator=generator) < share
        for shape in shape_of_lists(request, block_size, block_rows)
    ]
    return request._replace(blocks=KeyBlocks.from_masks(masks, block_size, block_rows))


def kept_by_brute_force(
    request: AttentionRequest, number: int, listed: Tensor | None, grid: tuple[int, int], head: int
) -> list[list[int]]:
    """Return the keys that each query of one sequence and head attends to.

    Args:
        request: the call.
        number: which sequence.
        listed: key blocks of each query block, ``[query_blocks, key_blocks]``, for this head; None: all.
        grid: keys in a key block, positions in a query block.
        head: the query head.
    """
    size, rows = grid
    queries, keys, first_q, first_k = list(request.sequences())[number]
    plan, len_q, len_k = request.plan, queries.stop - queries.start, keys.stop - keys.start
    k = request.k[keys, head * request.k.shape[1] // request.q.shape[1]].double()
    is_dense = len_q == 1 and not plan.sparse_decode
    scores, kept, exempt = [], [], []
    for i in range(len_q):
        p = first_q + i
        row = (SCALE * (k @ request.q[queries.start + i, head].double())).tolist()
        if request.softcap is not None:
            row = [request.softcap * math.tanh(score / request.softcap) for score in row]
        visible = [
            j
            for j in range(first_k, first_k + len_k)
            if (not request.is_causal or j <= p)
            and (request.sliding_window is None or abs(p - j) < request.sliding_window)
        ]
        scores.append(dict(zip(range(first_k, first_k + len_k), row, strict=True)))
        exempt.append({j for j in visible if j < plan.num_sink_tokens or 0 <= p - j < plan.dense_window_size})
        if is_dense:
            kept.append(set(visible))
            continue
        chosen = set(visible)
        if plan.keep is not None:
            chosen = set()
            for group in range(0, first_k + len_k, plan.group):
                members = [j for j in visible if group <= j < group + plan.group]
                chosen.update(sorted(members, key=lambda j: (-scores[i][j], j))[:2])
        if listed is not None:
            block = p // rows - first_q // rows
            chosen = {j for j in chosen if listed[block, j // size - first_k // size]}
        kept.append(chosen | exempt[i])
    if plan.skip is not None and not is_dense:
        threshold = plan.skip.threshold
        if len_q == 1 and plan.skip.decode_threshold is not None:
            threshold = plan.skip.decode_threshold
        _skip(kept, exempt, scores, first_q, grid, math.log(threshold))
    return [sorted(x) for x in kept]


def _skip(kept, exempt, scores, first_q, grid, margin):
    size, rows = grid
    for block in {(first_q + i) // rows for i in range(len(kept))}:
        members = [i for i in range(len(kept)) if (first_q + i) // rows == block]
        spared = {i: exempt[i] | {j for j in kept[i] if j // rows == block} for i in members}
        reference = {i: max((scores[i][j] for j in kept[i] & spared[i]), default=-math.inf) for i in members}
        for column in {j // size for i in members for j in kept[i]}:
            others = [(i, j) for i in members for j in kept[i] - spared[i] if j // size == column]
            if all(scores[i][j] < reference[i] + margin for i, j in others):
                for i, j in others:
                    kept[i].discard(j)


def counts_by_oracle(request: AttentionRequest, counted: Tensor | None = None) -> Tensor:
    """Count what the oracle keeps, as :func:`modelopt_lite.kernels.statistics_launch.prepare` says.

    Args:
        request: the call.
        counted: which of the packed queries count, ``[total_q]``; None: all.
    """
    heads = request.q.shape[1]
    counts = torch.zeros(heads, 4, dtype=torch.float64)
    dense = request._replace(plan=DENSE, blocks=None)
    for number, sequence in enumerate(request.sequences()):
        q, k = request.q[sequence.queries].detach().double(), request.k[sequence.keys].detach().double()
        positions = (sequence.first_q, sequence.first_k)
        kept = kept_scores(q, k, request, *positions, listed_blocks(request, number)) > -torch.inf
        scores = kept_scores(q, k, dense, *positions)
        if counted is not None:
            rows = counted[sequence.queries]
            kept, scores = kept[:, rows], scores[:, rows]
        seen = scores > -torch.inf
        mass = scores.softmax(-1).where(kept, 0.0).sum((1, 2))
        counts += torch.stack([seen.any(-1).sum(-1), seen.sum((1, 2)), kept.sum((1, 2)), mass], 1)
    return counts


def log_thresholds(grid: BlockGrid) -> Tensor:
    """Return the logarithms of a skip rule's thresholds, ``-inf`` where nothing is skipped, FP32 ``[query_blocks]``."""
    found = _log_thresholds(grid, grid.seen(), grid.request.plan.skip)
    return found.masked_fill(grid.is_dense(), -torch.inf).float()


def assert_same_counts(found: Tensor, expected: Tensor) -> None:
    """Compare counts by head, of which all but the mass are exact."""
    integers = [i for i, name in enumerate(COUNTS) if name != "mass" and i < expected.shape[1]]
    assert torch.equal(found[:, integers], expected[:, integers])
    torch.testing.assert_close(found[:, MASS], expected[:, MASS], rtol=2e-5, atol=2e-5)
