"""Random attention requests, and what to hold kernels against."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from modelopt_lite.kernels import AttentionRequest
from modelopt_lite.kernels.reference import attention_reference, kept_scores, listed_blocks
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.plan import DENSE, AttentionPlan

SCALE = 0.25  # a power of two: scores of the inputs below are exact in every precision
# Lengths around tile borders, 0 and 1 among them: (queries, keys) of each sequence.
RAGGED = ((257, 257), (1, 1), (0, 0), (63, 63), (130, 400), (1, 300), (64, 129), (0, 5))


class OnGpu(Tensor):
    """A tensor in main memory that says it is on a GPU."""

    is_cuda = True


@dataclass
class Case:
    """A request, and its N:M.

    Queries and keys are small multiples of 1/2, so that all scores are exact in FP32 and many of them equal: a
    selection has to agree to the key, ties included. Rows that belong to no sequence hold NaN.
    """

    request: AttentionRequest
    n: int
    m: int

    def selection(self) -> dict[str, Any]:
        """Return the keyword arguments of the brute force."""
        r = self.request
        return {
            "n": self.n,
            "m": self.m,
            "sinks": r.plan.num_sink_tokens,
            "window": r.plan.dense_window_size,
            "causal": r.is_causal,
            "sliding_window": r.sliding_window,
        }


def arguments(request: AttentionRequest) -> dict[str, Any]:
    """Return the keyword arguments of ``attention`` that make a request, without ``return_lse``."""
    names = {
        "q": "q",
        "k": "k",
        "v": "v",
        "b_start_loc": "starts_q",
        "b_seq_len": "lengths_q",
        "max_input_len": "max_q",
        "is_causal": "is_causal",
        "softmax_scale": "softmax_scale",
        "b_start_loc_k": "starts_k",
        "b_seq_len_k": "lengths_k",
        "max_input_len_k": "max_k",
        "b_first_q": "first_q",
        "b_first_k": "first_k",
        "plan": "plan",
        "sliding_window": "sliding_window",
        "softcap": "softcap",
        "s_aux": "s_aux",
        "blocks": "blocks",
    }
    return {argument: getattr(request, name) for argument, name in names.items()}


def one_sequence(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan = DENSE, **options: Any) -> AttentionRequest:
    """Make a causal request of one sequence, without gaps, whose scores are exact if the tensors allow it."""
    lengths = [torch.tensor([x.shape[0]], device=x.device) for x in (q, k)]
    start = torch.zeros_like(lengths[0])
    request = AttentionRequest(
        q=q,
        k=k,
        v=v,
        s_aux=None,
        starts_q=start,
        lengths_q=lengths[0],
        max_q=q.shape[0],
        starts_k=start,
        lengths_k=lengths[1],
        max_k=k.shape[0],
        is_causal=True,
        softmax_scale=power_of_two_scale(q.shape[2]),
        sliding_window=None,
        softcap=None,
        plan=plan,
        with_lse=True,
    )
    return request._replace(**options)


def power_of_two_scale(head_dim: int) -> float:
    """Return a factor near ``head_dim ** -0.5`` that rounds no score."""
    return 2.0 ** -math.ceil(math.log2(head_dim) / 2)


@st.composite
def cases(draw: st.DrawFn, longest: int = 80, batch: int = 3, placed: bool = False) -> Case:
    """Draw a case: ragged lengths with 0 and 1 among them, suffix queries, any heads, masks and N:M.

    With ``placed``, also positions that are not the default, and windows without causality.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_causal = draw(st.booleans())
    lengths_k = draw(st.lists(st.integers(0, longest), min_size=1, max_size=batch))
    lengths_q = [draw(st.integers(0, length if is_causal else longest)) for length in lengths_k]
    kv_heads, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim, value_dim = draw(st.sampled_from([(8, 8), (16, 12), (5, 3)]))
    m = draw(st.sampled_from([2, 4, 8, 16]))
    n = draw(st.integers(0, m))
    plan = top_n_plan(n, m, draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 3, 16, 200])))

    def packed(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
        gaps = [draw(st.integers(0, 2)) for _ in lengths]
        starts, row = [], 0
        for length, gap in zip(lengths, gaps, strict=True):
            starts.append(row + gap)
            row += gap + length
        return torch.tensor(starts), torch.tensor(lengths), row + draw(st.integers(0, 2))

    def tensor(starts: Tensor, lengths: Tensor, rows: int, heads: int, dim: int, exact: bool) -> Tensor:
        x = torch.full((rows, heads, dim), torch.nan)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            shape = (length, heads, dim)
            values = (
                torch.randint(-2, 3, shape, generator=generator) / 2
                if exact
                else torch.randn(shape, generator=generator)
            )
            x[start : start + length] = values
        return x

    starts_q, len_q, rows_q = packed(lengths_q)
    starts_k, len_k, rows_k = packed(lengths_k)
    first_q = draw(st.none() | st.just([draw(st.integers(0, longest)) for _ in lengths_q])) if placed else None
    first_k = draw(st.none() | st.just([draw(st.integers(0, 40)) for _ in lengths_k])) if placed else None
    request = AttentionRequest(
        q=tensor(starts_q, len_q, rows_q, kv_heads * repeat, head_dim, exact=True),
        k=tensor(starts_k, len_k, rows_k, kv_heads, head_dim, exact=True),
        v=tensor(starts_k, len_k, rows_k, kv_heads, value_dim, exact=False),
        s_aux=draw(st.none() | st.just(torch.randn(kv_heads * repeat, generator=generator))),
        starts_q=starts_q,
        lengths_q=len_q,
        max_q=max(lengths_q),
        starts_k=starts_k,
        lengths_k=len_k,
        max_k=max(lengths_k),
        is_causal=is_causal,
        softmax_scale=SCALE,
        sliding_window=draw(st.none() | st.integers(1, longest)) if is_causal or placed else None,
        softcap=draw(st.none() | st.just(2.0)),
        plan=plan,
        first_q=None if first_q is None else torch.tensor(first_q),
        first_k=None if first_k is None else torch.tensor(first_k),
        with_lse=True,
    )
    return Case(request, n, m)


def packed_request(
    lengths=RAGGED,
    heads=(4, 2),
    dims=(64, 64),
    dtype=torch.bfloat16,
    plan=DENSE,
    *,
    device="cuda",
    is_causal=True,
    sliding_window=None,
    softcap=None,
    s_aux=False,
    exact=True,
    seed=0,
):
    """Make a request of sequences with gaps of NaN between them.

    ``exact``: queries and keys are small multiples of 1/2, so that scores are exact in every precision and many tie.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def packed(lengths):
        starts, row = [], 3
        for length in lengths:
            starts.append(row)
            row += length + 2
        tensors = (torch.tensor(x, device=device, dtype=torch.int32) for x in (starts, lengths))
        return (*tensors, max(lengths)), row

    def tensor(packing, rows, heads, dim, exact):
        x = torch.full((rows, heads, dim), torch.nan, device=device, dtype=dtype)
        for start, length in zip(packing[0].tolist(), packing[1].tolist(), strict=True):
            shape = (length, heads, dim)
            values = (
                torch.randint(-2, 3, shape, generator=generator, device=device) / 2
                if exact
                else torch.randn(shape, generator=generator, device=device)
            )
            x[start : start + length] = values.to(dtype)
        return x

    packing_q, rows_q = packed([length for length, _ in lengths])
    packing_k, rows_k = packed([length for _, length in lengths])
    return AttentionRequest(
        q=tensor(packing_q, rows_q, heads[0], dims[0], exact),
        k=tensor(packing_k, rows_k, heads[1], dims[0], exact),
        v=tensor(packing_k, rows_k, heads[1], dims[1], exact=False),
        s_aux=torch.randn(heads[0], generator=generator, device=device) if s_aux else None,
        starts_q=packing_q[0],
        lengths_q=packing_q[1],
        max_q=packing_q[2],
        starts_k=packing_k[0],
        lengths_k=packing_k[1],
        max_k=packing_k[2],
        is_causal=is_causal,
        softmax_scale=power_of_two_scale(dims[0]),
        sliding_window=sliding_window,
        softcap=softcap,
        plan=plan,
        with_lse=True,
    )


def smallest_gap(request, n, m):
    """Return by how much the last of the N best visible scores of a group beats the next one, where that is least."""
    gaps = []
    dense = request._replace(plan=DENSE)
    for rows, keys, first_q, first_k in request.sequences():
        assert rows.stop - rows.start > 1, "a single query is dense"
        q, k = request.q[rows].detach().double(), request.k[keys].detach().double()
        scores = kept_scores(q, k, dense, first_q, first_k)
        groups = pad(scores, (first_k % m, -(first_k + scores.shape[-1]) % m), value=-torch.inf).unflatten(-1, (-1, m))
        best = groups.sort(-1, descending=True).values
        gaps.append((best[..., n - 1] - best[..., n])[best[..., n] > -torch.inf])
    return torch.cat(gaps).min()


def pytorch_attention(request):
    """Compute PyTorch's attention in the precision of the inputs, over the keys that the oracle keeps; FP64."""
    r, (q, k, v, s_aux) = request, request[:4]
    output = torch.zeros(*q.shape[:2], v.shape[2], device=q.device, dtype=torch.float64)
    for number, (rows, keys, first_q, first_k) in enumerate(r.sequences()):
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        listed = listed_blocks(r, number)
        scores = kept_scores(q[rows].detach().double(), k[keys].detach().double(), r, first_q, first_k, listed)
        kept = scores > -torch.inf
        alive = kept.any(-1, keepdim=True)
        mask = kept | ~alive  # a row without a key would be NaN, and so would all gradients
        # Contiguous, as PyTorch's kernels are picky about alignment.
        qs, ks, vs = (x.transpose(0, 1).contiguous() for x in (q[rows], k[keys], v[keys]))
        ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (ks, vs))
        if r.softcap is None and s_aux is None:
            options = {"attn_mask": mask[None], "scale": r.softmax_scale}
            result = scaled_dot_product_attention(qs[None], ks[None], vs[None], **options)[0]
        else:
            # In PyTorch's operations, as Transformers' eager attention has them.
            scores = qs @ ks.mT * r.softmax_scale
            if r.softcap is not None:
                scores = torch.tanh(scores / r.softcap) * r.softcap
            scores = scores.masked_fill(~mask, -torch.inf)
            if s_aux is not None:
                scores = torch.cat([scores, s_aux.to(q.dtype)[:, None, None].expand(*scores.shape[:2], 1)], -1)
            weights = torch.softmax(scores.float(), -1).to(q.dtype)[..., : mask.shape[-1]]
            result = weights @ vs
        output[rows] = result.masked_fill(~alive, 0.0).transpose(0, 1).double()
    return output


