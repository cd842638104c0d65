from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jwt
import pytest
from pydantic import SecretStr

import relay.cli.access
import relay.process.app
from producers.registry import producer_settings
from relay import __version__
from relay.cli.arguments import parse
from relay.cli.banner import banner
from relay.cli.commands import main
from relay.cli.local_key import with_local_key
from relay.config.loading import Config, load
from relay.core.errors import RedisUnavailable, StartError
from relay.protocols import door_settings

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    access = logging.getLogger("aiohttp.access").disabled
    yield
    logging.getLogger("aiohttp.access").disabled = access
    for handler in logging.getLogger().handlers:
        if handler not in handlers:
            handler.close()
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    logging.getLogger("aiohttp.access").disabled = False


def configured(*sets: str, insecure: bool = False) -> Config:
    flags = {"insecure": "yes"} if insecure else {}
    return load(
        None,
        environ={},
        overrides=sets,
        flags=flags,
        doors=door_settings(),
        producers=producer_settings(),
    )


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("relay: ")
    assert captured.err.count("\n") == 1
    return captured.err


def rows(text: str) -> dict[str, str]:
    return dict(line.strip().split(None, 1) for line in text.splitlines() if line[0] == " ")


# ---- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["serve", "--inse"],
        ["serve", "extra"],
        ["token", "--user", "u"],
        ["token", "--channel", "c"],
        ["token", "--user", "u", "--channel", "c", "--ttl", "-1"],
        ["token", "--user", "u", "--channel", "c", "--ttl", "nan"],
        ["token", "--user", "u", "--channel", "c", "--ttl", "soon"],
        ["revoke", "c"],
    ],
)
def test_usage_errors_leave_with_2(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2


def test_lists_are_gathered() -> None:
    options: argparse.Namespace = parse(
        [
            "token",
            "--user",
            "u",
            "--channel",
            "a",
            "b",
            "--channel",
            "c",
            "--group",
            "g",
            "--set",
            "a.b=c",
            "--set",
            "d.e=f",
        ]
    )
    assert options.channel == ["a", "b", "c"]
    assert options.group == ["g"]
    assert options.overrides == ["a.b=c", "d.e=f"]


# ---- the commands ---------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"relay {__version__}\n"


def test_genconfig_is_accepted_by_checkconfig(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["genconfig"]) == 0
    path = tmp_path / "relay.ini"
    path.write_text(capsys.readouterr().out)
    assert main(["checkconfig", "-c", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: the configuration is valid\n"


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("server.port=abc", "--set server.port=abc: a whole number from 0 to 65535"),
        ("jwt.key=short", "[jwt] key"),
    ],
)
def test_checkconfig_says_what_serve_would(
    setting: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("checkconfig", "serve"):
        assert main([command, "--set", "redis.url=redis://127.0.0.1:1", "--set", setting]) == 1
        assert part in one_line(capsys)


def test_an_unknown_setting_with_a_secret_name_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "relay.ini").write_text("[jwt]\nsecret = abc\n")
    assert main(["checkconfig", "-c", "relay.ini"]) == 1
    assert "[jwt] secret is not a setting; there are" in capfd.readouterr().err


def test_the_environment_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_SERVER_PROT", "1")
    assert main(["checkconfig"]) == 1
    assert "RELAY_SERVER_PROT" in one_line(capsys)


def test_token_signs_with_the_configured_key(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["token", "--set", f"jwt.key={KEY}", "--user", "me", "--channel", "a", "b*"]
    assert main([*arguments, "--group", "g", "--ttl", "60"]) == 0
    claims = jwt.decode(capsys.readouterr().out.strip(), KEY, algorithms=["HS256"])
    assert (claims["sub"], claims["channels"], claims["groups"]) == ("me", ["a", "b*"], ["g"])
    assert 55 < claims["exp"] - claims["iat"] < 65
    assert main([*arguments, "--ttl", "0"]) == 0
    claims = jwt.decode(capsys.readouterr().out.strip(), KEY, algorithms=["HS256"])
    assert "exp" not in claims


def test_token_without_any_key_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["token", "--user", "u", "--channel", "c"]
    assert main([*arguments, "--set", "redis.url=redis://127.0.0.1"]) == 1
    assert "[jwt] key" in one_line(capsys)


def test_revoke_goes_where_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["revoke", "--redis", "redis://127.0.0.1:1", "c", "u"]) == 1
    assert "127.0.0.1:1" in one_line(capsys)
    assert main(["revoke", "", "u"]) == 1
    assert "1 to 255 characters" in one_line(capsys)
    assert main(["revoke", "c", ""]) == 1
    assert one_line(capsys) == "relay: USER: is empty\n"

    async def done(redis: object, channel: str, user: str) -> str:
        return "1-2"

    monkeypatch.setattr(relay.cli.access, "revoke", done)
    assert main(["revoke", "--redis", "redis://:pw@host", "c", "u"]) == 0
    assert capsys.readouterr().out == "Revoked: u receives no event of c after 1-2 (Redis: host)\n"


def test_errors_in_task_groups_are_one_line_and_bugs_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[BaseException] = [
        ExceptionGroup("outer", [ExceptionGroup("inner", [StartError("a\n  port is taken")])]),
        RedisUnavailable(f"token={KEY}"),
        KeyboardInterrupt(),
        ExceptionGroup("mixed", [StartError("a"), ValueError("bug")]),
    ]

    def run(*_args: object, **_kwargs: object) -> int:
        raise raised.pop(0)

    monkeypatch.setattr(relay.process.app, "run", run)
    assert main(["serve"]) == 1
    assert one_line(capsys) == "relay: a port is taken\n"
    assert main(["serve"]) == 1
    assert KEY not in one_line(capsys)
    assert main(["serve"]) == 130
    with pytest.raises(ExceptionGroup, match="mixed"):
        main(["serve"])


def test_serve_hands_over_reload_and_banner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "relay.ini"
    path.write_text("[node]\ndrain_s = 1\n")
    seen: list[Config] = []

    def run(config: Config, *, reload: object, on_ready: object) -> int:
        assert callable(reload)
        assert callable(on_ready)
        on_ready(8123, "redis://127.0.0.1:6399/0")
        path.write_text("[node]\ndrain_s = 2\n")
        seen.extend([config, reload()])
        return 7

    monkeypatch.setattr(relay.process.app, "run", run)
    terminal = [True]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal[0])
    assert main(["serve", "-c", str(path), "--host", "::1", "--port", "0", "--insecure"]) == 7
    first, second = seen
    assert (first.node.drain_s, second.node.drain_s) == (1, 2)
    assert first.insecure
    assert second.insecure
    assert first.jwt.key == second.jwt.key != SecretStr("")
    shown = capsys.readouterr().out
    assert "relay is ready on http://[::1]:8123" in shown
    # Relay has generated this key itself, so it may print a token.
    token = rows(shown)["token"]
    claims = jwt.decode(token, first.jwt.key.get_secret_value(), algorithms=["HS256"])
    assert claims["channels"] == ["*"]
    assert main(["serve", "-c", str(path), "--set", f"jwt.key={KEY}"]) == 7
    text = capsys.readouterr().out
    assert "eyJ" not in text
    assert KEY not in text
    assert rows(text)["token"].endswith(f"--channel news -c {path} --set jwt.key=...")
    # A pipe or a journal stores what is printed.
    terminal[0] = False
    assert main(["serve", "-c", str(path), "--set", "redis.embedded_dir=d"]) == 7
    text = capsys.readouterr().out
    assert "eyJ" not in text
    command = shlex.split(rows(text)["token"])
    assert command[-4:] == ["-c", str(path), "--set", "redis.embedded_dir=d"]
    assert main(command[command.index("token") :]) == 0
    assert capsys.readouterr().out.startswith("eyJ")


