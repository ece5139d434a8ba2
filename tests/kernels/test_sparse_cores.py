"""The kernel on sparse tensor cores: its machine code without a GPU, and on one the contract, against the oracle."""

import ctypes
import functools
import math
import re
import tempfile
import threading
from collections import Counter
from dataclasses import replace

import pytest
import test_gpu
import torch
from cases import RAGGED, OnGpu, check_in_a_graph, one_sequence
from cases import packed_request as make
from machine_code import classify, hot_loop, run_tool
from test_gpu import check, poison, run
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_lite as mtsa
from modelopt_lite.kernels import KeyBlocks, choice, settings
from modelopt_lite.kernels.choice import choose
from modelopt_lite.kernels.hopper import cuda_code, sparse_cores
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch
from modelopt_lite.kernels.reference import kept_scores
from modelopt_lite.kernels.top_n import top_n_plan

__all__ = ["poison"]
LONG = ((1000, 1000), (129, 1500), (1, 700), (0, 0), (300, 900), (128, 128), (257, 1153))

VARIANTS = [
    sparse_cores.Variant(dtype, head_dim, warpgroups)
    for dtype in (torch.bfloat16, torch.float16)
    for head_dim, warpgroups in ((128, 2), (64, 2), (64, 3))
]


@pytest.fixture
def on_sparse_cores(monkeypatch):
    """Have the kernel run wherever it can, and make sure that it does."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    calls = []
    attend = sparse_cores._Launch.__call__
    monkeypatch.setattr(sparse_cores._Launch, "__call__", lambda *arguments: (calls.append(1), attend(*arguments)))
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", "sparse_cores")
    yield
    assert calls


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def each_variant(request, monkeypatch):
    """Have requests of every type and head dimension, and every variant run."""
    variant = request.param
    monkeypatch.setitem(shape, "dtype", variant.dtype)
    monkeypatch.setitem(shape, "dims", (variant.head_dim, variant.head_dim))
    monkeypatch.setattr(sparse_cores, "LONG", 0 if variant.warpgroups == 3 else 2**31)
    monkeypatch.setattr(choice, "_prepared", {})
    return variant


@pytest.fixture
def fresh(monkeypatch):
    """As in a process in which the kernel has not been loaded."""
    monkeypatch.setattr(cuda_code, "_handles", {})
    monkeypatch.setattr(choice, "_prepared", {})


@pytest.fixture
def few_programs(monkeypatch):
    """Have so many programs do all the work; forgets what was prepared for more."""

    def set_number(number):
        for module in (hopper_launch, sparse_cores):
            monkeypatch.setattr(module, "processors", lambda device: number)
        monkeypatch.setattr(choice, "_prepared", {})

    return set_number


BF16_128 = VARIANTS[0]
shape = {"dims": (128, 128), "dtype": torch.bfloat16}


def packed(**options):
    return make(**{**shape, "lengths": LONG, **options})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_machine_code(variant):
    """No spills and no traffic in the hot loop, which has two tiles of 64 queries and 128 keys."""
    code, log = variant.kernel.compiled()
    assert not re.search("C75", log), log  # products one after the other
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    loop = classify(Counter(instruction.partition(".")[0] for instruction in hot_loop(sass)))
    assert ("REG:168" if variant.warpgroups == 2 else "REG:128") in usage
    assert "STACK:0 " in usage
    assert loop["matrix"] == 2 * (variant.head_dim // 16 + 4)
    assert loop["spills"] == 0
    assert loop["shuffles"] == 2 * 3  # that bring metadata together
    assert loop["shared memory"] == 2 * 5  # stores that pin the order and never happen
    assert loop["exponentials"] == 2 * 32
    assert loop["FMA pipe"] <= 2 * 205  # so no number that all threads share is moved to a register for each group


def test_both_languages_lay_out_the_problem_alike():
    assert ctypes.sizeof(sparse_cores._Problem) == 168  # as sparse_cores.cu asserts


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"head_dim": 64}, None),
        ({"n_of_m": (1, 4)}, "the plan is not 2:4"),
        ({"n_of_m": (4, 8)}, "the plan is not 2:4"),
        ({"n_of_m": (0, 4)}, "the plan is not 2:4"),
    ],
    ids=str,
)
def test_when_it_is_chosen(absent_gpu, monkeypatch, changes, refused):
    monkeypatch.setattr(hopper_launch, "HOPPER_TRITON", True)
    monkeypatch.setattr(sparse_cores, "handle", lambda device, kernel, without_it: ctypes.c_void_p())
    monkeypatch.setattr(settings, "LIGHT", 0)
    dim, dtype = changes.get("head_dim", 128), changes.get("dtype", torch.bfloat16)
    plan = top_n_plan(*changes.get("n_of_m", (2, 4)), 0, 64)

    def request_of(length, tokens=64 * 100, **options):
        q = torch.empty(tokens, 4, dim, dtype=dtype).as_subclass(OnGpu)
        starts = torch.arange(0, tokens // length * length, length)
        packing = {"starts": starts, "lengths": torch.full_like(starts, length), "max": length}
        both = {f"{name}_{side}": x for name, x in packing.items() for side in "qk"}
        return one_sequence(q, q, q, plan, **both, **options)

    def chosen(length, pinned="", **options):
        return choose(request_of(length, **options), pinned=pinned).name

    can, extras = refused is None, ({"sliding_window": 9}, {"softcap": 2.0}, {"s_aux": torch.zeros(4)})
    assert sparse_cores.refusal(request_of(65)) == refused
    assert chosen(64) == "portable"
    enough = 192 * 50
    assert chosen(65, tokens=128 * 49) != "sparse_cores"  # fewer than 198 items
    assert [chosen(length, tokens=enough) == "sparse_cores" for length in (65, enough)] == [can, can]
    assert chosen(64 * 100, "hopper") == "hopper"
    assert chosen(64 * 100, "portable") == "portable"
    assert chosen(1, "sparse_cores") == ("sparse_cores" if can else "portable")
    for extra in extras:
        assert chosen(64 * 100, **extra) == "hopper"
        # What it cannot run is chosen as ever.
        assert chosen(1, "sparse_cores", **extra) == "portable"
        assert chosen(64 * 100, "sparse_cores", **extra) == "hopper"
    positions = {"first_k": torch.zeros_like(request_of(64 * 100).starts_k)}
    assert chosen(64 * 100, "sparse_cores", **positions) == "portable"


@pytest.mark.parametrize(("n_of_m", "kernel"), [((2, 4), "sparse_cores"), ((4, 8), "hopper")], ids=str)
def test_light_layers_get_the_kernel_of_one_launch(absent_gpu, monkeypatch, n_of_m, kernel):
    """Those of SmolLM2-135M up to its 8192 tokens; not with lists of blocks, nor trained, nor with twice as many."""
    monkeypatch.setattr(hopper_launch, "HOPPER_TRITON", True)
    monkeypatch.setattr(sparse_cores, "handle", lambda device, kernel, without_it: ctypes.c_void_p())

    def chosen(tokens, pinned="", **options):
        q, k = (torch.empty(tokens, heads, 64, dtype=torch.bfloat16).as_subclass(OnGpu) for heads in (9, 3))
        request = one_sequence(q, k, k, top_n_plan(*n_of_m, 0, 64), **{"with_lse": False, **options})
        return choose(request, pinned=pinned).name

    blocks = KeyBlocks(
        *(torch.empty(size, dtype=torch.int32).as_subclass(OnGpu) for size in ((9, 64), (9, 64, 64), 1)), 128, 128
    )
    assert chosen(8192) == "portable"
    others = [chosen(8192, kernel), chosen(8192, blocks=blocks), chosen(8192, with_lse=True), chosen(16384)]
    assert others == [kernel] * 4


@pytest.mark.parametrize(
    ("head_dim", "tokens", "lists", "warpgroups"),
    [(64, 4098, False, 3), (64, 4096, False, 2), (64, 4098, True, 2), (128, 4098, False, 2)],
)
def test_which_variant_runs(head_dim, tokens, lists, warpgroups):
    """Two sequences; lists are for items of 128 queries."""
    starts = torch.tensor([0, tokens // 2])
    lengths = torch.full_like(starts, tokens // 2)
    q = torch.empty(tokens, 1, head_dim, dtype=torch.float16)
    both = {f"{name}_{side}": x for name, x in (("starts", starts), ("lengths", lengths)) for side in "qk"}
    request = one_sequence(q, q, q, top_n_plan(2, 4, 0, 64), **both)
    blocks = KeyBlocks.from_mask(torch.ones(1, 1, 1, dtype=torch.bool), starts, 128, 128) if lists else None
    expected = sparse_cores.Variant(torch.float16, head_dim, warpgroups)
    assert sparse_cores.variant_of(request._replace(blocks=blocks)) == expected


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 128, "the tensors are torch.float32, not torch.float16 or torch.bfloat16"),
        (torch.bfloat16, 96, "head dimensions are 96 and 96, not both 64 or both 128"),
    ],
)
def test_types_and_sizes_that_it_is_not_made_for(absent_gpu, dtype, head_dim, reason):
    q = torch.zeros(8, 4, head_dim, dtype=dtype).as_subclass(OnGpu)
    assert sparse_cores.refusal(one_sequence(q, q, q, top_n_plan(2, 4, 0, 64))) == reason


class BrokenBindings:
    """Of a machine without the library."""

    @staticmethod
    def nvrtcCreateProgram(*arguments):
        raise RuntimeError("no libnvrtc")


class Driver:
    """Of a GPU that is not there."""

    @staticmethod
    def loads(*arguments):
        return 0

    cuModuleLoadData = cuModuleGetFunction = cuFuncSetAttribute = loads
    cuDeviceGet = cuDevicePrimaryCtxRetain = cuCtxPushCurrent_v2 = cuCtxPopCurrent_v2 = loads
    cuThreadExchangeStreamCaptureMode = loads

    @staticmethod
    def cuGetErrorString(failed, text):
        text._obj.value = b"too new"


class OldDriver(Driver):
    @staticmethod
    def cuModuleLoadData(*arguments):
        return 222


@pytest.fixture
def without_a_gpu(absent_gpu, monkeypatch, fresh):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_code, "code_of", cuda_code.code_of.__wrapped__)
    q = torch.zeros(8, 4, 128, dtype=torch.bfloat16).as_subclass(OnGpu)
    return functools.partial(sparse_cores.refusal, one_sequence(q, q, q, top_n_plan(2, 4, 0, 64)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nvrtc": None}, "cuda-bindings is not installed (extra sparse-cores)"),
        ({"nvrtc": BrokenBindings}, "no libnvrtc"),
        (
            {"nvrtc": BrokenBindings, "code_of": lambda kernel: b"", "driver": OldDriver},
            "kernel: 'sparse_cores' does not run: too new (222)",
        ),
    ],
)
def test_without_the_kernel(without_a_gpu, monkeypatch, caplog, changes, reason):
    """Others are chosen, and it is said why, once."""
    for name, value in changes.items():
        monkeypatch.setattr(cuda_code, name, value)
    assert all("it could not be compiled or loaded" in without_a_gpu() for _ in range(2))
    assert caplog.text.count("2:4 is left to other kernels than sparse_cores, which would be faster: " + reason) == 1


def test_it_is_loaded_once_and_not_in_a_graph(without_a_gpu, monkeypatch, caplog):
    codes = []
    monkeypatch.setattr(cuda_code, "nvrtc", BrokenBindings)
    monkeypatch.setattr(cuda_code, "code_of", lambda kernel: codes.append(1) or b"")
    monkeypatch.setattr(cuda_code, "driver", Driver)
    for capturing, can in ((True, False), (False, True), (True, True), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert (without_a_gpu() is None) == can
        assert len(codes) == can
    assert not caplog.text


def test_what_machine_code_is_kept_by(monkeypatch, tmp_path):
    """Another source, other options or another compiler do not find it; the same find it without compiling."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []

    def compile_kernel(kernel):
        compiled.append(kernel)
        return b"code %d" % len(compiled), ""

    monkeypatch.setattr(cuda_code.CudaKernel, "compiled", compile_kernel)

    def code():
        return cuda_code.code_of.__wrapped__(BF16_128.kernel)

    assert [code(), code()] == [b"code 1"] * 2
    others = (
        (cuda_code.CudaKernel, "source", lambda kernel: b"other"),
        (cuda_code, "compiler", lambda: b"newer"),
        (cuda_code, "COMPILER_OPTIONS", (b"-O1",)),
    )
    for number, other in enumerate(others, 2):
        with monkeypatch.context() as changed:
            changed.setattr(*other)
            assert [code(), code()] == [b"code %d" % number] * 2
    assert code() == b"code 1"


