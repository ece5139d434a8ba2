"""Launches the portable Triton kernels, forward and backward: NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..blocks import KeyBlocks
from ..device import Described, Launch, cdiv, heads_per_wave, is_aligned, rebased
from ..request import AttentionRequest, ForwardResult
from ..settings import (
    SMALL,
    Options,
    Settings,
    SettingsRow,
    block_dim,
    capability_of,
    default_settings,
    distances,
    gpu_refusal,
    hook_arguments,
    is_short,
    options_of,
)
from ..tiles import LOG2E
from .backward import gradient_of_keys, gradient_of_queries, gradient_rows
from .forward import attention_forward

MAX_HEAD_DIM = 256

# The first row that fits. Those of capability 90 for 16-bit types up to a dimension of 128 are what
# benchmarks/tune.py found fastest on an H200 with BF16; the others fit the GPU, and have not been timed.
# settings: block_m, block_n, num_warps, num_stages, descriptors, frozen
SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(100, 2, 256, 16, Settings(128, 32, 8, 2, True, False)),
    SettingsRow(90, 2, 64, 4, Settings(64, 64, 4, 3, True, True)),
    SettingsRow(90, 2, 64, 16, Settings(64, 128, 4, 2, True, True)),
    SettingsRow(90, 2, 128, 8, Settings(64, 64, 4, 3, True, True)),
    SettingsRow(90, 2, 128, 16, Settings(128, 128, 8, 2, True, True)),
    SettingsRow(90, 2, 256, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(128, 64, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 4, Settings(32, 32, 4, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(16, 64, 4, 2, False, False)),
    SettingsRow(SMALL, 4, 64, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
)
# The same for both kernels of the backward, but that only these rows, and no other candidates, have been timed.
QUERY_SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 2, True, False)),
    SettingsRow(90, 2, 64, 8, Settings(64, 64, 4, 3, True, False)),
    SettingsRow(90, 2, 128, 8, Settings(64, 64, 4, 2, True, False)),
    SettingsRow(90, 2, 128, 16, Settings(64, 128, 4, 2, True, False)),
    SettingsRow(90, 2, 256, 16, Settings(128, 32, 8, 2, True, False)),
    SettingsRow(SMALL, 2, 64, 16, Settings(128, 64, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(128, 32, 8, 2, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(64, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 64, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
)
KEY_SETTINGS = (
    SettingsRow(100, 2, 128, 16, Settings(128, 64, 8, 1, True, False)),
    SettingsRow(100, 2, 256, 16, Settings(64, 64, 8, 1, True, False)),
    SettingsRow(90, 2, 64, 16, Settings(64, 64, 4, 3, True, False)),
    SettingsRow(90, 2, 128, 16, Settings(64, 64, 4, 2, True, False)),
    SettingsRow(90, 2, 256, 4, Settings(128, 64, 8, 1, True, False)),
    SettingsRow(90, 2, 256, 16, Settings(32, 64, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 64, 16, Settings(64, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 128, 16, Settings(32, 64, 8, 1, False, False)),
    SettingsRow(SMALL, 2, 256, 16, Settings(32, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 128, 16, Settings(16, 32, 8, 1, False, False)),
    SettingsRow(80, 4, 256, 16, Settings(16, 32, 8, 1, False, False)),
    SettingsRow(SMALL, 4, 256, 16, Settings(16, 16, 8, 1, False, False)),
)
WAVE = 512
"""Programs of ``gradient_of_keys`` that are in flight at one time, at least: some more than an H200 holds."""
BLOCK_ROWS = 64
"""Tokens a program of ``gradient_rows``."""


def refusal(request: AttentionRequest) -> str | None:
    """Say why the kernels cannot run a request, or None if they can."""
    r = request
    if (reason := gpu_refusal(r)) is not None:
        return reason
    if r.blocks is None and r.plan.chooses_blocks:
        return "the plan chooses blocks of keys, which are not listed"
    for name, x in (("q", r.q), ("k", r.k), ("v", r.v)):
        if x.shape[2] > MAX_HEAD_DIM:
            return f"{name} has a head_dim of {x.shape[2]}, above {MAX_HEAD_DIM}"
    return None


def prepare(
    request: AttentionRequest, settings: Settings | None = None
) -> Callable[[AttentionRequest], tuple[Tensor, Tensor | None]]:
    """Compute what requests of one signature have in common.

    Args:
        request: one of them; :func:`refusal` has been asked.
        settings: tiles and warps, instead of the table's.

    Returns:
        A function from a request to the output, ``[tokens, query_heads, value_dim]``, and the logarithms of the softmax
        denominators, ``[tokens, query_heads]`` in FP32, if they are wanted. Rows of no sequence are 0 and -inf, and so
        are rows that keep no key, whose logarithm is ``s_aux`` if it is given. It does not wait for the device. On a
        GPU and without lists of blocks it looks at no shapes and strides of ``q``, ``k`` and ``v``.
    """
    r, plan = request, request.plan
    (total, query_heads, head_dim), (kv_heads, value_dim), batch = r.q.shape, r.v.shape[1:], r.starts_q.shape[0]
    block_d, block_dv = block_dim(head_dim), block_dim(value_dim)
    if settings is None:
        settings = default_settings(
            capability_of(r.q.device), r.q.dtype, max(block_d, block_dv), r.group, r.is_causal, SETTINGS
        )
        if is_short(r):
            settings = settings._replace(descriptors=False)  # which cost the host more than they save the GPU
    settings = fitted(settings, r.blocks)
    tiles = _query_tiles(r, settings)
    programs = batch * query_heads * tiles + cdiv(total, settings.block_m)
    heads = (query_heads, query_heads // kv_heads)
    wave = min(heads_per_wave(r.max_k, r.k, r.v) * heads[1], batch * query_heads)
    numbers = (r.softmax_scale, r.softcap or 0.0)
    rest = (heads, numbers, batch, total, tiles, wave, *distances(r))
    # Tensors are described by their shapes and strides; each call puts its own addresses in.
    keys = _key_descriptor(r.k, r.group, block_d, settings)
    values = _key_descriptor(r.v, r.group, block_dv, settings)
    strides = (*(x.stride()[:2] for x in (r.q, r.k, r.v)), (query_heads * value_dim, value_dim))
    launch = Launch(
        attention_forward, r.q.device, plan.score_hook, options_for(r, settings),
        num_warps=settings.num_warps, num_stages=settings.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    on_cpu, has_positions, hook_args = r.q.device.type == "cpu", r.has_positions, hook_arguments(plan)
    nothing, new_results = (None, None), results_of(r)

    def run(r: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        if on_cpu:
            r.check_values()  # Triton's interpreter would write to whatever memory they lead to
        out, lse = new_results(r.q)
        if total:
            firsts = r.first_positions() if has_positions else nothing
            launch(
                programs, r.q, r.k, r.v, out, lse, r.output_rows, r.s_aux,
                keys and Described(keys, r.k), values and Described(values, r.v), strides,
                (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, *firsts), *rest,
                None if r.blocks is None else _lists(r), hook_args,
            )  # fmt: skip
        return out, lse

    return run


def results_of(request: AttentionRequest) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Return what makes the results of requests of one signature.

    That is a function of any tensor of their type and device. It returns memory for the output and, if they are wanted,
    for the logarithms of the softmax denominators.
    """
    (tokens, heads, _), value_dim, with_lse = request.q.shape, request.v.shape[2], request.with_lse

    def new_results(x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = x.new_empty(tokens, heads, value_dim)  # PyTorch reads a tuple more slowly
        return out, x.new_empty(tokens, heads, dtype=torch.float32) if with_lse else None

    return new_results


def readable(grad: Tensor) -> Tensor:
    """Return the gradient of the output as the kernels read it."""
    return grad.contiguous() if grad.stride(2) != 1 or 0 in grad.stride() else grad


def prepare_backward(
    grad: Tensor, request: AttentionRequest, settings: tuple[Settings, Settings] | None = None
) -> Callable[[Tensor, ForwardResult, AttentionRequest], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Compute what backward passes of one signature have in common, after any forward kernel.

    Two sequences may not share keys: the gradients of shared rows would be those of one of them.

    Args:
        grad: gradient of the output, from :func:`readable`, of one of them.
        request: what was computed, of one of them; which keys take part is taken as given.
        settings: tiles and warps of the gradient of queries, and of that of keys and values, instead of the tables'.

    Returns:
        A function of the gradient, what the forward pass left and the request. It returns the gradients of ``q``,
        ``k``, ``v`` and, if given, ``s_aux``, each in the type of its tensor. Rows of no sequence are 0. Between calls
        only the addresses and contents of tensors may differ. It does not wait for the device.
    """
    r, plan, device = request, request.plan, request.q.device
    total, query_heads, head_dim = r.q.shape
    kv_heads, value_dim = r.v.shape[1:]
    batch, heads_per_kv = r.starts_q.shape[0], query_heads // kv_heads
    block_d, block_dv = block_dim(head_dim), block_dim(value_dim)
    if settings is None:
        place = (capability_of(device), r.q.dtype, max(block_d, block_dv), r.group, r.is_causal)
        settings = default_settings(*place, QUERY_SETTINGS, True), default_settings(*place, KEY_SETTINGS, True)
    for_queries, for_keys = (fitted(x, r.blocks) for x in settings)
    # Where keys begin inside a group, or a tile that a list names, the first tile has fewer.
    step = r.group if r.blocks is None else for_keys.block_n
    key_tiles = cdiv(r.max_k + (step - 1 if r.has_positions else 0), for_keys.block_n)
    query_tiles = _query_tiles(r, for_queries)
    # Few programs of such different lengths would leave multiprocessors idle at the end.
    key_wave = max(heads_per_wave(r.max_q, r.q, grad) // heads_per_kv, cdiv(WAVE, max(key_tiles, 1)))
    query_wave = heads_per_wave(r.max_k, r.k, r.v) * heads_per_kv
    numbers, rules, hook_args = (r.softmax_scale, r.softcap or 0.0), distances(r), hook_arguments(plan)
    # Tensors are described by their shapes and strides; each call puts its own addresses in.
    queries, grads = (_query_descriptor(x, block, for_keys) for x, block in ((r.q, block_d), (grad, block_dv)))
    keys, values = (_key_descriptor(x, r.group, block, for_queries) for x, block in ((r.k, block_d), (r.v, block_dv)))
    of_new = [(x.shape[1] * x.shape[2], x.shape[2]) for x in (r.q, r.k, r.v)]
    strides = [x.stride()[:2] for x in (r.q, r.k, r.v, grad)]
    launch_rows = Launch(gradient_rows, device, value_dim, BLOCK_ROWS, block_dv)
    launch_keys, launch_queries = (
        Launch(
            kernel, device, plan.score_hook, options_for(r, of), num_warps=of.num_warps, num_stages=of.num_stages,
            enable_fp_fusion=True,
        )
        for kernel, of in ((gradient_of_keys, for_keys), (gradient_of_queries, for_queries))
    )  # fmt: skip

    def run(grad: Tensor, result: ForwardResult, r: AttentionRequest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (r.q, r.k, r.v))
        if total == 0:
            return grad_q, grad_k, grad_v, None if r.s_aux is None else torch.zeros_like(r.s_aux)
        # Apart, so that both are aligned alike whatever the lengths.
        shift, delta = (torch.empty(query_heads, total, dtype=torch.float32, device=device) for _ in range(2))
        sequences = (r.starts_q, r.lengths_q, r.starts_k, r.lengths_k, *r.first_positions())
        output = result.output
        assert output is not None
        launch_rows(
            cdiv(total, BLOCK_ROWS) * query_heads, grad, output, result.lse, shift, delta,
            (strides[3], output.stride()[:2]), query_heads, total,
        )  # fmt: skip
        launch_keys(
            batch * kv_heads * key_tiles, r.q, r.k, r.v, grad, shift, delta, grad_k, grad_v,
            queries and Described(queries, r.q), grads and Described(grads, grad), (*strides, *of_new[1:]), sequences,
            (kv_heads, heads_per_kv), numbers, batch, total, key_tiles, min(key_wave, batch * kv_heads), *rules,
            _transposed_lists(r), hook_args,
        )  # fmt: skip
        launch_queries(
            batch * query_heads * query_tiles, r.q, r.k, r.v, grad, shift, delta, grad_q,
            keys and Described(keys, r.k), values and Described(values, r.v), (*strides, of_new[0]), sequences,
            (query_heads, heads_per_kv), numbers, batch, total, query_tiles, min(query_wave, batch * query_heads),
            *rules, _lists(r), hook_args,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, gradient_of_sink_logits(r, shift, delta)

    return run


def gradient_of_sink_logits(request: AttentionRequest, shift: Tensor, delta: Tensor) -> Tensor | None:
    """Return the gradient of ``s_aux``, None if there is none, from what :func:`.backward.gradient_rows` writes."""
    s_aux = request.s_aux
    if s_aux is None:
        return None
    weights = torch.exp2(s_aux.float()[:, None] * LOG2E.value - shift)
    return -(weights * delta).sum(1).to(s_aux.dtype)


def fitted(settings: Settings, blocks: KeyBlocks | None) -> Settings:
    """Make tiles so small that they divide the blocks that are listed, if any are."""
    if blocks is None:
        return settings
    block_m, block_n = math.gcd(settings.block_m, blocks.block_rows), math.gcd(settings.block_n, blocks.block_size)
    # What is masked, and so gives a reference, may not be listed. Hopper's matrix instructions take 64 rows.
    descriptors = settings.descriptors and block_m >= 64
    return settings._replace(block_m=block_m, block_n=block_n, descriptors=descriptors, frozen=False)


def options_for(request: AttentionRequest, settings: Settings) -> Options:
    """Return what the kernels have to know at compile time, which here includes the size of listed blocks."""
    options, blocks = options_of(request, settings), request.blocks
    if blocks is None:
        return options
    return options._replace(unlisted=True, block_size=blocks.block_size, block_rows=blocks.block_rows)


def _query_tiles(request: AttentionRequest, settings: Settings) -> int:
    """Return how many tiles of queries a sequence may have; with lists, the first one may have fewer queries."""
    rows = request.max_q if request.blocks is None else request.max_q + settings.block_m - 1
    return cdiv(rows, settings.block_m)


def _lists(request: AttentionRequest) -> tuple[Any, ...] | None:
    """Return the lists of key blocks as the kernels take them."""
    blocks = request.blocks
    if blocks is None:
        return None
    heads, rows, columns = blocks.indices.shape
    tensors = (blocks.counts.contiguous(), blocks.indices.contiguous(), blocks.starts.contiguous())
    return (*tensors, request.q.shape[1] // heads, rows, columns)


def _transposed_lists(request: AttentionRequest) -> tuple[Any, ...] | None:
    """Return the lists of query blocks as the kernels take them."""
    blocks = request.blocks
    if blocks is None:
        return None
    heads, rows, columns = blocks.indices.shape
    begins, indices = blocks.transposed()
    tensors = (begins.contiguous(), indices.contiguous(), blocks.starts.contiguous())
    return (*tensors, request.q.shape[1] // heads, rows, columns, blocks.starts.shape[0])


def _key_descriptor(x: Tensor, group: int, block_d: int, settings: Settings) -> Any:
    """Describe keys or values for the tensor memory accelerator, without their address; None where it cannot read them.

    They are ``[key of a group, group, head, dim]``. A sequence may begin anywhere, so there are about twice as many
    keys in a group as the group has: rows overlap, each has several addresses.
    """
    if not (settings.descriptors and is_aligned(x)):
        return None
    shape = [2 * group - 1, cdiv(x.shape[0], group), *x.shape[1:]]
    strides = [x.stride(0), group * x.stride(0), x.stride(1), 1]
    return rebased(TensorDescriptor(x, shape, strides, [group, settings.block_n // group, 1, block_d]), None)


def _query_descriptor(x: Tensor, block_d: int, settings: Settings) -> Any:
    """Describe queries, or gradients laid out alike, as ``[head, token, dim]``, as :func:`_key_descriptor` does."""
    if not (settings.descriptors and is_aligned(x)):
        return None
    shape, strides = ([x_of[1], x_of[0], x_of[2]] for x_of in (x.shape, x.stride()))
    return rebased(TensorDescriptor(x, shape, strides, [1, settings.block_m, block_d]), None)