# ---- the generated key ----------------------------------------------------------------------


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    config = configured()
    made = with_local_key(config)
    assert with_local_key(config).jwt == made.jwt
    assert len(made.jwt.key.get_secret_value()) >= 32
    path = tmp_path / "data" / "jwt.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["jwt.key"]


async def test_processes_that_make_it_at_once_agree() -> None:
    config = configured()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(asyncio.to_thread(with_local_key, config)) for _ in range(20)]
    assert len({task.result().jwt.key.get_secret_value() for task in tasks}) == 1


@pytest.mark.parametrize(
    "setting", [f"jwt.key={KEY}", "jwt.algorithm=ES256", "redis.url=redis://127.0.0.1"]
)
def test_no_key_is_made_where_it_would_not_do(setting: str, tmp_path: Path) -> None:
    config = configured(setting)
    assert with_local_key(config) is config
    assert not list(tmp_path.iterdir())


def test_a_key_that_cannot_be_read_is_a_start_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "jwt.key").mkdir()
    with pytest.raises(StartError, match="jwt.key cannot be read or written"):
        with_local_key(configured())


# ---- the lines to copy ----------------------------------------------------------------------


def test_every_line_can_be_copied() -> None:
    text = banner(configured(), port=8000, redis_address="redis://127.0.0.1:6399/0", token="a.b.c")
    lines = rows(text)
    assert lines["page"] == "http://127.0.0.1:8000/#token=a.b.c&channel=news"
    assert lines["token"] == "a.b.c"
    assert lines["valkey"] == "127.0.0.1:6399"
    words = shlex.split(lines["append"])
    assert words[:4] == ["redis-cli", "-p", "6399", "XADD"]
    assert words[4:] == ["relay:stream:{news}", "*", "data", '{"hello":1}']
    assert shlex.split(lines["watch"])[-3:] == [
        "-H",
        "Authorization: Bearer a.b.c",
        "http://127.0.0.1:8000/sse?channel=news",
    ]


