"""Checkpoints as people have them: what Hugging Face serves is served, and all else gets one line that says what it is."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerBase

from pagebrain import LLM, SamplingParams, generation_config
from pagebrain.bench.workload import model_limits
from pagebrain.cli import main
from pagebrain.config import PageBrainConfig
from pagebrain.errors import InvalidRequestError, ModelLoadError
from pagebrain.model_config import READERS
from pagebrain.models.loading import load_model, load_text, load_tokenizer, read_config
from pagebrain.models.registry import ARCHITECTURES
from pagebrain.server.api.templates import own_template
from tests.support.models import hf_greedy, random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer, with_post_processor, word_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = [5, 7, 9]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"

ModelFolder = Callable[[], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    random_gpt2(torch.float32, vocab_size=VOCAB_SIZE, eos_token_id=256, bos_token_id=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A whole checkpoint, which a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def greedy(saved: Path) -> list[int]:
    """What Hugging Face generates with no end token."""
    return hf_greedy(GPT2LMHeadModel.from_pretrained(saved, attn_implementation="eager").eval(), PROMPT, 6)


def edit(path: Path, **settings: Any) -> None:
    """Change settings in a JSON file; ``...`` takes one out."""
    changed = (json.loads(path.read_text()) if path.exists() else {}) | settings
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


def generated(llm: LLM, prompt: Any = PROMPT) -> list[int]:
    return list(llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        LLM(*args, num_blocks=8, **settings)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# End tokens and other settings of generating --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (256, [256, "N"], "N"),
        (None, "N", "N"),
        ("N", None, "N"),
        ("N", 256, "N"),
        ([256, "N"], 256, "N"),
        ([256, None, "N"], [None], "N"),
        (256, [[256, "N"]], "N"),
        ("N", ..., "N"),
        (256, None, None),
        (None, None, None),
    ],
)
def test_a_text_ends_at_each_end_token_that_either_file_names(
    config: Any, generation: Any, expected: Any, folder: Path, greedy: list[int]
) -> None:
    end = greedy[1]
    assert end != greedy[0]

    def meant(value: Any) -> Any:
        return [meant(item) for item in value] if isinstance(value, list) else end if value == "N" else value

    edit(folder / "config.json", eos_token_id=meant(config))
    if generation is ...:
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=meant(generation))
    llm = LLM(folder, num_blocks=8)
    assert generated(llm) == (greedy[:2] if expected else greedy) and llm.notices == ()


def test_a_float_that_is_whole_is_an_end_token_as_in_hugging_face(folder: Path, greedy: list[int]) -> None:
    edit(folder / "generation_config.json", eos_token_id=float(greedy[1]))
    assert generated(LLM(folder, num_blocks=8)) == greedy[:2]


def test_the_generation_config_of_a_model_object_names_end_tokens_too(greedy: list[int], saved: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(saved, attn_implementation="eager").eval()
    base.generation_config.eos_token_id = [greedy[1], 256]
    assert generated(LLM(base, num_blocks=8)) == greedy[:2]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["5", True, VOCAB_SIZE, -1, 5.5])
def test_what_is_no_end_token_is_left_out_with_a_notice(file: str, value: Any, folder: Path, greedy: list[int]) -> None:
    edit(folder / file, eos_token_id=[value, greedy[1]])
    llm = LLM(folder, num_blocks=8)
    assert generated(llm) == greedy[:2]
    assert llm.notices == (f"end tokens of the model that are no ids from 0 to 256 are left out: {value!r}",)
    edit(folder / file, eos_token_id=value)
    assert generated(LLM(folder, num_blocks=8)) == greedy


def test_settings_of_generating_that_do_not_apply_are_named_in_one_notice(folder: Path) -> None:
    edit(folder / "generation_config.json", do_sample=True, temperature=0.7, max_new_tokens=9, stop_strings=["x"])
    edit(folder / "generation_config.json", suppress_tokens=[3], forced_eos_token_id=256, no_repeat_ngram_size=2)
    assert LLM(folder, num_blocks=8).notices == (
        "the model's generation settings do not apply by themselves: a request has to ask for temperature=0.7, "
        "max_new_tokens=9 (as max_tokens), stop_strings=['x'] (as stop), suppress_tokens=[3] (as logit_bias of -100); "
        "forced_eos_token_id, no_repeat_ngram_size are not supported",
    )


def test_settings_that_ask_for_nothing_get_no_notice(folder: Path) -> None:
    idle = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None}
    edit(folder / "generation_config.json", do_sample=True, pad_token_id=256, use_cache=True, max_length=20, **idle)
    assert LLM(folder, num_blocks=8).notices == ()


def test_without_a_generation_config_the_settings_in_the_config_are_named(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", repetition_penalty=1.3, do_sample=False)
    [line] = LLM(folder, num_blocks=8).notices
    assert line.endswith("a request has to ask for do_sample=False (as temperature 0), repetition_penalty=1.3")


@pytest.mark.parametrize("text", ["{", "[1]", "", LFS_POINTER])
def test_a_generation_config_that_cannot_be_read_is_told_and_the_config_counts(
    text: str, folder: Path, greedy: list[int]
) -> None:
    edit(folder / "config.json", eos_token_id=greedy[1])
    (folder / "generation_config.json").write_text(text)
    llm = LLM(folder, num_blocks=8)
    [line] = llm.notices
    assert f"{folder}/generation_config.json" in line and line.endswith("settings of config.json are used instead")
    assert generated(llm) == greedy[:2]


def test_settings_that_hugging_face_refuses_are_left_out_but_for_the_end_token(folder: Path, greedy: list[int]) -> None:
    edit(folder / "generation_config.json", max_new_tokens=0, eos_token_id=greedy[1])
    llm = LLM(folder, num_blocks=8)
    [line] = llm.notices
    assert line.startswith("the model's generation settings are left out, except its end tokens: ")
    assert generated(llm) == greedy[:2]


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_rows_is_served_and_only_an_id_without_a_row_is_refused(
    folder: Path, greedy: list[int]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    llm = LLM(folder, num_blocks=8)
    assert llm.notices == (
        "the tokenizer has ids up to 257, and the model's embeddings have 257 rows: a prompt that holds 257 is refused",
    )
    assert generated(llm, "Hi") == generated(llm, byte_tokenizer().encode("Hi"))
    with pytest.raises(
        InvalidRequestError, match="prompt token 1 is 257, but ids run from 0 to 256: the tokenizer has more"
    ):
        generated(llm, "H<pad>")


def test_embeddings_with_more_rows_than_the_tokenizer_has_tokens_are_served(folder: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(folder)
    base.resize_token_embeddings(320, mean_resizing=False)
    base.transformer.wte.weight.data[300] = 10 * base.transformer.wte.weight.data[:257].abs().mean(0)
    base.save_pretrained(folder)
    llm = LLM(folder, num_blocks=8)
    assert llm.notices == (
        "the model's embeddings have 320 rows, and the tokenizer has ids up to 256: ids above that have no text",
    )
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={300: 100.0})
    output = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == (300, 300, 300) and output.text == ""


@pytest.mark.parametrize("single", ["<|endoftext|> $A", "$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"])
def test_a_text_gets_the_ids_that_hugging_faces_tokenizer_gives_it(single: str, folder: Path) -> None:
    with_post_processor(single).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = LLM(folder, num_blocks=8)
    for text in ("Once", "", "a <|endoftext|> b"):
        ids = tokenizer(text).input_ids
        assert ids != byte_tokenizer()(text).input_ids
        [output] = llm.generate(text, GREEDY, use_tqdm=False)
        assert output.prompt == text and list(output.prompt_token_ids) == ids
        assert output.outputs == llm.generate([ids], GREEDY, use_tqdm=False)[0].outputs
        [*_, last] = llm.stream(text, GREEDY)
        assert last.finished is not None and last.finished.prompt_token_ids == tuple(ids)
        assert list(llm.engine.add_request(text, GREEDY, "mine").prompt_token_ids) == ids and llm.engine.abort("mine")
    num_added = single.count("<|")
    with pytest.raises(InvalidRequestError, match="has 64 tokens, but at most 63"):
        llm.generate("x" * (64 - num_added), GREEDY, use_tqdm=False)
    longest = llm.generate("x" * (63 - num_added), SamplingParams(prompt_logprobs=0), use_tqdm=False)[0]
    assert longest.prompt_logprobs is not None and len(longest.prompt_logprobs) == 63


def test_a_tokenizers_saved_truncation_and_padding_do_not_change_a_prompt(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(folder)
    assert len(LLM(folder, num_blocks=8).generate("Once", GREEDY, use_tqdm=False)[0].prompt_token_ids) == 4


def slow_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    (folder / "tokenizer.json").unlink()


def bert_tokenizer(folder: Path) -> None:
    slow_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "once"]))


def sentencepiece_tokenizer(folder: Path) -> None:
    slow_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (folder / "spiece.model").write_bytes(b"no model at all")


OTHER_TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "words": (lambda folder: word_tokenizer().save_pretrained(folder), "it has the decoder WordPiece"),
    "a vocab.txt": (bert_tokenizer, "it has the decoder WordPiece"),
    "slow only": (slow_tokenizer, "ByT5Tokenizer is not a fast byte-level tokenizer"),
    "a library is missing": (sentencepiece_tokenizer, "the tokenizer of {folder!r} could not be read: "),
}


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_a_model_with_another_kind_of_tokenizer_is_served_with_token_ids(kind: str, folder: Path, greedy: list[int]) -> None:
    change, reason = OTHER_TOKENIZERS[kind]
    change(folder)
    llm = LLM(folder, num_blocks=8)
    [line] = llm.notices
    assert line.startswith("text is off, and token ids are served: ") and reason.format(folder=str(folder)) in line
    assert generated(llm) == greedy and llm.tokenizer is None
    for prompt, params in (("once", GREEDY), (PROMPT, SamplingParams(stop="x"))):
        with pytest.raises(InvalidRequestError, match="has no tokenizer that PageBrain makes text with"):
            llm.generate([prompt], params, use_tqdm=False)


def test_a_tokenizer_object_of_another_kind_is_told_too(saved: Path) -> None:
    [line] = LLM(saved, word_tokenizer(), num_blocks=8).notices
    assert line.startswith("text is off, and token ids are served: ")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", LFS_POINTER])
def test_a_damaged_tokenizer_is_refused_and_not_passed_over(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    assert refused(folder).startswith(f"{folder}/{file} ")


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer"])
def test_settings_of_a_tokenizer_without_its_vocabulary_are_no_tokenizer(name: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    assert "holds no tokenizer" in refused(folder)


def template_of(folder: Path) -> tuple[str | None, str | None]:
    tokenizer: PreTrainedTokenizerBase | None = load_text(PageBrainConfig(model=str(folder)))[0]
    assert tokenizer is not None
    return own_template(tokenizer)


def test_the_chat_template_is_found_in_each_of_its_places(folder: Path) -> None:
    assert template_of(folder) == (None, None)
    named = [{"name": "rag", "template": "r"}, {"name": "tools", "template": "t"}]
    edit(folder / "tokenizer_config.json", chat_template=[*named, {"name": "default", "template": "d"}])
    assert template_of(folder) == ("d", None)
    edit(folder / "tokenizer_config.json", chat_template=named)
    why = "the tokenizer has several chat templates (rag, tools), and none is called 'default'"
    assert template_of(folder) == (None, why)
    edit(folder / "tokenizer_config.json", chat_template="one")
    assert template_of(folder) == ("one", None)
    edit(folder / "tokenizer_config.json", chat_template=...)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert template_of(folder)[0] is None
    (folder / "chat_template.jinja").write_text("a file")
    assert template_of(folder) == ("a file", None)
    (folder / "chat_template.jinja").write_text("a\n{% for")
    template, why_not = template_of(folder)
    assert template is None and why_not is not None and why_not.startswith("the tokenizer's chat template is no Jinja ")
    assert "line 2: " in why_not


# Folders --------------------------------------------------------------------------------------------------------------


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def adapter(folder: Path) -> None:
    remove(folder, "config.json", "model.safetensors")
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="openai-community/gpt2")


def adapter_beside_a_model(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="openai-community/gpt2")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def checkpoints(folder: Path) -> None:
    inner = folder.parent / "inner"
    shutil.move(folder, inner)
    folder.mkdir()
    for step in (500, 1000):
        shutil.copytree(inner, folder / f"checkpoint-{step}")


def config_folder(folder: Path) -> None:
    remove(folder, "config.json")
    (folder / "config.json").mkdir()


def resized(folder: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(folder)
    base.resize_token_embeddings(259, mean_resizing=False)
    old = (folder / "config.json").read_text()
    base.save_pretrained(folder)
    (folder / "config.json").write_text(old)


def sharded(folder: Path) -> None:
    base = GPT2LMHeadModel.from_pretrained(folder)
    remove(folder, "model.safetensors")
    base.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def shard_missing(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def shard_cut(folder: Path) -> None:
    sharded(folder)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def shards_without_index(folder: Path) -> None:
    sharded(folder)
    remove(folder, "model.safetensors.index.json")


def weights_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def only_bin(folder: Path, states: Any = None) -> None:
    base = GPT2LMHeadModel.from_pretrained(folder)
    remove(folder, "model.safetensors")
    torch.save(base.state_dict() if states is None else states, folder / "pytorch_model.bin")


def training_state(folder: Path) -> None:
    only_bin(folder, {"model": GPT2LMHeadModel.from_pretrained(folder).state_dict(), "step": 3})


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def compiled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"_orig_mod.{name}": value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def other_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.pt")


def configured(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **settings)


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (adapter, "the folder {0} holds an adapter for 'openai-community/gpt2', .* merge the two"),
    "an adapter beside a model": (adapter_beside_a_model, "the folder {0} holds an adapter for 'openai-community/gpt2'"),
    "an empty folder": (empty, "the folder {0} is empty: name a folder made with save_pretrained"),
    "checkpoints inside": (checkpoints, "no config.json, but checkpoint-1000, checkpoint-500 in it: name one of them"),
    "no config": (lambda folder: remove(folder, "config.json"), "the folder {0} has no config.json, it holds "),
    "broken config": (config_text("{"), "{0}/config.json could not be read: it is no JSON .*line 1, column 2"),
    "config is a list": (config_text("[1]"), "{0}/config.json must hold a JSON object, got list"),
    "config is empty": (config_text(""), "{0}/config.json could not be read: it is no JSON"),
    "config is a pointer": (config_text(LFS_POINTER), "{0}/config.json is a pointer of Git LFS.*run 'git lfs pull'"),
    "config is a folder": (config_folder, "{0}/config.json cannot be read: Is a directory"),
    "another architecture": (
        configured(model_type="llama"),
        "'{0}' is a llama model, and .* serves gpt2 models only",
    ),
    "a kind that is a list": (
        configured(model_type=["gpt2"]),
        r"'{0}' is a \['gpt2'\] model, and .* serves gpt2 models only",
    ),
    "unknown architecture": (configured(model_type="mega"), "'{0}' is a mega model, and PageBrain serves gpt2 models only"),
    "another architecture by its class": (
        configured(model_type=..., architectures=["LlamaForCausalLM"]),
        "'{0}' is a LlamaForCausalLM model, and PageBrain serves gpt2 models only",
    ),
    "cross-attention": (configured(add_cross_attention=True), "'{0}' has cross-attention layers"),
    "quantized": (configured(quantization_config={"quant_method": "gptq"}), "'{0}' is quantized, which PageBrain does not"),
    "no heads": (configured(n_head=0), "'{0}' says n_head=0, expected at least 1"),
    "odd heads": (configured(n_head=5), "'{0}' says n_embd=48, expected a multiple of n_head=5"),
    "a size that is a string": (configured(n_layer="2"), "'{0}' could not be read: Field 'n_layer' expected int, got str"),
    "unknown activation": (configured(activation_function="gelo"), "says activation_function='gelo', which is unknown"),
    "resized embeddings": (
        resized,
        r"transformer.wte.weight is \[259, 48\] in the weights and \[257, 48\] by config.json: set vocab_size to 259 in",
    ),
    "fewer positions": (
        configured(n_positions=32),
        r"transformer.wpe.weight is \[64, 48\] in the weights and \[32, 48\] by config.json: set n_positions to 64 in",
    ),
    "more positions": (configured(n_positions=128), "transformer.wpe.weight .*: set n_positions to 64 in config.json"),
    "another width": (configured(n_embd=24), r"\(and \d+ more do not fit\): correct config.json"),
    "a layer too many": (configured(n_layer=3), r"missing_keys \['transformer.h.2.* \(12 in all\): correct config.json"),
    "no head": (configured(tie_word_embeddings=False), "'lm_head.weight'.* set tie_word_embeddings to true"),
    "no weights": (lambda folder: remove(folder, "model.safetensors"), "the folder {0} has no weights .none of model.safet"),
    "weights of another name": (other_file, "the folder {0} has no weights"),
    "weights are a pointer": (
        lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER),
        "{0}/model.safetensors is a pointer of Git LFS",
    ),
    "weights cut short": (weights_cut, "{0}/model.safetensors .* is cut short or no safetensors file .*download it again"),
    "weights are empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"\(0 bytes\) is cut short or no"),
    "a shard is missing": (shard_missing, "{0}/model.safetensors.index.json names .* missing: model-00002-of"),
    "a shard is cut short": (shard_cut, "{0}/model-00002-of-.* is cut short"),
    "shards without their index": (shards_without_index, "the folder {0} has no weights"),
    "a training state": (training_state, "missing_keys .*; the weights hold model, step instead"),
    "names of a compiled model": (compiled, "missing_keys .*; the weights hold _orig_mod.transformer.*instead"),
    "code in a pickle": (lambda folder: only_bin(folder, [RunsCode()]), "reading it could run code in it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_no_model_gets_one_line_that_says_what_it_is(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(ModelLoadError, match=words.format(folder)) as caught:
        LLM(folder, num_blocks=8)
    assert "\n" not in str(caught.value) and "above report" not in str(caught.value)
    assert not Path("ran").exists()


SERVED: dict[str, Callable[[Path], object]] = {
    "no model_type": configured(model_type=...),
    "neither model_type nor architectures": configured(model_type=..., architectures=...),
    "a pytorch_model.bin only": only_bin,
    "shards": sharded,
    "saved without the head's prefix": lambda folder: GPT2LMHeadModel.from_pretrained(folder).transformer.save_pretrained(
        folder
    ),
    "no generation config": lambda folder: remove(folder, "generation_config.json"),
    "no architectures": configured(architectures=...),
}


@pytest.mark.parametrize("kind", SERVED)
def test_what_hugging_face_serves_is_served_without_a_word(kind: str, folder: Path, greedy: list[int]) -> None:
    SERVED[kind](folder)
    edit(folder / "config.json", eos_token_id=None)
    llm = LLM(folder, num_blocks=8)
    assert generated(llm) == greedy and llm.notices == ()
    assert model_limits(PageBrainConfig(model=str(folder))) == (VOCAB_SIZE, 64)


def test_weights_beyond_the_config_are_left_out_with_a_notice(folder: Path, greedy: list[int]) -> None:
    GPT2ForSequenceClassification.from_pretrained(folder, pad_token_id=1).save_pretrained(folder)
    llm = LLM(folder, num_blocks=8)
    assert llm.notices == (f"tensors of '{folder}' that its config does not name are left out: score.weight (1 in all)",)
    assert generated(llm) == greedy


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "pytorch_model.bin", "model.pt", "config.json"])
def test_the_path_of_a_file_is_told_from_that_of_a_folder(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"there is no model folder {name}: check the path" in refused(name)
    (folder / name).touch()
    advice = "does not read GGUF" if name.endswith(".gguf") else f"name its folder, {folder}"
    assert f"{folder}/{name} is a file, and a model is a folder: " in refused(folder / name)
    assert advice in refused(folder / name)
    monkeypatch.chdir(folder)
    assert f"{name} is a file, and a model is a folder: " in refused(name)
    assert f"{name} is a file, and a tokenizer is a folder: " in refused(None, name)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read_is_said_to_be_so(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played, since root may read everything."""
    denied = folder / name

    def deny(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if Path(path) == denied:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "listdir", deny(os.listdir))
    monkeypatch.setattr(Path, "open", deny(Path.open))
    assert f"{denied} cannot be read: Permission denied; check" in refused(folder)


