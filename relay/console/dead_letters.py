"""Dead letters: list, show, requeue, drop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from relay.console.services import JsonBody, entry_id_of
from relay.core.errors import BadRequest, NotDurable, RedisUnavailable, RelayError
from relay.core.model import ZERO_ID
from relay.stream.connection.connect import CommandRefused
from relay.stream.shards.clients import Connections
from relay.stream.upkeep import dead_letter_list, reports

if TYPE_CHECKING:
    from relay.console.services import ApiRequest

_PAGE, _MOST = 50, 100


class LettersBody(JsonBody):
    """Body of `requeue` and `drop`."""

    ids: list[str] = Field(min_length=1, max_length=_MOST)


async def dead_letters(request: ApiRequest) -> object:
    """Return a page of dead letters, oldest first, and their total number."""
    services = request.services
    count = request.count("count", _PAGE, _MOST)
    after = request.entry_id("after") or ZERO_ID
    found = await dead_letter_list.page(services.client, services.keys, after, count)
    return {
        "total": await dead_letter_list.count(services.client, services.keys),
        "letters": [reports.dead_letter(each) for each in found],
        "more": len(found) == count,
    }


async def dead_letter(request: ApiRequest) -> object:
    """Return all that is stored about a dead letter."""
    services, letter_id = request.services, request.entry_id("id")
    if letter_id is None:
        raise BadRequest("id is missing")
    try:
        letter = await dead_letter_list.find(services.client, services.keys, letter_id)
    except (RedisUnavailable, CommandRefused):
        raise
    except RelayError as exc:
        raise BadRequest(str(exc)) from None
    values: dict[str, object] = {**reports.dead_letter(letter), **letter.values}
    try:
        fields = dead_letter_list.fields_of(letter)
    except RelayError:
        return {**values, "id": str(letter.id)}
    texts = [each.decode(errors="backslashreplace") for each in fields]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    return {**values, "id": str(letter.id), "entry": letter.values.get("id"), "fields": pairs}


async def requeue(request: ApiRequest) -> object:
    """Append the entries of dead letters again. Report those that cannot be requeued."""
    services, body = request.services, request.body(LettersBody)
    ids = [entry_id_of(text, "ids") for text in body.ids]
    done: list[dict[str, object]] = []
    failed: list[dict[str, object]] = []
    async with Connections(services.clients) as connections:
        for letter_id in ids:
            try:
                letter = await dead_letter_list.find(services.client, services.keys, letter_id)
                if letter.channel is None:
                    failed.append({"letter": str(letter_id), "error": "not an entry of a stream"})
                    continue
                entry_id = await dead_letter_list.requeue(
                    services.clients,
                    await connections.to(services.keys.stream(letter.channel)),
                    services.keys,
                    letter,
                    services.config().namespace(letter.channel),
                )
            except (RedisUnavailable, NotDurable, CommandRefused):
                raise
            except RelayError as exc:
                failed.append({"letter": str(letter_id), "error": str(exc)})
                continue
            done.append({"letter": str(letter_id), "channel": letter.channel, "id": str(entry_id)})
    return {"requeued": done, "failed": failed}


async def drop(request: ApiRequest) -> object:
    """Remove dead letters."""
    services, body = request.services, request.body(LettersBody)
    ids = [entry_id_of(text, "ids") for text in body.ids]
    return {"dropped": await dead_letter_list.drop(services.client, services.keys, ids)}
