"""PageBrain Live when there are many: sequences, blocks, rows. Nothing that it leaves out goes unsaid."""

import pytest

from pagebrain.server.live.feed import MAX_NEXT_FREE
from pagebrain.server.options import ServerOptions
from pagebrain.viz.state import letter
from pagebrain.viz.style import SEQUENCE_COLOURS
from tests.server.support_browser import LivePage, OpenPage, needs_browser
from tests.server.support_live import FakeClient, Simulation, fake_app, serving

pytestmark = needs_browser


def crowd(num_blocks: int, num_seqs: int, max_num_seqs: int, num_steps: int = 60, num_new: int = 400) -> FakeClient:
    """A paused engine, some steps after so many sequences came at once."""
    client = FakeClient(Simulation(num_blocks, max_num_seqs=max_num_seqs, budget=512), steps_per_s=100, traffic=False)
    for number in range(num_seqs):
        client.simulation.add(f"cmpl-{number}", 20, num_new)
    for _ in range(num_steps):
        client.simulation.step()
    client.paused = True
    return client


def step(live: LivePage, times: int = 1) -> None:
    for _ in range(times):
        before = live.snapshot()
        live.page.locator("#step").click()
        live.wait_for("now.totals.steps > it.totals.steps", before)
    live.drawn()


@pytest.mark.parametrize("size", [(1280, 720), (1366, 768), (1440, 900), (1280, 640)])
def test_long_queues_leave_room_for_the_block_table(open_page: OpenPage, size: tuple[int, int]) -> None:
    client = crowd(num_blocks=120, num_seqs=80, max_num_seqs=40, num_steps=60)
    assert client.simulation.num_preemptions > 10, "all three queues are long"
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address, viewport={"width": size[0], "height": size[1]})
        live.wait_for("now.state.running.length > 20 && now.state.preempted.length > 12")
        live.drawn()
        hidden = live.page.evaluate("""() => {
          const first = document.querySelector(".table-cells .physical").getBoundingClientRect();
          const cells = [...document.querySelectorAll(".table-cells .physical")];
          return cells.filter((cell) => {
            const { left, top, width, height } = cell.getBoundingClientRect();
            if (top > first.top) return false;  // a second row may have to be scrolled to
            return ![1, height - 2].every((down) => document.elementFromPoint(left + width / 2, top + down) === cell);
          }).map((cell) => cell.innerText);
        }""")
        assert hidden == []
        for queue in ("running", "waiting", "preempted"):
            chips = live.page.locator(f'[data-queue="{queue}"] .chips')
            assert chips.evaluate("list => list.clientHeight") <= 92, "about three rows"
            last = chips.locator(".chip").last
            last.click()  # Playwright scrolls to it: so can anybody
            live.wait_for("now.isChosen && now.selected === it", int(last.get_attribute("data-seq") or -1))
        assert live.page.locator('[data-queue="running"] .chip').count() == len(client.simulation.running)
        assert live.page.evaluate("document.documentElement.scrollHeight") <= size[1]


