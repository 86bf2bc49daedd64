"""Which GPU is meant: torch looks where its tensors are, Triton and CUDA graphs take the one that is current. And how many
threads compute on the CPU."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch

from pagebrain.machine import available_cores


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current GPU within the block; on a CPU this does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def limit_threads() -> int:
    """Let torch compute with no more threads than there are processors for it, a container's quota included.

    torch does not know of the quota: its threads would be stopped for a part of the time, and wait for each other. What the
    user has chosen in ``OMP_NUM_THREADS``, or by ``torch.set_num_threads`` if that is less, stays. Returns the number of
    threads.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
    return torch.get_num_threads()
