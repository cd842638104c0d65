"""Write dead letters: copies of entries that cannot be delivered, with the reason, in one stream.

Several workers read the same entry. The first one that sets a marker key writes the dead letter. If
that worker dies in between, the dead letter is missing, but the entry remains in its stream.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime

import orjson

from relay.core.model import Broken, Channel
from relay.stream.connection.connect import command
from relay.stream.format.entry import BROKEN_BYTES
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients

KEEP = 10_000
MARK_S = 86_400


async def write(
    clients: ShardClients, keys: Keys, channel: Channel, broken: Broken, *, node: str
) -> bool:
    """Append the dead letter of this entry. Return False if another worker has done so."""
    text, truncated = _fields(broken.fields)
    letter: list[bytes | str] = ["stream", keys.stream(channel), "id", str(broken.id)]
    letter += "reason", broken.reason, "node", node
    letter += "at", datetime.now(UTC).isoformat(timespec="milliseconds"), "fields", text
    if truncated:
        letter += "truncated", "1"
    mark = keys.dead_letter_mark(channel, broken.id)
    # The client repeats the command if its reply is lost. The value shows that it was this one.
    own = f"{node} {secrets.token_hex(8)}".encode()
    words = ("SET", mark, own, "NX", "GET", "EX", MARK_S)
    if await command(clients.for_key(mark), *words) not in (None, own):
        return False
    await command(clients.home, "XADD", keys.dead_letters, "MAXLEN", "~", KEEP, "*", *letter)
    return True


def of_command(
    queue: str, command: bytes, reason: str, *, node: str, field: bytes = b"command"
) -> list[bytes]:
    """Return the dead letter of a queue command as flat fields, in the format of `queue.APPLY`.

    `field` is the name under which the command, or another value, is shown.
    """
    text, truncated = _fields([(field, command)])
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    letter = [b"queue", queue.encode(), b"reason", reason.encode(errors="replace")]
    letter += b"node", node.encode(), b"at", at.encode(), b"fields", text
    if truncated:
        letter += b"truncated", b"1"
    return letter


def _fields(pairs: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, bool]:
    """Return names and values as JSON, up to BROKEN_BYTES, and whether any were truncated."""
    left = BROKEN_BYTES
    shown = []
    truncated = False
    for name, value in pairs:
        if left <= 0:
            truncated = True
            break
        shown.append([_text(name, left), _text(value, left - len(name))])
        left -= len(name) + len(value)
    return orjson.dumps(shown), truncated or left < 0


def _text(value: bytes, limit: int) -> str | dict[str, str]:
    cut = value[: max(limit, 0)]
    try:
        value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(cut).decode()}
    return cut.decode(errors="ignore")  # the limit may be within a character
