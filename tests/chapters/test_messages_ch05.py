"""What a learner reads first about a mistake names its cause. These mistakes were made by readers of the chapters."""

from pathlib import Path

import pytest

from chapters.course.catalog import find_chapter
from tests.support.judging import judge

CLIENT_05 = """\
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
"""
"""Lines of chapter 05's ``stream`` that the mistakes share."""

LEAVES_05 = """\
        finally:
            self.departed.append(client)
            self.note.set()
"""

MISTAKES = {
    "looks_at_num_tokens": (
        "5.2",
        "            if not entry.samples:\n",
        "            if entry.num_tokens != 1:\n",
        "tokens and samples is true, as the last chunk of a prompt has",
    ),
    "sleeps_without_clients": (
        "5.3",
        "                self.read_notes()\n                group =",
        "                self.read_notes()\n                if not self.clients:\n"
        "                    await self.note.wait()\n                    continue\n                group =",
        "slept before a step gave None",
    ),
    "forgets_a_cancellation": (
        "5.4",
        CLIENT_05 + LEAVES_05,
        CLIENT_05
        + LEAVES_05.replace("finally", "except GeneratorExit")
        + "            raise\n"
        + LEAVES_05.replace("finally", "else"),
        "cancelled before the first token: expected one note in departed, got 0",
    ),
    "takes_its_arrival_back": (
        "5.4",
        LEAVES_05,
        LEAVES_05.replace("self.departed.append(client)", "self.arrived.remove(client)"),
        "the stream took its note out of arrived, which belongs to read_notes",
    ),
    "keeps_the_last_yield": (
        "5.4",
        LEAVES_05,
        LEAVES_05 + "        yield\n",
        "it yielded None once more: is the file's last yield still there?",
    ),
}
"""Name -> task, lines of chapter 05, what stands there instead, part of the message."""


@pytest.fixture(scope="module")
def first_messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, chapter = tmp_path_factory.mktemp("mistakes"), find_chapter("05")
    files: dict[Path, tuple[str, str | None]] = {}
    for name, (task, lines, other, _) in MISTAKES.items():
        assert chapter.source.count(lines) == 1
        files[folder / f"{name}.py"] = ("05", task)
        (folder / f"{name}.py").write_text(chapter.source.replace(lines, other), encoding="utf-8")
    verdicts = judge(tmp_path_factory.mktemp("judged"), files)
    return {path.stem: verdict.failures[0]["message"] for path, verdict in verdicts.items() if verdict.failures}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_first_message_names_the_cause(first_messages: dict[str, str], name: str) -> None:
    assert MISTAKES[name][3] in first_messages[name]
