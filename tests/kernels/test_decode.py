"""The kernels for few queries over many keys against the oracle: by Triton's interpreter, and on a GPU."""

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from modelopt_lite.kernels.decode import launch as decode_launch
from modelopt_lite.kernels.decode.kernel import divide_work
from modelopt_lite.kernels.decode.launch import DecodeSettings, pays, prepare, refusal
from modelopt_lite.kernels.language import jit, tl
from modelopt_lite.kernels.reference import attention_reference, kept_scores
from modelopt_lite.kernels.request import AttentionRequest
from modelopt_lite.kernels.settings import distances
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.methods import SinkWindow
from modelopt_lite.plan import DENSE, AttentionPlan

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
# Rows without a key have a sum of 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

WHOLE = DecodeSettings(16, 4, 1, programs=1, least_tiles=1000, peel=True)
FEW = DecodeSettings(16, 4, 1, programs=5, least_tiles=1, peel=False)
MANY = DecodeSettings(16, 4, 1, programs=20, least_tiles=1, peel=True)
# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most some hundred keys.
FP32 = {"rtol": 2e-5, "atol": 2e-5}
# The interpreter takes about a tenth of a second a program, and there is one for each query and head.
HOLE = SinkWindow(num_sink_tokens=20, dense_window_size=40).plan()
RAGGED = ((1, 40), (0, 9), (1, 1), (1, 90))
STEPS = ((3, 50), (1, 33), (0, 0))


@pytest.fixture(autouse=True)
def poison():
    """Fill what is allocated and not yet written with NaN, and keep FP32 products in FP32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = before


def make(lengths, heads=(2, 1), dims=(16, 16), *, dtype=torch.float32, device="cpu", s_aux=False, seed=0, **changes):
    """Make a request of sequences ``(len_q, len_k)``; the gaps between them hold NaN.

    Queries and keys are small multiples of 1/2, so that scores are exact in every precision and many of them tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def packed(lengths):
        starts, row = [], 1
        for length in lengths:
            starts.append(row)
            row += length + 1
        return torch.tensor(starts, device=device), torch.tensor(lengths, device=device), row

    def tensor(packing, heads, dim, is_exact):
        x = torch.full((packing[2], heads, dim), torch.nan)
        for start, length in zip(packing[0].tolist(), packing[1].tolist(), strict=True):
            shape = (length, heads, dim)
            exact = torch.randint(-2, 3, shape, generator=generator) / 2
            x[start : start + length] = exact if is_exact else torch.randn(shape, generator=generator)
        return x.to(device, dtype)

    queries, keys = (packed([pair[side] for pair in lengths]) for side in range(2))
    fields = {
        "q": tensor(queries, heads[0], dims[0], True),
        "k": tensor(keys, heads[1], dims[0], True),
        "v": tensor(keys, heads[1], dims[1], False),
        "s_aux": torch.randn(heads[0], generator=generator).to(device) if s_aux else None,
        "starts_q": queries[0],
        "lengths_q": queries[1],
        "max_q": max(1, *(len_q for len_q, _ in lengths)),
        "starts_k": keys[0],
        "lengths_k": keys[1],
        "max_k": max(len_k for _, len_k in lengths),
        "is_causal": True,
        "softmax_scale": 2.0 ** -math.ceil(math.log2(dims[0]) / 2),
        "sliding_window": None,
        "softcap": None,
        "plan": DENSE,
        "with_lse": True,
    }
    return AttentionRequest(**{**fields, **changes})


def check(request, settings=None, tolerance=FP32):
    """Compare with the oracle."""
    output, lse = prepare(request, settings)(request)
    expected, expected_lse = attention_reference(request)
    torch.testing.assert_close(output.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, **tolerance)
    return output


