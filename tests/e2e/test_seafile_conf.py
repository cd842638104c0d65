"""`relay serve --seafile-conf-dir DIR` and `notif_server.sh`, as an administrator uses them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.cli import run_here
from tests.support.clients import until
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import KEY, followed, new_library, seafile
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
SCRIPT = ROOT / "scripts" / "notif_server.sh"


def conf_dir(folder: Path, port: int, *, enabled: str = "true", key: str = KEY) -> Path:
    """Return a folder with the file of the manual, with another port."""
    folder.mkdir(parents=True)
    (folder / "seafile.conf").write_text(
        "# jwt_private_key are required.You should generate it manually.\n[notification]\n"
        f"enabled = {enabled}\n# the ip of notification server.\nhost = 127.0.0.1\n"
        f"# the port of notification server\nport = {port}\nlog_level = info\n"
        f"jwt_private_key = {key}\n"
    )
    return folder


def plain(valkey: Server, *flags: str) -> RelayProcess:
    return RelayProcess(valkey, flags=flags)


async def test_the_folder_is_enough(valkey: Server, tmp_path: Path) -> None:
    port = free_port()
    process = plain(valkey, "--seafile-conf-dir", str(conf_dir(tmp_path / "conf", port)))
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process, port) as door:
            client = await followed(door, library)
            await door.commit(library, "c")
            assert (await client.next())["type"] == "repo-update"
    finally:
        process.kill()


TOKEN = "xP7GGgGPVCQu8r0xNJ+k4Q=="
FIRST = {
    "seafile.conf": f"""\
## seafile.conf
# notification_token and private_key are required.You should generate them manually.
[notification]
# notification_url is the url of notification server
notification_url = 127.0.0.1:8083
notification_token = {TOKEN}
# private_key is used to generate jwt token
private_key = {KEY}
""",
    "notification.conf": f"""\
