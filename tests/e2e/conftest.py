"""Shared fixtures: one complete command-line run, from a folder of texts to an index, and a headless browser."""

from __future__ import annotations

import shutil
from urllib.parse import urlsplit

import pytest

from e2e.command_line import succeed_with_report, write_data, write_recipe
from tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Models, data and a recipe, shared by the session: a test that changes them must work on a copy."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "encoder", "bert")
    write_tiny_model(folder / "decoder", "llama")
    write_data(folder / "everyday")
    write_recipe(folder / "tiny.toml", folder, folder / "everyday")
    return folder


@pytest.fixture(scope="session")
def reports(workspace):
    """Runs mine, tune-teacher, label and distill in order; returns the report of each step."""
    arguments = (workspace / "tiny.toml", "--out", workspace / "run", "--dtype", "float32")
    step_reports = {}
    for verb in ("mine", "tune-teacher", "label", "distill"):
        result, step_reports[verb] = succeed_with_report(verb, *arguments, folder=workspace)
        assert result.stdout == ""  # progress messages go to standard error
        assert f"{verb}: " in result.stderr
    return step_reports


@pytest.fixture(scope="session")
def index(workspace, reports):
    arguments = (workspace / "everyday", "--student", workspace / "run" / "student", "--out", workspace / "index")
    _, report = succeed_with_report("encode", *arguments, "--dtype", "float32", folder=workspace)
    assert report["result"]["num_passages"] == 60
    assert report["arguments"]["dtype"] == "float32"
    return workspace / "index"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that makes no network requests of its own.

    Scoped to the module, because Playwright leaves an event loop in this thread and other tests then cannot start one.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'd2llm[dev]'")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("needs Chromium, and there is no chromium, chromium-browser or google-chrome to be found")
    flags = (
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    with playwright.sync_playwright() as driver:
        # Playwright starts the browser with a fresh, empty profile.
        chromium = driver.chromium.launch(executable_path=executable, args=flags, chromium_sandbox=False)
        yield chromium
        chromium.close()


class Tabs:
    """Pages for several tests, one after the other: a new page starts a process, which costs more than most tests."""

    def __init__(self, browser):
        self._browser = browser
        self._idle = []
        self._open = []

    def open(self, address, *, width, colours, listeners):
        """Load an address in a page without history, storage or listeners other than these, by event."""
        if self._idle:
            page = self._idle.pop()
        else:
            page = self._browser.new_context().new_page()
            page.set_default_timeout(60_000)
        self._open.append((page, listeners))
        for event, listener in listeners.items():
            page.on(event, listener)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=colours, media="null", reduced_motion="null")
        page.mouse.move(0, 0)
        page.goto(address)
        return page

    def clear(self):
        """Leave the open pages, which the next test then gets."""
        while self._open:
            page, listeners = self._open.pop()
            page.unroute_all(behavior="ignoreErrors")
            if page.url.startswith("http"):
                page.evaluate("localStorage.clear(); sessionStorage.clear()")
            for event, listener in listeners.items():
                page.remove_listener(event, listener)
            page.goto("about:blank")
            self._idle.append(page)


@pytest.fixture(scope="module")
def tabs(browser):
    return Tabs(browser)


@pytest.fixture
def visit(tabs):
    """Opens pages; at teardown, fails if one contacted another host, logged to the console or raised an error."""
    hosts, hosts_allowed, complaints, allowed = set(), {""}, [], []
    listeners = {
        "request": lambda request: hosts.add(urlsplit(request.url).netloc),
        "console": lambda message: complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "dialog": lambda dialog: (complaints.append(dialog.message), dialog.dismiss()),
    }

    def open_page(address, width=1280, colours="light", expected=(), ready=True):
        allowed.extend(expected)
        hosts_allowed.add(urlsplit(address).netloc)
        page = tabs.open(address, width=width, colours=colours, listeners=listeners)
        if ready:
            page.wait_for_selector("#facts div", state="attached", timeout=60_000)
        return page

    yield open_page
    tabs.clear()
    assert [text for text in complaints if not any(part in text for part in allowed)] == []
    assert hosts <= hosts_allowed
