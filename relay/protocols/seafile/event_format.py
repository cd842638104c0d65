"""Parser for Seafile's events: bodies of `/events` and messages of Redis channel `repo_update`.

Names match in any case, and null counts as absent, as in Go's encoding/json, which Seafile's server
uses (notification-server/event.go). The content keeps its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Any, NamedTuple

from relay.core.model import Channel, parse_channel

PREFIX = "seafile:"
REPO_UPDATE = "repo-update"
FILE_LOCK_CHANGED = "file-lock-changed"
FOLDER_PERM_CHANGED = "folder-perm-changed"
COMMENT_UPDATE = "comment-update"
# The types that the notification servers of Seafile 10 to 13 send to clients. They ignore others.
TYPES = frozenset({REPO_UPDATE, FILE_LOCK_CHANGED, FOLDER_PERM_CHANGED, COMMENT_UPDATE})
# The entry's field with the commit of a repo-update. Two sources may report the same commit.
COMMIT = b"commit"

_SPACE = " \t\r\n"


class Invalid(ValueError):
    """Not a JSON object, or its type is not a string. The sender receives an error."""


class Unaddressed(ValueError):
    """An event without a valid library. The text is the reason."""


class SeafEvent(NamedTuple):
    """One event of the library `channel`.

    Its recipients are `user`, the members of `group`, or all clients if both are empty. `commit` is
    '' unless the type is repo-update.
    """

    channel: Channel
    type: str
    content: bytes
    user: str = ""
    group: int | None = None
    commit: str = ""


def _refuse(word: str) -> object:
    raise ValueError(word)


class _Digits(str):
    """A number that is not an integer, or is too long. Its value is not used."""

    __slots__ = ()


def _integer(digits: str) -> object:
    return int(digits) if len(digits) < 19 else _Digits(digits)


_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    parse_constant=_refuse, parse_int=_integer, parse_float=_Digits
).scan_once  # type: ignore[attr-defined]  # typeshed leaves it out


def channel_of(repo_id: str) -> Channel:
    """Return the channel of a library. ValueError if its ID is not a valid channel name."""
    if not repo_id:
        raise ValueError("no library")
    return parse_channel(PREFIX + repo_id)


def read(body: bytes) -> SeafEvent:
    """Parse a body of `/events`. Raises Invalid or Unaddressed."""
    kind, content = _envelope(body)
    if content is None:
        raise Unaddressed("no content")
    members = {name.casefold(): value for name, value, _ in _members(content)}
    try:
        channel = channel_of(_text(members, "repo_id"))
    except ValueError as exc:
        raise Unaddressed(f"repo_id: {exc}") from None
    if kind == REPO_UPDATE:
        return SeafEvent(channel, kind, content.encode(), commit=_text(members, "commit_id"))
    if kind != FOLDER_PERM_CHANGED:
        return SeafEvent(channel, kind, content.encode())
    user, group = _recipients(members)
    return SeafEvent(channel, kind, content.encode(), user, group)


def recipients(content: bytes) -> tuple[str, int | None]:
    """Return the user or the group in a permission's content. ValueError if it is malformed."""
    text = content.decode(errors="replace").strip(_SPACE)
    return _recipients({name.casefold(): value for name, value, _ in _members(text)})


def read_line(payload: bytes) -> SeafEvent | None:
    """Parse a message that seafevents publishes on `repo_update`.

    Seafile up to 11 separates its fields with tabs, later versions send JSON. Return None for other
    types of messages. Raises Unaddressed if the message is malformed.
    """
    text = payload.decode(errors="replace").strip()
    kind, *rest = text.split("\t")
    if not text.startswith("{"):
        if kind != REPO_UPDATE:
            return None
        if len(rest) != 2:
            raise Unaddressed("repo-update without library and commit")
        repo_id, commit = rest
    else:
        try:
            members = {name.casefold(): value for name, value, _ in _members(text)}
        except Invalid as exc:
            raise Unaddressed(str(exc)) from None
        if members.get("msg_type") != REPO_UPDATE:
            return None
        repo_id, commit = _text(members, "repo_id"), _text(members, "commit_id")
    try:
        channel = channel_of(repo_id)
    except ValueError as exc:
        raise Unaddressed(str(exc)) from None
    content = json.dumps({"repo_id": repo_id, "commit_id": commit}, separators=(",", ":"))
    return SeafEvent(channel, REPO_UPDATE, content.encode(), commit=commit)


def _envelope(body: bytes) -> tuple[str, str | None]:
    """Return the type, and the content as JSON if it is an object."""
    text = body.decode(errors="replace").strip(_SPACE)
    kind, content = "", None
    for name, value, raw in _members(text):
        field = name.casefold()
        if field == "type" and value is not None:
            if not isinstance(value, str) or isinstance(value, _Digits):
                raise Invalid("type is not a string")
            kind = _as_go(value)
        elif field == "content":
            content = raw if raw.startswith("{") else None
    return kind, content


def _recipients(members: dict[str, Any]) -> tuple[str, int | None]:
    user, group = _text(members, "user"), members.get("group")
    if user:
        return user, None
    # A missing group counts as 0, which is not a valid group. -1 means all clients.
    number = 0 if group is None else group
    if not isinstance(number, int) or isinstance(number, bool):
        raise Unaddressed("group is not an integer")
    return "", None if number == -1 else number


def _text(members: dict[str, Any], name: str) -> str:
    value = members.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, _Digits):
        raise Unaddressed(f"{name} is not a string")
    return _as_go(value)


def _as_go(text: str) -> str:
    """Replace half surrogate pairs, as Go's decoder does. Redis could not store them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _members(text: str) -> list[tuple[str, Any, str]]:
    """Return name, value and JSON of each member of an object. Raises Invalid if it is none."""
    if not text.startswith("{"):
        raise Invalid("not an object")
    try:
        value, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError):
        raise Invalid("not JSON") from None
    if end != len(text) or not isinstance(value, dict):
        raise Invalid("bytes after the JSON value")
    # The text is valid JSON here, so that the following steps cannot fail.
    found: list[tuple[str, Any, str]] = []
    at = _past(text, 1)
    while text[at] != "}":
        name, at = scanstring(text, at + 1, True)
        begin = _past(text, _past(text, at) + 1)
        value, end = _scan(text, begin)
        found.append((name, value, text[begin:end]))
        at = _past(text, end)
        if text[at] == ",":
            at = _past(text, at + 1)
    return found


def _past(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at
