from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, SecretStr, field_validator

from relay.config.ini_text import allowed, env_name, example
from relay.config.loading import SECTIONS, Config, after_reload, load
from relay.config.settings import Section, ServerSettings
from relay.core.errors import ConfigError
from relay.core.model import Channel


class DoorSettings(Section):
    """[protocol:test]: a protocol."""

    enabled: bool = Field(True, description="off: it is shut")
    share: float = Field(0.5, gt=0, lt=1, description="of everything")
    code: str = Field("", max_length=3, description="short")
    secret: SecretStr = Field(SecretStr(""), description="of the door")
    odd: int = Field(1, description="an odd number")

    @field_validator("odd")
    @classmethod
    def _is_odd(cls, number: int) -> int:
        if number % 2 == 0:
            raise ValueError(f"{number} is even")
        return number


DOORS: Mapping[str, type[Section]] = {"protocol:test": DoorSettings}


def read(
    path: Path | None = None,
    *sets: str,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    doors: Mapping[str, type[Section]] = DOORS,
    strict: bool = False,
) -> Config:
    return load(
        path,
        environ=environ or {},
        overrides=sets,
        flags=flags or {},
        doors=doors,
        strict=strict,
    )


@pytest.fixture
def ini(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "relay.ini"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error(path: Path | None, *sets: str, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, *sets, environ=environ, strict=True)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path}:", "relay.ini:")


def test_without_any_source_the_defaults_apply() -> None:
    config = read()
    assert config.server == ServerSettings()
    assert config.namespaces[""].retention_count == 10000
    assert config.doors == {"protocol:test": DoorSettings()}
    assert not config.insecure


def test_file_then_environment_then_set_then_flag(ini: Callable[[str], Path]) -> None:
    path = ini("[server]\nport = 1\nhost = a\ntls_key = 5\ntls_cert = c\n")
    environ = {"RELAY_SERVER_PORT": "2", "RELAY_SERVER_HOST": "b", "RELAY_SERVER_TLS_KEY": "6"}
    sets = ["server.port=3", "server.host=c"]
    server = read(path, *sets, environ=environ, flags={"port": "4"}).server
    assert (server.port, server.host, server.tls_key, server.tls_cert) == (4, "c", "6", "c")


def test_the_last_set_wins_and_insecure_is_a_flag_only() -> None:
    config = read(None, "server.port=3", "server.port = 4", flags={"insecure": "yes"})
    assert config.server.port == 4
    assert config.insecure
    assert "is not a setting" in error(None, "server.insecure=yes")


def test_a_namespace_inherits_from_the_default_section(
    ini: Callable[[str], Path],
) -> None:
    path = ini(
        "[namespace:chat.eu]\nrights = anonymous\n[namespace]\nretention_count = 7\n[namespace:b]\n"
    )
    config = read(
        path,
        "namespace:chat.eu.durability=replicated:2",
        "namespace:new.rights=http",
        environ={"RELAY_NAMESPACE_B_RETENTION_AGE_S": "9", "RELAY_NAMESPACE_RIGHTS": "claims"},
    )
    chat = config.namespace(Channel("chat.eu:room"))
    assert (chat.rights, chat.retention_count, chat.durability) == ("anonymous", 7, "replicated:2")
    assert config.namespace(Channel("b:x")).retention_age_s == 9
    assert config.namespace(Channel("new:x")).sources() == {"http"}
    for channel in ("news", "b", "other:x", ":x"):
        rules = config.namespace(Channel(channel))
        assert (rules.rights, rules.retention_count, rules.retention_age_s) == ("claims", 7, 604800)


def test_replicas_to_wait_for_become_a_durability(ini: Callable[[str], Path]) -> None:
    path = ini("[namespace]\nwait_replicas = 2\n[namespace:a]\nwait_replicas = 0\n")
    config = read(path)
    assert (config.namespaces[""].durability, config.namespaces["a"].durability) == (
        "replicated:2",
        "fast",
    )
    assert "wait_replicas = N is durability = replicated:N" in config.notes[0]
    for wrong in ("replicated:0", "disk", "fast:1", "fsynced:100"):
        text = error(None, f"namespace.durability={wrong}")
        assert "namespace.durability" in text
        assert "durability must be fast, replicated, replicated:REPLICAS:MS, " in text
        assert repr(wrong) in text


