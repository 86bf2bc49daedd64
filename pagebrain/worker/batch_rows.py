"""Batch rows: the state of running sequences on the GPU. A sequence keeps its row while it runs.

A step names the rows that it computes (``active_rows``); no rows are moved. A step changes the next token and the context
length on the device. The host sends only what it decides: the tokens of a new sequence, and new blocks. All state is in one
buffer of 32-bit words, so that all changes are one list of (word, value) and one small copy. The last row belongs to a dummy
sequence in a dummy block. It fills a batch up to the size that a CUDA graph was captured with, so kernels need no branch for
padding.
"""

import struct
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagebrain.attention import ForwardBatch
from pagebrain.config import PageBrainConfig
from pagebrain.engine.sequence import ScheduledSequence, Sequence, SequenceGroup
from pagebrain.errors import ConfigError
from pagebrain.kernels.locate import locate
from pagebrain.kernels.sample import SamplingRows
from pagebrain.sampling.rows import SampleRow
from pagebrain.worker.token_rows import SequenceRows

IntArray = npt.NDArray[np.int64]

_SAMPLING_CODES = {
    "temperature": "f",
    "top_k": "i",
    "top_p": "d",
    "log_min_p": "f",
    "stream_key": "q",
    "num_prompt_tokens": "i",
}
"""The fields of ``SamplingRows`` in the order of ``values_for``, with their codes in the struct module."""


@dataclass
class BatchRow:
    """The host's record of one row.

    Attributes:
        index: number of the row.
        plain_from: the context length from which the sampling kernels can choose the next token. Below it, and always for a
            request with penalties, biases or log-probabilities, the :class:`~pagebrain.sampling.Sampler` chooses it.
        is_greedy: whether the next token is the most probable one.
    """

    index: int
    plain_from: int
    is_greedy: bool


