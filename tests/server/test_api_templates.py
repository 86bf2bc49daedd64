"""Chat templates: whose fault it is when one fails, the client's messages' or the server's own."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from pagebrain.cli.serve import server_settings
from pagebrain.errors import ConfigError
from pagebrain.server.api.prompts import PromptReader
from tests.server.support_in_process import ServerThread

MESSAGES = [{"role": "user", "content": "Hi"}]


def _read(path: Path, text: str) -> Any:
    path.write_text(text)
    return server_settings(Namespace(chat_template=str(path)), None)["chat_template"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("{% for message in messages %}\n{{ message.content }", 2, "unexpected '}'"),
        ("fine\n\n{% if messages %}never ended", 3, "endif"),
        ("{{ messages | no_such_filter }}", 1, "no_such_filter"),
        ("{% nothing %}", 1, "nothing"),
    ],
)
def test_a_template_that_is_none_is_found_before_the_server_starts(text: str, line: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--chat-template .*template.jinja is no Jinja template: line {line}: .*{words}"):
        _read(tmp_path / "template.jinja", text)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_template_is_found_before_the_server_starts(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--chat-template .*template.jinja is empty: name a file"):
        _read(tmp_path / "template.jinja", text)


def test_what_hugging_faces_templates_may_use_is_taken(tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% generation %}{{ m | tojson }}"
        "{% endgeneration %}{{ strftime_now('%Y') }}{% set ns = namespace(x=1) %}{% break %}{% endfor %}"
    )
    assert _read(tmp_path / "template.jinja", text) == text


@pytest.mark.parametrize(
    ("template", "status", "words"),
    [
        ("{{ raise_exception('no users here') }}", 400, "no users here"),
        ("{{ messages[1].content }}", 400, "no element 1"),
        ("{{ messages[0].tool.name }}", 400, "tool"),
        ("{{ nowhere.content }}", 500, "its log says where"),
        ("{{ messages | no_such_filter }}", 500, "its log says where"),
        ("{{ messages.__class__.__mro__ }}", 500, "its log says where"),
        ("{{ 1 + messages[0].content }}", 500, "its log says where"),
        ("{% for", 500, "its log says where"),
    ],
)
def test_only_what_is_about_the_messages_is_a_clients_mistake(
    template: str,
    status: int,
    words: str,
    api: ServerThread,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(PromptReader, "_chat_template", property(lambda _: template), raising=False)
    for path in ("/v1/chat/completions", "/tokenize"):
        caplog.clear()
        answer = api.post(path, {"messages": MESSAGES})
        error = answer.json()["error"]
        assert answer.status_code == status and words in error["message"], error
        assert error["param"] == ("messages" if status == 400 else None)
        records = [record for record in caplog.records if record.levelno >= logging.ERROR]
        if status == 400:
            assert records == []
        else:  # one line, which names the line of the template and quotes nothing
            (record,) = records
            assert record.message.startswith("the chat template failed with ") and "\n" not in record.message
            assert "Hi" not in record.message and record.exc_info is None
            assert record.message.endswith("Error in its line 1")