def test_the_compiler_names_its_build():
    assert re.search(rb"release \d+\.\d+, V\d+\.\d+\.\d+", cuda_code.compiler())


@pytest.mark.gpu
@pytest.mark.usefixtures("on_sparse_cores", "each_variant")
class TestOnAGpu:
    @pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["short", "long"])
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 1)], ids=str)
    @pytest.mark.parametrize(("sinks", "window"), [(0, 64), (0, 0), (5, 1), (0, 100), (70, 300), (200, 63)])
    def test_contract(self, lengths, is_causal, heads, sinks, window):
        plan = top_n_plan(2, 4, sinks, window)
        check(packed(lengths=lengths, is_causal=is_causal, heads=heads, plan=plan))

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize(("sinks", "window"), [(0, 64), (5, 1)])
    def test_exactly_the_kept_keys_have_weights(self, is_causal, sinks, window):
        """Many scores tie. Values that are 1 in one place make the output show the weights, so many keys at a time."""
        dim, plan = shape["dims"][0], top_n_plan(2, 4, sinks, window)
        request = packed(lengths=((900, 900),), plan=plan, is_causal=is_causal)
        ((rows, keys, _, _),) = request.sequences()
        kept = kept_scores(request.q[rows].double(), request.k[keys].double(), request) > -torch.inf
        for first in range(0, 900, dim):
            shown = min(dim, 900 - first)
            values = torch.zeros_like(request.v)
            values[keys.start + first : keys.start + first + shown, :, :shown] = torch.eye(
                shown, device="cuda", dtype=values.dtype
            )[:, None]
            weights = run(request._replace(v=values))[0][rows, :, :shown]
            assert torch.equal(weights.transpose(0, 1) > 0, kept[..., first : first + shown])

    @pytest.mark.parametrize("programs", [1, 3])
    def test_few_programs(self, few_programs, programs):
        few_programs(programs)
        check(packed(plan=top_n_plan(2, 4, 5, 64)))

    def test_more_queries_than_keys(self):
        lengths = ((300, 128), (5, 0), (700, 64), (2, 1))
        check(packed(lengths=lengths, is_causal=False, plan=top_n_plan(2, 4, 3, 20)))

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("before", [0, 3, 125, 600])
    def test_any_end(self, is_causal, before):
        """The last sequence ends with the tensor, where the last tile is loaded from a copy."""
        plan = top_n_plan(2, 4, 5, 20)
        for length in (1, 2, 5, 127, 128, 130, 255, 257, 383, 500):
            request = packed(lengths=((before, before), (length, length)), is_causal=is_causal, plan=plan)
            end = int(request.starts_k[1]) + length
            check(request._replace(k=request.k[:end].clone(), v=request.v[:end].clone()))

    def test_long_integers(self):
        request = packed(plan=top_n_plan(2, 4, 3, 20))
        check(request._replace(starts_q=request.starts_q.long(), lengths_k=request.lengths_k.long()))

    def test_keys_may_begin_anywhere(self):
        request = packed(lengths=((700, 700),), plan=top_n_plan(2, 4, 0, 64))
        expected = run(request)
        for offset in range(1, 17):
            k, v = (torch.cat([x.new_full((offset, *x.shape[1:]), torch.nan), x]) for x in (request.k, request.v))
            found = run(request._replace(k=k, v=v, starts_k=request.starts_k + offset))
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_nothing_to_compute(self):
        request = packed(lengths=((0, 5), (0, 300)), plan=top_n_plan(2, 4, 0, 64))
        none = torch.zeros(0, device="cuda", dtype=torch.int32)
        check(packed(lengths=((1, 300),), plan=request.plan))
        empty = {"starts_q": none, "lengths_q": none, "max_q": 0, "starts_k": none, "lengths_k": none, "max_k": 0}
        for nothing in (request, request._replace(**empty)):
            output, lse = run(nothing)
            assert not output.any()
            assert lse.isneginf().all()

    def test_sums_that_nearly_overflow(self):
        """A hot key's score is by a factor of nearly 2^127 above all others."""
        request = packed(lengths=((1000, 1000),), plan=top_n_plan(2, 4, 0, 64))
        q, k = request.q, request.k
        for rows, keys, _, _ in request.sequences():
            q[rows], k[keys] = 0.0, 0.0
            q[rows, :, 0], k[keys.start + 100, :, 0] = 16.0, 5.5 / request.softmax_scale
        assert 126 < 16 * (5.5 / request.softmax_scale) * request.softmax_scale / math.log(2) < 127
        check(request)

    @pytest.mark.parametrize("towards", ["later", "earlier"])
    @pytest.mark.parametrize(("sinks", "window"), [(0, 64), (4, 0)])
    @pytest.mark.parametrize("programs", [1, 3, 132])
    def test_scores_far_apart(self, few_programs, programs, towards, sinks, window):
        """Scores jump by far more than an exponential holds, up or down. Few programs repair many items."""
        few_programs(programs)
        request = packed(lengths=((1000, 1000), (200, 600)), plan=top_n_plan(2, 4, sinks, window))
        q, k = request.q, request.k
        ramp = torch.arange(k.shape[0], device="cuda") // 150
        ramp = ramp if towards == "later" else ramp.flip(0)
        for rows, keys, _, _ in request.sequences():
            q[rows, :, 0], k[keys, :, 0] = 16.0, (ramp[keys, None] * 128).to(k.dtype)
        check(request)

    def test_all_keys_alike(self):
        request = packed(plan=top_n_plan(2, 4, 0, 8))
        request.k[~request.k.isnan()] = 0.5
        check(request)

    def test_decode_may_be_sparse(self):
        plan = top_n_plan(2, 4, 0, 8)
        check(packed(lengths=((1, 500), (300, 300)), plan=replace(plan, sparse_decode=True)))

    def test_any_strides(self):
        torch.manual_seed(0)
        length = 700
        for sliced in (False, True):
            sizes = ((h, length, shape["dims"][0]) for h in (4, 2, 2))
            q, k, v = (torch.randint(-2, 3, size, device="cuda").to(shape["dtype"]) / 2 for size in sizes)
            if sliced:
                q, k, v = torch.cat([q, k, v]).transpose(0, 1).split([4, 2, 2], dim=1)
            else:
                q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            assert not q.is_contiguous()
            check(one_sequence(q, k, v, top_n_plan(2, 4, 1, 20)))

    def test_the_same_bits_every_time_and_in_a_graph(self):
        request = packed(plan=top_n_plan(2, 4, 4, 64), exact=False)
        first = run(request)
        for _ in range(20):
            assert all(torch.equal(x, y) for x, y in zip(first, run(request), strict=True))
        check_in_a_graph(run, request)

    def test_chunks_alone(self):
        lengths, plan = ((900, 900), (700, 700), (37, 37)), top_n_plan(2, 4, 4, 64)
        request = packed(lengths=lengths, plan=plan)
        for in_q, in_k, *_ in request.sequences():
            for cut in (0, (in_q.stop - in_q.start) // 2 + 1):
                check(one_sequence(request.q[in_q][cut:], request.k[in_k], request.v[in_k], plan))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_named_for_another_device_than_the_current_one(self, fresh):
        request = packed(plan=top_n_plan(2, 4, 4, 64), device="cuda:1")
        assert torch.cuda.current_device() == 0
        assert sparse_cores.refusal(request) is None
        sparse_cores.prepare(request)(request)
        check(request)

    def test_in_a_thread_of_its_own(self, fresh):
        """That has made no call to CUDA before the kernel is loaded."""
        request = packed(plan=top_n_plan(2, 4, 4, 64))
        failed = []

        def target():
            try:
                check(request)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        assert not failed

    @pytest.mark.parametrize("kept", [False, True], ids=["compiled", "kept"])
    def test_loaded_while_another_thread_captures_a_graph(self, monkeypatch, tmp_path, fresh, kept):
        """With the mode of capture that forbids most to other threads: the graph is whole, and the kernel loads."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(cuda_code, "code_of", cuda_code.code_of.__wrapped__)
        request = packed(plan=top_n_plan(2, 4, 4, 64))
        if kept:
            cuda_code.code_of(sparse_cores.variant_of(request).kernel)
        x = torch.arange(1000.0, device="cuda")
        torch.use_deterministic_algorithms(False)
        refusals = []
        thread = threading.Thread(target=lambda: refusals.append(sparse_cores.refusal(request)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            y = x * 2
            thread.start()
            thread.join()
            y = y + 1
        assert refusals == [None]
        x.copy_(torch.arange(1000.0).flip(0))
        graph.replay()
        assert torch.equal(y, x * 2 + 1)
        torch.use_deterministic_algorithms(True)
        check(request)

    def test_not_loaded_in_a_graph(self, monkeypatch, fresh):
        """A graph is captured before the kernel was loaded: another runs there, and this one elsewhere."""
        request = packed(plan=top_n_plan(2, 4, 4, 64))
        monkeypatch.setenv("MODELOPT_LITE_KERNEL", "portable")
        expected, _ = run(request)
        monkeypatch.setenv("MODELOPT_LITE_KERNEL", "sparse_cores")
        torch.use_deterministic_algorithms(False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = run(request)
        assert not cuda_code._handles
        graph.replay()
        assert torch.equal(output, expected)
        check(request)
        assert cuda_code._handles

    def test_chosen_by_itself(self, monkeypatch):
        monkeypatch.delenv("MODELOPT_LITE_KERNEL")
        check(packed(lengths=((1500, 1500), (700, 900)), heads=(32, 8), plan=top_n_plan(2, 4, 4, 64)))

    def test_in_a_model(self, monkeypatch):
        """Left-padded prompts: logits err no more than twice what they do with the portable kernel."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 1024}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**sizes, **heads, head_dim=shape["dims"][0])
        model = LlamaForCausalLM(config).to("cuda", shape["dtype"]).eval()
        mtsa.sparsify(model, mtsa.SPARSE_SOFTMAX_DEFAULT)
        ids = torch.randint(1000, (3, 700), device="cuda")
        mask = torch.arange(700, device="cuda") >= torch.tensor([[0], [301], [690]], device="cuda")

        def logits():
            with torch.no_grad():
                return model(input_ids=ids, attention_mask=mask.long()).logits[mask].double()

        found = logits()
        monkeypatch.setenv("MODELOPT_LITE_KERNEL", "portable")
        portable = logits()
        expected = (model.double(), logits())[1]
        assert (found - expected).norm() <= 2 * (portable - expected).norm()

    def test_what_it_cannot_run_is_refused(self):
        request = packed(plan=top_n_plan(2, 4, 4, 64))
        run(request)
        assert sparse_cores.refusal(request) is None
        assert sparse_cores.refusal(request._replace(sliding_window=9)) == "there is a sliding_window"
        check(request._replace(sliding_window=9))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_sparse_cores")
class TestOnAGpuAsOtherKernels:
    """What is tested of every kernel, with sizes of its own."""

    def test_offsets_beyond_two_to_the_31(self):
        test_gpu.test_offsets_beyond_two_to_the_31()

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_the_tensors_device_and_not_the_current_one(self):
        test_gpu.test_the_tensors_device_and_not_the_current_one()
