"""The network connection of a client: its ID, where it comes from, and the client's software."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping

# A header that is longer than this is cut: any client can send it, and it is stored and logged.
_AGENT_CHARS = 200
_ADDRESS_CHARS = 100
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa1-\ud7ff\ue000-\U0010ffff]")
# The first name in the list that a browser's User-Agent contains is its own. The others are there
# for compatibility.
_BROWSERS = re.compile(r"(Edg|OPR|SamsungBrowser|Firefox|Chrome|Version)/(\d+)")
_BROWSER_NAMES = {"Edg": "Edge", "OPR": "Opera", "Version": "Safari"}
_ORDER = ("Edg", "OPR", "SamsungBrowser", "Firefox", "Chrome", "Version")


class ConnectionInfo:
    """Describes one connection. It is created for each request that becomes a client or fails.

    `id` is short and random. It names the connection in the journal, in log lines, in error answers
    (`X-Request-Id`) and in traces, and contains neither host nor worker.
    """

    __slots__ = ("address", "agent", "forwarded_for", "id", "since")

    def __init__(self, address: str = "", headers: Mapping[str, str] | None = None) -> None:
        """`address` is the peer's. `headers` are those of the request."""
        headers = headers or {}
        self.id = os.urandom(6).hex()
        # Many clients have the same texts, which are stored once.
        self.address = sys.intern(address)
        self.agent = sys.intern(_clean(headers.get("User-Agent", ""), _AGENT_CHARS))
        # The address that a proxy reports. A client that connects directly can send any.
        self.forwarded_for = _clean(headers.get("X-Forwarded-For", ""), _ADDRESS_CHARS)
        # Seconds since the epoch.
        self.since = time.time()


def software(agent: str) -> str:
    """Return name and version of the client's software according to its User-Agent, or ''."""
    if agent.startswith("Mozilla/"):
        found = dict(_BROWSERS.findall(agent))
        name = next((each for each in _ORDER if each in found), None)
        return "" if name is None else f"{_BROWSER_NAMES.get(name, name)} {found[name]}"
    name, slash, version = agent.partition(" ")[0].partition("/")
    return f"{name} {version}" if slash else name


def _clean(text: str, limit: int) -> str:
    return _UNPRINTABLE.sub("?", text[:limit]) if text else text
