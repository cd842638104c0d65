"""Fixtures for all tests: a real server and a real relay. What is missing fails."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Exempt what exists before a file's first test from collection, which then takes about 1 ms.

    For each file again: its tests import more, and some of them unfreeze.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Fail the test that leaves a socket or task behind instead of whichever runs at collection."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Valkey under the documented ACL rules, for a file's tests."""
    folder: Path = tmp_path_factory.mktemp("valkey")
    server = Server(folder)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    """One relay with default settings, for a file's tests; channels keep them apart."""
    process = RelayProcess(valkey).start()
    yield process
    process.kill()
