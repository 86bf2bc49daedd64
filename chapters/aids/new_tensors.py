"""What a piece of PyTorch code starts and makes: the number of operations, and every tensor that is new.

``with NewTensors() as made:`` stands around the code. Then ``made`` has the numbers.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NewTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are started under it, and notes the tensors that they make.

    A tensor is *new* if it is not a view of one that was given to the operation.

    Attributes:
        num_operations: operations, views included.
        num_numbers: numbers in all new tensors together.
        num_bytes: bytes in all new tensors together.
        largest: numbers in the largest new tensor.
        most_at_once: numbers in the new tensors that existed at the same time, at the most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.num_operations = self.num_numbers = self.num_bytes = self.largest = self.most_at_once = 0
        self._alive: list[tuple[weakref.ref[torch.UntypedStorage], int]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note what it makes."""
        out = func(*args, **(kwargs or {}))
        self.num_operations += 1
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.num_numbers += x.numel()
                self.num_bytes += x.numel() * x.element_size()
                self.largest = max(self.largest, x.numel())
                self._alive.append((weakref.ref(x.untyped_storage()), x.numel()))
        self._alive = [(storage, size) for storage, size in self._alive if storage() is not None]
        self.most_at_once = max(self.most_at_once, sum(size for _, size in self._alive))
        return out
