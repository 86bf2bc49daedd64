"""Builds an engine from a configuration: model, cache, parts, executor, engine loop."""

import dataclasses
import functools
import gc
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pagebrain.attention import choose_backend
from pagebrain.attention.layer import attach, detach
from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.devices import keep_freed_memory, limit_threads
from pagebrain.engine.engine import Engine
from pagebrain.engine.executor import Executor
from pagebrain.engine.parts import SchedulerPart, find_part, make_part, parts_without
from pagebrain.engine.requests import encode_text
from pagebrain.engine.scheduler import Scheduler
from pagebrain.errors import ConfigError
from pagebrain.generation_config import generation_notices
from pagebrain.kernels.decode_plan import MAX_NUM_SEQS
from pagebrain.layers import prepare
from pagebrain.layers.linear import can_pack
from pagebrain.models.checkpoints import open_checkpoint
from pagebrain.models.loading import load_text
from pagebrain.models.model import Model
from pagebrain.models.registry import build_model
from pagebrain.models.weights import Checkpoint
from pagebrain.sampling import Sampler
from pagebrain.worker.memory import enough_memory, estimate_largest_step, measure_largest_step
from pagebrain.worker.torch_executor import TorchExecutor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_OWN_PARTS: dict[str, Any] = {
    "block_manager": BlockManager,
    "attention": None,  # chosen when the model is known
    "scheduler": Scheduler,
    "sampler": Sampler,
}

_MORE_MEMORY = "choose a smaller model, or raise the limit (a container's, ulimit -v)"


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and facts about it. ``notices`` are lines for users: which features are off, and why."""

    engine: Engine
    config: PageBrainConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    weights_packed: bool
    notices: tuple[str, ...]


def build_engine(
    config: PageBrainConfig, base: "PreTrainedModel | None" = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> BuiltEngine:
    """An engine for ``config``.

    The weights of ``base`` are shared and not changed. Without ``base``, the model is loaded and belongs to the engine. Its
    layers may then change the layout of their weights for speed.
    """
    limit_threads()
    keep_freed_memory()
    parts = {name: find_part(name, config.parts.get(name), own) for name, own in _OWN_PARTS.items()}
    if config.device != "cpu" and torch.cuda.is_available():
        gc.collect()  # collect reference cycles of a previous engine, so that its pools are freed
        torch.cuda.empty_cache()
    owned = base is None
    notices: list[str] = []
    detokenizer, why_off = None, None
    if tokenizer is not None or base is None or config.tokenizer is not None:  # before the weights, to fail early
        with enough_memory(config.device, "the tokenizer", _MORE_MEMORY):
            tokenizer, detokenizer, why_off = load_text(config, tokenizer)
    if why_off is not None:
        notices.append(why_off)
    for_weights = "the model's weights", "choose a smaller model, or dtype='bfloat16'"
    if base is None:
        config = config.with_device_and_dtype()
        with enough_memory(config.device, *for_weights):
            checkpoint = open_checkpoint(config, notices)
    elif config.model is not None or config.load_format != "auto":
        raise ConfigError("a model object was given: leave out model and load_format")
    else:
        checkpoint = Checkpoint.of(base)
        notices += generation_notices(base)
    for notice in notices:
        logger.warning(notice)
    model_config, dtype, device = checkpoint.config, checkpoint.dtype, checkpoint.device
    backend, reason = choose_backend(parts["attention"], device, dtype, model_config.head_dim)
    if reason is not None:
        _notice(notices, f"attention is computed with torch operations: {reason}")
    parts["attention"] = backend
    without_rows = _parts_without_rows(parts)
    config = _without_unsupported(config, parts, without_rows, device.type == "cuda", notices)
    uses_rows = not without_rows
    if uses_rows and config.max_num_seqs > MAX_NUM_SEQS:
        raise ConfigError(f"max_num_seqs must be at most {MAX_NUM_SEQS} with the Triton kernels, got {config.max_num_seqs}")
    with enough_memory(str(device), *for_weights):
        model = build_model(checkpoint)
    del base, checkpoint  # so that a layer which changes the layout of its weights frees the original
    with enough_memory(str(device), "a copy of the weights in another layout", _MORE_MEMORY):
        prepare(model, kernels=uses_rows, owned=owned)
    if device.type == "cuda":
        smallest = dataclasses.replace(config, num_blocks=None, memory_fraction=None)
        step_bytes = _step_bytes(model, smallest.resolved_for(model_config, dtype, device))
        torch.cuda.empty_cache()  # return the step's memory, so that the pool can take it
    else:
        step_bytes = estimate_largest_step(config, model_config.vocab_size, model_config.hidden_size, dtype)
    config = config.resolved_for(model_config, dtype, device, step_bytes)
    if detokenizer is not None:
        for notice in _vocabulary_notices(detokenizer.num_ids, model_config.vocab_size):
            _notice(notices, notice)

    block_manager = make_part("block_manager", parts["block_manager"], config)
    with enough_memory(config.device, f"K and V in {config.num_blocks:,} blocks", "lower num_blocks or memory_fraction"):
        cache_manager = CacheManager(block_manager, config)
        attach(model, cache_manager.pool, backend)  # allocates the pool
    if config.num_swap_blocks:
        cache_manager.swap_space.costs.swap_block_s = cache_manager.pool.measure_swap_s()
    sampler = make_part("sampler", parts["sampler"], config)
    executor: Executor
    if uses_rows:
        from pagebrain.worker.cuda_executor import CudaExecutor

        with enough_memory(config.device, "CUDA graphs", "lower memory_fraction or max_num_seqs, or set cuda_graphs=False"):
            executor = CudaExecutor(model, cache_manager.pool, sampler, config)
        if device.type == "cuda":
            notices.append(_found_on_gpu(config, step_bytes, executor.capture_s))
    else:
        with enough_memory(config.device, "the tokens of all sequences", "lower max_num_seqs or max_model_len"):
            executor = TorchExecutor(model, cache_manager.pool, sampler, config)

    scheduler: SchedulerPart = make_part("scheduler", parts["scheduler"], config, cache_manager)
    encode = None if tokenizer is None else functools.partial(encode_text, tokenizer)
    without_beam_search = parts_without("beam_search", {"scheduler": parts["scheduler"], "sampler": parts["sampler"]})
    engine = Engine(config, cache_manager, executor, scheduler, encode, detokenizer, without_beam_search)
    return BuiltEngine(engine, config, tokenizer, owned and can_pack(dtype, device), tuple(notices))


def _vocabulary_notices(num_ids: int, num_rows: int) -> list[str]:
    """A line if the tokenizer and the embeddings differ in size. Such a pair is served, as in Hugging Face."""
    if num_ids > num_rows:
        lacking = f"{num_rows}" if num_ids == num_rows + 1 else f"{num_rows} to {num_ids - 1}"
        return [
            f"the tokenizer has ids up to {num_ids - 1}, and the model's embeddings have {num_rows} rows: a prompt that "
            f"holds {lacking} is refused"
        ]
    if num_ids < num_rows:
        return [
            f"the model's embeddings have {num_rows} rows, and the tokenizer has ids up to {num_ids - 1}: ids above that "
            "have no text"
        ]
    return []


def _notice(notices: list[str], line: str) -> None:
    notices.append(line)
    logger.warning(line)


def _parts_without_rows(parts: dict[str, Any]) -> list[str]:
    """Names of the parts that prevent the use of batch rows.

    The attention backend must read its sequences from batch rows. The kernels that sample from batch rows replace
    PageBrain's own sampler only.
    """
    attention = [] if "batch_rows" in getattr(parts["attention"], "supports", ()) else ["attention"]
    return attention + ([] if parts["sampler"] is Sampler else ["sampler"])


def _step_bytes(model: Model, config: PageBrainConfig) -> int:
    """Bytes that the largest step takes besides weights, K and V. One such step is computed, with PageBrain's own parts."""
    without_swapping: dict[str, Any] = {"swap_space_gib": 0.0, "preemption_mode": "recompute"}
    config = dataclasses.replace(config, num_blocks=config.blocks_for(config.max_model_len or 0), **without_swapping)
    advice = f"lower max_num_batched_tokens (it is {config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs})"
    _, _, head_dim = config.require_shape()
    backend, _ = choose_backend(None, torch.device(config.device), config.torch_dtype, head_dim)
    with enough_memory(config.device, "the largest step", advice):
        cache_manager = CacheManager(BlockManager(config), config)
        attach(model, cache_manager.pool, backend)
        step_bytes = measure_largest_step(model, Sampler(config), config)
    detach(model)
    return step_bytes


