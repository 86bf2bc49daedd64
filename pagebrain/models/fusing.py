"""The model's modules for a GPU: an activation computed in its product, a head of rounded size, Triton between the products.

The counterpart of :mod:`pagebrain.models.packing`. A product of a decode step takes a few microseconds, about what it takes
to launch another kernel, so whatever can ride along in one does. The weights stay where they are, except for the head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pagebrain.models import triton_norm
from pagebrain.models.gpt2 import PagedGPT2LMHeadModel, ResidualOps

HEAD_MULTIPLE = 128
"""cuBLAS computes a head of 50,257 rows five times slower than one of 50,304: its fast kernels want rows in whole tiles."""

_FUSED_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # the epilogue of cuBLASLt is the tanh form


class GeluLinear(nn.Module):
    """``gelu(x @ weight + bias)`` in one kernel; the weight is ``[in_features, out_features]`` as in HF's Conv1D."""

    def __init__(self, conv: Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[num_tokens, in_features]`` to ``[num_tokens, out_features]``."""
        out: Tensor = torch._addmm_activation(self.bias, x, self.weight, use_gelu=True)
        return out


class PaddedHead(nn.Module):
    """The head with rows of zeros added, so that each row of logits ends in a few that belong to no token."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        padding = -weight.shape[0] % HEAD_MULTIPLE
        self.weight = functional.pad(weight.detach(), (0, 0, 0, padding)) if padding else weight

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_logits, n_embd]`` to ``[num_logits, padded_vocab]``."""
        return functional.linear(hidden, self.weight)


class TritonOps(ResidualOps):
    """What lies between the matrix products, in Triton."""

    def embed_norm(
        self, token_ids: Tensor, positions: Tensor, wte: nn.Embedding, wpe: nn.Embedding, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~pagebrain.models.gpt2.ResidualOps`."""
        return triton_norm.embed_norm(token_ids, positions, wte, wpe, norm)

    def add_norm(self, hidden: Tensor, delta: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """See :class:`~pagebrain.models.gpt2.ResidualOps`."""
        return triton_norm.add_norm(hidden, delta, norm)


def fuse(model: PagedGPT2LMHeadModel) -> None:
    """Replace modules of ``model`` by fused ones; the Hugging Face model that it came from is not changed."""
    model.ops = TritonOps()
    if model.wte.weight.is_cuda:  # both are about cuBLAS
        model.lm_head = PaddedHead(model.lm_head.weight)
        for block in model.h:
            module: Any = block
            if model.config.activation_function in _FUSED_ACTIVATIONS:
                module.c_fc, module.act = GeluLinear(module.c_fc), nn.Identity()
