"""The attention backend: the object that writes K and V of new tokens to the pool and reads them.

One object does both, so it reads the format that it writes. :func:`choose_backend` takes the Triton kernels on a GPU and
torch operations on other devices, or the part that the user named.
"""

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.attention.torch_backend import FunctionBackend, TorchBackend
from pagebrain.attention.triton_backend import TritonBackend
from pagebrain.errors import ConfigError, PageBrainError, PartError


class AttentionBackend(Protocol):
    """What an attention layer calls, with its number and the pool. A derived class has to define ``write`` and ``attend``.

    Attributes:
        supports: features of the engine that work with it (:data:`pagebrain.engine.parts.FEATURES`). The engine switches the
            others off.
    """

    supports: frozenset[str] = frozenset()

    def write(self, layer: int, pool: KVPool, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """Write K and V ``[num_tokens, num_kv_heads, head_dim]`` of the batch's tokens to their slots."""
        ...

    def attend(self, layer: int, query: Tensor, pool: KVPool, batch: ForwardBatch, scale: float) -> Tensor:
        """Causal attention of the batch's tokens over all tokens of their sequences, those of the batch included.

        ``query`` and the result are ``[num_tokens, num_heads, head_dim]``. ``scale`` is the factor on the scores. ``write``
        was called before.
        """
        ...

    @staticmethod
    def reason_against(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """The reason why the backend cannot serve such K and V on ``device``; ``None`` if it can."""
        return None


def choose_backend(
    named: Any, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, str | None]:
    """The backend for K and V of ``dtype`` and ``head_dim`` on ``device``. Called once for an engine.

    Args:
        named: the user's part: a function like :func:`pagebrain.attention.paged_attention`, a backend, or its class, which
            is called without arguments. ``None`` leaves the choice to this function.
        device, dtype, head_dim: the model's.

    Returns:
        The backend, and the reason if a GPU is used without the kernels.

    Raises:
        ConfigError: if the named backend cannot serve such a model.
        PartError: if the named class raises an exception.
    """
    if named is not None:
        reason = getattr(named, "reason_against", AttentionBackend.reason_against)(device, dtype, head_dim)
        if reason is not None:
            raise ConfigError(f"the attention that was named cannot serve this model: {reason}")
        if not hasattr(named, "attend"):
            return FunctionBackend(named), None
        return (_made(named) if inspect.isclass(named) else named), None
    if device.type != "cuda":
        return TorchBackend(), None
    reason = TritonBackend.reason_against(device, dtype, head_dim)
    return (TritonBackend() if reason is None else TorchBackend()), reason


def _made(backend_class: type[Any]) -> AttentionBackend:
    try:
        backend: AttentionBackend = backend_class()
    except PageBrainError:
        raise
    except Exception as error:
        raise PartError(
            f"attention {backend_class.__qualname__} could not be made: {type(error).__name__}: {error}"
        ) from error
    return backend
