"""Tokens of connections and signatures of private subscriptions: HMAC-SHA256 by the one secret.

The parts are signed one after the other, without anything between them, as in v1's documents.
"""

from __future__ import annotations

import hmac
import re

# Go's strconv.Atoi.
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_LIMIT = 1 << 63


def sign(secret: bytes, *parts: str) -> str:
    """In lower-case hex, 64 characters."""
    return hmac.digest(secret, "".join(parts).encode(errors="replace"), "sha256").hex()


def is_signed(secret: bytes, given: str, *parts: str) -> bool:
    """Whether `given` is their signature; never true without a secret, since that can be forged."""
    # Bytes: compare_digest takes text in ASCII only, and this text is the peer's.
    wanted = sign(secret, *parts).encode()
    return bool(secret) and hmac.compare_digest(wanted, given.encode(errors="replace"))


def parse_timestamp(text: str) -> int | None:
    """Seconds since the epoch, None where it is no 64-bit integer."""
    if not _INTEGER.fullmatch(text):
        return None
    value = int(text)
    return value if -_LIMIT <= value < _LIMIT else None
