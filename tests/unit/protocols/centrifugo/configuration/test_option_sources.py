from __future__ import annotations

import pytest

from relay.protocols.centrifugo.configuration.options import OPTIONS
from tests.support.centrifugo_config import Write, door, error, translate

NO_OPTION = "unknown option of Centrifugo v1.8.0, ignored"


def test_flags_override_variables_which_override_the_file(write: Write) -> None:
    path = write('{"port": "1", "address": "a", "secret": "f", "api_port": 4}')
    environ = {"CENTRIFUGO_PORT": "2", "CENTRIFUGO_ADDRESS": "b", "CENTRIFUGO_API_PORT": ""}
    settings = door(translate(path, environ, port="3"))
    assert (settings.port, settings.host, settings.api_port) == (3, "b", 4)
    assert settings.secret.get_secret_value() == "f"


def test_only_the_documented_variables_are_read(write: Write) -> None:
    bound = [
        "debug",
        "insecure",
        "insecure_api",
        "admin",
        "admin_password",
        "admin_secret",
        "insecure_admin",
        "secret",
        "connection_lifetime",
        "watch",
        "publish",
        "anonymous",
        "join_leave",
        "presence",
        "recover",
        "history_size",
        "history_lifetime",
        "history_drop_inactive",
        "port",
        "api_port",
        "admin_port",
        "address",
        "web",
        "web_path",
        "insecure_web",
        "ssl",
        "ssl_cert",
        "ssl_key",
        "engine",
        "redis_host",
        "redis_port",
        "redis_url",
    ]
    assert {name for name, option in OPTIONS.items() if option.env} == set(bound)
    environ = {"CENTRIFUGO_MAX_CHANNEL_LENGTH": "7", "CENTRIFUGO_HOME": "/srv", "PORT": "1"}
    translation = translate(write('{"secret": "s"}'), environ)
    assert door(translation).max_channel_length == 255
    assert [note.split(":")[0] for note in translation.notes] == [
        "environment variable CENTRIFUGO_MAX_CHANNEL_LENGTH ignored"
    ]


@pytest.mark.parametrize(
    ("suffix", "text", "line"),
    [
        ("toml", "secret = hidden-one\n", "config.toml: line 1, column 10: not TOML"),
        ("toml", 'secret = "a"\nsecret = "hidden-one"\n', "config.toml: "),
        ("yaml", "secret: [hidden-one\n", "config.yaml: line 2, column 1: not YAML"),
        ("yaml", "secret: !hidden-one 1\n", "config.yaml: line 1, column 9"),
        ("yml", "a: \x00", "config.yml: not YAML"),
        ("yaml", "- 1\n", "config.yaml: must contain one object"),
        ("json", "\udc80".encode("utf-8", "surrogateescape").decode("latin-1") + "x", "line 1"),
    ],
)
def test_syntax_errors_do_not_quote_the_file(
    write: Write, suffix: str, text: str, line: str
) -> None:
    told = error(write, text, suffix)
    assert line in told
    assert "hidden-one" not in told


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_sets_nothing(write: Write, text: str) -> None:
    for suffix in ("toml", "yaml"):
        assert door(translate(write(text, suffix))).port == 8000


def test_unknown_keys_are_ignored_and_reported(write: Write) -> None:
    text = '{"secret": "s", "histori_size": 1, "namespaces": [{"name": "aa", "wacth": true}]}'
    notes = [note.partition("config.json: ")[2] for note in translate(write(text)).notes]
    assert notes == [
        f"histori_size: {NO_OPTION}; did you mean history_size?",
        f"namespace aa: wacth: {NO_OPTION}; did you mean watch?",
    ]


def test_switches_have_the_values_of_go(write: Write) -> None:
    for text in ("1", "t", "T", "true", "TRUE", "True"):
        assert door(translate(None, {"CENTRIFUGO_WATCH": text})).watch
        assert not door(translate(None, {"CENTRIFUGO_WATCH": "1"}, debug=text)).admin
    for text in ("0", "f", "F", "false", "FALSE", "False"):
        assert not door(translate(write('{"watch": true}'), {"CENTRIFUGO_WATCH": text})).watch
    assert door(translate(write('{"watch": "true"}'))).watch
