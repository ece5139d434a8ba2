"""What every test needs: Triton's interpreter where there is no GPU, and skipping what needs one."""

import os
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

# Triton reads it when it is imported, so this stands before any import of the package. Before 3.7, Triton's interpreter
# does not work with NumPy 2.4 or later, and the tests that need it are skipped.
if not torch.cuda.is_available() and (
    Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")
):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that run at the same time share the cores; PyTorch would give all of them to each.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    torch.set_num_threads(1)

import interpreter

pytest_plugins = ["models_table"]

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.speed_up()


def pytest_xdist_auto_num_workers():
    """Use at most four processes: each holds PyTorch and Transformers, and on a GPU machine all share one GPU."""
    return min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
