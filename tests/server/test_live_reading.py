"""PageBrain Live in a reader's hands: steps by keyboard and by finger, a pace that stays, a server that went and came."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from pagebrain.server.link.messages import ControlAction
from pagebrain.server.options import ServerOptions
from tests.server.support_browser import PHONE, LivePage, OpenPage, needs_browser
from tests.server.support_live import FakeClient, Simulation, fake_app, serving

pytestmark = needs_browser

SMALL_PHONE = {"width": 360, "height": 640}


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(Simulation(num_blocks=64, max_num_seqs=12), steps_per_s=60)


@pytest.fixture
def address(client: FakeClient) -> Iterator[str]:
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        yield address


def paused_page(open_page: OpenPage, address: str, **settings: Any) -> LivePage:
    """A page that saw a hundred steps and paused the engine."""
    live = open_page(address, **settings)
    live.wait_for("now.totals.steps > 100 && now.state.running.length > 3")
    live.page.locator("#pause").click()
    live.wait_for("now.paused")
    live.page.wait_for_timeout(150)  # the last update
    live.drawn()
    return live


def wait_for_look(live: LivePage, beginning: str) -> str:
    live.page.wait_for_function("it => document.querySelector('#timeline-look').innerText.startsWith(it)", arg=beginning)
    return live.page.locator("#timeline-look").inner_text()


def test_the_arrow_keys_read_the_timeline_step_by_step(open_page: OpenPage, address: str) -> None:
    live = paused_page(open_page, address)
    press = live.page.keyboard.press
    numbers = [step["step"] for step in live.snapshot()["steps"]]
    live.page.locator(".timeline-stage").focus()
    press("ArrowLeft")
    wait_for_look(live, f"Step {numbers[-1]}: ")
    press("ArrowLeft")
    press("ArrowLeft")
    first = wait_for_look(live, f"Step {numbers[-3]}: ")
    press("ArrowRight")
    wait_for_look(live, f"Step {numbers[-2]}: ")
    press("ArrowLeft")
    press("ArrowDown")
    live.page.wait_for_function("it => document.querySelector('#timeline-look').innerText !== it", arg=first)
    wait_for_look(live, f"Step {numbers[-3]}: ")
    press("Home")
    wait_for_look(live, f"Step {numbers[0]}: ")
    press("p")
    live.wait_for("now.totals.steps > it + 60", live.snapshot()["totals"]["steps"])
    wait_for_look(live, f"Step {numbers[0]}: ")  # others came, and it is in sight still
    press("Escape")
    wait_for_look(live, "Click a step")
    assert not live.problems


def test_a_tap_reads_a_step_and_chooses_its_sequence(open_page: OpenPage, address: str) -> None:
    live = paused_page(open_page, address, viewport=PHONE, has_touch=True, is_mobile=True)
    wait_for_look(live, "Tap a step")
    stage = live.page.locator(".timeline-stage")
    stage.scroll_into_view_if_needed()
    now = live.snapshot()
    box = stage.bounding_box()
    assert box is not None
    columns = int((box["width"] - 38) // 15)
    for column in (3, 6):
        stage.tap(position={"x": 34 + 15 * column + 7, "y": 20})
        wait_for_look(live, f"Step {now['steps'][column - columns]['step']}: ")
        live.wait_for("now.isChosen && now.selected === it", now["rows"][0])
    stage.tap(position={"x": 34 + 15 * 6 + 7, "y": 20})
    wait_for_look(live, "Tap a step")
    assert live.snapshot()["isChosen"], "another tap lets go of the step, not of the sequence"


def test_the_only_token_of_a_prompt_is_not_told_as_something_that_was_generated(open_page: OpenPage) -> None:
    client = FakeClient(Simulation(num_blocks=64), traffic=False)
    client.paused = True
    client.simulation.add("cmpl-short", 1, 9)
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address)
        live.wait_for("now.hello && now.paused")
        for number in (1, 2):
            live.page.locator("#step").click()
            live.wait_for("now.totals.steps === it", number)
        live.page.locator(".timeline-stage").focus()
        live.page.keyboard.press("End")
        assert "A: decode of token 1." in wait_for_look(live, "Step 1: ")
        live.page.keyboard.press("ArrowLeft")
        assert "A: prefill of token 0." in wait_for_look(live, "Step 0: ")


def test_a_pace_outlives_a_pause_and_a_step(open_page: OpenPage, address: str, client: FakeClient) -> None:
    live = open_page(address)
    live.wait_for("now.totals.steps > 10")
    page, pace = live.page, live.page.locator("#pace")
    pace.select_option("8")
    live.wait_for("now.paused")
    num_steps = client.simulation.num_steps
    live.wait_for("now.totals.steps > it + 3", num_steps)
    page.locator("#pool .pool-stage").focus()
    page.keyboard.press("p")
    page.wait_for_function("() => document.querySelector('#pause').innerText.startsWith('Resume')")
    page.wait_for_timeout(1200)  # longer than a page takes to believe that another viewer resumed
    assert pace.input_value() == "8"
    num_steps = client.simulation.num_steps
    page.wait_for_timeout(400)
    assert client.simulation.num_steps == num_steps, "paused"
    page.keyboard.press("p")
    live.wait_for("now.totals.steps > it + 3", num_steps)
    assert pace.input_value() == "8" and page.locator("#pause").inner_text().startswith("Pause")
    page.keyboard.press("s")
    page.wait_for_function("() => document.querySelector('#pause').innerText.startsWith('Resume')")
    page.wait_for_timeout(300)
    num_steps = client.simulation.num_steps
    page.wait_for_timeout(400)
    assert client.simulation.num_steps == num_steps and pace.input_value() == "8"
    assert "resume" not in client.actions, "slow motion never ran at full speed"


def test_a_pace_chosen_while_paused_starts_nothing(
    open_page: OpenPage, address: str, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = paused_page(open_page, address)
    num_steps = client.simulation.num_steps
    for pace in ("20", "0", "20"):
        live.page.locator("#pace").select_option(pace)
        live.page.wait_for_timeout(250)
    assert client.simulation.num_steps == num_steps and client.actions == ["pause"]
    live.page.locator("#pause").click()
    live.wait_for("now.totals.steps > it + 5", num_steps)
    assert "resume" not in client.actions
    at_once = client.control

    async def slowly(action: ControlAction) -> bool:
        await asyncio.sleep(0.2)
        return await at_once(action)

    monkeypatch.setattr(client, "control", slowly)  # so that a step is always under way: what is asked meanwhile must count
    live.page.wait_for_timeout(300)
    live.page.locator("#pace").select_option("0")
    live.wait_for("!now.paused")
    assert client.actions[-1] == "resume"


def test_a_pace_is_full_again_when_another_page_resumes(open_page: OpenPage, address: str, client: FakeClient) -> None:
    live = paused_page(open_page, address)
    live.page.locator("#pace").select_option("4")
    live.page.wait_for_timeout(1100)
    client.paused = False
    live.wait_for("!now.paused")
    live.page.wait_for_function("() => document.querySelector('#pace').value === '0'")


def test_what_failed_is_no_news_once_a_new_server_is_there(open_page: OpenPage, address: str, client: FakeClient) -> None:
    live = open_page(address)
    live.wait_for("now.connection === 'live'")
    page = live.page
    header = page.locator("header").bounding_box()
    page.locator("#texts").fill("refuse this")
    page.locator('input[name="copies"]').fill("1")
    page.locator("#prompts button[type=submit]").click()
    page.locator(".card.failed").first.wait_for()
    assert page.locator(".form-error").is_visible()
    client.die()
    reason = "The engine has stopped: its process ended unexpectedly"
    page.wait_for_function("it => document.querySelector('#connection').innerText.startsWith(it)", arg=reason)
    assert page.locator("header").bounding_box() == header, "the panels keep their room"
    assert reason in (page.locator("#connection").get_attribute("title") or "")
    client.is_alive, client.failure = True, None
    live.wait_for("now.connection === 'live'")
    assert not page.locator(".form-error").is_visible()
    assert page.locator(".card").count() > 0 and page.locator(".card.failed").count() == 0


@pytest.mark.parametrize("viewport", [PHONE, SMALL_PHONE])
def test_a_phone_says_tap_and_shows_that_it_is_paused(open_page: OpenPage, address: str, viewport: dict[str, int]) -> None:
    live = open_page(address, viewport=viewport, has_touch=True, is_mobile=True)
    live.wait_for("now.totals.steps > 0")
    page = live.page
    assert page.locator("#pool-look").inner_text().startswith("Tap a block")
    sign = page.locator(".paused-sign")
    assert not sign.is_visible()
    page.locator("#pause").tap()
    sign.wait_for()
    boxes = [page.locator(one).bounding_box() for one in (".paused-sign", "#pause", "h1", "#theme")]
    marker, button, title, theme = (box for box in boxes if box is not None)
    assert marker["y"] + marker["height"] <= button["y"] and marker["x"] + marker["width"] <= viewport["width"]
    assert theme["y"] < title["y"] + title["height"] and title["y"] < theme["y"] + theme["height"], "on one line"
    for words in ("#model", "#connection"):
        assert page.locator(words).evaluate("it => it.scrollWidth <= it.clientWidth"), "said in full"
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
