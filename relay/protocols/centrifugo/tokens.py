"""Connection tokens and signatures of private subscriptions: HMAC-SHA256 with the secret.

The signed parts are concatenated without a separator, as in v1's documentation.
"""

from __future__ import annotations

import hmac
import re

# Go's strconv.Atoi.
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_LIMIT = 1 << 63


def sign(secret: bytes, *parts: str) -> str:
    """Return the signature of the parts, 64 lower-case hex digits."""
    return hmac.digest(secret, "".join(parts).encode(errors="replace"), "sha256").hex()


def is_signed(secret: bytes, given: str, *parts: str) -> bool:
    """Return True if `given` is the signature of the parts.

    Return False for an empty secret, because anyone can sign with it.
    """
    # compare_digest accepts only ASCII strings, and the client can send any string.
    wanted = sign(secret, *parts).encode()
    return bool(secret) and hmac.compare_digest(wanted, given.encode(errors="replace"))


def parse_timestamp(text: str) -> int | None:
    """Return seconds since the epoch, or None if `text` is not a 64-bit integer."""
    if not _INTEGER.fullmatch(text):
        return None
    value = int(text)
    return value if -_LIMIT <= value < _LIMIT else None
