"""Command lines, file, variables and signals of a Centrifugo v1 site, with a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path

import aiohttp
import pytest

from relay.cli.commands import main
from tests.support.centrifugo_site import SECRET, V1, eventually, fetch, publish, redis_flags, site
from tests.support.cli import run_here
from tests.support.valkey import Server, free_port

pytestmark = [
    pytest.mark.redis,
    pytest.mark.timeout(120),
    pytest.mark.single_server("options of Centrifugo v1, which has no Redis Cluster"),
]
OK = b'[{"method":"publish","error":null,"body":null}]'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the smallest documented configuration."""
    (tmp_path / "config.json").write_text(json.dumps({"secret": SECRET}))
    return tmp_path


def entries(server: Server, channel: str) -> int:
    length: int = server.client("admin").xlen(f"relay:stream:{{{channel}}}")
    return length


def test_the_documented_command_line_serves_this_protocol_only(
    valkey: Server, folder: Path
) -> None:
    port = free_port()
    redis = redis_flags(valkey)
    with site(folder, "centrifugo", "--config=config.json", f"--port={port}", *redis) as running:
        base = f"http://127.0.0.1:{port}"
        assert publish(base, "site", 1) == (200, OK)
        assert publish(base, "site", 1, secret="wrong")[0] == 401
        for path in ("/healthz", "/metrics", "/sse?channel=site", "/"):
            assert fetch(base + path)[0] == 404, path
        assert running.shared.startswith("http://127.0.0.1:")
        assert fetch(f"{running.shared}/readyz")[0] == 200
        assert fetch(f"{running.shared}/api/", body=b"[]")[0] == 404
        # No token is printed, because the key was not created by relay.
        assert not [line for line in running.lines if "eyJ" in line]
        assert running.said("  centrifugo").endswith(base)
    assert running.ended() == 0
    assert entries(valkey, "site") == 1


def test_variables_short_flags_and_serve_with_the_file(valkey: Server, folder: Path) -> None:
    port = free_port()
    (folder / "config.json").write_text('{"secret": "no"}')
    environ = {
        "CENTRIFUGO_SECRET": SECRET,
        "CENTRIFUGO_PORT": str(port),
        "CENTRIFUGO_ENGINE": "redis",
        "CENTRIFUGO_REDIS_URL": valkey.url("relay"),
    }
    with site(folder, "serve", "-c", "config.json", environ=environ):
        assert publish(f"http://127.0.0.1:{port}", "variables", 1) == (200, OK)
    other = free_port()
    short = ["-p", str(other), "-a", "127.0.0.1", "-n", "short-1", "-e", "redis"]
    with site(folder, "centrifugo", *short, environ=environ) as running:
        assert publish(f"http://127.0.0.1:{other}", "variables", 1) == (200, OK)
        metrics = fetch(f"{running.shared}/metrics")[1]
        assert b"relay_" in metrics
        nodes = valkey.client("admin").keys("relay:node*short-1*")
        assert nodes


def test_sighup_reloads_the_file_and_ignores_an_invalid_one(valkey: Server, folder: Path) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    config = folder / "config.json"
    with site(folder, "centrifugo", f"--port={port}", *redis_flags(valkey)) as running:
        assert publish(base, "hup", 1)[0] == 200
        config.write_text('{"secret": "second", "log_level": "debug"}')
        running.send(signal.SIGHUP)
        running.said("reloaded")
        assert publish(base, "hup", 1)[0] == 401
        assert publish(base, "hup", 1, secret="second")[0] == 200
        config.write_text('{"secret": "third", }')
        running.send(signal.SIGHUP)
        assert "config.json: line 1" in running.said("not reloaded")
        assert "third" not in "".join(running.lines)
        config.write_text('{"secret": "third", "namespaces": [{"name": "x"}]}')
        running.send(signal.SIGHUP)
        assert "must be two or more letters" in running.said("not reloaded", times=2)
        config.unlink()
        running.send(signal.SIGHUP)
        assert "file not found" in running.said("not reloaded", times=3)
        assert publish(base, "hup", 1, secret="second")[0] == 200


async def test_sighup_changes_the_options_of_open_connections(valkey: Server, folder: Path) -> None:
    port = free_port()
    config = folder / "config.json"
    rooms = {"name": "rooms", "publish": True}
    url = f"http://127.0.0.1:{port}/connection/websocket"

    def configure(times: int, **options: object) -> None:
        config.write_text(json.dumps({"secret": SECRET, **options}))
        running.send(signal.SIGHUP)
        running.said("reloaded", times=times)

    with site(folder, "centrifugo", f"--port={port}", *redis_flags(valkey)) as running:
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
            client = V1(ws)
            await client.connect("ann")
            assert (await client.ask("subscribe", channel="rooms:1"))["status"] is False
            configure(1, namespaces=[rooms])
            assert (await client.ask("subscribe", channel="rooms:1"))["status"] is True
            assert (await client.ask("publish", channel="rooms:1", data=1))["status"] is True
            configure(2, namespaces=[{"name": "rooms"}])
            assert (await client.ask("publish", channel="rooms:1", data=2))["status"] is False
            # Subscriptions in a removed namespace stay.
            configure(3, namespaces=[])
            assert (await client.ask("unsubscribe", channel="rooms:1"))["status"] is False
            configure(4, max_channel_length=4)
            assert (await client.ask("subscribe", channel="12345"))["status"] is False
            assert (await client.ask("subscribe", channel="1234"))["status"] is True


