"""The attention backend: the object that writes K and V of new tokens into the pool and reads them back.

One object does both, so a format that it writes is a format that it reads. :func:`choose_backend` takes the Triton kernels
on a GPU and torch operations elsewhere, or the part that was named.
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
    """What a model layer calls, with its number and the pool. A class derived from this one has to add the two methods.

    Attributes:
        supports: features of the engine that work with it (:data:`pagebrain.engine.parts.FEATURES`); the others are switched
            off.
    """

    supports: frozenset[str] = frozenset()

    def write(self, layer: int, pool: KVPool, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """Put K and V ``[num_tokens, num_kv_heads, head_dim]`` of the batch's tokens into their slots."""
        ...

    def attend(self, layer: int, query: Tensor, pool: KVPool, batch: ForwardBatch, scale: float) -> Tensor:
        """Causal attention of the batch's tokens over all tokens of their sequences, those of the batch included.

        ``query`` and the result are ``[num_tokens, num_heads, head_dim]``. ``scale`` is the factor on the scores. The K and
        V of the batch's tokens have been written.
        """
        ...

    @staticmethod
    def reason_against(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the backend cannot serve such K and V there, in words; ``None`` if it can."""
        return None


def choose_backend(
    named: Any, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, str | None]:
    """The backend for K and V of ``dtype`` and ``head_dim`` on ``device``. Called once for an engine.

    Args:
        named: what the user named: a function like :func:`pagebrain.attention.paged_attention`, a backend, or a class of
            one, which is made without arguments. ``None`` leaves the choice to this function.
        device, dtype, head_dim: the model's.

    Returns:
        The backend, and on a GPU that must do without the kernels the reason.

    Raises:
        ConfigError: if the backend that was named cannot serve such a model.
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
