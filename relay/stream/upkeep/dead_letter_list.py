"""List, requeue and drop dead letters, for operators."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.config.settings import NamespaceSettings
from relay.core.errors import RelayError
from relay.core.model import ZERO_ID, Channel, EntryID
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from relay.stream.write.append import AppendCommands, send_one

# A dead letter may have BROKEN_BYTES, and more as base64.
_PAGE = 100
_MARK_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter.

    `values` contains its fields as they are in Redis. `channel` is None if it did not come from the
    stream of a channel, `entry_id` is None if there was no entry.
    """

    id: EntryID
    values: Mapping[str, str]
    channel: Channel | None
    entry_id: EntryID | None

    @property
    def reason(self) -> str:
        """Return why the entry could not be delivered."""
        return self.values.get("reason", "")

    @property
    def truncated(self) -> bool:
        """Return True if only the beginning of the fields was kept."""
        return "truncated" in self.values


async def count(client: RedisClient, keys: Keys) -> int:
    """Return the number of dead letters."""
    return int(await connect.command(client, "XLEN", keys.dead_letters))


async def pages(client: RedisClient, keys: Keys) -> AsyncIterator[list[DeadLetter]]:
    """Yield all dead letters that exist at the beginning, oldest first."""
    newest = await connect.command(client, "XREVRANGE", keys.dead_letters, "+", "-", "COUNT", 1)
    if not newest:
        return
    end = EntryID.parse(newest[0][0])
    at = ZERO_ID
    while at < end:
        words = (keys.dead_letters, f"({at}", str(end), "COUNT", _PAGE)
        found = await connect.command(client, "XRANGE", *words)
        if not found:
            return
        at = EntryID.parse(found[-1][0])
        yield [_letter(keys, *raw) for raw in found]


async def page(client: RedisClient, keys: Keys, after: EntryID, count: int) -> list[DeadLetter]:
    """Return up to `count` dead letters after this ID, oldest first."""
    words = (keys.dead_letters, f"({after}", "+", "COUNT", count)
    return [_letter(keys, *raw) for raw in await connect.command(client, "XRANGE", *words)]


async def find(client: RedisClient, keys: Keys, letter_id: EntryID) -> DeadLetter:
    """Return the dead letter with this ID. Raise RelayError if there is none."""
    found = await connect.command(
        client, "XRANGE", keys.dead_letters, str(letter_id), str(letter_id)
    )
    if not found:
        raise RelayError(f"no dead letter {letter_id}; `relay dead-letters list` shows their IDs")
    return _letter(keys, *found[0])


async def requeue(
    clients: ShardClients,
    connection: PipelineConnection,
    keys: Keys,
    letter: DeadLetter,
    namespace: NamespaceSettings,
) -> EntryID:
    """Append the original fields to their stream and remove the dead letter.

    Return the ID of the new entry. May be repeated after an interruption: the entry is appended
    once.

    Raises:
        RelayError: The dead letter does not contain all fields of its entry.
    """
    if letter.channel is None:
        raise RelayError(
            f"dead letter {letter.id} is not an entry of a stream, so it cannot be requeued"
        )
    fields = await _original(clients, keys, letter)
    append = AppendCommands(keys, lambda _: namespace, uid_window_s=_MARK_S).build_once(
        letter.channel, fields, keys.requeued(letter.channel, letter.id)
    )
    done = await send_one(connection, append)
    await drop(clients.home, keys, [letter.id])
    return done.id


async def drop(client: RedisClient, keys: Keys, ids: Sequence[EntryID]) -> int:
    """Remove these dead letters. Return how many existed."""
    return int(await connect.command(client, "XDEL", keys.dead_letters, *map(str, ids)))


def fields_of(letter: DeadLetter) -> list[bytes]:
    """Return the kept flat fields of the entry. Raise RelayError if there are none."""
    try:
        pairs = orjson.loads(letter.values["fields"])
        if isinstance(pairs, list) and pairs:
            return [_bytes(part) for name, value in pairs for part in (name, value)]
    except (KeyError, ValueError, TypeError):
        pass
    raise RelayError(f"dead letter {letter.id} does not contain the fields of an entry")


async def _original(clients: ShardClients, keys: Keys, letter: DeadLetter) -> list[bytes]:
    if not letter.truncated:
        return fields_of(letter)
    if letter.channel is not None and letter.entry_id is not None:
        place = str(letter.entry_id)
        key = keys.stream(letter.channel)
        found = await connect.command(clients.for_key(key), "XRANGE", key, place, place)
        if found:
            return [part for pair in found[0][1].items() for part in pair]
    raise RelayError(
        f"dead letter {letter.id} contains only the beginning of its entry, and the entry no longer"
        " exists"
    )


def _letter(keys: Keys, raw_id: bytes, raw: Mapping[bytes, bytes]) -> DeadLetter:
    values = {
        name.decode(errors="replace"): value.decode(errors="replace") for name, value in raw.items()
    }
    try:
        entry_id = EntryID.parse(values.get("id", ""))
    except ValueError:
        entry_id = None
    return DeadLetter(
        id=EntryID.parse(raw_id),
        values=values,
        channel=keys.channel_of_stream(raw.get(b"stream", b"")),
        entry_id=entry_id,
    )


def _bytes(part: Any) -> bytes:
    return part.encode() if isinstance(part, str) else base64.b64decode(part["base64"])
