"""PageBrain: LLM serving, built step by step, from a naive KV cache to PagedAttention with continuous batching."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pagebrain.config import PageBrainConfig as PageBrainConfig
    from pagebrain.engine.engine import Engine as Engine
    from pagebrain.errors import PageBrainError as PageBrainError
    from pagebrain.llm import LLM as LLM
    from pagebrain.outputs import RequestOutput as RequestOutput
    from pagebrain.sampling_params import BeamSearchParams as BeamSearchParams
    from pagebrain.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "BeamSearchParams": "pagebrain.sampling_params",
    "Engine": "pagebrain.engine.engine",
    "LLM": "pagebrain.llm",
    "PageBrainConfig": "pagebrain.config",
    "PageBrainError": "pagebrain.errors",
    "RequestOutput": "pagebrain.outputs",
    "SamplingParams": "pagebrain.sampling_params",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that ``pagebrain --help`` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pagebrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
