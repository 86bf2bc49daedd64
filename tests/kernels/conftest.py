"""The machine that a kernel's test runs on."""

import pytest

from tests.support.kernels import DEVICES, require_kernels


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """``cpu``, where the kernels are interpreted, or ``cuda``; skips where they cannot run."""
    require_kernels(request.param)
    name: str = request.param
    return name
