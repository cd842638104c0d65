"""`app.check`, which builds all parts of `serve`; see also tests/e2e/test_checkconfig.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.cli.commands import main
from tests.support.relay import ROOT

_SECRET = re.compile(r"(secret|key|\w*password|\w*_token) = \S")


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["jwt.key=short"], "[jwt] key: key 1 of 1 is too short"),
        (
            ["protocol:socketio.secret=no PEM at all", "protocol:socketio.algorithm=RS256"],
            "is not a valid key for RS256",
        ),
        (["rights.http_url=ftp://app"], "[rights] http_url: allowed is http://"),
        (["server.tls_cert=/no/such.pem"], "[server] tls_cert, tls_key: cannot be used"),
        (
            ["protocol:native.port=1", "protocol:native.tls_cert=/no/such.pem"],
            "[protocol:native] tls_cert",
        ),
        (["protocol:native.port=8000"], "[protocol:native] port"),
        (["protocol:pydio.key=k", "protocol:pydio.private_port=8000"], "private_port"),
        (["protocol:native.port=8000", "protocol:native.host=0.0.0.0"], "both need port 8000"),
        (["server.host=localhost", "redis.embedded_port=8000"], "[redis] embedded_port"),
        (["metrics.port=8001", "node.workers=3", "protocol:native.port=8003"], "[metrics] port"),
        (["metrics.port=65535", "node.workers=2"], "the last port is 65535"),
        (
            ["redis.url=redis://a, redis://b", "console.redis_url=redis://u:p@a"],
            "[console] redis_url: must name the same servers as [redis] url",
        ),
        (
            ["redis.url=redis://a, redis://b", "console.redis_url=redis://a, redis://a"],
            "[console] redis_url: the list contains a:6379/0 twice",
        ),
        (["producer:spool.path=/no/such/spool"], "[producer:spool] path"),
        (["producer:socketio_emitter.redis_url=redis://h:p/0"], "emitter] redis_url: address"),
        (["redis.tls_ca=/no/such.pem", "redis.url=rediss://localhost/0"], "[redis] tls_ca"),
        (
            ["log.file=/no/such/folder/log"],
            "[log] file /no/such/folder/log cannot be opened: No such",
        ),
        (["log.file=/etc"], "cannot be opened: Is a directory"),
        (["node.pid_file=/no/such/relay.pid"], "[node] pid_file: /no/such/relay.pid cannot be"),
        (["redis.embedded_dir=/usr"], "data folder /usr is not empty and readable by other users"),
        (["protocol:pydio.authorised_hosts=127.0.0.*"], "is not a host"),
        (["redis.url=redis://:a[b@localhost/0"], "percent-encode special characters"),
        (["redis.url=redis://:a#b@localhost/0"], "percent-encode special characters"),
        (["redis.url=redis://:a/b@localhost/0"], "percent-encode special characters"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_check_raises_the_errors_of_a_start(
    sets: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for each in sets for word in ("--set", each)]
    assert main(["checkconfig", *words]) == 1
    text = capsys.readouterr().err
    assert line in text
    assert text.count("\n") == 1
    assert "a[b" not in text


def test_other_hosts_and_free_ports_do_not_collide(capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["server.port=0", "protocol:native.port=8000", "protocol:native.host=127.0.0.2"]
    sets += ["metrics.port=8000"]
    words = [word for each in sets for word in ("--set", each)]
    assert main(["checkconfig", *words]) == 0, capsys.readouterr().err


def test_checkconfig_creates_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = "log.file={0}/log", "node.pid_file={0}/pid", "redis.embedded_dir={0}/data"
    words = [word for each in paths for word in ("--set", each.format(tmp_path))]
    assert main(["checkconfig", *words]) == 0, capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _blocks() -> list[str]:
    """Return the INI blocks of the documentation that contain a secret."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    pages += (ROOT / "relay" / "protocols").glob("*/README.md")
    texts = (page.read_text(encoding="utf-8") for page in pages)
    blocks = (block for text in texts for block in re.findall(r"(?s)```ini\n(.*?)```", text))
    return [block for block in blocks if any(map(_SECRET.match, block.splitlines()))]


def test_the_secrets_of_the_documentation_are_not_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = _blocks()
    assert len(blocks) >= 4
    for block in blocks:
        (tmp_path / "relay.ini").write_text(block, encoding="utf-8")
        assert main(["checkconfig", "-c", str(tmp_path / "relay.ini")]) == 1
        assert "is a placeholder from an example" in capsys.readouterr().err
