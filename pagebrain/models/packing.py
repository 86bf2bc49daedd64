"""Weights laid out for the CPU's matrix kernels, for an engine that owns its model.

A GPT-2 weight as it is saved is read at a third of the speed that oneDNN reaches on one it has reordered beforehand
(docs/performance). Reordering needs a second copy, so it is done module by module and each original is dropped at once.

oneDNN compiles a product for each number of rows. For the four products of a layer this takes 5 ms and a megabyte of memory,
which is not given back. So above ``EXACT_ROWS`` only some numbers of rows are computed (:func:`padded_rows`).
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pagebrain.models.gpt2 import PagedGPT2LMHeadModel

_PACKABLE = (torch.float32, torch.bfloat16)


# What oneDNN can apply to a product while it is still in registers: its name and variant for each activation of HF's.
_FUSED_ACTIVATIONS = {
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}


class PackedLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` with the weight ``[out_features, in_features]`` in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()
        self.activation = ("none", "") if activation is None else _FUSED_ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to ``[num_tokens, out_features]``."""
        name, variant = self.activation
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], variant)
        return out


EXACT_ROWS = 64
"""Up to here no row is added: a decode step, whose time is that of reading the weights, has a row for each sequence."""


def padded_rows(num_rows: int) -> int:
    """Rows that are computed for ``num_rows``: above ``EXACT_ROWS`` one of 16 numbers between a power of two and the next.

    At most 1 row in 16 is added. There are 112 numbers up to 512 and 192 up to 16,384.
    """
    if num_rows <= EXACT_ROWS:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 5)
    return -(-num_rows // step) * step


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch packs weights of ``dtype`` on ``device``: tried on a small one, for it cannot be asked."""
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.eye(32, dtype=dtype)
    try:
        with torch.no_grad():
            return torch.equal(PackedLinear(weight, None)(weight), weight)
    except (RuntimeError, AttributeError):
        return False


def pack_weights(model: PagedGPT2LMHeadModel) -> bool:
    """Replace the model's projections by packed ones; the Hugging Face model they came from can no longer be used.

    Returns whether anything was done: elsewhere than on a CPU with oneDNN the model is left as it is.
    """
    if not can_pack(model.wte.weight.dtype, model.wte.weight.device):
        return False
    activation = str(model.config.activation_function)
    for block in model.h:
        for owner, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block, "c_fc"), (block, "c_proj")):
            conv = getattr(owner, name)
            assert isinstance(conv, Conv1D)  # whose weight is [in_features, out_features]
            fused = activation if name == "c_fc" and activation in _FUSED_ACTIVATIONS else None
            setattr(owner, name, PackedLinear(conv.weight.t(), conv.bias, fused))
            if fused is not None:
                block.act = nn.Identity()
    model.lm_head = PackedLinear(model.lm_head.weight, None)
    model.rows_for = padded_rows
    return True
