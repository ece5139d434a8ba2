"""Batches as caches hold them, into the kernels without a copy."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa
from modelopt_lite import layout

BATCH, LEN_Q, SLOTS, HEAD_DIM = 3, 5, 20, 16


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
