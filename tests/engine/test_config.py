"""How a configuration is resolved against a model and a machine."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from pagebrain import LLM, PageBrainConfig, SamplingParams, machine
from pagebrain.cli.arguments import add_engine_arguments, engine_settings
from pagebrain.config import with_own_names
from pagebrain.errors import ConfigError
from pagebrain.machine import MemoryLimit
from tests.support.machine import GB, Tree
from tests.support.models import random_gpt2


def test_for_model_takes_shape_dtype_and_device_from_the_model() -> None:
    resolved = PageBrainConfig.for_model(random_gpt2(torch.float64), block_size=8, num_blocks=20)
    shape = (resolved.num_layers, resolved.num_heads, resolved.head_dim, resolved.vocab_size, resolved.eos_token_ids)
    assert shape == (2, 3, 16, 97, (96,))
    assert (resolved.dtype, resolved.device, resolved.max_model_len) == ("float64", "cpu", 64)
    assert resolved.token_bytes == 2 * 2 * 3 * 16 * 8 and resolved.block_bytes == 8 * resolved.token_bytes
    assert [resolved.blocks_for(n) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PageBrainConfig().block_size = 3  # type: ignore[misc]


def test_two_settings_also_have_the_names_that_vllm_gives_them() -> None:
    llm = LLM(random_gpt2(), num_blocks=8, gpu_memory_utilization=0.25, enforce_eager=True)
    assert (llm.config.memory_fraction, llm.config.cuda_graphs) == (0.25, False)
    assert with_own_names({"enforce_eager": False, "block_size": 8}) == {"block_size": 8}
    args = argparse.ArgumentParser()
    add_engine_arguments(args)
    given = engine_settings(args.parse_args(["--gpu-memory-utilization", "0.25", "--enforce-eager"]))
    assert given == {"memory_fraction": 0.25, "cuda_graphs": False}


def test_num_blocks_follows_the_memory_fraction_up_to_what_all_seats_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_gpt2()
    block_bytes = PageBrainConfig.for_model(base, num_blocks=4).block_bytes
    free = MemoryLimit(5000 * block_bytes, 1000 * block_bytes, "a test's memory")
    monkeypatch.setattr(machine, "available_memory", lambda: free)
    counts = [PageBrainConfig.for_model(base, memory_fraction=share).num_blocks for share in (0.05, 0.1, 1.0)]
    assert counts == [50, 100, 64 * 4]  # 64 seats of 64 tokens, 16 to a block
    with pytest.raises(ConfigError, match="hold no block of .* raise memory_fraction"):
        PageBrainConfig.for_model(base, memory_fraction=0.0005)
    with pytest.raises(ConfigError, match="fewer than max_model_len=64"):
        PageBrainConfig.for_model(base, memory_fraction=0.002, max_model_len=64)


def test_more_blocks_than_the_machine_has_memory_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks=2000000000 of .* bytes each take .* GB for K and V, and there are"):
        PageBrainConfig.for_model(random_gpt2(), num_blocks=2_000_000_000)


def test_in_a_container_the_cache_is_planned_and_checked_with_what_is_free_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = Tree(tmp_path).v2("/", {"memory.max": 2 * GB, "memory.current": 2 * GB - 100 * 2**20})
    container.write("proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {64 * GB // 1024} kB\n")
    available = machine.available_memory
    monkeypatch.setattr(machine, "available_memory", lambda: available(container.root))
    base, free = random_gpt2(), 100 * 2**20
    planned = PageBrainConfig.for_model(base, max_num_seqs=4096, max_num_batched_tokens=4096)
    assert planned.num_blocks == free * 0.3 // planned.block_bytes < 4096 * 4
    most = free // planned.block_bytes
    assert PageBrainConfig.for_model(base, num_blocks=most).num_blocks == most
    wanted = (
        rf"there are 0.10 GB free of 2.15 GB \(the limit of this container or control group\): use fewer than {most + 1}"
    )
    with pytest.raises(ConfigError, match=wanted):
        PageBrainConfig.for_model(base, num_blocks=most + 1)


def test_a_model_with_an_end_token_outside_its_vocabulary_has_none() -> None:
    base = random_gpt2()
    base.generation_config.eos_token_id = None
    base.config.eos_token_id = 50256
    assert PageBrainConfig.for_model(base).eos_token_ids == ()
    base.config.eos_token_id = [5, 96, 50256]
    assert PageBrainConfig.for_model(base).eos_token_ids == (5, 96)
    base.config.eos_token_id = None
    output = LLM(base, num_blocks=4).generate([[1]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert output[0].outputs[0].finish_reason == "length"
