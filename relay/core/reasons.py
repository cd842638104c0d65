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
    INVALID_TOKEN = "invalid_token"  # noqa: S105  # not a secret
    UNKNOWN_COMMAND = "unknown_command"
    FORBIDDEN = "forbidden"
    LIMIT_EXCEEDED = "limit_exceeded"
    UNAVAILABLE = "unavailable"
    # The worker has too many new clients, or its memory is short.
    OVERLOADED = "overloaded"

    # A connection is closed.
    STOPPING = "stopping"
    DISCONNECTED = "disconnected"
    # The client has sent no credential in time.
    NO_CREDENTIAL = "no_credential"
    # The client does not receive what is sent to it, for the time that relay or v1 allows.
    SLOW = "slow"
    NO_PONG = "no_pong"
    WRITE_TIMEOUT = "write_timeout"

    # A subscription ends.
    REVOKED = "revoked"
    RIGHTS_CHANGED = "rights_changed"
    EXPIRED = "expired"
    # The credential has become another user's.
    OTHER_USER = "other_user"
    UNSUBSCRIBED = "unsubscribed"

    # Events of a subscription may be missing: a gap.
    TRIMMED = "trimmed"
    DELETED = "deleted"

    # The client's position is not valid any more: a reset.
    OTHER_INCARNATION = "other_incarnation"
    POSITION_AHEAD = "position_ahead"
    FAILOVER = "failover"
    UNKNOWN_POSITION = "unknown_position"
