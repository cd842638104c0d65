"""Exceptions, ours apart from theirs.

RelayError
├── ConfigError            the configuration: one line for the operator, exit code 1
├── StartError             something the machine lacks (port taken ...): one line, exit code 1
├── RedisUnavailable       Redis is away, or answered that it cannot serve now: try again
├── NotReplicated          appended, but too few replicas said so in time
├── ClientError            a client's mistake; carries the code that its door shows it
│   ├── Unauthorized       no credential, or a bad or expired one
│   ├── Forbidden          a good credential that does not open this
│   ├── BadRequest         cannot be understood
│   └── LimitExceeded      too large, too fast, too many
└── Unavailable            the relay cannot answer now (Redis away, stopping): try again
"""

from __future__ import annotations

from relay.core.reasons import Reason


class RelayError(Exception):
    """Everything that this package raises on purpose."""


class ConfigError(RelayError):
    """One line naming file, section, key and what is allowed."""


class StartError(RelayError):
    """One line naming what is missing and the command that mends it."""


class RedisUnavailable(RelayError):
    """Redis is away, loading, read-only or refusing; the caller backs off and tries again."""


class NotReplicated(RelayError):
    """The entry has an ID, but fewer replicas than asked for confirmed it within the limit."""


class ClientError(RelayError):
    """A client's mistake; `code` is the stable word, the text is for people."""

    code = Reason.BAD_REQUEST


class Unauthorized(ClientError):
    """No credential, or a bad or expired one."""

    code = Reason.UNAUTHORIZED


class Forbidden(ClientError):
    """A good credential that does not open this channel, or an Origin that is not allowed."""

    code = Reason.FORBIDDEN


class BadRequest(ClientError):
    """The request cannot be understood."""

    code = Reason.BAD_REQUEST


class LimitExceeded(ClientError):
    """Too large, too fast or too many; the text names the limit."""

    code = Reason.LIMIT_EXCEEDED


class Unavailable(RelayError):
    """The relay cannot answer now; the same request may succeed shortly."""

    code = Reason.UNAVAILABLE
