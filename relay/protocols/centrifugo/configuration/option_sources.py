"""Collects Centrifugo's options from configuration file, environment variables and flags.

The rules are those of Centrifugo v1.8.0 (viper): flags override variables, which override the file.
Keys are case-insensitive, empty variables are ignored, and unknown keys are not errors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.core.errors import ConfigError
from relay.protocols.centrifugo.configuration.options import CHANNEL_OPTIONS, OPTIONS, OptionKind

SUFFIXES = (".json", ".toml", ".yaml", ".yml")
# v1.8.0 rejects other names (libcentrifugo/node/config.go).
_NAMESPACE_NAME = re.compile(r"[-a-zA-Z0-9_]{2,}")
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})


@dataclass(frozen=True, slots=True)
class OptionValue:
    """Value of one option. An error message begins with `where` and `text`."""

    where: str
    text: str

    def wrong(self, problem: str) -> ConfigError:
        """Return an error that quotes the value. Don't use this for secrets."""
        return ConfigError(f"{self.where}{self.text[:60]}: {problem}")

    @property
    def on(self) -> bool:
        """Return True if the value is that of an enabled switch."""
        return self.text == "yes"


@dataclass(slots=True)
class CollectedOptions:
    """The configured options. Other options have no value."""

    values: dict[str, OptionValue] = field(default_factory=dict)
    namespaces: dict[str, dict[str, OptionValue]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: str = ""

    def text(self, name: str, default: str = "") -> str:
        """Return an option's value, or `default` if it is empty or not configured."""
        value = self.values.get(name)
        return value.text if value and value.text else default

    def on(self, name: str) -> bool:
        """Return True if a switch is enabled."""
        return name in self.values and self.values[name].on

    def first(self, *names: str) -> OptionValue | None:
        """Return the first of these options that is configured and not empty."""
        found = (self.values.get(name) for name in names)
        return next((value for value in found if value and value.text), None)


def gather(
    path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
) -> CollectedOptions:
    """Return the options of all three sources. Raise ConfigError if one is invalid."""
    given = CollectedOptions()
    if path is not None:
        content = _content(path)
        if content is None:
            given.missing = f"{path}: file not found"
        else:
            _read_file(given, path, content)
    for name, option in OPTIONS.items():
        variable = f"CENTRIFUGO_{name.upper()}"
        if text := environ.get(variable):
            if option.env:
                where = f"environment variable {variable} = "
                given.values[name] = OptionValue(where, _text(text, option.kind, where))
            else:
                given.notes.append(
                    f"environment variable {variable} ignored: Centrifugo reads this option only"
                    " from its file and flags"
                )
    for name, text in flags.items():
        where = f"--{name}="
        given.values[name] = OptionValue(where, _text(text, OPTIONS[name].kind, where))
    return given


def _read_file(given: CollectedOptions, path: Path, content: Mapping[Any, Any]) -> None:
    for key, value in content.items():
        name = str(key).lower()
        where = f"{path}: {name} = "
        option = OPTIONS.get(name)
        if option is None:
            given.notes.append(_unknown(f"{path}: {key}", name, list(OPTIONS)))
        elif value is None:
            continue
        elif option.kind is OptionKind.LIST:
            given.namespaces = _namespaces(given, path, value)
        else:
            given.values[name] = OptionValue(where, _text(value, option.kind, where))


def _namespaces(
    given: CollectedOptions, path: Path, value: object
) -> dict[str, dict[str, OptionValue]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ConfigError(f"{path}: namespaces: must be {OptionKind.LIST.value}, each with a name")
    found: dict[str, dict[str, OptionValue]] = {}
    for index, each in enumerate(value, 1):
        members = {str(key).lower(): member for key, member in each.items()}
        name = members.pop("name", "")
        if not isinstance(name, str) or not _NAMESPACE_NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: namespaces, number {index}: name = {name!r}: must be two or more letters,"
                " digits, _ or -"
            )
        if name in found:
            raise ConfigError(f"{path}: namespaces: {name} is defined twice")
        found[name] = {}
        for key, member in members.items():
            where = f"{path}: namespace {name}: {key} = "
            if key not in CHANNEL_OPTIONS:
                known = list(CHANNEL_OPTIONS)
                given.notes.append(_unknown(f"{path}: namespace {name}: {key}", key, known))
            elif member is not None:
                found[name][key] = OptionValue(where, _text(member, CHANNEL_OPTIONS[key], where))
    return found


def _unknown(where: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where}: unknown option of Centrifugo v1.8.0, ignored{hint}"


def _text(value: object, kind: OptionKind, where: str) -> str:
    """Convert a value to the text for relay's INI file."""
    if kind is OptionKind.SWITCH:
        text = str(value)
        if text in _TRUE | _FALSE:
            return "yes" if text in _TRUE else "no"
    elif isinstance(value, str):
        return value.strip() if kind is OptionKind.NUMBER else value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    raise ConfigError(f"{where.removesuffix(' = ')}: must be {kind.value}")


def _content(path: Path) -> Mapping[Any, Any] | None:
    """Return the file's options, or None if it does not exist."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 (byte {exc.start})") from exc
    # Don't chain the parsers' exceptions: their texts may quote the file, which contains secrets.
    problem = ""
    content: object = None
    try:
        content = _parse(path.suffix.lower(), text)
    except json.JSONDecodeError as exc:
        problem = f"line {exc.lineno}, column {exc.colno}: {exc.msg}"
    except _Unparsable as exc:
        problem = str(exc)
    except RecursionError:
        problem = "nested too deeply"
    if problem:
        raise ConfigError(f"{path}: {problem}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must contain one object with options")
    return content


def _place(text: str) -> str:
    found = re.search(r"\(at ([^)]*)\)$", text)
    return f"{found[1]}: not TOML" if found else "not TOML"


class _Unparsable(ValueError):
    """The text is not valid TOML or YAML. The message has the position but not the text."""


def _parse(suffix: str, text: str) -> object:
    match suffix:
        case ".json":
            return json.loads(text)
        case ".toml":
            # Both parsers are imported only if needed: every command imports this module.
            import tomllib

            try:
                return tomllib.loads(text)
            except tomllib.TOMLDecodeError as exc:
                raise _Unparsable(_place(str(exc))) from None
        case _:
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as exc:
                mark = getattr(exc, "problem_mark", None)
                where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
                raise _Unparsable(f"{where}not YAML") from None
