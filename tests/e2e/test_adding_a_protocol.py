"""The files printed in docs/adding-a-protocol.md form a protocol that delivers events."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
PAGE = ROOT / "docs" / "adding-a-protocol.md"
FILES = dict(
    re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


def make_tree(root: Path) -> None:
    """Copy relay to `root` and add one folder to relay/protocols/."""
    protocols = root / "relay" / "protocols"
    protocols.mkdir(parents=True)
    for path in (ROOT / "relay").iterdir():
        if path.name != "protocols":
            (root / "relay" / path.name).symlink_to(path)
    for path in (ROOT / "relay" / "protocols").iterdir():
        (protocols / path.name).symlink_to(path)
    for name in ("producers", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    (protocols / "poll").mkdir()
    for name, text in FILES.items():
        (protocols / "poll" / name).write_text(text)


@pytest.fixture(scope="module")
def polled(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """Run a relay that serves the protocol of the document."""
    root = tmp_path_factory.mktemp("tree")
    make_tree(root)
    process = RelayProcess(valkey, settings=["protocol:poll.wait_s=60"], root=root).start()
    yield process
    process.kill()


def poll(relay: RelayProcess, **query: str) -> Any:
    query = {"token": relay.token("ann", ["news", "quiet", "*"]), **query}
    url = f"{relay.url}/poll?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url) as response:  # noqa: S310
        return json.load(response)


def test_the_page_has_the_files_of_a_folder() -> None:
    assert list(FILES) == ["__init__.py", "settings.py", "client.py", "routes.py"]


def test_events_arrive_in_order_at_once_and_later(polled: RelayProcess) -> None:
    first = poll(polled, channel="news")
    assert first["events"] == []
    ids = [polled.xadd("news", data=f'{{"n":{n}}}', type="chat") for n in (1, 2)]
    second = poll(polled, channel="news", after=first["position"])
    received = list(second["events"])
    if len(received) == 1:  # the second entry came after the response
        second = poll(polled, channel="news", after=second["position"])
        received += second["events"]
    assert received == [
        {"id": entry_id, "type": "chat", "data": {"n": n}}
        for n, entry_id in enumerate(ids, start=1)
    ]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(poll, polled, channel="news", after=second["position"])
        while connections(polled) == 0:
            time.sleep(0.02)
        entry_id = polled.xadd("news", data="text")
        assert waiting.result(30)["events"] == [{"id": entry_id, "data": "text"}]


def test_a_trimmed_stream_is_reported(polled: RelayProcess) -> None:
    polled.xadd("trimmed", data="1")
    first = poll(polled, channel="trimmed")
    for n in (2, 3, 4):
        polled.xadd("trimmed", data=str(n))
    polled.server.client("admin").xtrim("relay:stream:{trimmed}", maxlen=1, approximate=False)
    later = poll(polled, channel="trimmed", after=first["position"])
    assert later["events"][0] == {
        "notice": "gap",
        "reason": "trimmed",
        "channel": "trimmed",
    }


def test_what_may_not_be_read_is_rejected(polled: RelayProcess) -> None:
    for query, status in (
        ({"token": "bad", "channel": "news"}, 401),
        ({"token": polled.token("ann", ["other"]), "channel": "news"}, 403),
        ({"channel": ""}, 400),
        ({"channel": "news", "after": "nonsense"}, 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as raised:
            poll(polled, **query)
        assert raised.value.code == status
        raised.value.close()


def test_a_stop_ends_a_waiting_request(polled: RelayProcess) -> None:
    position = poll(polled, channel="quiet")["position"]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(poll, polled, channel="quiet", after=position)
        while connections(polled) == 0:
            time.sleep(0.02)
        polled.send(signal.SIGTERM)
        assert waiting.result(30)["events"] == []
        assert polled.ended() == 0
    polled.start()


def test_the_files_pass_the_checks_of_the_repository(tmp_path: Path) -> None:
    make_tree(tmp_path)
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["format", "--diff"], ["check", "--no-cache"]):
        done = subprocess.run(
            [ruff, *command, "relay/protocols/poll"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def connections(relay: RelayProcess) -> int:
    """Return the number of pending requests."""
    with urllib.request.urlopen(f"{relay.url}/metrics") as response:  # noqa: S310
        text = response.read().decode()
    found = re.search(r'^relay_connections\{[^}]*protocol="poll"[^}]*\} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0
