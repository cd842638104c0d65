"""Channels: search, entries, presence, rights, publish, trim, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.console.services import JsonBody, channel_of
from relay.core.errors import BadRequest
from relay.core.model import Event
from relay.core.slices import in_slices
from relay.inspect.followers import count_followers
from relay.stream.cluster.workers import live_workers
from relay.stream.connection import connect
from relay.stream.format import entry
from relay.stream.read.view import read_newest, read_view
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import overview, reports, retention
from relay.stream.write import revoke as revocations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.console.services import ApiRequest, ConsoleServices
    from relay.core.model import Channel, Record
    from relay.stream.upkeep.overview import StreamOverview

_PAGE, _MOST = 50, 200
_ENTRIES, _MOST_ENTRIES = 20, 100
# Of the data of one entry in a list.
_SHOWN_BYTES = 8192
_MEMBERS = 500


async def channels(request: ApiRequest) -> object:
    """Return a page of the channels that match a pattern, or the named channels."""
    services = request.services
    names = request.http.query.getall("channel", [])
    if len(names) > _MOST:
        raise BadRequest(f"at most {_MOST} channels in one request")
    if names:
        wanted = [channel_of(name) for name in names]
        errors = ServerErrors()
        found = await overview.of_channels(services.clients, services.keys, wanted, errors)
        streams = await _streams(services, found, errors)
        return {"channels": streams, "cursor": "", "missing": _missing(services, errors)}
    pattern, cursor = request.text("pattern", "*") or "*", request.text("cursor", "")
    if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 24):
        raise BadRequest("cursor must be the one of the previous page")
    count = request.count("count", _PAGE, _MOST)
    errors = ServerErrors()
    found, following = await overview.page(
        services.clients, services.keys, pattern, cursor, count, errors
    )
    streams = await _streams(services, found, errors)
    return {"channels": streams, "cursor": following, "missing": _missing(services, errors)}


def _missing(services: ConsoleServices, errors: ServerErrors) -> list[str]:
    """Return the problems of servers whose channels are missing.

    Raises:
        RelayError: There is only one server.
    """
    errors.raise_of_single(services.clients.shards)
    return errors.lines()


async def _streams(
    services: ConsoleServices, found: Sequence[StreamOverview], errors: ServerErrors
) -> list[dict[str, object]]:
    """Return the rows. Workers and followers are None if the home server fails, see `errors`."""
    config, home = services.config(), services.clients.shards.home
    alive: set[str] | None = None
    followers: dict[Channel, dict[str, int]] = {}
    if home not in errors:
        with errors.collect(home):
            alive = {each.instance for each in await live_workers(services.client, services.keys)}
            followers = await count_followers(services.questions, [each.channel for each in found])
    rows = []
    async for each in in_slices(found):
        row = reports.stream(services.keys, config.namespace(each.channel), each, alive)
        rows.append(row | {"followers": followers.get(each.channel)})
    return rows


async def entries(request: ApiRequest) -> object:
    """Return the newest entries, those before one, or those after one."""
    services, channel = request.services, request.channel()
    count = request.count("count", _ENTRIES, _MOST_ENTRIES)
    before, after = request.entry_id("before"), request.entry_id("after")
    limit = services.config().stream.max_entry_bytes
    if after is not None:
        view = await read_view(services.clients, services.keys, channel, after, limit, count)
        return {"entries": [_shown(each) for each in view.records], "more": view.more}
    client = services.client_of(channel)
    found = await read_newest(client, services.keys, channel, before, limit, count)
    return {"entries": [_shown(each) for each in found], "more": bool(found)}


def _shown(record: Record) -> dict[str, object]:
    """Return the entry. If its data is large, only the beginning is included, as text."""
    body = record.body
    values = reports.record(record)
    if isinstance(body, Event) and len(body.data) > _SHOWN_BYTES:
        values["data"] = body.data[:_SHOWN_BYTES].decode(errors="ignore")
        values["data_bytes"] = len(body.data)
    return values


async def presence(request: ApiRequest) -> object:
    """Return the clients that are present in the channel, as their protocol describes them."""
    present = await request.services.presence.read(request.channel())
    shown = sorted(present.items())[:_MEMBERS]
    return {
        "count": len(present),
        "clients": [
            {"client": client, "info": info.decode(errors="replace")} for client, info in shown
        ],
    }


async def rights(request: ApiRequest) -> object:
    """Return what relay and Redis know about a user's right to read the channel."""
    services, channel, user = request.services, request.channel(), request.text("user")
    keys, client = services.keys, services.client_of(channel)
    field = user.encode(errors="replace")
    value, before = [
        await connect.command(client, "HGET", key, field)
        for key in (keys.rights(channel), keys.revoked(channel))
    ]
    sources = sorted(services.config().namespace(channel).sources())
    return {
        "channel": channel,
        "user": user,
        "sources": sources,
        "hash": _text(value),
        "before_revocation": _text(before),
        "answer": _answer(value, sources),
    }


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _answer(value: bytes | None, sources: Sequence[str]) -> str:
    if value == revocations.REVOKED:
        return "The right is revoked. No other source can grant it until the revocation ends."
    if value is not None and value not in (b"r", b"rw"):
        return "The rights hash has an unknown value, which denies access."
    if "anonymous" in sources:
        return "Everybody may read this channel."
    if value is not None and "hash" in sources:
        return "The rights hash grants access."
    others = [_SOURCES[each] for each in sources if each in _SOURCES]
    if not others:
        return "No source grants access."
    return f"The rights hash does not decide. Access depends on {' or '.join(others)}."


