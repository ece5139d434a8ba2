"""Batches as caches hold them, into the kernels without a copy."""

import sys
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa
from modelopt_lite.kernels import AttentionRequest, sdpa
from modelopt_lite.kernels.reference import attention_reference
from modelopt_lite.kernels.request import SCHEMA
from modelopt_lite.kernels.top_n import top_n_plan
from modelopt_lite.models import huggingface, layout
from modelopt_lite.models.huggingface import attention_forward
from modelopt_lite.models.module import count, run_dense
from modelopt_lite.models.transformers_masks import MaskRequest, note_positions
from modelopt_lite.plan import DENSE
from modelopt_lite.stats import LayerStatistics

BATCH, LEN_Q, SLOTS, HEAD_DIM = 3, 5, 20, 16
# FP32 rounding of exponentials, sums and products of numbers of order 1 over at most 20 keys.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sparse_attention(target):
    """Return a sparse attention module with 4 query and 2 kv heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).to(target[1])
    rule = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2, "backend": target[0]}
    return mtsa.sparsify(model, {"sparse_cfg": {"*": rule}}).model.layers[0].self_attn


@pytest.fixture
def seen(monkeypatch):
    """Keys and values that reach the kernels."""
    found = []

    def spy(request, backend):
        found.extend((request.k, request.v))
        return compute(request, backend)

    compute = layout.compute
    monkeypatch.setattr(layout, "compute", spy)
    return found


@pytest.mark.parametrize("len_q", [1, LEN_Q, SLOTS])
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@torch.no_grad()
def test_the_short_way_does_what_the_long_one_does(len_q, batch, heads_first, window, target):
    """Bit for bit, and it is taken wherever the rows of a batch follow each other."""
    module = sparse_attention(target)

    def tensor(heads, tokens):
        sizes = (batch, heads, tokens, HEAD_DIM) if heads_first else (batch, tokens, heads, HEAD_DIM)
        x = torch.randn(sizes, device=target[1])
        return x if heads_first else x.transpose(1, 2)

    query, key, value = tensor(4, len_q), tensor(2, SLOTS), tensor(2, SLOTS)
    rows = layout.whole_layout(batch, len_q, SLOTS, target[1], is_causal=True, sliding_window=window)
    for scaling, softcap in ((None, None), (0.5, 3.0)):
        found = layout.whole_call(module, query, key, value, rows, scaling, softcap)
        expected = layout.attend(module, query, key, value, rows, scaling=scaling, softcap=softcap)
        if found is None:  # decode steps that PyTorch's attention cannot do, and rows that are copied
            assert len_q == 1 or (heads_first and batch > 1)
        else:
            assert torch.equal(found, expected)
    assert module.sparse_attention.last_call is not None


@torch.no_grad()
def test_layers_of_one_forward_may_differ():
    """In heads, sizes and type: what the layer before them ran is not what they run."""
    module = sparse_attention(("auto", "cpu"))
    rows = layout.whole_layout(BATCH, 1, SLOTS, "cpu", is_causal=True)._replace(request=layout.SharedWork())
    shapes = ((4, 2, HEAD_DIM, HEAD_DIM), (4, 4, HEAD_DIM, HEAD_DIM), (6, 1, 8, 8), (4, 2, HEAD_DIM, 8))
    for (heads, kv_heads, dim, value_dim), dtype in (*product(shapes, (torch.float32, torch.float64)),) * 2:
        query = torch.randn(BATCH, 1, heads, dim, dtype=dtype).transpose(1, 2)
        key, value = (torch.randn(BATCH, SLOTS, kv_heads, x, dtype=dtype).transpose(1, 2) for x in (dim, value_dim))
        for softcap in (None, 2.0, None):
            found, _ = attention_forward(module, query, key, value, rows, softcap=softcap)
            assert torch.equal(found, layout.attend(module, query, key, value, rows, softcap=softcap))
            assert found.dtype == dtype
    with pytest.raises(mtsa.UnsupportedError, match="do not have the layout"):
        attention_forward(module, query, key[:, :, 1:], value[:, :, 1:], rows)


@pytest.mark.parametrize("len_q", [1, SLOTS])
@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_fewer_values_than_keys_are_refused(len_q, enabled):
    """PyTorch's attention on a CPU takes them without an error."""
    module = sparse_attention(("auto", "cpu"))
    module.sparse_attention.enabled = enabled
    rows = layout.whole_layout(1, len_q, SLOTS, "cpu", is_causal=True)._replace(request=layout.SharedWork())
    query, key = torch.randn(1, 4, len_q, HEAD_DIM), torch.randn(1, 2, SLOTS, HEAD_DIM)
    with pytest.raises(ValueError, match="v: float32"):
        attention_forward(module, query, key, key[:, :, 1:], rows)


