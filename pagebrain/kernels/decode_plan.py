"""How decode attention is cut into programs: how many tokens at a time, and into how many splits a context is cut.

Decode reads every K and V once and computes next to nothing, so what counts is that enough bytes are on their way from
memory at any time. All of this is decided on the host from shapes alone: the lengths live on the GPU, and a CUDA graph keeps
the grid that it was captured with.
"""

from dataclasses import dataclass

MAX_SPLITS = 32
"""Most splits of a context. The merge reads one partial result of each."""

MAX_NUM_SEQS = 65_535
"""Most sequences of a launch: they lie along its second axis, and CUDA allows no more there."""

_TILE_BYTES = 2048
"""K bytes that a warp asks for at a time, and as many of V: 64 a lane, four loads of 16 bytes each."""

_WARPS_PER_SM = 24
"""Warps that a multiprocessor should have under way. Each has up to 4 kB on its way; an H200 needs about 30 kB to cover the
latency of its memory (4.8 TB/s times 0.8 us, by 132), and not every warp waits for memory all the time."""

_MIN_TILES_PER_SPLIT = 2
"""A split should read at least so many tiles at the longest context, or the merge costs more than the split saves."""


@dataclass(frozen=True)
class DecodeTiling:
    """How one program goes through its part of the context.

    Attributes:
        tile: tokens read at a time, a power of two.
        num_warps: warps of a program.
        num_stages: depth of Triton's software pipeline through shared memory; 1 loads straight into registers.
        unroll: tiles in one turn of the loop.
    """

    tile: int
    num_warps: int = 1
    num_stages: int = 1
    unroll: int = 1

    @classmethod
    def for_shape(cls, padded_dim: int, itemsize: int, group: int) -> "DecodeTiling":
        """The tiling for a head dimension (padded to a power of two), bytes of a number, and query heads per K/V head.

        A head of its own is read by one warp, so that nothing in the loop waits for another warp. Grouped heads use the
        tensor cores, which want at least 16 tokens, and a program has more to compute: four warps share it.
        """
        if group > 1:
            return cls(tile=max(16, min(64, 4 * _TILE_BYTES // (padded_dim * itemsize))), num_warps=4)
        return cls(tile=max(4, min(64, _TILE_BYTES // (padded_dim * itemsize))))


def choose_num_splits(num_contexts: int, max_context_len: int, num_sms: int, tiling: DecodeTiling) -> int:
    """Into how many splits each context is cut: a power of two, 1 when there are programs enough without.

    Args:
        num_contexts: sequences times K/V heads, each a program of its own per split.
        max_context_len: tokens that a block table can hold; the real lengths are not known here.
        num_sms: multiprocessors of the GPU.
        tiling: what a program does.
    """
    wanted = num_sms * _WARPS_PER_SM // (tiling.num_warps * max(1, num_contexts))
    useful = max_context_len // (tiling.tile * _MIN_TILES_PER_SPLIT)
    return _power_of_2_at_most(max(1, min(wanted, useful, MAX_SPLITS)))


def _power_of_2_at_most(number: int) -> int:
    return 1 << (number.bit_length() - 1)
