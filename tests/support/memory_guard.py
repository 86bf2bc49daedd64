"""Kernels in Triton's interpreter, guarded: an address that is in no tensor of the launch is an error, not a crash.

The interpreter follows any address. On a GPU a wrong address ends the process, or the mistake stays unnoticed. Here it is a
failure that says which tensor the kernel left, and by how much. A tensor can also be *spread*: the kernel is told that its
blocks lie so far apart that 32 bits cannot count to them, and what is read there is read from the tensor itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
from torch import Tensor


class MemoryGuard:
    """What the kernel that runs may touch: ``regions`` of its tensors, as ``(name, first byte, byte after the last)``."""

    def __init__(self) -> None:
        self.regions: list[tuple[str, int, int]] = []
        self._spread: list[tuple[int, int, int, int]] = []

    @contextmanager
    def spread(self, pool: Tensor, stride: int) -> Iterator[None]:
        """Until the end of the block, ``pool`` ``[num_blocks, ...]``, contiguous, has blocks ``stride`` numbers apart."""
        block_bytes = pool[0].numel() * pool.element_size()
        self._spread.append((pool.data_ptr(), len(pool), block_bytes, stride * pool.element_size()))
        try:
            yield
        finally:
            self._spread.pop()

    def start(self, kernel: str, names: list[str], values: tuple[Any, ...]) -> None:
        """A launch begins."""
        from chapters.aids.watch_kernels import num_bytes_of  # it needs Triton, which not every machine has

        self.regions = [
            (name, value.data_ptr(), value.data_ptr() + num_bytes_of(value))
            for name, value in zip(names, values)
            if isinstance(value, Tensor)
        ]

    def place(self, addresses: Any, is_used: Any, itemsize: int, verb: str, program: tuple[int, ...]) -> Any:
        """Where the numbers at ``addresses`` really are. Fails if one that is used is in no tensor of the launch."""
        addresses = addresses.copy()
        for base, num_blocks, block_bytes, far in self._spread:
            for block in range(num_blocks):
                inside = (addresses >= base + block * far) & (addresses < base + block * far + block_bytes)
                addresses[inside] -= numpy.uint64(block * (far - block_bytes))
        is_right = ~is_used.astype(bool)
        for _, first, end in self.regions:
            is_right |= (addresses >= first) & (addresses + numpy.uint64(itemsize) <= end)
        if not is_right.all():
            self._fail(int(addresses[~is_right].flat[0]), itemsize, verb)
        return addresses

    def _fail(self, address: int, itemsize: int, verb: str) -> None:
        def distance(region: tuple[str, int, int]) -> int:
            return max(region[1] - address, address - region[2])

        name, first, end = min(self.regions, key=distance)
        far = (first - address if address < first else address - end) // itemsize + 1
        side = "before the beginning" if address < first else "past the end"
        where = f"{far} {'number' if far == 1 else 'numbers'} {side} of {name}"
        if far > 2**28:
            where = "far away from them (did an offset go over 32 bits, or was a table entry used that is no block id?)"
        text = f"the kernel {verb} memory that is in none of its tensors, {where}: a GPU may not report this"
        pytest.fail(text, pytrace=False)


@pytest.fixture
def memory_guard() -> Iterator[MemoryGuard | None]:
    """The guard of all kernels that this test interprets; ``None`` where they are compiled."""
    from chapters.aids.triton_anywhere import INTERPRETED

    if not INTERPRETED:
        yield None
        return
    from chapters.aids.watch_kernels import attached

    guard = MemoryGuard()
    with attached(guard):
        yield guard
