"""Configuration of protocols: their sections, and configurations of other servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, field_validator

from relay.config import ini_text
from relay.config.imported import ImportedConfiguration, ImportedSetting
from relay.config.ini_text import example
from relay.config.loading import Config, load
from relay.config.settings import Section
from relay.core.errors import ConfigError


class RoomSettings(Section):
    """[protocol:house:NAME]: A room."""

    code: str = Field("", max_length=3, description="short")
    odd: int = Field(1, description="an odd number")

    @field_validator("odd")
    @classmethod
    def _is_odd(cls, number: int) -> int:
        if number % 2 == 0:
            raise ValueError(f"{number} is even")
        return number


class HouseSettings(Section):
    """[protocol:house]: A protocol with rooms."""

    sections_by_name: ClassVar[tuple[str, type[Section]] | None] = ("rooms", RoomSettings)

    rooms: Mapping[str, RoomSettings] = Field(default_factory=dict)
    enabled: bool = Field(True, description="off: it is shut")

    @field_validator("rooms")
    @classmethod
    def _are_bright(cls, rooms: Mapping[str, RoomSettings]) -> Mapping[str, RoomSettings]:
        if "dark" in rooms:
            raise ValueError("no room is called dark")
        return rooms


HOUSES: Mapping[str, type[Section]] = {"protocol:house": HouseSettings}


def read(
    path: Path | None = None,
    *sets: str,
    environ: Mapping[str, str] | None = None,
    doors: Mapping[str, type[Section]] = HOUSES,
) -> Config:
    return load(path, environ=environ or {}, overrides=sets, flags={}, doors=doors)


@pytest.fixture
def ini(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "relay.ini"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_protocol_receives_its_own_sections_by_name(ini: Callable[[str], Path]) -> None:
    path = ini("[protocol:house]\nenabled = no\n[protocol:house:red]\ncode = r\n")
    config = read(
        path,
        "protocol:house:blue.odd=3",
        environ={"RELAY_PROTOCOL_HOUSE_RED_ODD": "5"},
    )
    house = config.doors["protocol:house"]
    assert isinstance(house, HouseSettings)
    assert not house.enabled
    assert house.rooms == {"red": RoomSettings(code="r", odd=5), "blue": RoomSettings(odd=3)}
    assert list(config.doors) == ["protocol:house"]
    nothing = read(doors=HOUSES).doors["protocol:house"]
    assert nothing == HouseSettings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[protocol:house:red]\nodd = 2\n",
            "relay.ini: [protocol:house:red] odd = 2: 2 is even",
        ),
        ("[protocol:house:red]\nrooms = 2\n", "[protocol:house:red] rooms is not a setting"),
        ("[protocol:house]\nrooms = 2\n", "[protocol:house] rooms is not a setting"),
        ("[protocol:house:dark]\n", "[protocol:house:...]: no room is called dark"),
        ("[protocol:home:red]\n", "[protocol:home:red]: no such section"),
    ],
)
def test_an_error_in_a_protocols_own_section_is_one_line(
    ini: Callable[[str], Path], text: str, line: str
) -> None:
    path = ini(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert line in str(caught.value).replace(f"{path}:", "relay.ini:")


def said(section: str, key: str, text: str) -> ImportedSetting:
    return ImportedSetting(section=section, key=key, text=text, where=f"old.conf: {key.upper()} = ")


def test_an_imported_configuration_overrides_only_the_defaults(
    ini: Callable[[str], Path],
) -> None:
    one = ImportedConfiguration(
        settings=[
            said("server", "port", "1"),
            said("server", "host", "a"),
            said("server", "tls_cert", "5"),
            said("namespace:old", "retention_count", "6"),
            said("protocol:house:red", "code", "o"),
        ],
        notes=["old.conf: COLOR has no effect"],
    )
    two = ImportedConfiguration(
        settings=[said("server", "tls_cert", "7")], missing="new.conf: not there"
    )
    config = load(
        ini("[server]\nport = 2\n"),
        environ={"RELAY_NAMESPACE_OLD_DURABILITY": "replicated:3"},
        overrides=["server.host=b"],
        flags={},
        doors=HOUSES,
        imported=[one, two],
    )
    assert (config.server.port, config.server.host, config.server.tls_cert) == (2, "b", "7")
    old = config.namespaces["old"]
    assert (old.retention_count, old.durability) == (6, "replicated:3")
    house = config.doors["protocol:house"]
    assert isinstance(house, HouseSettings)
    assert house.rooms["red"].code == "o"
    assert config.notes == [
        "old.conf: COLOR has no effect",
        "new.conf: not there; using defaults",
    ]


def test_errors_in_an_imported_configuration_use_its_own_names() -> None:
    old = [ImportedConfiguration(settings=[said("server", "port", "x")])]
    with pytest.raises(ConfigError, match=r"^old.conf: PORT = x: a whole number from 0 to 65535$"):
        load(None, environ={}, overrides=[], flags={}, doors={}, imported=old)


def test_settings_are_converted_to_an_equivalent_ini_file(tmp_path: Path) -> None:
    settings = [
        said("server", "port", "1"),
        said("protocol:house:red", "code", ""),
        ImportedSetting(
            section="jwt", key="key", text="# a;b = %c", where="", why="The old one's."
        ),
        said("server", "port", "2"),
    ]
    text = ini_text.ini(settings)
    head = "[server]\nport = 2\n\n[protocol:house:red]\ncode =\n\n"
    assert text == head + "[jwt]\n# The old one's.\nkey = # a;b = %c\n"
    path = tmp_path / "relay.ini"
    path.write_text(text)
    imported = [ImportedConfiguration(settings=settings)]
    assert read(path) == load(
        None, environ={}, overrides=[], flags={}, doors=HOUSES, imported=imported
    )


@pytest.mark.parametrize("text", [" a", "a ", "a\nb", "a\x85b", "\ufeff \t"])
def test_a_value_that_no_ini_file_can_contain_is_rejected_and_not_shown(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^old.conf: KEY begins or ends with white space .* key_file$"
    ):
        ini_text.ini([said("jwt", "key", text)])


def test_the_example_shows_a_protocols_own_sections_as_comments(tmp_path: Path) -> None:
    text = example(HOUSES)
    assert "\n#[protocol:house:NAME]\n# A room.\n" in text
    assert "#rooms" not in text
    path = tmp_path / "relay.ini"
    path.write_text(text)
    assert read(path) == read(doors=HOUSES)