# Code of a checkpoint's own -------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(r"{ran}").touch()
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
class Config(GPT2Config):
    model_type = "{model_type}"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(GPT2Tokenizer):
    pass
"""


def with_code(folder: Path, model_type: str) -> Path:
    """Give a checkpoint code that Hugging Face would run if it were told to, or if its question were answered with yes."""
    ran = folder.parent / "ran"
    (folder / "mine.py").write_text(CODE.format(ran=ran, model_type=model_type))
    models = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Tokenizer", None]}
    edit(folder / "config.json", model_type=model_type, auto_map=models)
    edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=models)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "mine.py", folder / "custom_generate" / "generate.py")
    return ran


@pytest.mark.parametrize(
    "command", [["generate", "Once"], ["bench", "offline", "--requests", "1", "--input-len", "4", "--output-len", "4"]]
)
def test_code_of_a_checkpoints_own_is_neither_run_nor_asked_about(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = with_code(folder, "mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    assert main([*command, "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert f"'{folder}' is a mine model with code of its own (auto_map), which PageBrain never runs" in line
    assert out == "" and not ran.exists()


@pytest.mark.parametrize("asked_by", ["the model", "the tokenizer's settings", "the config beside the tokenizer"])
def test_no_loader_runs_code_of_a_checkpoints_own(asked_by: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = with_code(folder, "mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    config = PageBrainConfig(model=str(folder)) if asked_by == "the model" else PageBrainConfig(tokenizer=str(folder))
    if asked_by == "the config beside the tokenizer":
        edit(folder / "tokenizer_config.json", tokenizer_class=..., auto_map=...)
    elif asked_by == "the tokenizer's settings":
        (folder / "tokenizer.json").rename(folder / "vocab.json")
    for load in (load_tokenizer, load_model, read_config)[: 3 if asked_by == "the model" else 1]:
        with contextlib.suppress(ModelLoadError):
            load(config)
    assert not ran.exists()


def test_a_gpt2_that_names_code_of_its_own_is_served_without_it(folder: Path, greedy: list[int]) -> None:
    ran = with_code(folder, "gpt2")
    llm = LLM(folder, num_blocks=8)
    assert llm.notices == (
        f"'{folder}' names code of its own (auto_map), which is never run: Hugging Face's own classes are used",
    )
    assert generated(llm) == greedy and generated(llm, "Hi") and not ran.exists()


# What the documentation says ------------------------------------------------------------------------------------------


def test_the_documented_table_has_a_row_for_each_setting_of_generating() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, (field, _) in generation_config._IN_REQUESTS.items():
        [row] = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert "a notice" in row and f"`{field.split()[0]}`" in row.split("|")[3]
    for name in generation_config._UNSUPPORTED:
        [row] = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert "a notice: not supported" in row


def plain(saved: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(saved, attn_implementation="eager").eval()


def test_a_model_of_ones_own_is_an_entry_in_two_tables(saved: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in docs/engine.md: a GPT-2 with ReLU, whatever its config says."""
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    code = page.partition("# model_config.py\n")[2].partition("```")[0]
    edit(folder / "config.json", model_type="relu_gpt2", architectures=["ReluGPT2"])
    assert "is a relu_gpt2 model, and PageBrain serves gpt2 models only" in refused(str(folder))
    for table in (READERS, ARCHITECTURES):
        monkeypatch.setitem(table, "relu_gpt2" if table is READERS else "ReluGPT2", None)  # so that it is gone afterwards
    tables = {"READERS": READERS, "ARCHITECTURES": ARCHITECTURES}
    exec(code, tables | {"replace": dataclasses.replace, "_from_gpt2": READERS["gpt2"]})
    with_relu = GPT2LMHeadModel.from_pretrained(saved, activation_function="relu", attn_implementation="eager").eval()
    # Greedy tokens of a random model seldom tell one activation from another: the log-probabilities do.
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    output = LLM(str(folder), num_blocks=8).generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None
    scores = [
        model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max().item() for model in (with_relu, plain(saved))
    ]
    assert output.logprobs[0].logprob == pytest.approx(scores[0], abs=1e-5) != pytest.approx(scores[1], abs=1e-5)
    assert "is a relu_gpt2 model, whose weights are read from safetensors" in refused(str(folder), load_format="dummy")


def test_an_architecture_that_is_not_gpt2s_is_told(folder: Path) -> None:
    edit(folder / "config.json", architectures=["ParallelLMHeadModel"])
    notices = LLM(str(folder), num_blocks=8).notices
    assert any("names the architectures ['ParallelLMHeadModel'] and is served as GPT-2" in notice for notice in notices)
