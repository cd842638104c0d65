"""Parser for the messages that Pydio's PHP sends on the private channel.

Pydio 6.4.2 sends one array per message, encoded with PHP's `serialize`. Pydio 6.5 to 8 send the
same members as JSON (class.MqManager.php, `sendInstantMessage`):

    REPO_ID       the workspace; `AJXP_REPO_SCOPE_ALL`, since 7 `*`, addresses all browsers
    CONTENT       `<tree>...</tree>`, passed to the page unchanged
    USER_ID       deliver to this user only
    GROUP_PATH    deliver to members of exactly this group only; never sent together with USER_ID
    NODE_PATHES   the paths in the content
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
import phpserialize  # type: ignore[import-untyped]  # a single module cannot be marked as typed

from relay.core.model import Channel, parse_channel

NAMESPACE = "pydio"
# Broadcasts have their own stream, so that they reach browsers without a workspace too.
BROADCAST = Channel(f"{NAMESPACE}:AJXP_REPO_SCOPE_ALL")
_ALL = ("AJXP_REPO_SCOPE_ALL", "*")
# The entry's field with the paths, as a JSON array of strings.
PATHS_FIELD = b"node_paths"


class InvalidMessage(ValueError):
    """A message that cannot be published. The text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One event. `to` has selectors as in an entry; None addresses the whole workspace."""

    channel: Channel
    data: bytes
    to: tuple[str, ...] | None = None
    extra: Mapping[bytes, bytes] = field(default_factory=dict)


def workspace(repository: str) -> Channel:
    """Return the channel of a workspace. ValueError if its ID is not a valid channel name."""
    if repository in _ALL:
        return BROADCAST
    return parse_channel(f"{NAMESPACE}:{repository}")


def read(body: bytes) -> Publication:
    """Parse one message in either format.

    Raises:
        InvalidMessage: The message cannot be published.
    """
    members = _json(body) if body.lstrip()[:1] == b"{" else _php(body)
    repository = members.get("REPO_ID")
    if isinstance(repository, int) and not isinstance(repository, bool):
        repository = str(repository)
    if not isinstance(repository, str) or not repository:
        raise InvalidMessage("REPO_ID is missing")
    try:
        channel = workspace(repository)
    except ValueError as exc:
        raise InvalidMessage(f"REPO_ID: {exc}") from None
    content = members.get("CONTENT")
    if not isinstance(content, str) or not content:
        raise InvalidMessage("CONTENT is missing")
    try:
        data = content.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise InvalidMessage("CONTENT is not UTF-8") from None
    return Publication(channel=channel, data=data, to=_recipients(members), extra=_extra(members))


def _recipients(members: Mapping[str, object]) -> tuple[str, ...] | None:
    user, group = _name(members, "USER_ID"), _name(members, "GROUP_PATH")
    # PHP never sends both. The user is the narrower one.
    if user is not None:
        return (f"user:{user}",)
    return None if group is None else (f"group:{group}",)


def _name(members: Mapping[str, object], key: str) -> str | None:
    value = members.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    # An event for one user must not become an event for all users because the name is empty.
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidMessage(f"{key} is not a name")
    return value


def _extra(members: Mapping[str, object]) -> Mapping[bytes, bytes]:
    paths = members.get("NODE_PATHES")
    if isinstance(paths, Mapping):
        # PHP has one type for lists and maps, and json_encode encodes some lists as objects.
        paths = list(paths.values())
    if not paths:
        return {}
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InvalidMessage("NODE_PATHES is not a list of paths")
    return {PATHS_FIELD: orjson.dumps(paths)}


def _json(body: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidMessage("neither JSON nor serialized by PHP") from None
    return found if isinstance(found, dict) else {}


def _php(body: bytes) -> Mapping[str, object]:
    try:
        # Without an object_hook, objects are rejected and never created. Lengths are in bytes, so
        # that strings are decoded after they have been cut out.
        found = phpserialize.loads(
            body, charset="utf-8", errors="strict", decode_strings=True, array_hook=_array
        )
    except (ValueError, TypeError, RecursionError):
        raise InvalidMessage(
            "neither JSON nor serialized by PHP, or it contains an object"
        ) from None
    return found if isinstance(found, dict) else {}


def _array(pairs: list[tuple[object, object]]) -> dict[object, object]:
    return dict(pairs)