class BatchRows(SequenceRows):
    """The rows on the device, and which sequence holds which row.

    ``token_ids``, ``block_tables``, ``context_lens`` and ``sampling`` are views of one buffer, with an entry for each row.
    """

    def __init__(self, dummy_block: int, config: PageBrainConfig) -> None:
        if config.max_model_len is None or config.vocab_size is None:
            raise ConfigError("max_model_len is not set: make the config with PageBrainConfig.for_model(base, ...)")
        super().__init__(config.max_num_seqs, config.block_size)
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.device = torch.device(config.device)
        self.dummy_row = self.num_rows  # behind the rows of sequences
        self.num_rows += 1
        self.max_blocks = config.blocks_for(config.max_model_len)
        self._columns: dict[str, tuple[int, int]] = {}  # name -> (its first word, words in a row)
        self._allocate(config.max_model_len)
        self._changes: dict[int, int] = {}  # word -> value; the order does not matter
        self._rows: dict[int, BatchRow] = {}
        self._set("block_tables", self.dummy_row, 0, [dummy_block])
        self._set("context_lens", self.dummy_row, 0, [1])

    def _allocate(self, max_model_len: int) -> None:
        widths = {
            "stream_key": 2,  # 64-bit numbers first: they begin at even words
            "top_p": 2,
            "token_ids": max_model_len,
            "block_tables": self.max_blocks,
            "context_lens": 1,
            "growth": 1,  # tokens that a decode adds to the context: 1, for the dummy sequence 0
            "num_prompt_tokens": 1,
            "top_k": 1,
            "temperature": 1,
            "log_min_p": 1,
        }
        first = 0
        for name, width in widths.items():
            self._columns[name] = first, width
            first += self.num_rows * width
        self._words = torch.zeros(first + first % 2, dtype=torch.int32, device=self.device)

        def view(name: str, dtype: torch.dtype = torch.int32) -> Tensor:
            start, width = self._columns[name]
            return self._words[start : start + self.num_rows * width].view(dtype)

        self.token_ids = view("token_ids").view(self.num_rows, -1)  # [num_rows, max_model_len]
        self.block_tables = view("block_tables").view(self.num_rows, -1)  # [num_rows, max_blocks]
        self.context_lens = view("context_lens")  # [num_rows]
        self.growth = view("growth")  # [num_rows]
        self.sampling = SamplingRows(
            temperature=view("temperature", torch.float32),
            top_k=view("top_k"),
            top_p=view("top_p", torch.float64),
            log_min_p=view("log_min_p", torch.float32),
            stream_key=view("stream_key", torch.int64),
            num_prompt_tokens=view("num_prompt_tokens"),
        )

    # Rows of sequences ------------------------------------------------------------------------------------------------

    def apply(self, group: SequenceGroup) -> None:
        """Apply the changes of a plan: free rows, extend block tables."""
        super().apply(group)
        for seq_id in group.released:
            self._rows.pop(seq_id, None)
        for seq_id, first_column, block_ids in group.new_blocks:
            row = self._rows.get(seq_id)
            if row is not None:  # _fill sends the whole table of a sequence without a row
                self._set("block_tables", row.index, first_column, block_ids)

    def row_of(self, entry: ScheduledSequence) -> BatchRow:
        """The sequence's row; a new row is filled with the sequence's state."""
        return self._rows.get(entry.seq.seq_id) or self._fill(entry)

    def _fill(self, entry: ScheduledSequence) -> BatchRow:
        seq = entry.seq
        params, prompt_len = seq.params, seq.num_prompt_tokens
        asks_for_more = params.has_penalties or bool(params.logit_bias) or params.logprobs is not None
        plain_from = seq.max_num_tokens + 1 if asks_for_more else prompt_len + params.min_tokens
        index = self._take(seq.seq_id)
        row = self._rows[seq.seq_id] = BatchRow(index, plain_from, params.greedy)
        self._set("token_ids", index, 0, seq.token_ids)
        self._set("block_tables", index, 0, self.tables.by_id.get(seq.seq_id, ()))
        self._set("context_lens", index, 0, [entry.start])
        self._set("growth", index, 0, [1])
        values = SamplingRows.values_for(params, seq.request.seed, seq.sample_index, prompt_len, self.vocab_size)
        for (name, code), value in zip(_SAMPLING_CODES.items(), values, strict=True):
            self._set(name, index, 0, _words(code, value))
        return row

    def set_context_len(self, row: int, context_len: int) -> None:
        """Set the context length of a row for this step. Decode graphs count it themselves."""
        self._set("context_lens", row, 0, [context_len])

    # Changes ----------------------------------------------------------------------------------------------------------

    def _set(self, name: str, row: int, column: int, values: Iterable[int]) -> None:
        start, width = self._columns[name]
        self._changes.update(enumerate(values, start + row * width + column))

    def upload(self) -> int:
        """Send the changes since the last call, without waiting for the device. Returns the number of words."""
        count = len(self._changes)
        if count:
            changes = np.empty((2, count), dtype=np.int64)
            changes[0] = np.fromiter(self._changes.keys(), np.int64, count)
            changes[1] = np.fromiter(self._changes.values(), np.int64, count)
            words, values = to_device(changes, self.device)
            self._words.index_put_((words,), values.to(torch.int32))
            self._changes.clear()
        return count

    # Batches ----------------------------------------------------------------------------------------------------------

    def decode_batch(self, active_rows: Tensor, query_starts: Tensor) -> ForwardBatch:
        """One token of each row in ``active_rows`` (int32 ``[num_seqs]``), which counts as cached from now on."""
        num_decodes = active_rows.shape[0]
        return self._batch(active_rows, None, active_rows, query_starts, None, num_decodes)

    def chunk_batch(
        self,
        token_rows: Tensor,
        positions: Tensor,
        active_rows: Tensor,
        query_starts: Tensor,
        logits_rows: Tensor,
        num_decodes: int | None,
    ) -> ForwardBatch:
        """Tokens at ``positions`` of rows ``token_rows`` (each int ``[num_tokens]``). Context lengths must be uploaded."""
        return self._batch(token_rows, positions, active_rows, query_starts, logits_rows, num_decodes)

    def _batch(
        self,
        token_rows: Tensor,
        positions: Tensor | None,
        active_rows: Tensor,
        query_starts: Tensor,
        logits_rows: Tensor | None,
        num_decodes: int | None,
    ) -> ForwardBatch:
        state = (self.token_ids, self.block_tables, self.context_lens, self.growth)
        token_ids, slots, positions = locate(token_rows, positions, *state, self.block_size)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            block_tables=self.block_tables,
            context_lens=self.context_lens,
            query_starts=query_starts,
            logits_rows=logits_rows,
            num_decodes=num_decodes,
            active_rows=active_rows,
        )

    def sample_row(self, seq: Sequence, row: BatchRow, context_len: int) -> SampleRow:
        """The :class:`~pagebrain.sampling.Sampler`'s input for a sequence whose context is now ``context_len`` long."""
        needs_history = seq.params.has_penalties
        return SampleRow(
            params=seq.params,
            seed=seq.request.seed,
            sample_index=seq.sample_index,
            output_position=context_len - seq.num_prompt_tokens,
            history=self.token_ids[row.index, : context_len if needs_history else 0].long(),
            num_prompt_tokens=seq.num_prompt_tokens,
        )


def to_device(numbers: IntArray, device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting. The source is pinned memory, which torch keeps until the copy is done."""
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def send_together(arrays: SequenceOf[IntArray], device: torch.device) -> list[Tensor]:
    """Copy several arrays to the device in one copy.

    Each array begins at a multiple of 16 bytes: Triton compiles another kernel for other addresses.
    """
    begins = np.cumsum([0, *(len(array) + len(array) % 2 for array in arrays)]).tolist()  # 8 bytes each
    together = np.zeros(begins[-1], dtype=np.int64)
    for begin, array in zip(begins, arrays):
        together[begin : begin + len(array)] = array
    sent = to_device(together, device)
    return [sent[begin : begin + len(array)] for begin, array in zip(begins, arrays)]


def _words(code: str, value: float) -> tuple[int, ...]:
    """A number as the 32-bit words that hold it, low word first; ``code`` is the struct module's."""
    packed = struct.pack(f"<{code}", value)
    return struct.unpack(f"<{len(packed) // 4}i", packed)
