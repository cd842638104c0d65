"""Ephemeral events: JSON on a pub/sub channel, delivered live only, without ID or history.

    PUBLISH <p>ephemeral:{C} '{"data": {"typing": true}, "type": "typing", "client": "c1"}'

`data` is any JSON value. For text that is not JSON, `text` is used instead. `type`, `client` and
`to` (a list of selectors, or one text of them) are as in an entry. A number in `data` is kept as a
64-bit integer or double; its notation may change. `door` limits the event to the clients of one
protocol, such as Centrifugo's join and leave. `extra` is an object of texts for the protocol that
wrote the event. `binary` is a list of base64 texts: the binary parts of `data`, as in an entry.
"""

from __future__ import annotations

import base64

import orjson

from relay.core.model import Channel, Event
from relay.stream.format import entry


def encode(event: Event) -> bytes:
    """Return the payload for PUBLISH. Raise ValueError if `decode` would reject it."""
    payload: dict[str, object]
    if event.is_json:
        payload = {"data": orjson.Fragment(event.data)}
    else:
        payload = {"text": event.data.decode()}
    if event.type is not None:
        payload["type"] = entry.checked_type(event.type)
    if event.client is not None:
        payload["client"] = event.client
    if event.to is not None:
        payload["to"] = sorted(event.to)
    if event.door is not None:
        payload["door"] = event.door
    texts, parts = {}, []
    for name, value in event.extra.items():
        if name.startswith(b"binary."):
            parts.append(base64.b64encode(value).decode())
        else:
            texts[name.decode()] = value.decode()
    if texts:
        payload["extra"] = texts
    if parts:
        payload["binary"] = parts
    try:
        return orjson.dumps(payload)
    except orjson.JSONEncodeError as exc:  # a lone surrogate
        raise ValueError(str(exc)) from exc


def decode(channel: Channel, payload: bytes, max_bytes: int) -> Event | str:
    """Return the event, or the reason why the payload is invalid."""
    if len(payload) > max_bytes:
        return f"too large: {len(payload)} bytes"
    try:
        values = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return "not JSON"
    if not isinstance(values, dict):
        return "not a JSON object"
    kind, client, text, door = (values.get(name) for name in ("type", "client", "text", "door"))
    if not all(isinstance(value, str | None) for value in (kind, client, text, door)):
        return "type, client, text and door must be strings"
    to, extra = values.get("to"), values.get("extra", {})
    if not isinstance(extra, dict) or not all(isinstance(value, str) for value in extra.values()):
        return "extra is not an object of strings"
    fields = {name.encode(): value.encode() for name, value in extra.items()}
    try:
        for number, part in enumerate(values.get("binary", ())):
            fields[b"binary.%d" % number] = base64.b64decode(part, validate=True)
    except (ValueError, TypeError):
        return "binary is not a list of base64 strings"
    if (text is None) == ("data" not in values):
        return "no data" if text is None else "both data and text"
    try:
        data = orjson.dumps(values["data"]) if text is None else text.encode()
        data = entry.show_binary(data, fields)
        return Event(
            channel,
            None,
            data,
            text is None,
            type=None if kind is None else entry.checked_type(kind),
            to=None if to is None else entry.selectors(to),
            client=client,
            extra=fields,
            door=door,
        )
    except (ValueError, orjson.JSONEncodeError) as exc:
        # Text may nest deeper than orjson writes.
        return str(exc)
