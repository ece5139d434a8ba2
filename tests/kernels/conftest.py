"""What the tests of machine code share."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modelopt_lite.kernels import block_launch, settings
from modelopt_lite.kernels.hopper import backward_launch as hopper_backward_launch
from modelopt_lite.kernels.hopper import bounds, sparse_cores
from modelopt_lite.kernels.hopper import forward_launch as hopper_launch


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the markers
def pytest_collection_modifyitems(items):
    """Let one process run a module's tests of machine code, or each process would compile all of it."""
    for item in items:
        if "compiled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module")
def compiled(request):
    """What the test's module prints as a program, where Triton's interpreter is off: JSON, a line each."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(request.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def poison():
    """Fill what is allocated and not yet written with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def absent_gpu(monkeypatch):
    """Have the choice take tensors of type ``OnGpu`` to be on a Hopper GPU; returns how to set its capability."""

    def set_capability(capability):
        for module in (settings, block_launch, hopper_launch, sparse_cores, bounds):
            monkeypatch.setattr(module, "compute_capability", lambda device: capability)

    set_capability(90)
    monkeypatch.delenv("MODELOPT_LITE_KERNEL", raising=False)
    for module in (hopper_launch, hopper_backward_launch, sparse_cores):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    return set_capability


@pytest.fixture(params=["hopper", "portable"])
def kernel(request, monkeypatch):
    """Run each test with either kernel, but once where the Hopper kernel cannot run at all."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if request.param == "hopper" and (dtype == torch.float32 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("the Hopper kernel cannot run this")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", request.param)
    return request.param