def _found_on_gpu(config: PageBrainConfig, step_bytes: int, capture_s: float | None) -> str:
    """One line on the GPU's memory and its use."""
    free, total = torch.cuda.mem_get_info(config.device)
    assert config.num_blocks is not None
    graphs = "off" if capture_s is None else f"recorded in {capture_s:.1f} s"
    cache = (
        f"{config.num_blocks * config.block_bytes / 1e9:.2f} GB ({config.num_blocks:,} blocks of {config.block_size} tokens)"
    )
    return (
        f"{torch.cuda.get_device_name(config.device)}, {total / 1e9:.1f} GB: K and V take {cache}, the largest step "
        f"{step_bytes / 1e9:.2f} GB, and {free / 1e9:.1f} GB are left; CUDA graphs: {graphs}"
    )


def _without_unsupported(
    config: PageBrainConfig, parts: dict[str, Any], without_rows: list[str], on_gpu: bool, notices: list[str]
) -> PageBrainConfig:
    """``config`` without the features that a part lacks. ``notices`` gets a line for each feature that is switched off."""
    features = (
        ("async_scheduling", "async_scheduling", "async scheduling is", tuple(parts)),
        ("cuda_graphs", "cuda_graph", "CUDA graphs are", tuple(parts)),
        ("prefix_caching", "prefix_caching", "prefix caching is", ("block_manager", "scheduler")),
        ("swap_space_gib", "swapping", "swapping is", ("scheduler",)),
    )
    for setting, feature, what, concerned in features:
        lacking = parts_without(feature, {name: parts[name] for name in concerned})
        is_on = on_gpu if getattr(config, setting) is None else getattr(config, setting)
        if is_on and lacking:
            verb = "does" if len(lacking) == 1 else "do"
            _notice(notices, f"{what} off: {' and '.join(lacking)} {verb} not declare support for {feature}")
            off: dict[str, Any] = {setting: False}
            if setting == "swap_space_gib":
                off = {setting: 0.0, "preemption_mode": "recompute"}
            config = dataclasses.replace(config, **off)
    if on_gpu and config.cuda_graphs is not False and without_rows:
        verb = "does" if len(without_rows) == 1 else "do"
        _notice(notices, f"CUDA graphs are off: {' and '.join(without_rows)} {verb} not work on batch rows")
        config = dataclasses.replace(config, cuda_graphs=False)
    return config
