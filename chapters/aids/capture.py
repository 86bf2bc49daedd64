"""Chapter 07's tools of a GPU, with a stand-in on a CPU: captured steps, and copies that the host does not wait for.

On a GPU :func:`capture` makes a CUDA graph, elsewhere a :class:`Recording`. Both treat a step alike. A replay repeats
operations on addresses. It runs no Python: a branch stays as it was taken, a number stays as it was read, and a tensor
that a name was bound to afterwards is not used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_FORBIDDEN = {
    _aten._local_scalar_dense.default: "the value of a tensor was read (item, int, bool, if)",
    _aten.equal.default: "two tensors were compared (torch.equal)",
    _aten.lift_fresh.default: "a number came from the host (torch.tensor, or tensor[i] = number)",
    _aten.nonzero.default: "a shape depends on values (nonzero)",
    _aten.masked_select.default: "a shape depends on values (masked_select)",
    _aten.repeat_interleave.Tensor: "a shape depends on values (repeat_interleave)",
    _aten.unique_consecutive.default: "a shape depends on values (unique)",
    _aten._unique2.default: "a shape depends on values (unique)",
    _aten.bincount.default: "a shape depends on values (bincount)",
}
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)


_WAITING = frozenset(
    {"tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
)


class CaptureError(RuntimeError):
    """A step cannot be captured: in it the host would have to wait for the GPU, or to send something to it."""


class NoWaiting(TorchFunctionMode):
    """In a ``with`` block, raises ``CaptureError`` where Python wants a tensor's values: ``tolist``, ``item``, ``if``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each of its functions and for each method of a tensor."""
        name = getattr(func, "__name__", "")
        if name in _WAITING:
            raise CaptureError(f"the host would wait for the GPU here: the values of a tensor are read ({name})")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is computed in a ``with`` block; :meth:`replay` computes it again, each result in its old place.

    ``operations`` are ``(function, args, kwargs, result)``. In a CUDA graph these are the kernels and their arguments.
    Raises ``CaptureError``, in the block, for most of what ``torch.cuda.graph`` refuses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each operation, below everything that is Python."""
        why = _FORBIDDEN.get(func)
        if func in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            why = "a shape depends on values (a mask used as an index)"
        if why:
            raise CaptureError(f"a captured step must not make the host wait for the GPU: {why}")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Compute everything again, in order, on the tensors of the recording."""
        for func, args, kwargs, result in self.operations:
            if func.is_view:  # it computes nothing: the view still shows the same memory
                continue
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def capture(step: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Record what ``step`` launches. What is returned launches all of it again, on the same memory, with one call.

    ``step`` is run for it, on a GPU three times: whatever it writes to at that moment is written to. Graphs that share a
    ``pool`` (``torch.cuda.graph_pool_handle()``) share the memory of what lies between their inputs and outputs.
    """
    if device.type != "cuda":
        recording = Recording()
        with NoWaiting(), recording:
            step()
        return recording.replay
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what a library does at its first call must not get into the recording
        step()
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def upload(numbers: Any, device: torch.device) -> Tensor:
    """int64 numbers on the device. The GPU fetches them from pinned memory itself, while the host goes on."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Download:
    """A copy of a tensor on its way to the host. Later changes of the tensor do not change the copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> list[Any]:
        """Wait until the copy has arrived, not for what was launched since. Returns its numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers
