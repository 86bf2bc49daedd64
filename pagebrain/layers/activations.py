"""Activation functions by the names that Hugging Face's configs use, computed as Hugging Face computes them.

Those of known models stand here: importing Hugging Face's table takes two seconds, most of the time that a command takes to
start. Other names are looked up in that table.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's GELU, by tanh. ``functional.gelu(x, approximate="tanh")`` is the same function with other rounding."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_pytorch_tanh(x: Tensor) -> Tensor:
    """The same function in one operation."""
    return functional.gelu(x, approximate="tanh")


_OWN: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
}


def find_activation(name: str) -> Activation | None:
    """The function that a config calls ``name``; ``None`` if there is none."""
    if name in _OWN:
        return _OWN[name]
    from transformers.activations import ACT2FN

    return ACT2FN[name] if name in ACT2FN else None
