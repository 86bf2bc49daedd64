"""PageBrain Live in a real browser, fed by a simulation: it shows what the engine says, and does what it is told."""

import re
from collections.abc import Iterator

import pytest

from pagebrain.server.options import ServerOptions
from pagebrain.viz.state import letter
from pagebrain.viz.style import SEQUENCE_COLOURS
from tests.server.support_browser import PHONE, LivePage, OpenPage, needs_browser
from tests.server.support_live import FakeClient, Simulation, fake_app, serving

pytestmark = needs_browser


@pytest.fixture(scope="module")
def client() -> FakeClient:
    return FakeClient(Simulation(num_blocks=64, max_num_seqs=12), steps_per_s=60)


@pytest.fixture(scope="module")
def address(client: FakeClient) -> Iterator[str]:
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        yield address


@pytest.fixture
def live(open_page: OpenPage, address: str, client: FakeClient) -> Iterator[LivePage]:
    """A page that sees an engine at work. Afterwards: no errors on the console, no request to elsewhere."""
    client.paused = False
    live = open_page(address)
    live.wait_for("now.totals.preemptions > 0 && now.state.running.length > 3")
    yield live
    assert not live.problems


def pause(live: LivePage) -> None:
    live.page.locator("#pause").click()
    settle(live)


def settle(live: LivePage) -> None:
    """Wait until the engine is paused and the page shows how it stands."""
    live.wait_for("now.paused")
    live.page.wait_for_timeout(150)  # the last update
    live.drawn()


def table_shown(live: LivePage) -> list[int]:
    return [int(text) for text in live.page.locator(".table-cells .physical").all_inner_texts()]


def rgb(colour: str) -> list[int]:
    return [int(colour[index : index + 2], 16) for index in (1, 3, 5)]


def test_it_streams(live: LivePage) -> None:
    before = live.snapshot()
    live.wait_for("now.totals.steps > it.totals.steps + 10 && now.frames > it.frames + 3", before)
    assert live.page.locator("#connection").inner_text() == "live"
    steps = [step["step"] for step in live.snapshot()["steps"]]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    assert live.page.locator("#free").inner_text().isdigit()


