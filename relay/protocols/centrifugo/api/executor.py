"""What a request to the HTTP API means: its signature, its commands, their replies.

Commands are carried out in order; what those of one request publish, and of requests that come at
the same time, travels to Redis together. A reply says success only when the entry has its ID.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from relay.core.errors import LimitExceeded, RelayError
from relay.core.json_array import divide
from relay.core.slices import in_slices
from relay.protocols.centrifugo import commands
from relay.protocols.centrifugo.api.replies import FIX, RETRY, Reply

if TYPE_CHECKING:
    from relay.protocols.centrifugo.api.server_commands import ServerCommands
    from relay.protocols.centrifugo.publisher import Appended
    from relay.protocols.centrifugo.server_state import ServerState

# v1's texts, which clients compare.
INVALID_MESSAGE = "invalid message"
LIMIT_EXCEEDED = "limit exceeded"
INTERNAL_ERROR = "internal server error"
# A body up to this size is parsed in one step, a longer batch in parts of at least the other.
_SMALL_BYTES = 16384
_PART_BYTES = 8192


class _PendingCommand(NamedTuple):
    """A command under way: what is appended, and what is already known to be wrong."""

    method: str
    uid: str
    appends: list[Appended]
    error: str = ""
    advice: str = ""


def signed(secret: bytes, body: bytes, sign: str) -> bool:
    """Whether `sign` is the lower-case hex HMAC-SHA256 of `body`; never true without a secret."""
    # Bytes: compare_digest takes text in ASCII only, and this text is the peer's.
    wanted = hmac.digest(secret, body, "sha256").hex().encode()
    return bool(secret) and hmac.compare_digest(wanted, sign.encode(errors="replace"))


class CommandExecutor:
    """The commands of backends and administrators."""

    def __init__(self, door: ServerState, server: ServerCommands) -> None:
        self._door = door
        self._server = server

    async def answer(self, body: bytes, *, ids: bool = False) -> list[Reply]:
        """Carry the commands out; one reply each, with `ids` that of a publish tells its entry's
        ID.

        Invalid where the request as a whole is refused: commands before the broken one have been
        carried out by then, as in v1.
        """
        return await self.run(await _read(body), ids=ids)

    def knows(self, method: str) -> bool:
        """Whether there is such a command."""
        return method in ("publish", "broadcast") or self._server.knows(method)

    async def run(
        self,
        asked: Sequence[commands.PublishParams | commands.CentrifugoCommand],
        *,
        ids: bool = False,
    ) -> list[Reply]:
        """As `answer`, for commands that have been read."""
        replies: list[Reply] = []
        started: list[_PendingCommand] = []
        broken: commands.InvalidCommand | None = None
        try:
            async for each in in_slices(asked):
                if isinstance(each, commands.PublishParams):
                    started.append(await self._append("publish", "", [each]))
                elif each.method == "publish":
                    started.append(await self._publish(each))
                elif each.method == "broadcast":
                    started.append(await self._broadcast(each))
                else:
                    handle = self._server.find(each.method)
                    # What was published before is there for what is asked after.
                    replies += [await _finish(one, ids=ids) for one in started]
                    started.clear()
                    replies.append(await handle(each))
        except commands.InvalidCommand as exc:
            broken = exc
        replies += [await _finish(one, ids=ids) for one in started]
        if broken is not None:
            raise broken
        return replies

    async def _publish(self, command: commands.CentrifugoCommand) -> _PendingCommand:
        method, params, uid = command
        try:
            return await self._append(method, uid, [commands.publish(params)])
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
        wanted: list[commands.PublishParams] = []
        error = ""
        async for name in in_slices(broadcast.channels):
            try:
                wanted.append(broadcast.publication(name))
            except commands.InvalidCommand as exc:
                # Those before it are published, those after it are not.
                error = str(exc) if isinstance(exc, commands.NamespaceNotFound) else INVALID_MESSAGE
                break
        begun = await self._append(method, uid, wanted)
        return begun if begun.error or not error else begun._replace(error=error, advice=FIX)

    async def _append(
        self, method: str, uid: str, publications: list[commands.PublishParams]
    ) -> _PendingCommand:
        appends: list[Appended] = []
        try:
            async for publication in in_slices(publications):
                channel, data, client, event_uid, kind, to = publication
                if not self._door.may_be_published_to(channel):
                    error = str(commands.NamespaceNotFound())
                    return _PendingCommand(method, uid, appends, error, FIX)
                append = self._door.publisher.publish(
                    channel, data, client=client, uid=event_uid, type=kind, to=to
                )
                appends.append(append)
        except LimitExceeded:
            return _PendingCommand(method, uid, appends, LIMIT_EXCEEDED, FIX)
        except ValueError:
            return _PendingCommand(method, uid, appends, INVALID_MESSAGE, FIX)
        except RelayError:
            return _PendingCommand(method, uid, appends, INTERNAL_ERROR, RETRY)
        return _PendingCommand(method, uid, appends)


async def _read(body: bytes) -> list[commands.PublishParams | commands.CentrifugoCommand]:
    if body[:1] not in (b"[", b"{"):
        # v1 looks at the first byte only: white space before it is an error.
        raise commands.InvalidCommand("neither an object nor an array")
    if body[:1] == b"{" or len(body) <= _SMALL_BYTES:
        return commands.read(body)
    try:
        array = await divide(body, 1, _PART_BYTES)
    except ValueError as exc:
        raise commands.InvalidCommand(str(exc)) from None
    if body[array.end + 1 :].strip(b" \t\r\n"):
        raise commands.InvalidCommand("not JSON")
    found: list[commands.PublishParams | commands.CentrifugoCommand] = []
    async for begin, end in in_slices(array.parts):
        found += commands.read(b"[%b]" % body[begin:end])
    return found


async def _finish(started: _PendingCommand, *, ids: bool) -> Reply:
    error, advice, body = started.error, started.advice, b"null"
    for append in started.appends:
        try:
            entry_id = await append
        except LimitExceeded:
            error, advice = LIMIT_EXCEEDED, FIX
        except RelayError:
            error, advice = INTERNAL_ERROR, RETRY
        except ValueError:
            error, advice = INVALID_MESSAGE, FIX
        else:
            if ids and started.method == "publish" and entry_id is not None:
                body = b'{"id":"%s"}' % str(entry_id).encode()
    return Reply(started.method, started.uid, error, advice, body)
