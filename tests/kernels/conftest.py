"""What the tests of machine code share."""

import json
import os
import subprocess
import sys

import pytest
import torch


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


@pytest.fixture(params=["hopper", "portable"])
def kernel(request, monkeypatch):
    """Run each test with either kernel, but once where the Hopper kernel cannot run at all."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if request.param == "hopper" and (dtype == torch.float32 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("the Hopper kernel cannot run this")
    monkeypatch.setenv("MODELOPT_LITE_KERNEL", request.param)
    return request.param
