"""Bad input gets one clear line before anything changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.attention import AttentionBackend
from pagebrain.block import BlockManager
from pagebrain.errors import ConfigError, InvalidRequestError, ModelLoadError, PartError
from pagebrain.sampling import Sampler
from tests.support.models import hf_greedy, random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text
    return text


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_gpt2(vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256), byte_tokenizer(), num_blocks=16)


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "prompt is empty"),
    "no token ids": ([], "prompt is empty"),
    "exactly at the limit": ([1] * 64, "has 64 tokens, but at most 63"),
    "over the limit": ("x" * 500, "has 500 tokens, but at most 63"),
    "token id too large": ([1, VOCAB_SIZE], "prompt token 1 is 257, but ids run from 0 to 256"),
    "negative token id": ([-1], "prompt token 0 is -1"),
    "not a token id": ([1, 2.5], "prompt token 1 must be an integer, got 2.5"),
    "a truth value": ([True], "prompt token 0 must be an integer, got True"),
    "not a prompt": (7, "a string or a list of token ids"),
    "bytes": (b"hi", "a string or a list of token ids, got b'hi'"),
    "a matrix of ids": (torch.tensor([[1, 2]]), "prompt token 0 must be an integer"),
    "lone surrogate": ("\ud800", "no valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_and_none_of_its_batch_is_started(name: str, llm: LLM) -> None:
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.engine.add_request(prompt, GREEDY)
    one_line(caught.value)
    with pytest.raises(InvalidRequestError, match=f"prompt 1: .*{message}") as caught:
        llm.generate(["fine", prompt, "fine"], GREEDY, use_tqdm=False)
    one_line(caught.value)
    assert not llm.engine.has_unfinished_requests


def test_a_prompt_one_below_the_limit_generates_one_token(llm: LLM) -> None:
    output = llm.generate([[5] * 63], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 1 and output.finish_reason == "length"


def test_more_than_the_context_cannot_even_be_scored(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="has 65 tokens, but at most 64 .max_model_len. can be scored: shorten it"):
        llm.generate([[5] * 65], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
    ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"temperature": 10**400}, "temperature must be at least 0 and finite"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1"),
    ({"top_p": 1.1}, "top_p must be"),
    ({"top_p": float("nan")}, "top_p must be"),
    ({"top_k": -2}, "top_k must be at least -1, got -2"),
    ({"top_k": 1.5}, "top_k must be an integer"),
    ({"min_p": 1.5}, "min_p must be"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be at least 0.01"),
    ({"presence_penalty": 3.0}, "presence_penalty must be"),
    ({"frequency_penalty": -3.0}, "frequency_penalty must be"),
    ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] must be a number between"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias must name token ids"),
    ({"logit_bias": [1]}, "logit_bias must map"),
    ({"max_tokens": -1}, "max_tokens must be at least 0, got -1"),
    ({"min_tokens": 1, "max_tokens": 0}, r"min_tokens must be at most max_tokens \(0\), got 1"),
    ({"min_tokens": -1}, "min_tokens must be at least 0"),
    ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens must be at most max_tokens \(4\), got 5"),
    ({"n": 0}, "n must be between 1 and 128, got 0"),
    ({"n": 129}, "n must be between"),
    ({"stop": [""]}, "stop must hold non-empty strings"),
    ({"stop": 5}, "stop must be a list"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must name token ids"),
    ({"logprobs": 21}, "logprobs must be between 0 and 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be between"),
    ({"seed": "abc"}, "seed must be None or an integer"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False"),
]


@pytest.mark.parametrize(("values", "message"), BAD_PARAMS, ids=[str(values) for values, _ in BAD_PARAMS])
def test_a_bad_sampling_parameter_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(**values)
    one_line(caught.value)


def test_parameters_that_do_not_fit_the_model_or_the_prompt_are_refused(llm: LLM) -> None:
    for params, message in (
        (SamplingParams(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids holds token id 257"),
        (SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias holds token id 257"),
        (SamplingParams(min_tokens=60), "min_tokens is 60, but 5 prompt tokens leave room for 59"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate("hello", params, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 prompts need as many SamplingParams, or one for all; got 1"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="params must be SamplingParams"):
        llm.generate("a", {"temperature": 0}, use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished_requests


def test_a_request_id_under_way_cannot_be_used_twice(llm: LLM) -> None:
    llm.engine.add_request("a", GREEDY, "same")
    with pytest.raises(InvalidRequestError, match="'same' is under way already"):
        llm.engine.add_request("b", GREEDY, "same")
    assert llm.engine.num_unfinished_requests == 1
    assert llm.engine.abort("same") and not llm.engine.abort("same")


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 0}, "block_size must be at least 1"),
    ({"block_size": 2048}, "block_size must be at most 1024"),
    ({"num_blocks": 0}, "num_blocks must be at least 1"),
    ({"num_blocks": 1, "block_size": 1}, "hold 1 token"),
    ({"num_blocks": 3, "max_model_len": 64}, r"hold 48 tokens, fewer than max_model_len=64: use num_blocks >= 4"),
    ({"max_model_len": 65}, "at most the model's 64 positions, got 65"),
    ({"max_model_len": 1}, "max_model_len must be at least 2"),
    ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
    ({"max_num_seqs": 100, "max_num_batched_tokens": 50}, "must be at least max_num_seqs"),
    ({"memory_fraction": 0.0}, "memory_fraction must be greater than 0"),
    ({"memory_fraction": 1.5}, "memory_fraction must be"),
    ({"gpu_memory_utilization": 1.5}, "memory_fraction must be"),
    ({"gpu_memory_utilization": 0.5, "memory_fraction": 0.5}, "two names of one setting"),
    ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
    ({"enforce_eager": True, "cuda_graphs": True}, "enforce_eager=True switches CUDA graphs off"),
    ({"dtype": "float8"}, "dtype must be one of auto, float64"),
    ({"device": "tpu"}, "device must be auto, cpu, cuda"),
    ({"device": "meta"}, "device must be auto, cpu, cuda"),
    ({"load_format": "magic"}, "load_format must be one of"),
    ({"async_scheduling": "yes"}, "async_scheduling must be True or False"),
    ({"seed": 1.5}, "seed must be an integer"),
    ({"parts": {"sheduler": object}}, "parts must be one of block_manager, attention"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS, ids=[str(values) for values, _ in BAD_CONFIGS])
def test_a_bad_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(random_gpt2(), **values)
    one_line(caught.value)


def test_a_module_that_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model is a Linear: give the name of a model, or a GPT2LMHeadModel") as caught:
        LLM(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    one_line(caught.value)


def test_settings_that_contradict_a_model_object_are_refused() -> None:
    base = random_gpt2(torch.float32)
    for settings, message in (
        ({"dtype": "float64"}, "dtype='float64' was asked for, but the model has 'float32'"),
        ({"num_layers": 9}, "num_layers=9 was asked for, but the model has 2"),
        ({"load_format": "dummy"}, "a model object was given: leave out model and load_format"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(base, **settings)
    assert LLM(base, num_blocks=4, dtype="float32", device=torch.device("cpu:0")).config.device == "cpu"


def test_a_tokenizer_named_beside_a_model_object_is_used(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    base = random_gpt2(vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256)
    for named in (str(tmp_path), tmp_path):
        assert LLM(base, named, num_blocks=8).generate("Hi", GREEDY, use_tqdm=False)[0].prompt_token_ids == tuple(
            byte_tokenizer().encode("Hi")
        )


def test_an_id_that_the_engine_makes_up_is_nobody_elses() -> None:
    engine = LLM(random_gpt2(), num_blocks=8).engine
    names = [engine.add_request([1], GREEDY, name).request_id for name in (None, "request-1", None, None)]
    assert len(set(names)) == 4


def test_without_max_model_len_a_small_pool_limits_the_length() -> None:
    config = PageBrainConfig.for_model(random_gpt2(), num_blocks=2)
    assert config.max_model_len == 32


def test_a_gpu_that_is_not_there_is_said_to_be_missing() -> None:
    if torch.cuda.is_available():
        missing = f"cuda:{torch.cuda.device_count()}"
        message = "does not exist"
    else:
        missing, message = "cuda", "torch finds no CUDA GPU here: use device='cpu'"
    with pytest.raises(ConfigError, match=message):
        PageBrainConfig(device=missing)


def saved_model(folder: Path, tokenizer: bool = True, **settings: Any) -> GPT2LMHeadModel:
    base = random_gpt2(torch.float32, vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256, **settings)
    base.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return base


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        LLM(*args, **settings)
    return one_line(caught.value)


def test_an_unknown_model_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    for tokenizer in ((), (byte_tokenizer(),)):  # the model's own is not to blame
        assert f"there is no model folder {tmp_path}/nowhere" in refused(f"{tmp_path}/nowhere", *tokenizer)
    assert f"there is no tokenizer folder {tmp_path}/nowhere" in refused(None, f"{tmp_path}/nowhere")


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_name_that_the_hub_does_not_know_is_said_to_be_that_of_what_was_named(kind: str) -> None:
    said = refused(**{kind: "nope/none"})
    what = {"model": "the config of", "tokenizer": "the tokenizer of"}[kind]
    assert said.startswith(f"{what} 'nope/none' could not be read: ") and f"{kind}=" not in said
    assert "..." not in said and "offline" not in said, "advice for users of Hugging Face's libraries"


def test_a_folder_without_tokenizer_is_refused_unless_one_is_named(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "model", tokenizer=False)
    assert "holds no tokenizer" in refused(str(tmp_path / "model"))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    llm = LLM(str(tmp_path / "model"), str(tmp_path / "tokenizer"), num_blocks=8)
    assert list(llm.generate("Hi", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == hf_greedy(
        base, byte_tokenizer().encode("Hi"), 4, 256
    )


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"these are no weights")
    assert "weights" in refused(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert "weights" in refused(str(tmp_path))


def test_weights_that_lack_a_layer_are_refused_and_not_made_up(tmp_path: Path) -> None:
    saved_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    assert "missing_keys" in refused(str(tmp_path))


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "could not be read" in refused(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "is a llama model, and PageBrain serves gpt2 models only" in refused(str(tmp_path))


def test_dummy_weights_need_a_known_size() -> None:
    assert "load_format dummy knows gpt2, gpt2-medium" in refused("gpt3", load_format="dummy")


def scheduler_without_schedule(config: Any, cache_manager: Any) -> Any: ...


class SchedulerWithWrongNames:
    def __init__(self, config: Any, blocks: Any) -> None: ...


class SchedulerWithoutFinish:
    waiting: tuple[()] = ()
    running: tuple[()] = ()

    def __init__(self, config: Any, cache_manager: Any) -> None: ...
    def add(self, seq: Any) -> None: ...
    def schedule(self) -> None: ...


class SchedulerThatWantsMore(SchedulerWithoutFinish):
    def finish(self, seq: Any) -> None: ...
    def add(self, seq: Any, priority: int) -> None: ...  # type: ignore[override]


class BlockManagerThatFails(BlockManager):
    def __init__(self, config: Any) -> None:
        self.num_blocks = 1 // 0


class SamplerWithATypo(Sampler):
    supports = frozenset({"look_ahead"})


def attention_in_wrong_order(query: Any, value_pool: Any, key_pool: Any, block_tables: Any, context_lens: Any) -> Any: ...


class BackendThatOnlyWrites:
    def write(self, layer: Any, pool: Any, key: Any, value: Any, batch: Any) -> None: ...


class BackendInWrongOrder(BackendThatOnlyWrites):
    def attend(self, query: Any, layer: Any, pool: Any, batch: Any, scale: Any) -> Any: ...


class BackendThatFails(AttentionBackend):
    def __init__(self) -> None:
        raise RuntimeError("no kernels here")

    def write(self, layer: Any, pool: Any, key: Any, value: Any, batch: Any) -> None: ...
    def attend(self, layer: Any, query: Any, pool: Any, batch: Any, scale: Any) -> Any: ...


BAD_PARTS: list[tuple[str, Any, str]] = [
    ("attention", "nowhere.py:f", "there is no file nowhere.py"),
    ("attention", "nonsense", "must look like path/to/file.py:Name"),
    ("attention", "pagebrain.nowhere:f", "importing pagebrain.nowhere failed"),
    ("attention", "pagebrain.attention:nothing", "defines no 'nothing'"),
    ("attention", 5, "cannot be called: name a function or an attention backend"),
    ("attention", attention_in_wrong_order, "calls argument 2 'value_pool' where 'key_pool' is expected"),
    ("attention", lambda query, key_pool, value_pool: None, "lacks argument 4, 'block_tables'"),
    ("attention", BackendThatOnlyWrites, r"has no method attend\(layer, query, pool, batch, scale\)"),
    ("attention", BackendInWrongOrder, "attend calls argument 1 'query' where 'layer' is expected"),
    ("attention", BackendThatFails, "BackendThatFails could not be made: RuntimeError: no kernels here"),
    ("scheduler", SchedulerWithWrongNames, "calls argument 2 'blocks' where 'cache_manager' is expected"),
    ("scheduler", SchedulerWithoutFinish, r"has no method finish\(self, seq"),
    ("scheduler", SchedulerThatWantsMore, "add wants an argument 'priority' that the engine does not give"),
    ("scheduler", scheduler_without_schedule, "is no class: name one"),
    ("sampler", SchedulerWithoutFinish, "wants an argument"),
    ("block_manager", dict, "block_manager dict"),
    ("block_manager", BlockManagerThatFails, "could not be made: ZeroDivisionError"),
    ("sampler", SamplerWithATypo, "supports .*'look_ahead'"),
]


@pytest.mark.parametrize(
    ("part", "named", "message"), BAD_PARTS, ids=[f"{part}-{message[:24]}" for part, _, message in BAD_PARTS]
)
def test_a_part_that_does_not_exist_or_fit_is_refused_at_start(part: str, named: Any, message: str) -> None:
    with pytest.raises(PartError, match=message) as caught:
        LLM(random_gpt2(), num_blocks=8, parts={part: named})
    one_line(caught.value)


def test_a_part_whose_file_fails_to_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(PartError, match="ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        LLM(random_gpt2(), parts={"scheduler": f"{tmp_path}/mine.py:Scheduler"})