def test_settings_for_sentinel_are_another_form_of_the_url(ini: Callable[[str], Path]) -> None:
    path = ini("[redis]\nsentinels = s1:1, s2\nmaster_name = my/main\ntls = yes\ndb = 3\n")
    assert read(path).redis.url == "rediss+sentinel://s1:1,s2/my%2Fmain/3"
    # The URL of a command or an operator's environment replaces those of the file.
    assert read(path, "redis.url=redis://h").redis.url == "redis://h"
    assert read(
        ini("[redis]\nurl = redis://h\n"), "redis.sentinels=s", "redis.master_name=m"
    ).redis.url == ("redis+sentinel://s/m/0")
    both = ini("[redis]\nurl = redis://h\nsentinels = s\nmaster_name = m\n")
    assert "set either url, or sentinels and master_name" in error(both)
    for lone in ("sentinels = s", "master_name = m"):
        assert "must be set together" in error(ini(f"[redis]\n{lone}\n"))
    for wrong in ("s1;s2", "redis://s1", "s1, ::1:26379", "u:p@s1", "s1:port"):
        text = error(ini(f"[redis]\nsentinels = {wrong}\nmaster_name = m\n"))
        assert "[redis]: sentinels: " in text
        assert "must be host:port" in text
    both = ini("[redis]\nsentinels = s1 , [::1]:26379,\nmaster_name = m\n")
    assert read(both).redis.url == "redis+sentinel://s1,[::1]:26379/m/0"


def test_a_secret_from_a_file_loses_its_last_newline(
    ini: Callable[[str], Path], tmp_path: Path
) -> None:
    for number, ending in enumerate(("", "\n", "\r\n")):
        (tmp_path / str(number)).write_bytes(b" s\n\n"[:3] + ending.encode())
        key = read(ini(f"[jwt]\nkey_file = {tmp_path / str(number)}\n")).jwt.key
        assert key.get_secret_value() == (" s" if number == 0 else " s\n")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfs\n")
    key = read(ini(f"[jwt]\nkey_file = {tmp_path / 'bom'}\n")).jwt.key
    assert key.get_secret_value() == "s"
    for source in (
        read(None, f"jwt.key_file={tmp_path / '1'}"),
        read(environ={"RELAY_JWT_KEY_FILE": str(tmp_path / "1")}),
    ):
        assert source.jwt.key.get_secret_value() == " s\n"


def test_a_later_source_replaces_a_secret_in_either_form(
    ini: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("from file\n")
    path = ini("[jwt]\nkey = plain\n")
    key = read(path, environ={"RELAY_JWT_KEY_FILE": str(tmp_path / "key")}).jwt.key
    assert key.get_secret_value() == "from file"
    path = ini("[jwt]\nkey_file = /nowhere\n")
    assert read(path, "jwt.key=plain").jwt.key.get_secret_value() == "plain"


def test_values_keep_percent_hash_and_semicolon_and_may_span_lines(
    ini: Callable[[str], Path],
) -> None:
    path = ini("\ufeff; a comment\n[jwt]\n# another\nkey = a%b # c ; d\n  ---\n  e=f\n")
    assert read(path).jwt.key.get_secret_value() == "a%b # c ; d\n---\ne=f"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[server]\nport = abc\n",
            "relay.ini: [server] port = abc: a whole number from 0 to 65535",
        ),
        ("[server]\nport =\n", "relay.ini: [server] port = : a whole number from 0 to 65535"),
        ("[server]\nport = 1.5", "relay.ini: [server] port = 1.5: a whole number from 0 to 65535"),
        ("[server]\nport = 65536", "a whole number from 0 to 65535"),
        ("[node]\ndrain_s = nan", "relay.ini: [node] drain_s = nan: a number from 0 to 300"),
        ("[node]\ndrain_s = inf", "a number from 0 to 300"),
        ("[redis]\nconnect_timeout_s = 0", "a number above 0 to 60"),
        ("[protocol:test]\nshare = 1", "[protocol:test] share = 1: a number above 0 below 1"),
        ("[protocol:test]\nenabled = perhaps", "enabled = perhaps: yes or no"),
        ("[protocol:test]\ncode = long", "code = long: text of at most 3 characters"),
        ("[protocol:test]\nodd = 2", "relay.ini: [protocol:test] odd = 2: 2 is even"),
        ("[log]\nlevel = loud", "level = loud: one of debug, info, warning, error"),
        ("[namespace:x]\nrights = all", "[namespace:x] rights = all: text that matches"),
        ("[namespace:x]\nrights = all", "hash (the rights hash in Redis)"),
        ("[server]\nprot = 1\n", "relay.ini: [server] prot is not a setting, did you mean port?"),
        ("[server]\nPort = 1\n", "[server] Port is not a setting, did you mean port?"),
        ("[severs]\n", "relay.ini: [severs]: no such section, did you mean server?"),
        ("[DEFAULT]\nport = 1\n", "[DEFAULT]: no such section"),
        ("[namespace:a:b]\n", "[namespace:a:b]: namespace name must not contain ':'"),
        ("[namespace:]\n", "namespace name must not contain ':'"),
        (f"[namespace:{'x' * 256}]\n", "1 to 255 characters"),
        ("port = 1\n", "relay.ini: line 1: setting before the first [section]"),
        ("[server]\nport\n", "relay.ini: line 2: neither a [section] nor KEY = VALUE"),
        ("[server]\n[server]\n", "relay.ini: line 2: duplicate section [server]"),
        ("[server]\nport=1\nport=2\n", "relay.ini: line 3: duplicate setting [server] port"),
        ("[jwt]\nkey_file = /nowhere/k", "key_file = /nowhere/k: cannot be read: No such file"),
        ("[jwt]\nkey_file = /proc/self/exe", "is not UTF-8 text"),
        ("[jwt]\nkey = a\nkey_file = b", "[jwt] key_file = b: key is set in the same source"),
        ("[jwt]\naudience_file = b", "[jwt] audience_file is not a setting"),
    ],
)
def test_an_error_in_a_file_is_one_line(ini: Callable[[str], Path], text: str, line: str) -> None:
    path = ini(text)
    message = error(path)
    assert message.startswith("relay.ini: ")
    assert line in message