## notification.conf
# private_key and notification_token are required.You should generate them manually.
# private_key and notification_token should be the same as configured in seafile.conf.
[general]
# the ip of notification server
host = 127.0.0.1
# the port of notification server
port = 8083
# the log level of notification server
log_level = info
# notification_token is used to simply authenticate seafile server
notification_token = {TOKEN}
# private_key is used to check whether the request jwt token is valid
private_key = "{KEY}
""",
}


async def test_the_files_of_the_first_manual(valkey: Server, tmp_path: Path) -> None:
    """As printed, with another port: a shared token for the server, signed ones for clients."""
    port = free_port()
    for name, text in FIRST.items():
        (tmp_path / name).write_text(text.replace("8083", str(port)))
    process = plain(valkey, "--seafile-conf-dir", str(tmp_path))
    await asyncio.to_thread(process.start)
    library = new_library()
    headers = {"Seafile-Repo-Token": TOKEN}
    try:
        async with seafile(process, port) as door:
            client = await followed(door, library)
            content = {"repo_id": library, "commit_id": "c"}
            assert (await door.post("repo-update", content, **headers)).status == 200
            assert (await client.next())["content"] == content
    finally:
        process.kill()


async def test_the_variables_of_12_and_13_are_enough(valkey: Server) -> None:
    port = free_port()
    variables = [
        f"JWT_PRIVATE_KEY={KEY}",
        f"NOTIFICATION_SERVER_PORT={port}",
        "NOTIFICATION_SERVER_HOST=127.0.0.1",
        "NOTIFICATION_SERVER_LOG_LEVEL=debug",
        "SEAFILE_MYSQL_DB_HOST=127.0.0.1",
        "SEAFILE_MYSQL_DB_PORT=1",
        "SEAFILE_MYSQL_DB_USER=seafile",
        "SEAFILE_MYSQL_DB_PASSWORD=none",
        "SEAFILE_MYSQL_DB_CCNET_DB_NAME=ccnet_db",
        "SEAFILE_MYSQL_DB_SEAFILE_DB_NAME=seafile_db",
    ]
    process = RelayProcess(valkey, prefix=["env", *variables])
    await asyncio.to_thread(process.start)
    library = new_library()
    try:
        async with seafile(process, port) as door:
            client = await followed(door, library)
            content = {"repo_id": library, "path": "/x", "user": "", "group": 7}
            assert (await door.post("folder-perm-changed", content)).status == 200
            await door.commit(library, "c")
            # The database is unreachable, so that the group has no members.
            assert (await client.next())["type"] == "repo-update"
    finally:
        process.kill()


async def test_enabled_false_is_logged_and_disables_the_protocol(
    valkey: Server, tmp_path: Path
) -> None:
    port = free_port()
    folder = conf_dir(tmp_path / "conf", port, enabled="false")
    process = plain(valkey, "--seafile-conf-dir", str(folder))
    await asyncio.to_thread(process.start)
    try:
        await until(lambda: any("enabled = false" in line for line in process.log))
        with pytest.raises(OSError, match="refused|failed"):
            async with seafile(process, port) as door:
                await door.request("GET", "/ping")
        async with seafile(process) as door:
            assert (await door.request("GET", "/ping")).status == 404
    finally:
        process.kill()


def relay_with(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_here(["checkconfig", *arguments], variables)


def test_an_error_is_one_line_with_file_and_section(tmp_path: Path) -> None:
    folder = conf_dir(tmp_path / "conf", 99999)
    done = relay_with("--seafile-conf-dir", str(folder))
    assert done.returncode == 1
    assert "seafile.conf [notification] port = 99999" in done.stderr
    done = relay_with("--seafile-conf-dir", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "contains none of seafile.conf" in done.stderr
    done = relay_with(NOTIFICATION_SERVER_PORT="x", JWT_PRIVATE_KEY=KEY)
    assert done.returncode == 1
    assert "environment variable NOTIFICATION_SERVER_PORT" in done.stderr
    assert KEY not in done.stderr


class Script:
    """`notif_server.sh` in a folder like Seafile's, with the embedded Valkey."""

    def __init__(self, top: Path, *, enabled: str = "true", key: str = KEY) -> None:
        self.port = free_port()
        self.conf = conf_dir(top / "conf", self.port, enabled=enabled, key=key)
        self.log = top / "logs" / "notification-server.log"
        self._pid_file = top / "pids" / "notification-server.pid"
        self._options = f"--port {free_port()} --set redis.embedded_port={free_port()}"

    def run(self, action: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, action, self.conf],
            env={**os.environ, "NOTIF_SERVER_OPTIONS": self._options},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def pid(self) -> int:
        return int(self._pid_file.read_text())

    def processes(self) -> list[str]:
        """Return the command lines of relays for this folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(path.read_bytes().replace(b"\0", b" ").decode())
        return [line for line in found if " relay serve " in line and str(self.conf) in line]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    one = Script(tmp_path / "sea file")
    yield one
    one.run("stop")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_start_status_restart_stop(script: Script) -> None:
    run = script.run
    assert run("status").returncode == 3
    started = run("start")
    assert (started.returncode, started.stdout) == (0, "Notification server started.\n"), started
    first = script.pid()
    assert run("status").stdout == f"Notification server is running, process {first}.\n"
    assert "already running" in run("start").stdout
    assert run("restart").returncode == 0
    assert script.pid() != first

    # Like logrotate.
    moved = script.log.rename(script.log.with_suffix(".1"))
    os.kill(script.pid(), signal.SIGUSR1)
    wait_for(script.log.exists)
    assert run("stop").stdout == "Notification server stopped.\n"
    # The restart was before the rotation, the stop after it.
    assert [
        path.read_text().count("relay.process.app: Received a stop signal")
        for path in (moved, script.log)
    ] == [1, 1]

    assert run("status").returncode == 3
    assert run("stop").returncode == 0
    (script.conf / "seafile.conf").write_text("[notification]\nport = x\njwt_private_key = k\n")
    failed = run("start")
    assert failed.returncode == 1
    assert "seafile.conf [notification] port = x" in failed.stderr
    assert run("dance").returncode == 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Pong(BaseHTTPRequestHandler):
    """A server that answers `/ping` like Seafile's own notification server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"ret": "pong"}\n')

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


def test_the_start_fails_while_another_server_has_the_port(script: Script) -> None:
    with ThreadingHTTPServer(("127.0.0.1", script.port), Pong) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        failed = script.run("start")
        other.shutdown()
    assert failed.returncode == 1
    assert str(script.port) in failed.stderr
    assert "started" not in failed.stdout
    assert not script.processes()
    assert script.run("status").returncode == 3


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_the_start_fails_without_a_key_or_if_disabled(tmp_path: Path, enabled: str) -> None:
    script = Script(tmp_path / "seafile", enabled=enabled, key="")
    try:
        failed = script.run("start")
        assert failed.returncode == 1
        said = "[protocol:seafile] key" if enabled == "true" else "enabled = false"
        assert said in failed.stderr
        assert not script.processes()
    finally:
        script.run("stop")


def test_the_key_of_12_and_13_next_to_seafile_conf(tmp_path: Path) -> None:
    script = Script(tmp_path / "seafile", key="")
    (script.conf / ".env").write_text(f"JWT_PRIVATE_KEY={KEY}\n")
    try:
        assert script.run("start").stdout == "Notification server started.\n"
    finally:
        assert script.run("stop").returncode == 0


@pytest.mark.parametrize("text", ["", "-1", "not a number", "1"])
def test_a_stale_pid_file_is_ignored(script: Script, text: str) -> None:
    folder = script.conf.parent / "pids"
    folder.mkdir()
    (folder / "notification-server.pid").write_text(f"{text}\n")
    assert script.run("status").returncode == 3
    assert script.run("stop").stdout == "Notification server is not running.\n"
