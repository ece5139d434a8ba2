"""Modules that call PyTorch's scaled_dot_product_attention themselves, as hand-written GPTs do."""

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import modelopt_lite as mtsa

LENGTH, WIDTH, HEADS = 37, 32, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# In FP32 twice what the dense model's outputs err against FP64: up to 2.26e-5, as scores are up to 72.
CLOSE_ON = {"cpu": CLOSE, "cuda": {"rtol": 0, "atol": 4.5e-5}}
# In FP64 no two scores are so close that rounding decides between them; the Triton kernels know FP32.
TYPES = {"cpu": torch.float64, "cuda": torch.float32}
ENTRY = {"method": "sparse_softmax", "sparsity_n": 1, "dense_window_size": 3, "num_sink_tokens": 1}
CONFIG = {"sparse_cfg": {"*": ENTRY}}


def config_for(target, n=1):
    return {"sparse_cfg": {"*": {**ENTRY, "sparsity_n": n, "backend": target[0]}}}


def place(target):
    return {"device": target[1], "dtype": TYPES[target[1]]}


class SelfAttention(nn.Module):
    """Attention as people write it: PyTorch's function, called in the forward."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.dropout = 0.0
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * kv_heads * WIDTH // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        query = self.query(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        key, value = self.key_value(x).view(*x.shape[:2], 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x, **options):
        query, key, value = self.heads(x)
        gqa = self.kv_heads not in (1, HEADS)
        y = scaled_dot_product_attention(query, key, value, enable_gqa=gqa, dropout_p=self.dropout, **options)
        return self.out(y.transpose(1, 2).flatten(2))


class Processor:
    """As in diffusers: the call stands outside of the module's forward."""

    def __call__(self, attention, x, **options):
        query, key, value = attention.heads(x)
        return attention.out(scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2))


class ProcessedAttention(SelfAttention):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x, **options):
        return self.processor(self, x, **options)


