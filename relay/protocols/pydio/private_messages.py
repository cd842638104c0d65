"""Parser for the messages that Pydio's PHP sends on the private channel.

Pydio 6.4.2 sends one array per message, encoded with PHP's `serialize`. Pydio 6.5 to 8 send the
same members as JSON (class.MqManager.php, `sendInstantMessage`):

    REPO_ID       the workspace; `AJXP_REPO_SCOPE_ALL`, since 7 `*`, addresses all browsers
    CONTENT       `<tree>...</tree>`, passed to the page unchanged
    USER_ID       deliver to this user only
    GROUP_PATH    deliver to members of exactly this group only, if it is neither empty nor "0";
                  never sent together with USER_ID
    NODE_PATHES   the paths in the content

Strings of PHP are bytes. CONTENT is UTF-8; the others have the encoding of Pydio's server
(`AJXP_LOCALE`). If they are not UTF-8, they are taken for ISO-8859-1, the usual other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import orjson
import phpserialize  # type: ignore[import-untyped]  # a single module cannot be marked as typed

from relay.core.model import Channel, parse_channel

NAMESPACE = "pydio"
# Broadcasts have their own stream, so that they reach browsers without a workspace too.
BROADCAST = Channel(f"{NAMESPACE}:AJXP_REPO_SCOPE_ALL")
_ALL = ("AJXP_REPO_SCOPE_ALL", "*")
# The entry's field with the paths, as a JSON array of strings.
PATHS_FIELD = b"node_paths"


# Larger messages must be read in another thread, because the event loop would be held for more than
# 10 ms: `read` needs up to 500 ms per MB.
LARGE_BYTES = 16_384
_NULL = msgspec.Raw(b"null")


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
    user = _name(members, "USER_ID")
    # Values that PHP takes for false: the original does not compare them with the browser's group.
    is_group = members.get("GROUP_PATH") not in ("", "0", 0)
    group = _name(members, "GROUP_PATH") if is_group else None
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


class _Members(msgspec.Struct):
    """The members of a JSON message. Others are skipped without making objects of them."""

    REPO_ID: msgspec.Raw = _NULL
    CONTENT: msgspec.Raw = _NULL
    USER_ID: msgspec.Raw = _NULL
    GROUP_PATH: msgspec.Raw = _NULL
    NODE_PATHES: msgspec.Raw = _NULL


_decoder = msgspec.json.Decoder(_Members)


def _json(body: bytes) -> Mapping[str, object]:
    try:
        found = _decoder.decode(body)
        return {name: _value(getattr(found, name)) for name in _Members.__struct_fields__}
    except (ValueError, RecursionError):
        raise InvalidMessage("neither JSON nor serialized by PHP") from None


def _value(raw: msgspec.Raw) -> object:
    return msgspec.json.decode(raw)


def _php(body: bytes) -> Mapping[str, object]:
    try:
        # Without an object_hook, objects are rejected and never created. Lengths are in bytes, so
        # that strings are decoded after they have been cut out. In ISO-8859-1, each byte is one
        # character.
        found = phpserialize.loads(
            body, charset="iso-8859-1", decode_strings=True, array_hook=_array
        )
    except (ValueError, TypeError, RecursionError):
        raise InvalidMessage(
            "neither JSON nor serialized by PHP, or it contains an object"
        ) from None
    if not isinstance(found, dict):
        return {}
    content = found.get("CONTENT")
    members = {key: _text(value) for key, value in found.items()}
    if isinstance(content, str) and members["CONTENT"] == content and not content.isascii():
        raise InvalidMessage("CONTENT is not UTF-8")
    return members


def _text(value: object) -> object:
    """Decode the strings in `value`, which have a character for each byte."""
    if isinstance(value, str):
        try:
            return value.encode("iso-8859-1").decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _text(each) for key, each in value.items()}
    return value


def _array(pairs: list[tuple[object, object]]) -> dict[object, object]:
    return dict(pairs)
