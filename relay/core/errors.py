"""Exceptions of relay.

RelayError
├── ConfigError            the configuration: one line for the operator, exit code 1
├── StartError             the machine prevents the start (port in use ...): one line, exit code 1
├── RedisUnavailable       Redis is unreachable or temporarily cannot serve: retry
├── NotDurable             appended, but the wanted durability was not confirmed in time
├── DurabilityUnavailable  not appended: Redis cannot confirm the wanted durability
├── ClientError            an error of the client; its `code` is the reason to report
│   ├── Unauthorized       no credential, or a bad or expired one
│   ├── Forbidden          a valid credential without access to this
│   ├── BadRequest         malformed request
│   └── LimitExceeded      too large, too fast, too many
└── Unavailable            relay cannot answer now (Redis unreachable, shutdown): retry
    └── StreamRefused      Redis refuses to read the channel's stream: retry later
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.reasons import Reason

if TYPE_CHECKING:
    from relay.core.model import EntryID


class RelayError(Exception):
    """Base class of all expected errors."""


class ConfigError(RelayError):
    """Invalid configuration. One line with file, section, key and allowed values."""


class StartError(RelayError):
    """Failed start. One line with the cause and the command that fixes it."""


class RedisUnavailable(RelayError):
    """Redis is unreachable, loading, read-only or rejects commands. The caller retries later."""


class NotDurable(RelayError):
    """The entry was appended, but its durability was not confirmed in time."""

    def __init__(self, text: str, entry_id: EntryID) -> None:
        super().__init__(text)
        self.entry_id = entry_id


class DurabilityUnavailable(RelayError):
    """Redis cannot confirm the wanted durability, so nothing was appended."""


class ClientError(RelayError):
    """Error of a client. `code` is stable, the text is for people."""

    code = Reason.BAD_REQUEST


class Unauthorized(ClientError):
    """No credential, or an invalid or expired one."""

    code = Reason.UNAUTHORIZED


class Forbidden(ClientError):
    """A valid credential without access to the channel, or an Origin that is not allowed."""

    code = Reason.FORBIDDEN


class BadRequest(ClientError):
    """The request is malformed."""

    code = Reason.BAD_REQUEST


class LimitExceeded(ClientError):
    """Too large, too fast or too many. The text names the limit."""

    code = Reason.LIMIT_EXCEEDED


class WorkerUnreachable(RelayError):
    """The worker that has a session is alive, but no request can be passed on to it."""


class Unavailable(RelayError):
    """Relay cannot answer now. The same request may succeed later."""

    code = Reason.UNAVAILABLE


class StreamRefused(Unavailable):
    """Redis refuses to read the channel's stream, although it can be reached."""
