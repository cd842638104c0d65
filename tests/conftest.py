"""Fixtures for all tests: a real server and a real relay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running


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
    """Run one Valkey with the documented ACL rules per file."""
    folder: Path = tmp_path_factory.mktemp("valkey")
    server = Server(folder)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    """Run one relay with default settings per file. Each test uses its own channel."""
    process = RelayProcess(valkey).start()
    yield process
    process.kill()
