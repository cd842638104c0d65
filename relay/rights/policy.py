"""Decide who may read which channel, for all protocols, live events and replay.

The policy does no I/O: the caller passes the value of the rights hash and, if `needs_http` returns
True, the application's answer. So a decision takes effect between two entries of a stream, at the
position of a revocation.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from relay.config.settings import NamespaceSettings
from relay.core.model import RESERVED_NAMESPACES, Channel, Principal, namespace_of
from relay.rights.http import HttpRights

log = logging.getLogger(__name__)

# Values of the rights hash.
REVOKED = b"-"
_READERS = frozenset({b"r", b"rw"})
# Cached sets of patterns. Most users have one of a few sets.
_LIMIT_PATTERNS = 4096
_LIMIT_LOGGED = 100


class Patterns:
    """The patterns of one token. A `*` matches any run of characters, ':' included."""

    __slots__ = ("_patterns",)

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [tuple(pattern.split("*")) for pattern in patterns]

    def grant(self, channel: str) -> bool:
        """Return True if a pattern matches `channel`."""
        # A `*` that is meant for the installation's own channels must not match channels of other
        # protocols.
        owner = namespace_of(Channel(channel))
        start = f"{owner}:" if owner in RESERVED_NAMESPACES else ""
        return any(
            parts[0].startswith(start) and _match(parts, channel) for parts in self._patterns
        )


def _match(parts: tuple[str, ...], text: str) -> bool:
    # Don't use `re` or `fnmatch`: their backtracking is slow for patterns with many stars, and
    # tokens may come from users' applications. If `*` is the only wildcard, the leftmost match of
    # each part is always sufficient, so that no backtracking is needed.
    if len(parts) == 1:
        return parts[0] == text
    first, *middle, last = parts
    end = len(text) - len(last)
    start = len(first)
    if end < start or not (text.startswith(first) and text.endswith(last)):
        return False
    for part in middle:
        found = text.find(part, start, end)
        if found < 0:
            return False
        start = found + len(part)
    return True


class Policy:
    """The policy with the present settings. `reload` replaces them.

    Access is denied if the credential has expired, or if the hash contains `-` or an unknown value.
    Otherwise one source of the namespace that grants it suffices. An `unrestricted` principal may
    read all channels except those of other protocols.
    """

    def __init__(
        self,
        namespace_of_channel: Callable[[Channel], NamespaceSettings],
        http: HttpRights | None,
    ) -> None:
        self._patterns: OrderedDict[tuple[str, ...], Patterns] = OrderedDict()
        self._logged: set[bytes] = set()
        self.reload(namespace_of_channel, http)

    def reload(
        self,
        namespace_of_channel: Callable[[Channel], NamespaceSettings],
        http: HttpRights | None,
    ) -> None:
        """Use new settings. The caller must check the rights of connected clients again."""
        self._namespace = namespace_of_channel
        self.http = http
        # By the text of the setting. The configuration limits their number.
        self._sources: dict[str, frozenset[str]] = {}

    def needs_http(self, principal: Principal, channel: Channel) -> bool:
        """Return True if only the application can grant access. Then `allowed` needs its answer.

        The rights hash is not considered, because it may have changed when the answer arrives.
        """
        if self.http is None or _open(principal, channel):
            return False
        sources = self._sources_of(channel)
        return "http" in sources and not self._granted(sources, principal, channel)

    def allowed(
        self,
        principal: Principal,
        channel: Channel,
        hash_value: bytes | None,
        http_answer: bool | None,
        *,
        now: float,
    ) -> bool:
        """Return True if `principal` may read `channel` at `now` (seconds since the epoch).

        `hash_value` is the user's field in the channel's rights hash, or None. An `http_answer` of
        None denies access.
        """
        if principal.expires_at is not None and principal.expires_at <= now:
            return False
        if _open(principal, channel):
            return True
        if hash_value is not None and hash_value not in _READERS:
            # Deny access even if the namespace does not list the source `hash`: `relay revoke`
            # writes to the hash, and a revocation must always take effect.
            if hash_value != REVOKED:
                self._log_unknown(channel, hash_value)
            return False
        sources = self._sources_of(channel)
        return (
            (hash_value is not None and "hash" in sources)
            or (http_answer is True and "http" in sources)
            or self._granted(sources, principal, channel)
        )

    def _sources_of(self, channel: Channel) -> frozenset[str]:
        settings = self._namespace(channel)
        sources = self._sources.get(settings.rights)
        if sources is None:
            sources = self._sources[settings.rights] = settings.sources()
        return sources

    def _granted(self, sources: frozenset[str], principal: Principal, channel: Channel) -> bool:
        if "anonymous" in sources:
            return True
        if "door" in sources and principal.grant is not None and principal.grant(channel):
            return True
        if "claims" not in sources:
            return False
        if channel in principal.channels:
            return True
        patterns = principal.patterns
        return bool(patterns) and self._parsed(patterns).grant(channel)

    def _parsed(self, texts: tuple[str, ...]) -> Patterns:
        patterns = self._patterns.get(texts)
        if patterns is None:
            patterns = self._patterns[texts] = Patterns(texts)
            if len(self._patterns) > _LIMIT_PATTERNS:
                self._patterns.popitem(last=False)
        else:
            self._patterns.move_to_end(texts)
        return patterns

    def _log_unknown(self, channel: Channel, value: bytes) -> None:
        if value not in self._logged and len(self._logged) < _LIMIT_LOGGED:
            self._logged.add(value)
            log.warning(
                "Rights hash of %s: unknown value %r denies access; allowed values are r, rw and -",
                channel,
                value[:50],
            )


def _open(principal: Principal, channel: Channel) -> bool:
    # --insecure applies to the native protocol only. Channels of other protocols keep their rules.
    return principal.unrestricted and namespace_of(channel) not in RESERVED_NAMESPACES
