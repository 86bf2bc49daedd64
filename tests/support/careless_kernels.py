"""Kernels that the interpreter runs, and of which a GPU's compiler refuses most."""

from chapters.aids.triton_anywhere import tl, triton


@triton.jit
def copy_two(out_ptr, x_ptr, TILE: tl.constexpr):
    """Copies the first two numbers of each tile, and what a masked load leaves in the others."""
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + places, tl.load(x_ptr + places, mask=tl.arange(0, TILE) < 2))


@triton.jit
def sums_an_integer(out_ptr, x_ptr, count, TILE: tl.constexpr):
    """A sum that begins as an integer."""
    total = 0
    for start in range(0, count, TILE):
        total = total + tl.sum(tl.load(x_ptr + start + tl.arange(0, TILE)), axis=0)
    tl.store(out_ptr, total)


@triton.jit
def keeps_a_dictionary(out_ptr, x_ptr, TILE: tl.constexpr):
    """A dictionary."""
    known = {"x": tl.load(x_ptr)}
    tl.store(out_ptr, known["x"])


@triton.jit
def sizes_a_tile_by_an_argument(out_ptr, count, TILE: tl.constexpr):
    """A tile whose size is known only when the kernel runs."""
    tl.store(out_ptr + tl.arange(0, count), 1.0)


@triton.jit
def sums_an_integer_of(x_ptr, count, TILE: tl.constexpr):
    """The same mistake in a function that a kernel calls."""
    total = 0
    for start in range(0, count, TILE):
        total = total + tl.sum(tl.load(x_ptr + start + tl.arange(0, TILE)), axis=0)
    return total


@triton.jit
def calls_a_wrong_helper(out_ptr, x_ptr, count, TILE: tl.constexpr):
    """A kernel that is right itself."""
    tl.store(out_ptr, sums_an_integer_of(x_ptr, count, TILE))
