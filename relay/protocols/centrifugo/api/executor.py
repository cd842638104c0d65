"""Execution of API requests: signature, commands and replies.

Commands are executed in order. The entries of one request, and of concurrent requests, are sent to
Redis together. A publish is successful only when its entry has an ID.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import orjson

from relay.core import tracing
from relay.core.errors import DurabilityUnavailable, LimitExceeded, NotDurable, RelayError
from relay.core.json_array import divide
from relay.core.slices import in_slices, next_slice
from relay.protocols.centrifugo import commands
from relay.protocols.centrifugo.api.replies import Reply
from relay.protocols.centrifugo.codec import (
    FIX,
    INTERNAL_ERROR,
    INVALID_MESSAGE,
    LIMIT_EXCEEDED,
    RETRY,
)

if TYPE_CHECKING:
    from relay.core.durability import Durability
    from relay.protocols.centrifugo.api.server_commands import ServerCommands
    from relay.protocols.centrifugo.publisher import Appended
    from relay.protocols.centrifugo.server_state import ServerState

# A body up to this size is parsed in one step, a longer batch in parts of at least _PART_BYTES.
_SMALL_BYTES = 16384
_PART_BYTES = 8192
# Hashed in one step, in less than a millisecond.
_HASHED_BYTES = 262_144


class _PendingCommand(NamedTuple):
    """A command whose entries are being appended, and its error if one has already occurred."""

    method: str
    uid: str
    appends: list[Appended]
    error: str = ""
    advice: str = ""
    durability: Durability | None = None


async def is_signed(secret: bytes, body: bytes | bytearray, sign: str) -> bool:
    """Return True if `sign` is the lower-case hex HMAC-SHA256 of `body`.

    Return False for an empty secret. Computed in slices, because a stranger's body may be large.
    """
    digest = hmac.new(secret, digestmod="sha256")
    for start in range(0, len(body), _HASHED_BYTES):
        digest.update(memoryview(body)[start : start + _HASHED_BYTES])
        await next_slice()
    # compare_digest accepts only ASCII strings, and the client can send any string.
    wanted = digest.hexdigest().encode()
    return bool(secret) and hmac.compare_digest(wanted, sign.encode(errors="replace"))


class CommandExecutor:
    """Executes the commands of backends and administrators."""

    def __init__(self, server: ServerState, other_commands: ServerCommands) -> None:
        self._server = server
        self._other_commands = other_commands

    async def execute_request(self, body: bytes | bytearray, *, ids: bool = False) -> list[Reply]:
        """Execute the commands of a request body and return one reply for each.

        With `ids`, the reply to a publish contains the entry's ID. Raise InvalidCommand to reject
        the whole request. As in v1, the commands before the invalid one have been executed then.
        """
        return await self.execute(await _parse(body), ids=ids)

    def has(self, method: str) -> bool:
        """Return True if the command exists."""
        return method in ("publish", "broadcast") or self._other_commands.has(method)

    async def execute(
        self,
        parsed: Sequence[commands.PublishParams | commands.CentrifugoCommand],
        *,
        ids: bool = False,
    ) -> list[Reply]:
        """Execute parsed commands. See `execute_request`."""
        replies: list[Reply] = []
        started: list[_PendingCommand] = []
        broken: commands.InvalidCommand | None = None
        try:
            async for each in in_slices(parsed):
                if isinstance(each, commands.PublishParams):
                    started.append(self._append("publish", "", each, []))
                elif each.method == "publish":
                    started.append(self._publish(each))
                elif each.method == "broadcast":
                    started.append(await self._broadcast(each))
                else:
                    handle = self._other_commands.find(each.method)
                    # A query must see the events that the commands before it have published.
                    replies += [await _finish(one, ids=ids) for one in started]
                    started.clear()
                    replies.append(await handle(each))
        except commands.InvalidCommand as exc:
            broken = exc
        replies += [await _finish(one, ids=ids) for one in started]
        if broken is not None:
            raise broken
        return replies

    def _publish(self, command: commands.CentrifugoCommand) -> _PendingCommand:
        method, params, uid = command
        try:
            return self._append(method, uid, commands.publish(params), [])
        except commands.NamespaceNotFound as exc:
            return _PendingCommand(method, uid, [], str(exc), FIX)
        except commands.UndeliverableEvent:
            return _PendingCommand(method, uid, [], INVALID_MESSAGE, FIX)

    async def _broadcast(self, command: commands.CentrifugoCommand) -> _PendingCommand:
        method, params, uid = command
        try:
            broadcast = commands.broadcast(params)
        except commands.UndeliverableEvent:
            return _PendingCommand(method, uid, [], INVALID_MESSAGE, FIX)
        if not broadcast.channels or not broadcast.data:
            return _PendingCommand(method, uid, [], INVALID_MESSAGE, FIX)
        begun = _PendingCommand(method, uid, [])
        async for name in in_slices(broadcast.channels):
            try:
                publication = broadcast.publication(name)
            except commands.InvalidCommand as exc:
                # Only the channels before this one receive the event.
                error = str(exc) if isinstance(exc, commands.NamespaceNotFound) else INVALID_MESSAGE
                return begun._replace(error=error, advice=FIX)
            begun = self._append(method, uid, publication, begun.appends)
            if begun.error:
                break
        return begun

    def _append(
        self, method: str, uid: str, publication: commands.PublishParams, appends: list[Appended]
    ) -> _PendingCommand:
        """Append a publication. `appends` are those of the same command before it."""
        channel, data, client, event_uid, kind, to, durability, parent = publication
        if not self._server.may_publish_to(channel):
            return _PendingCommand(method, uid, appends, str(commands.NamespaceNotFound()), FIX)
        try:
            append = self._server.publisher.publish(
                channel,
                data,
                client=client,
                uid=event_uid,
                type=kind,
                to=to,
                durability=durability,
                extra=tracing.field_of(parent),
            )
        except LimitExceeded:
            return _PendingCommand(method, uid, appends, LIMIT_EXCEEDED, FIX)
        except ValueError:
            return _PendingCommand(method, uid, appends, INVALID_MESSAGE, FIX)
        except RelayError:
            return _PendingCommand(method, uid, appends, INTERNAL_ERROR, RETRY)
        appends.append(append)
        return _PendingCommand(method, uid, appends, durability=durability)


async def _parse(
    body: bytes | bytearray,
) -> list[commands.PublishParams | commands.CentrifugoCommand]:
    if body[:1] not in (b"[", b"{"):
        # v1 checks the first byte only, so leading white space is an error.
        raise commands.InvalidCommand("neither an object nor an array")
    if body[:1] == b"{" or len(body) <= _SMALL_BYTES:
        return commands.read(bytes(body))
    try:
        array = await divide(body, 1, _PART_BYTES)
    except ValueError as exc:
        raise commands.InvalidCommand(str(exc)) from None
    if body[array.end + 1 :].strip(b" \t\r\n"):
        raise commands.InvalidCommand("not JSON")
    found: list[commands.PublishParams | commands.CentrifugoCommand] = []
    async for begin, end in in_slices(array.parts):
        found += commands.read(b"[%b]" % bytes(body[begin:end]))
    return found


async def _finish(started: _PendingCommand, *, ids: bool) -> Reply:
    error, advice, body = started.error, started.advice, b"null"
    answer: dict[str, str] = {}
    for append in started.appends:
        try:
            entry_id = await append
        except LimitExceeded:
            error, advice = LIMIT_EXCEEDED, FIX
        except NotDurable as exc:
            # The ID shows that the event was appended.
            error, advice = f"{INTERNAL_ERROR}: {exc}", RETRY
            answer["id"] = str(exc.entry_id)
        except DurabilityUnavailable as exc:
            error, advice = f"{INTERNAL_ERROR}: {exc}", FIX
        except RelayError:
            error, advice = INTERNAL_ERROR, RETRY
        except ValueError:
            error, advice = INVALID_MESSAGE, FIX
        else:
            if ids and entry_id is not None:
                answer["id"] = str(entry_id)
    if started.method != "publish":
        answer = {}
    if started.durability is not None and not error and started.appends:
        answer["durability"] = str(started.durability)
    if answer:
        body = orjson.dumps(answer)
    return Reply(started.method, started.uid, error, advice, body)
