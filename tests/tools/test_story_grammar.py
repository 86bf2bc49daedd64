"""The story grammar keeps its promises: same seed same text, held-out pairs held out, and nothing said that is not so."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tools.storyteller import story_grammar
from tools.storyteller.story_grammar import (
    BOYS,
    GIRLS,
    HELD_OUT,
    NAMES,
    NOUNS,
    PLOTS,
    POOLS,
    Story,
    generate_story,
    generate_texts,
)

WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)?")


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return [generate_story(7, index) for index in range(1500)]


def words(text: str) -> set[str]:
    return set(WORD.findall(text))


def templates() -> Iterator[str]:
    for pool in POOLS.values():
        yield from pool
    for pools in (story_grammar.USES, story_grammar.FLAWS):
        for pool in pools.values():
            yield from pool
    for plot in PLOTS:
        for beat in plot.beats:
            yield from beat


def test_same_seed_and_index_give_the_same_story_and_others_differ(stories: list[Story]) -> None:
    assert generate_story(7, 3) == stories[3]
    assert generate_story(8, 3).text != stories[3].text
    assert len({story.text for story in stories}) == len(stories)


def test_worker_processes_do_not_change_the_corpus() -> None:
    assert list(generate_texts(7, 1200, workers=2)) == list(generate_texts(7, 1200, workers=1))


def test_heldout_stream_shares_no_text_with_the_training_stream(stories: list[Story]) -> None:
    heldout = {generate_story(1_000_003, index).text for index in range(1500)}
    assert not heldout & {story.text for story in stories}


def test_no_training_story_holds_a_heldout_pair(stories: list[Story]) -> None:
    for story in stories:
        said = words(story.text)
        assert not [pair for pair in HELD_OUT if pair[0] in said and pair[1] in said], story.text


def test_heldout_stories_are_about_heldout_pairs() -> None:
    assert 0.08 < len(HELD_OUT) / (len(NAMES) * len(NOUNS)) < 0.12
    assert {name for name, _ in HELD_OUT} == set(NAMES)
    for index in range(200):
        story = generate_story(7, index, "heldout")
        assert (story.hero, story.noun) in HELD_OUT
        assert {story.hero, story.noun} <= words(story.text)


def test_object_nouns_and_names_occur_in_no_template() -> None:
    forbidden = set(NOUNS) | set(NAMES)
    for template in templates():
        assert not forbidden & words(re.sub(r"\{.*?\}", " ", template)), template


def test_every_plot_is_told_and_no_slot_is_left_open(stories: list[Story]) -> None:
    assert {name for story in stories for name in story.plot.split("+")} == {plot.name for plot in PLOTS}
    assert not [story.text for story in stories if "{" in story.text or "}" in story.text]


def test_every_quotation_is_closed(stories: list[Story]) -> None:
    styles = set()
    for story in stories:
        assert story.text.count('"') % 2 == 0, story.text
        curly = re.sub(r"[^“”]", "", story.text)
        assert curly == "“”" * (len(curly) // 2), story.text
        styles.add(bool(curly))
    assert styles == {True, False}


def test_a_recall_repeats_what_the_story_said_before(stories: list[Story]) -> None:
    kinds = set()
    for story in stories:
        for recall in story.recalls:
            said, before = story.text[recall.start : recall.end], story.text[: recall.start]
            assert said and said.lower() in before.lower(), (said, story.text)
            kinds.add(recall.kind)
    assert kinds == {"name", "object", "detail"}


def test_a_recalled_object_keeps_its_one_adjective(stories: list[Story]) -> None:
    checked = 0
    for story in stories:
        if "+" in story.plot:
            continue  # another part may tell of another drum
        for recall in story.recalls:
            said = story.text[recall.start : recall.end]
            if recall.kind == "object" and " " in said:
                noun = said.split()[-1]
                adjectives = set(re.findall(rf"([^\W\d_]+) {noun}\b", story.text)) & set(story_grammar.ADJECTIVES)
                assert adjectives == {said.split()[0]}, story.text
                checked += 1
    assert checked > 1000


def test_pronouns_fit_when_everybody_has_the_same(stories: list[Story]) -> None:
    checked = {"girls": 0, "boys": 0}
    for story in stories:
        said = words(story.text)
        cast = said & set(NAMES)
        for label, group, wrong in (("girls", GIRLS, {"he", "him", "his"}), ("boys", BOYS, {"she", "her", "hers"})):
            if cast <= set(group):
                assert not wrong & {word.lower() for word in said}, story.text
                checked[label] += 1
    assert min(checked.values()) > 50


def test_articles_agree(stories: list[Story]) -> None:
    text = " ".join(story.text for story in stories)
    assert not re.findall(r"\ba [aeiou]\w+", text.replace("a one-eyed", ""))
    assert not re.findall(r"\ban [^aeiou\W]\w+", text.replace("an hour", ""))
    assert " an " in text


def test_stories_are_short_and_some_hold_multibyte_characters_and_paragraphs(stories: list[Story]) -> None:
    single = [story.text for story in stories if "+" not in story.plot]
    lengths = sorted(len(text.split()) for text in single)
    assert lengths[0] >= 50 and lengths[len(lengths) // 2] < 180 and lengths[-1] < 300
    assert 0.2 < sum(not text.isascii() for text in single) / len(single) < 0.95
    assert any("—" in text for text in single)
    assert 0.2 < sum("\n\n" in text for text in single) / len(single) < 0.95


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout', got 'test'"):
        generate_story(7, 0, "test")  # type: ignore[arg-type]
