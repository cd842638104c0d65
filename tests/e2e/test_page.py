"""The live page in a real browser with a real relay."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from tests.support.browser import chromium
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

# A browser starts slowly while other tests use the machine.
pytestmark = [pytest.mark.timeout(90), pytest.mark.redis]
LIMIT_S = 30.0


class Page:
    """The page in the browser, with methods for the actions of a user."""

    def __init__(self, browser: Chrome, relay: RelayProcess) -> None:
        self.browser = browser
        self.relay = relay

    def visit(self, *channels: str, token: str | None = None) -> None:
        """Open the page in a new tab with a fragment, as `scripts/run` prints it."""
        given = [("token", self.relay.token() if token is None else token)]
        given += [("channel", channel) for channel in channels]
        # Leave the page first, because a changed fragment alone would not load it again.
        self.browser.get("about:blank")
        self.browser.get(f"{self.relay.url}/#{urlencode(given)}")

    def text(self, css: str) -> str:
        """Return the visible text."""
        shown = self.browser.execute_script(
            "return document.querySelector(arguments[0]).innerText", css
        )
        return str(shown)

    def click(self, name: str) -> None:
        """Click the button with this ID."""
        self.browser.find_element(By.ID, name).click()

    def script(self, source: str) -> Any:
        """Run a script in the page."""
        return self.browser.execute_script(source)

    def data(self) -> list[str]:
        """Return the events' data, oldest first."""
        found: list[str] = self.script(
            "return [...document.querySelectorAll('#events tbody pre')].map(p => p.textContent)"
        )
        return found[::-1]

    def until(self, true: Callable[[], object], what: str) -> None:
        """Wait for a condition. A failure contains the text of the page."""
        end = time.monotonic() + LIMIT_S
        while not true():
            if time.monotonic() > end:
                pytest.fail(f"not {what}: {self.text('body')}")
            time.sleep(0.05)

    def until_state(self, pattern: str) -> None:
        """Wait for the state at the top of the page."""
        self.until(lambda: re.search(pattern, self.text("#state")), pattern)

    def until_data(self, expected: list[str]) -> None:
        """Wait for exactly these events, in order."""
        self.until(lambda: len(self.data()) >= len(expected), f"{len(expected)} events")
        assert self.data() == expected

    def append(self, channel: str, numbers: range) -> list[str]:
        """Append events and return their data."""
        data = [json.dumps({"n": n}, separators=(",", ":")) for n in numbers]
        for text in data:
            self.relay.xadd(channel, data=text)
        return data


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Run one browser for all tests of the file."""
    profile: Path = tmp_path_factory.mktemp("chromium")
    with chromium(profile) as chrome:
        yield chrome


@pytest.fixture
def page(browser: Chrome, relay: RelayProcess) -> Iterator[Page]:
    """Open the page for each test. It must not violate the content security policy or throw."""
    browser.get(f"{relay.url}/live/icon.svg")
    browser.execute_script("sessionStorage.clear()")
    browser.get_log("browser")  # type: ignore[no-untyped-call]
    yield Page(browser, relay)
    console: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    # Rejections and a killed relay cause failed requests. No other messages are allowed.
    bad = [line["message"] for line in console if "Failed to load resource" not in line["message"]]
    assert bad == []


def test_events_arrive_with_all_that_they_say(page: Page) -> None:
    """The page shows type, client, text with line breaks, and an integer too large for a double."""
    page.visit("p:arrive")
    page.until_state("^Connected$")
    page.relay.xadd("p:arrive", data='{"n":\n12345678901234567890}', type="article", client="c7")
    page.relay.xadd("p:arrive", data="<b>two</b>\nlines")
    page.until_data(['{"n":12345678901234567890}', "<b>two</b>\nlines"])
    first = page.text("#events tbody tr:last-child")
    for part in ("p:arrive", "article", "c7"):
        assert part in first


def test_drop_append_reconnect_shows_exactly_what_was_missed(page: Page) -> None:
    """Test with one channel and with two channels."""
    for channels in (["p:drop"], ["p:drop1", "p:drop2"]):
        page.visit(*channels)
        page.until_state("^Connected$")
        seen = page.append(channels[0], range(3))
        page.until_data(seen)
        page.click("drop")
        page.until_state("^Disconnected at ")
        missed = page.append(channels[-1], range(3, 8))
        time.sleep(0.3)
        assert page.data() == seen
        page.click("reconnect")
        page.until_data(seen + missed)
        assert "Resumed" in page.text("#notices")


def test_a_drop_before_the_first_event_loses_nothing(page: Page) -> None:
    """Browsers pass no ID of a block without data to scripts, so relay:open contains it."""
    page.visit("p:early")
    page.until(lambda: page.text("#positions tbody").strip(), "positions")
    page.until_state("^Connected$")
    page.click("drop")
    missed = page.append("p:early", range(2))
    page.click("reconnect")
    page.until_data(missed)


def test_a_reload_resumes(page: Page) -> None:
    """Events that are appended during a reload arrive afterwards."""
    page.visit("p:reload")
    page.until_state("^Connected$")
    page.until_data(page.append("p:reload", range(2)))
    page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/sse*"]})
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.refresh()
    missed = page.append("p:reload", range(2, 5))
    page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.until_data(missed)
    assert "Resumed" in page.text("#notices")
    # A disconnected page stays disconnected.
    page.click("drop")
    page.browser.refresh()
    page.until_state("^Disconnected at ")


def test_the_token_does_not_stay_in_the_address(page: Page) -> None:
    """A user who copies the URL would share the token."""
    page.visit("p:address")
    page.until_state("^Connected$")
    assert page.browser.current_url.endswith("#channel=p%3Aaddress")


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_server_restart_loses_and_repeats_nothing(page: Page, how: str) -> None:
    """Test with SIGTERM and SIGKILL. EventSource reconnects without code of the page."""
    channels = (f"p:{how}:a", f"p:{how}:b")
    page.visit(*channels)
    page.until_state("^Connected$")
    seen = page.append(channels[0], range(3))
    page.until_data(seen)
    (page.relay.stop if how == "restart" else page.relay.kill)()
    page.until_state("econnect")
    missed = page.append(channels[1], range(3, 8))
    page.relay.start()
    page.until_data(seen + missed)
    page.until_state("^Connected$")
    after = page.append(channels[0], range(8, 10))
    page.until_data(seen + missed + after)


def test_a_revocation_is_shown(page: Page, valkey: Server) -> None:
    """An operator revokes one channel. Events of the other channel still arrive."""
    page.visit("p:taken", "p:kept", token=page.relay.token("bob"))
    page.until_state("^Connected$")
    revoke = [sys.executable, "-m", "relay", "revoke", "--redis", valkey.url("admin")]
    subprocess.run([*revoke, "p:taken", "bob"], check=True, cwd=ROOT, capture_output=True)
    page.until(lambda: "Revoked on p:taken" in page.text("#notices"), "told")
    page.append("p:taken", range(1))
    page.until_data(page.append("p:kept", range(1, 3)))
    assert "(revoked)" in page.text("#positions")


def test_an_expired_token_is_shown(page: Page) -> None:
    """The page does not retry."""
    # A busy machine may connect only after the token has expired. Then the channel is not named.
    for ttl_s in (3, 10, 25):
        page.visit("p:expired", token=page.relay.token("bob", ["p:expired"], ttl_s=ttl_s))
        page.until_state("expired")
        if "p:expired" in page.text("#notices"):
            return
    pytest.fail(page.text("body"))


def test_the_policy_is_at_work(page: Page) -> None:
    """Check that violations appear in the console, because other tests rely on an empty one."""
    page.visit("p:policy")
    page.until_state("^Connected$")
    page.script("document.body.append(Object.assign(document.createElement('script'), {text: 1}))")
    console: list[dict[str, str]] = []

    def has_violation() -> bool:
        console.extend(page.browser.get_log("browser"))  # type: ignore[no-untyped-call]
        return any("Content Security Policy" in line["message"] for line in console)

    page.until(has_violation, "a violation")


def test_a_refusal_says_why(page: Page) -> None:
    """EventSource does not report the reason, so the page requests it separately."""
    page.visit("p:bad", token="bad")
    page.until_state("^Rejected: .*token")
    assert "unauthorized" in page.text("#notices")
    page.visit("p:other", token=page.relay.token("bob", ["p:bad"]))
    page.until_state("^Rejected: ")
    assert "p:other" in page.text("#notices")


def test_a_gap_is_shown(page: Page, valkey: Server) -> None:
    """Entries were trimmed while the page was disconnected."""
    page.visit("p:gap")
    page.until_state("^Connected$")
    seen = page.append("p:gap", range(2))
    page.until_data(seen)
    page.click("drop")
    kept = page.append("p:gap", range(2, 6))[-1:]
    valkey.client().execute_command(  # type: ignore[no-untyped-call]
        "XTRIM", "relay:stream:{p:gap}", "MAXLEN", "1"
    )
    page.click("reconnect")
    page.until_data(seen + kept)
    assert "Gap on p:gap" in page.text("#notices")
    assert "trimmed" in page.text("#notices")


def test_rows_are_bounded(page: Page) -> None:
    """After a burst, the page shows the newest 500 events and the total number."""
    page.visit("p:burst")
    page.until_state("^Connected$")
    sent = page.append("p:burst", range(700))
    page.until(lambda: page.text("#count").startswith("700"), "700 counted")
    assert page.data() == sent[-500:]
    page.click("clear")
    assert page.data() == []


def test_keyboard_and_names(page: Page) -> None:
    """Every control has a name, can be reached with Tab in visual order, and shows the focus."""
    page.visit("p:keys")
    page.until_state("^Connected$")
    assert page.script("return [...document.querySelectorAll('input')].every(i => i.labels.length)")
    page.script("document.activeElement.blur(); scrollTo(0, 0)")
    order = []
    for _ in range(5):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        order.append(page.script("return document.activeElement.id"))
        width = page.script("return getComputedStyle(document.activeElement).outlineWidth")
        assert width == "3px", order
    assert order == ["channels", "token", "connect", "drop", "clear"]
    # A button that is disabled when it is clicked must not lose the focus.
    page.script("document.getElementById('drop').focus()")
    ActionChains(page.browser).send_keys(Keys.ENTER).perform()
    page.until_state("^Disconnected")
    assert page.script("return document.activeElement.id") == "reconnect"


def test_notices_are_read_out_and_events_are_not(page: Page) -> None:
    """If events were in a live region, a screen reader would read continuously."""
    page.visit("p:aria")
    page.until_state("^Connected$")
    live = page.script(
        "return [...document.querySelectorAll('[aria-live],[role=status],[role=log]')]"
        ".map(e => e.id)"
    )
    assert live == ["state-text", "notices"]
    assert page.script("return document.documentElement.lang") == "en"
    assert page.script("return document.querySelectorAll('h1').length") == 1


_CONTRAST = """
const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const back = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const worst = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('input');
  if (!own || !e.offsetParent || e.disabled) continue;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) worst.push(e.tagName + ' ' + e.className + ' ' + e.innerText);
}
return worst;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_320_px(page: Page, scheme: str) -> None:
    """Text has WCAG AA contrast (4.5:1), and a small phone needs no horizontal scrolling."""
    cdp: Callable[[str, dict[str, Any]], Any] = page.browser.execute_cdp_cmd
    wanted = {
        "features": [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
    }
    cdp("Emulation.setEmulatedMedia", wanted)
    phone = {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    try:
        page.visit("p:look", "p:look:" + "long" * 40)
        page.until_state("^Connected$")
        page.relay.xadd("p:look", data="x" * 400, type="article", client="c")
        page.until(page.data, "an event")
        page.click("drop")
        page.click("reconnect")
        page.until(lambda: "Resumed" in page.text("#notices"), "resumed")
        assert page.script(_CONTRAST) == []
        cdp("Emulation.setDeviceMetricsOverride", phone)
        assert page.script("return document.documentElement.scrollWidth") <= 320
        page.visit("p:look", token="bad")
        page.until_state("^Rejected: ")
        assert page.script(_CONTRAST) == []
    finally:
        cdp("Emulation.clearDeviceMetricsOverride", {})
        cdp("Emulation.setEmulatedMedia", {"features": []})
