"""Seafile's messages: `{"type": T, "content": {...}}` in both directions (client.go, event.go).

Read as Go's encoding/json reads them: names match whatever their case, null counts as absent, what
follows the JSON value is ignored. Written as Go writes them: without white space, `<`, `>`, `&` and
the two line separators as escapes, one LF at the end; `type` first.
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

# What libwebsockets hands to the real clients in one piece (measured, 4.1.6): they parse each
# piece by itself, so that a longer message is lost on them.
READABLE_BYTES = 4096

# A message up to this size is parsed in one step.
SMALL_BYTES = 8192
# A library with its token takes about 400 bytes.
_PART_BYTES = 4096


class BadMessage(ValueError):
    """The message is malformed; Seafile's server closes the connection then. For the log."""


class LibrarySubscribe(NamedTuple):
    """One library of a subscribe. `after`, which only our own clients send, is the ID of the last
    event that the client has seen."""

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
    """Parse a client's message into requests, in their order. Raises BadMessage."""
    try:
        message, _ = _decoder.raw_decode(text.decode(errors="replace").lstrip(" \t\r\n"))
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None
    fields = _object(message, "a message")
    kind = fields.get("type")
    if kind not in ("subscribe", "unsubscribe"):
        raise BadMessage("its type is neither subscribe nor unsubscribe")
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

    A slice of time is used for each. What stands around the libraries is repeated in each part.
    """
    try:
        found = await divide(text, 3, _PART_BYTES)
    except ValueError as exc:
        raise BadMessage(str(exc)) from None
    around = text[: found.begin], text[found.end :]
    if max(map(len, around)) > _PART_BYTES:
        raise BadMessage("more than a list of libraries")
    for begin, end in found.parts:
        if end - begin > 2 * _PART_BYTES:
            raise BadMessage("a library that is too long")
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
    # Until March 2023 the server wanted texts here, while clients sent objects.
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
        raise BadMessage(f"{name} is not a text")
    return value


def message(kind: str, content: bytes) -> bytes:
    """Return a message of this type; `content` is JSON text."""
    return b'{"type":%b,"content":%b}\n' % (go_json.text(kind), go_json.compact(content))


def event_message(event: Event) -> bytes:
    """Return the message for an event, b"" where the protocol has none: its types are known to all
    clients, and their content is an object."""
    if event.type not in TYPES or not event.is_json or event.data.lstrip()[:1] != b"{":
        return b""
    return message(event.type, event.data)


def is_for_some(event: Event) -> bool:
    """Whether a permission is for a user or a group, but the entry for everyone: an entry of
    `/events` says for whom it is, one of another program may have been written without care."""
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
