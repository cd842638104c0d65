"""Texts about settings: config.example.ini, allowed values and names of environment variables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from relay.config.imported import ImportedSetting
from relay.config.settings import Section
from relay.core.errors import ConfigError

_HEAD = """\
All settings of relay with their defaults, as printed by `relay genconfig`. To change a setting,
remove the # before it. White space around a value is ignored; a # or ; inside a value is part of
it; indented lines continue the value of the line above.

Each of these sources overrides the ones before it: this file, environment variables
RELAY_<SECTION>_<KEY> (upper case, all other characters replaced by _, as in RELAY_SERVER_PORT),
--set SECTION.KEY=VALUE, and flags such as --port. A secret can be read from a file: set KEY_file =
/path, or RELAY_<SECTION>_<KEY>_FILE in the environment. On SIGHUP, relay reloads [namespace],
[rights], [jwt], [log] level and the limits of the protocols."""


# Units by the ending of a setting's name.
_UNITS = {"_bytes": "bytes", "_ms": "milliseconds", "_per_s": "number", "_s": "seconds"}


def env_name(section: str, key: str) -> str:
    """Return the name of the setting's environment variable."""
    return "RELAY_" + re.sub(r"[^A-Z0-9]", "_", f"{section}_{key}".upper())


def allowed(field: FieldInfo) -> str:
    """Return a short description of the values that a setting accepts, for error messages."""
    kind = field.annotation
    limits = _limits(field)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if kind is bool:
        return "yes or no"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(limits)
    words = ["text"]
    if "max_length" in limits:
        words.append(f"of at most {limits['max_length']} characters")
    if "pattern" in limits:
        words.append(f"that matches {limits['pattern']}")
    # A pattern alone is hard to read.
    return " ".join(words) + (f" ({field.description})" if "pattern" in limits else "")


def example(sections: Mapping[str, type[Section]]) -> str:
    """Return the text of config.example.ini."""
    parts = [_comment(_HEAD)]
    for name, cls in sections.items():
        parts.append(_example(f"[{name}]", cls))
        if cls.sections_by_name:
            # The heading is a comment as well: an empty section would count as configured.
            parts.append(_example(f"#[{name}:NAME]", cls.sections_by_name[1]))
    return "\n\n".join(parts) + "\n"


def ini(settings: Iterable[ImportedSetting]) -> str:
    """Return an INI file with these settings, each with its `why` as comment.

    The last of several equal settings is used. Raise ConfigError if a value cannot be stored.
    """
    sections: dict[str, dict[str, ImportedSetting]] = {}
    for each in settings:
        # An INI file drops white space around a value.
        if each.text != each.text.strip() or len(each.text.splitlines()) > 1:
            raise ConfigError(
                f"{each.where.removesuffix(' = ')} begins or ends with white space or contains a"
                " line break, which an INI file cannot store. Save a secret in a file and set"
                f" {each.key}_file"
            )
        sections.setdefault(each.section, {})[each.key] = each
    parts = []
    for name, by_key in sections.items():
        lines = [f"[{name}]"]
        for key, each in by_key.items():
            lines += [_comment(each.why)] if each.why else []
            lines.append(f"{key} = {each.text}".rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _example(heading: str, cls: type[Section]) -> str:
    about = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [heading, _comment(about.split(": ", 1)[-1]), ""]
    lines += [_setting(key, field) for key, field in cls.settings().items()]
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo) -> str:
    default = field.get_default()
    secret = field.annotation is SecretStr
    text = default.get_secret_value() if secret else _text(default)
    about = f"{field.description} ({_type(key, field)}, default: {text or 'empty'})"
    return f"{_comment(about)}\n#{key} = {text}".rstrip()


def _type(key: str, field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if kind is bool:
        return "yes/no"
    if kind is SecretStr:
        return f"secret or {key}_file"
    if kind not in (int, float):
        return "text"
    unit = next((unit for suffix, unit in _UNITS.items() if key.endswith(suffix)), None)
    name = unit or ("integer" if kind is int else "number")
    limits = _limits(field)
    if limits.keys() == {"ge", "le"}:
        return f"{name} {limits['ge']}–{limits['le']}"
    return name + _range(limits)


def _limits(field: FieldInfo) -> dict[str, Any]:
    return {
        name: value
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
        if (value := getattr(rule, name, None)) is not None
    }


def _comment(text: str) -> str:
    # break_on_hyphens would break lines after the dashes of options such as --set.
    return "\n#\n".join(
        textwrap.fill(
            paragraph, 99, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        for paragraph in text.split("\n\n")
    )


def _range(limits: Mapping[str, Any]) -> str:
    low, high, above, below = (limits.get(name) for name in ("ge", "le", "gt", "lt"))
    words = []
    if low is not None:
        words.append(f"from {low}")
    if above is not None:
        words.append(f"above {above}")
    if high is not None:
        words.append(f"to {high}")
    if below is not None:
        words.append(f"below {below}")
    return "".join(f" {word}" for word in words)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
