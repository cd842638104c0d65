"""The interface to traces, and the entry field that carries them from producers to deliveries.

`relay.process.tracing` implements it with OpenTelemetry. Without tracing, nothing here is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relay.core.model import Channel

# The field of an entry, and the header of a request (https://www.w3.org/TR/trace-context/).
FIELD = b"traceparent"
_VALID = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def field_of(text: str | None) -> Mapping[bytes, bytes] | None:
    """Return the entry field for a producer's traceparent. None if it is invalid."""
    value = (text or "").encode(errors="replace")
    return {FIELD: value} if _VALID.fullmatch(value) else None


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
