"""Matrix products, in the form that suits the device.

The default form reads the weight in the checkpoint's layout. Two other forms are faster:

* **packed**, on a CPU, if the weights belong to the engine: oneDNN reads a weight that it has reordered beforehand three
  times as fast as one in the layout of GPT-2's checkpoints (docs/performance), and applies the activation to the product
  while it is in registers. oneDNN compiles a product for each number of rows. For the four products of a layer this takes
  5 ms and a megabyte of memory, which is not freed. So above ``EXACT_ROWS`` only some numbers of rows are computed
  (:func:`padded_rows`): rows of zeros are added, and their results are dropped.
* **fused**, on a GPU: a product of a decode step takes a few microseconds, about as long as the launch of another kernel.
  So cuBLAS computes GELU in the product's own kernel, and the head gets rows of zeros up to a size that is fast in cuBLAS.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from pagebrain.layers.activations import Activation, find_activation
from pagebrain.layers.forms import Layer, declared

EXACT_ROWS = 64
"""No row is added up to this number: a decode step has one row for each sequence."""

HEAD_MULTIPLE = 128
"""cuBLAS is five times slower with a head of 50,257 rows than with 50,304: its fast kernels need whole tiles of rows."""

_PACKABLE = (torch.float32, torch.bfloat16)

_ONEDNN_ACTIVATIONS = {
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}
"""Hugging Face's name of an activation -> oneDNN's name and variant."""

_CUBLAS_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # cuBLASLt's GELU is the tanh form


class Linear(Layer):
    """``activation(x @ weight.T + bias)`` with the weight ``[out_features, in_features]``.

    Args:
        in_features, out_features: of ``x`` and of the result.
        bias: whether there is one, ``[out_features]``.
        activation: by Hugging Face's name; ``None`` for no activation.
        in_out: the weight is ``[in_features, out_features]`` instead, as in Hugging Face's Conv1D.
        padded: whether the fused form may return columns of zeros past ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str | None = None,
        in_out: bool = False,
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.weight = declared(in_features, out_features) if in_out else declared(out_features, in_features)
        self.bias = declared(out_features) if bias else None
        self.activation = activation
        self.in_out = in_out
        self.padded = padded
        self._activate: Activation | None = None if activation is None else find_activation(activation)
        self._packed: Tensor | None = None
        self._has_fused_gelu = False

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to ``[num_tokens, out_features]``."""
        if self._packed is not None:
            num_padding = padded_rows(x.shape[0]) - x.shape[0]
            rows = functional.pad(x, (0, 0, 0, num_padding)) if num_padding else x
            fused = self.activation if self._activate is None else None
            out = _packed_product(rows, self._packed, self.bias, fused)[: x.shape[0]]
        elif self._has_fused_gelu and self.bias is not None:
            weight = self.weight if self.in_out else self.weight.t()
            return torch._addmm_activation(self.bias, x, weight, use_gelu=True)
        elif self.in_out and self.bias is not None:
            out = torch.addmm(self.bias, x, self.weight)
        else:
            out = functional.linear(x, self.weight.t() if self.in_out else self.weight, self.bias)
        return out if self._activate is None else self._activate(out)

    def prepare(self, *, kernels: bool, owned: bool) -> None:
        """Pack the weight on a CPU if it is ``owned``; fuse on a GPU with ``kernels``."""
        if owned and can_pack(self.weight.dtype, self.weight.device):
            self._pack()
        elif kernels and self.weight.is_cuda:
            self._fuse()

    def _pack(self) -> None:
        self._packed = _reordered(self.weight.t() if self.in_out else self.weight)
        del self.weight
        if self.activation in _ONEDNN_ACTIVATIONS:
            self._activate = None

    def _fuse(self) -> None:
        self._has_fused_gelu = self.activation in _CUBLAS_ACTIVATIONS
        padding = -self.weight.shape[0] % HEAD_MULTIPLE
        if self.padded and padding:
            self.weight = nn.Parameter(functional.pad(self.weight.detach(), (0, 0, 0, padding)), requires_grad=False)


def padded_rows(num_rows: int) -> int:
    """Rows that are computed for ``num_rows``. Above ``EXACT_ROWS`` there are 16 steps from each power of two to the next.

    At most 1 row in 16 is added. There are 112 results up to 512 and 192 up to 16,384.
    """
    if num_rows <= EXACT_ROWS:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 5)
    return -(-num_rows // step) * step


@functools.cache
def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch packs weights of ``dtype`` on ``device``. torch has no query for it, so a small weight is tried."""
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.eye(32, dtype=dtype)
    try:
        with torch.no_grad():
            return torch.equal(_packed_product(weight, _reordered(weight), None, None), weight)
    except (RuntimeError, AttributeError):
        return False


def _reordered(weight: Tensor) -> Tensor:
    """A weight ``[out_features, in_features]`` in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    name, variant = ("none", "") if activation is None else _ONEDNN_ACTIVATIONS[activation]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], variant)
    return out
