"""Parse the commands of WebSocket clients and the names of channels in requests. No I/O."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import NoReturn

import orjson

from relay.core.errors import BadRequest
from relay.core.model import Channel, parse_channel

# A client's own name for a command, which the reply repeats.
Ref = str | int | float | None
_REF_CHARS = 200
# The largest integer that JavaScript, too, represents exactly.
_SAFE_INTEGER = 2**53 - 1


def requested_channel(text: str) -> Channel:
    """Return `text` as a channel. Raise ValueError if it is invalid or contains `*`.

    `*` is a wildcard in tokens only. A client that uses it as one here would receive no events.
    """
    if "*" in text:
        raise ValueError(
            f"{text[:100]!r} is a pattern; `*` matches in tokens only, so name each channel"
        )
    return parse_channel(text)


class BadCommand(BadRequest):
    """A frame that is not a command, with `ref` and `channel` if they could be parsed."""

    def __init__(self, message: str, ref: Ref = None, channel: str | None = None) -> None:
        super().__init__(message)
        self.ref = ref
        self.channel = channel


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscribeCommand:
    """Subscribe to a channel, after `last_event_id` or from now on."""

    channel: Channel
    last_event_id: str | None = None
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsubscribeCommand:
    """Unsubscribe from a channel."""

    channel: Channel
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshCommand:
    """Use a new token of the same user."""

    token: str = field(repr=False)
    ref: Ref = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PingCommand:
    """Request a reply, to test the connection."""

    ref: Ref = None


Command = SubscribeCommand | UnsubscribeCommand | RefreshCommand | PingCommand

_FIELDS = {
    "subscribe": {"cmd", "ref", "channel", "last_event_id"},
    "unsubscribe": {"cmd", "ref", "channel"},
    "refresh": {"cmd", "ref", "token"},
    "ping": {"cmd", "ref"},
}


def parse_command(text: str | bytes) -> Command:
    """Parse the command in a text frame. Raise BadCommand with the reason if it is invalid."""
    frame = _load(text)
    ref = _ref(frame.get("ref"))
    channel = frame.get("channel")
    shown = channel if isinstance(channel, str) and len(channel) <= 255 else None

    def reject(message: str) -> NoReturn:
        raise BadCommand(message, ref, shown)

    def required(name: str) -> str:
        value = frame.get(name)
        if not isinstance(value, str) or not value:
            reject(f"{cmd} needs {name}, a non-empty string")
        return value

    def channel_field() -> Channel:
        try:
            name = required("channel")
            return requested_channel(name)
        except ValueError as exc:
            reject(str(exc))

    cmd = frame.get("cmd")
    if not isinstance(cmd, str) or cmd not in _FIELDS:
        reject("cmd must be subscribe, unsubscribe, refresh or ping")
    # Reject unknown fields: with a misspelt last_event_id, events would be lost silently.
    unknown = sorted(frame.keys() - _FIELDS[cmd])
    if unknown:
        reject(f"{cmd} has no field {unknown[0][:50]!r}")
    match cmd:
        case "subscribe":
            position = frame.get("last_event_id")
            if position is not None and (not isinstance(position, str) or not position):
                reject("last_event_id must be a non-empty string or null")
            return SubscribeCommand(channel=channel_field(), last_event_id=position, ref=ref)
        case "unsubscribe":
            return UnsubscribeCommand(channel=channel_field(), ref=ref)
        case "refresh":
            return RefreshCommand(token=required("token"), ref=ref)
        case _:
            return PingCommand(ref=ref)


def _load(text: str | bytes) -> dict[str, object]:
    """Parse a JSON object with orjson and json.

    orjson rejects deep nesting, NaN and unpaired surrogates. json keeps large integers, and lets
    duplicate keys be rejected.
    """
    try:
        orjson.loads(text)
        frame: object = json.loads(text, object_pairs_hook=_unique)
    except BadCommand:
        raise
    except (ValueError, RecursionError):
        raise BadCommand("frame must be one JSON object") from None
    if not isinstance(frame, dict):
        raise BadCommand("frame must be one JSON object")
    return frame


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadCommand("duplicate field")
    return found


def _ref(value: object) -> Ref:
    match value:
        case None:
            return None
        case bool():
            pass
        case str() if len(value) <= _REF_CHARS:
            return value
        case int() if abs(value) <= _SAFE_INTEGER:
            return value
        case float() if math.isfinite(value):
            return value
        case _:
            pass
    raise BadCommand(
        f"ref must be a string of at most {_REF_CHARS} characters or a number that JavaScript"
        " represents exactly"
    )
