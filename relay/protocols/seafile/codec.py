"""Seafile's messages: `{"type": T, "content": {...}}` in both directions (client.go, event.go).

They are read as by Go's encoding/json: names match in any case, null counts as absent, and bytes
after the JSON value are ignored. They are written as by Go: `type` first, without white space, with
`<`, `>`, `&` and the two line separators escaped, and with one LF at the end.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from relay.core import go_json
from relay.core.json_array import divide
from relay.core.model import EntryID, Event
from relay.core.slices import next_slice
from relay.protocols.seafile.event_format import FOLDER_PERM_CHANGED, TYPES, recipients
from relay.transports.socket.websocket import frame_text

# libwebsockets passes at most this much to the real clients at once (measured, 4.1.6). They parse
# each piece separately, so that they cannot read a longer message.
READABLE_BYTES = 4096

# A message up to this size is parsed in one step.
SMALL_BYTES = 8192
# A library with its token takes about 400 bytes.
_PART_BYTES = 4096


class BadMessage(ValueError):
    """The message is malformed: the connection is closed. The text is for the log."""


class LibrarySubscribe(NamedTuple):
    """One library of a subscribe message.

    `after` is the ID of the last event that the client has received. It is an extension of relay.
    """

    repo_id: str
    token: str
    after: EntryID | None


class LibraryUnsubscribe(NamedTuple):
    """One library of an unsubscribe message."""

    repo_id: str


def _refuse(word: str) -> object:
    raise ValueError(word)


_decoder = json.JSONDecoder(parse_constant=_refuse, parse_int=float)


def parse(text: bytes) -> list[LibrarySubscribe | LibraryUnsubscribe]:
    """Parse a client's message and return its requests in order. Raises BadMessage."""
    try:
        message, _ = _decoder.raw_decode(text.decode(errors="replace").lstrip(" \t\r\n"))
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None
    fields = _object(message, "a message")
    kind = fields.get("type")
    if kind not in ("subscribe", "unsubscribe"):
        raise BadMessage("type is neither subscribe nor unsubscribe")
    if "content" not in fields:
        raise BadMessage("no content")
    content = fields["content"]
    repos = None if content is None else _object(content, "content").get("repos")
    if repos is None:
        return []
    if not isinstance(repos, list):
        raise BadMessage("repos is not a list")
    return [_subscribe(each) if kind == "subscribe" else _unsubscribe(each) for each in repos]


async def parts(text: bytes) -> AsyncIterator[bytes]:
    """Divide a message with many libraries into messages with few. Raises BadMessage.

    Each part takes a short time. The text around the list of libraries is repeated in each.
    """
    try:
        found = await divide(text, 3, _PART_BYTES)
    except ValueError as exc:
        raise BadMessage(str(exc)) from None
    around = text[: found.begin], text[found.end :]
    if max(map(len, around)) > _PART_BYTES:
        raise BadMessage("too many bytes besides the list of libraries")
    for begin, end in found.parts:
        if end - begin > 2 * _PART_BYTES:
            raise BadMessage("one library is too long")
        await next_slice()
        yield text[begin:end].join(around)


def _subscribe(repo: Any) -> LibrarySubscribe:
    fields = {} if repo is None else _object(repo, "a library")
    after = fields.get("after")
    try:
        last = EntryID.parse(after) if isinstance(after, str) and after else None
    except ValueError:
        raise BadMessage("after is not the ID of an event") from None
    return LibrarySubscribe(_text(fields, "id"), _text(fields, "jwt_token"), last)


def _unsubscribe(repo: Any) -> LibraryUnsubscribe:
    # Until March 2023 the server expected strings here, while clients sent objects.
    if isinstance(repo, str):
        return LibraryUnsubscribe(repo)
    return LibraryUnsubscribe(_text({} if repo is None else _object(repo, "a library"), "id"))


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadMessage(f"{what} is not an object")
    return {name.casefold(): each for name, each in value.items()}


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadMessage(f"{name} is not a string")
    return value


def message(kind: str, content: bytes) -> bytes:
    """Return a message of this type. `content` is JSON."""
    return b'{"type":%b,"content":%b}\n' % (go_json.text(kind), go_json.compact(content))


def event_message(event: Event) -> bytes:
    """Return the message for an event, or b"" if it is not part of the protocol.

    The protocol has four types, and their content is an object.
    """
    if event.type not in TYPES or not event.is_json or event.data.lstrip()[:1] != b"{":
        return b""
    return message(event.type, event.data)


def is_for_some(event: Event) -> bool:
    """Return True if an entry without recipients is a permission for a user or group.

    Entries of `/events` have recipients. Other programs may have omitted them by mistake.
    """
    if event.type != FOLDER_PERM_CHANGED or event.to is not None:
        return False
    try:
        user, group = recipients(event.data)
    except ValueError:
        return True
    return bool(user) or group is not None


def jwt_expired(repo_id: str) -> bytes:
    """Return the frame of `jwt-expired`, the only message that the server itself creates."""
    content = json.dumps({"repo_id": repo_id}, ensure_ascii=False, separators=(",", ":"))
    return frame_text(message("jwt-expired", content.encode(errors="replace")))
