from __future__ import annotations

import json
from pathlib import Path

import pytest

from relay.config.imported import ConfigurationImport
from relay.config.ini_text import ini
from relay.config.loading import load
from relay.config.settings import LogSettings, NodeSettings, RedisSettings
from relay.core.errors import ConfigError
from relay.core.model import Channel
from relay.protocols import door_settings, find_imports
from relay.protocols.centrifugo.configuration.options import (
    CHANNEL_OPTIONS,
    OPTIONS,
    OptionHandling,
)
from relay.protocols.centrifugo.settings import CentrifugoNamespace, CentrifugoSettings
from tests.support.centrifugo_config import IMPORT, Write, configured, door, error, translate

# The documented example (server/configuration.md) in the three formats.
DOCUMENTED = {
    "json": """{
  "secret": "secret",
  "namespaces": [
    {"name": "public", "publish": true, "watch": true, "presence": true, "join_leave": true,
     "history_size": 10, "history_lifetime": 30}
  ],
  "log_level": "debug"
}""",
    "toml": """log_level = "debug"

secret = "secret"

[[namespaces]]
name = "public"
publish = true
watch = true
presence = true
join_leave = true
history_size = 10
history_lifetime = 30
""",
    "yaml": """log_level: debug

secret: secret
namespaces:
  - name: public
    publish: true
    watch: true
    presence: true
    join_leave: true
    history_size: 10
    history_lifetime: 30
""",
}
EVERYWHERE = "::"


def test_the_command_line_finds_the_import() -> None:
    found: list[ConfigurationImport] = [
        each for each in find_imports() if each.command == "centrifugo"
    ]
    assert [each.version for each in found] == ["Centrifugo v1.8.0"]


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml", "yml"])
def test_the_documented_file_in_every_format(write: Write, suffix: str) -> None:
    translation = translate(write(DOCUMENTED["yaml" if suffix == "yml" else suffix], suffix))
    config = configured(translation)
    assert translation.notes == []
    assert config.log == LogSettings(level="debug")
    assert config.redis == RedisSettings()
    settings = door(translation)
    assert settings.secret.get_secret_value() == "secret"
    assert (settings.host, settings.port) == (EVERYWHERE, 8000)
    assert settings.namespaces == {
        "public": CentrifugoNamespace(
            publish=True,
            watch=True,
            presence=True,
            join_leave=True,
            history_size=10,
            history_lifetime=30,
        )
    }
    assert not settings.publish


def test_the_defaults_are_those_of_centrifugo(tmp_path: Path) -> None:
    translation = translate(tmp_path / "config.json")
    assert translation.missing.endswith("config.json: file not found")
    assert not translation.notes
    assert door(translation) == CentrifugoSettings(host=EVERYWHERE, port=8000)
    config = configured(translation)
    assert config.server.port == 0
    assert config.server.host == "127.0.0.1"
    assert config.redis.url == "embedded"
    assert config.node == NodeSettings()


def test_the_flags_are_those_of_centrifugo() -> None:
    flags = [
        "address",
        "admin",
        "admin_port",
        "api_port",
        "debug",
        "engine",
        "insecure",
        "insecure_admin",
        "insecure_api",
        "log_file",
        "log_level",
        "name",
        "pid_file",
        "port",
        "redis_api",
        "redis_api_num_shards",
        "redis_db",
        "redis_host",
        "redis_master_name",
        "redis_password",
        "redis_pool",
        "redis_port",
        "redis_sentinels",
        "redis_url",
        "ssl",
        "ssl_cert",
        "ssl_key",
        "web",
        "web_path",
    ]
    assert {flag.name for flag in IMPORT.flags} == set(flags)
    short = {flag.short: flag.name for flag in IMPORT.flags if flag.short}
    letters = [("a", "address"), ("d", "debug"), ("e", "engine"), ("n", "name"), ("p", "port")]
    assert short == dict([*letters, ("w", "web")])


def test_each_mapped_option_changes_its_setting(write: Write) -> None:
    """Each option has a value that is not the default."""
    values: dict[str, object] = {}
    own = {
        name: option.to[0].rpartition(".")[2]
        for name, option in OPTIONS.items()
        if option.handling is OptionHandling.MAPPED
        and not option.made
        and "centrifugo" in option.to[0]
    }
    given: dict[str, object] = {}
    for name, key in own.items():
        default = CentrifugoSettings.model_fields[key].get_default()
        value: object = "%!"
        if isinstance(default, bool):
            value = not default
        elif isinstance(default, int | float):
            value = 5000 if name == "client_queue_max_size" else 7
        values[key] = given[name.upper()] = value
    assert len(own) > 40
    settings = door(translate(write(json.dumps(given))))
    for key, value in values.items():
        got = getattr(settings, key)
        assert (got.get_secret_value() if hasattr(got, "get_secret_value") else got) == value, key