def test_the_error_names_an_unreadable_file(tmp_path: Path) -> None:
    assert error(tmp_path / "none.ini") == "relay.ini: cannot be read: No such file or directory"
    (tmp_path / "bad.ini").write_bytes(b"[server]\nhost = \xff\n")
    assert error(tmp_path / "bad.ini").endswith("is not UTF-8 text (byte 16)")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("RELAY_SERVER_PORT", "x", "environment variable RELAY_SERVER_PORT = x: a whole number"),
        (
            "RELAY_SERVER_PROT",
            "1",
            "RELAY_SERVER_PROT: no setting has this name, did you mean RELA",
        ),
        ("RELAY_NAMESPACE_X_RIGHTS", "hash", "a [namespace:NAME] must be in the file"),
        ("RELAY_PROTOCOL_TEST_ODD", "4", "RELAY_PROTOCOL_TEST_ODD = 4: 4 is even"),
    ],
)
def test_an_error_in_the_environment_is_one_line(name: str, text: str, line: str) -> None:
    assert line in error(None, environ={name: text, "HOME": "/", "RELAYS": "x"})


def test_ignores_variables_of_container_platforms_for_a_service_named_relay() -> None:
    links = {
        "RELAY_PORT": "tcp://10.0.0.1:8000",
        "RELAY_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "RELAY_PORT_8000_TCP_ADDR": "10.0.0.1",
        "RELAY_SERVICE_HOST": "10.0.0.1",
        "RELAY_SERVICE_PORT": "8000",
        "RELAY_SERVICE_PORT_HTTP": "8000",
        # From services named relay-redis and relay-server. RELAY_SERVER_PORT is a setting too.
        "RELAY_REDIS_SERVICE_HOST": "10.0.0.2",
        "RELAY_REDIS_PORT_6379_TCP_PORT": "6379",
        "RELAY_SERVER_PORT": "tcp://10.0.0.3:8000",
        "RELAY_METRICS_PORT": "tcp://[fd00::3]:9100",
    }
    config = read(environ=links, strict=True)
    assert config == read()
    assert not config.notes


def test_an_unknown_variable_is_a_note_unless_strict() -> None:
    environ = {"RELAY_SERVER_PROT": "1", "RELAY_HOME": "/srv", "RELAY_SERVER_PORT": "81"}
    config = read(environ=environ)
    assert config.server.port == 81
    home, port = config.notes
    assert home.startswith("environment variable RELAY_HOME: no setting has this name")
    assert port.endswith("did you mean RELAY_SERVER_PORT?")
    with pytest.raises(ConfigError, match="RELAY_HOME: no setting has this name"):
        read(environ=environ, strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "the one that signs X-API-Sign",
        "the private key of Pydio's settings",
        "<secret>",
        "${JWT_KEY}",
        "CHANGE_ME",
        "changeme-please",
        "your-256-bit-secret",
        "REPLACE_WITH_A_SECRET",
        "insert your key here",
    ],
)
def test_a_placeholder_is_rejected_as_a_secret(text: str, tmp_path: Path) -> None:
    expected = "is a placeholder from an example"
    line = error(None, f"jwt.key={text}")
    assert expected in line
    assert text not in line
    (tmp_path / "key").write_text(f"{text}\n")
    assert expected in error(None, f"protocol:test.secret_file={tmp_path / 'key'}")


