"""Sampling on the GPU: from the logits of a decode step to its tokens, in launches that a CUDA graph can hold.

For rows without penalties, bias, ``min_tokens`` and logprobs these functions give the same tokens as
:class:`pagebrain.sampling.sampler.Sampler`. They read each row's parameters on the device, and write each token to where the
next step reads it. The host takes no part. :mod:`pagebrain.kernels.sample_kernels` explains the kernels, which need no sort.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pagebrain.errors import KernelError
from pagebrain.kernels.common import is_interpreted
from pagebrain.kernels.decode import num_multiprocessors
from pagebrain.kernels.inputs import KERNEL_DTYPES, check_indices, mismatch
from pagebrain.kernels.sample_kernels import best_kernel, choose_kernel, deliver_best_kernel, draw_kernel
from pagebrain.kernels.sample_row import MAX_SPLITS
from pagebrain.sampling.random_bits import stream_key
from pagebrain.sampling.sampler import MAX_TEMPERATURE, MIN_TEMPERATURE
from pagebrain.sampling_params import SamplingParams

SPLIT_TILE, SPLIT_WARPS = 1024, 4
"""Tokens that a program reads at once where several programs share a row, and its warps: 16 bytes of bfloat16 a thread."""

ROW_TILE, ROW_WARPS = 2048, 8
"""The same for one program per row: two such programs fill the registers of a multiprocessor."""

PROGRAMS_PER_MULTIPROCESSOR = 16
"""Rows are split into about so many programs: enough to hide memory latency, and short enough to end together."""

MAX_VOCAB_SIZE = 1 << 19
"""Integer weights of more tokens might not fit in 64 bits; see :data:`pagebrain.sampling.truncation.WEIGHT_UNIT`."""

_INTEGERS = (torch.int32, torch.int64)
_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "log_min_p": torch.float32,
    "stream_key": torch.int64,
    "num_prompt_tokens": torch.int32,
}


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """The sampling parameters of each batch row, on the device."""

    temperature: Tensor  # float32 [num_rows]; 0 or below is greedy, and then the other fields are not read
    top_k: Tensor  # int32 [num_rows]; 0 is no limit
    top_p: Tensor  # float64 [num_rows]; 1.0 is no limit
    log_min_p: Tensor  # float32 [num_rows]; minus infinity is no limit
    stream_key: Tensor  # int64 [num_rows]; random_bits.stream_key(seed, sample_index) in two's complement
    num_prompt_tokens: Tensor  # int32 [num_rows]

    @classmethod
    def make(cls, num_rows: int, device: torch.device | str) -> "SamplingRows":
        """Rows that are all greedy."""
        rows = cls(**{name: torch.zeros(num_rows, dtype=dtype, device=device) for name, dtype in _DTYPES.items()})
        rows.top_p.fill_(1.0)
        rows.log_min_p.fill_(-math.inf)
        return rows

    @staticmethod
    def values_for(
        params: SamplingParams, seed: int, sample_index: int, num_prompt_tokens: int, vocab_size: int
    ) -> tuple[float, int, float, float, int, int]:
        """The values of one row, in the order of the attributes."""
        key = stream_key(seed, sample_index)
        return (
            0.0 if params.greedy else min(max(params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE),
            params.top_k if 0 < params.top_k < vocab_size else 0,
            params.top_p,
            math.log(params.min_p) if params.min_p else -math.inf,
            key - (1 << 64) if key >= 1 << 63 else key,
            num_prompt_tokens,
        )


def sample_greedy(
    logits: Tensor,
    vocab_size: int,
    active_rows: Tensor,
    context_lens: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    num_splits: int | None = None,
    tile: int = SPLIT_TILE,
) -> None:
    """Write the most probable token of each row of logits to ``out`` and ``token_ids``; of equal ones the lowest id.

    Args:
        logits: ``[num_tokens, padded_vocab]`` in float32, bfloat16 or float16, contiguous rows. Columns from ``vocab_size``
            on are not used. The token id is below ``vocab_size`` for any values of the others, NaN included.
        vocab_size: how many columns are tokens. Reading is fastest if there are columns up to the next multiple of 16.
        active_rows: int ``[num_tokens]``, the batch row of each row of logits; padding rows may share one.
        context_lens: int ``[num_rows]``, tokens in the cache after this step.
        token_ids: int ``[num_rows, max_model_len]``, contiguous rows. ``token_ids[row, context_lens[row]]`` is written,
            unless there is no such column.
        out: int ``[num_tokens]``.
        num_splits: programs that share a row, at most ``MAX_SPLITS``; ``None`` chooses, from shapes alone.
        tile: tokens that a program reads at once.

    Raises:
        KernelError: for tensors that the kernels do not support; nothing was computed.
    """
    _check(logits, vocab_size, active_rows, context_lens, token_ids, out)
    num_tokens = logits.shape[0]
    if num_tokens == 0:
        return
    num_splits = _checked_splits(num_splits, logits, vocab_size, tile)
    best_values, best_tokens = _best_of_splits(logits, vocab_size, num_splits, tile)
    kernel: Any = deliver_best_kernel
    kernel[(num_tokens,)](
        out,
        token_ids,
        best_values,
        best_tokens,
        active_rows,
        context_lens,
        token_ids.stride(0),
        token_ids.shape[1],
        num_splits,
        num_warps=1,
    )


def sample(
    logits: Tensor,
    vocab_size: int,
    active_rows: Tensor,
    context_lens: Tensor,
    token_ids: Tensor,
    out: Tensor,
    sampling: SamplingRows,
    *,
    num_splits: int | None = None,
    tile: int = SPLIT_TILE,
    row_tile: int = ROW_TILE,
) -> None:
    """Write a token for each row of logits by the parameters of its batch row; greedy rows may be among them.

    Args:
        sampling: of every batch row. Row ``r``'s output position is ``context_lens[r] - sampling.num_prompt_tokens[r]``.
        row_tile: tokens that a program reads at once where one program reads the whole row.

    The other arguments, the results and the errors are those of :func:`sample_greedy`.
    """
    _check(logits, vocab_size, active_rows, context_lens, token_ids, out)
    _check_sampling(sampling, context_lens.shape[0], logits.device)
    num_tokens = logits.shape[0]
    if num_tokens == 0:
        return
    num_splits = _checked_splits(num_splits, logits, vocab_size, tile)
    best_values, best_tokens = _best_of_splits(logits, vocab_size, num_splits, tile)
    drawn_values, drawn_tokens = _scratch(logits, num_splits)
    num_readable = _num_readable(logits, vocab_size)
    draw: Any = draw_kernel
    draw[(num_tokens, num_splits)](
        drawn_values,
        drawn_tokens,
        best_values,
        best_tokens,
        logits,
        active_rows,
        context_lens,
        sampling.temperature,
        sampling.log_min_p,
        sampling.stream_key,
        sampling.num_prompt_tokens,
        logits.stride(0),
        vocab_size,
        num_readable,
        num_splits,
        TILE=tile,
        num_warps=SPLIT_WARPS,
    )
    choose: Any = choose_kernel
    choose[(num_tokens,)](
        out,
        token_ids,
        drawn_values,
        drawn_tokens,
        best_values,
        best_tokens,
        logits,
        active_rows,
        context_lens,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.log_min_p,
        sampling.stream_key,
        sampling.num_prompt_tokens,
        token_ids.stride(0),
        token_ids.shape[1],
        logits.stride(0),
        vocab_size,
        num_readable,
        num_splits,
        TILE=row_tile,
        num_warps=ROW_WARPS,
    )


def choose_num_splits(num_tokens: int, vocab_size: int, tile: int, num_sms: int) -> int:
    """Programs that share a row. Each of them has at least one tile."""
    num_tiles = -(-vocab_size // tile)
    wanted = max(1, PROGRAMS_PER_MULTIPROCESSOR * num_sms // num_tokens)
    tiles_each = -(-num_tiles // min(wanted, num_tiles, MAX_SPLITS))
    return -(-num_tiles // tiles_each)


def _best_of_splits(logits: Tensor, vocab_size: int, num_splits: int, tile: int) -> tuple[Tensor, Tensor]:
    """The best logit of each split and its token id."""
    best_values, best_tokens = _scratch(logits, num_splits)
    kernel: Any = best_kernel
    kernel[(logits.shape[0], num_splits)](
        best_values,
        best_tokens,
        logits,
        logits.stride(0),
        vocab_size,
        _num_readable(logits, vocab_size),
        num_splits,
        TILE=tile,
        num_warps=SPLIT_WARPS,
    )
    return best_values, best_tokens


def _scratch(logits: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
    """Tensors for the results of the splits: values float32 and token ids int32, both ``[num_tokens, num_splits]``."""
    shape = (logits.shape[0], num_splits)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _num_readable(logits: Tensor, vocab_size: int) -> int:
    """Columns that the kernels may read: ``vocab_size`` rounded up to a multiple of 16, if so many exist, for wide loads."""
    aligned = -(-vocab_size // 16) * 16
    return aligned if aligned <= logits.shape[1] else vocab_size


def _checked_splits(num_splits: int | None, logits: Tensor, vocab_size: int, tile: int) -> int:
    if num_splits is None:
        return choose_num_splits(logits.shape[0], vocab_size, tile, num_multiprocessors(logits.device))
    if not 1 <= num_splits <= MAX_SPLITS:
        raise KernelError(f"num_splits must be 1 to {MAX_SPLITS}, got {num_splits}")
    return num_splits


def _check(
    logits: Tensor, vocab_size: int, active_rows: Tensor, context_lens: Tensor, token_ids: Tensor, out: Tensor
) -> None:
    """Raise ``KernelError`` unless the kernels support these shapes, dtypes, strides and devices."""
    if logits.ndim != 2 or logits.dtype not in KERNEL_DTYPES or (logits.stride(1) != 1 and logits.shape[1] > 1):
        got = f"{logits.dtype} {list(logits.shape)}, strides {logits.stride()}"
        raise mismatch("logits", got, "float32, bfloat16 or float16 [num_tokens, padded_vocab] with contiguous rows")
    if not 1 <= vocab_size <= min(logits.shape[1], MAX_VOCAB_SIZE):
        raise mismatch("vocab_size", f"{vocab_size}", f"1 to {min(logits.shape[1], MAX_VOCAB_SIZE)}")
    check_indices("active_rows", active_rows, logits.shape[0])
    check_indices("context_lens", context_lens, context_lens.shape[0] if context_lens.ndim else 0)
    check_indices("out", out, logits.shape[0])
    num_rows = context_lens.shape[0]
    if (
        token_ids.ndim != 2
        or token_ids.shape[0] != num_rows
        or token_ids.dtype not in _INTEGERS
        or (token_ids.stride(1) != 1 and token_ids.shape[1] > 1)
    ):
        got = f"{token_ids.dtype} {list(token_ids.shape)}, strides {token_ids.stride()}"
        raise mismatch("token_ids", got, f"integers [{num_rows}, max_model_len] with contiguous rows")
    device = logits.device
    for name, tensor in (
        ("active_rows", active_rows),
        ("context_lens", context_lens),
        ("token_ids", token_ids),
        ("out", out),
    ):
        if tensor.device != device:
            raise mismatch(name, f"device {tensor.device}", f"that of the logits, {device}")
    if not is_interpreted() and device.type != "cuda":
        raise KernelError(
            f"the logits are on {device}, and the Triton kernels were compiled for a GPU: use pagebrain.sampling.Sampler, "
            "or set TRITON_INTERPRET=1 before Python starts to run them, slowly, in Triton's interpreter"
        )


def _check_sampling(sampling: SamplingRows, num_rows: int, device: torch.device) -> None:
    for field in fields(sampling):
        tensor, dtype = getattr(sampling, field.name), _DTYPES[field.name]
        if tensor.shape != (num_rows,) or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
            raise mismatch(f"sampling.{field.name}", got, f"contiguous {dtype} [{num_rows}] on {device}")