@st.composite
def requests(draw):
    """Draw a request: ragged lengths, any heads, dimensions, masks, positions and plans."""
    is_causal = draw(st.booleans())
    lengths_k = draw(st.lists(st.integers(0, 70), min_size=1, max_size=2))
    most = draw(st.sampled_from([1, 1, 4]))
    lengths_q = [draw(st.integers(0, min(most, length) if is_causal else most)) for length in lengths_k]
    kv_heads, repeat = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    m = draw(st.sampled_from([2, 4, 8, 16]))
    sinks, window = draw(st.integers(0, 20)), draw(st.sampled_from([0, 1, 3, 16, 200]))
    plan = top_n_plan(draw(st.integers(0, m)), m, sinks, window)
    if not plan.is_dense and draw(st.booleans()):
        plan = dataclasses.replace(plan, sparse_decode=True)
    if draw(st.integers(0, 3)) == 0:
        plan = SinkWindow(num_sink_tokens=sinks, dense_window_size=window).plan()
    placed = draw(st.booleans())
    firsts = [draw(st.none() | st.just([draw(st.integers(0, 60)) for _ in lengths_k])) for _ in range(2)]
    first_q, first_k = (torch.tensor(x) if x is not None and placed else None for x in firsts)
    return make(
        list(zip(lengths_q, lengths_k, strict=True)),
        heads=(kv_heads * repeat, kv_heads),
        dims=draw(st.sampled_from([(16, 16), (5, 3), (24, 8), (48, 16)])),
        s_aux=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        plan=plan,
        is_causal=is_causal,
        sliding_window=draw(st.none() | st.integers(1, 80)),
        softcap=draw(st.none() | st.just(2.0)),
        first_q=first_q,
        first_k=first_k,
        max_k=max(lengths_k) + draw(st.sampled_from([0, 50])),
    )


@interpreted
@given(requests(), st.sampled_from([WHOLE, FEW, MANY]))
@effort(max_examples=12, deadline=None)
def test_kernel_equals_oracle(request, settings):
    check(request, settings)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "plan"),
    [
        (RAGGED, DENSE),
        (STEPS, top_n_plan(2, 4, 3, 5)),
        (STEPS, SinkWindow(num_sink_tokens=4, dense_window_size=20).plan()),
    ],
)
def test_how_many_pieces_does_not_matter(lengths, plan):
    request = make(lengths, plan=plan, s_aux=True)
    outputs = [check(request, settings) for settings in (WHOLE, FEW, MANY)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **FP32)
    assert torch.equal(outputs[2], prepare(request, MANY)(request)[0])


@interpreted
@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 4), (3, 8), (5, 16)])
def test_ties(n, m):
    request = make([(5, 45)], plan=top_n_plan(n, m, 0, 2))
    check(request._replace(q=request.q.sign(), k=request.k.sign()), FEW)


@interpreted
def test_half_precision():
    # FP16 rounds values and probabilities to 2^-11.
    check(make(STEPS, dtype=torch.float16, plan=top_n_plan(4, 8, 0, 8)), FEW, {"rtol": 2e-3, "atol": 2e-3})


@interpreted
def test_more_rows_than_a_tile():
    check(make([(6, 40), (2, 20)], heads=(11, 1)), FEW)


@interpreted
def test_a_query_alone_is_dense_unless_asked():
    for sparse_decode in (False, True):
        plan = dataclasses.replace(top_n_plan(1, 4, 0, 0), sparse_decode=sparse_decode)
        for lengths in ([(1, 40)], STEPS):
            check(make(lengths, plan=plan), FEW)


@interpreted
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 0, 3)])
def test_what_is_not_visible_is_not_read(plan):
    """Keys before a sliding window and those that a plan drops without looking hold NaN."""
    request = make([(3, 80)], plan=plan, sliding_window=20)
    expected = check(request, FEW)
    request.k[1:49], request.v[1:49] = torch.nan, torch.nan
    assert torch.equal(prepare(request, FEW)(request)[0], expected)
    request = make([(3, 80)], plan=SinkWindow(num_sink_tokens=5, dense_window_size=10).plan())
    expected = check(request, FEW)
    request.k[17:65], request.v[17:65] = torch.nan, torch.nan
    assert torch.equal(prepare(request, FEW)(request)[0], expected)


@interpreted
def test_any_strides():
    request = make(STEPS)
    expected = check(request, FEW)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], dim=2)[:, :, :16],
    ):
        changed = request._replace(**{name: change(getattr(request, name)) for name in ("q", "k", "v")})
        assert torch.equal(prepare(changed, FEW)(changed)[0], expected)
    request = make([(1, 40)], heads=(4, 2))
    for shape in ((1, 2, 16), (50, 1, 16)):  # expanded tokens, expanded heads
        k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).expand(50, 2, 16) for _ in range(2))
        check(request._replace(k=k, v=v), FEW)


