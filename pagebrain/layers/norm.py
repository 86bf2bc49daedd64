"""Norms, each with the residual addition before it.

A transformer adds the output of a sublayer to the residual stream, and norms the sum for the next sublayer. The two are one
layer here, because they are one kernel on a GPU: both read and write a few kilobytes per token, which takes less time than a
launch. (The interface is nano-vllm's.)
"""

from typing import cast

from torch import Tensor
from torch.nn import functional

from pagebrain.kernels.inputs import Rows
from pagebrain.layers.forms import Layer, declared


class LayerNorm(Layer):
    """Layer normalization with weight and bias, both ``[hidden_size]``."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = declared(hidden_size)
        self.bias = declared(hidden_size)
        self.eps = eps
        self._uses_kernel = False

    def forward(self, hidden: Tensor | Rows, residual: Tensor | Rows) -> tuple[Tensor, Tensor]:
        """``(normed, sum)``: the norm of ``residual + hidden``, and the sum, which is the next residual.

        All are ``[num_tokens, hidden_size]``. ``hidden`` is the output of the last sublayer. At the start of the residual
        stream, the arguments are the embeddings of tokens and positions.
        """
        if self._uses_kernel:
            from pagebrain.kernels.add_norm import add_norm

            return add_norm(hidden, residual, self.weight, self.bias, self.eps)
        residual = cast(Tensor, residual) + cast(Tensor, hidden)
        return functional.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps), residual

    def prepare(self, *, kernels: bool, owned: bool) -> None:
        """With kernels, one kernel computes the addition and the norm, and either argument may be :class:`Rows`."""
        self._uses_kernel = kernels