def test_without_a_token_the_lines_say_how_to_make_one() -> None:
    config = configured("server.host=0.0.0.0", "server.tls_cert=c")
    lines = rows(banner(config, port=1, redis_address=None, token=None))
    assert lines["page"] == "https://127.0.0.1:1/#channel=news"
    assert lines["token"].startswith("python -m relay token --user")
    assert "Bearer TOKEN" in lines["watch"]
    assert not {"valkey", "append"} & set(lines)


def test_lines_that_would_not_work_are_left_out() -> None:
    def shown(*settings: str) -> dict[str, str]:
        return rows(banner(configured(*settings), port=1, redis_address=None, token=None))

    assert not {"page", "token", "watch"} & set(shown("protocol:native.enabled=no"))
    assert "page" not in shown("protocol:native.page=no")
    lines = shown("protocol:native.port=9", "protocol:native.host=::")
    assert lines["page"] == "http://127.0.0.1:9/#channel=news"
    lines = shown("protocol:native.port=9", "protocol:native.host=::1, 127.0.0.1")
    assert lines["page"] == "http://[::1]:9/#channel=news"
    assert lines["watch"].endswith("'http://[::1]:9/sse?channel=news'")
    assert "set [jwt] key" in shown("redis.url=redis://127.0.0.1")["token"]
    assert "ES256" in shown("jwt.algorithm=ES256")["token"]


def test_insecure_is_said_and_needs_no_token() -> None:
    text = banner(configured(insecure=True), port=1, redis_address=None, token=None)
    assert "INSECURE: anyone may read" in text
    assert "token" not in text
    assert "Authorization" not in text


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://127.0.0.1:6379/0", ""),
        ("redis://localhost", ""),
        ("redis://host:1/2", "-h host -p 1 -n 2"),
        ("rediss://host", "--tls -h host"),
        ("redis://:hunter2@host", "-h host --askpass"),
        ("redis://me:hunter2@host", "-h host --user me --askpass"),
        ("unix:///run/r.sock?db=3", "-s /run/r.sock -n 3"),
        ("unix:///run/r.sock", "-s /run/r.sock"),
    ],
)
def test_redis_cli_is_told_where_and_never_the_password(url: str, options: str) -> None:
    config = configured(f"redis.url={url}", "redis.prefix=p:")
    lines = rows(banner(config, port=1, redis_address=url, token=None))
    assert lines["append"].startswith(" ".join(f"redis-cli {options} XADD 'p:stream:{{n".split()))
    assert "hunter2" not in str(lines)
    assert "valkey" not in lines


def test_behind_sentinels_no_append_line_is_shown() -> None:
    url = "sentinel://h:1,i:2/main/0"
    assert "append" not in rows(banner(configured(), port=1, redis_address=url, token=None))


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "Exit codes: 0 done; 1 configuration" in capsys.readouterr().out
