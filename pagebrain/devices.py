"""Which GPU is meant: torch looks where its tensors are, Triton and CUDA graphs take the one that is current."""

import contextlib
from contextlib import AbstractContextManager

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current GPU within the block; on a CPU this does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
