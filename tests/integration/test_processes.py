"""What leaves the process that made it, or outlives the model: exported programs, and pickled plans."""

import gc
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa
from modelopt_lite.kernels import attention, choice
from modelopt_lite.methods import SinkWindow, SparseSoftmax

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
RULES = {
    "sparse_softmax": {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 3},
    "sink_window": {"method": "sink_window", "dense_window_size": 3},
    "mean_pool_top_k": {"method": "mean_pool_top_k", "keep": 0.3, "block_size": 16, "block_rows": 16},
}
LENGTH = 37
# Another rule is used first, so that plans have other numbers than in the process that exported.
LOAD = """
import sys
import torch
import modelopt_lite.kernels
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
program = torch.export.load(folder + "/program.pt2").module()
q, one = torch.randn(8, 1, 8), torch.tensor([8])
for n in (3, 1):
    modelopt_lite.kernels.attention(q, q, q, one - 8, one, 8, sparsity_n=n, dense_window_size=n)
save_file({"output": program(load_file(folder + "/input.safetensors")["input"])}, folder + "/output.safetensors")
"""


def sparse(rule="sparse_softmax", layers=2, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(30)  # attention far from uniform, so that dropping keys matters
    return mtsa.sparsify(model, {"sparse_cfg": {"*": {**RULES[rule], **options}}})


@pytest.fixture
def ids():
    return torch.randint(SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1))


class Logits(torch.nn.Module):
    """A model from tokens to logits, as programs take and return tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


class Attend(torch.nn.Module):
    """The plain function with 2:4."""

    def forward(self, q):
        starts, lengths = torch.zeros(1, dtype=torch.int64), torch.full((1,), 64, dtype=torch.int64)
        return attention(q, q, q, starts, lengths, 64, sparsity_n=2, dense_window_size=0)


def run_elsewhere(module, x, folder):
    """Export a module, and run it on its input in another process."""
    torch.export.save(torch.export.export(module, (x,)), folder / "program.pt2")
    save_file({"input": x}, folder / "input.safetensors")
    subprocess.run([sys.executable, "-c", LOAD, str(folder)], check=True)
    return load_file(folder / "output.safetensors")["output"]


@torch.no_grad()
def test_an_exported_function_is_the_same_elsewhere(tmp_path):
    q = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    wanted = Attend()(q)
    assert (wanted - attention(q, q, q, torch.tensor([0]), torch.tensor([64]), 64)).abs().max() > 0.1
    assert torch.equal(run_elsewhere(Attend(), q, tmp_path), wanted)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_an_exported_model_is_the_same_elsewhere(rule, ids, tmp_path):
    model = Logits(sparse(rule))
    assert torch.equal(run_elsewhere(model, ids, tmp_path), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_a_program_outlives_its_model(rule, ids):
    model = Logits(sparse(rule, num_sink_tokens=2))
    wanted = model(ids)
    program = torch.export.export(model, (ids,)).module()
    del model
    gc.collect()
    assert torch.equal(program(ids), wanted)


def describe(thing):
    """Say in another process what arrived there, and send it back."""
    plan = thing.shared_plan() if isinstance(thing, mtsa.SparseAttentionMethod) else thing
    return plan.name, thing


def test_plans_and_methods_reach_another_process():
    methods = [SparseSoftmax(sparsity_n=1, num_sink_tokens=2), SinkWindow(dense_window_size=9)]
    things = [*methods, *(method.shared_plan() for method in methods)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(describe, things))
    names = [method.shared_plan().name for method in methods]
    assert [name for name, _ in found] == names * 2
    assert [thing for _, thing in found[:2]] == methods
    assert all(back is thing for (_, back), thing in zip(found[2:], things[2:], strict=True))


def load_and_run(file, ids):
    """Run a model that another process has saved."""
    with torch.no_grad():
        return torch.load(file, weights_only=False)(ids, use_cache=False).logits  # noqa: TID251


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_a_model_saved_whole_is_the_same_elsewhere(rule, ids, tmp_path):
    model = sparse(rule)
    torch.save(model, tmp_path / "model.pt")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(load_and_run, tmp_path / "model.pt", ids).result()
    assert torch.equal(found, model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_layers_that_are_compiled_by_themselves_share_one_graph(rule, ids):
    torch.compiler.reset()
    model, graphs = sparse(rule, layers=4), []
    wanted = model(ids, use_cache=False).logits

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_call_without_mask_has_as_many_sequences_as_there_are(batch, monkeypatch):
    """And as many as positions say, in the same graph."""
    seen, forward = [], choice.forward_blocked
    monkeypatch.setattr(choice, "_prepared", {})
    monkeypatch.setattr(
        choice, "forward_blocked", lambda request: seen.append(request.lengths_q.tolist()) or forward(request)
    )
    torch.compiler.reset()
    model = sparse(layers=1)
    ids = torch.randint(SIZES["vocab_size"], (batch, LENGTH))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    packed = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]).expand(batch, -1)
    for positions, lengths in ((None, [LENGTH]), (packed, [9, LENGTH - 9])):
        wanted = model(ids, position_ids=positions, use_cache=False).logits
        seen.clear()
        found = compiled(ids, position_ids=positions, use_cache=False).logits
        assert seen == [lengths * batch]
        torch.testing.assert_close(found, wanted)
