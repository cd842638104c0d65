"""The supervisor of several workers on one port: it starts and restarts them and forwards signals.

    relay serve --workers N ─┬─ embedded Valkey, if no Redis is configured
                             ├─ worker 1 ── a complete relay, listening with SO_REUSEPORT
                             └─ worker N ── the same

The supervisor replaces every worker that dies. If the supervisor dies, the kernel kills its
workers. It has no connections to clients and reads no streams. A worker reports on its standard
output that it is ready, or in one line why it cannot start; everything else is logged. On its
standard input it receives the current configuration, and a new one after each reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from relay.core.errors import StartError
from relay.core.worker_memory import (
    DIED,
    ERROR,
    HANDED_OVER,
    READY,
    REOPEN_LOG,
    SEND_SOCKETS,
    Worker,
    WorkerMemory,
    shared_memory,
)
from relay.process import app, logs
from relay.process.addresses import check_addresses, check_inherited, reserved
from relay.process.embedded import EmbeddedValkey, lock_path, redis_address, running_valkey
from relay.process.handover import (
    PID_FILE,
    VALKEY,
    Inheritance,
    Upgrades,
    describe_exit,
    discard_sockets,
    inheritance,
    receive_sockets,
    wait_started,
)
from relay.process.pid_file import pid_file
from relay.process.reloading import Reloads
from relay.process.server import node_name
from relay.process.service_manager import notify
from relay.process.start_signals import STOP_SIGNALS, release_signals
from relay.transports.socket.inherited import InheritedSocket

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from relay.config.loading import Config
    from relay.process.server import Listening

_log = logging.getLogger(__name__)

_BACK_OFF_S = (0.1, 5.0)
# Limit for the answers of all workers.
_ANSWER_S = 5.0
# After a worker has run this long, the next restart delay is short again.
_STEADY_S = 10.0
# Time that a stop may need besides asking the clients, before a stopping worker is killed.
_STOP_S = 15.0


def run(
    config: Config,
    *,
    reload: Callable[[], Config],
    on_ready: Callable[[int, str], None],
) -> int:
    """Keep `config.node.workers` workers running until a signal. Return the exit code.

    Raises:
        StartError or ConfigError, or a group of them: A worker cannot start.
    """
    listeners = app.check(config)
    # The kernel would allow two relays with workers to share a port.
    inherited = inheritance()
    check_inherited(config, listeners, inherited)
    check_addresses(config, listeners, inherited=inherited.sockets)
    path = config.node.pid_file
    with pid_file(path, inherited.file(PID_FILE, Path(path))) as file:
        if file is not None:
            inherited.files[PID_FILE] = file
        return uvloop.run(Supervisor(config, listeners, reload, on_ready, inherited).run())


class Supervisor:
    """Starts the workers, restarts them, and stops them."""

    def __init__(
        self,
        config: Config,
        listeners: Sequence[Listening],
        reload: Callable[[], Config],
        on_ready: Callable[[int, str], None],
        inheritance: Inheritance,
    ) -> None:
        self._inheritance = inheritance
        self._valkey: EmbeddedValkey | None = None
        self._is_handed_over = False
        self._inherited_by_workers: dict[int, list[InheritedSocket]] = {}
        before: Counter[str] = Counter()
        for inherited in inheritance.sockets.left:
            if inherited.is_shared:
                number = before[inherited.address] % config.node.workers + 1
                before[inherited.address] += 1
                self._inherited_by_workers.setdefault(number, []).append(inherited)
        common = [each for each in inheritance.sockets.left if not each.is_shared]
        inheritance.sockets.left = common
        # Workers send their listening sockets to the first one.
        self._upward = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._upward[0].setblocking(False)
        # The current configuration: that of the start, changed by each accepted reload. A worker
        # that replaces another one receives it, even if the file has changed since.
        self._config = config
        self._listeners = listeners
        self._reloads = Reloads(reload, lambda: self._config, self._reload)
        self._on_ready = on_ready
        self._memory = shared_memory(config.node.workers)
        self._slots = WorkerMemory(self._memory)
        # Kept open here, so that connections handed over to a worker that died are received by its
        # successor.
        self._pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(config.node.workers)
        ]
        for each in itertools.chain.from_iterable(self._pairs):
            each.setblocking(False)
        self._processes: dict[int, Process] = {}
        self._port = 0
        self._stopping = asyncio.Event()
        self._stop_signals = 0
        self._started: set[int] = set()
        self._all_started = asyncio.Event()

    async def run(self) -> int:
        """Start the workers, restart them until a signal, and stop them. Return the exit code."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            # Reserve the port until the end, so that no other program gets it while a worker
            # restarts.
            reserving = reserved(config, self._listeners[0], self._inheritance.sockets)
            self._port = stack.enter_context(reserving)
            upgrades = self._upgrades()
            self._handle_signals(upgrades)
            lock = self._inheritance.file(VALKEY, lock_path(config.redis))
            self._valkey = await stack.enter_async_context(running_valkey(config.redis, lock))
            redis = redis_address(config.redis).url
            async with asyncio.TaskGroup() as group:
                reloads = group.create_task(self._reloads.run(), name="reloads")
                upgrading = group.create_task(upgrades.run(), name="upgrades")
                try:
                    keepers = [
                        group.create_task(self._keep(number), name=f"worker {number}")
                        for number in range(1, self._slots.count + 1)
                    ]
                    announce = group.create_task(self._announce(redis), name="announce")
                    await self._stopping.wait()
                    announce.cancel()
                    reloads.cancel()
                    if not self._is_handed_over:
                        # A relay that is being started must not take over.
                        upgrading.cancel()
                    group.create_task(self._kill_slow_workers(keepers), name="limit")
                finally:
                    if self._is_handed_over:
                        self._send_all(HANDED_OVER)
                    else:
                        stopping = self._stopping.is_set()
                        self._forward(signal.SIGTERM if stopping else signal.SIGKILL)
        return 0

    # ---- one worker -------------------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Start a worker and restart it until relay stops."""
        loop = asyncio.get_running_loop()
        delay_s, ceiling_s = _BACK_OFF_S
        while not self._stopping.is_set():
            begun = loop.time()
            process = await self._spawn(number)
            self._processes[number] = process
            if self._stopping.is_set():
                process.terminate()
            problem = await self._read_output(number, process)
            code = await process.wait()
            del self._processes[number]
            self._report_death(number, self._slots.mark_dead(number))
            if self._stopping.is_set():
                return
            if code == 1 and problem and number not in self._started:
                # The cause affects all workers, and the operator is waiting for the start.
                raise StartError(problem)
            if loop.time() - begun >= _STEADY_S:
                delay_s = _BACK_OFF_S[0]
            _log.error(
                "Worker %d exited unexpectedly (%s); restarting it in %.1f s",
                number,
                problem or describe_exit(code),
                delay_s,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            delay_s = min(delay_s * 2, ceiling_s)

    def _report_death(self, number: int, digits: str) -> None:
        """Inform the other workers."""
        if digits:
            instance = f"{node_name(self._config, self._port)}-{number}:{digits}"
            for process in self._processes.values():
                _send(process, DIED + instance.encode())

    async def _spawn(self, number: int) -> Process:
        inbox = self._pairs[number - 1][0].fileno()
        outboxes = [pair[1].fileno() for pair in self._pairs]
        upward = self._upward[1].fileno()
        inherited = self._inherited_by(number)
        worker = Worker.argument(
            number,
            self._memory,
            inbox,
            outboxes,
            upward,
            [(each.socket.fileno(), each.name, each.held) for each in inherited],
            is_upgrade=self._inheritance.is_upgrade,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "relay",
            "serve",
            "--worker",
            worker,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(
                self._memory,
                inbox,
                *outboxes,
                upward,
                *(each.socket.fileno() for each in inherited),
            ),
            # Ctrl-C in a terminal must reach the supervisor only, which forwards it. A second
            # signal would end the worker immediately.
            start_new_session=True,
        )
        _send(process, self._packed())
        for each in self._inherited_by_workers.pop(number, ()):
            # If the worker dies, the kernel must not queue connections for it.
            each.socket.close()
        return process

    def _inherited_by(self, number: int) -> list[InheritedSocket]:
        """Return the inherited sockets for a worker.

        Where each worker had its own socket on an address, each is given to one worker, and only at
        its first start. All other sockets are common to all workers.
        """
        return [*self._inherited_by_workers.get(number, ()), *self._inheritance.sockets.left]

    def _packed(self) -> bytes:
        """Return the current configuration with the shared port and name, pickled."""
        config = self._config
        # If the configured port is 0, the actual one is known here. The name must not change at a
        # restart of the worker.
        node = config.node.model_copy(update={"name": node_name(config, self._port)})
        server = config.server.model_copy(update={"port": self._port})
        return pickle.dumps(dataclasses.replace(config, node=node, server=server))

    async def _read_output(self, number: int, process: Process) -> str:
        """Read the worker's output until its end. Return the error that it reported, or ''."""
        problem = ""
        if process.stdout is None:
            raise RuntimeError("the worker has no output")
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            if line == READY:
                _log.info("Worker %d ready (pid %d)", number, process.pid)
                self._started.add(number)
                if len(self._started) == self._slots.count:
                    self._all_started.set()
            elif line.startswith(ERROR):
                problem = line.removeprefix(ERROR)
        return problem

    # ---- signals ----------------------------------------------------------------------------

    def _upgrades(self) -> Upgrades:
        def handed_over(used: set[str]) -> None:
            if self._valkey is not None and VALKEY in used:
                self._valkey.hand_over()
            self._is_handed_over = True
            self._stopping.set()

        return Upgrades(
            sockets=self._collect_sockets,
            files=lambda: self._inheritance.locked(self._valkey),
            handed_over=handed_over,
            pid_file=self._config.node.pid_file,
        )

    async def _collect_sockets(self) -> list[InheritedSocket]:
        """Return the listening sockets of all workers."""
        await wait_started(self._all_started)
        discard_sockets(self._upward[0])
        self._send_all(SEND_SOCKETS)
        try:
            async with asyncio.timeout(_ANSWER_S):
                found = await receive_sockets(self._upward[0], len(self._processes))
        except TimeoutError:
            raise StartError(f"a worker did not answer within {_ANSWER_S:g} s") from None
        # Without SO_REUSEPORT there is one socket on an address, which several workers may have.
        common = {each.address: each for each in found if not each.is_shared}
        return [*common.values(), *(each for each in found if each.is_shared)]

    def _handle_signals(self, upgrades: Upgrades) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reloads.request)
        loop.add_signal_handler(signal.SIGUSR1, self._on_reopen_signal)
        loop.add_signal_handler(signal.SIGUSR2, upgrades.request)
        release_signals()

    def _on_stop_signal(self) -> None:
        self._stop_signals += 1
        if self._stop_signals > 1:
            _log.warning("Received a second stop signal; exiting immediately")
            self._forward(signal.SIGKILL)
            os._exit(1)
        _log.info("Received a stop signal; stopping")
        if not self._is_handed_over:
            notify(STOPPING=1)
        self._stopping.set()

    def _reload(self, config: Config) -> None:
        self._config = config
        logs.set_level(config.log.level)
        self._send_all(self._packed())

    def _on_reopen_signal(self) -> None:
        logs.reopen()
        self._send_all(REOPEN_LOG)

    def _send_all(self, payload: bytes) -> None:
        for process in self._processes.values():
            _send(process, payload)

    def _forward(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            # The process may have just ended.
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    async def _kill_slow_workers(self, keepers: Iterable[asyncio.Task[None]]) -> None:
        own = (float(getattr(door, "drain_s", 0)) for door in self._config.doors.values())
        drain_s = max(self._config.node.drain_s, *own)
        await asyncio.wait(keepers, timeout=drain_s + _STOP_S)
        for number in self._processes:
            _log.error("Worker %d did not stop within %g s; killing it", number, drain_s + _STOP_S)
        self._forward(signal.SIGKILL)

    async def _announce(self, redis: str) -> None:
        await self._all_started.wait()
        await self._inheritance.take_over(self._config.node.pid_file)
        if self._valkey is not None:
            self._valkey.take_over()
        self._on_ready(self._port, redis)


def _send(process: Process, payload: bytes) -> None:
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(Worker.message(payload))
