"""Tokenizers that put tokens around a text, that make no text, or whose chat templates cannot be used, behind the API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pagebrain import LLM, SamplingParams
from tests.server.support_in_process import ServerThread
from tests.support.models import random_gpt2
from tests.support.served import Served
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer, with_post_processor, word_tokenizer

TEMPLATE = "<|endoftext|>{% for message in messages %}{{ message.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}]
END = 256


def _llm(tokenizer: PreTrainedTokenizerFast) -> LLM:
    base = random_gpt2(vocab_size=VOCAB_SIZE, eos_token_id=END, bos_token_id=END, n_positions=64)
    return LLM(base, tokenizer, num_blocks=32, block_size=4)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """Its tokenizer puts the end token before and after each text; it has a chat template."""
    tokenizer = with_post_processor("<|endoftext|> $A <|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    with ServerThread(_llm(tokenizer)) as server:
        yield server


def _ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text).input_ids)


def _scored(server: ServerThread, **fields: Any) -> list[dict[str, Any]]:
    body = {"echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0, "ignore_eos": True} | fields
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def test_a_texts_prompt_is_what_hugging_faces_tokenizer_makes_of_it(server: ServerThread) -> None:
    offline = _llm(with_post_processor("<|endoftext|> $A <|endoftext|>"))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    texts = ["Once", "", "a <|endoftext|> b"]
    outputs = offline.generate(texts, params, use_tqdm=False)
    answer = server.post("/v1/completions", {"prompt": texts, "max_tokens": 5, "temperature": 0, "ignore_eos": True}).json()
    assert [choice["text"] for choice in answer["choices"]] == [output.outputs[0].text for output in outputs]
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)
    for text, output in zip(texts, outputs, strict=True):
        ids = [END, *_ids(text), END]
        assert list(output.prompt_token_ids) == ids
        assert server.post("/tokenize", {"prompt": text}).json()["tokens"] == ids
        assert server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"] == _ids(text)
        body = {"prompt": text, "max_tokens": 1, "echo": True}
        assert server.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == len(ids)
        ids_body = {"prompt": ids, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        assert server.post("/v1/completions", ids_body).json()["choices"][0]["text"] == output.outputs[0].text


def test_add_special_tokens_leaves_them_out_of_a_completion(server: ServerThread) -> None:
    for text, num_tokens in (("Once", 4), ("a <|endoftext|> b", 5)):
        body = {"prompt": text, "max_tokens": 1, "add_special_tokens": False}
        for fields, expected in (
            ({}, num_tokens),
            ({"prompt": [text] * 2}, 2 * num_tokens),
            ({"add_special_tokens": None}, num_tokens + 2),
        ):
            assert server.post("/v1/completions", body | fields).json()["usage"]["prompt_tokens"] == expected
    error = server.post("/v1/completions", {"prompt": "", "add_special_tokens": False}).json()["error"]
    assert error["param"] == "prompt" and "non-empty" in error["message"]


def test_a_chat_gets_what_its_template_writes_unless_more_is_asked_for(server: ServerThread) -> None:
    chat = [END, *_ids("Hi")]
    added = [END, *chat, END]
    for fields, ids in (({}, chat), ({"add_special_tokens": False}, chat), ({"add_special_tokens": True}, added)):
        assert server.post("/tokenize", {"messages": MESSAGES} | fields).json()["tokens"] == ids
        answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1} | fields).json()
        assert answer["usage"]["prompt_tokens"] == len(ids)


def test_the_small_api_puts_them_around_a_text_too(server: ServerThread) -> None:
    events = server.post("/generate", {"prompt": "", "max_new_tokens": 3}).text
    params = SamplingParams(temperature=0, max_tokens=3)
    [output] = _llm(byte_tokenizer()).generate([[END, END]], params, use_tqdm=False)
    tokens = [json.loads(line.removeprefix("data: ")) for line in events.split("\n\n") if '"token"' in line]
    assert tuple(token for event in tokens for token in event["token_ids"]) == output.outputs[0].token_ids


def test_tokens_that_are_not_in_the_text_take_no_room_in_it(server: ServerThread) -> None:
    [choice] = _scored(server, prompt="Oé")
    assert choice["text"].startswith("Oé")
    assert choice["logprobs"]["tokens"][0] == choice["logprobs"]["tokens"][4] == "<|endoftext|>"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2] and choice["logprobs"]["token_logprobs"][0] is None
    typed = len("a <|endoftext|>")
    [choice] = _scored(server, prompt="a <|endoftext|>", add_special_tokens=False)
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, typed]
    [choice] = _scored(server, prompt=[END, 5])  # the text of token ids is that of all of them
    assert choice["logprobs"]["text_offset"][:2] == [0, len("<|endoftext|>")]


def test_added_tokens_count_where_a_prompt_must_fit(server: ServerThread) -> None:
    assert server.post("/v1/completions", {"prompt": "x" * 61, "max_tokens": 1}).status_code == 200
    error = server.post("/v1/completions", {"prompt": "x" * 62, "max_tokens": 1}).json()["error"]
    assert "the prompt has 64 tokens, but at most 63" in error["message"] and error["param"] == "prompt"
    assert server.post("/v1/completions", {"prompt": "x" * 62, "add_special_tokens": False}).status_code == 200


def test_a_tokenizers_token_without_a_row_is_tokenized_and_refused_in_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with ServerThread(_llm(tokenizer)) as server:
        assert server.post("/tokenize", {"prompt": "a<pad>"}).json()["tokens"] == [*_ids("a"), 257]
        assert server.post("/detokenize", {"tokens": [*_ids("a"), 257]}).json() == {"prompt": "a<pad>"}
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200
        error = server.post("/v1/completions", {"prompt": "a<pad>"}).json()["error"]
        assert "prompt token 1 is 257, but ids run from 0 to 256" in error["message"] and error["param"] == "prompt"


def test_a_model_whose_tokenizer_makes_no_text_is_served_with_token_ids() -> None:
    with ServerThread(_llm(word_tokenizer())) as server:
        params = SamplingParams(temperature=0, max_tokens=4)
        [output] = _llm(byte_tokenizer()).generate([[1, 2]], params, use_tqdm=False)
        body = {"prompt": [1, 2], "max_tokens": 4, "temperature": 0, "logprobs": 0}
        [choice] = server.post("/v1/completions", body).json()["choices"]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in output.outputs[0].token_ids]
        for path, fields in (
            ("/v1/completions", {"prompt": "once"}),
            ("/v1/completions", {"prompt": [1], "stop": "x"}),
            ("/v1/chat/completions", {"messages": MESSAGES}),
            ("/tokenize", {"prompt": "once"}),
            ("/tokenize", {"messages": MESSAGES}),
            ("/detokenize", {"tokens": [1]}),
            ("/generate", {"prompt": "once"}),
        ):
            answer = server.post(path, fields)
            assert answer.status_code == 400, path
            assert "the model has no tokenizer that PageBrain makes text with" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": "r", "tools": "t"}, "several chat templates (rag, tools), and none is called 'default'"),
        ("{{ messages\n{% for", "chat template is no Jinja template: line 2: "),
        (None, "the model has no chat template"),
        ({}, "the model has no chat template"),
    ],
)
def test_a_chat_without_a_template_to_use_says_why(template: Any, words: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    llm = _llm(tokenizer)
    with ServerThread(llm) as server:
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = server.post(path, {"messages": MESSAGES})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == "messages" and words in error["message"]
            assert error["message"].endswith(": use /v1/completions, or start the server with --chat-template")
    with ServerThread(llm, chat_template="mine: {{ messages[0].content }}") as server:
        assert server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == _ids("mine: Hi")


def test_of_several_named_templates_chats_go_through_the_default(server: ServerThread) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "d {{ messages[0].content }}", "tool_use": "t"}
    with ServerThread(_llm(tokenizer)) as server:
        assert server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == _ids("d Hi")


def test_a_server_says_at_its_start_what_of_a_checkpoint_does_not_apply(tmp_path: Path) -> None:
    random_gpt2(torch.float32, vocab_size=VOCAB_SIZE, eos_token_id=END, bos_token_id=END).save_pretrained(tmp_path)
    tokenizer = with_post_processor("<|endoftext|> $A")
    tokenizer.chat_template = {"rag": "r", "tools": "t"}
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"top_k": 3, "do_sample": True}))
    with Served("--model", str(tmp_path), "--num-blocks", "16") as served:
        said = "\n".join(served.lines)
        settings_line = "the model's generation settings do not apply by themselves: a request has to ask for top_k=3"
        assert f"pagebrain: {settings_line}" in said
        why = "the tokenizer has several chat templates (rag, tools), and none is called 'default'"
        assert f"pagebrain: chats are refused: {why}; name a template with --chat-template" in said
        assert served.post("/tokenize", {"prompt": "Hi"}).json()["tokens"] == [END, *_ids("Hi")]
