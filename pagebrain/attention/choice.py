"""Which implementation computes: the Triton kernels on a GPU, torch operations elsewhere.

The only place that asks whether there is Triton; nothing else of the engine imports it unless it was chosen here or named by
``swap``.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from pagebrain.attention.kernel_inputs import why_not
from pagebrain.errors import ConfigError
from pagebrain.parts import AttentionPart

MIN_TRITON = (3, 6)
"""The oldest Triton that the kernels are tested with."""


def available() -> bool:
    """Whether there is a Triton that compiles the kernels."""
    try:
        require_triton()
    except ConfigError:
        return False
    return True


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


def kernels_fit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """``None`` if the Triton kernels can serve such K and V on ``device``; otherwise a line that says why not."""
    if device.type != "cuda":
        return f"the Triton kernels are for GPUs, and the model is on {device}"
    if not available():
        wanted = ".".join(map(str, MIN_TRITON))
        return f"there is no Triton {wanted} or later: pip install 'triton>={wanted}' for a much faster GPU engine"
    return why_not(dtype, head_dim)


def default_writer(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    """What writes ``(key, value)`` of new tokens into ``(key_pool, value_pool)`` at ``slot_mapping``."""
    if kernels_fit(device, dtype, head_dim) is None:
        from pagebrain.attention import kernels

        return kernels.write_kv
    from pagebrain.attention.cpu import write_kv

    return write_kv


def default_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionPart:
    """The attention that the engine uses unless another is named."""
    if kernels_fit(device, dtype, head_dim) is None:
        from pagebrain.attention import kernels

        return kernels.paged_attention
    from pagebrain.attention.cpu import paged_attention

    return paged_attention
