"""Hand the listening sockets of a running relay to a newly started one.

    old relay ── starts ──> new relay      the same command line, with the code installed now
              ── sockets ─>                and the locked PID file and folder of the embedded Valkey
              <── ready ───                the new relay accepts connections
              ── go ──────>                the new relay is the one to send signals to
    asks its clients to reconnect, and ends

Both have the same sockets, so no connection is refused or lost at any time. If the new relay cannot
start, the old one continues and logs the reason.

This module contains both sides. systemd passes sockets in another way (`LISTEN_FDS`,
sd_listen_fds(3)).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.core.errors import RelayError, StartError
from relay.process import logs
from relay.process.pid_file import outcome_path, write_pid
from relay.process.service_manager import notify
from relay.process.start_signals import hold_signals
from relay.transports.socket.inherited import InheritedSocket, InheritedSockets

if TYPE_CHECKING:
    from relay.core.worker_memory import Worker
    from relay.process.embedded import EmbeddedValkey

_log = logging.getLogger(__name__)

# The control socket and the standard error of the old relay.
_VARIABLE = "_RELAY_HANDOVER"
PID_FILE, VALKEY = "pid file", "valkey"
READY_S = 120.0
STARTED_S = 30.0
_GO_S = 5.0
# The kernel passes at most 253 descriptors in one message.
_AT_ONCE = 200
_MESSAGE_BYTES = 65536
# Limit for the reason of a failure, which must fit into one message.
_LINE_CHARS = 2000
_FIRST_SYSTEMD_SOCKET = 3
_OTHER = "other"
_UNREADABLE = "the new relay sent a message that this version cannot read"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


# ---- messages -----------------------------------------------------------------------------------


def send_sockets(control: socket.socket, sockets: Sequence[InheritedSocket]) -> None:
    """Send listening sockets in one or more messages. The last one has `end`."""
    left = iter(sockets)
    while True:
        batch = list(islice(left, _AT_ONCE))
        is_end = len(batch) < _AT_ONCE
        values = {"sockets": [[each.name, each.held] for each in batch], "end": is_end}
        descriptors = [each.socket.fileno() for each in batch]
        socket.send_fds(control, [json.dumps(values).encode()], descriptors)
        if is_end:
            return


def _read(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, _AT_ONCE)
    values = json.loads(message) if message else {}
    # Another version may send anything.
    return values if isinstance(values, dict) else {_OTHER: values}, descriptors


def _sockets(values: dict[str, Any], descriptors: Sequence[int]) -> list[InheritedSocket]:
    found = zip(values.get("sockets", ()), descriptors, strict=False)
    return [
        InheritedSocket(socket.socket(fileno=descriptor), name, held)
        for (name, held), descriptor in found
    ]


def discard_sockets(control: socket.socket) -> None:
    """Close the sockets that have arrived too late for an earlier attempt."""
    with contextlib.suppress(BlockingIOError):
        while (message := _read(control))[0]:
            for each in _sockets(*message):
                each.socket.close()


async def receive_sockets(control: socket.socket, senders: int) -> list[InheritedSocket]:
    """Receive sockets on a non-blocking socket until `senders` processes have sent theirs."""
    found: list[InheritedSocket] = []
    while senders:
        await _readable(control)
        with contextlib.suppress(BlockingIOError):
            values, descriptors = _read(control)
            found += _sockets(values, descriptors)
            senders -= bool(values.get("end", True))
    return found


async def wait_started(started: asyncio.Event) -> None:
    """Wait until this relay has opened its listeners. Raise StartError if that takes too long."""
    try:
        async with asyncio.timeout(STARTED_S):
            await started.wait()
    except TimeoutError:
        raise StartError(
            f"process {os.getpid()} is still starting after {STARTED_S:g} s; see its log"
        ) from None


async def _readable(control: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def found() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(control.fileno(), found)
    try:
        await readable
    finally:
        loop.remove_reader(control.fileno())


# ---- the new relay ------------------------------------------------------------------------------


class Inheritance:
    """Everything that this process has inherited. Empty after an ordinary start."""

    def __init__(
        self,
        sockets: Sequence[InheritedSocket] = (),
        files: Mapping[str, int] | None = None,
        control: socket.socket | None = None,
        *,
        from_systemd: bool = False,
    ) -> None:
        self.sockets = InheritedSockets(sockets)
        # Descriptors of locked files.
        self.files = dict(files or {})
        self.from_systemd = from_systemd
        self._control = control
        # The names of the files that this process uses.
        self.used: set[str] = set()

    @classmethod
    def of_worker(cls, worker: Worker) -> Inheritance:
        """Return the sockets that the supervisor of this worker has passed."""
        sockets = [
            InheritedSocket(socket.socket(fileno=descriptor), name, held)
            for descriptor, name, held in worker.inherited
        ]
        return cls(sockets)

    @classmethod
    def of_environment(cls) -> Inheritance:
        """Read and remove the variables of an old relay, or of systemd."""
        handover = os.environ.pop(_VARIABLE, "")
        if handover:
            return cls._of_relay(*map(int, handover.split(":")))
        count, pid = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
        names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
        if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,6}", count):
            return cls()
        sockets = []
        for index in range(int(count)):
            try:
                found = socket.socket(fileno=_FIRST_SYSTEMD_SOCKET + index)
            except OSError as exc:
                raise StartError(
                    f"LISTEN_FDS={count}: socket {index + 1} cannot be used: {exc.strerror}; start"
                    " relay by the socket unit, or without this variable"
                ) from None
            found.set_inheritable(False)
            name = names[index] if index < len(names) and _NAME.fullmatch(names[index]) else ""
            if found.family not in (socket.AF_INET, socket.AF_INET6) or not found.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            ):
                raise StartError(
                    f"LISTEN_FDS: socket {index + 1} is not a listening TCP socket;"
                    " use ListenStream=ADDRESS:PORT and Accept=no in the socket unit"
                )
            sockets.append(InheritedSocket(found, name, held=True))
        return cls(sockets, from_systemd=True)

    @classmethod
    def _of_relay(cls, control: int, error: int) -> Inheritance:
        # Until now, the old relay has read the standard error, which would name a broken import.
        os.dup2(error, 2)
        os.close(error)
        own = socket.socket(fileno=control)
        own.set_inheritable(False)
        sockets: list[InheritedSocket] = []
        files: dict[str, int] = {}
        while True:
            values, descriptors = _read(own)
            if "file" in values:
                files[values["file"]] = descriptors[0]
            sockets += _sockets(values, descriptors)
            if values.get("end", not values):
                break
        own.setblocking(False)
        return cls(sockets, files, own)

    @property
    def is_upgrade(self) -> bool:
        """Whether another relay has passed the sockets and still serves."""
        return self._control is not None

    def file(self, name: str, path: Path) -> int | None:
        """Return the descriptor of a locked file if it is the one at `path`."""
        descriptor = self.files.get(name)
        if descriptor is None or not path.exists():
            return None
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return None
        self.used.add(name)
        return descriptor

    def locked(self, valkey: EmbeddedValkey | None) -> dict[str, int]:
        """Return the descriptors of this relay's locked files, for the next one."""
        files = {PID_FILE: self.files[PID_FILE]} if PID_FILE in self.files else {}
        if valkey is not None and valkey.lock is not None:
            files[VALKEY] = valkey.lock
        return files

    def failed(self, exc: BaseException) -> bool:
        """Report to the old relay why this one cannot start. Return False if there is none."""
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        text = str(exc) if isinstance(exc, RelayError) else repr(exc)
        self._send({"failed": logs.redact(" ".join(text.split()))[:_LINE_CHARS]})
        return self._control is not None

    async def take_over(self, pid_path: str) -> None:
        """Let the old relay stop, if there is one, and take over its PID file.

        Call this when the new relay serves.
        """
        if self._control is None:
            return
        self._send({"ready": sorted(self.used)})
        await _readable(self._control)
        if PID_FILE in self.used:
            try:
                write_pid(pid_path, self.files[PID_FILE])
            except StartError as exc:
                # The old relay has stopped accepting, so this one must serve.
                _log.error("%s", exc)
        self._control.close()
        self._control = None

    def _send(self, values: dict[str, Any]) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(json.dumps(values).encode())


