"""Fixtures for all tests: a real server and a real relay."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import topologies
from tests.support.relay import RelayProcess
from tests.support.several import SeveralServers
from tests.support.valkey import Server

# Settings of a relay that the developer runs. The programs that the tests start would use them, or
# reject them. Variables that select how the tests run therefore have another prefix, TEST_.
for _name in [name for name in os.environ if name.startswith("RELAY_")]:
    del os.environ[_name]


class _ClosingLoop(asyncio.SelectorEventLoop):
    """Close the sockets of closed transports before the loop closes.

    A transport that is closed in the loop's last iteration, or that still has bytes to send, would
    keep its socket, and garbage collection would then report the socket as unclosed. A transport
    that nobody closed is still reported.
    """

    def close(self) -> None:
        if not self.is_closed():
            transports = self._transports  # type: ignore[attr-defined]
            for transport in list(transports.values()):
                # A transport without a socket has closed it already.
                if transport.is_closing() and transport.get_extra_info("socket").fileno() >= 0:
                    transport.abort()
            # A transport calls connection_lost and closes its socket in the next iteration.
            self.run_until_complete(asyncio.sleep(0))
        super().close()


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run async tests in a loop that leaves no socket open."""
    return {"asyncio": _ClosingLoop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    topologies.select(config, items)


@pytest.fixture(autouse=True)
def _one_slot_per_command(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a Redis Cluster, fail the test during which a command named keys of two slots."""
    names = topologies.FIXTURES & set(request.fixturenames) if topologies.is_cluster() else ()
    servers = [request.getfixturevalue(name) for name in names]
    yield
    for server in servers:
        if isinstance(server, SeveralServers):
            server.check_slots()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Do without the summary of Hypothesis' plugin if no test has used Hypothesis.

    The summary imports Hypothesis, which takes longer than many pytest runs.
    """
    if "hypothesis" not in sys.modules:
        session.config.pluginmanager.unregister(name="hypothesispytest")


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Exclude existing objects from garbage collection, which then takes about 1 ms.

    This runs before each file, because tests import more modules and some tests unfreeze.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Collect garbage after each test, so that an unclosed socket or task fails the right test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one Valkey with the documented ACL rules per file, or another topology."""
    folder: Path = tmp_path_factory.mktemp("valkey")
    with topologies.running_topology(folder, "valkey") as server:
        yield server


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    """Run one relay with default settings per file. Each test uses its own channel."""
    process = RelayProcess(valkey).start()
    yield process
    process.kill()