def test_a_cell_of_many_blocks_shows_and_names_all_its_holders(open_page: OpenPage) -> None:
    client = crowd(num_blocks=4096, num_seqs=64, max_num_seqs=64)
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address, device_scale_factor=3)  # so that a stripe is some pixels high
        live.wait_for("now.grid && now.state.running.length === 64")
        live.drawn()
        per_cell = live.snapshot()["grid"]["perCell"]
        assert per_cell == 4
        holders: dict[int, list[int]] = {}
        for seq in client.simulation.running[1:]:  # the first is selected, and framed
            for block in seq.table:
                holders.setdefault(block // per_cell, []).append(seq.seq_id)
        mine = {block // per_cell for block in client.simulation.running[0].table}
        mixed = {cell: sorted(seqs) for cell, seqs in holders.items() if len(set(seqs)) > 1 and cell not in mine}
        assert len(mixed) > 20
        for cell, seqs in list(mixed.items())[:20]:
            for place, seq_id in enumerate(seqs):
                (pixel,) = live.colours([cell * per_cell], 0.5, 1 - (place + 0.5) / per_cell)
                colour = SEQUENCE_COLOURS[seq_id % len(SEQUENCE_COLOURS)]
                wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
                # The texture's marks are lighter or darker, never of another hue.
                assert max(abs(a - b) for a, b in zip(pixel, wanted)) <= 90, (cell, seqs, letter(seq_id))
        cell, seqs = next((cell, seqs) for cell, seqs in mixed.items() if len(set(seqs)) == len(seqs))
        live.click_block(cell * per_cell)
        *names, last = map(letter, seqs)
        held = f"{len(seqs)} of 4 held; {', '.join(names)} and {last} hold one each."
        words = f"Blocks {4 * cell} to {4 * cell + 3}: {held}"
        live.page.wait_for_function("it => document.querySelector('#pool-look').innerText === it", arg=words)
        assert live.page.locator("#pool .caption").inner_text().endswith("A square is 4 blocks.")
        assert not live.problems


def marks_of(live: LivePage) -> list[str]:
    """The marks that the pool's legend explains."""
    marks = live.page.locator("#pool .legend li")
    return [" ".join(mark.inner_text().split()) for mark in marks.all() if mark.is_visible()]


def test_the_legend_explains_what_can_appear_and_nothing_else(open_page: OpenPage) -> None:
    with serving(fake_app(crowd(4096, 8, 8), ServerOptions())) as address:
        live = open_page(address)
        live.wait_for("now.grid?.perCell > 1")
        live.drawn()
        assert marks_of(live) == ["free", "stripes: its holders"]
    client = crowd(num_blocks=64, num_seqs=2, max_num_seqs=8, num_steps=2)
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address, viewport={"width": 1260, "height": 800})  # where one mark more needs another line
        live.wait_for("now.grid?.perCell === 1 && now.state.running.length")
        live.drawn()
        first = f"next in line (first {MAX_NEXT_FREE})"
        assert marks_of(live) == ["free", first, "empty slots", "just handed out", "just preempted"]
        further = client.simulation.free[MAX_NEXT_FREE + 3]
        live.click_block(further)
        live.page.wait_for_function(
            "it => document.querySelector('#pool-look').innerText === it",
            arg=f"Block {further} is free, further back in line.",
        )
        before = live.snapshot()["grid"]
        client.simulation.add("cmpl-shares", 300, 20, samples=3)  # the third starts when the first has its blocks
        step(live, 2)
        assert client.simulation.state()["shared"]
        assert "shared" in marks_of(live)
        assert live.snapshot()["grid"] == before, "the map stays where it is"


def test_the_timeline_keeps_the_selected_row_and_says_how_many_it_leaves_out(open_page: OpenPage) -> None:
    client = crowd(num_blocks=512, num_seqs=30, max_num_seqs=30)
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address)
        live.wait_for("now.state.running.length === 30")
        step(live, 2)
        note = live.page.locator(".timeline-note")
        rows = live.snapshot()["rows"]
        assert live.snapshot()["selected"] == 0, "the oldest, by itself"
        assert rows == [0, *range(31 - len(rows), 30)] and len(rows) < 30
        assert note.inner_text() == f"{30 - len(rows)} more not shown"
        live.page.locator(".timeline-stage").focus()
        for seq_id in (1, 2):
            live.page.keyboard.press("ArrowDown")
            live.wait_for("now.selected === it && now.rows[0] === it", seq_id)
        live.page.locator('#queues .chip[data-seq="29"]').click()
        live.wait_for("now.selected === 29")
        live.drawn()
        assert live.snapshot()["rows"] == list(range(30 - len(rows), 30))
        assert note.inner_text() == f"{30 - len(rows)} more above: A to {letter(29 - len(rows))}"
        live.page.locator(".timeline-stage").click(position={"x": 20, "y": 20})  # the letter under the note
        live.wait_for("now.selected === it", 30 - len(rows))


def test_the_labels_of_a_chart_do_not_touch(open_page: OpenPage) -> None:
    with serving(fake_app(crowd(64, 4, 4), ServerOptions(live_control=True))) as address:
        live = open_page(address)
        live.wait_for("now.state.running.length")
        live.page.evaluate("""() => {
          window.labels = [];
          const write = CanvasRenderingContext2D.prototype.fillText;
          CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            if (this.canvas.closest(".chart")) {
              const size = this.measureText(text);
              const at = this.getTransform().transformPoint(new DOMPoint(x, y));
              const [left, right] = [at.x - size.actualBoundingBoxLeft, at.x + size.actualBoundingBoxRight];
              const [top, bottom] = [at.y - size.actualBoundingBoxAscent, at.y + size.actualBoundingBoxDescent];
              window.labels.push([this.canvas.closest(".chart").className, text, left, top, right, bottom]);
            }
            return write.apply(this, arguments);
          };
        }""")
        step(live)
        labels = live.page.evaluate("window.labels")
        assert {"0", "0%", "-60 s", "now"} <= {text for _, text, *_ in labels}
        for chart, text, left, top, right, bottom in labels:
            for other, word, *box in labels:
                if other != chart or word == text:
                    continue
                apart = right < box[0] or box[2] < left or bottom + 1 < box[1] or box[3] + 1 < top
                assert apart, (chart, text, word)


def test_a_preempted_chip_is_framed_on_paper_and_counts_stand_apart(open_page: OpenPage) -> None:
    client = crowd(num_blocks=40, num_seqs=16, max_num_seqs=16, num_steps=45)
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        live = open_page(address, color_scheme="dark")
        live.wait_for("now.state.preempted.length > 2")
        live.drawn()
        for chip in live.page.locator('[data-queue="preempted"] .chip').all():
            clip, *gap = chip.evaluate(
                "chip => { const it = getComputedStyle(chip); return [it.backgroundClip, it.paddingTop, it.paddingLeft]; }"
            )
            assert clip == "content-box" and gap == ["2px", "2px"], "between colour and frame there is paper"
    with serving(fake_app(crowd(64, 4, 4), ServerOptions())) as address:
        live = open_page(address)
        live.wait_for("now.state.running.length === 4")
        live.drawn()
        assert live.page.locator('[data-queue="preempted"]').inner_text().split() == ["preempted", "0", "none"]
        count, more = (live.page.locator(f'[data-queue="preempted"] {part}').bounding_box() for part in (".count", ".more"))
        assert count is not None and more is not None
        assert more["x"] - (count["x"] + count["width"]) >= 6
