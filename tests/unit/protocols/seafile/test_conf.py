"""Configuration files of each Seafile version, as printed in its manuals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.core.errors import ConfigError
from relay.protocols.seafile import conf

KEY = "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"
TOKEN = "xP7GGgGPVCQu8r0xNJ+k4Q=="

# Upstream's default.
EVERYWHERE = "::"
# As the manual of the first 10.0 prints the two files, its unmatched quote included.
FIRST_SEAFILE = f"""\
## seafile.conf
# notification_token and private_key are required.You should generate them manually.
[notification]
# notification_url is the url of notification server
notification_url = 127.0.0.1:8083
notification_token = {TOKEN}
# private_key is used to generate jwt token
private_key = {KEY}
"""
FIRST_NOTIFICATION = f"""\
## notification.conf
# private_key and notification_token are required.You should generate them manually.
[general]
# the ip of notification server
host = 127.0.0.1
# the port of notification server
port = 8083
# the log level of notification server
log_level = info
notification_token = {TOKEN}
# private_key is used to check whether the request jwt token is valid
private_key = "{KEY}
"""
LATER_SEAFILE = f"""\
# jwt_private_key are required.You should generate it manually.
[notification]
enabled = true
# the ip of notification server. (Do not modify the host when using Nginx or Apache)
host = 127.0.0.1
port = 8083
log_level = debug
jwt_private_key = {KEY}
"""
CCNET = """\
[Database]
ENGINE = mysql
HOST = db.example.org
PORT = 3307
USER = seafile
PASSWD = p%w#1;"x
DB = ccnet-db
USE_SSL = true
"""


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / f"{name}.conf").write_text(text)
    return path


def test_reads_both_files_of_the_first_manual(tmp_path: Path) -> None:
    both = conf.read(
        folder(tmp_path, seafile=FIRST_SEAFILE, notification=FIRST_NOTIFICATION), {}
    ).settings
    assert both == {
        "key": KEY,
        "notification_token": TOKEN,
        "host": "127.0.0.1",
        "port": "8083",
    }
    for name in ("seafile", "notification"):
        alone = tmp_path / name
        alone.mkdir()
        folder(alone, **{name: (tmp_path / f"{name}.conf").read_text()})
        assert conf.read(alone, {}).settings["key"] == KEY


def test_reads_the_file_of_the_later_manual(tmp_path: Path) -> None:
    found = conf.read(folder(tmp_path, seafile=LATER_SEAFILE), {})
    assert found.settings == {"enabled": "yes", "host": "127.0.0.1", "port": "8083", "key": KEY}
    assert found.log_level == "debug"


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("a#b;c%d", "a#b;c%d"),
        ("#begins", "#begins"),
        ("a # b ; c", "a # b ; c"),
        ("%(name)s %% $HOME", "%(name)s %% $HOME"),
        ('"quoted"', "quoted"),
        ("'quoted'", "quoted"),
        ('"unmatched', "unmatched"),
        ('unmatched"', "unmatched"),
        ('in"side', 'in"side'),
        ("a=b==", "a=b=="),
        ("back\\slash\\", "back\\slash\\"),
        ("[looks] like a section", "[looks] like a section"),
    ],
)
def test_reads_keys_of_any_characters(tmp_path: Path, written: str, key: str) -> None:
    text = f"[notification]\nenabled=true\njwt_private_key={written}\nport=8083\n"
    assert conf.read(folder(tmp_path, seafile=text), {}).settings["key"].split("\n---\n")[0] == key
    spaced = f"\ufeff[notification]\r\n  jwt_private_key  =  {written}  \r\n"
    assert (
        conf.read(folder(tmp_path, seafile=spaced), {}).settings["key"].split("\n---\n")[0] == key
    )


def test_reads_the_ccnet_database(tmp_path: Path) -> None:
    door = conf.read(folder(tmp_path, seafile=LATER_SEAFILE, ccnet=CCNET), {}).settings
    assert {key: value for key, value in door.items() if key.startswith(("db_", "groups"))} == {
        "groups": "database",
        "db_host": "db.example.org",
        "db_port": "3307",
        "db_user": "seafile",
        "db_password": 'p%w#1;"x',
        "db_name": "ccnet-db",
        "db_tls": "yes",
    }


def test_ignores_an_sqlite_database(tmp_path: Path) -> None:
    door = conf.read(folder(tmp_path, ccnet="[Database]\nENGINE = sqlite\nHOST = x\n"), {}).settings
    assert "groups" not in door


def test_reads_enabled(tmp_path: Path) -> None:
    text = LATER_SEAFILE.replace("enabled = true", "enabled = false")
    assert conf.read(folder(tmp_path, seafile=text), {}).settings["enabled"] == "no"
    assert conf.read(None, {"ENABLE_NOTIFICATION_SERVER": "false"}).settings["enabled"] == "no"


def test_rejects_invalid_values(tmp_path: Path) -> None:
    text = LATER_SEAFILE.replace("enabled = true", "enabled = maybe")
    with pytest.raises(ConfigError, match=re.escape("seafile.conf [notification] enabled")):
        conf.read(folder(tmp_path, seafile=text), {})
    with pytest.raises(ConfigError, match="contains none of"):
        conf.read(tmp_path / "nowhere", {})


def test_the_port_defaults_to_8083(tmp_path: Path) -> None:
    text = "[notification]\njwt_private_key = x\n"
    assert conf.read(folder(tmp_path, seafile=text), {}).settings["port"] == "8083"


def test_variables_of_12_and_13_override_the_files(tmp_path: Path) -> None:
    environ = {
        "JWT_PRIVATE_KEY": "k" * 32,
        "NOTIFICATION_SERVER_PORT": "9083",
        "NOTIFICATION_SERVER_HOST": "192.0.2.1",
        "NOTIFICATION_SERVER_LOG_LEVEL": "warning",
        "SEAFILE_MYSQL_DB_HOST": "db",
        "SEAFILE_MYSQL_DB_PORT": "3308",
        "SEAFILE_MYSQL_DB_USER": "u",
        "SEAFILE_MYSQL_DB_PASSWORD": "p",
        "SEAFILE_MYSQL_DB_CCNET_DB_NAME": "c",
        "SEAFILE_MYSQL_DB_SEAFILE_DB_NAME": "unused",
        "ENABLE_NOTIFICATION_SERVER": "true",
    }
    found = conf.read(folder(tmp_path, seafile=LATER_SEAFILE, ccnet=CCNET), environ)
    assert found.log_level == "warning"
    assert found.where["key"] == "environment variable JWT_PRIVATE_KEY"
    assert found.settings == {
        "enabled": "yes",
        "key": "k" * 32,
        "host": "192.0.2.1",
        "port": "9083",
        "groups": "database",
        "db_host": "db",
        "db_port": "3308",
        "db_user": "u",
        "db_password": "p",
        "db_name": "c",
        "db_tls": "yes",
    }


def test_variables_are_enough() -> None:
    assert conf.read(None, {"JWT_PRIVATE_KEY": "k"}).settings == {
        "key": "k",
        "port": "8083",
        "host": EVERYWHERE,
    }
    inner = {"JWT_PRIVATE_KEY": "k", "INNER_NOTIFICATION_SERVER_URL": "http://notif:9000"}
    assert conf.read(None, inner).settings["port"] == "9000"
    assert conf.read(None, {}).settings == {}


@pytest.mark.parametrize(
    ("written", "keys"),
    [
        ('"quoted"', ["quoted", '"quoted"']),
        ("a\\sb\\\\c", ["a\\sb\\\\c", "a b\\c"]),
        ("plain#;%", ["plain#;%"]),
        ("no-break\u00a0", ["no-break", "no-break\u00a0"]),
        ("tab\v", ["tab", "tab\v"]),
        ("end\\", ["end\\", "end"]),
    ],
)
def test_accepts_each_programs_reading_of_a_key(
    tmp_path: Path, written: str, keys: list[str]
) -> None:
    text = f"[notification]\njwt_private_key = {written}\n"
    assert conf.read(folder(tmp_path, seafile=text), {}).settings["key"].split("\n---\n") == keys


def with_variables(tmp_path: Path, text: str, seafile: str = LATER_SEAFILE) -> Path:
    path = folder(tmp_path, seafile=seafile)
    (path / ".env").write_text(text)
    return path


WITHOUT_KEY = "[notification]\nenabled = true\nhost = 127.0.0.1\nport = 8083\n"


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (f"JWT_PRIVATE_KEY={KEY}", [KEY]),
        (f"JWT_PRIVATE_KEY='{KEY}' # comment", [KEY, f"'{KEY}' # comment"]),
        (f'export JWT_PRIVATE_KEY="{KEY}"\r', [KEY, f'"{KEY}"']),
        ("JWT_PRIVATE_KEY=0123456789abcdef==", ["0123456789abcdef==", "0123456789abcdef"]),
        # The part before `=` is too short: it could be guessed.
        ("JWT_PRIVATE_KEY=short=0123456789abcdef", ["short=0123456789abcdef"]),
        ('JWT_PRIVATE_KEY="a\\"b\\\\c$"', ['a"b\\c$']),
    ],
)
def test_reads_the_key_of_12_and_13_from_the_env_file(
    tmp_path: Path, line: str, keys: list[str]
) -> None:
    text = f"# JWT_PRIVATE_KEY=old\nSEAFILE_SERVER_PROTOCOL=https\n{line}\nno assignment\n"
    found = conf.read(with_variables(tmp_path, text, WITHOUT_KEY), {})
    assert found.settings["key"].split("\n---\n") == keys
    assert found.where["key"] == f"{tmp_path / '.env'}: JWT_PRIVATE_KEY"


def test_variables_override_the_env_file_which_overrides_seafile_conf(
    tmp_path: Path,
) -> None:
    path = with_variables(
        tmp_path, "JWT_PRIVATE_KEY=of-the-file\nSEAFILE_MYSQL_DB_HOST=db\nTZ=Etc/UTC\n"
    )
    assert conf.read(path, {}).settings["key"] == "of-the-file"
    door = conf.read(path, {"JWT_PRIVATE_KEY": "of-the-process"}).settings
    assert (door["key"], door["groups"], door["db_host"]) == ("of-the-process", "database", "db")


def test_the_url_of_13_overrides_an_old_section(tmp_path: Path) -> None:
    path = folder(tmp_path, seafile=LATER_SEAFILE.replace("8083", "9000"))
    name = "INNER_NOTIFICATION_SERVER_URL"
    assert conf.read(path, {name: "http://127.0.0.1:8084"}).settings["port"] == "8084"
    assert conf.read(path, {name: "http://127.0.0.1"}).settings["port"] == "9000"
    both = {name: "http://127.0.0.1:8084", "NOTIFICATION_SERVER_PORT": "8085"}
    assert conf.read(path, both).settings["port"] == "8085"
    (path / ".env").write_text(f"{name}=http://notification-server:8086\n")
    assert conf.read(path, {}).settings["port"] == "8086"


def test_a_folder_always_enables_the_protocol(tmp_path: Path) -> None:
    """A missing key is then an error at startup."""
    (tmp_path / ".env").write_text("TZ=Etc/UTC\n")
    assert conf.read(tmp_path, {}).settings == {"port": "8083", "host": EVERYWHERE}


def test_does_not_listen_on_the_name_of_a_container(tmp_path: Path) -> None:
    text = LATER_SEAFILE.replace("host = 127.0.0.1", "host = notification-server")
    found = conf.read(folder(tmp_path, seafile=text), {})
    assert found.settings["host"] == EVERYWHERE
    assert "host = notification-server" in found.notes[0]
