"""Faults of configurations that `serve` accepts."""

from __future__ import annotations

import datetime
import re
import resource
from pathlib import Path

import pytest

from producers.registry import producer_settings
from relay.config.loading import Config, load
from relay.process.doctor import host_checks, settings_checks
from relay.process.doctor.finding import Level
from relay.protocols import door_settings
from tests.support.certificate import certificate

ROOT = Path(__file__).parents[4]
GOOD = "kGm1vB3xQe8rT5yU2iO9pL4sD7fH6jZ0"
CENTRIFUGO = f"protocol:centrifugo.secret={GOOD}"
PYDIO = f"protocol:pydio.key=token:{GOOD}"
SEAFILE = f"protocol:seafile.key={GOOD}"
SOCKETIO = f"protocol:socketio.secret={GOOD}"


def configured(*overrides: str) -> Config:
    return load(
        None,
        environ={},
        overrides=overrides,
        flags={},
        doors=door_settings(),
        producers=producer_settings(),
    )


def test_a_good_configuration_has_notes_only() -> None:
    auth = "protocol:pydio.auth_url=http://127.0.0.1/api/pydio/ws_authenticate/"
    origins = "protocol:pydio.allowed_origins=https://files.example.org"
    sets = [f"jwt.key={GOOD}1", PYDIO, auth, origins]
    assert {each.level for each in settings_checks.check(configured(*sets))} == {Level.NOTE}


@pytest.mark.parametrize(
    ("sets", "name", "level", "fix"),
    [
        (["jwt.key=my-secret-key-1234"], "short_secret", "warning", "openssl rand"),
        (["jwt.key=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"], "weak_secret", "error", "openssl rand"),
        (["protocol:centrifugo.secret=geheim"], "weak_secret", "error", "openssl rand"),
        (["console.password=admin"], "weak_secret", "error", "openssl rand"),
        (
            [CENTRIFUGO, "protocol:centrifugo.admin_password=admin"],
            "weak_secret",
            "error",
            "openssl",
        ),
        ([f"jwt.key={GOOD}", SEAFILE], "shared_secret", "warning", "openssl rand"),
        ([PYDIO], "pydio_auth_url", "error", "auth_url ="),
        (
            [PYDIO, "protocol:pydio.auth_url=http://127.0.0.1/?get_action=ws_authenticate"],
            "allowed_origins",
            "warning",
            "allowed_origins = https://",
        ),
        (
            [PYDIO, "protocol:pydio.auth_url=http://127.0.0.1/?get_action=ws_authenticate"],
            "pydio_paths",
            "warning",
            "private_path = /public",
        ),
        (
            [PYDIO, "protocol:pydio.auth_url=http://files.example.org/api/ws_authenticate/"],
            "pydio_hosts",
            "warning",
            "authorised_hosts = files.example.org",
        ),
        (
            [
                "protocol:pydio.key=kGm1vB3xQe8rT5yU2iO9",
                "protocol:pydio.auth_url=http://[::1]/api/",
            ],
            "pydio_key",
            "error",
            "key = TOKEN:SECRET",
        ),
        (
            [CENTRIFUGO, "protocol:centrifugo.insecure_api=yes", "server.host=0.0.0.0"],
            "centrifugo_insecure",
            "error",
            "insecure_api = no",
        ),
        (
            [CENTRIFUGO, "protocol:centrifugo.admin=yes"],
            "centrifugo_admin",
            "error",
            "admin_secret",
        ),
        (
            [CENTRIFUGO, "protocol:centrifugo:chat.history_size=5"],
            "centrifugo_history",
            "error",
            "[protocol:centrifugo:chat]\nhistory_lifetime = 300",
        ),
        (
            [CENTRIFUGO, "protocol:centrifugo.recover=yes"],
            "centrifugo_history",
            "error",
            "history_size = 100",
        ),
        (
            [
                CENTRIFUGO,
                "protocol:centrifugo.history_size=100",
                "protocol:centrifugo.history_lifetime=60",
                "namespace.retention_count=50",
            ],
            "centrifugo_history",
            "warning",
            "[namespace]\nretention_count = 100",
        ),
        (
            [SEAFILE, "protocol:seafile.db_host=db1"],
            "seafile_groups",
            "warning",
            "groups = database",
        ),
        (
            [SEAFILE, "protocol:seafile.groups=database"],
            "seafile_groups",
            "warning",
            "db_password =",
        ),
        ([SEAFILE, "namespace.retention_age_s=60"], "seafile_missed", "warning", "retention_age_s"),
        (
            [SOCKETIO, PYDIO, "protocol:pydio.npm_namespace=/axr"],
            "socketio_namespace",
            "warning",
            "npm_namespace = /",
        ),
        ([SOCKETIO, "protocol:socketio.paths=/sse"], "paths", "error", "[protocol:socketio]"),
        ([PYDIO, "protocol:pydio.public_path=/ws"], "paths", "error", "[protocol:pydio]"),
        (
            ["producer:socketio_emitter.namespace=/other"],
            "socketio_namespace",
            "warning",
            "[protocol:socketio]\nnamespace =",
        ),
        (
            ["producer:socketio_emitter.redis_url=redis://127.0.0.1/0"],
            "socketio_emitter",
            "warning",
            "secret =",
        ),
    ],
)
def test_faults(sets: list[str], name: str, level: str, fix: str) -> None:
    found = settings_checks.check(configured(*sets))
    wanted = [each for each in found if each.name == f"configuration.{name}"]
    assert level in {each.level.value for each in wanted}, found
    assert any(fix in each.fix for each in wanted)
    assert GOOD not in "".join(str(each) for each in found)


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(f"server.tls_cert={certificate(tmp_path)}")
    (soon,) = host_checks.of_certificates(config)
    assert (soon.level, "in 0 days" in soon.what) == (Level.WARNING, True)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls.fromtimestamp(super().now(tz).timestamp() + 7200, tz)

    monkeypatch.setattr(datetime, "datetime", Later)
    (expired,) = host_checks.of_certificates(config)
    assert (expired.level, "expired on" in expired.what) == (Level.ERROR, True)


def test_limits_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = tmp_path / "somaxconn"
    small.write_text("128\n")
    monkeypatch.setattr(host_checks, "_SOMAXCONN", small)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    found = {each.name: each for each in host_checks.of_limits()}
    assert "LimitNOFILE=65536" in found["host.open_files"].fix
    assert "sysctl -w net.core.somaxconn=4096" in found["host.backlog"].fix


def test_every_finding_is_documented() -> None:
    documented = set(re.findall(r"`([a-z]+\.[a-z_]+)`", (ROOT / "docs/doctor.md").read_text()))
    code = "".join(path.read_text() for path in (ROOT / "relay/process/doctor").glob("*_checks.py"))
    names = set(re.findall(r'"((?:redis|host|data|configuration|proxy)\.[a-z_]+)"', code))
    assert names - documented == set()
    assert "redis.eviction" in names