@interpreted
@pytest.mark.parametrize(
    ("page_size", "first_k", "plan"),
    [(5, None, DENSE), (16, None, top_n_plan(2, 4, 3, 5)), (64, None, DENSE), (16, 6, top_n_plan(2, 4, 3, 5))],
)
def test_pages_equal_what_they_hold(page_size, first_k, plan):
    request = make(STEPS, plan=plan)
    if first_k is not None:
        request = request._replace(first_k=torch.full_like(request.starts_k, first_k))
    assert torch.equal(prepare(paged(request, page_size), FEW)(paged(request, page_size))[0], check(request, FEW))


def paged(request, page_size):
    """Move a request's keys and values to pages in a random order; all else holds NaN, and unused pages are -1."""
    longest = -(-request.max_k // page_size)
    batch, device = request.starts_k.shape[0], request.k.device
    order = torch.randperm(batch * longest, generator=torch.Generator().manual_seed(0)).view(batch, longest)
    used = torch.arange(longest) * page_size < request.lengths_k[:, None].cpu()
    table = torch.where(used, order, -1).to(device, torch.int32)
    pages = {name: getattr(request, name) for name in ("k", "v")}
    for name, x in pages.items():
        pages[name] = x.new_full((batch * longest * page_size, *x.shape[1:]), torch.nan)
        for b, (_, keys, *_) in enumerate(request.sequences()):
            j = torch.arange(keys.stop - keys.start, device=device)
            pages[name][table[b, j // page_size] * page_size + j % page_size] = x[keys]
    return request._replace(**pages, page_table=table, page_size=page_size)


@interpreted
def test_a_cache_that_grows():
    """Lengths change on the device, and nothing else."""
    request = make([(1, 64), (1, 90)], max_k=200)
    run = prepare(request, FEW)
    for lengths in ((1, 0), (17, 90)):
        request.lengths_k.copy_(torch.tensor(lengths))
        expected, expected_lse = attention_reference(request)
        output, lse = run(request)
        torch.testing.assert_close(output.double(), expected, **FP32)
        torch.testing.assert_close(lse.double(), expected_lse, **FP32)


@jit
def count_slots(
    out_ptr, sequences, batch, max_pieces, least, sinks, window, sliding, OPTIONS: tl.constexpr, SPLIT: tl.constexpr
):
    _, _, slots = divide_work(
        sequences, tl.arange(0, SPLIT.batch_block), batch, max_pieces, least, sinks, window, sliding, OPTIONS, SPLIT
    )
    tl.store(out_ptr, tl.sum(slots, 0))


@interpreted
@given(st.data())
@effort(max_examples=100, deadline=None)
def test_there_are_slots_for_all_pieces(data):
    most, longest = data.draw(st.sampled_from([1, 4, 16])), data.draw(st.integers(0, 500))
    pairs = st.tuples(st.integers(0, most), st.integers(0, longest))
    count = data.draw(st.sampled_from([1, 4, 20, 70, 300]))
    lengths = data.draw(st.lists(pairs, min_size=1, max_size=min(count, 20)))
    lengths = (lengths * count)[:count]
    request = make([(0, 0)] * len(lengths), heads=data.draw(st.sampled_from([(1, 1), (6, 1), (4, 2), (12, 3)])))
    lengths_q, lengths_k = torch.tensor(lengths).T
    request = request._replace(
        lengths_q=lengths_q.contiguous(),
        lengths_k=lengths_k.contiguous(),
        max_q=most,
        max_k=longest,
        is_causal=data.draw(st.booleans()),
        plan=data.draw(st.sampled_from([DENSE, HOLE])),
        sliding_window=data.draw(st.none() | st.integers(1, 100)),
        first_k=data.draw(st.none() | st.just(torch.randint(0, 50, (len(lengths),)))),
    )
    settings = DecodeSettings(16, 4, 1, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), True)
    options = decode_launch._options(request, settings)
    multiprocessors = data.draw(st.sampled_from([1, 10, 132]))
    units, programs = decode_launch._units(request, options), settings.programs
    run_together = 2 * units <= programs * multiprocessors
    split = decode_launch._split(request, settings, options, run_together)
    max_pieces = decode_launch._max_pieces(units, programs, multiprocessors, run_together)
    pieces = torch.zeros(1, dtype=torch.int32)
    sequences = (None, request.lengths_q, None, request.lengths_k, request.first_q, request.first_k)
    rule = (len(lengths), max_pieces, settings.least_tiles, *distances(request))
    count_slots[(1,)](pieces, sequences, *rule, options, split)
    slots = decode_launch._slots(request, options, units, max_pieces, settings.least_tiles)
    assert pieces.item() <= slots
    if run_together:
        assert slots <= programs * multiprocessors


@interpreted
@pytest.mark.parametrize(
    ("keys", "pieces"),
    # 260 may run together, and 8 heads of keys share them: 32 for each.
    [([8192] * 16, 32), ([8192] * 12, 24), ([8192] * 8, 32), ([8192] * 4, 32), ([8192], 32), ([8192, *[64] * 15], 31)],
)
def test_pieces_are_as_short_as_they_can_be(keys, pieces):
    """Of the last ones, the long sequence has 16 of 8 tiles: with 7, there would be 34."""
    request = make([(0, 0)] * len(keys), heads=(8, 8))._replace(
        lengths_q=torch.ones(len(keys), dtype=torch.int64),
        lengths_k=torch.tensor(keys),
        max_q=1,
        max_k=8192,
        plan=DENSE,
    )
    settings = DecodeSettings(64, 4, 3, programs=2, least_tiles=4, peel=False)
    options = decode_launch._options(request, settings)
    max_pieces = decode_launch._max_pieces(decode_launch._units(request, options), 2, 132, run_together=True)
    split = decode_launch._split(request, settings, options, run_together=True)
    found = torch.zeros(1, dtype=torch.int32)
    sequences = (None, request.lengths_q, None, request.lengths_k, request.first_q, request.first_k)
    count_slots[(1,)](found, sequences, len(keys), max_pieces, 4, *distances(request), options, split)
    assert found.item() == 8 * pieces


def test_what_is_refused():
    assert refusal(make(STEPS)) is None
    assert "17 queries" in refusal(make([(17, 20)]))
    assert "4097 sequences" in refusal(make(STEPS)._replace(starts_q=torch.zeros(4097)))
    assert "head dimensions are 577" in refusal(make(STEPS, dims=(577, 16)))


def test_few_keys_do_not_pay():
    assert not pays(make([(1, 100)]))
    assert pays(make([(1, 1000)]))
    assert not pays(make([(30, 1000)]))


# On a GPU

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LONG = ((1, 5000), (0, 300), (1, 1), (1, 0), (1, 777), (1, 64))
LONG_STEPS = ((16, 3000), (1, 257), (0, 0), (4, 4), (7, 1030))


def eager_attention(request):
    """Compute attention in PyTorch's operations and the precision of the inputs, as Transformers' eager attention."""
    r = request
    output = torch.zeros(*r.q.shape[:2], r.v.shape[2], device=r.q.device, dtype=torch.float64)
    for rows, keys, first_q, first_k in r.sequences():
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        kept = kept_scores(r.q[rows].double(), r.k[keys].double(), r, first_q, first_k) > -torch.inf
        repeat = r.q.shape[1] // r.k.shape[1]
        k, v = (x[keys].repeat_interleave(repeat, 1).transpose(0, 1) for x in (r.k, r.v))
        scores = r.q[rows].transpose(0, 1) @ k.mT * r.softmax_scale
        if r.softcap is not None:
            scores = torch.tanh(scores / r.softcap) * r.softcap
        scores = scores.masked_fill(~kept, -torch.inf)
        if r.s_aux is not None:
            scores = torch.cat([scores, r.s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)], -1)
        weights = torch.softmax(scores.float(), -1).nan_to_num().to(r.q.dtype)[..., : kept.shape[-1]]
        output[rows] = (weights @ v).transpose(0, 1).double()
    return output


def check_gpu(request, settings=None):
    """Hold the kernels against the oracle: no worse than twice PyTorch in the same precision."""
    output, lse = prepare(request, settings)(request)
    expected, expected_lse = attention_reference(request)
    rounding = torch.finfo(request.q.dtype).eps / 2 * expected.abs().max()
    bound = 2 * torch.maximum((eager_attention(request) - expected).abs().max(), rounding)
    assert not output.isnan().any()
    assert (output.double() - expected).abs().max() <= bound
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    torch.testing.assert_close(lse[finite], expected_lse[finite].float(), rtol=1e-5, atol=2e-5)
    return output, lse


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [LONG, LONG_STEPS])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((4, 2), (64, 64)),
        ((32, 8), (128, 128)),
        ((8, 1), (80, 80)),
        ((2, 2), (96, 96)),
        ((2, 1), (256, 256)),
        ((3, 3), (192, 128)),
        ((71, 1), (64, 64)),
    ],
)
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 3, 17), top_n_plan(4, 8, 0, 64)], ids=["dense", "2:4", "4:8"])
def test_gpu_shapes(dtype, lengths, heads, dims, plan):
    check_gpu(make(lengths, heads, dims, dtype=dtype, device="cuda", plan=plan))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LONG, LONG_STEPS])
