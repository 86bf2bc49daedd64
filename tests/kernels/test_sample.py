"""The sampling kernels give the tokens of ``Sampler``, whatever is beside a row and however it is cut up."""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pagebrain.errors import KernelError
from pagebrain.sampling import Sampler, SampleRow
from pagebrain.sampling_params import SamplingParams
from tests.support.attention_scene import moved
from tests.support.kernels import require_kernels

MAX_MODEL_LEN = 64
UNWRITTEN = -9

KINDS: dict[str, Callable[[random.Random], SamplingParams]] = {
    "greedy": lambda rng: SamplingParams(temperature=0.0, top_k=rng.choice([0, 3]), top_p=rng.choice([1.0, 0.5])),
    "temperature": lambda rng: SamplingParams(temperature=rng.choice([1e-12, 0.3, 1.0, 2.5])),
    "min_p": lambda rng: SamplingParams(temperature=rng.choice([0.7, 3.0]), min_p=rng.choice([1e-6, 0.05, 0.5, 1.0])),
    "top_k": lambda rng: SamplingParams(temperature=rng.choice([0.7, 3.0]), top_k=rng.choice([1, 2, 5, 50, 10**6])),
    "top_p": lambda rng: SamplingParams(temperature=rng.choice([0.7, 3.0]), top_p=rng.choice([1e-9, 0.1, 0.5, 0.95])),
    "all": lambda rng: SamplingParams(
        temperature=rng.choice([0.3, 1.0, 3.0]),
        top_k=rng.choice([1, 3, 20, 100, 10**6]),
        top_p=rng.choice([1e-3, 0.3, 0.8, 0.99]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.2]),
    ),
}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": lambda noise: torch.zeros_like(noise),
    "flat": lambda noise: 0.3 * noise,
    "peaked": lambda noise: 4 * noise - 50,
    "one stands out": lambda noise: noise + 30 * (noise == noise.max()),
    "few values": lambda noise: noise.round(),
    "two values": lambda noise: (noise > 0.5).float(),
    "many impossible": lambda noise: noise.masked_fill(noise < 0.2, -math.inf),
}


