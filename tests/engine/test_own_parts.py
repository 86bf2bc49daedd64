"""Parts named from outside serve real requests, and what a part cannot do is switched off with a line that says so."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from pagebrain import LLM, SamplingParams
from pagebrain.attention import AttentionBackend, paged_attention
from pagebrain.block import BlockManager
from pagebrain.engine.parts import ATTENTION_BACKEND, ATTENTION_FUNCTION
from pagebrain.engine.scheduler import Scheduler
from pagebrain.sampling import Sampler
from tests.support.models import hf_greedy, random_gpt2

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4] * 9, [7]]


def expected(base: Any) -> list[list[int]]:
    return [hf_greedy(base, prompt, 10) for prompt in PROMPTS]


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_every_part_can_be_replaced_by_an_object_of_ones_own() -> None:
    used: set[str] = set()

    class MyBlockManager(BlockManager):
        def allocate(self, count: int = 1) -> list[int]:
            used.add("block_manager")
            return super().allocate(count)[::-1]

    class MyScheduler(Scheduler):
        def schedule(self) -> Any:
            used.add("scheduler")
            return super().schedule()

    class MySampler(Sampler):
        def sample(self, logits: Any, rows: Any) -> Any:
            used.add("sampler")
            return super().sample(logits, rows)

    def my_attention(
        query: Any, key_pool: Any, value_pool: Any, block_tables: Any, context_lens: Any, query_starts: Any, scale: float
    ) -> Any:
        used.add("attention")
        return paged_attention(
            query, key_pool, value_pool, block_tables, context_lens, query_starts, scale, pages_per_step=1
        )

    base = random_gpt2()
    parts = {"block_manager": MyBlockManager, "scheduler": MyScheduler, "sampler": MySampler, "attention": my_attention}
    assert tokens(LLM(base, num_blocks=16, parts=parts)) == expected(base)
    assert used == set(parts)


NEGATED = """
from pagebrain.attention.torch_backend import TorchBackend


class Negated(TorchBackend):
    def write(self, layer, pool, key, value, batch):
        super().write(layer, pool, -key, -value, batch)

    def attend(self, layer, query, pool, batch, scale):
        return -super().attend(layer, -query, pool, batch, scale)
"""


def test_a_backend_of_ones_own_may_keep_k_and_v_in_another_form(tmp_path: Path) -> None:
    """What this one writes only it can read: K and V are stored with their sign turned round."""
    (tmp_path / "negated.py").write_text(NEGATED)
    base = random_gpt2(seed=2)
    llm = LLM(base, num_blocks=16, parts={"attention": f"{tmp_path}/negated.py:Negated"})
    assert tokens(llm) == expected(base)
    pool = llm.engine.cache_manager.pool
    plain = LLM(base, num_blocks=16)
    assert tokens(plain) == expected(base)
    assert torch.equal(pool.key_pools[0], -plain.engine.cache_manager.pool.key_pools[0])


def test_the_backend_in_the_docs_serves_alone(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api" / "parts.md").read_text(encoding="utf-8")
    (tmp_path / "gathered.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    base = random_gpt2(seed=2)
    settings: dict[str, Any] = {"num_blocks": 5, "max_num_seqs": 2, "block_size": 8, "max_num_batched_tokens": 8}
    llm = LLM(base, parts={"attention": f"{tmp_path}/gathered.py:Gathered"}, **settings)
    assert tokens(llm) == expected(base)


def test_parts_checks_the_arguments_that_the_engine_calls_attention_with() -> None:
    assert list(inspect.signature(paged_attention).parameters)[: len(ATTENTION_FUNCTION)] == list(ATTENTION_FUNCTION)
    for name, arguments in ATTENTION_BACKEND.items():
        assert list(inspect.signature(getattr(AttentionBackend, name)).parameters)[1:] == list(arguments)


def test_a_part_named_by_path_is_loaded_from_that_file(tmp_path: Path) -> None:
    """Two files of one name are two modules, and a wrong attention makes wrong tokens: it is really this one that runs."""
    for folder, factor in (("right", "1.0"), ("wrong", "3.0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            "from pagebrain.attention import paged_attention as theirs\n"
            "def mine(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):\n"
            f"    return theirs(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale) * {factor}\n"
        )
    base = random_gpt2(seed=2)
    assert tokens(LLM(base, num_blocks=16, parts={"attention": f"{tmp_path}/right/mine.py:mine"})) == expected(base)
    assert tokens(LLM(base, num_blocks=16, parts={"attention": f"{tmp_path}/wrong/mine.py:mine"})) != expected(base)


def test_a_part_that_does_not_declare_async_scheduling_switches_it_off_and_says_so() -> None:
    class Modest(Scheduler):
        supports = frozenset()

    base = random_gpt2()
    llm = LLM(base, num_blocks=16, async_scheduling=True, parts={"scheduler": Modest})
    assert not llm.config.async_scheduling and llm.engine.depth == 0
    assert llm.notices == (
        "async scheduling is off: scheduler does not declare support for async_scheduling",
        "prefix caching is off: scheduler does not declare support for prefix_caching",
    )
    assert tokens(llm) == expected(base)
    assert LLM(base, num_blocks=16, async_scheduling=True, parts={"scheduler": Scheduler}).notices == ()


def test_parts_of_the_engine_named_from_outside_support_what_they_did() -> None:
    parts = {"attention": "pagebrain.attention:paged_attention", "scheduler": "pagebrain.engine.scheduler:Scheduler"}
    llm = LLM(random_gpt2(), num_blocks=16, async_scheduling=True, parts=parts)
    assert llm.config.async_scheduling and llm.notices == ()


def test_a_file_that_was_edited_is_read_again(tmp_path: Path) -> None:
    """In a notebook a learner edits and tries again; the first version must not come back."""
    file = tmp_path / "mine.py"
    base = random_gpt2(seed=2)
    for factor, right in (("3.0", False), ("1.0", True)):
        file.write_text(
            "from pagebrain.attention import paged_attention as theirs\n"
            "def mine(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):\n"
            f"    return theirs(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale) * {factor}\n"
        )
        os.utime(file, ns=(1, 10**9 if right else 10**9 + 1))
        assert (tokens(LLM(base, num_blocks=16, parts={"attention": f"{file}:mine"})) == expected(base)) == right


def test_a_part_given_by_module_path() -> None:
    base = random_gpt2(torch.float64)
    llm = LLM(base, num_blocks=16, parts={"scheduler": "pagebrain.engine.scheduler:Scheduler"})
    assert tokens(llm) == expected(base)