@pytest.mark.parametrize("len_q", [1, SLOTS])
def test_what_layers_of_one_forward_are_told_may_differ(len_q):
    """A layer that was dense does not decide for others, in whatever way these are sparse, counted or refused."""
    module, other = sparse_attention(("auto", "cpu")), sparse_attention(("auto", "cpu"))
    module.sparse_attention.enabled = False
    query = torch.randn(1, 4, len_q, HEAD_DIM)
    key, value = torch.randn(2, 1, 2, SLOTS, HEAD_DIM)
    request = MaskRequest({"q_offset": SLOTS - len_q, "attention_mask": None})
    rows = layout.whole_layout(1, len_q, SLOTS, "cpu", is_causal=True)._replace(request=request)

    def call(which, **options):
        return attention_forward(which, query, key, value, rows, **options)[0]

    def long_way(which):
        return layout.attend(which, query, key, value, rows)

    with torch.no_grad():
        dense = call(module)
        assert request.dense is not None
        assert torch.equal(call(module, use_cache=True), dense)
        for enabled in (True, False):
            other.sparse_attention.enabled = enabled
            found = call(other)
            assert torch.equal(found, long_way(other))
            assert torch.equal(found, dense) == (len_q == 1 or not enabled)
        other.sparse_attention.enabled = True
        with run_dense([other]):
            assert torch.equal(call(other), dense)
        module.sparse_attention.enabled = True
        with count({module: (counted := LayerStatistics())}):
            call(module)
        assert any(counted.counts()) == (len_q > 1)
        for refused in ({"dropout": 0.5}, {"output_attentions": True}, {"head_mask": query}):
            with pytest.raises(mtsa.UnsupportedError):
                call(module, **refused)
    module.sparse_attention.enabled = False
    query.requires_grad_()
    assert call(module).requires_grad


@torch.no_grad()
def test_a_layer_that_a_kernel_computed_does_not_decide_for_others(target, monkeypatch):
    """Only layers like it are computed as it was, without a look at what decides that."""
    module, other = sparse_attention(target), sparse_attention(target)
    flags = other.sparse_attention
    flags.sparse_decision = flags.sparse_decision._replace(plan=top_n_plan(3, 4, 0, 2))
    tensors = [torch.randn(1, SLOTS, heads, HEAD_DIM, device=target[1]).transpose(1, 2) for heads in (4, 2, 2)]
    request = MaskRequest({"q_offset": 0, "attention_mask": None})
    rows = layout.whole_layout(1, SLOTS, SLOTS, target[1], is_causal=True)._replace(request=request)
    looks = []
    monkeypatch.setattr(huggingface, "whole_call", lambda *args: looks.append(args[0]) or layout.whole_call(*args))

    def call(which, *given, **options):
        found, _ = attention_forward(which, *(given or tensors), rows, **options)
        assert torch.equal(found, layout.attend(which, *(given or tensors), rows, **options))
        return found

    sparse = [call(module) for _ in range(3)][-1]
    assert len(looks) == 2  # at first nothing is known, then it has not been used yet
    with run_dense([module]):
        dense = call(module)
    for _ in range(2):
        assert torch.equal(call(module), sparse)
        assert not torch.equal(call(other), sparse)
        assert not torch.equal(call(module, scaling=0.5), sparse)
        assert not torch.equal(call(module, softcap=0.5), sparse)
        assert torch.equal(call(module, *(x.contiguous() for x in tensors)), sparse)
        with torch.autocast(target[1], torch.bfloat16):
            assert call(module).dtype == torch.bfloat16
        with run_dense([module]):
            assert torch.equal(call(module), dense)
        module.sparse_attention.enabled = False
        assert torch.equal(call(module), dense)
        module.sparse_attention.enabled = True
    assert not torch.equal(dense, sparse)
    with count({module: (counted := LayerStatistics())}):
        call(module)
    assert any(counted.counts())
    packed = torch.cat([torch.arange(8), torch.arange(SLOTS - 8)])[None].to(target[1])
    note_positions(packed, None)
    found, _ = attention_forward(module, *tensors, rows, position_ids=packed)
    parts = [[x[:, :, part] for x in tensors] for part in (slice(8), slice(8, None))]
    alone = [layout.whole_layout(1, n, n, target[1], is_causal=True) for n in (8, SLOTS - 8)]
    expected = [layout.attend(module, *part, each) for part, each in zip(parts, alone, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected, dim=1), **CLOSE)


