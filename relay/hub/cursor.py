"""Cursors: positions in several streams as one opaque text that any worker can read.

`c1.` and one part per channel, with a dot between them. A part is base64url, without padding, of:

    3 bytes   hash of the channel's name, because a cursor is sent with every event
    1 byte    the optional fields that follow: 8 incarnation, 2 digest, 4 added
    8 bytes   incarnation        2 bytes  digest        varint  added
    varint    ms                 varint   seq

Parts made by earlier versions may have the flag 1 instead of 8, and a varint: an incarnation that
cannot be compared with present ones. It is ignored, so such a part is a stream ID with a digest.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

from relay.core.errors import BadRequest
from relay.core.model import Channel, EntryID, Position

PREFIX = b"c1."
SEPARATOR = b"."
# Enough for 1024 channels with the largest numbers. Limits the cost of decoding invalid text.
MAX_CHARS = 65536

_NAME_BYTES = 3
_HAS_OLD_INCARNATION, _HAS_DIGEST, _HAS_ADDED, _HAS_INCARNATION = 1, 2, 4, 8
_ALL_FLAGS = _HAS_OLD_INCARNATION | _HAS_DIGEST | _HAS_ADDED | _HAS_INCARNATION
_INCARNATION_BYTES = 8
_TO_STANDARD = str.maketrans("-_", "+/")


class _Broken(Exception):
    """A part that relay did not make."""


def part(channel: Channel, position: Position) -> bytes:
    """Encode one channel's part. Raise ValueError if a number does not fit its field."""
    flags = 0
    fields = b""
    if position.incarnation is not None:
        flags |= _HAS_INCARNATION
        fields += position.incarnation.to_bytes(_INCARNATION_BYTES, "big")
    if position.digest is not None:
        if position.digest >> 16:
            raise ValueError("a digest has 16 bits")
        flags |= _HAS_DIGEST
        fields += position.digest.to_bytes(2, "big")
    if position.added is not None:
        flags |= _HAS_ADDED
        fields += _varint(position.added)
    fields += _varint(position.id.ms) + _varint(position.id.seq)
    return urlsafe_b64encode(_name(channel) + bytes((flags,)) + fields).rstrip(b"=")


def join(parts: Iterable[bytes]) -> bytes:
    """Join parts to a cursor, in the order in which the client requested the channels."""
    return PREFIX + SEPARATOR.join(parts)


def encode(parts: Iterable[tuple[Channel, Position]]) -> bytes:
    """Encode positions as a cursor."""
    return join(part(channel, position) for channel, position in parts)


def decode(text: str, channels: Sequence[Channel]) -> dict[Channel, Position]:
    """Return the positions in `text` for `channels`. Raise BadRequest if it is invalid.

    Channels that are not in the cursor are omitted. For a single channel `text` may also be a plain
    entry ID.
    """
    if len(text) > MAX_CHARS:
        raise BadRequest(f"last_event_id is longer than {MAX_CHARS} characters")
    if not text.startswith(PREFIX.decode()):
        return _plain(text, channels)
    found: dict[bytes, list[Position]] = {}
    try:
        for encoded in text[len(PREFIX) :].split("."):
            name, position = _read_part(encoded)
            found.setdefault(name, []).append(position)
    except _Broken:
        raise BadRequest("last_event_id is not a cursor of this relay") from None
    # In one of 2,000 sets of 128 channels, two share their 3 bytes. Their order distinguishes them.
    # If it has changed, their incarnations do not match, and the client receives a reset.
    # Each of them must have a position. Otherwise it would begin with new events, without a notice.
    used: dict[bytes, int] = {}
    positions: dict[Channel, Position] = {}
    for channel in dict.fromkeys(channels):
        name = _name(channel)
        if name in found:
            turn = used.get(name, 0)
            used[name] = turn + 1
            positions[channel] = found[name][min(turn, len(found[name]) - 1)]
    return positions


def _plain(text: str, channels: Sequence[Channel]) -> dict[Channel, Position]:
    try:
        entry_id = EntryID.parse(text)
    except ValueError:
        raise BadRequest("last_event_id is neither a cursor nor an entry ID") from None
    if len(channels) != 1:
        raise BadRequest("last_event_id must be a cursor if there are several channels")
    return {channels[0]: Position(entry_id)}


@lru_cache(maxsize=65536)
def _name(channel: Channel) -> bytes:
    return blake2b(channel.encode(), digest_size=_NAME_BYTES).digest()


def _varint(number: int) -> bytes:
    """Encode 7 bits per byte, lowest first, with the top bit set in all bytes but the last."""
    if number < 0 or number >> 64:
        raise ValueError("a number in a cursor has at most 64 bits")
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(raw):
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number >> 64:
                break
            return number, at
        shift += 7
        if shift > 63:
            break
    raise _Broken


def _read_part(encoded: str) -> tuple[bytes, Position]:
    try:
        raw = a2b_base64(encoded.translate(_TO_STANDARD) + "=" * (-len(encoded) % 4))
    except (Base64Error, ValueError):
        raise _Broken from None
    # The decoder ignores invalid characters. Only text that encodes back to the same was made here.
    if urlsafe_b64encode(raw).rstrip(b"=") != encoded.encode() or len(raw) <= _NAME_BYTES:
        raise _Broken
    flags, at = raw[_NAME_BYTES], _NAME_BYTES + 1
    if flags & ~_ALL_FLAGS:
        raise _Broken
    incarnation = digest = added = None
    if flags & _HAS_OLD_INCARNATION:
        _, at = _read_varint(raw, at)
    if flags & _HAS_INCARNATION:
        incarnation = int.from_bytes(raw[at : at + _INCARNATION_BYTES], "big")
        at += _INCARNATION_BYTES
    if flags & _HAS_DIGEST:
        digest, at = int.from_bytes(raw[at : at + 2], "big"), at + 2
    if flags & _HAS_ADDED:
        added, at = _read_varint(raw, at)
    ms, at = _read_varint(raw, at)
    seq, at = _read_varint(raw, at)
    if at != len(raw):
        raise _Broken
    position = Position(EntryID(ms, seq), added=added, incarnation=incarnation, digest=digest)
    return raw[:_NAME_BYTES], position
