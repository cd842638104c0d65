"""The parent of several workers on one port: starts them, restarts the dead, passes signals on.

    relay serve --workers N ─┬─ embedded Valkey, where no Redis is configured
                             ├─ worker 1 ── one complete relay, listening with SO_REUSEPORT
                             └─ worker N ── the same

Promise: while it lives, every worker that dies is replaced; when it ends, however that happens, no
worker outlives it. It touches no client and no stream. A worker tells on its standard output that
it serves, or in one line why it cannot; everything else it says goes to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from relay import logs
from relay.embedded import EmbeddedValkey
from relay.errors import RelayError, StartError
from relay.pid_file import pid_file
from relay.server import addresses, listen_error, node_name
from relay.siblings import ERROR, READY, Siblings, Worker, shared_memory

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from relay.config import Config

_log = logging.getLogger(__name__)

_BACK_OFF_S = (0.1, 5.0)
# A worker that ran this long has a clean record.
_STEADY_S = 10.0
# Beyond the time that its clients are given, before a stopping worker is killed.
_STOP_S = 10.0


def run(
    config: Config,
    *,
    arguments: Sequence[str],
    reload: Callable[[], Config],
    on_ready: Callable[[int, str], None],
) -> int:
    """Keep `config.node.workers` processes of `relay ARGUMENTS` until a signal; the exit code.

    StartError, or a group of it, where a worker cannot start at all.
    """
    with pid_file(config.node.pid_file):
        return uvloop.run(Supervisor(config, arguments, reload, on_ready).run())


class Supervisor:
    """The parent at work."""

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        reload: Callable[[], Config],
        on_ready: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self._arguments = list(arguments)
        self._load_again = reload
        self._on_ready = on_ready
        self._memory = shared_memory(config.node.workers)
        self._siblings = Siblings(self._memory)
        # Held here too: what waits for a worker that died is taken by its successor.
        self._pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(config.node.workers)
        ]
        for each in itertools.chain.from_iterable(self._pairs):
            each.setblocking(False)
        self._processes: dict[int, Process] = {}
        self._port = 0
        self._stopping = asyncio.Event()
        self._started: set[int] = set()
        self._all_started = asyncio.Event()

    async def run(self) -> int:
        """Start, watch, stop."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            # Held to the end: with a port of 0 nobody else may get it while a worker is away.
            reserved = stack.enter_context(_reserved(config))
            self._port = reserved.getsockname()[1]
            self._handle_signals()
            redis = await self._redis(stack)
            async with asyncio.TaskGroup() as group:
                try:
                    keepers = [
                        group.create_task(self._keep(number), name=f"worker {number}")
                        for number in range(1, self._siblings.count + 1)
                    ]
                    announce = group.create_task(self._announce(redis), name="announce")
                    await self._stopping.wait()
                    announce.cancel()
                    group.create_task(self._end_the_slow(keepers), name="limit")
                finally:
                    self._pass_on(signal.SIGTERM if self._stopping.is_set() else signal.SIGKILL)
        return 0

    async def _redis(self, stack: contextlib.AsyncExitStack) -> str:
        settings = self._config.redis
        if settings.url != "embedded":
            return settings.url
        embedded = EmbeddedValkey(Path(settings.embedded_dir or "data"), settings.embedded_port)
        await embedded.start()
        stack.push_async_callback(embedded.stop)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        task = group.create_task(embedded.supervise(), name="embedded Valkey")
        stack.callback(task.cancel)
        return f"redis://127.0.0.1:{settings.embedded_port}/0"

    # ---- one worker -------------------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Returns when the relay stops and this worker has ended."""
        loop = asyncio.get_running_loop()
        delay_s, ceiling_s = _BACK_OFF_S
        while not self._stopping.is_set():
            begun = loop.time()
            process = await self._spawn(number)
            self._processes[number] = process
            if self._stopping.is_set():
                process.terminate()
            problem = await self._hear(number, process)
            code = await process.wait()
            del self._processes[number]
            self._siblings.bury(number)
            if self._stopping.is_set():
                return
            if code == 1 and problem and number not in self._started:
                # What keeps it from starting keeps all of them, and the operator is waiting.
                raise StartError(problem)
            if loop.time() - begun >= _STEADY_S:
                delay_s = _BACK_OFF_S[0]
            _log.error("worker %d has ended: %s", number, problem or _how(code))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            delay_s = min(delay_s * 2, ceiling_s)

    async def _spawn(self, number: int) -> Process:
        inbox = self._pairs[number - 1][0].fileno()
        outboxes = [pair[1].fileno() for pair in self._pairs]
        worker = Worker.argument(number, self._memory, inbox, outboxes)
        # Here, where a port of 0 is still known as one: the name shall outlive a restart.
        name = ["--set", f"node.name={node_name(self._config, self._port)}"]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "relay",
            *self._arguments,
            *name,
            "--shared-port",
            str(self._port),
            "--worker",
            worker,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(self._memory, inbox, *outboxes),
            # A Ctrl-C in the terminal is for the parent alone: the worker would take what is
            # passed on for the second signal, and end at once.
            start_new_session=True,
        )

    async def _hear(self, number: int, process: Process) -> str:
        """Until the worker's output ends; its error, if it told one."""
        problem = ""
        if process.stdout is None:
            raise RuntimeError("the worker has no output")
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            if line == READY:
                _log.info("worker %d serves (process %d)", number, process.pid)
                self._started.add(number)
                if len(self._started) == self._siblings.count:
                    self._all_started.set()
            elif line.startswith(ERROR):
                problem = line.removeprefix(ERROR)
        return problem

    # ---- signals ----------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        loop.add_signal_handler(signal.SIGUSR1, self._on_reopen_signal)

    def _on_stop_signal(self) -> None:
        if self._stopping.is_set():
            _log.warning("second signal: ending at once")
            self._pass_on(signal.SIGKILL)
            os._exit(1)
        _log.info("stopping")
        self._stopping.set()

    def _on_reload_signal(self) -> None:
        self._pass_on(signal.SIGHUP)
        try:
            logs.set_level(self._load_again().log.level)
        except RelayError as exc:
            _log.error("not reloaded, the old settings stay: %s", exc)  # no bug

    def _on_reopen_signal(self) -> None:
        logs.reopen()
        self._pass_on(signal.SIGUSR1)

    def _pass_on(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            # One that ended in this moment.
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    async def _end_the_slow(self, keepers: Iterable[asyncio.Task[None]]) -> None:
        own = (float(getattr(door, "drain_s", 0)) for door in self._config.doors.values())
        drain_s = max(self._config.node.drain_s, *own)
        await asyncio.wait(keepers, timeout=drain_s + _STOP_S)
        for number in self._processes:
            _log.error("worker %d does not end and is killed", number)
        self._pass_on(signal.SIGKILL)

    async def _announce(self, redis: str) -> None:
        await self._all_started.wait()
        self._on_ready(self._port, redis)


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _reserved(config: Config) -> Iterator[socket.socket]:
    """A socket bound to the shared listener's address, on which nobody can connect.

    StartError where another program, be it another relay with workers, has one of the ports: the
    kernel would let both share it.
    """
    if config.metrics.port + config.node.workers > 65536:
        raise StartError("[metrics] port: each worker needs one, and there are none above 65535")
    clients = addresses(config.server, config.doors.values())
    for index, (host, port) in enumerate(clients):
        if (host, port) in clients[:index]:
            taken = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            raise StartError(listen_error(host, port, taken))
        try:
            with _bound(host, port, socket.SO_REUSEADDR):
                pass
        except OSError as exc:
            raise StartError(listen_error(host, port, exc)) from exc
    with _bound(config.server.host, config.server.port, socket.SO_REUSEPORT) as bound:
        yield bound


def _bound(host: str, port: int, option: int) -> socket.socket:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