def test_computed_options_change_their_settings(write: Write) -> None:
    text = """{"secret": "s", "name": "n1", "pid_file": "/run/p", "log_file": "/log",
        "log_level": "CRITICAL", "http_prefix": "centrifugo/", "web": true, "ssl": true,
        "ssl_cert": "/c", "ssl_key": "/k", "admin_port": "9"}"""
    translation = translate(write(text))
    config = configured(translation)
    assert config.node == NodeSettings(name="n1", pid_file="/run/p")
    assert config.log == LogSettings(level="error", file="/log")
    settings = door(translation)
    assert (settings.http_prefix, settings.web, settings.admin_port) == ("/centrifugo", True, 9)
    assert (settings.tls_cert, settings.tls_key) == ("/c", "/k")
    assert [note for note in translation.notes if "console replaces" in note]


@pytest.mark.parametrize(
    ("options", "url", "password"),
    [
        ("", "redis://127.0.0.1:6379/0", ""),
        ('"redis_host": "r", "redis_port": 7, "redis_db": 3', "redis://r:7/3", ""),
        ('"redis_host": "::1", "redis_password": "p@:/"', "redis://[::1]:6379/0", "p@:/"),
        ('"redis_url": "redis://:p%40w@r:7/2", "redis_host": "no"', "redis://r:7/2", "p@w"),
        ('"redis_url": "redis://r", "redis_password": "no"', "redis://r:6379/0", ""),
        (
            '"redis_host": "a,b", "redis_port": "7,8", "redis_password": "p"',
            "redis://a:7/0, redis://b:8/0",
            "p",
        ),
        ('"redis_host": "a", "redis_db": "3, 4"', "redis://a:6379/3, redis://a:6379/4", ""),
        ('"redis_port": "6379,6380"', "redis://127.0.0.1:6379/0, redis://127.0.0.1:6380/0", ""),
        (
            '"redis_url": "redis://:p@a/1,redis://:p@b/2"',
            "redis://a:6379/1, redis://b:6379/2",
            "p",
        ),
        (
            '"redis_url": "redis://:p@a, redis://:q%2Fr@b"',
            "redis://:p@a:6379/0, redis://:q%2Fr@b:6379/0",
            "",
        ),
        (
            '"redis_master_name": "one,two", "redis_sentinels": ":1,s2:2"',
            "sentinel://127.0.0.1:1,s2:2/one/0, sentinel://127.0.0.1:1,s2:2/two/0",
            "",
        ),
        (
            '"redis_master_name": "mymaster", "redis_sentinels": ":26379, s2:26380"',
            "sentinel://127.0.0.1:26379,s2:26380/mymaster/0",
            "",
        ),
    ],
)
def test_the_address_of_the_redis_engine(
    write: Write, options: str, url: str, password: str
) -> None:
    more = f", {options}" if options else ""
    translation = translate(write(f'{{"secret": "s", "engine": "redis"{more}}}'))
    redis = configured(translation).redis
    assert (redis.url, redis.password.get_secret_value()) == (url, password)
    memory = translate(write(f'{{"secret": "s"{more}}}'))
    assert configured(memory).redis.url == "embedded"


def test_the_other_options_of_the_redis_engine(write: Write) -> None:
    text = """{"secret": "s", "engine": "redis", "redis_api": true, "redis_api_num_shards": 5,
        "redis_prefix": "app", "redis_connect_timeout": 3, "redis_read_timeout": 0}"""
    settings = {(each.section, each.key): each.text for each in translate(write(text)).settings}
    assert settings["producer:queue", "enabled"] == "yes"
    assert settings["producer:queue", "shards"] == "5"
    assert settings["producer:queue", "name"] == "app.api"
    assert settings["redis", "prefix"] == "relay:app:"
    assert settings["redis", "connect_timeout_s"] == "3"
    assert ("redis", "command_timeout_s") not in settings


