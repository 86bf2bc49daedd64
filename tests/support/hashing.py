"""A model whose next token is a hash of all tokens so far, read *through the block table*.

Its K cache holds token ids. A slot written wrongly, read from the wrong block, overwritten by another sequence or lost in a
preemption changes the hash, and so the text: there is no tolerance in which a paging bug could hide.
"""

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pagebrain.attention import ForwardBatch
from pagebrain.attention.torch_backend import TorchBackend
from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.engine import Engine
from pagebrain.engine.executor import InFlight
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import SequenceGroup
from pagebrain.models.model import Model
from pagebrain.sampling import Sampler
from pagebrain.worker.torch_executor import TorchExecutor
from tests.support.models import poison

VOCAB_SIZE = 1009


def next_token(token_ids: list[int]) -> int:
    """The token that follows, from all of them and their order."""
    digest = hashlib.blake2b(",".join(map(str, token_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def continuation(prompt: list[int], num_tokens: int, stop: tuple[int, ...] = ()) -> list[int]:
    """What a correct engine generates greedily after ``prompt``."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens:
        token_ids.append(next_token(token_ids))
        if token_ids[-1] in stop:
            break
    return token_ids[len(prompt) :]


def second_token(token_ids: list[int]) -> int:
    """The token that is nearly as probable as :func:`next_token`, so that samples differ."""
    return next_token([*token_ids, -1])


def is_possible(prompt: list[int], output: list[int]) -> bool:
    """Whether each token of ``output`` is one of the two that may follow all tokens before it."""
    token_ids = [*prompt, *output]
    choices = [(next_token(token_ids[:end]), second_token(token_ids[:end])) for end in range(len(prompt), len(token_ids))]
    return all(token_id in pair for token_id, pair in zip(output, choices, strict=True))


class HashModel(Model):
    """``forward_tokens`` of a model with one layer, one head and head dim 1: keys are token ids, values positions."""

    def __init__(self, cache_manager: CacheManager) -> None:
        super().__init__()
        self.cache_manager = cache_manager
        self.backend = TorchBackend()

    def forward_tokens(self, batch: ForwardBatch) -> Tensor:
        """Logits ``[num_logits, VOCAB_SIZE]`` of two tokens that may follow; those of the others are 0."""
        assert batch.logits_rows is not None
        keys, values = (numbers.double().view(-1, 1, 1) for numbers in (batch.token_ids, batch.positions))
        self.backend.write(0, self.cache_manager.pool, keys, values, batch)
        logits = torch.zeros(len(batch.logits_rows), VOCAB_SIZE, dtype=torch.float64)
        starts = batch.query_starts.tolist()
        for out, row in zip(logits, batch.logits_rows.tolist(), strict=True):
            index = next(i for i in range(len(starts) - 1) if starts[i] <= row < starts[i + 1])
            length = int(batch.context_lens[index]) - (starts[index + 1] - 1 - row)
            token_ids = self._read(batch.block_tables[index].tolist(), length)
            out[second_token(token_ids)] = 40.0
            out[next_token(token_ids)] = 40.5
        return logits

    def _read(self, table: list[int], length: int) -> list[int]:
        block_size = self.cache_manager.block_size
        slots = [(table[position // block_size], position % block_size) for position in range(length)]
        positions = [int(self.cache_manager.pool.value_pools[0][slot]) for slot in slots]
        assert positions == list(range(length)), f"positions {positions} where 0..{length - 1} belong"
        return [int(self.cache_manager.pool.key_pools[0][slot]) for slot in slots]


class LateExecutor(TorchExecutor):
    """Computes a step when it is waited for, as late as a GPU might: whatever the engine did meanwhile has happened."""

    def launch(self, group: SequenceGroup) -> InFlight:
        """Prepare now, compute in ``wait``."""
        prepared = self._prepare(group)
        return InFlight(group, lambda: self._run(prepared))


def hash_engine(
    *, make_scheduler: Callable[..., Any] = Scheduler, make_blocks: Callable[..., Any] = BlockManager, **settings: Any
) -> Engine:
    """An engine around a :class:`HashModel`, with integrity checks on."""
    shape = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "vocab_size": VOCAB_SIZE}
    defaults = {
        "dtype": "float64",
        "device": "cpu",
        "block_size": 4,
        "num_blocks": 16,
        "max_model_len": 64,
        "max_num_seqs": 4,
    }
    tokens = {"max_num_batched_tokens": 8, "check_integrity": True}
    config = PageBrainConfig(**(shape | defaults | tokens | settings))  # type: ignore[arg-type]
    cache_manager = CacheManager(make_blocks(config), config)
    poison(cache_manager.pool, -1)
    executor = LateExecutor(HashModel(cache_manager), cache_manager.pool, Sampler(config), config)
    return Engine(config, cache_manager, executor, make_scheduler(config, cache_manager))


def run_all(engine: Engine, limit: int = 10_000) -> dict[str, Any]:
    """Step until nothing is left; the finished outputs by request id."""
    outputs: dict[str, Any] = {}
    for _ in range(limit):
        if not engine.has_unfinished_requests:
            return outputs
        for delta in engine.step():
            if delta.finished is not None:
                outputs[delta.request_id] = delta.finished
    raise AssertionError(f"not done after {limit} steps: {SimpleNamespace(**vars(engine.scheduler))}")
