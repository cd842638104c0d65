"""Pydio's private channel: what PHP sends to a websocket server, as publications. No I/O.

Pydio 6.4.2 sends one array per message, by PHP's own `serialize`; 6.5 to 8 have the same members in
JSON (class.MqManager.php, `sendInstantMessage`):

    REPO_ID       the workspace; `AJXP_REPO_SCOPE_ALL`, since 7 `*`, stands for everybody
    CONTENT       `<tree>...</tree>`, for the page as it is
    USER_ID       only this user, else
    GROUP_PATH    only who is in exactly this group; PHP sends one of the two at most
    NODE_PATHES   the paths that the content is about
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
import phpserialize  # type: ignore[import-untyped]  # one file, so it cannot say so

from relay.core.model import Channel, parse_channel

NAMESPACE = "pydio"
# A stream of its own: who is in no workspace is reached too.
EVERYBODY = Channel(f"{NAMESPACE}:AJXP_REPO_SCOPE_ALL")
_ALL = ("AJXP_REPO_SCOPE_ALL", "*")
# The entry's field with the paths, as a JSON array of texts.
PATHS = b"node_paths"


class Unreadable(ValueError):
    """A message that cannot be published, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One event; `to` are selectors as in an entry, None for everybody in the workspace."""

    channel: Channel
    data: bytes
    to: tuple[str, ...] | None = None
    extra: Mapping[bytes, bytes] = field(default_factory=dict)


def workspace(repository: str) -> Channel:
    """The channel of a Pydio workspace; ValueError where its ID cannot be one."""
    if repository in _ALL:
        return EVERYBODY
    return parse_channel(f"{NAMESPACE}:{repository}")


def read(body: bytes) -> Publication:
    """What one message says, in either form; Unreadable with the reason."""
    members = _json(body) if body.lstrip()[:1] == b"{" else _php(body)
    repository = members.get("REPO_ID")
    if isinstance(repository, int) and not isinstance(repository, bool):
        repository = str(repository)
    if not isinstance(repository, str) or not repository:
        raise Unreadable("REPO_ID is missing")
    try:
        channel = workspace(repository)
    except ValueError as exc:
        raise Unreadable(f"REPO_ID: {exc}") from None
    content = members.get("CONTENT")
    if not isinstance(content, str) or not content:
        raise Unreadable("CONTENT is missing")
    try:
        data = content.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Unreadable("CONTENT is not UTF-8") from None
    return Publication(channel=channel, data=data, to=_recipients(members), extra=_extra(members))


def _recipients(members: Mapping[str, object]) -> tuple[str, ...] | None:
    user, group = _name(members, "USER_ID"), _name(members, "GROUP_PATH")
    # Of both, which PHP never sends, the user is the narrower one.
    if user is not None:
        return (f"user:{user}",)
    return None if group is None else (f"group:{group}",)


def _name(members: Mapping[str, object], key: str) -> str | None:
    value = members.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    # An empty name must not make an event for one into one for everybody.
    if value is not None and (not isinstance(value, str) or not value):
        raise Unreadable(f"{key} is not a name")
    return value


def _extra(members: Mapping[str, object]) -> Mapping[bytes, bytes]:
    paths = members.get("NODE_PATHES")
    if isinstance(paths, Mapping):
        # PHP's lists are arrays like any other, and json_encode makes objects of some.
        paths = list(paths.values())
    if not paths:
        return {}
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Unreadable("NODE_PATHES is not a list of paths")
    return {PATHS: orjson.dumps(paths)}


def _json(body: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable("neither JSON nor serialized by PHP") from None
    return found if isinstance(found, dict) else {}


def _php(body: bytes) -> Mapping[str, object]:
    try:
        # Without an object_hook an object is an error: nothing is ever made of one. Lengths are
        # in bytes, so that texts are decoded after they were cut out.
        found = phpserialize.loads(
            body, charset="utf-8", errors="strict", decode_strings=True, array_hook=_array
        )
    except (ValueError, TypeError, RecursionError):
        raise Unreadable("neither JSON nor serialized by PHP, or with an object in it") from None
    return found if isinstance(found, dict) else {}


def _array(pairs: list[tuple[object, object]]) -> dict[object, object]:
    return dict(pairs)
