"""Who may read which channel: the one rule that every door and every replay asks.

Pure: whoever asks has read the rights hash and, where `needs_http` says so, has the application's
answer. So the answer can be given between two entries of a stream, at the revocation's own place.
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
REFUSED = b"-"
_READERS = frozenset({b"r", b"rw"})
# Distinct sets of patterns kept split; most users of a site share a few.
_LIMIT_PATTERNS = 4096
_LIMIT_LOGGED = 100


class Patterns:
    """The patterns of one token. A `*` matches any run of characters, ':' included."""

    __slots__ = ("_patterns",)

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [tuple(pattern.split("*")) for pattern in patterns]

    def grant(self, channel: str) -> bool:
        """Return True if a pattern matches `channel`."""
        # A `*` that was meant for the site's own channels does not open another system's.
        owner = namespace_of(Channel(channel))
        start = f"{owner}:" if owner in RESERVED_NAMESPACES else ""
        return any(
            parts[0].startswith(start) and _match(parts, channel) for parts in self._patterns
        )


def _match(parts: tuple[str, ...], text: str) -> bool:
    # Not `re` or `fnmatch`: both try every way to share the text among the stars, and tokens may
    # come from users' own applications. With nothing but stars the leftmost place of each part is
    # always good enough, so that there is nothing to go back for.
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
    """The rule under the present settings; `reload` swaps them.

    What refuses wins: an expired credential, `-` or an unknown value in the hash. Otherwise any of
    the namespace's sources grants. `unrestricted` opens every channel except those of other doors.
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
        """From here on these settings count; the caller has clients checked again."""
        self._namespace = namespace_of_channel
        self.http = http
        # By the setting's text, which only the configuration can add to.
        self._sources: dict[str, frozenset[str]] = {}

    def needs_http(self, principal: Principal, channel: Channel) -> bool:
        """Whether only the application can open this; then `allowed` wants its answer.

        The hash is left out: it may say less by the time that the answer is here.
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
        """Whether `principal` may read `channel` at `now` (seconds since the epoch).

        `hash_value` is the user's field in the channel's rights hash, None without one.
        `http_answer` None is as good as a refusal.
        """
        if principal.expires_at is not None and principal.expires_at <= now:
            return False
        if _open(principal, channel):
            return True
        if hash_value is not None and hash_value not in _READERS:
            # Refuses even where the namespace does not list `hash`: `relay revoke` writes it, and
            # a revocation that does nothing would be worse than one too many.
            if hash_value != REFUSED:
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
        return bool(patterns) and self._split(patterns).grant(channel)

    def _split(self, texts: tuple[str, ...]) -> Patterns:
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
                "rights hash of %s: unknown value %r refuses; r, rw and - are known",
                channel,
                value[:50],
            )


def _open(principal: Principal, channel: Channel) -> bool:
    # --insecure is the native door's: what other doors guard stays guarded by their own sources.
    return principal.unrestricted and namespace_of(channel) not in RESERVED_NAMESPACES
