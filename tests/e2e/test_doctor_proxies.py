"""`relay doctor --url` with a real nginx whose locations have one fault each."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator

import pytest

from producers.registry import producer_settings
from relay.config.loading import Config, load
from relay.process.doctor import proxy_checks
from relay.process.doctor.finding import Finding
from relay.protocols import door_settings
from tests.support.nginx import nginx
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

SECRET = "another key that is long enough"
SETTINGS = [
    f"protocol:centrifugo.secret={SECRET} 1",
    f"protocol:seafile.key={SECRET} 2",
    f"protocol:socketio.secret={SECRET} 3",
    f"protocol:pydio.key={SECRET} 4",
    # Nobody listens there: Pydio cannot be asked.
    "protocol:pydio.auth_url=http://127.0.0.1:9/pydio/?get_action=ws_authenticate",
    "protocol:native.heartbeat_s=3",
    "protocol:socketio.ping_interval_s=3",
]
GOOD = """
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
    proxy_set_header Host $http_host;
    proxy_read_timeout 120s;
"""
LOCATIONS = {
    "good": GOOD,
    "noupgrade": "proxy_set_header Host $http_host;",
    "buffered": f"{GOOD} proxy_ignore_headers X-Accel-Buffering; proxy_buffering on;",
    "host": GOOD.replace("$http_host", "relay"),
    "short": GOOD.replace("120s", "1s"),
}
RECIPE = """
map $http_upgrade $connection_upgrade { default upgrade; '' close; }
upstream relay { server 127.0.0.1:8000; }
upstream nobody { server 127.0.0.1:8001; }
server {
    listen 80;
    location /away/ { proxy_pass http://nobody/; }
    location /only/sse { proxy_pass http://relay/sse; GOOD }
    location /only/ws { proxy_pass http://relay/ws; GOOD }
    location = /only/ { return 200 "hello"; }
    LOCATIONS
}
"""


@pytest.fixture(scope="module")
def site(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Config]]:
    relay = RelayProcess(valkey, settings=SETTINGS).start()
    locations = "".join(
        f"location /{name}/ {{ proxy_pass http://relay/; {lines} }}\n"
        for name, lines in LOCATIONS.items()
    )
    recipe = RECIPE.replace("LOCATIONS", locations).replace("GOOD", GOOD)
    folder = tmp_path_factory.mktemp("nginx")
    config = load(
        None,
        environ={},
        overrides=[f"redis.url={valkey.url('relay')}", f"jwt.key={KEY}", *SETTINGS],
        flags={},
        doors=door_settings(),
        producers=producer_settings(),
    )
    try:
        with nginx(folder, recipe, {8000: relay.port, 8001: free_port()}) as url:
            yield url, config
    finally:
        relay.kill()


async def found(site: tuple[str, Config], location: str) -> dict[str, list[Finding]]:
    by_name: dict[str, list[Finding]] = {}
    for each in await proxy_checks.check(site[1], f"{site[0]}/{location}/"):
        assert each.what
        assert each.why
        assert each.fix
        by_name.setdefault(each.name, []).append(each)
    return by_name


async def test_each_fault_is_named(
    site: tuple[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests may keep the processors busy.
    monkeypatch.setattr(proxy_checks, "_ANSWER_S", 10.0)
    monkeypatch.setattr(proxy_checks, "_LATE_S", 10.0)
    names = ["good", "noupgrade", "buffered", "host", "short", "away", "only"]
    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(found(site, name)) for name in names}
    by = {name: task.result() for name, task in tasks.items()}
    assert by["good"] == {}
    sockets = by["noupgrade"]["proxy.websocket"]
    for path in ("/ws", "/connection/websocket", "/notification", "/public", "/notifications/"):
        assert any(f"{path} " in each.what or f"{path}?" in each.what for each in sockets), path
    assert all("proxy_set_header Upgrade" in each.fix for each in sockets)
    assert set(by["buffered"]) == {"proxy.sse_buffering"}
    assert "proxy_buffering off" in by["buffered"]["proxy.sse_buffering"][0].fix
    assert set(by["host"]) == {"proxy.host"}
    assert {
        each.fix.partition("[protocol:")[2].partition("]")[0] for each in by["host"]["proxy.host"]
    } == {
        "native",
        "pydio",
    }
    assert set(by["short"]) == {"proxy.idle_timeout", "proxy.polling"}
    assert {"/sse" in each.what for each in by["short"]["proxy.idle_timeout"]} == {True, False}
    assert set(by["away"]) == {"proxy.unreachable"}
    missing = " ".join(each.what for each in by["only"]["proxy.path"])
    for path in ("/connection/info", "/notification/ping", "/public", "/notifications/"):
        assert path in missing


async def test_the_command_line_reports_it_as_json(valkey: Server) -> None:
    words = ["doctor", "--json", "--url", f"http://127.0.0.1:{free_port()}/"]
    words += ["--redis", valkey.url("relay"), "--set", f"jwt.key={KEY}"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", *words),
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    text, _ = await process.communicate()
    assert process.returncode == 1
    findings = [json.loads(line) for line in text.splitlines()]
    assert findings[0]["name"] == "proxy.unreachable"
    assert findings[0].keys() == {"level", "area", "name", "what", "why", "fix"}
