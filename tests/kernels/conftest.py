"""The machine that a kernel's test runs on."""

import pytest

from pagebrain.attention.choice import SWITCH
from tests.support.kernels import DEVICES, require_kernels


@pytest.fixture(autouse=True)
def turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for somebody who asked for the kernels."""
    monkeypatch.setenv(SWITCH, "1")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """``cpu``, where the kernels are interpreted, or ``cuda``; skips where they cannot run."""
    require_kernels(request.param)
    name: str = request.param
    return name