class Batch:
    """Rows of logits, one for each of ``params``, that belong to batch rows in random order; two batch rows get nothing."""

    def __init__(
        self,
        params: list[SamplingParams],
        vocab_size: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        shapes: list[str] | None = None,
        padding: int = 0,
        poison: float = math.nan,
    ) -> None:
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.params, self.vocab_size, self.num_rows = params, vocab_size, len(params) + 2
        shapes = shapes or list(SHAPES)
        self.logits = torch.full((len(params), vocab_size + padding), poison, dtype=dtype)
        for line in self.logits:
            line[:vocab_size] = SHAPES[rng.choice(shapes)](torch.randn(vocab_size, generator=generator)).to(dtype)
        self.seeds = [rng.randrange(-(2**70), 2**70) for _ in params]
        self.sample_indices = [rng.randrange(4) for _ in params]
        self.prompt_lens = [rng.randrange(1, 20) for _ in params]
        self.positions = [rng.randrange(40) for _ in params]
        self.active_rows = torch.tensor(rng.sample(range(self.num_rows), len(params)), dtype=torch.int32)

    def expected(self) -> list[int]:
        """What the sampler of torch operations draws from the same numbers in float32."""
        no_ids = torch.empty(0, dtype=torch.int64)
        rows = [
            SampleRow(params, self.seeds[i], self.sample_indices[i], self.positions[i], no_ids, self.prompt_lens[i])
            for i, params in enumerate(self.params)
        ]
        sampler: Any = Sampler(SimpleNamespace(vocab_size=self.vocab_size, eos_token_ids=()))  # type: ignore[arg-type]
        drawn: list[int] = sampler.sample(self.logits[:, : self.vocab_size].float(), rows).token_ids.tolist()
        return drawn

    def context_lens(self) -> Tensor:
        lens = torch.zeros(self.num_rows, dtype=torch.int32)
        lens[self.active_rows.long()] = torch.tensor(self.prompt_lens, dtype=torch.int32) + torch.tensor(
            self.positions, dtype=torch.int32
        )
        return lens

    def sampling(self, device: str) -> Any:
        from dataclasses import fields

        from pagebrain.kernels.sample import SamplingRows

        sampling = SamplingRows.make(self.num_rows, device)
        for index, row in enumerate(self.active_rows.tolist()):
            values = SamplingRows.values_for(
                self.params[index],
                self.seeds[index],
                self.sample_indices[index],
                self.prompt_lens[index],
                self.vocab_size,
            )
            for field, value in zip(fields(sampling), values, strict=True):
                getattr(sampling, field.name)[row] = value
        return sampling

    def run(self, device: str, greedy: bool = False, dtype: torch.dtype = torch.int32, **options: Any) -> list[int]:
        """Tokens of the kernels, after a look at what was written where."""
        from pagebrain.kernels import sample as sample_module

        token_ids = torch.full((self.num_rows, MAX_MODEL_LEN), UNWRITTEN, dtype=torch.int32, device=device)
        out = torch.full((len(self.params),), UNWRITTEN, dtype=dtype, device=device)
        lens = self.context_lens()
        inputs = (
            moved(self.logits, device),
            self.vocab_size,
            self.active_rows.to(device),
            lens.to(device),
            token_ids,
            out,
        )
        if greedy:
            sample_module.sample_greedy(*inputs, **options)
        else:
            sample_module.sample(*inputs, self.sampling(device), **options)
        expected = torch.full_like(token_ids, UNWRITTEN, device="cpu")
        rows = self.active_rows.long()
        expected[rows, lens[rows].long()] = out.cpu().int()
        assert torch.equal(token_ids.cpu(), expected), "a token was written where none belongs, or not where it does"
        tokens: list[int] = out.tolist()
        return tokens


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory holds what would win every comparison, instead of what happened to be there."""
    original = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fresh = original(self, *args, **kwargs)
        return fresh.fill_(math.inf if fresh.is_floating_point() else -7)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def many(device: str, interpreted: int, compiled: int) -> int:
    """How many rows to try: the interpreter takes a hundredth of a second for each launch of one."""
    return interpreted if device == "cpu" else compiled


# The same tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_sampler(kind: str, dtype: torch.dtype, device: str) -> None:
    rng = random.Random(f"{kind} {dtype}")
    refused, interpreted = 0, 3 if kind == "all" else 6
    for trial, (vocab_size, padding) in enumerate([(1000, 8), (333, 0), (48, 48)]):
        params = [KINDS[kind](rng) for _ in range(many(device, interpreted, 100))]
        batch = Batch(params, vocab_size, trial, dtype, padding=padding, poison=rng.choice([math.nan, math.inf, 3e4]))
        expected = batch.expected()
        assert batch.run(device, tile=256, row_tile=512, num_splits=rng.choice([1, 2, 3])) == expected
        batch.params = [SamplingParams(temperature=row.temperature) for row in params]
        refused += sum(a != b for a, b in zip(batch.expected(), expected, strict=True))
    assert (refused > 1) == (kind not in ("greedy", "temperature"))  # what a row keeps decided in some, or there is nothing


def test_all_kinds_of_rows_beside_each_other(device: str) -> None:
    rng = random.Random(5)
    params = [choose(rng) for choose in KINDS.values() for _ in range(many(device, 2, 40))]
    rng.shuffle(params)
    batch = Batch(params, 500, padding=12)
    assert batch.run(device, tile=256, row_tile=256) == batch.expected()


def test_greedy_takes_the_best_token_and_the_lower_id_of_equal_ones(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = Batch([SamplingParams(temperature=0.0)] * many(device, 12, 200), 700, 2, dtype, padding=4)
        expected = batch.expected()
        for num_splits in (1, 3):
            assert batch.run(device, greedy=True, tile=128, num_splits=num_splits) == expected
        assert batch.run(device, tile=256) == expected
    ties = sum(int((line == line.max()).sum() > 1) for line in batch.logits[:, :700].float())
    assert ties > 3


@pytest.mark.parametrize("num_splits", [2, 4])
def test_every_token_can_be_taken(num_splits: int, device: str) -> None:
    """Each in turn stands out, at the edges of tiles and splits too."""
    batch = Batch([SamplingParams()] * 37, 37, shapes=["flat"], padding=2)
    batch.logits[:, :37] += 60 * torch.eye(37)
    everything = list(range(37))
    assert batch.run(device, greedy=True, tile=8, num_splits=num_splits) == everything
    batch.params = [SamplingParams(top_p=top_p) for top_p in [1.0] * 27 + [0.5] * 10]
    assert batch.run(device, tile=8, row_tile=16, num_splits=num_splits) == everything == batch.expected()


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17])
def test_vocabularies_smaller_than_a_tile(vocab_size: int, device: str) -> None:
    params = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_k=2), SamplingParams(top_p=0.4, top_k=9)]
    batch = Batch(params, vocab_size, shapes=["flat"], padding=3, poison=math.inf)
    for num_splits in (None, 1, 4):
        assert batch.run(device, tile=16, row_tile=16, num_splits=num_splits) == batch.expected()


def test_ties_at_the_edge_keep_lower_token_ids(device: str) -> None:
    """Of 64 equal tokens, with any top-k and top-p: the rank of what is kept is the token id itself."""
    for params in (
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.25),
        SamplingParams(top_p=0.26),
        SamplingParams(top_k=10, top_p=0.5),
    ):
        batch = Batch([params] * many(device, 6, 300), 64, shapes=["equal"])
        drawn = batch.run(device, tile=32, row_tile=64, num_splits=1)
        assert drawn == batch.expected()
        kept = math.ceil((params.top_k or 64) * params.top_p)
        assert max(drawn) < kept and len(set(drawn)) > 2


def test_the_best_token_is_kept_even_if_nothing_is_asked_to_be(device: str) -> None:
    """No request may ask for a top-p of 0; if a row held one, refusing every token would never end."""
    batch = Batch([SamplingParams(top_p=0.5)] * 3, 50, shapes=["flat"])
    sampling = batch.sampling(device)
    sampling.top_p.zero_()
    batch.sampling = lambda device: sampling  # type: ignore[method-assign]
    assert batch.run(device, tile=64, row_tile=64) == batch.logits.argmax(dim=1).tolist()


def test_extreme_temperatures(device: str) -> None:
    shapes = ["flat", "peaked", "few values"]
    for temperature in (1e-300, 1e-9, 1e20):
        params = [SamplingParams(temperature=temperature, top_k=top_k) for top_k in (0, 4)] * many(device, 3, 30)
        batch = Batch(params, 100, shapes=shapes, padding=12)
        assert batch.run(device, tile=128, row_tile=128) == batch.expected()
    batch = Batch([SamplingParams(temperature=1e300)] * 4, 100, shapes=shapes, padding=12)  # infinite in float32
    assert batch.run(device, tile=128) == batch.expected()


# On nothing else ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
def test_a_token_does_not_depend_on_splits_and_tiles(num_splits: int, device: str) -> None:
    """More splits than tiles too: those that have nothing to read leave nothing that could win."""
    params = [SamplingParams(temperature=0.0), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1)]
    batch = Batch(params * many(device, 1, 20), 300, 3, shapes=["flat", "few values"])
    expected = batch.expected()
    for tile in (64, 512) if num_splits < 64 else (64,):
        assert batch.run(device, tile=tile, row_tile=tile, num_splits=num_splits) == expected


def test_a_token_does_not_depend_on_batch_mates(device: str) -> None:
    params = [SamplingParams(top_p=0.6), SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_k=4)]
    batch = Batch(params * many(device, 1, 10), 400, 7, shapes=["flat"])
    together = batch.run(device, tile=256, row_tile=512)
    lists = ("params", "seeds", "sample_indices", "prompt_lens", "positions")
    for index in range(len(together)):
        alone = Batch([batch.params[index]], 400)
        for name in lists:
            setattr(alone, name, [getattr(batch, name)[index]])
        alone.logits = batch.logits[index : index + 1]
        assert alone.run(device, tile=256, row_tile=512) == together[index : index + 1]


def test_padding_rows_may_share_a_batch_row(device: str) -> None:
    batch = Batch([SamplingParams()] * 5, 200, shapes=["flat"])
    batch.logits[2:] = batch.logits[1]
    batch.active_rows[2:] = batch.active_rows[1]
    for name in ("seeds", "sample_indices", "prompt_lens", "positions"):
        values = getattr(batch, name)
        values[2:] = [values[1]] * 3
    expected = batch.expected()
    assert batch.run(device, tile=256) == expected and expected[1:] == [expected[1]] * 4


def test_logits_may_be_columns_of_a_wider_tensor_and_ids_64_bits_wide(device: str) -> None:
    batch = Batch([SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0.0)], 90, padding=38)
    expected = batch.expected()
    assert batch.run(device, dtype=torch.int64, tile=64, row_tile=64) == expected
    batch.logits = batch.logits[:, :90]
    assert not batch.logits.is_contiguous()
    assert batch.run(device, tile=64, row_tile=64) == expected


def test_no_rows_are_no_work(device: str) -> None:
    assert Batch([], 10).run(device) == [] and Batch([], 10).run(device, greedy=True) == []


# Whatever the logits hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_garbage_yields_tokens_of_the_vocabulary(bad: float, device: str) -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=3, min_p=0.1),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=5, top_p=0.5),
    ]
    for some in (True, False):
        for dtype in (torch.float32, torch.bfloat16)[: many(device, 1, 2)]:
            batch = Batch(params, 70, dtype=dtype, padding=26, shapes=["flat"], poison=math.inf)
            batch.logits[:, 10 : 20 if some else 70] = bad
            batch.logits[:, : 10 if not some else 0] = bad
            drawn = batch.run(device, tile=64, row_tile=128)
            assert all(0 <= token < 70 for token in drawn)
            assert all(0 <= token < 70 for token in batch.run(device, greedy=True, tile=64))
            if some and not bad > 0:  # a token without a number is never taken while others have one
                assert not set(drawn) & set(range(10, 20))


def test_a_token_for_which_there_is_no_column_is_not_written(device: str) -> None:
    from pagebrain.kernels.sample import SamplingRows, sample, sample_greedy

    lens = torch.tensor([2, 3, 4, 2**31 - 1, -1], dtype=torch.int32, device=device)
    logits = torch.zeros(5, 10, device=device)
    logits[:, 4] = 9
    rows = torch.arange(5, dtype=torch.int32, device=device)
    for greedy in (True, False):
        wide = torch.full((5, 6), UNWRITTEN, dtype=torch.int32, device=device)
        out = torch.empty(5, dtype=torch.int32, device=device)
        if greedy:
            sample_greedy(logits, 10, rows, lens, wide[:, :4], out)
        else:
            sample(logits, 10, rows, lens, wide[:, :4], out, SamplingRows.make(5, device))
        expected = torch.full((5, 6), UNWRITTEN, dtype=torch.int32)
        expected[0, 2] = expected[1, 3] = 4
        assert out.tolist() == [4] * 5
        assert torch.equal(wide.cpu(), expected)


# Frequencies ----------------------------------------------------------------------------------------------------------


def test_frequencies_are_those_of_the_renormalised_softmax(device: str) -> None:
    """With fixed seeds, so it always passes or always fails; a good sampler would fail once in 100,000."""
    from pagebrain.kernels.sample import SamplingRows, sample

    num_draws, weights = many(device, 100, 20_000), torch.tensor([5.0, 1.0, 3.0, 2.0, 0.5, 0.5])
    sampling = SamplingRows.make(num_draws, device)
    sampling.temperature.fill_(1.0)
    sampling.top_k.fill_(4)
    rows = torch.arange(num_draws, dtype=torch.int32, device=device)
    lens = rows + 1
    token_ids, out = (torch.zeros(*shape, dtype=torch.int32, device=device) for shape in ((num_draws, 1), (num_draws,)))
    sample(weights.log().repeat(num_draws, 1).to(device), 6, rows, lens, token_ids, out, sampling, tile=8, row_tile=8)
    counts = out.cpu().bincount(minlength=6).double()
    expected = num_draws * weights[:4].double() / 11
    assert not counts[4:].any()
    assert float(((counts[:4] - expected) ** 2 / expected).sum()) < 25.9  # chi-square of 3 degrees


# Refusals and choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(3, 20, dtype=torch.float64)}, "logits with torch.float64"),
        ({"logits": torch.zeros(20, 3).t()}, "contiguous rows"),
        ({"logits": torch.zeros(20)}, r"expected float32, bfloat16 or float16 \[num_tokens, padded_vocab\]"),
        ({"vocab_size": 21}, "vocab_size with 21, expected 1 to 20"),
        ({"vocab_size": 0}, "vocab_size with 0, expected 1 to 20"),
        ({"active_rows": torch.zeros(2, dtype=torch.int32)}, r"active_rows .* integers \[3\]"),
        ({"active_rows": torch.zeros(3)}, r"active_rows .* integers \[3\]"),
        ({"context_lens": torch.zeros(5, 1, dtype=torch.int32)}, r"context_lens .* integers \[5\]"),
        ({"out": torch.zeros(3)}, r"out .* integers \[3\]"),
        ({"token_ids": torch.zeros(4, 8, dtype=torch.int32)}, r"token_ids .* integers \[5, max_model_len\]"),
        ({"token_ids": torch.zeros(8, 5, dtype=torch.int32).t()}, "token_ids .* contiguous rows"),
        ({"num_splits": 0}, "num_splits must be 1 to 64, got 0"),
        ({"num_splits": 65}, "num_splits must be 1 to 64, got 65"),
    ],
)
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict[str, Any], said: str, greedy: bool, device: str
) -> None:
    from pagebrain.kernels.sample import SamplingRows, sample, sample_greedy

    inputs: dict[str, Any] = {
        "logits": torch.zeros(3, 20),
        "vocab_size": 20,
        "active_rows": torch.arange(3, dtype=torch.int32),
        "context_lens": torch.ones(5, dtype=torch.int32),
        "token_ids": torch.full((5, 8), UNWRITTEN, dtype=torch.int32),
        "out": torch.full((3,), UNWRITTEN, dtype=torch.int32),
    }
    if not greedy:
        inputs["sampling"] = SamplingRows.make(5, device)
    inputs |= change
    inputs = {name: moved(value, device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    call: Any = sample_greedy if greedy else sample
    before = {name: inputs[name].clone() for name in ("token_ids", "out")}
    with pytest.raises(KernelError, match=said):
        call(**inputs)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "log_min_p", "stream_key", "num_prompt_tokens"])
def test_sampling_parameters_of_other_rows_or_dtypes_are_refused(name: str, device: str) -> None:
    from dataclasses import replace

    from pagebrain.kernels.sample import SamplingRows, sample

    rows = SamplingRows.make(2, device)
    ids = torch.zeros(2, dtype=torch.int32, device=device)
    for wrong in (torch.zeros(3, dtype=getattr(rows, name).dtype, device=device), getattr(rows, name).to(torch.float16)):
        with pytest.raises(KernelError, match=rf"sampling.{name} .* \[2\]"):
            sample(torch.zeros(2, 9, device=device), 9, ids, ids, ids.view(2, 1), ids, replace(rows, **{name: wrong}))


def test_a_rows_numbers_are_what_the_kernels_read(device: str) -> None:
    from pagebrain.kernels.sample import SamplingRows
    from pagebrain.sampling.random_bits import stream_key

    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.25)
    seed = next(seed for seed in range(99) if stream_key(seed, 1) >= 2**63)
    values = SamplingRows.values_for(params, seed, 1, 12, 100)
    assert values == (0.5, 7, 0.9, math.log(0.25), stream_key(seed, 1) - 2**64, 12)
    assert SamplingRows.values_for(SamplingParams(temperature=0.0, top_k=-1), 0, 0, 3, 100)[:4] == (0.0, 0, 1.0, -math.inf)
    assert SamplingRows.values_for(SamplingParams(temperature=1e-30, top_k=100), 0, 0, 3, 100)[:2] == (1e-10, 0)


def test_rows_are_split_while_there_are_few_of_them(device: str) -> None:
    from pagebrain.kernels.sample import choose_num_splits

    assert choose_num_splits(1, 50_257, 1024, 132) == 50  # a tile for each program
    assert choose_num_splits(256, 50_257, 1024, 132) == 8
    assert choose_num_splits(100, 50_257, 1024, 132) == 17  # of 3 tiles; 21 would leave 4 without any
    assert choose_num_splits(10_000, 50_257, 1024, 132) == 1
    assert choose_num_splits(1, 5, 1024, 132) == 1
    for num_tokens in (1, 2, 3, 17, 64, 300):
        for vocab_size in (1, 1024, 1025, 50_257, 524_288):
            num_splits = choose_num_splits(num_tokens, vocab_size, 1024, 132)
            num_tiles = -(-vocab_size // 1024)
            assert 1 <= num_splits <= min(64, num_tiles)
            assert (num_splits - 1) * -(-num_tiles // num_splits) < num_tiles


# On a GPU only --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_vocabulary_of_gpt2(dtype: torch.dtype) -> None:
    require_kernels("cuda")
    rng = random.Random(0)
    params = [choose(rng) for choose in KINDS.values() for _ in range(12)]
    batch = Batch(params, 50_257, dtype=dtype, padding=47)
    assert batch.run("cuda") == batch.expected()


@pytest.mark.gpu
def test_a_graph_replays_with_other_logits_rows_and_parameters_and_the_host_does_not_wait() -> None:
    from dataclasses import fields

    from pagebrain.kernels.sample import SamplingRows, sample

    require_kernels("cuda")
    rng = random.Random(0)
    batches = [Batch([choose(rng) for choose in KINDS.values()], 1000, seed, padding=24) for seed in (1, 2)]
    logits = torch.zeros_like(batches[0].logits, device="cuda")
    sampling = SamplingRows.make(batches[0].num_rows, "cuda")
    rows = torch.zeros(len(logits), dtype=torch.int32, device="cuda")
    lens = torch.ones(batches[0].num_rows, dtype=torch.int32, device="cuda")
    token_ids = torch.zeros(len(lens), MAX_MODEL_LEN, dtype=torch.int32, device="cuda")
    out = torch.zeros(len(logits), dtype=torch.int32, device="cuda")
    sample(logits, 1000, rows, lens, token_ids, out, sampling)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, 1000, rows, lens, token_ids, out, sampling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(logits, 1000, rows, lens, token_ids, out, sampling)
    for batch in batches:
        logits.copy_(batch.logits)
        rows.copy_(batch.active_rows)
        lens.copy_(batch.context_lens())
        new = batch.sampling("cuda")
        for field in fields(sampling):
            getattr(sampling, field.name).copy_(getattr(new, field.name))
        graph.replay()
        assert out.tolist() == batch.expected()
