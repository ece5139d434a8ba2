"""Speed of a whole model with this project's attention on this GPU, against Transformers with PyTorch's SDPA.

All variants share one set of weights, run in this process and take turns, in another order each round; each counts by
its median. Times are those of a clock on the wall between two synchronisations, so they include Python and launches.
Weights are random unless a folder with real ones is given; they do not matter to the time. What is measured, ``what``
in the rows:

- ``host``: what one call of ``kernels.attention`` keeps Python busy for, without waiting for the GPU, against SDPA.
- ``attention``: one of many such calls in a row, until the GPU is done, against SDPA with cuDNN.
- ``ttft``: time to first token, of one prompt without a mask: a forward that fills a new cache, and the best token.
- ``decode``: one step of one token; ``seq_len`` is the number of tokens in the cache before it, the same at every step.
  Eager steps use a dynamic cache, compiled ones a static one. More than one sequence means a left-padded batch.
- ``batch``: time to first token of a left-padded batch. A batch of one has no padding, but a mask.
- ``generate``: ``model.generate`` of some tokens, greedy; ``compiled`` means a static cache, for which Transformers
  compiles the decode steps.

Prints a table and writes JSON. Problems that were measured before, on the same device with the same versions, stay
unless they are measured again; rows of one problem always come from one run.

    python benchmarks/model.py                                                   # all of eager mode
    python benchmarks/model.py --parts ttft --seq-lens 131072 --variants sdpa dense 2:4
    python benchmarks/model.py --parts ttft decode batch generate --modes compiled --layers 8
    python benchmarks/model.py --profile                                         # where Python's time goes
    python benchmarks/model.py --show benchmarks/results/model-nvidia-h200.json  # all rows as a table
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import datetime
import functools
import gc
import itertools
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import recording
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

import modelopt_lite as mtsa
from modelopt_lite.kernels import attention

Call: TypeAlias = Callable[[], object]

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
}
"""The shape of each model; ``tiny`` is there to try this script without a GPU."""
VARIANTS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "sdpa again": {},
    "dense": {"method": "sparse_softmax", "sparsity_n": 4, "sparsity_m": 4},
    "2:4": {"method": "sparse_softmax", "sparsity_n": 2, "sparsity_m": 4},
    "4:8": {"method": "sparse_softmax", "sparsity_n": 4, "sparsity_m": 8},
    "25 % of blocks": {"method": "mean_pool_top_k", "keep": 0.25},
    "10 % of blocks": {"method": "mean_pool_top_k", "keep": 0.1},
}
"""The model as it is, twice, so that the noise can be seen, and methods' settings; N of M is this project's own dense
attention if N = M. Of the methods that choose blocks, this one keeps the same share of them with any weights."""
SEQ_LENS = {
    "ttft": [128, 512, 2048, 4096, 8192, 32768, 131072],
    "decode": [2048, 32768, 131072],
    "batch": [512, 2048],
    "generate": [2048],
    "attention": [2048, 4096, 8192],
    "host": [256],
}
"""What is measured, and at which lengths if none are given."""
PROBLEM = ("what", "model", "layers", "mode", "seq_len", "batch")
CALLS = {"host": 20, "attention": 50}
"""How many calls follow each other without waiting for the GPU."""
ROOM = 64
"""Tokens that a static cache has room for besides those in it."""
TURN_MS = 50
"""How long a variant runs at a time if its calls are shorter. What else the machine does comes and goes within seconds,
and should meet all variants."""
COPIES = 20
"""How often the models are made anew. Where the objects of one lie in memory changes by several percent how long Python
takes with it, also beside another one that is the same."""
WARM_UPS = {"eager": 2, "compiled": 4}
"""Calls before any is timed. The first compiles. The last one's time says how many calls there are in a turn. CUDA
graphs, where a compiled model has them, are recorded in the second and third."""
LONG_PREFILL = 16384
"""Tokens from which on a prefill is warmed up once, because it keeps the GPU busy for a second or more."""
DEPTHS = range(0, 112, 14)
"""Functions below each call, in turn. Python keeps frames in chunks of 16 KiB. Where a function's frame begins a new
chunk, each of its calls maps memory and gives it back, and at one depth that may hit one variant alone, in every
layer."""
PROFILED = {"variants": ["sdpa", "2:4"], "calls": 20, "prefill": 128, "context": 2048}


@dataclass(frozen=True)
class Problem:
    """Calls to compare.

    Attributes:
        calls: one for each variant.
        restore: what brings back the state before a call; not timed.
        count: how many operations are in one call.
        waits: whether the GPU's work counts, or only what a call keeps Python busy for.
        warm_ups: how often each call runs before it is timed.
    """

    calls: dict[str, Call]
    restore: Call = field(default=lambda: None)
    count: int = 1
    waits: bool = True
    warm_ups: int = WARM_UPS["eager"]


class Bench:
    """A model in all variants, which share its weights, and the problems to measure with it.

    Attributes:
        arguments: what the command line says.
        order: of variants, random.
        depths: those of the next calls.
        device: where everything runs.
        dtype: BF16, or FP32 on a CPU.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.order = random.Random(0)
        self.depths = itertools.cycle(DEPTHS)
        self.device = torch.device(arguments.device)
        self.dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        if arguments.weights is None:
            self.config = LlamaConfig(**MODELS[arguments.model], rope_parameters=rope_parameters(arguments.model))
        else:
            self.config = AutoConfig.from_pretrained(arguments.weights)
            wrong = [name for name, value in MODELS[arguments.model].items() if getattr(self.config, name) != value]
            if wrong:
                raise SystemExit(f"--weights: {', '.join(wrong)} differ from the shape of --model {arguments.model}")
        if arguments.layers is not None:
            self.config.num_hidden_layers = arguments.layers

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model as it is."""
        options = {"config": self.config, "dtype": self.dtype, "attn_implementation": "sdpa"}
        if self.arguments.weights is None:
            torch.manual_seed(0)
            with self.device:
                model = AutoModelForCausalLM.from_config(**options)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.arguments.weights, **options).to(self.device)
        model.eval().requires_grad_(False)
        model(self.tokens(1, 8))  # what libraries allocate once must not count as memory of the first variant
        return model

    @functools.cached_property
    def models(self) -> dict[str, PreTrainedModel]:
        """The model in each variant: objects of their own with the same parameters, made in random order."""
        weights = {id(x): x for x in itertools.chain(self.model.parameters(), self.model.buffers())}
        models = {}
        for variant in self.order.sample(self.arguments.variants, len(self.arguments.variants)):
            models[variant] = copy.deepcopy(self.model, dict(weights))
            if VARIANTS[variant]:
                mtsa.sparsify(models[variant], VARIANTS[variant])
        return {variant: models[variant] for variant in self.arguments.variants}

    def tokens(self, batch: int, seq_len: int) -> Tensor:
        """Return random token ids ``[batch, seq_len]``."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randint(self.config.vocab_size, (batch, seq_len), device=self.device, generator=generator)

    def left_padding(self, batch: int, seq_len: int) -> dict[str, Tensor]:
        """Return mask and positions of a left-padded batch: sequences of ``seq_len`` down to half as many tokens."""
        lengths = torch.tensor([seq_len - i * seq_len // (2 * batch) for i in range(batch)], device=self.device)
        mask = (torch.arange(seq_len, device=self.device) >= seq_len - lengths[:, None]).long()
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def problem(self, what: str, mode: str, seq_len: int) -> tuple[Problem, int]:
        """Return a problem and the number of its sequences."""
        if what in CALLS:
            return self.attention_problem(what, seq_len), 1
        if what == "ttft":
            return self.prefill_problem(mode, self.tokens(1, seq_len), {}), 1
        if what == "decode":
            return self.decode_problem(mode, self.arguments.decode_batch, seq_len), self.arguments.decode_batch
        if what == "batch":
            batch = self.arguments.batch
            padding = self.left_padding(batch, seq_len)
            return self.prefill_problem(mode, self.tokens(batch, seq_len), padding), batch
        return self.generate_problem(mode, seq_len), 1

    def attention_problem(self, what: str, seq_len: int) -> Problem:
        """Return calls of the kernels with the shape of one of the model's layers."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(seq_len, count, self.config.head_dim, device=self.device, generator=generator).to(self.dtype)
            for count in (heads, kv_heads, kv_heads)
        )
        start = torch.zeros(1, dtype=torch.int32, device=self.device)
        length = torch.full_like(start, seq_len)
        transposed = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        calls: dict[str, Call] = {}
        for variant in self.arguments.variants:
            if VARIANTS[variant]:
                plan = mtsa.SparsityConfig.model_validate(VARIANTS[variant]).sparse_cfg["*"].shared_plan()
                call = functools.partial(attention, q, k, v, start, length, seq_len, plan=plan)
            else:
                call = functools.partial(scaled_dot_product_attention, *transposed, is_causal=True, enable_gqa=True)
            cudnn = what == "attention" and not VARIANTS[variant] and self.device.type == "cuda"
            calls[variant] = functools.partial(repeat, call, CALLS[what], cudnn)
        return Problem(calls, count=CALLS[what], waits=what == "attention")

    def prefill_problem(self, mode: str, tokens: Tensor, padding: dict[str, Tensor]) -> Problem:
        """Return forwards of whole prompts."""
        calls: dict[str, Call] = {}
        for variant, model in self.models.items():
            # Not in CUDA graphs, which no one uses for prompts, as they hold for one length.
            run = self.compiled(model, "default") if mode == "compiled" else model
            calls[variant] = functools.partial(first_token, run, tokens, padding)
        is_long = tokens.numel() >= LONG_PREFILL and mode == "eager"
        return Problem(calls, warm_ups=1 if is_long else WARM_UPS[mode])

    def decode_problem(self, mode: str, batch: int, seq_len: int) -> Problem:
        """Return steps of one token after ``seq_len`` tokens, all with the same cache."""
        tokens = self.tokens(batch, 1)
        padding = {}
        if batch > 1:
            padding = self.left_padding(batch, seq_len + 1)
            padding["position_ids"] = padding["position_ids"][:, -1:].contiguous()
        cache = self.filled_cache(mode, batch, seq_len)
        calls: dict[str, Call] = {}
        for variant, model in self.models.items():
            run = self.compiled(model, self.arguments.compile_mode) if mode == "compiled" else model
            calls[variant] = functools.partial(next_token, run, tokens, padding, cache)
        return Problem(calls, functools.partial(shorten, cache, seq_len), warm_ups=WARM_UPS[mode])

    def generate_problem(self, mode: str, seq_len: int) -> Problem:
        """Return calls of ``generate``."""
        tokens = self.tokens(1, seq_len)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": self.arguments.new_tokens,
            "min_new_tokens": self.arguments.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        if mode == "compiled":
            options["cache_implementation"] = "static"
        return Problem(
            {variant: functools.partial(model.generate, tokens, **options) for variant, model in self.models.items()},
            warm_ups=WARM_UPS[mode],
        )

    def filled_cache(self, mode: str, batch: int, seq_len: int) -> DynamicCache | StaticCache:
        """Return a cache that holds random keys and values."""
        if mode == "compiled":
            cache = StaticCache(config=self.config, max_cache_len=seq_len + ROOM)
        else:
            cache = DynamicCache(config=self.config)
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (2, batch, self.config.num_key_value_heads, seq_len, self.config.head_dim)
        for layer in range(self.config.num_hidden_layers):
            keys, values = torch.randn(shape, device=self.device, dtype=self.dtype, generator=generator)
            cache.update(keys, values, layer)
        return cache

    def compiled(self, model: PreTrainedModel, mode: str) -> Callable[..., Any]:
        """Return a compiled model; on a CPU, where this script is only tried, without generating code."""
        if self.device.type == "cpu":
            return torch.compile(model, backend="eager", dynamic=False)
        return torch.compile(model, mode=mode, dynamic=False)

    def synchronize(self) -> None:
        """Wait for the GPU, if it is used."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run_once(self, problem: Problem, variant: str, depth: int = 0) -> float:
        """Run a variant's call below some functions and return the time of one of its operations in ms."""
        call = problem.calls[variant]
        self.synchronize()
        start = time.perf_counter()
        run_below(depth, call)
        if problem.waits:
            self.synchronize()
        taken = time.perf_counter() - start
        self.synchronize()
        problem.restore()
        return taken * 1e3 / problem.count

    def warm_up(self, problem: Problem) -> tuple[dict[str, float], dict[str, float | None]]:
        """Run each variant's call a few times; one that fails is reported and left out.

        Returns:
            The last time of each variant in ms; and its peak memory in GiB, of what it takes itself and what is there
            for all variants (weights, cache), but not of what variants before it hold on to (CUDA graphs). None on a
            CPU.
        """
        last: dict[str, float] = {}
        peaks: dict[str, float | None] = {}
        on_gpu = self.device.type == "cuda"
        shared = torch.cuda.memory_allocated() if on_gpu else 0
        for variant in problem.calls:
            before = 0
            if on_gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            try:
                last[variant] = [self.run_once(problem, variant) for _ in range(problem.warm_ups)][-1]
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                print(f"{variant}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                problem.restore()
                continue
            peaks[variant] = None
            if on_gpu:
                peaks[variant] = round((torch.cuda.max_memory_allocated() - before + shared) / 2**30, 3)
        return last, peaks

    def measure(self, problem: Problem, rounds: int) -> tuple[dict[str, float], dict[str, float | None]]:
        """Return the median time in ms and the peak memory in GiB of each variant."""
        last, peaks = self.warm_up(problem)
        # The same number of calls for all, so that each heats the GPU as the others do.
        turn = max(1, int(TURN_MS / (problem.count * max(last.values(), default=TURN_MS))))
        order = list(last)
        times: dict[str, list[float]] = {variant: [] for variant in order}
        for _ in range(rounds):
            self.order.shuffle(order)
            depths = list(itertools.islice(self.depths, turn))
            for variant in order:
                times[variant].append(statistics.median(self.run_once(problem, variant, depth) for depth in depths))
        return {variant: statistics.median(taken) for variant, taken in times.items()}, peaks

    def rows(self, what: str, mode: str, seq_len: int) -> list[dict[str, Any]]:
        """Measure one problem in all variants, and in several copies of the models if Python's time may matter."""
        waits_for_python = seq_len < LONG_PREFILL if what in ("ttft", "batch") else what not in CALLS
        copies = min(COPIES, self.arguments.rounds) if waits_for_python and mode == "eager" else 1
        found: dict[str, list[float]] = {}
        peaks: dict[str, float | None] = {}
        for _ in range(copies):
            if copies > 1:
                vars(self).pop("models", None)
                gc.collect()
            problem, batch = self.problem(what, mode, seq_len)
            taken, highest = self.measure(problem, -(-self.arguments.rounds // copies))
            del problem
            for variant, ms in taken.items():
                found.setdefault(variant, []).append(ms)
            peaks = {name: None if x is None else max(x, peaks.get(name) or 0.0) for name, x in highest.items()}
        # A variant that failed in a copy has failed.
        times = {variant: statistics.median(ms) for variant, ms in found.items() if len(ms) == copies}
        sdpa = times.get("sdpa")
        return [
            {
                "what": what,
                "model": self.arguments.model,
                "layers": self.config.num_hidden_layers,
                "mode": mode,
                "variant": variant,
                "seq_len": seq_len,
                "batch": batch,
                **({"new_tokens": self.arguments.new_tokens} if what == "generate" else {}),
                "date": datetime.date.today().isoformat(),
                "ms": round(ms, 4),
                "ratio_to_sdpa": None if sdpa is None else round(ms / sdpa, 3),
                "peak_gib": None if what in CALLS else peaks[variant],
            }
            for variant, ms in times.items()
        ]


def rope_parameters(model: str) -> dict[str, Any]:
    """Return the rotary embedding's parameters; those of Llama 3.1 cost a little more than the plain ones."""
    if model != "llama-3.1-8b":
        return {"rope_type": "default", "rope_theta": 100000.0}
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def run_below(depth: int, call: Call) -> None:
    """Run a call with so many more functions on the stack."""
    if depth:
        run_below(depth - 1, call)
    else:
        call()


def repeat(call: Call, count: int, cudnn: bool) -> None:
    """Run a call some times in a row, with PyTorch's SDPA restricted to cuDNN if ``cudnn``."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else contextlib.nullcontext():
        for _ in range(count):
            call()


def first_token(run: Callable[..., Any], tokens: Tensor, padding: dict[str, Tensor]) -> Tensor:
    """Return the best next token of each prompt, ``[batch]``; the cache that the forward makes is dropped."""
    return run(input_ids=tokens, use_cache=True, logits_to_keep=1, **padding).logits[:, -1].argmax(-1)


def next_token(
    run: Callable[..., Any], tokens: Tensor, padding: dict[str, Tensor], cache: DynamicCache | StaticCache
) -> Tensor:
    """Return the best token after one more, ``[batch]``."""
    # What a CUDA graph returned in the step before is not needed any more.
    torch.compiler.cudagraph_mark_step_begin()
    return (
        run(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **padding)
        .logits[:, -1]
        .argmax(-1)
    )


def shorten(cache: DynamicCache | StaticCache, seq_len: int) -> None:
    """Drop what was added to a cache after its first ``seq_len`` tokens."""
    for layer in cache.layers:
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(seq_len)
        else:
            layer.crop(seq_len - layer.get_seq_length())


def problem_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a row and those of other variants have in common."""
    return tuple(row[name] for name in PROBLEM)


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows are sorted by: the larger model and whole models first."""
    models, variants = list(MODELS), list(VARIANTS)
    return (
        models.index(row["model"]),
        list(SEQ_LENS).index(row["what"]),
        row["mode"] == "compiled",
        -row["layers"],
        row["batch"],
        row["seq_len"],
        variants.index(row["variant"]),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, a problem a line.

    Cells are ms and in brackets the ratio to SDPA's. The last two say what sparsity changes beside this project's own
    dense attention, as a ratio of times, and peak memory.
    """
    lines = [
        f"| what | model | layers | mode | batch | tokens | {' | '.join(VARIANTS)} | 2:4 / dense | GiB: sdpa, 2:4 |",
        "|---|---|" + "---:|---|" + "---:|" * (4 + len(VARIANTS)),
    ]
    for (what, model, layers, mode, seq_len, batch), group in itertools.groupby(rows, key=problem_of):
        found = {row["variant"]: row for row in group}
        cells = [what, model, layers, mode, batch, seq_len]
        for variant in VARIANTS:
            row = found.get(variant)
            ratio = row and variant != "sdpa" and row["ratio_to_sdpa"]
            ms = row and (f"{row['ms']:.0f}" if row["ms"] >= 100 else f"{row['ms']:.3g}")
            cells.append("" if row is None else f"{ms} ({ratio:.2f})" if ratio else ms)
        both = "dense" in found and "2:4" in found
        cells.append(f"{found['2:4']['ms'] / found['dense']['ms']:.2f}" if both else "")
        peaks = [found[variant]["peak_gib"] for variant in ("sdpa", "2:4") if variant in found]
        cells.append(", ".join(f"{peak:.1f}" for peak in peaks if peak is not None))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def profile(bench: Bench) -> None:
    """Print where Python's time goes in eager decode steps and short prefills."""
    prefill = bench.prefill_problem("eager", bench.tokens(1, PROFILED["prefill"]), {})
    problems = {
        f"prefill of {PROFILED['prefill']} tokens": prefill,
        f"decode step after {PROFILED['context']} tokens": bench.decode_problem("eager", 1, PROFILED["context"]),
    }
    for (name, problem), variant in itertools.product(problems.items(), PROFILED["variants"]):
        for _ in range(WARM_UPS["eager"]):
            bench.run_once(problem, variant)
        profiler = cProfile.Profile()
        for _ in range(PROFILED["calls"]):
            bench.synchronize()
            profiler.runcall(problem.calls[variant])
            bench.synchronize()
            problem.restore()
        print(f"\n{variant}, {PROFILED['calls']} times one {name}")
        pstats.Stats(profiler).strip_dirs().sort_stats("cumulative").print_stats(40)


def problems_of(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield what, mode and length of each problem that the arguments ask for: attention alone first, then models."""
    longest = MODELS[arguments.model]["max_position_embeddings"]
    kinds = [(what, "eager") for what in ("host", "attention") if "eager" in arguments.modes]
    kinds += [(what, mode) for mode in arguments.modes for what in ("ttft", "decode", "batch", "generate")]
    for what, mode in kinds:
        if what in arguments.parts:
            lengths = arguments.seq_lens or [seq_len for seq_len in SEQ_LENS[what] if seq_len <= longest]
            yield from ((what, mode, seq_len) for seq_len in lengths)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*SEQ_LENS], choices=SEQ_LENS, help="what is measured")
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument(
        "--seq-lens",
        nargs="+",
        type=int,
        help="tokens, for all parts; by default each its own, as many as the model has positions for",
    )
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS, help="shape; weights are random")
    parser.add_argument("--weights", type=Path, help="folder of a Transformers model to take weights and shape from")
    parser.add_argument("--layers", type=int, help="only so many of the model's layers")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the part batch")
    parser.add_argument("--decode-batch", type=int, default=1, help="sequences of the part decode; padded if several")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the part generate")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    parser.add_argument("--compile-mode", default="reduce-overhead", help="of compiled decode steps")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/model-<device>.json")
    parser.add_argument("--profile", action="store_true", help="only print where Python's time goes, by cProfile")
    parser.add_argument("--show", type=Path, help="only print the table of a JSON file")
    return parser


@torch.no_grad()
def main(command_line: list[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    arguments = parser().parse_args(command_line)
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())["rows"]))
        return
    bench = Bench(arguments)
    if arguments.profile:
        profile(bench)
        return
    torch._dynamo.config.recompile_limit = 1000
    device = recording.device_name(arguments.device)
    output = arguments.output or recording.default_output("model", device)
    results = recording.header(device, transformers=transformers.__version__)
    rows = recording.rows_before(output, results)
    print(table([]), flush=True)
    for what, mode, seq_len in problems_of(arguments):
        new = bench.rows(what, mode, seq_len)
        if new:
            print(table(new).splitlines()[-1], flush=True)
            rows = sorted([row for row in rows if problem_of(row) != problem_of(new[0])] + new, key=place_of)
            # after every problem, so that an interrupted run keeps what it measured
            recording.write(output, results, rows)
        # Graphs and caches of this problem must not count as memory of the next.
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