def test_other_texts_are_accepted_as_secrets() -> None:
    for text in ("correct horse battery staple", "theoneandonly", "-----BEGIN PUBLIC KEY-----"):
        assert read(None, f"jwt.key={text}").jwt.key.get_secret_value() == text


class RenamedSettings(Section):
    """[protocol:renamed]: two settings were removed, one of them with a replacement."""

    removed: ClassVar[Mapping[str, str]] = {
        "speed": "is no longer read; it is always 3",
        "host": "is now part of url",
    }

    url: str = Field("", description="address")
    port: int = Field(1, description="port")

    @classmethod
    def from_removed(cls, values: Mapping[str, str]) -> Mapping[str, str]:
        return {"url": f"x://{values['host']}"} if "host" in values else {}


RENAMED: Mapping[str, type[Section]] = {**DOORS, "protocol:renamed": RenamedSettings}


def test_a_removed_setting_is_accepted_with_one_note(ini: Callable[[str], Path]) -> None:
    path = ini("[protocol:renamed]\nspeed = fast\nport = 2\n")
    for sets, environ, where in (
        ([], {}, "relay.ini: [protocol:renamed] speed"),
        ([], {"RELAY_PROTOCOL_RENAMED_SPEED": "slow"}, "environment variable RELAY_PROTOCOL_REN"),
        (["protocol:renamed.speed=1"], {}, "--set protocol:renamed.speed"),
    ):
        config = read(path, *sets, environ=environ, doors=RENAMED, strict=True)
        (note,) = config.notes
        assert note.endswith("speed is no longer read; it is always 3") or where in note
        assert note.replace(f"{path}:", "relay.ini:").startswith(where)
        section = config.doors["protocol:renamed"]
        assert isinstance(section, RenamedSettings)
        assert (section.port, section.url) == (2, "")
        assert config.origins.keys() == {"[protocol:renamed] port"}


def test_a_removed_setting_with_a_replacement_keeps_its_effect(ini: Callable[[str], Path]) -> None:
    path = ini("[protocol:renamed]\nhost = a\n")
    for sets, url in (([], "x://a"), (["protocol:renamed.url=y://b"], "y://b")):
        config = read(path, *sets, doors=RENAMED)
        section = config.doors["protocol:renamed"]
        assert isinstance(section, RenamedSettings)
        assert section.url == url
        assert config.notes == [f"{path}: [protocol:renamed] host is now part of url"]


def test_a_reload_applies_some_settings_and_names_the_others() -> None:
    old = read(None, "server.port=1", "log.level=info", "protocol:test.code=a")
    sets = ["server.port=2", "log.level=debug", "log.format=json", "protocol:test.code=b"]
    sets += ["protocol:test.enabled=no", "hub.connections_per_user=3", "rights.http_cache_s=9"]
    new = read(None, *sets, "namespace:x.rights=hash")
    config, later = after_reload(old, new)
    assert sorted(later) == ["[log] format", "[protocol:test] enabled", "[server] port"]
    assert (config.server, config.log.format) == (old.server, "plain")
    assert (config.log.level, config.hub.connections_per_user) == ("debug", 3)
    assert (config.rights, config.namespaces) == (new.rights, new.namespaces)
    door = config.doors["protocol:test"]
    assert isinstance(door, DoorSettings)
    assert (door.code, door.enabled) == ("b", True)
    # A worker that replaces another one receives the configuration as bytes.
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  # written by this process


