"""Targets of the family suite."""

import pytest


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)
def target(request):
    """Backend and device of the family suite."""
    return request.param
