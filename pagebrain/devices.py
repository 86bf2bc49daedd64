"""The current GPU, which Triton and CUDA graphs use (torch uses the one of its tensors), and the number of CPU threads."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch

from pagebrain.machine import available_cores


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current GPU within the block. No effect on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def limit_threads() -> int:
    """Limit torch's threads to the processors that this process may use, and return their number.

    torch ignores a container's quota: its threads would be stopped for a part of the time and wait for each other.
    ``OMP_NUM_THREADS`` and a smaller ``torch.set_num_threads`` take precedence.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees, instead of returning it to the system and getting it again.

    glibc returns a free block of 128 KiB or more at once, until it has freed a larger one: up to that size, of at most
    32 MiB, it keeps blocks from then on. A prefill step frees some megabytes in many pieces. Without this call it pays for
    them with page faults, four times as many. No effect where torch's memory does not come from glibc.
    """
    with contextlib.suppress(RuntimeError):  # too little memory for it: what needs more says so
        block = torch.empty(31 * 2**20, dtype=torch.uint8)
        del block
