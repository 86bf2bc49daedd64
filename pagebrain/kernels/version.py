"""Whether a Triton that is new enough for the kernels is installed. This module does not need one."""

import re

from pagebrain.errors import ConfigError

MIN_TRITON = (3, 6)
"""The oldest Triton that the kernels are tested with."""


def available() -> bool:
    """Whether a Triton that compiles the kernels is installed."""
    try:
        require_triton()
    except ConfigError:
        return False
    return True


def installed() -> str:
    """The version of Triton that is imported, or ``none``."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def require_triton() -> None:
    """Raise ``ConfigError`` unless a Triton that compiles the kernels can be imported."""
    wanted = ".".join(map(str, MIN_TRITON))
    try:
        import triton
    except ImportError as error:
        found = f"it cannot be imported ({error})"
    else:
        numbers = re.match(r"(\d+)\.(\d+)", str(triton.__version__))
        if numbers is None or (int(numbers[1]), int(numbers[2])) >= MIN_TRITON:
            return
        found = f"this is {triton.__version__}"
    raise ConfigError(
        f"the GPU kernels need Triton {wanted} or later, and {found}: pip install 'triton>={wanted}' on Linux, or leave the "
        "choice of attention to PageBrain, which computes with torch operations where there is no such Triton"
    )
