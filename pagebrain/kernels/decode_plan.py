"""How decode attention is divided among programs: tokens of a tile, and splits of a context.

Decode reads every K and V once and computes little, so its speed depends on how many bytes are being loaded at any time. The
host decides from shapes alone: the lengths are on the GPU, and a CUDA graph keeps the grid that it was captured with.
"""

from dataclasses import dataclass

MAX_SPLITS = 32
"""Most splits of a context. The merge loads the partial results of all splits at once."""

MAX_NUM_SEQS = 65_535
"""Most sequences of a launch. They are the second axis of the grid, and CUDA allows no more there."""

_TILE_BYTES = 2048
"""Bytes of K, and as many of V, that a warp loads at a time: 64 for each lane, four loads of 16 bytes."""

_WARPS_PER_SM = 24
"""Warps that a multiprocessor should run at a time. Each loads up to 4 kB at a time. An H200 needs about 30 kB in flight to
cover the latency of its memory (4.8 TB/s times 0.8 us, by 132), and not every warp waits for memory all the time."""

_MIN_TILES_PER_SPLIT = 2
"""Fewest tiles of a split at the longest context. With fewer, the merge costs more than the split saves."""


@dataclass(frozen=True)
class DecodeTiling:
    """How one program reads its split of the context.

    Attributes:
        tile: tokens read at a time, a power of two.
        num_warps: warps of a program.
        num_stages: depth of Triton's software pipeline through shared memory; 1 loads directly into registers.
        unroll: tiles in one iteration of the loop.
    """

    tile: int
    num_warps: int = 1
    num_stages: int = 1
    unroll: int = 1

    @classmethod
    def for_shape(cls, padded_dim: int, itemsize: int, group: int) -> "DecodeTiling":
        """The tiling for a head dimension (padded to a power of two), bytes of a number, and query heads per K/V head.

        With one query head per K/V head, one warp reads the head, so that no warp waits for another one. Grouped heads use
        the tensor cores, which need at least 16 tokens. Such a program computes more, so four warps share it.
        """
        if group > 1:
            return cls(tile=max(16, min(64, 4 * _TILE_BYTES // (padded_dim * itemsize))), num_warps=4)
        return cls(tile=max(4, min(64, _TILE_BYTES // (padded_dim * itemsize))))


def choose_num_splits(num_contexts: int, max_context_len: int, num_sms: int, tiling: DecodeTiling) -> int:
    """Splits of each context: a power of two; 1 if the unsplit contexts give enough programs.

    Args:
        num_contexts: sequences times K/V heads; each is one program per split.
        max_context_len: tokens that a block table can hold; the host does not know the real lengths.
        num_sms: multiprocessors of the GPU.
        tiling: how a program reads its split.
    """
    wanted = num_sms * _WARPS_PER_SM // (tiling.num_warps * max(1, num_contexts))
    useful = max_context_len // (tiling.tile * _MIN_TILES_PER_SPLIT)
    return _power_of_2_at_most(max(1, min(wanted, useful, MAX_SPLITS)))


def _power_of_2_at_most(number: int) -> int:
    return 1 << (number.bit_length() - 1)
