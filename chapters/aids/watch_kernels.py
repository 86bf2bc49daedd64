"""Kernels in Triton's interpreter, watched: which program reads and writes which numbers of which tensor.

What a masked load does not read is undefined on a GPU. The interpreter gives 0 there, which hides mistakes. In a watched
kernel these places hold nan, or a large integer. There is nothing to watch where kernels are compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import Tensor

from chapters.aids.triton_anywhere import INTERPRETED


@dataclass(frozen=True)
class Access:
    """One load or store of one program.

    Attributes:
        kernel: the name of the kernel that was launched.
        program: its place in the grid.
        verb: ``"reads"`` or ``"writes"``.
        tensor: the name of the tensor's argument.
        places: int64, one for each place of the tile: which number of the tensor's memory, counted from its first.
        is_used: bool, alike: false where the mask leaves a place out.
        itemsize: bytes of a number.
    """

    kernel: str
    program: tuple[int, ...]
    verb: str
    tensor: str
    places: Any
    is_used: Any
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Bytes that are moved. Places that are masked move nothing."""
        return int(self.is_used.sum()) * self.itemsize


@dataclass
class Watch:
    """What watched kernels did, in order."""

    accesses: list[Access] = field(default_factory=list)
    _kernel: str = ""
    _regions: list[tuple[str, int, int]] = field(default_factory=list)

    def num_bytes(self, tensor: str | None = None) -> int:
        """Bytes read and written, of all tensors or of those with this name."""
        return sum(access.num_bytes for access in self.accesses if tensor in (None, access.tensor))

    def start(self, kernel: str, names: list[str], values: tuple[Any, ...]) -> None:
        """A launch begins."""
        self._kernel = kernel
        self._regions = [
            (name, value.data_ptr(), value.data_ptr() + num_bytes_of(value))
            for name, value in zip(names, values)
            if isinstance(value, Tensor)
        ]

    def place(self, addresses: Any, is_used: Any, itemsize: int, verb: str, program: tuple[int, ...]) -> Any:
        """Note a load or a store; the addresses stay what they are."""
        used = is_used.astype(bool)
        first = addresses[used].flat[0] if used.any() else addresses.flat[0]
        inside = [region for region in self._regions if region[1] <= int(first) < region[2]]
        name, begin, _ = inside[0] if inside else ("none of its tensors", 0, 0)
        places = (addresses.astype(numpy.int64) - begin) // itemsize
        self.accesses.append(Access(self._kernel, program, verb, name, places, used, itemsize))
        return addresses


def num_bytes_of(tensor: Tensor) -> int:
    """From a tensor's first byte to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch the kernels that are launched until the end of the block. Raises ``RuntimeError`` where they are compiled."""
    if not INTERPRETED:
        raise RuntimeError("compiled kernels cannot be watched: set TRITON_INTERPRET=1 before Python starts")
    watch = Watch()
    with attached(watch):
        yield watch


@contextmanager
def attached(watch: Any) -> Iterator[None]:
    """Tell ``watch``, which has the methods ``start`` and ``place`` of :class:`Watch`, of launches, loads and stores."""
    from triton.runtime import interpreter

    builder, kind = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, kind.run

    def placed(self: Any, ptrs: Any, mask: Any, verb: str) -> Any:
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = watch.place(ptrs.data, mask.data, itemsize, verb, tuple(self.grid_idx))
        return interpreter.TensorHandle(addresses, ptrs.dtype)

    def watched_load(self: Any, ptrs: Any, mask: Any, other: Any, *options: Any) -> Any:
        if other is None:
            other = _undefined(interpreter, ptrs)
        return load(self, placed(self, ptrs, mask, "reads"), mask, other, *options)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        return store(self, placed(self, ptrs, mask, "writes"), value, mask, *options)

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.start(self.__name__, self.arg_names, args)
        return run(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store, kind.run = watched_load, watched_store, watched_run
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, kind.run = load, store, run


def _undefined(interpreter: Any, ptrs: Any) -> Any:
    """What stands in a tile where its load had a mask and no ``other``."""
    kind = ptrs.get_element_ty()
    if kind.is_bf16():  # the interpreter holds it as 16-bit integers
        numbers = numpy.full(ptrs.data.shape, 0x7FC0, dtype=numpy.uint16)
    elif kind.is_floating() and kind.primitive_bitwidth >= 16:
        numbers = numpy.full(ptrs.data.shape, numpy.nan, dtype=f"float{kind.primitive_bitwidth}")
    elif kind.is_int() and kind.primitive_bitwidth >= 16:
        numbers = numpy.full(ptrs.data.shape, (1 << (kind.primitive_bitwidth - 3)) - 3, dtype=_integer(kind))
    else:
        return None
    return interpreter.TensorHandle(numbers, kind)


def _integer(kind: Any) -> str:
    return f"{'u' if kind.is_int_unsigned() else ''}int{kind.primitive_bitwidth}"