def test_one_environment_name_of_two_settings_is_an_error_once_it_is_used(
    ini: Callable[[str], Path],
) -> None:
    path = ini("[namespace:a-b]\n[namespace:a.b]\n")
    assert read(path).namespaces.keys() == {"", "a-b", "a.b"}
    line = error(path, environ={"RELAY_NAMESPACE_A_B_RIGHTS": "hash"})
    assert line.startswith("[namespace:a-b] rights and [namespace:a.b] rights share")
    assert "RELAY_NAMESPACE_A_B_RIGHTS" in line
    doors = {"protocol:x": DoorSettings, "protocol.x": DoorSettings}
    with pytest.raises(ConfigError, match="share the environment variable"):
        read(doors=doors, environ={"RELAY_PROTOCOL_X_CODE": "a"})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("server.port=x", "--set server.port=x: a whole number from 0 to 65535"),
        ("port=1", "--set port: must be SECTION.KEY=VALUE"),
        ("secret text", "--set ...: must be SECTION.KEY=VALUE"),
        (".port=1", "must be SECTION.KEY=VALUE"),
        ("server.=1", "must be SECTION.KEY=VALUE"),
        ("nowhere.port=1", "--set nowhere.port: no such section"),
        ("server.prot=1", "--set server.prot is not a setting, did you mean port?"),
        ("namespace:a:b.rights=hash", "namespace name must not contain ':'"),
    ],
)
def test_an_error_in_set_is_one_line(override: str, line: str) -> None:
    assert line in error(None, override)


def test_an_error_in_a_flag_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--port x: a whole number from 0 to 65535$"):
        read(flags={"port": "x"})


def test_no_error_shows_a_secret(ini: Callable[[str], Path]) -> None:
    class Strict(Section):
        secret: SecretStr = Field(SecretStr(""), max_length=3, description="short")

    path = ini("[protocol:test]\nsecret = hunter2\n")
    with pytest.raises(ConfigError) as caught:
        read(path, doors={"protocol:test": Strict})
    assert "(hidden)" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with pytest.raises(ConfigError) as caught:
        read(ini("hunter2\n[server]\n"))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(read(None, "jwt.key=hunter2"))


def test_errors_shorten_long_values_and_remove_line_breaks() -> None:
    line = error(None, f"server.port={'x' * 100}\n{'y' * 100}")
    assert "xxx...: a whole number" in line


def test_a_rule_about_several_settings_names_the_section() -> None:
    class Pair(Section):
        a: int = Field(1, description="one")

        @field_validator("a", mode="after")
        @classmethod
        def _never(cls, _: int) -> int:
            raise ValueError("never right")

    with pytest.raises(ConfigError, match=r"^--set protocol:test\.a=3: never right$"):
        read(None, "protocol:test.a=3", doors={"protocol:test": Pair})


def test_a_config_cannot_be_changed() -> None:
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.insecure = True  # type: ignore[misc]


def test_the_uncommented_example_equals_the_defaults(tmp_path: Path) -> None:
    text = example({**SECTIONS, **DOORS})
    settings = [line for line in text.splitlines() if line.startswith("#") and line[1:2] != " "]
    classes: list[type[Section]] = [*SECTIONS.values(), DoorSettings]
    count = sum(len(cls.model_fields) for cls in classes)
    blank = text.splitlines().count("#")
    assert len(settings) - blank == count
    path = tmp_path / "relay.ini"
    path.write_text(text.replace("\n#", "\n").replace("\n ", "\n# "))
    assert read(path) == read()


def test_every_setting_in_the_example_has_a_comment_with_its_default() -> None:
    lines = example({**SECTIONS, **DOORS}).splitlines()
    assert max(map(len, lines)) <= 100
    comment = ""
    for line in lines:
        if line.startswith("# "):
            comment += line.removeprefix("#")
        elif line.startswith("#") and len(line) > 1:
            assert ", default: " in comment, line
            comment = ""
        elif not line:
            comment = ""


def test_environment_names_contain_capitals_digits_and_underscores() -> None:
    assert env_name("protocol:native", "heartbeat_s") == "RELAY_PROTOCOL_NATIVE_HEARTBEAT_S"
    assert env_name("namespace:Ä.1", "rights") == "RELAY_NAMESPACE___1_RIGHTS"


def test_a_setting_without_limits_is_described_by_its_type() -> None:
    class Free(Section):
        number: int = Field(1, description="any")
        text: str = Field("", description="any")

    fields: Sequence[str] = [allowed(field) for field in Free.model_fields.values()]
    assert fields == ["a whole number", "text"]


@pytest.mark.parametrize("name", ["code", "secret_file"])
def test_an_indented_setting_is_not_part_of_a_secret(ini: Callable[[str], Path], name: str) -> None:
    path = ini(f"[protocol:test]\nsecret = a\n  {name} = b\n")
    line = error(path)
    assert line.startswith("relay.ini: [protocol:test] secret: the indented line with")
    text = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZI==\n-----END PUBLIC KEY-----"
    indented = text.replace("\n", "\n  ")
    door = read(ini(f"[protocol:test]\nsecret = {indented}\n")).doors["protocol:test"]
    assert isinstance(door, DoorSettings)
    assert door.secret.get_secret_value() == text