def test_retention_is_the_history_but_at_least_an_hour(write: Write) -> None:
    text = """{"secret": "s", "history_size": 5, "history_lifetime": 10, "namespaces": [
        {"name": "big", "history_size": 50000, "history_lifetime": 1},
        {"name": "old", "history_size": 1, "history_lifetime": 864000}, {"name": "none"}]}"""
    config = configured(translate(write(text)))
    for channel, kept in {
        "news": (10000, 3600),
        "none:x": (10000, 3600),
        "big:x": (50000, 3600),
        "$big:x": (50000, 3600),
        "old:x": (10000, 864000),
    }.items():
        rules = config.namespace(Channel(channel))
        assert (rules.retention_count, rules.retention_age_s) == kept, channel
        # Centrifugo does not deduplicate messages by uid.
        assert not rules.unique_uids
    slash = text.replace("{", '{"namespace_channel_boundary": "/", ', 1)
    rules = configured(translate(write(slash))).namespace(Channel("big/x"))
    assert (rules.retention_count, rules.retention_age_s) == (50000, 864000)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"secret": s}', "config.json: line 1, column 12: Expecting value"),
        ("[]", "config.json: must contain one object with options"),
        ('{"port": "x"}', "config.json: port = x: a whole number from 0 to 65535"),
        ('{"history_size": 1.5}', "config.json: history_size = 1.5: a whole number"),
        ('{"history_size": 1234567890123}', "config.json: history_size = 1234567890123: a whole"),
        ('{"history_lifetime": 1e12}', "config.json: history_lifetime = 1000000000000: a whole"),
        ('{"insecure": "perhaps"}', "config.json: insecure: must be true or false"),
        ('{"secret": ["a"]}', "config.json: secret: must be text"),
        ('{"history_size": true}', "config.json: history_size: must be a number"),
        ('{"engine": "etcd"}', "config.json: engine = etcd: must be memory or redis"),
        ('{"namespaces": {}}', "config.json: namespaces: must be a list of objects"),
        ('{"namespaces": ["a"]}', "config.json: namespaces: must be a list of objects"),
        ('{"namespaces": [{}]}', "config.json: namespaces, number 1: name = '': must be"),
        ('{"namespaces": [{"name": "a"}]}', "must be two or more letters"),
        ('{"namespaces": [{"name": "aa"}, {"Name": "aa"}]}', "namespaces: aa is defined twice"),
        ('{"namespaces": [{"name": "axr"}]}', "is reserved for another protocol"),
        (
            '{"namespaces": [{"name": "aa", "history_size": -1}]}',
            "config.json: namespace aa: history_size = -1: a whole number from 0",
        ),
        ('{"ssl_autocert": true}', "ssl_autocert = yes: relay does not obtain ACME certificates"),
        ('{"ssl": true, "ssl_key": "k"}', "config.json: ssl = yes: needs ssl_cert"),
        ('{"web": true, "web_path": "/w"}', "web_path = /w: relay does not serve custom web pages"),
        (
            '{"engine": "redis", "redis_port": "1,2", "redis_host": "a,b,c"}',
            "redis_port = (2 values): must have one value, or 3 as redis_host",
        ),
        ('{"engine": "redis", "redis_port": "1,x"}', "redis_port = 1,x: must be a port, or ports"),
        ('{"engine": "redis", "redis_host": "a,"}', "redis_host = a,: must be a host, or hosts"),
        ('{"engine": "redis", "redis_db": "a"}', "redis_db = a: must be a number, or numbers"),
        ('{"engine": "redis", "redis_url": "r:1"}', "redis_url = (hidden): must be redis://"),
        ('{"engine": "redis", "redis_sentinels": ":1"}', "must be set together"),
        ('{"max_channel_length": 1000}', "max_channel_length = 1000: a whole number from 1 to 255"),
    ],
)
def test_an_error_is_one_line(write: Write, text: str, line: str) -> None:
    assert line in error(write, text)


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml", "yml"])
def test_the_example_file_has_a_new_secret(write: Write, suffix: str) -> None:
    found = set()
    for _ in range(2):
        text = IMPORT.example(Path(f"c.{suffix}"))
        found.add(door(translate(write(text, suffix))).secret.get_secret_value())
    assert all(len(secret) == 36 for secret in found)
    assert len(found) == 2
    with pytest.raises(
        ConfigError, match=r"c.ini: must have one of the suffixes .json, .toml, .yaml, .yml"
    ):
        IMPORT.example(Path("c.ini"))


def test_the_ini_file_has_the_same_settings(write: Write, tmp_path: Path) -> None:
    text = """{"secret": "a%b;#c", "engine": "redis", "redis_password": "x", "recover": true,
        "history_size": 20000, "history_lifetime": 7, "namespaces": [{"name": "aa"}, {"name":
        "b-b", "publish": true, "history_size": 2, "history_lifetime": 9999}], "web": true}"""
    translation = translate(write(text))
    path = tmp_path / "relay.ini"
    path.write_text(ini(translation.settings))
    kept = load(path, environ={}, overrides=[], flags={}, doors=door_settings())
    assert kept == configured(translation)


def test_channel_options_have_the_same_type_in_namespaces() -> None:
    assert {name: OPTIONS[name].kind for name in CHANNEL_OPTIONS} == CHANNEL_OPTIONS
    assert set(CHANNEL_OPTIONS) == set(CentrifugoNamespace.model_fields)
