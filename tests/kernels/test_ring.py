"""The ring of context parallelism on the portable kernels, run by Triton's interpreter, without any other process."""

import os

import pytest
import torch
from test_backward_interpreter import FORWARD, FP32, POINTERS

from modelopt_lite.kernels import AttentionRequest
from modelopt_lite.kernels.portable import launch as portable_launch
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.request import ForwardResult
from modelopt_lite.methods import SparseSoftmax
from modelopt_lite.models.parallel import exchange, shards
from modelopt_lite.plan import DENSE

PROCESSES, LENGTH = 2, 61
PLANS = {"dense": DENSE, "2:4": SparseSoftmax(num_sink_tokens=3, dense_window_size=5).plan()}


@pytest.mark.usefixtures("poison")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # rows that keep nothing
@pytest.mark.parametrize("plan", PLANS)
def test_parts_of_the_ring_add_up(plan):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(LENGTH, heads, 16, generator=generator) for heads in (2, 1, 1, 2))
    wanted = [x.double().requires_grad_() for x in (q, k, v)]
    zero, length = torch.tensor([0]), torch.tensor([LENGTH])
    packing = (zero, length, LENGTH, zero, length, LENGTH)
    request = AttentionRequest(q, k, v, None, *packing, True, 0.25, None, None, PLANS[plan], with_lse=True)
    expected, expected_lse = attention_reference(request._replace(**dict(zip("qkv", wanted, strict=True))))
    expected.backward(grad.double())

    segments = [[shards.Segment(0, 0, torch.arange(LENGTH))]]
    sources, runs = shards.cut(segments, LENGTH, PROCESSES, 16)
    whole = {0: LENGTH}
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(PROCESSES):
        part = shards.Shards(None, rank, 1, LENGTH, sources, runs, runs, sources.shape[2], whole, whole, False, "ring")
        own, is_own = sources[rank, 0].clamp(min=0), sources[rank, 0] >= 0
        calls = []
        for source in range(PROCESSES):
            keys = sources[source, 0].clamp(min=0)
            local = request._replace(q=q[own], k=k[keys], v=v[keys])
            calls += [(keys, call) for call in exchange._calls(local, part, source)]
        merge = exchange._Merge(request._replace(q=q[own]))
        for _, call in calls:
            merge.add(*portable_launch.prepare(call.request, FORWARD)(call.request), call.rows)
        rows = own[is_own]
        torch.testing.assert_close(merge.output[is_own], expected[rows].float(), **FP32)
        torch.testing.assert_close(merge.lse[is_own], expected_lse[rows].float(), **FP32)
        for keys, call in calls:
            of_output, output, lse = (x[call.rows] for x in (grad[own], merge.output, merge.lse))
            differentiate = portable_launch.prepare_backward(of_output, call.request, POINTERS)
            grad_q, grad_k, grad_v, _ = differentiate(of_output, ForwardResult(output, lse), call.request)
            for total, places, x in zip(found, (own[call.rows], keys, keys), (grad_q, grad_k, grad_v), strict=True):
                total.index_add_(0, places, x)
    for total, leaf in zip(found, wanted, strict=True):
        torch.testing.assert_close(total, leaf.grad.float(), **FP32)
