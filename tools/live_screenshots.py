"""Pictures of the live page for README and docs: ``python tools/live_screenshots.py``.

Starts ``pagebrain serve`` with a pool too small for what is sent, opens the page in headless Chromium as a laptop in light
and dark and as a phone, sends prompts, and steps until a step preempts a sequence while many others run: the pictures
show that moment. Needs Chromium and Playwright for Python.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, ViewportSize, sync_playwright

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"

POOL = ("--num-blocks", "80", "--max-num-seqs", "14", "--max-num-batched-tokens", "64", "--live-control")
LAPTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

PROMPTS = """Once upon a time, a small fox
The old lamp in the garden
One rainy day, Mia and her dog
Tom had a red boat that
In the quiet house by the sea"""

LONG_PROMPT = "Once upon a time, a little girl named Lily found a map that showed the way to a hidden lake"

FIRST_STEPS = 100
"""Steps before the moment is looked for: texts are long enough then, and blocks have changed hands."""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The real one, on a free port; gives its address."""
    line = [sys.executable, "-m", "pagebrain", "serve", "--port", "0", *POOL]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stderr is not None
    try:
        for said in process.stderr:
            if " at http://" in said:
                yield said.rpartition(" at ")[2].strip()
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def snapshot(page: Page) -> dict[str, Any]:
    """What the page shows."""
    found = page.evaluate("pagebrainLive.snapshot()")
    assert isinstance(found, dict)
    return found


def step(page: Page) -> dict[str, Any]:
    """One step of the engine; how things stand after it."""
    before = snapshot(page)["totals"]["steps"]
    page.locator("#step").click()
    page.wait_for_function("it => pagebrainLive.snapshot().totals.steps > it", arg=before, timeout=5000)
    return snapshot(page)


def is_telling(now: dict[str, Any]) -> bool:
    """Whether a step took blocks from a sequence, some of them are still free, and many other sequences run."""
    free = [block for block, _ in now["lost"] if block in now["state"]["next_free"]]
    return len(free) >= 1 and len(now["state"]["running"]) >= 8


def find_moment(page: Page) -> None:
    """Send prompts and step until the moment is there. The engine stays paused."""
    page.locator("#pause").click()
    page.wait_for_function("() => pagebrainLive.snapshot().paused")
    send(page, LONG_PROMPT, copies=1, samples=3)
    send(page, PROMPTS, copies=3, samples=1)
    page.wait_for_function("() => pagebrainLive.snapshot().state.waiting.length >= 16", timeout=5000)
    for number in range(1000):
        if number == FIRST_STEPS // 2:  # requests that come later, so that prefill and decode share a step
            send(page, "Anna and the moon talked all night", copies=3, samples=1)
        now = step(page)
        if number >= FIRST_STEPS and is_telling(now):
            break
    else:
        raise SystemExit("no such moment in 1000 steps: has the scheduler changed?")
    page.wait_for_timeout(400)


def send(page: Page, prompts: str, copies: int, samples: int) -> None:
    """Fill in the box and press the button."""
    values = {"max_tokens": 220, "temperature": 0.7, "seed": 11, "copies": copies, "samples": samples}
    page.locator("#texts").fill(prompts)
    for name, value in values.items():
        page.locator(f'#prompts input[name="{name}"]').fill(str(value))
    page.locator("#prompts button[type=submit]").click()


def select_widest(page: Page) -> None:
    """Choose the running sequence with the longest block table, so that the table is worth looking at."""
    state = snapshot(page)["state"]
    seq_id = max(state["running"], key=lambda seq: (len(state["tables"].get(str(seq), [])), -seq))
    page.locator(f'#queues .chip[data-seq="{seq_id}"]').click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(200)


def shoot(page: Page, path: Path) -> None:
    """Write a picture and say how large it is."""
    page.evaluate("() => { document.activeElement?.blur(); scrollTo(0, 0); }")
    page.wait_for_timeout(150)
    page.screenshot(path=path)
    print(
        f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}: {path.stat().st_size / 1000:.0f} kB"
    )


def main() -> int:
    """Write the three pictures."""
    parser = argparse.ArgumentParser(description="Write the pictures of the live page.")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder (default: docs/figures)")
    out = parser.parse_args().out
    with server() as address, sync_playwright() as playwright:
        with urllib.request.urlopen(f"{address}/health", timeout=10):
            pass
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        laptop = browser.new_context(viewport=LAPTOP, color_scheme="light", device_scale_factor=1.2)
        page = laptop.new_page()
        page.goto(f"{address}/live")
        hand = browser.new_context(
            viewport=PHONE, color_scheme="light", device_scale_factor=2, has_touch=True, is_mobile=True
        )
        phone = hand.new_page()
        phone.goto(f"{address}/live")
        page.wait_for_function("() => window.pagebrainLive?.snapshot().connection === 'live'")
        find_moment(page)
        select_widest(page)
        select_widest(phone)
        shoot(page, out / "live-light.png")
        page.locator("#theme").click()
        page.mouse.move(0, 0)
        shoot(page, out / "live-dark.png")
        shoot(phone, out / "live-phone.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
