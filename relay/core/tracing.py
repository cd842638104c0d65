"""The interface to traces, and the entry field that carries them from producers to deliveries.

`relay.process.tracing` implements it with OpenTelemetry. Without tracing, nothing here is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.model import Channel

# The field of an entry, and the header of a request (https://www.w3.org/TR/trace-context/).
FIELD = b"traceparent"
_VALID = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


# The ID of the client's connection whose message is handled, for the spans that it causes.
_connection: ContextVar[str] = ContextVar("connection", default="")


@contextmanager
def caused_by(info: ConnectionInfo | None) -> Iterator[None]:
    """Name the connection in the spans that begin in this block."""
    token = _connection.set("" if info is None else info.id)
    try:
        yield
    finally:
        _connection.reset(token)


def connection_id() -> str:
    """Return the ID of the client's connection that causes the present work, or ''."""
    return _connection.get()


def is_valid(value: bytes) -> bool:
    """Return True if this is a traceparent. Anyone who appends entries can store any value."""
    return _VALID.fullmatch(value) is not None


def field_of(text: str | None) -> Mapping[bytes, bytes] | None:
    """Return the entry field for a producer's traceparent. None if it is invalid."""
    if not text:
        return None
    value = text.encode(errors="replace")
    return {FIELD: value} if is_valid(value) else None


class AppendSpan(Protocol):
    """The span of one append."""

    # The value of the entry's field.
    traceparent: bytes

    def end(self, entry_id: str, problem: str = "") -> None:
        """End the span with the entry's ID, or with the reason why there is none."""


class AppendTracer(Protocol):
    """Creates spans of appends."""

    def append(
        self, channel: Channel, parent: bytes | None = None, *, source: str = "publish"
    ) -> AppendSpan:
        """Begin the span of an append. Its parent is `parent`, or the request that is handled.

        `source` names the way in which relay received the event.
        """
