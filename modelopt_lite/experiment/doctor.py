"""What a machine has, and which kernels run on it."""

from __future__ import annotations

import os
import platform

import torch

from ..cache import COMPILED_KERNELS, cache_folder, private_folder
from ..errors import UnsupportedError
from ..kernels import attention
from ..methods import SparseSoftmax
from ..plan import AttentionPlan
from .assets import MODEL_REQUIREMENT

TOKENS = 64


def describe_machine() -> dict[str, str]:
    """Return what matters here about this machine, by name."""
    found = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch"
    }
    found["CUDA"] = str(torch.version.cuda or "PyTorch is built without CUDA")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        found[f"cuda:{i}"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, plan in (("dense", AttentionPlan()), ("2:4", SparseSoftmax().plan())):
        for backend in ("torch", "triton"):
            found[f"{backend} kernels, {name}"] = _try(plan, backend, device)
    cache = cache_folder()
    model = cache / MODEL_REQUIREMENT.replace("==", "-")
    found["cache"] = f"{cache}; built-in model {'there' if model.is_dir() else 'not fetched yet'}"
    found["compiled kernels"] = _kept_kernels()
    return found


def _kept_kernels() -> str:
    """Say where kernels in CUDA C++ are kept when they are compiled, and how many are there."""
    try:
        folder = private_folder(COMPILED_KERNELS)
        return f"{folder}; {sum(1 for _ in folder.iterdir())} there"
    except (OSError, RuntimeError) as error:
        return f"not kept, so every process compiles them: {error}"


def _try(plan: AttentionPlan, backend: str, device: str) -> str:
    """Say whether a backend runs a plan on a device, and if not, why."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.zeros(TOKENS, 1, 128, dtype=dtype, device=device)
    start, length = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, TOKENS))
    try:
        attention(x, x, x, start, length, TOKENS, plan=plan, backend=backend)  # type: ignore[arg-type]
    except UnsupportedError as error:
        return f"no: {str(error).rpartition('cannot run this: ')[2]}"
    except Exception as error:  # whatever a compiler or a driver raises is the answer
        return f"no: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    chosen = "triton" if device == "cuda" else "torch"
    return f"yes, on {device}{'; chosen by itself' if backend == chosen else ''}"
