"""Speed of the forward kernels where a batch is ragged, and where many scores are equal.

Both are ratios to an ordinary problem of the same work, measured in turns as in ``attention.py``: a batch of 16
sequences of 512 to 8192 tokens against 16 equal ones, and keys of which three at a time are the same, or all are,
against random keys. Prints a table and writes JSON.

    python benchmarks/attention_cases.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
import triton
from attention import Call, inputs, measure, own_call, packed_request, request_of
from torch import Tensor

HEADS, HEAD_DIM, SEQ_LEN = (32, 8), 128, 16384
NAMES = ["dense", "1:4", "2:4", "2:8", "4:8", "8:16"]
NAMES_OF = {"hopper": NAMES, "sparse_cores": ["2:4"], "portable": NAMES}
LENGTHS = [512 * (i + 1) for i in range(16)]
"""Tokens of the sequences of the ragged batch, 512 to 8192."""


def packed_call(lengths: list[int], name: str, kernel: str) -> Call:
    """Return a call of one of the kernels on sequences of some lengths, which are shuffled."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    length = torch.tensor(lengths)[order].cuda()
    packing = length.cumsum(0) - length, length, max(lengths)
    q, k, v = (x[0] for x in inputs(1, sum(lengths), HEADS, HEAD_DIM, "bf16"))
    return own_call(packed_request(q, k, v, packing, True, name), kernel)


def repeated(k: Tensor, times: int) -> Tensor:
    """Return keys ``[batch, seq, heads, dim]`` of which ``times`` at a time are the same."""
    return k[:, ::times].repeat_interleave(times, 1).contiguous()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=[*NAMES_OF], choices=NAMES_OF)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heat", type=float, default=1.0, help="seconds of heating before each problem")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/attention-cases-<device>.json")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    default = Path(__file__).parent / "results" / f"attention-cases-{device.lower().replace(' ', '-')}.json"
    output = arguments.output or default

    equal = round((sum(length**2 for length in LENGTHS) / len(LENGTHS)) ** 0.5)
    q, k, v = inputs(1, SEQ_LEN, HEADS, HEAD_DIM, "bf16")
    rows: list[dict[str, Any]] = []
    print("| kernel | name | ragged batch | keys in threes | all keys alike |\n| --- | --- | ---: | ---: | ---: |")
    for kernel in arguments.kernels:
        for name in NAMES_OF[kernel]:
            calls = {
                "equal": packed_call([equal] * len(LENGTHS), name, kernel),
                "ragged": packed_call(LENGTHS, name, kernel),
                "random": own_call(request_of(q, k, v, True, name), kernel),
                "threes": own_call(request_of(q, repeated(k, 3)[:, :SEQ_LEN], v, True, name), kernel),
                "alike": own_call(request_of(q, repeated(k, SEQ_LEN), v, True, name), kernel),
            }
            ms = measure(calls, arguments.heat, arguments.rounds)
            # Both batches have the same work up to rounding of the equal length.
            rates = {
                "ragged": ms["equal"] / ms["ragged"] * sum(x**2 for x in LENGTHS) / (len(LENGTHS) * equal**2),
                "threes": ms["random"] / ms["threes"],
                "alike": ms["random"] / ms["alike"],
            }
            rows.append(
                {"kernel": "triton" if kernel == "portable" else kernel, "name": name}
                | {f"{case}_ms": round(taken, 4) for case, taken in ms.items()}
                | {f"{case}_rate": round(rate, 3) for case, rate in rates.items()}
            )
            print(f"| {kernel} | {name} |", " | ".join(f"{rate:.2f}" for rate in rates.values()), "|", flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    found = {"device": device, "versions": versions, "date": datetime.date.today().isoformat(), "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
