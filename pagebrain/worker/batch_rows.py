"""Batch rows: the state of running sequences, on the GPU, each in a fixed place that it keeps while it runs.

A step names the rows it computes (``active_rows``) and nothing is moved together. What a step itself changes, the next
token and one more token of context, it changes on the device; only what the host decides travels: the tokens of a new
sequence, and now and then a block. All state lies in one buffer of 32-bit words, so that whatever has changed is one list
of (word, value) and one small copy. The last row belongs to a dummy sequence in a dummy block: it fills batches up to the
size that a CUDA graph was captured with, and no kernel has to know.
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
"""The fields of ``SamplingRows`` in the order of ``values_for``, and what numbers they are."""


@dataclass
class BatchRow:
    """What the host knows of one row.

    Attributes:
        index: its number.
        plain_from: the context length from which the sampling kernels can choose its next token. Before, and always for a
            request with penalties, biases or log-probabilities, that is for the :class:`~pagebrain.sampling.Sampler`.
        is_greedy: whether it takes the best token.
    """

    index: int
    plain_from: int
    is_greedy: bool


class BatchRows(SequenceRows):
    """The rows on the device and who holds them.

    ``token_ids``, ``block_tables``, ``context_lens`` and ``sampling`` are views of one buffer, with an entry for each row.
    The last row is the dummy sequence's.
    """

    def __init__(self, dummy_block: int, config: PageBrainConfig) -> None:
        if config.max_model_len is None or config.vocab_size is None:
            raise ConfigError("max_model_len is not set: make the config with PageBrainConfig.for_model(base, ...)")
        super().__init__(config.max_num_seqs, config.block_size)
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.device = torch.device(config.device)
        self.dummy_row = self.num_rows  # behind those that sequences hold
        self.num_rows += 1
        self.max_blocks = config.blocks_for(config.max_model_len)
        self._columns: dict[str, tuple[int, int]] = {}  # name -> (its first word, words in a row)
        self._allocate(config.max_model_len)
        self._changes: dict[int, int] = {}  # word -> value, in no order: each word is named once
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
            "growth": 1,  # tokens that a decode adds to the context: 1, and 0 for the dummy sequence, which stays as it is
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
            """The numbers of all rows, one after the other."""
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

    # Who holds which row ----------------------------------------------------------------------------------------------

    def apply(self, group: SequenceGroup) -> None:
        """Make the changes that a plan carries: rows that come back, blocks that were added."""
        super().apply(group)
        for seq_id in group.released:
            self._rows.pop(seq_id, None)
        for seq_id, first_column, block_ids in group.new_blocks:
            row = self._rows.get(seq_id)
            if row is not None:  # otherwise the whole table is sent when the sequence gets its row
                self._set("block_tables", row.index, first_column, block_ids)

    def row_of(self, entry: ScheduledSequence) -> BatchRow:
        """The sequence's row; a new one is filled with all that is known of the sequence."""
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
        """Say how many tokens a row has in the cache once this step is computed, where no graph counts them."""
        self._set("context_lens", row, 0, [context_len])

    # What has changed -------------------------------------------------------------------------------------------------

    def _set(self, name: str, row: int, column: int, values: Iterable[int]) -> None:
        start, width = self._columns[name]
        self._changes.update(enumerate(values, start + row * width + column))

    def upload(self) -> int:
        """Send what has changed since the last time, without waiting for the device. Returns the number of words."""
        count = len(self._changes)
        if count:
            changes = np.empty((2, count), dtype=np.int64)
            changes[0] = np.fromiter(self._changes.keys(), np.int64, count)
            changes[1] = np.fromiter(self._changes.values(), np.int64, count)
            words, values = to_device(changes, self.device)
            self._words.index_put_((words,), values.to(torch.int32))
            self._changes.clear()
        return count

    # What a step reads ------------------------------------------------------------------------------------------------

    def decode_batch(self, active_rows: Tensor, query_starts: Tensor) -> ForwardBatch:
        """The next token of each row in ``active_rows`` (int32 ``[num_seqs]``), which counts as cached from now on."""
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
        """Tokens at ``positions`` of rows ``token_rows`` (each int ``[num_tokens]``), whose contexts have been uploaded."""
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
        """What the :class:`~pagebrain.sampling.Sampler` needs of a sequence whose context is now ``context_len`` long."""
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
    """Numbers on the device, or on their way there: from pinned memory, which torch keeps until they have arrived."""
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def send_together(arrays: SequenceOf[IntArray], device: torch.device) -> list[Tensor]:
    """Several arrays on the device by one copy.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for addresses that do not.
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
