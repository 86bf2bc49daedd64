"""One server in this process for all tests of the HTTP API, the same model offline, and a browser for the live page."""

from collections.abc import Iterator

import pytest

from pagebrain import LLM
from tests.server.support_browser import Browser, OpenPage, chromium, pages
from tests.server.support_in_process import SETTINGS, ServerThread

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('developers have no say here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def api() -> Iterator[ServerThread]:
    """A server of the bundled model in float64, with a chat template."""
    with ServerThread(chat_template=CHAT_TEMPLATE) as server:
        yield server


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same model and settings without a server."""
    return LLM(**SETTINGS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for the tests of one file."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """What opens the live page of a server; every page must end without a problem."""
    with pages(browser) as open_page:
        yield open_page
