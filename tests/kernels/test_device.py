"""Launches without Triton's own look-ups."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from modelopt_lite.kernels import device
from modelopt_lite.kernels.device import Described, rebased


@pytest.mark.skipif(device.TRITON != (3, 6), reason="other versions of Triton encode descriptors themselves")
def test_descriptors_are_encoded_as_triton_does(monkeypatch):
    """The launcher gets what it gets from Triton's function around it, without a driver."""

    def encode(address, *layout):
        return ("map", address, *(tuple(x) if isinstance(x, list) else x for x in layout))

    utils = SimpleNamespace(fill_tma_descriptor=encode)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    x, y = (torch.zeros(64, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    descriptor = rebased(TensorDescriptor(x, [7, 16, 4, 64], [256, 1024, 64, 1], [4, 16, 1, 64]), None)
    kind = "tensordesc<bf16[4,16,1,64]>"
    layout = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [4, 16, 1, 64], "fp4_padded": False}
    signature = dict(enumerate(("i32", kind, ("i32", "i32"), kind, "constexpr", "constexpr")))
    calls = []

    def launch(*arguments):
        calls.append(arguments)

    around = driver.wrap_handle_tensordesc(launch, signature, [layout] * 2)
    run = SimpleNamespace(
        global_scratch_size=0, profile_scratch_size=0, launch=around, launch_cooperative_grid=False, launch_pdl=False
    )
    metadata = SimpleNamespace(tensordesc_meta=[layout] * 2)
    compiled = SimpleNamespace(run=run, packed_metadata="packed", function="function", metadata=metadata)
    arguments = (5, Described(descriptor, x), (1, 2), Described(descriptor, y), None)
    launcher = device._launcher(compiled, arguments)
    assert launcher.run is launch
    encoded = list(arguments)
    launcher.encode(encoded)
    launcher.run(1, 1, 1, "stream", *launcher.rest, *encoded, 7)
    around(1, 1, 1, "stream", *launcher.rest, *map(device._as_triton_takes, arguments), 7)
    assert calls[0] == calls[1]
    assert [x[1] for x in calls[0] if isinstance(x, tuple) and x[0] == "map"] == [x.data_ptr(), y.data_ptr()]