def doubled(request):
    """Return the request in FP64."""
    return request._replace(**{name: x.double() for name, x in tensors_of(request).items()})


def tensors_of(request):
    """Return the tensors of a request that have gradients, by name."""
    return {name: x for name in ("q", "k", "v", "s_aux") if (x := getattr(request, name)) is not None}


def check_in_a_graph(run, request):
    """Check that a run gives the same bits in a CUDA graph."""
    torch.use_deterministic_algorithms(False)  # or filling would be captured
    expected = run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = run(request)
    output.fill_(7.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])


def oracle(request):
    """Return the output of the oracle."""
    return attention_reference(request)[0]


def gradients(attend, grad, request):
    """Differentiate ``attend``, a function from a request to an output with the gradient ``grad``.

    Returns:
        The gradients of queries, keys, values and ``s_aux``, None if there is no ``s_aux``.
    """
    inputs = {name: x.detach().requires_grad_() for name, x in tensors_of(request).items()}
    output = attend(request._replace(**inputs))
    given = list(inputs.values())
    grads = torch.autograd.grad(output, given, grad.to(output.dtype), allow_unused=True, materialize_grads=True)
    return (*grads, None)[:4]


def error_bound(theirs, expected, rounding):
    """Return how far a kernel may be off: twice as far as PyTorch in the same precision, whose result is ``theirs``.

    Where PyTorch is exact by chance, ``rounding`` remains, relative to the largest element.
    """
    return 2 * torch.maximum((theirs.double() - expected).abs().max(), rounding * expected.abs().max())
