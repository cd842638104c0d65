"""`relay serve --seafile-conf-dir DIR` and `notif_server.sh`, as an administrator uses them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clients import until
from tests.support.relay import ROOT, RelayProcess
from tests.support.seafile import KEY, followed, new_library, seafile
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
SCRIPT = ROOT / "scripts" / "notif_server.sh"


def conf_dir(folder: Path, port: int, *, enabled: str = "true", key: str = KEY) -> Path:
    """As the manual prints it, but for the port."""
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


async def test_the_folder_is_all_it_takes(valkey: Server, tmp_path: Path) -> None:
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


async def test_the_first_manuals_files_as_printed(valkey: Server, tmp_path: Path) -> None:
    """But for the port: the shared token for the server, tokens of the key for its clients."""
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


async def test_the_environment_of_12_and_13_is_all_it_takes(valkey: Server) -> None:
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
            # The database is not there: the group is nobody.
            assert (await client.next())["type"] == "repo-update"
    finally:
        process.kill()


async def test_enabled_false_says_so_and_serves_nothing(valkey: Server, tmp_path: Path) -> None:
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
    command = [sys.executable, "-m", "relay", "checkconfig", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_wrong_is_one_line_that_names_the_place(tmp_path: Path) -> None:
    folder = conf_dir(tmp_path / "conf", 99999)
    done = relay_with("--seafile-conf-dir", str(folder))
    assert done.returncode == 1
    assert "seafile.conf [notification] port = 99999" in done.stderr
    done = relay_with("--seafile-conf-dir", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "has none of seafile.conf" in done.stderr
    done = relay_with(NOTIFICATION_SERVER_PORT="x", JWT_PRIVATE_KEY=KEY)
    assert done.returncode == 1
    assert "environment variable NOTIFICATION_SERVER_PORT" in done.stderr
    assert KEY not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_start_status_restart_stop(tmp_path: Path) -> None:
    """With the embedded Valkey, as on a machine that has nothing else."""
    port, own, inside = free_port(), free_port(), free_port()
    folder = conf_dir(tmp_path / "seafile" / "conf", port)
    variables = {"NOTIF_SERVER_OPTIONS": f"--port {own} --set redis.embedded_port={inside}"}

    def run(action: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, action, folder],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def pid() -> int:
        return int((tmp_path / "seafile" / "pids" / "notification-server.pid").read_text())

    try:
        assert run("status").returncode == 3
        started = run("start")
        assert (started.returncode, started.stdout) == (0, "Notification server started.\n"), (
            started
        )
        first = pid()
        assert run("status").stdout == f"Notification server is running, process {first}.\n"
        assert "already running" in run("start").stdout
        assert run("restart").returncode == 0
        assert pid() != first
        assert run("stop").stdout == "Notification server stopped.\n"
        assert run("status").returncode == 3
        assert run("stop").returncode == 0
        (folder / "seafile.conf").write_text("[notification]\nport = x\njwt_private_key = k\n")
        failed = run("start")
        assert failed.returncode == 1
        assert "seafile.conf [notification] port = x" in failed.stderr
        assert run("dance").returncode == 2
    finally:
        run("stop")
