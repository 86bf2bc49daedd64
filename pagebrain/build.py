"""Puts an engine together from a configuration: model, cache, parts, executor, loop."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from pagebrain.attention import paged_attention
from pagebrain.attention.choice import default_attention, kernels_fit
from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.detokenizer import Detokenizer
from pagebrain.engine import Engine
from pagebrain.errors import ConfigError
from pagebrain.executor import TorchExecutor
from pagebrain.loading import load_model, load_tokenizer, resolve_device_and_dtype
from pagebrain.models.gpt2 import PagedGPT2LMHeadModel
from pagebrain.models.packing import pack_weights
from pagebrain.parts import AttentionPart, SchedulerPart, find_part, make_part, parts_without
from pagebrain.retirement import RetirementQueue
from pagebrain.sampling import Sampler
from pagebrain.scheduler import Scheduler

logger = logging.getLogger(__name__)

_OWN_PARTS: dict[str, Any] = {
    "block_manager": BlockManager,
    "attention": paged_attention,
    "scheduler": Scheduler,
    "sampler": Sampler,
}


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and what a caller may want to know of it. ``notices`` are lines for people: what is off, and why."""

    engine: Engine
    config: PageBrainConfig
    tokenizer: PreTrainedTokenizerBase | None
    weights_packed: bool
    notices: tuple[str, ...]


def build_engine(
    config: PageBrainConfig, base: GPT2LMHeadModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> BuiltEngine:
    """An engine for ``config``.

    With ``base`` its weights are shared and left as they are. Without, the model is loaded and belongs to the engine, which
    may lay its weights out anew for speed.
    """
    parts = {name: find_part(name, config.swap.get(name), own) for name, own in _OWN_PARTS.items()}
    config, notices = _without_unsupported(config, parts)
    owned = base is None
    if tokenizer is None and (base is None or config.tokenizer is not None):
        tokenizer = load_tokenizer(config)
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer)  # before the weights: it is quicker to fail
    if base is None:
        config = resolve_device_and_dtype(config)
        base = load_model(config)
    elif config.model is not None or config.load_format != "auto":
        raise ConfigError("a model object was given: leave out model and load_format")
    config = config.resolved_for(base)
    if tokenizer is not None and len(tokenizer) > (config.vocab_size or 0):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: they do not belong together"
        )

    if config.swap.get("attention") is None:
        parts["attention"] = _own_attention(config, notices)
    block_manager = make_part("block_manager", parts["block_manager"], config)
    cache_manager = CacheManager(block_manager, config)
    model = PagedGPT2LMHeadModel(base, cache_manager, parts["attention"]).eval()
    del base  # so that packing frees each original as it goes
    packed = pack_weights(model) if owned else False
    executor = TorchExecutor(model, cache_manager, make_part("sampler", parts["sampler"], config), config)

    def make_scheduler(retirement: RetirementQueue) -> SchedulerPart:
        scheduler: SchedulerPart = make_part("scheduler", parts["scheduler"], config, cache_manager, retirement)
        return scheduler

    encode = None if tokenizer is None else lambda text: list(tokenizer.encode(text, add_special_tokens=False))
    engine = Engine(config, cache_manager, executor, make_scheduler, encode, detokenizer)
    return BuiltEngine(engine, config, tokenizer, packed, tuple(notices))


def _own_attention(config: PageBrainConfig, notices: list[str]) -> AttentionPart:
    """The attention that is fastest for ``config``; on a GPU that does without the kernels, ``notices`` gets a line."""
    device, (_, _, head_dim) = torch.device(config.device), config.require_shape()
    reason = kernels_fit(device, config.torch_dtype, head_dim)
    if reason is not None and device.type == "cuda":
        notices.append(f"attention is computed with torch operations: {reason}")
        logger.warning(notices[-1])
    return default_attention(device, config.torch_dtype, head_dim)


def _without_unsupported(config: PageBrainConfig, parts: dict[str, Any]) -> tuple[PageBrainConfig, list[str]]:
    """``config`` without the features that a part lacks, and a line for each that was on."""
    lacking = parts_without("lookahead", parts)
    if not config.lookahead or not lacking:
        return config, []
    verb = "does" if len(lacking) == 1 else "do"
    notice = f"launching ahead is off: {' and '.join(lacking)} {verb} not declare support for lookahead"
    logger.warning(notice)
    return dataclasses.replace(config, lookahead=False), [notice]
