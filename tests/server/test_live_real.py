"""PageBrain Live on the real server: the bundled model, a pool so small that preemption is constant."""

from collections.abc import Iterator

import pytest

from tests.server.support_browser import LivePage, chromium, needs_browser, pages
from tests.support.served import Served

pytestmark = needs_browser

POOL = ("--num-blocks", "16", "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "32")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*POOL, "--live-control") as served:
        yield served


@pytest.fixture
def live(served: Served) -> Iterator[LivePage]:
    with chromium() as browser, pages(browser) as open_page:
        live = open_page(served.url)
        live.wait_for("now.connection === 'live' && now.grid")
        yield live
        assert not live.problems


def test_a_learner_stops_the_world_before_a_preemption_and_sees_it_happen(live: LivePage, served: Served) -> None:
    page = live.page
    page.locator("#pause").click()
    live.wait_for("now.paused")
    page.locator('input[name="max_tokens"]').fill("200")
    page.locator('input[name="temperature"]').fill("0")
    page.locator('input[name="copies"]').fill("6")
    page.get_by_role("button", name="Send 6").click()
    live.wait_for("now.state.waiting.length === 6 && Object.keys(now.state.tables).length === 0")
    before = live.snapshot()
    for _ in range(200):
        before = live.snapshot()
        page.locator("#step").click()
        live.wait_for("now.totals.steps > it.totals.steps", before)
        if live.snapshot()["totals"]["preemptions"]:
            break
    after = live.snapshot()
    assert after["totals"]["steps"] == before["totals"]["steps"] + 1, "one step at a time"
    victims = after["steps"][-1]["preempted"]
    lost = [block for victim in victims for block in before["state"]["tables"][str(victim)]]
    assert lost and {block for block, _ in after["lost"]} == set(lost)
    assert after["state"]["preempted"] == sorted(victims) and not {*map(str, victims)} & after["state"]["tables"].keys()
    live.drawn()
    assert page.locator('[data-queue="preempted"] .chip').count() == len(victims)
    assert page.locator(".card.preempted").count() == len(victims)
    page.locator("#pause").click()
    page.wait_for_function("() => document.querySelectorAll('.card.over').length === 6", timeout=30_000)
    texts = page.locator(".card-text").all_inner_texts()
    assert len(set(texts)) == 1 and len(texts[0]) > 100, "the same prompt, greedily: preempted or not, the same text"
    live.wait_for("now.state.free_blocks === 16")


def test_a_text_that_is_stopped_gives_its_blocks_back(live: LivePage, served: Served) -> None:
    page = live.page
    page.locator("#pause").click()
    page.locator('input[name="copies"]').fill("1")
    page.get_by_role("button", name="Send", exact=True).click()
    live.wait_for("now.state.waiting.length === 1")
    page.locator("#step").click()
    live.wait_for("now.state.running.length === 1 && now.state.free_blocks < 16")
    page.get_by_role("button", name="Stop").click()
    live.wait_for("now.state.running.length === 0 && now.state.free_blocks === 16")
    page.locator("#pause").click()
    live.wait_for("!now.paused")
