"""Relay does not start if a configured protocol lacks a required setting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.cli import run_here
from tests.support.relay import ROOT
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis

# Protocol, a setting that implies that the operator wants it, and its required setting.
WANTED = [
    ("seafile", "ping_s=2", "key"),
    ("centrifugo", "history_size=5", "secret"),
    ("pydio", "auth_url=http://127.0.0.1/", "key"),
    ("socketio", "ping_interval_s=20", "secret"),
]


def checked(*settings: str) -> subprocess.CompletedProcess[str]:
    options = [word for setting in settings for word in ("--set", setting)]
    return run_here(["checkconfig", *options], {})


@pytest.mark.parametrize(("protocol", "setting", "missing"), WANTED)
@pytest.mark.parametrize("own_port", [False, True])
def test_what_it_needs_is_named(protocol: str, setting: str, missing: str, own_port: bool) -> None:
    section = f"protocol:{protocol}"
    given = f"port={free_port()}" if own_port else setting
    done = checked(f"{section}.{given}")
    assert done.returncode == 1
    assert f"[{section}] {missing}" in done.stderr
    assert "is not set, so this protocol cannot be served" in done.stderr
    assert (
        checked(f"{section}.{given}", f"{section}.{missing}=a-secret-of-18-bytes").returncode == 0
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_serve_ends_with_that_line(valkey: Server, workers: int) -> None:
    command = [sys.executable, "-m", "relay", "serve", "--port", str(free_port())]
    command += ["--redis", valkey.url("relay"), "--workers", str(workers)]
    command += ["--set", f"protocol:seafile.port={free_port()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "[protocol:seafile] key" in done.stderr.splitlines()[-1]
    assert "is ready" not in done.stdout


@pytest.mark.parametrize("settings", [[], ["protocol:seafile.enabled=no"]])
def test_what_is_not_wanted_needs_nothing(settings: Sequence[str]) -> None:
    off = [*settings, *(f"protocol:seafile.port={free_port()}" for _ in settings)]
    assert checked(*off).returncode == 0


def test_namespaces_alone_want_their_protocol() -> None:
    assert checked("protocol:centrifugo:team.history_size=5").returncode == 1
    secret = "protocol:centrifugo.secret=a-secret-of-18-bytes"
    assert checked("protocol:centrifugo:team.history_size=5", secret).returncode == 0
