"""IDs of Engine.IO sessions. Each names the worker that has the session, for workers only.

    ~<20 random characters>.<12 characters>

The second part is the worker's address and a checksum, encrypted with the key that all workers
share. So any worker finds the owner without a lookup, while clients can neither tell workers apart
nor address one. The tilde tells the socket.io-emitter bridge that a room of this name is one
client's socket.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

# A worker's address has 8 hexadecimal digits. The checksum rejects 65,535 of 65,536 invented IDs.
_ADDRESS_BYTES, _CHECK_BYTES = 4, 2
_RANDOM_CHARS = 20


class SessionIds:
    """Creates and reads IDs.

    `keys` returns the shared key, and then the one before it, if the key in Redis was lost.
    """

    def __init__(self, address: str, keys: Callable[[], tuple[bytes, ...]]) -> None:
        self._address = bytes.fromhex(address)
        self._keys = keys

    def new(self) -> str:
        """Return an ID that cannot be guessed."""
        name = secrets.token_urlsafe(15)
        return f"~{name}.{_seal(self._address, self._keys()[0], name).hex()}"

    def owner_of(self, sid: str) -> str | None:
        """Return the address of the session's worker, or None if it is not a session's ID."""
        name, _, sealed = sid[1:].partition(".")
        if len(name) != _RANDOM_CHARS or not sid.isascii():
            return None
        try:
            hidden = bytes.fromhex(sealed)
        except ValueError:
            return None
        if len(hidden) != _ADDRESS_BYTES + _CHECK_BYTES:
            return None
        for key in self._keys():
            address = _mask(hidden[:_ADDRESS_BYTES], key, name)
            if hmac.compare_digest(_seal(address, key, name), hidden):
                return address.hex()
        return None


def _mask(data: bytes, key: bytes, name: str) -> bytes:
    # The name is used once, so this is a one-time pad.
    pad = hmac.digest(key, b"address" + name.encode(), "sha256")
    return bytes(one ^ other for one, other in zip(data, pad, strict=False))


def _seal(address: bytes, key: bytes, name: str) -> bytes:
    check = hmac.digest(key, b"check" + address + name.encode(), "sha256")[:_CHECK_BYTES]
    return _mask(address, key, name) + check