@pytest.mark.parametrize("plan", [DENSE, top_n_plan(2, 4, 3, 17), SinkWindow().plan()], ids=["dense", "2:4", "window"])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 300, "softcap": 5.0, "s_aux": True},
        {"is_causal": False, "s_aux": True},
        {"is_causal": False, "sliding_window": 70},
        {"first_k": [0, 7, 3, 64, 33, 100]},
        {"first_k": [0, 7, 3, 64, 33, 100], "first_q": [5, 70, 0, 90, 303, 399]},
    ],
    ids=str,
)
def test_gpu_options(lengths, plan, options):
    for name in ("first_q", "first_k"):
        if name in options:
            options = {**options, name: torch.tensor(options[name][: len(lengths)], device="cuda")}
    if "first_q" not in options and options.get("is_causal", True):
        lengths = [(min(pair), pair[1]) for pair in lengths]
    check_gpu(make(lengths, (8, 2), (128, 128), dtype=torch.bfloat16, device="cuda", plan=plan, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_compressed_keys(dtype):
    """Keys of a compressed value and a rotary part, which all heads share."""
    check_gpu(make(LONG, (16, 1), (576, 512), dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 256])
def test_gpu_pages(page_size):
    request = make(LONG_STEPS, (8, 2), (128, 128), dtype=torch.bfloat16, device="cuda")
    pages = paged(request, page_size)
    assert torch.equal(prepare(pages)(pages)[0], check_gpu(request)[0])


@pytest.mark.gpu
def test_gpu_the_same_bits_every_time():
    request = make(LONG_STEPS, (32, 8), (128, 128), dtype=torch.bfloat16, device="cuda", s_aux=True)
    run = prepare(request)
    first = run(request)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(first, run(request), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [((1, 6000),), ((1, 6000), (1, 10), (1, 2000))])
def test_gpu_graph_of_a_cache_that_grows(lengths):
    """A graph is captured once, and lengths change in place."""
    request = make(lengths, (32, 8), (128, 128), dtype=torch.bfloat16, device="cuda", max_k=8192)
    torch.use_deterministic_algorithms(False)  # or filling would be captured
    run = prepare(request)
    run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = run(request)
    longest = request.lengths_k.clone()
    for share in (0.0, 0.01, 0.3, 1.0):
        request.lengths_k.copy_((longest * share).ceil().clamp(min=1))
        output.fill_(torch.nan)
        graph.replay()
        expected = check_gpu(request)
        assert torch.equal(output, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_gpu_two_streams():
    """Calls on different streams share nothing."""
    torch.use_deterministic_algorithms(False)
    calls = [
        make([(1, 20000 + 999 * i)], (32, 8), (128, 128), dtype=torch.bfloat16, device="cuda", seed=i) for i in range(2)
    ]
    runs = [prepare(request) for request in calls]
    expected = [run(request) for run, request in zip(runs, calls, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        found = []
        for stream, run, request in zip(streams, runs, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(request))
        torch.cuda.synchronize()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[0], other[0])


@pytest.mark.gpu
def test_gpu_hook_of_ones_own():
    plan = AttentionPlan(keep=lambda scores, q_pos, k_pos: (scores > 0.25) | (q_pos % 2 == 0), score_hook=positive_hook)
    check_gpu(make(LONG_STEPS, (8, 2), (64, 64), dtype=torch.bfloat16, device="cuda", plan=plan))


@jit
def positive_hook(scores, q_pos, k_pos, args):
    return ((scores[0] > 0.25) | (q_pos % 2 == 0),)