class Model(nn.Module):
    """Blocks with whatever attention, causal or not."""

    def __init__(self, make_attention=SelfAttention, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": make_attention()}) for _ in range(layers)])

    def forward(self, x, **options):
        for block in self.blocks:
            x = x + block["attn"](x, **options)
        return x


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(make_attention=SelfAttention):
    torch.manual_seed(0)
    made = Model(make_attention).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(4 if name.endswith(("query.weight", "key_value.weight")) else 1)
    return made


@pytest.fixture
def x():
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(a_model, x, **options):
    return a_model(x, **options)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_sparse_dense_and_back(x, is_causal, kv_heads, target):
    made, x = model(lambda: SelfAttention(kv_heads)).to(**place(target)), x.to(**place(target))
    before, classes = run(made, x, is_causal=is_causal), [type(module) for module in made.modules()]
    assert mtsa.sparsify(made, config_for(target)) is made
    assert [row.name for row in mtsa.summary(made)] == ["blocks.0.attn", "blocks.1.attn"]
    assert isinstance(made.blocks[0]["attn"], SelfAttention)
    with mtsa.collect_statistics(made) as statistics:
        sparse = run(made, x, is_causal=is_causal)
    assert (sparse - before).abs().max() > 0.01
    assert all(0.1 < row.sparsity < 0.9 for row in mtsa.summary(made, statistics))
    assert "dropped" in str(mtsa.summary(made, statistics))
    with mtsa.disabled(made):
        torch.testing.assert_close(run(made, x, is_causal=is_causal), before, rtol=0, atol=0)
    mtsa.sparsify(made, config_for(target, n=4))
    torch.testing.assert_close(run(made, x, is_causal=is_causal), before, **CLOSE_ON[target[1]])
    mtsa.unsparsify(made)
    assert [type(module) for module in made.modules()] == classes
    torch.testing.assert_close(run(made, x, is_causal=is_causal), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_backends_agree(x, is_causal, target):
    """With what PyTorch computes in FP64."""
    made = mtsa.sparsify(model().to(**place(target)), config_for(target))
    wanted = run(mtsa.sparsify(model(), config_for(("torch", "cpu"))), x, is_causal=is_causal)
    found = run(made, x.to(**place(target)), is_causal=is_causal)
    torch.testing.assert_close(found.to(wanted), wanted, **CLOSE_ON[target[1]])


def causal_mask(lengths, side, as_float, target):
    """Where tokens are real, ``[batch, LENGTH]``, and a causal batch's mask, ``[batch, 1, LENGTH, LENGTH]``."""
    real = torch.zeros(len(lengths), LENGTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = LENGTH - length if side == "left" else 0
        real[row, start : start + length] = True
    mask = (real[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None].to(target[1])
    return real, torch.zeros(mask.shape, **place(target)).masked_fill(~mask, -torch.inf) if as_float else mask


@pytest.mark.parametrize("as_float", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(37, 20), (5, 30)])
def test_causal_masks_with_padding(x, lengths, side, as_float, target):
    made, x = mtsa.sparsify(model().to(**place(target)), config_for(target)), x.to(**place(target))
    real, mask = causal_mask(lengths, side, as_float, target)
    together = run(made, x, attn_mask=mask)
    for row in range(2):
        alone = run(made, x[row : row + 1, real[row]], is_causal=True)
        torch.testing.assert_close(together[row, real[row]], alone[0], **CLOSE_ON[target[1]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_bidirectional_masks_with_padding(x, side, target):
    made, x = mtsa.sparsify(model().to(**place(target)), config_for(target)), x.to(**place(target))
    real, _ = causal_mask((37, 20), side, False, target)
    together = run(made, x, attn_mask=real[:, None, None].to(target[1]))
    for row in range(2):
        alone = run(made, x[row : row + 1, real[row]])
        torch.testing.assert_close(together[row, real[row]], alone[0], **CLOSE_ON[target[1]])


class CachedAttention(SelfAttention):
    """A cache of fixed size, and a mask over all of its slots, used or not."""

    def reset(self):
        self.cache = self.out.weight.new_zeros(2, 2, HEADS, LENGTH + 3, WIDTH // HEADS)

    def forward(self, x, position):
        query, *new = self.heads(x)
        stop = position + x.shape[1]
        for cached, part in zip(self.cache, new, strict=True):
            cached[:, :, position:stop] = part
        mask = torch.arange(LENGTH + 3) <= torch.arange(position, stop)[:, None]
        y = scaled_dot_product_attention(query, *self.cache, attn_mask=mask.to(x.device))
        return self.out(y.transpose(1, 2).flatten(2))


def test_chunks_over_a_static_cache(x, target):
    """Prefill in chunks, then decode: the mask's used slots say where the queries stand."""
    made, x = mtsa.sparsify(model(CachedAttention).to(**place(target)), config_for(target)), x.to(**place(target))

    def chunks(*cuts):
        for block in made.blocks:
            block["attn"].reset()
        edges = [0, *cuts, LENGTH]
        return torch.cat([run(made, x[:, a:b], position=a) for a, b in pairwise(edges)], dim=1)

    torch.testing.assert_close(chunks(13, 19), chunks(), **CLOSE_ON[target[1]])
    dense = model(CachedAttention).to(**place(target))
    for block, other in zip(made.blocks, dense.blocks, strict=True):
        other["attn"].cache = block["attn"].cache.clone()
    decoded = [run(each, x[:, :1], position=LENGTH) for each in (made, dense)]
    torch.testing.assert_close(*decoded, **CLOSE_ON[target[1]])


def loss_of(made, x):
    return made(x, is_causal=True).square().mean()


def gradients(target, config, x):
    """Return a model's gradients, in FP64 on the CPU."""
    made = model().to(**place(target))
    if config is not None:
        mtsa.sparsify(made, config)
    loss_of(made, x.to(**place(target))).backward()
    return [parameter.grad.cpu().double() for parameter in made.parameters()]


def test_gradients(x, target):
    """Those of the dense model where n = m, and else what finite differences say, which keep the same keys."""
    exact = ("torch", "cpu")
    tolerance = {"cpu": 1e-10, "cuda": 5e-5}[target[1]]  # of the largest
    sparse = gradients(exact, config_for(exact), x)
    for found, wanted in [
        (gradients(target, config_for(target, n=4), x), gradients(exact, None, x)),
        (gradients(target, config_for(target), x), sparse),
    ]:
        largest = max(gradient.abs().max() for gradient in wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)
    made, step = mtsa.sparsify(model(), config_for(exact)), 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            moved = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in sparse]
            for parameter, direction in zip(made.parameters(), moved, strict=True):
                parameter.add_(direction, alpha=sign * step)
            losses.append(loss_of(made, x))
            for parameter, direction in zip(made.parameters(), moved, strict=True):
                parameter.sub_(direction, alpha=sign * step)
    slope = sum((gradient * direction).sum() for gradient, direction in zip(sparse, moved, strict=True))
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-6, atol=1e-6)


def helper(*heads, **options):
    return scaled_dot_product_attention(*heads, **options)


sdpa = scaled_dot_product_attention


class ByFunction(SelfAttention):
    def forward(self, x, **options):
        return self.out(helper(*self.heads(x), **options).transpose(1, 2).flatten(2))


class ByAlias(SelfAttention):
    def forward(self, x, **options):
        return self.out(sdpa(*self.heads(x), **options).transpose(1, 2).flatten(2))


class ByMethod(SelfAttention):
    @staticmethod
    def attend(*heads, **options):
        return nn.functional.scaled_dot_product_attention(*heads, **options)

    def forward(self, x, **options):
        return self.out(self.attend(*self.heads(x), **options).transpose(1, 2).flatten(2))


class ByParent(SelfAttention):
    def forward(self, x, **options):
        return super().forward(x, **options)


class ByInnerFunction(SelfAttention):
    def forward(self, x, **options):
        rows = [scaled_dot_product_attention(*row, **options) for row in zip(*self.heads(x), strict=True)]
        return self.out(torch.stack(rows).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("other", [ByFunction, ByAlias, ByMethod, ByParent])
def test_calls_by_a_helper_are_found(x, other):
    """Also beside a module that is found anyway."""
    kinds = iter([SelfAttention, other])
    made = mtsa.sparsify(model(lambda: next(kinds)()), CONFIG)
    assert [row.class_name for row in mtsa.summary(made)] == ["SelfAttention", other.__name__]
    torch.testing.assert_close(run(made, x, is_causal=True), run(mtsa.sparsify(model(), CONFIG), x, is_causal=True))


def test_calls_of_an_inner_function_are_found():
    assert len(mtsa.summary(mtsa.sparsify(model(ByInnerFunction), CONFIG))) == 2


def test_what_is_not_found_stays_dense_unless_it_is_pointed_out(x):
    """As the documentation says; also once it is pointed out no longer."""

    def made():
        kinds = iter([SelfAttention, ProcessedAttention])
        return model(lambda: next(kinds)())

    found, all_of_them = (mtsa.sparsify(made(), CONFIG, attention=more) for more in (None, ProcessedAttention))
    assert [row.name for row in mtsa.summary(found)] == ["blocks.0.attn"]
    assert [row.name for row in mtsa.summary(all_of_them)] == ["blocks.0.attn", "blocks.1.attn"]
    assert (run(found, x) - run(all_of_them, x)).abs().max() > 0.01
    mtsa.sparsify(all_of_them, CONFIG)
    assert mtsa.summary(all_of_them) == [replace(row, active=None) for row in mtsa.summary(found)]
    torch.testing.assert_close(run(found, x), run(all_of_them, x), rtol=0, atol=0)


@pytest.mark.parametrize("attention", [ProcessedAttention, (ProcessedAttention, nn.Identity), "*.attn"])
def test_modules_pointed_out(x, attention):
    before = run(model(ProcessedAttention), x, is_causal=True)
    with pytest.raises(mtsa.UnsupportedError, match="Model has no attention module.*say which with attention="):
        mtsa.sparsify(model(ProcessedAttention), CONFIG)
    made = mtsa.sparsify(model(ProcessedAttention), CONFIG, attention=attention)
    assert (run(made, x, is_causal=True) - before).abs().max() > 0.01
    # The same weights in attention that is found by itself give the same.
    torch.testing.assert_close(run(made, x, is_causal=True), run(mtsa.sparsify(model(), CONFIG), x, is_causal=True))


def test_compiles_without_graph_breaks(x):
    made = mtsa.sparsify(model(), CONFIG)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, is_causal=True), run(made, x, is_causal=True), **CLOSE)


LOWER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_between_real_tokens_counts_for_nothing(x, is_causal):
    made, real = mtsa.sparsify(model(), CONFIG), torch.arange(LENGTH) % 5 > 0
    together = run(made, x, attn_mask=real & LOWER if is_causal else real[None, None, None])
    torch.testing.assert_close(together[:, real], run(made, x[:, real], is_causal=is_causal), **CLOSE)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_sliding_window_of_a_finished_mask(x, width):
    """Later tokens are the same whatever was before the window, in each layer."""
    made, mask = mtsa.sparsify(model(lambda: SelfAttention()), CONFIG), LOWER & ~LOWER.tril(-width)
    wanted = run(model(), x, attn_mask=mask)
    torch.testing.assert_close(run(mtsa.sparsify(made, config_for(("auto",), n=4)), x, attn_mask=mask), wanted, **CLOSE)
    mtsa.sparsify(made, CONFIG)
    changed = x.clone()
    changed[:, :4] += 1
    reach = 4 + 2 * (width - 1)
    found, other = (run(made, y, attn_mask=mask)[:, reach:] for y in (x, changed))
    torch.testing.assert_close(found, other, **CLOSE)


REFUSED = {
    "bias": ({"attn_mask": torch.randn(LENGTH, LENGTH, dtype=torch.float64)}, "its attention mask is not supported"),
    "-100": (
        {"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~LOWER, -1e2)},
        "its attention mask is not supported; it must be boolean, or 0 and -10000 or less, the same for all heads",
    ),
    "per head": ({"attn_mask": torch.rand(1, HEADS, LENGTH, LENGTH) < 0.5}, "its attention mask is not supported"),
    "steps": ({"attn_mask": LOWER & ~LOWER.tril(-8) | LOWER.tril(-30)}, "its attention mask is not supported"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_masks_that_cannot_be_expressed_are_refused(x, options, message):
    made = mtsa.sparsify(model(), CONFIG)
    with pytest.raises(mtsa.UnsupportedError, match=rf"blocks.0.attn \(SparseSelfAttention\): {message}"):
        run(made, x, **options)
    with mtsa.disabled(made):
        torch.testing.assert_close(run(made, x, **options), run(model(), x, **options), rtol=0, atol=0)


def test_other_refusals(x):
    made = mtsa.sparsify(model(), CONFIG)
    made.blocks[0]["attn"].dropout = 0.1
    with pytest.raises(mtsa.UnsupportedError, match=r"blocks.0.attn .*: attention dropout \(0.1\) is not supported"):
        run(made, x)
    with pytest.raises(mtsa.ConfigError, match="attention: 'nope' matches no module; there are blocks, blocks.0"):
        mtsa.sparsify(model(), CONFIG, attention="nope")
    with pytest.raises(mtsa.UnsupportedError, match=r"0 \(MultiheadAttention\): .* out of reach"):
        mtsa.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2)), CONFIG, attention=nn.MultiheadAttention)


class Call(nn.Module):
    """Nothing but PyTorch's attention."""

    def forward(self, query, key, **options):
        return scaled_dot_product_attention(query, key, key, **options)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((5, 8), (5, 8), r"queries with 2 dimensions are not supported; \[batch, heads, tokens, dim\] are"),
        ((1, 2, 3, 5, 8), (1, 2, 3, 5, 8), "queries with 5 dimensions are not supported"),
        ((1, 4, 5, 8), (1, 2, 5, 8), "4 query heads and 2 key heads need enable_gqa"),
    ],
)
def test_shapes_that_are_refused(query, key, message):
    made = mtsa.sparsify(nn.Sequential(Call()), CONFIG)
    with pytest.raises(mtsa.UnsupportedError, match=rf"0 \(SparseCall\): {message}"):
        made[0](torch.ones(query), torch.ones(key))


def test_masks_are_refused_while_a_graph_is_traced(x):
    compiled = torch.compile(mtsa.sparsify(model(), CONFIG), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="its attention mask is not supported"):
        run(compiled, x, attn_mask=LOWER)


class Undecided(SelfAttention):
    by_hand = fails = breaks = False

    def forward(self, x, **options):
        if self.breaks:
            torch._dynamo.graph_break()
        if not self.by_hand:
            found = super().forward(x, **options)
            if self.fails:
                raise RuntimeError("boom")
            return found
        query, key, value = self.heads(x)
        return self.out(((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2))


class CrossAttention(SelfAttention):
    pass


def says(attribute):
    def make():
        made = SelfAttention()
        setattr(made, attribute, True)
        return made

    return make


@pytest.mark.parametrize(
    "make", [CrossAttention, says("is_cross_attention"), says("is_decoder")], ids=["class", "attribute", "decoder"]
)
def test_cross_attention_with_as_many_queries_as_keys_has_no_dense_window(x, make, target):
    """And none but it: with the same weights, self-attention without a window gives the same, with one another."""
    x = x.to(**place(target))

    def result(make_attention, window, **options):
        entry = config_for(target)["sparse_cfg"]["*"] | {"dense_window_size": window}
        made = model(make_attention).to(**place(target))
        return run(mtsa.sparsify(made, {"sparse_cfg": {"*": entry}}), x, **options)

    without = result(SelfAttention, 0)
    torch.testing.assert_close(result(make, 3), without, **CLOSE_ON[target[1]])
    assert (result(SelfAttention, 3) - without).abs().max() > 0.01
    causal = [result(each, 3, is_causal=True) for each in (make, SelfAttention)]
    torch.testing.assert_close(*causal, rtol=0, atol=0)


def test_a_forward_that_is_called_itself_stays_dense(x):
    """As the documentation says, and the summary does."""
    made = mtsa.sparsify(model(), CONFIG)
    layer, dense = made.blocks[0]["attn"], model().blocks[0]["attn"]
    with torch.no_grad(), mtsa.collect_statistics(made) as statistics:
        torch.testing.assert_close(layer.forward(x), dense(x), rtol=0, atol=0)
        assert statistics.total.rows == 0
        assert active(made) == [None, None]
        assert (layer(x) - dense(x)).abs().max() > 0.01
        assert active(made) == [True, None]


@pytest.fixture
def warnings(caplog):
    """Return what has been warned of since the last call."""

    def new():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    with caplog.at_level(logging.WARNING, "modelopt_lite"):
        yield new


GOES_AROUND = "blocks.1.attn (Undecided) is matched and switched on, but its forward did not call this package's"


def active(made):
    return [row.active for row in mtsa.summary(made)]


def test_a_layer_that_goes_around_is_reported_once(x, warnings):
    made = mtsa.sparsify(model(Undecided), CONFIG)
    run(made, x)
    assert (warnings(), active(made)) == ([], [True, True])
    made.blocks[1]["attn"].by_hand = True
    run(made, x)
    (message,) = warnings()
    assert message.startswith(GOES_AROUND)
    run(made, x)
    assert (warnings(), active(made)) == ([], [True, False])


def test_a_layer_that_goes_around_after_a_forward_that_failed_is_reported(x, warnings):
    made = mtsa.sparsify(model(Undecided), CONFIG)
    made.blocks[1]["attn"].fails = True
    with pytest.raises(RuntimeError, match="boom"):
        run(made, x)
    made.blocks[1]["attn"].by_hand = True
    run(made, x)
    assert len(warnings()) == 1
    assert active(made) == [True, False]


def test_a_layer_that_goes_around_in_a_compiled_model_is_reported_when_it_is_traced(x, warnings):
    made = mtsa.sparsify(model(Undecided), CONFIG)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    run(compiled, x)
    assert (warnings(), active(made)) == ([], [None, None])
    made.blocks[1]["attn"].by_hand = True
    run(compiled, x)
    (message,) = warnings()
    assert message.startswith(GOES_AROUND)
    run(compiled, x)
    assert warnings() == []
    # The next one that is not compiled counts at once.
    run(made, x)
    assert len(warnings()) == 1
    assert active(made) == [True, False]


@pytest.mark.parametrize("part", ["the model in pieces", "a layer's forward"])
def test_what_is_compiled_in_part_is_not_reported(x, warnings, part):
    made = mtsa.sparsify(model(Undecided), CONFIG)
    wanted = run(made, x)
    compiled = made
    if part == "a layer's forward":
        layer = made.blocks[1]["attn"]
        layer.forward = torch.compile(layer.forward, backend="eager")
    else:
        made.blocks[1]["attn"].breaks = True
        compiled = torch.compile(made, backend="eager")
    torch.testing.assert_close(run(compiled, x), wanted, **CLOSE)
    assert (warnings(), active(made)) == ([], [True, True])


def vision_transformer():
    """A small one of timm's, on images of 36 patches and a class token."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes), torch.randn(2, 3, 24, 24), {}


def diffusion_block():
    """Self-attention and cross-attention to a padded text, both by way of a processor."""
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=16)
    text, real = torch.randn(2, 20, 16), torch.arange(20) < torch.tensor([[20], [13]])
    options = {"encoder_hidden_states": text, "encoder_attention_mask": real[:, None]}
    return block, torch.randn(2, LENGTH, WIDTH), options


def diffusion_transformer():
    """Attention over text and image together, whose class has no say in how it is done."""
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    options = {
        "encoder_hidden_states": torch.randn(2, 8, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.ones(2),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    return made, torch.randn(2, 16, 4), options


OTHERS = {
    "timm": (vision_transformer, None, ["blocks.0.attn", "blocks.1.attn"]),
    "diffusers block": (diffusion_block, "attn?", ["attn1", "attn2"]),
    "diffusers": (diffusion_transformer, "*.attn", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]),
}


def on(target, x):
    """What is on the target, in the type it is tested in if it holds real numbers."""
    if not isinstance(x, torch.Tensor | nn.Module):
        return x
    return x.to(**place(target)) if isinstance(x, nn.Module) or x.is_floating_point() else x.to(target[1])


@pytest.mark.parametrize(("make", "attention", "names"), OTHERS.values(), ids=OTHERS.keys())
def test_other_libraries(make, attention, names, target):
    torch.manual_seed(0)
    made, inputs, options = make()
    made, inputs, options = on(target, made).eval(), on(target, inputs), {k: on(target, x) for k, x in options.items()}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)

    def result(rows=slice(None)):
        batched = {
            name: x[rows] if isinstance(x, torch.Tensor) and x.shape[0] == 2 else x for name, x in options.items()
        }
        found = run(made, inputs[rows], **batched)
        return found[0] if isinstance(found, tuple) else found

    before = result()
    close = {"rtol": 0, "atol": {"cpu": 1e-10, "cuda": 1e-5}[target[1]] * before.abs().max().item()}
    mtsa.sparsify(made, config_for(target), attention=attention)
    with mtsa.collect_statistics(made) as statistics:
        sparse = result()
    rows = mtsa.summary(made, statistics)
    assert [row.name for row in rows] == names
    assert all(row.active and 0.1 < row.sparsity < 0.9 for row in rows)
    assert (sparse - before).abs().max() > 0.01
    for row in range(2):
        torch.testing.assert_close(result(slice(row, row + 1))[0], sparse[row], **close)
    with mtsa.disabled(made):
        torch.testing.assert_close(result(), before, rtol=0, atol=0)
    mtsa.sparsify(made, config_for(target, n=4), attention=attention)
    torch.testing.assert_close(result(), before, **close)
    mtsa.unsparsify(made)
    torch.testing.assert_close(result(), before, rtol=0, atol=0)


@pytest.mark.parametrize("library", ["timm", "diffusers block"])
def test_other_libraries_against_the_same_weights_here(x, library, target):
    make, attention, names = OTHERS[library]
    torch.manual_seed(0)
    made, x = mtsa.sparsify(on(target, make()[0]).eval(), config_for(target), attention=attention), on(target, x)
    theirs = made.get_submodule(names[0])
    if library == "timm":
        query, key, value, out = *theirs.qkv.weight.chunk(3), theirs.proj
        bias = theirs.qkv.bias
    else:
        query, key, value, out = theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight, theirs.to_out[0]
        bias = torch.zeros(3 * WIDTH)
    ours = SelfAttention()
    ours.load_state_dict(
        {
            "query.weight": query,
            "query.bias": bias[:WIDTH],
            "key_value.weight": torch.cat([key, value]),
            "key_value.bias": bias[WIDTH:],
            "out.weight": out.weight,
            "out.bias": out.bias,
        }
    )
    ours = mtsa.sparsify(nn.ModuleList([on(target, ours)]), config_for(target))[0]
    torch.testing.assert_close(run(theirs, x), run(ours, x), **CLOSE_ON[target[1]])