def test_every_block_is_drawn_in_its_holders_colour(live: LivePage, client: FakeClient) -> None:
    pause(live)
    simulation = client.simulation
    full: dict[int, int] = {}
    for seq in simulation.running:
        for block in seq.table[: seq.num_cached // simulation.block_size]:
            full[block] = min(seq.seq_id, full.get(block, seq.seq_id))
    shown = live.snapshot()
    free = [block for block in simulation.free if block not in [int(lost) for lost in shown["next"]]]
    plain = {block: seq_id for block, seq_id in full.items() if seq_id // len(SEQUENCE_COLOURS) % 3 == 0}
    striped = {block: seq_id for block, seq_id in full.items() if block not in plain}
    assert len(full) > 20
    for places, owners in (((0.12, 0.85), plain), ((0.12, 0.85), striped)):
        pixels = dict(zip(owners, live.colours(list(owners), *places)))
        for block, seq_id in owners.items():
            colour = rgb(SEQUENCE_COLOURS[seq_id % len(SEQUENCE_COLOURS)])
            # The texture's marks are lighter or darker, never of another hue.
            limit = 3 if block in plain else 90
            assert max(abs(a - b) for a, b in zip(pixels[block], colour)) <= limit, (block, letter(seq_id))
    assert all(min(pixel) > 225 for pixel in live.colours(free, 0.12, 0.85)), "free blocks are pale"


def test_a_click_on_a_block_shows_its_sequences_table(live: LivePage, client: FakeClient) -> None:
    pause(live)
    for seq in client.simulation.running[:4]:
        alone = [block for block in seq.table if client.simulation.refs[block] == 1]
        live.page.keyboard.press("Escape")
        live.click_block(alone[0])
        live.wait_for("now.isChosen && now.selected === it", seq.seq_id)
        live.drawn()
        assert table_shown(live) == seq.table
        assert f"context length {seq.num_cached}" in live.page.locator(".table-facts").inner_text()
        words = live.page.locator("#pool-look").inner_text()
        assert f"Block {alone[0]} is {letter(seq.seq_id)}’s logical block {seq.table.index(alone[0])}" in words


def test_the_slots_of_the_last_block_are_shown(live: LivePage, client: FakeClient) -> None:
    pause(live)
    seq = next(seq for seq in client.simulation.running if seq.num_cached % 16)
    live.page.locator(f'#queues .chip[data-seq="{seq.seq_id}"]').click()
    live.wait_for("now.selected === it", seq.seq_id)
    live.drawn()
    assert live.page.locator(".slots .full").count() == seq.num_cached % 16
    slot = seq.table[(seq.num_cached - 1) // 16] * 16 + (seq.num_cached - 1) % 16
    assert live.page.locator(".formula").inner_text().endswith(f"= {slot}")


def test_the_queues_are_in_the_schedulers_order(live: LivePage, client: FakeClient) -> None:
    pause(live)
    preempted = [seq.seq_id for seq in client.simulation.waiting if seq.was_preempted]
    waiting = [seq.seq_id for seq in client.simulation.waiting if not seq.was_preempted]
    for name, queue in (("running", [seq.seq_id for seq in client.simulation.running]), ("waiting", waiting)):
        chips = live.page.locator(f'[data-queue="{name}"] .chip').all_inner_texts()
        assert queue and chips == [letter(seq_id) for seq_id in queue]
    assert live.page.locator('[data-queue="preempted"] .chip').count() == len(preempted)


def test_the_keyboard_alone_is_enough(live: LivePage, client: FakeClient) -> None:
    page = live.page
    page.locator(".pool-stage").focus()
    page.keyboard.press("p")
    settle(live)
    seq = client.simulation.running[-1]
    target = next(block for block in seq.table if client.simulation.refs[block] == 1)
    columns = live.snapshot()["grid"]["columns"]
    page.keyboard.press("Home")
    for key in ["ArrowDown"] * (target // columns) + ["ArrowRight"] * (target % columns):
        page.keyboard.press(key)
    page.wait_for_function("it => document.querySelector('#pool-look').innerText.startsWith(`Block ${it} `)", arg=target)
    page.keyboard.press("Enter")
    live.wait_for("now.isChosen && now.selected === it", seq.seq_id)
    page.locator(".timeline-stage").focus()
    rows = live.snapshot()["rows"]
    at = rows.index(seq.seq_id)
    page.keyboard.press("ArrowUp" if at else "ArrowDown")
    live.wait_for("now.selected === it", rows[at - 1 if at else 1])
    steps = client.simulation.num_steps
    page.keyboard.press("s")
    live.wait_for("now.totals.steps === it", steps + 1)
    page.keyboard.press("p")
    live.wait_for("!now.paused && now.totals.steps > it + 3", steps)


def test_paused_it_steps_one_step_at_a_time_through_a_preemption(live: LivePage, client: FakeClient) -> None:
    pause(live)
    for _ in range(150):
        before = live.snapshot()
        live.page.locator("#step").click()
        live.wait_for("now.totals.steps === it.totals.steps + 1", before)
        if live.snapshot()["totals"]["preemptions"] > before["totals"]["preemptions"]:
            break
    after = live.snapshot()
    victim = after["steps"][-1]["preempted"][-1]
    assert before["state"]["tables"][str(victim)] and str(victim) not in after["state"]["tables"]
    assert {block for block, _ in after["lost"]} >= set(before["state"]["tables"][str(victim)]) - shared_in(before)
    chips = live.page.locator('[data-queue="preempted"] .chip')
    assert letter(victim) in chips.all_inner_texts()
    assert client.simulation.num_steps == after["totals"]["steps"], "the engine did not run on by itself"


def shared_in(snapshot: dict) -> set[int]:  # type: ignore[type-arg]
    return {int(block) for block in snapshot["state"]["shared"]}


def test_prompts_stream_in_cards_of_their_sequences_colours_and_stop(open_page: OpenPage) -> None:
    client = FakeClient(Simulation(num_blocks=96), steps_per_s=150, traffic=False)
    with serving(fake_app(client, ServerOptions())) as address:
        live = open_page(address)
        live.wait_for("now.hello")
        send_four_and_stop_one(live, client)
        assert not live.problems


def send_four_and_stop_one(live: LivePage, client: FakeClient) -> None:
    page = live.page
    page.locator("#texts").fill("Once upon a time\nThe old lamp")
    page.locator('input[name="copies"]').fill("2")
    page.locator('input[name="max_tokens"]').fill("900")
    page.get_by_role("button", name="Send 4").click()
    cards = page.locator(".card")
    page.wait_for_function(
        "() => document.querySelectorAll('.card').length === 4 && "
        "[...document.querySelectorAll('.card')].every((card) => card.dataset.seq && card.innerText.length > 90)"
    )
    first = cards.nth(2)
    seq_id = int(first.get_attribute("data-seq") or -1)
    assert first.locator(".chip").inner_text() == letter(seq_id)
    assert first.locator(".card-text").inner_text().startswith("The old lamp ")
    border = first.evaluate("card => getComputedStyle(card).borderLeftColor")
    assert [int(part) for part in re.findall(r"\d+", border)] == rgb(SEQUENCE_COLOURS[seq_id % len(SEQUENCE_COLOURS)])
    first.locator(".stop").click()
    page.wait_for_function("() => document.querySelectorAll('.card')[2].innerText.includes('stopped')")
    assert seq_id not in [seq.seq_id for seq in client.simulation.running + client.simulation.waiting]
    others = [int(cards.nth(index).get_attribute("data-seq") or -1) for index in (0, 1, 3)]
    assert set(others) <= {seq.seq_id for seq in client.simulation.running + client.simulation.waiting}
    for index in (0, 1, 3):
        cards.nth(index).locator(".stop").click()
    live.wait_for("it.every((seq) => !now.state.running.includes(seq))", others)


def test_samples_of_one_prompt_share_blocks_that_are_marked(live: LivePage, client: FakeClient) -> None:
    pause(live)
    for _ in range(200):
        if live.snapshot()["state"]["shared"]:
            break
        live.page.locator("#step").click()
        live.page.wait_for_timeout(20)
    block = int(next(iter(live.snapshot()["state"]["shared"])))
    live.click_block(block)
    live.page.wait_for_function("() => document.querySelector('#pool-look').innerText.includes('is shared by')")
    live.drawn()
    assert live.page.locator(".table-cells .shared").count() > 0


def test_what_the_server_refuses_is_said_in_its_words(open_page: OpenPage, address: str) -> None:
    live = open_page(address)
    live.wait_for("now.hello")
    live.page.locator("#texts").fill("refuse")
    live.page.locator('input[name="copies"]').fill("1")
    live.page.locator("#prompts button[type=submit]").click()
    live.page.wait_for_function("() => document.querySelector('.form-error').innerText === 'this server refuses that'")
    live.page.wait_for_function("() => document.querySelector('.card-status').innerText.includes('refuses that')")
    assert all("400" in problem for problem in live.problems)  # Chromium's own line about the status


def test_a_server_with_a_key_is_asked_with_the_key_that_is_typed_in(open_page: OpenPage) -> None:
    client = FakeClient(Simulation(num_blocks=64))
    with serving(fake_app(client, ServerOptions(api_key="open-sesame"))) as address:
        live = open_page(address)
        field = live.page.locator("#key")
        field.wait_for()
        field.fill("something else")
        field.press("Enter")
        live.page.wait_for_function("() => document.querySelector('#key-words').innerText.includes('does not accept')")
        assert not client.subscriptions
        field.fill("open-sesame")
        field.press("Enter")
        live.wait_for("now.connection === 'live' && now.totals.steps > 0")
        assert not field.is_visible()
        assert "--live-control" in live.page.locator(".control-hint").inner_text()
        assert not live.page.locator("#pause").is_visible()
        assert live.page.evaluate("sessionStorage.length === 1 && !JSON.stringify(localStorage).includes('sesame')")
        assert all("401" in problem for problem in live.problems)


def test_a_lost_connection_is_said_and_found_again(open_page: OpenPage) -> None:
    client = FakeClient(Simulation(num_blocks=64))
    with serving(fake_app(client, ServerOptions())) as address:
        live = open_page(address)
        live.wait_for("now.connection === 'live'")
        client.die()
        live.page.wait_for_function("() => document.querySelector('#connection').innerText.includes('unexpectedly')")
        assert live.snapshot()["connection"] in ("lost", "connecting")
        client.is_alive, client.failure = True, None
        live.wait_for("now.connection === 'live' && now.totals.steps > it.totals.steps", live.snapshot())


def test_nothing_grows_without_bound(live: LivePage) -> None:
    sizes = live.page.evaluate("""async () => {
      const { Model } = await import("/live/model.js");
      const model = new Model();
      model.takeHello({ num_blocks: 64, block_size: 16, paused: false });
      for (let step = 0; step < 5000; step += 1) {
        const state = { free_blocks: 63, next_free: [], tables: { [step]: [step % 64] }, shared: {}, waiting: [],
          running: [step], preempted: [], context: { [step]: 3 }, requests: { [step]: [`r${step}`, 0] } };
        const totals = { steps: step, prefill_tokens: 3 * step, decode_tokens: 0, preemptions: 0 };
        const rows = [[step, 0, 3, 0]];
        const did = { step, ms: 1, prefill_tokens: 3, decode_tokens: 0, rows, preempted: [], finished: [] };
        model.takeUpdate({ time_s: step / 10, paused: false, skipped: 0, state, totals, steps: [did] });
      }
      return [model.steps.length, model.history.time.length, model.sequenceOf.size, model.history.prefillRate.at(-1)];
    }""")
    assert sizes[0] <= 600 and sizes[1] <= 700 and sizes[2] == 1
    assert 29 < sizes[3] < 31, "3 tokens a step, 10 steps a second"


def test_an_unseen_page_draws_nothing(live: LivePage) -> None:
    page = live.page
    page.evaluate(
        "() => { Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    before = live.snapshot()
    live.wait_for("now.totals.steps > it.totals.steps + 10", before)
    assert live.snapshot()["frames"] == before["frames"]
    page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
    live.wait_for("now.frames > it.frames", before)


def test_a_pool_of_200_000_blocks_is_drawn_in_cells_of_many(open_page: OpenPage) -> None:
    client = FakeClient(Simulation(num_blocks=200_000, max_num_seqs=64, budget=2048), steps_per_s=20)
    with serving(fake_app(client, ServerOptions())) as address:
        live = open_page(address)
        live.wait_for("now.totals.steps > 3")
        grid = live.snapshot()["grid"]
        assert grid["perCell"] > 1 and grid["cells"] * grid["perCell"] >= 200_000
        live.page.locator(".pool-stage").hover()
        live.page.wait_for_function(
            "() => /Blocks \\d+ to \\d+: \\d+ of \\d+ held/.test(document.querySelector('#pool-look').innerText)"
        )
        assert not live.problems


def test_a_phone_shows_it_without_scrolling_sideways(open_page: OpenPage, address: str, client: FakeClient) -> None:
    live = open_page(address, viewport=PHONE, has_touch=True, color_scheme="dark")
    live.wait_for("now.totals.steps > 0 && now.grid")
    assert live.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert live.page.evaluate("document.documentElement.dataset.theme") == "dark"
    live.page.locator("#theme").tap()
    assert live.page.evaluate("document.documentElement.dataset.theme") == "light"
    step = live.page.locator("#step").bounding_box()
    assert step is not None and step["y"] + step["height"] <= PHONE["height"], "within reach of a thumb"
    assert not live.problems


def test_a_laptop_shows_all_panels_without_scrolling(live: LivePage) -> None:
    for panel in ("prompts", "pool", "timeline", "queues", "table", "charts"):
        box = live.page.locator(f"#{panel}").bounding_box()
        assert box is not None and box["y"] + box["height"] <= 800 and box["height"] > 100, panel
    assert live.page.evaluate("document.documentElement.scrollHeight") <= 800
