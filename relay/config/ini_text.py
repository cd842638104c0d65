"""What people read about settings: config.example.ini, the allowed values, environment names."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from relay.config.imported import Said
from relay.config.settings import Section
from relay.core.errors import ConfigError

_HEAD = """\
Every setting of the relay with its default, as `relay genconfig` prints it. Take away the # before
a setting to change it. White space around a value is dropped; a # or ; within one belongs to it;
a value goes on in the next line if that is indented.

Later wins: this file, environment variables RELAY_<SECTION>_<KEY> (upper case, every other
character becomes _, as RELAY_SERVER_PORT), --set SECTION.KEY=VALUE, flags such as --port. A secret
may stand in a file of its own: KEY_file = /path, in the environment RELAY_<SECTION>_<KEY>_FILE.
[namespace], [rights], [jwt], [log] level and the doors' limits are read again on SIGHUP."""


def env_name(section: str, key: str) -> str:
    """The environment variable of a setting."""
    return "RELAY_" + re.sub(r"[^A-Z0-9]", "_", f"{section}_{key}".upper())


def allowed(field: FieldInfo) -> str:
    """What a setting's value may be, in a few words."""
    kind = field.annotation
    limits = {
        name: value
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
        if (value := getattr(rule, name, None)) is not None
    }
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
    # A pattern alone explains little.
    return " ".join(words) + (f" ({field.description})" if "pattern" in limits else "")


def example(sections: Mapping[str, type[Section]]) -> str:
    """config.example.ini; [namespace] stands last and shows how one is named."""
    parts = [_comment(_HEAD)]
    for name, cls in sections.items():
        parts.append(_example(f"[{name}]", cls))
        if cls.sections_by_name:
            # A comment: the section would be there, empty as it is.
            parts.append(_example(f"#[{name}:NAME]", cls.sections_by_name[1]))
    return "\n\n".join(parts) + "\n"


def ini(said: Iterable[Said]) -> str:
    """An INI file with these settings; of equal ones the last. ConfigError where none can have one.

    A setting's `why` is its comment.
    """
    sections: dict[str, dict[str, Said]] = {}
    for each in said:
        # What an INI file would not give back: it drops white space around a value.
        if each.text != each.text.strip() or len(each.text.splitlines()) > 1:
            raise ConfigError(
                f"{each.where.removesuffix(' = ')} has white space at its ends, or a line's"
                " end within, which no INI file keeps; of a secret it can name a file instead,"
                f" {each.key}_file"
            )
        sections.setdefault(each.section, {})[each.key] = each
    parts = []
    for name, settings in sections.items():
        lines = [f"[{name}]"]
        for key, each in settings.items():
            lines += [_comment(each.why)] if each.why else []
            lines.append(f"{key} = {each.text}".rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _example(heading: str, cls: type[Section]) -> str:
    about = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [heading, _comment(_capital(about.split(": ", 1)[-1])), ""]
    lines += [_setting(key, field) for key, field in cls.settings().items()]
    return "\n".join(lines)


def _setting(key: str, field: FieldInfo) -> str:
    default = field.get_default()
    secret = field.annotation is SecretStr
    text = default.get_secret_value() if secret else _text(default)
    about = field.description or ""
    if field.annotation in (int, float) or get_origin(field.annotation) is Literal:
        about += f". {_capital(allowed(field))}"
    elif field.annotation is bool:
        about += ". Yes or no"
    about += f". Default: {text or 'empty'}."
    if secret and f"{key}_file" not in about:
        about += f" Or {key}_file = path."
    return f"{_comment(about)}\n#{key} = {text}".rstrip()


def _comment(text: str) -> str:
    # break_on_hyphens would part an option such as --set from its dashes.
    return "\n#\n".join(
        textwrap.fill(
            paragraph, 99, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        for paragraph in text.split("\n\n")
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