@torch.no_grad()
def test_a_layer_may_be_vectorized_after_others_were_not():
    module = sparse_attention(("auto", "cpu"))
    tensors = [torch.randn(3, 1, heads, SLOTS, HEAD_DIM) for heads in (4, 2, 2)]
    rows = layout.whole_layout(1, SLOTS, SLOTS, "cpu", is_causal=True)._replace(request=layout.SharedWork())

    def call(*tensors):
        return attention_forward(module, *tensors, rows)[0]

    expected = torch.stack([call(*each) for each in zip(*tensors, strict=True)])
    assert rows.request.last is not None
    torch.testing.assert_close(torch.vmap(call)(*tensors), expected, **CLOSE)


@torch.no_grad()
def test_a_compiled_model_can_be_vectorized_over_masks():
    model = tiny_model({"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2})
    tokens, mask = torch.randint(8, (3, 1, 24)), torch.ones(3, 1, 24, dtype=torch.long)
    mask[1, 0, :5] = 0

    def logits(tokens, mask):
        return model(tokens, attention_mask=mask, use_cache=False).logits

    expected = torch.stack([logits(*each) for each in zip(tokens, mask, strict=True)])
    torch.compiler.reset()
    found = torch.compile(torch.vmap(logits), fullgraph=True, backend="aot_eager")(tokens, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def tiny_model(method):
    """Return a sparse Llama of three layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 8}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    return mtsa.sparsify(model, {"sparse_cfg": {"*": method}})


@pytest.mark.parametrize(("padded", "use_cache"), [(False, True), (True, False), (False, False)])
@torch.no_grad()
def test_layers_of_a_graph_share_starts_and_lengths(padded, use_cache):
    """Else each layer would compute each of them in a kernel of its own."""
    model, calls, others = tiny_model({"method": "sparse_softmax", "sparsity_n": 1}), [], []

    def backend(graph, _):
        for node in graph.graph.nodes:
            if "modelopt_lite.attention" in str(node.target):
                calls.append(dict(zip(SCHEMA, node.args, strict=False)))
            elif "modelopt_lite" in str(node.target):
                others.append(str(node.target))
        return graph

    tokens, mask = torch.randint(8, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[1, :7] = 0
    given = {"input_ids": tokens, "attention_mask": mask if padded else None, "use_cache": use_cache}
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend=backend)(**given).logits
    real = mask.bool() if padded else slice(None)
    torch.testing.assert_close(found[real], model(**given).logits[real], **CLOSE)
    # Without a mask and a cache, there may be packed sequences.
    assert others == ["modelopt_lite.hold" if padded or use_cache else "modelopt_lite.pack"]
    assert len(calls) == 3
    for start, length in (("starts_q", "lengths_q"), ("starts_k", "lengths_k")):
        assert {(call[start], call[length]) for call in calls} == {(calls[0]["starts_q"], calls[0]["lengths_q"])}
    assert {call["output_rows"] for call in calls} == {calls[0]["output_rows"]}
    assert (calls[0]["output_rows"] is not None) == padded


@torch.no_grad()
def test_a_sparse_model_can_be_vectorized():
    """``torch.vmap`` hands over tensors without memory of their own."""
    model = tiny_model({"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 2})
    tokens = torch.randint(8, (3, 1, 24))
    found = torch.vmap(lambda x: model(x, use_cache=False).logits)(tokens)
    torch.testing.assert_close(found, torch.stack([model(x).logits for x in tokens]), **CLOSE)


@torch.no_grad()
def test_a_counted_layer_beside_others_counts_its_blocks():
    """A plan whose selector has no choice counts as dense, but not where it is counted."""
    model = tiny_model({"method": "mean_pool_top_k", "keep": 0.5, "block_size": 16, "block_rows": 16})
    tokens = torch.randint(8, (1, 24))
    visited = []
    for counted in (model, model.model.layers[1:]):
        cache = model(tokens[:, :8]).past_key_values
        with mtsa.collect_statistics(counted) as found:
            model(tokens[:, 8:], past_key_values=cache)
        visited.append([layer.blocks_visited for layer in found.layers.values()][-2:])
    assert visited[0] == visited[1]
    assert all(visited[1])


@pytest.mark.parametrize("method", ["mean_pool_top_k", "flash_prefill", "xattention"])
@torch.no_grad()
def test_counting_layers_computes_what_others_do(method):
    """In the first layer of a forward, and in the later ones, which follow what it has prepared."""
    sizes = {"block_size": 16, "block_rows": 16, "first_blocks": 1, "recent_blocks": 1}
    model, tokens = tiny_model({"method": method, **sizes}), torch.randint(8, (2, 70))
    expected = model(tokens).logits
    with mtsa.collect_statistics(model) as found:
        assert torch.equal(model(tokens).logits, expected)
        counted = [layer.counts() for layer in found.layers.values()]
    assert torch.equal(model(tokens).logits, expected)
    for module in model.model.layers:
        with mtsa.collect_statistics(module) as alone:
            model(tokens)
        assert [layer.counts() for layer in alone.layers.values()] == [counted.pop(0)]


def test_a_call_of_the_models_own_is_made():
    """Between a call of a module and its forward."""
    model, calls = tiny_model({"method": "sparse_softmax"}), []
    module = mtsa.unsparsify(model).model.layers[0].self_attn

    class Noted(type(module)):
        def _call_impl(self, *args, **kwargs):
            calls.append(self)
            return super()._call_impl(*args, **kwargs)

    module.__class__ = Noted
    mtsa.sparsify(model, "sparse_softmax")(torch.randint(8, (1, 24)))
    assert calls == [module]


@pytest.mark.parametrize("len_q", [1, LEN_Q])
@pytest.mark.parametrize("spare", [0, 7])
def test_a_cache_is_not_copied(len_q, spare, target, seen):
    """Slots of one head side by side, all of a static cache's or fewer; some rows shorter, one empty and at the end."""
    module = sparse_attention(target)
    query = torch.randn(BATCH, 4, len_q, HEAD_DIM, device=target[1])
    cache = torch.randn(2, BATCH, 2, SLOTS + spare, HEAD_DIM, device=target[1])
    cache[..., SLOTS:, :] = torch.nan
    key, value = cache[..., :SLOTS, :]
    rows = layout.whole_layout(
        BATCH, len_q, SLOTS, target[1], is_causal=True, used=torch.tensor([20, 7, 13]).to(key.device)
    )
    none = torch.zeros_like(rows.starts_q[:1])
    rows = rows._replace(
        starts_q=torch.cat([rows.starts_q, none + BATCH * len_q]),
        lengths_q=torch.cat([rows.lengths_q, none]),
        starts_k=torch.cat([rows.starts_k, none + BATCH * SLOTS]),
        lengths_k=torch.cat([rows.lengths_k, none]),
    )
    out = layout.attend(module, query, key, value, rows)
    assert all(x.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr() for x in seen)
    # As projections come out, with the heads of one token side by side.
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    torch.testing.assert_close(layout.attend(module, query, key, value, rows), out, rtol=0, atol=0)


def test_gradients_of_a_cache_are_no_larger(target, seen):
    module = sparse_attention(target)
    query = torch.randn(BATCH, 4, SLOTS, HEAD_DIM, device=target[1])
    rows = layout.whole_layout(BATCH, SLOTS, SLOTS, target[1], is_causal=True)
    key = torch.randn(BATCH, 2, SLOTS, HEAD_DIM, device=target[1], requires_grad=True)
    layout.attend(module, query, key, key, rows).square().sum().backward()
    other = key.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    layout.attend(module, query, other, other, rows).square().sum().backward()
    torch.testing.assert_close(other.grad, key.grad)
    assert {x.shape[0] for x in seen} == {BATCH * SLOTS}


@pytest.fixture
def calls(monkeypatch):
    """Which attention ran: ``"PyTorch"`` or ``"ours"``."""
    found = []
    sdpa, compute = layout.sdpa, layout.compute

    def spy(*xs, **options):
        out = sdpa(*xs, **options)
        if out is not None:
            found.append("PyTorch")
        return out

    monkeypatch.setattr(layout, "sdpa", spy)
    monkeypatch.setattr(layout, "compute", lambda *arguments: found.append("ours") or compute(*arguments))
    return found


def tensors(len_q, slots, heads=(4, 2), device="cpu", dtype=torch.float32):
    """Return random queries, keys and values as modules have them, with the heads of a token side by side."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (BATCH, length, count, HEAD_DIM)
        for length, count in zip((len_q, slots, slots), (*heads, heads[1]), strict=True)
    )
    return [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]


def expected_of(query, key, value, **options):
    """Return the oracle's output, each row being a sequence of its own."""
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        lengths = [torch.tensor([x.shape[1]], device=x.device) for x in (q, k)]
        request = AttentionRequest(
            q=q.transpose(0, 1), k=k.transpose(0, 1), v=v.transpose(0, 1), s_aux=None, starts_q=0 * lengths[0],
            lengths_q=lengths[0], max_q=q.shape[1], starts_k=0 * lengths[1], lengths_k=lengths[1], max_k=k.shape[1],
            is_causal=True, softmax_scale=HEAD_DIM**-0.5, sliding_window=None, softcap=None, plan=DENSE,
        )._replace(**options)  # fmt: skip
        rows.append(attention_reference(request)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("len_q", "is_causal"), [(SLOTS, True), (SLOTS, False), (LEN_Q, False), (1, True), (1, False)])
def test_dense_layers_without_padding_run_on_pytorchs_attention(len_q, is_causal, heads, calls):
    query, key, value = (x.requires_grad_() for x in tensors(len_q, SLOTS, heads))
    rows = layout.whole_layout(BATCH, len_q, SLOTS, "cpu", is_causal=is_causal)
    out = layout.attend(torch.nn.Identity(), query, key, value, rows)
    assert calls == ["PyTorch"]
    exact = expected_of(query, key, value, is_causal=is_causal)
    bias = torch.ones(len_q, SLOTS, dtype=torch.bool).tril(SLOTS - len_q) if is_causal else None
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True).transpose(1, 2)
    for ours, other, right in ((out, theirs, exact), *gradients_of((out, theirs, exact), (query, key, value))):
        error, bound = ((x - right).abs().max() for x in (ours, other))
        assert error <= 2 * max(bound, 2**-24 * right.abs().max())


def gradients_of(outputs, inputs):
    """Return the gradients of each input, from each output."""
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    columns = [torch.autograd.grad(x, inputs, direction.to(x.dtype)) for x in outputs]
    return zip(*columns, strict=True)


PADDED = torch.arange(SLOTS) >= torch.tensor([[0], [3], [11]])
OURS = {
    "softcap": ({"softcap": 2.0}, {}),
    "s_aux": ({"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {}),
    "sliding window": ({}, {"sliding_window": 7}),
    "sliding window, not causal": ({}, {"sliding_window": 7, "is_causal": False}),
}


@pytest.mark.parametrize(("options", "layout_options"), OURS.values(), ids=OURS.keys())
def test_what_pytorchs_attention_does_not_know_runs_on_ours(options, layout_options, calls):
    query, key, value = tensors(SLOTS, SLOTS)
    rows = layout.whole_layout(BATCH, SLOTS, SLOTS, "cpu", **{"is_causal": True, **layout_options})
    out = layout.attend(torch.nn.Identity(), query, key, value, rows, **options)
    assert calls == ["ours"]
    torch.testing.assert_close(out.double(), expected_of(query, key, value, **options, **layout_options), **CLOSE)


def test_a_window_as_wide_as_the_keys_is_none(calls):
    rows = layout.whole_layout(BATCH, SLOTS, SLOTS, "cpu", is_causal=True, sliding_window=SLOTS)
    query, key, value = tensors(SLOTS, SLOTS)
    out = layout.attend(torch.nn.Identity(), query, key, value, rows)
    assert calls == ["PyTorch"]
    torch.testing.assert_close(out.double(), expected_of(query, key, value), **CLOSE)


def test_a_chunk_of_queries_runs_on_ours(calls):
    """PyTorch's causal mask would begin at the first key."""
    rows = layout.whole_layout(BATCH, LEN_Q, SLOTS, "cpu", is_causal=True)
    query, key, value = tensors(LEN_Q, SLOTS)
    out = layout.attend(torch.nn.Identity(), query, key, value, rows)
    assert calls == ["ours"]
    torch.testing.assert_close(out.double(), expected_of(query, key, value), **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_runs_on_ours(is_causal, calls):
    query, key, value = tensors(SLOTS, SLOTS)
    rows = layout.padded_layout(PADDED, SLOTS, 0, is_causal=is_causal)
    out = layout.attend(torch.nn.Identity(), query, key, value, rows)
    assert calls == ["ours"]
    for row, real in enumerate(PADDED):
        alone = expected_of(*(x[row : row + 1, :, real] for x in (query, key, value)), is_causal=is_causal)
        torch.testing.assert_close(out[row, real].double(), alone[0], **CLOSE)


def test_a_mask_of_ones_is_no_padding(calls):
    query, key, value = tensors(SLOTS, SLOTS)
    rows = layout.padded_layout(torch.ones(BATCH, SLOTS, dtype=torch.bool), SLOTS, 0, is_causal=True)
    out = layout.attend(torch.nn.Identity(), query, key, value, rows)
    assert calls == ["PyTorch"]
    torch.testing.assert_close(out.double(), expected_of(query, key, value), **CLOSE)


@pytest.mark.parametrize("len_q", [1, SLOTS])
def test_only_decode_of_a_sparse_layer_runs_on_pytorchs_attention(len_q, calls):
    """And nothing, where a backend is asked for."""
    query, key, value = tensors(len_q, SLOTS)
    rows = layout.whole_layout(BATCH, len_q, SLOTS, "cpu", is_causal=True)
    for backend in ("auto", "torch"):
        layout.attend(sparse_attention((backend, "cpu")), query, key, value, rows)
    assert calls == ["PyTorch" if len_q == 1 else "ours", "ours"]


@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim", "is_ours"),
    [
        (1, (9, 3), 8192, 64, False),
        (1, (32, 8), 8192, 64, True),
        (1, (32, 8), 1024, 128, False),
        (1, (32, 8), 2048, 128, True),
        (1, (16, 8), 2048, 128, False),
        (8, (16, 8), 2048, 128, True),
    ],
)
@torch.no_grad()
def test_dense_calls_run_on_the_hopper_kernel_where_they_are_work_enough(
    batch, heads, length, head_dim, is_ours, monkeypatch
):
    monkeypatch.setattr(sys.modules[sdpa.__module__], "_has_hopper_kernel", lambda device: True)
    with FakeTensorMode():
        query, key = (
            torch.empty(batch, count, length, head_dim, device="cuda", dtype=torch.bfloat16) for count in heads
        )
        out = sdpa(query, key, key, is_causal=True)
    assert (out is None) == is_ours