@cache
def inheritance() -> Inheritance:
    """Return everything that this process has inherited."""
    return Inheritance.of_environment()


# ---- the old relay ------------------------------------------------------------------------------


class Upgrades:
    """Replaces this relay by a newly started one, on request."""

    def __init__(
        self,
        *,
        sockets: Callable[[], Awaitable[Sequence[InheritedSocket]]],
        files: Callable[[], Mapping[str, int]],
        handed_over: Callable[[set[str]], None],
        pid_file: str,
    ) -> None:
        """`handed_over` receives the names of the files that the new relay uses. From then on this
        relay must not end the new one."""
        self._sockets = sockets
        self._files = files
        self._handed_over = handed_over
        self._pid_file = pid_file
        self._requested = asyncio.Event()
        # Whether a new relay is being started, or has taken over.
        self._is_running = False
        self._is_stopping = False
        # Kept because Popen warns (ResourceWarning) if it is deleted while its process runs.
        self._successor: subprocess.Popen[bytes] | None = None

    def request(self) -> None:
        """Start a new relay soon, unless one is already being started or this one is stopping."""
        if self._is_stopping:
            self._reject_stopping()
        elif self._is_running:
            _log.warning("Ignored a request to upgrade: another process is already taking over")
        else:
            self._requested.set()

    async def run(self) -> None:
        """Wait for requests until a new relay has taken over, or until cancelled.

        If cancelled before that, the new relay is ended, and later requests are rejected. Don't
        cancel it after `handed_over`.
        """
        try:
            await self._run()
        except asyncio.CancelledError:
            self._is_stopping = True
            if self._is_running or self._requested.is_set():
                self._reject_stopping()
            raise

    def _reject_stopping(self) -> None:
        line = (
            f"Upgrade failed: process {os.getpid()} is stopping. Start relay again when it has"
            " ended."
        )
        _log.warning("%s", line)
        write_outcome(self._pid_file, line)

    async def _run(self) -> None:
        while True:
            await self._requested.wait()
            self._requested.clear()
            self._is_running = True
            try:
                pid = await self._replace()
            except (RelayError, OSError) as exc:
                self._is_running = False
                line = f"Upgrade failed: {exc}"
                _log.error("%s. This relay continues to serve.", line)
                write_outcome(self._pid_file, f"{line}. Process {os.getpid()} continues to serve.")
                continue
            _log.info("Process %d has taken over; this one asks its clients to reconnect", pid)
            notify(MAINPID=pid)
            write_outcome(self._pid_file, "")
            return

    async def _replace(self) -> int:
        """Start a new relay and let it take over. Return its process ID."""
        if os.getpid() == 1:
            # The container would stop with this process.
            raise StartError("relay is process 1 of a container; start another container instead")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                for name, descriptor in self._files().items():
                    socket.send_fds(ours, [json.dumps({"file": name}).encode()], [descriptor])
                send_sockets(ours, await self._sockets())
                process = await self._spawn(theirs)
            ours.setblocking(False)
            try:
                used = await self._wait_ready(process, ours)
                ours.send(b"{}")
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                if process.stderr is not None:
                    process.stderr.close()
            self._successor = process
            # In the same turn of the loop, so that no signal can stop both relays or none.
            self._handed_over(used)
            # It closes its end when the PID file has its process ID.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GO_S):
                    await _readable(ours)
            return process.pid

    @staticmethod
    async def _spawn(control: socket.socket) -> subprocess.Popen[bytes]:
        error = os.dup(2)

        def start() -> subprocess.Popen[bytes]:
            # For this thread and the new process, which releases them when it can handle them.
            hold_signals()
            # A child of asyncio would not outlive this process's event loop.
            return subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                stderr=subprocess.PIPE,
                pass_fds=(control.fileno(), error),
                env={**os.environ, _VARIABLE: f"{control.fileno()}:{error}"},
            )

        try:
            with ThreadPoolExecutor(1) as executor:
                starting = executor.submit(start)
                try:
                    return await asyncio.wrap_future(starting)
                except asyncio.CancelledError:
                    if not starting.cancelled():
                        # The thread cannot be interrupted, but this takes milliseconds only.
                        with contextlib.suppress(OSError), starting.result() as process:
                            process.kill()
                    raise
        finally:
            os.close(error)

    @staticmethod
    async def _wait_ready(process: subprocess.Popen[bytes], control: socket.socket) -> set[str]:
        _log.info("Started process %d to take over", process.pid)
        try:
            async with asyncio.timeout(READY_S):
                await _readable(control)
                values: dict[str, Any] = {}
                # It may have ended without reading the sockets.
                with contextlib.suppress(ConnectionError):
                    values, _ = _read(control)
                if "ready" in values:
                    return set(values["ready"])
                if "failed" in values:
                    raise StartError(values["failed"])
                if values:
                    raise StartError(_UNREADABLE)
                _, errors = await asyncio.to_thread(process.communicate)
        except TimeoutError:
            raise StartError(f"the new relay was not ready within {READY_S:g} s") from None
        except (ValueError, TypeError):
            raise StartError(_UNREADABLE) from None
        lines = errors.decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "see above")
        how = describe_exit(process.returncode)
        raise StartError(f"the new relay ended with {how}: {logs.redact(last[:500])}")


def describe_exit(code: int) -> str:
    """Return the return code of a process for a message."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def write_outcome(pid_file: str, line: str) -> None:
    """Let `relay upgrade` print the reason of a failure. '' means success."""
    if pid_file:
        with contextlib.suppress(OSError):
            new = Path(f"{pid_file}.upgrade.new")
            new.write_text(f"{line}\n")
            new.replace(outcome_path(pid_file))