_SOURCES = {
    "claims": "the client's token",
    "door": "the rules of the client's protocol",
    "http": "the application at [rights] http_url",
}


class PublishBody(JsonBody):
    """Body of `publish`. `data` is sent as it is, and is JSON or text."""

    channel: str
    data: str
    type: str | None = None
    client: str | None = None
    uid: str | None = None
    to: list[str] | None = None


async def publish(request: ApiRequest) -> object:
    """Append an event."""
    body = request.body(PublishBody)
    channel = channel_of(body.channel)
    try:
        to = body.to and set().union(*(entry.recipients(names) for names in body.to))
        done = request.services.publish(
            channel,
            body.data.encode(),
            type=body.type or None,
            client=body.client or None,
            uid=body.uid or None,
            to=to or None,
        )
    except ValueError as exc:
        raise BadRequest(f"not published: {exc}") from None
    return {"channel": channel, "id": str(await done)}


class TrimBody(JsonBody):
    """Body of `trim`: at least one of the limits."""

    channel: str
    max_entries: int | None = None
    max_age_s: float | None = None


async def trim(request: ApiRequest) -> object:
    """Remove old entries."""
    body, services = request.body(TrimBody), request.services
    channel = channel_of(body.channel)
    limits = [each for each in (body.max_entries, body.max_age_s) if each is not None]
    if not limits or not all(0 <= each < 1e15 for each in limits):
        raise BadRequest("max_entries or max_age_s must be set, and not negative")
    removed = await retention.trim_one(
        services.clients,
        services.keys,
        channel,
        max_entries=body.max_entries,
        max_age_s=body.max_age_s,
    )
    if removed is None:
        raise BadRequest(f"{channel} has no stream")
    return {"channel": channel, "removed": removed}


class DeleteBody(JsonBody):
    """Body of `delete`. `confirm` repeats the channel."""

    channel: str
    confirm: str


async def delete(request: ApiRequest) -> object:
    """Delete the stream of a channel."""
    body, services = request.body(DeleteBody), request.services
    channel: Channel = channel_of(body.channel)
    if body.confirm != body.channel:
        raise BadRequest("confirm must repeat the name of the channel")
    if not await retention.delete(services.clients, services.keys, channel):
        raise BadRequest(f"{channel} has no stream")
    return {"channel": channel, "deleted": True}


class UserBody(JsonBody):
    """Body of commands that concern a user, and perhaps a channel."""

    user: str
    channel: str | None = None


async def revoke(request: ApiRequest) -> object:
    """Revoke the right to read a channel."""
    channel, user = _channel_and_user(request)
    services = request.services
    entry_id = await revocations.revoke(services.clients, services.keys, channel, user)
    return {"channel": channel, "user": user, "id": str(entry_id)}


async def grant(request: ApiRequest) -> object:
    """End a revocation."""
    channel, user = _channel_and_user(request)
    services = request.services
    entry_id = await revocations.grant(services.clients, services.keys, channel, user)
    if entry_id is None:
        raise BadRequest(f"{user} is not revoked on {channel}")
    return {"channel": channel, "user": user, "id": str(entry_id)}


def _channel_and_user(request: ApiRequest) -> tuple[Channel, str]:
    body = request.body(UserBody)
    return channel_of(body.channel or ""), user_of(body.user)


def user_of(text: str) -> str:
    """Return a user's name. Raise BadRequest if it is empty."""
    if not text:
        raise BadRequest("user is empty")
    return text
