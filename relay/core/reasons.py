"""Reasons for rejecting a request, closing a connection or ending a subscription.

The values are shown to clients of the native protocol and are labels of metrics. Other protocols
map the reasons to their own codes, each in one table.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why relay rejects, closes or ends something."""

    # A request or connection is rejected.
    BAD_REQUEST = "bad_request"
    BAD_MESSAGE = "bad_message"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    LIMIT_EXCEEDED = "limit_exceeded"
    UNAVAILABLE = "unavailable"

    # A connection is closed.
    STOPPING = "stopping"
    DISCONNECTED = "disconnected"

    # A subscription ends.
    REVOKED = "revoked"
    RIGHTS_CHANGED = "rights_changed"
    EXPIRED = "expired"
    UNSUBSCRIBED = "unsubscribed"

    # Events of a subscription may be missing: a gap.
    TRIMMED = "trimmed"
    DELETED = "deleted"

    # The client's position is not valid any more: a reset.
    OTHER_INCARNATION = "other_incarnation"
    POSITION_AHEAD = "position_ahead"
    FAILOVER = "failover"
    UNKNOWN_POSITION = "unknown_position"