def test_several_workers_share_the_port(valkey: Server, folder: Path) -> None:
    port = free_port()
    arguments = ["centrifugo", f"--port={port}", "--workers", "2", *redis_flags(valkey)]
    with site(folder, *arguments) as running:
        for n in range(20):
            assert publish(f"http://127.0.0.1:{port}", "workers", n) == (200, OK)
        assert fetch(f"{running.shared}/readyz")[0] == 200
        # Centrifugo's hostname_port, although the shared listener has any free port.
        nodes = valkey.client("admin").keys(f"relay:node:{socket.gethostname()}_{port}-*")
        assert len(nodes) == 2
        (folder / "config.json").write_text('{"secret": "second"}')
        running.send(signal.SIGHUP)
        running.said("reloaded", times=2)
        assert publish(f"http://127.0.0.1:{port}", "workers", 1, secret="second")[0] == 200
    assert running.ended() == 0


def test_the_memory_engine_is_an_embedded_server_that_keeps_its_data(folder: Path) -> None:
    port, valkey_port = free_port(), free_port()
    arguments = ["centrifugo", f"--port={port}", "--set", f"redis.embedded_port={valkey_port}"]
    with site(folder, *arguments):
        assert publish(f"http://127.0.0.1:{port}", "memory", 1) == (200, OK)
    with site(folder, *arguments) as running:
        assert running.said("  valkey").endswith(str(valkey_port))
        listed = subprocess.run(
            ["redis-cli", "-p", str(valkey_port), "XLEN", "relay:stream:{memory}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert listed.stdout.strip() == "1"


def test_the_queue_and_its_shards_have_the_prefix(valkey: Server, folder: Path) -> None:
    arguments = ["centrifugo", f"--port={free_port()}", "--redis_api", "--redis_api_num_shards=2"]
    command = '{"method":"publish","params":{"channel":"queue","data":1}}'
    admin = valkey.client("admin")
    with site(folder, *arguments, *redis_flags(valkey)):
        for queue in ("centrifugo.api", "centrifugo.api.0", "centrifugo.api.1"):
            admin.rpush(queue, command)
        eventually(lambda: entries(valkey, "queue") == 3)


def test_tls_with_centrifugos_options(valkey: Server, folder: Path) -> None:
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "server.key",
            "-out",
            "server.crt",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    port = free_port()
    flags = ["--ssl", "--ssl_key=server.key", "--ssl_cert=server.crt", f"--port={port}"]
    with site(folder, "centrifugo", "--config=config.json", *flags, *redis_flags(valkey)):
        context = ssl.create_default_context(cafile=str(folder / "server.crt"))
        url = f"https://127.0.0.1:{port}/api/"
        request = urllib.request.Request(url, data=b"[]", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=context)  # noqa: S310
        assert refused.value.code == 400
        refused.value.close()
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET /api/ HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")


@pytest.mark.parametrize(
    ("text", "flags", "line"),
    [
        ('{"secret"', [], "relay: config.json: line 1, column 10: Expecting ':' delimiter"),
        (
            "{}",
            ["--engine=etcd"],
            "relay: --engine=etcd: must be memory or redis",
        ),
        ("{}", ["--port=x"], "relay: --port=x: a whole number from 0 to 65535"),
        (
            "{}",
            ["--config=config.ini"],
            "config.ini: must have one of the suffixes .json, .toml, .yaml, .yml",
        ),
        ('{"ssl_autocert": true}', [], "relay does not obtain ACME certificates"),
    ],
)
def test_an_unsupported_option_stops_the_start_with_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, flags: list[str], line: str
) -> None:
    (folder / "config.json").write_text(text)
    monkeypatch.chdir(folder)
    done = run_here(["centrifugo", *flags], {})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr


def test_a_busy_port_and_an_unknown_flag(valkey: Server, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--port={port}", "-a", "127.0.0.1", *redis_flags(valkey)]
        with site(folder, "centrifugo", *flags, ready=False) as running:
            assert running.ended() == 1
        assert f"port {port} of 127.0.0.1 is taken" in running.lines[-1]
    with site(folder, "centrifugo", "--prot=1", ready=False) as running:
        assert running.ended() == 2


def test_without_a_file_relay_does_not_start(valkey: Server, tmp_path: Path) -> None:
    flags = [f"--port={free_port()}", *redis_flags(valkey)]
    with site(tmp_path, "centrifugo", *flags, ready=False) as running:
        assert running.ended() == 1
        running.said("config.json: file not found; using defaults")
        running.said("[protocol:centrifugo] secret is not set")


def test_every_insecure_mode_is_logged(valkey: Server, folder: Path) -> None:
    port = free_port()
    flags = ["--insecure", "--insecure_api", "--insecure_admin", f"--port={port}"]
    with site(folder, "centrifugo", *flags, *redis_flags(valkey)) as running:
        for name in ("insecure", "insecure_api", "insecure_admin"):
            running.said(f"INSECURE: [protocol:centrifugo] {name}:")
        body = b'{"method":"publish","params":{"channel":"insecure","data":1}}'
        json_type = {"Content-Type": "application/json"}
        assert fetch(f"http://127.0.0.1:{port}/api/", body=body, headers=json_type)[:2] == (200, OK)


def test_api_port_and_prefix(valkey: Server, folder: Path) -> None:
    port, api = free_port(), free_port()
    config = {"secret": SECRET, "http_prefix": "/centrifugo", "port": port, "api_port": str(api)}
    (folder / "config.json").write_text(json.dumps(config))
    with site(folder, "centrifugo", *redis_flags(valkey)):
        assert publish(f"http://127.0.0.1:{api}/centrifugo", "prefix", 1) == (200, OK)
        assert fetch(f"http://127.0.0.1:{api}/api/", body=b"[]")[0] == 404
        assert fetch(f"http://127.0.0.1:{port}/centrifugo/api/", body=b"[]")[0] == 404
        assert fetch(f"http://127.0.0.1:{port}/centrifugo/connection/info")[0] == 200
        assert fetch(f"http://127.0.0.1:{port}/connection/info")[0] == 404


def test_the_documented_admin_options_on_a_separate_port(valkey: Server, folder: Path) -> None:
    port, admin = free_port(), free_port()
    config = {
        "secret": SECRET,
        "web": True,
        "admin": True,
        "admin_password": "password",
        "admin_secret": "secret",
        "admin_port": str(admin),
        "debug": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with site(folder, "centrifugo", f"--port={port}", *redis_flags(valkey)):
        # Centrifugo's page has the address /, and is relay's console.
        status, _, headers = fetch(f"http://127.0.0.1:{admin}/")
        assert (status, headers["Location"]) == (307, "console/")
        assert b"<title>relay console" in fetch(f"http://127.0.0.1:{admin}/console/")[1]
        login = f"http://127.0.0.1:{admin}/console/api/login"
        as_json = {"Content-Type": "application/json"}
        assert fetch(login, body=b'{"password":"no"}', headers=as_json)[0] == 401
        assert fetch(login, body=b'{"password":"password"}', headers=as_json)[0] == 200
        assert fetch(f"http://127.0.0.1:{port}/console/")[0] == 404
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        status, text, _ = fetch(
            f"http://127.0.0.1:{admin}/auth/", body=b"password=password", headers=form
        )
        assert status == 200
        assert json.loads(text)["token"]
        wrong = fetch(f"http://127.0.0.1:{admin}/auth/", body=b"password=no", headers=form)
        assert wrong[0] == 400
        assert fetch(f"http://127.0.0.1:{admin}/debug/")[0] == 200
        for path in ("/auth/", "/socket", "/debug/"):
            assert fetch(f"http://127.0.0.1:{port}{path}")[0] == 404, path
        assert publish(f"http://127.0.0.1:{port}", "admin", 1) == (200, OK)


@pytest.mark.parametrize("name", ["a.toml", "a.yaml", "a.yml", "a.ini"])
def test_formats_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["genconfig", "-c", name]) == 0
    assert main(["checkconfig", "-c", name]) == 0
    assert capsys.readouterr() == (f"{name}: the configuration is valid\n", "")
    assert main(["genconfig", "-c", name]) == 1


def test_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def tool(*words: str) -> tuple[int, list[str]]:
        done = run_here(words, {})
        return done.returncode, (done.stdout + done.stderr).splitlines()

    code, lines = tool("centrifugo", "help")
    assert code == 0
    assert any("--redis_sentinels" in line for line in lines)
    assert tool("centrifugo", "sing")[0] == 2
    assert tool("centrifugo", "genconfig") == (0, [])
    made = tmp_path / "config.json"
    assert os.stat(made).st_mode & 0o777 == 0o600
    before = made.read_text()
    refused = (1, ["relay: output config file already exists: config.json"])
    assert tool("centrifugo", "genconfig") == refused
    assert tool("genconfig", "-c", "config.json") == refused
    assert made.read_text() == before
    assert tool("centrifugo", "checkconfig") == (0, [])
    missing = (1, ["relay: none.json: file not found"])
    assert tool("centrifugo", "checkconfig", "-c", "none.json") == missing
    assert tool("checkconfig", "-c", "none.json") == missing
    (code, lines) = tool("centrifugo", "version")
    assert code == 0
    assert lines[0].startswith("Centrifugo v1.8.0 (relay ")
    code, lines = tool("convert-config", "-c", "config.json")
    assert code == 0
    (tmp_path / "relay.ini").write_text("\n".join(lines) + "\n")
    assert tool("checkconfig", "-c", "relay.ini")[0] == 0
    assert tool("convert-config", "-c", "relay.ini")[0] == 1
    assert tool("convert-config")[0] == 1
