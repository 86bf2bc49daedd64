"""The live page in a real browser: a headless Chromium, and a page that notes what it must not do."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

try:
    from playwright.sync_api import Browser as Browser
    from playwright.sync_api import Page, sync_playwright
except ImportError:  # tests that need it skip themselves
    Browser = Page = Any  # type: ignore[assignment,misc]
    sync_playwright = None  # type: ignore[assignment]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}

needs_browser = pytest.mark.skipif(
    sync_playwright is None or CHROMIUM is None,
    reason="the live page is tested in Chromium: pip install playwright, apt-get install chromium",
)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser. Close it before anything calls ``asyncio.run`` in this thread: Playwright runs a loop here."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-sync"])
        yield browser
        browser.close()


class LivePage:
    """``/live`` of some server, opened.

    Attributes:
        page: Playwright's.
        problems: errors on the console and requests to elsewhere, as they happen.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self._origin = address + "/"
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._check_origin(request.url))
        page.goto(f"{address}/live")

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "willReadFrequently" not in text:  # that one is about `colours` below
            self.problems.append(text)

    def _check_origin(self, url: str) -> None:
        if not url.startswith(self._origin):
            self.problems.append(f"asked for {url}")

    def snapshot(self) -> dict[str, Any]:
        """What the page says that it shows."""
        snapshot = self.page.evaluate("pagebrainLive.snapshot()")
        assert isinstance(snapshot, dict)
        return snapshot

    def wait_for(self, condition: str, argument: Any = None) -> None:
        """Wait until a condition in JavaScript holds, in which ``now`` is the snapshot and ``it`` the argument."""
        self.page.wait_for_function(
            f"it => {{ const now = window.pagebrainLive?.snapshot(); return now && ({condition}); }}", arg=argument
        )

    def drawn(self) -> None:
        """Wait until what the page knows is on the screen."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click_block(self, block: int) -> None:
        """Click a block on the map."""
        box = self.page.evaluate("block => pagebrainLive.box(block)", block)
        self.page.locator(".pool-stage").click(position={"x": box["x"] + box["w"] / 2, "y": box["y"] + box["h"] / 2})

    def colours(self, blocks: list[int], across: float, down: float) -> list[list[int]]:
        """The pixel at a place within each block's cell, red, green and blue."""
        pixels = self.page.evaluate(
            """([blocks, across, down]) => {
              const canvas = document.querySelector(".pool-stage canvas");
              const ratio = canvas.width / canvas.clientWidth;
              return blocks.map((block) => {
                const { x, y, w, h } = pagebrainLive.box(block);
                const at = [x + across * w, y + down * h].map((place) => Math.round(place * ratio));
                return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
              });
            }""",
            [blocks, across, down],
        )
        assert isinstance(pixels, list)
        return pixels


OpenPage = Callable[..., LivePage]


@contextlib.contextmanager
def pages(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages, each in a context of its own, and closes them."""
    with contextlib.ExitStack() as stack:

        def open_page(address: str, **settings: Any) -> LivePage:
            context = browser.new_context(**({"viewport": LAPTOP, "reduced_motion": "reduce"} | settings))
            stack.callback(context.close)
            return LivePage(context.new_page(), address)

        yield open_page
