"""Embeddings: a row of a table for each token, or for each position."""

from torch import Tensor
from torch.nn import functional

from pagebrain.kernels.inputs import Rows
from pagebrain.layers.forms import Layer, declared


class Embedding(Layer):
    """A table ``[num_rows, hidden_size]``."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = declared(num_rows, hidden_size)
        self._gathers = True

    def forward(self, indices: Tensor) -> Tensor | Rows:
        """The rows at ``indices`` ``[num_tokens]``: a tensor ``[num_tokens, hidden_size]``, or ``Rows`` for the norm."""
        return functional.embedding(indices, self.weight) if self._gathers else Rows(self.weight, indices)

    def prepare(self, *, kernels: bool, owned: bool) -> None:
        """With kernels, return :class:`Rows`."""
        self._gathers = not kernels
