"""`relay events` and `relay explain`: what happened to clients, from journals and workers."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from relay.cli.operator_context import OperatorContext, channel_of, user_of
from relay.cli.output import emit, safe, say
from relay.core.errors import RedisUnavailable
from relay.inspect.explain import Explainer
from relay.inspect.journal import describe
from relay.inspect.journal_reader import EventFilter, JournalReader
from relay.inspect.questions import asking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.inspect.journal import Event

_AGAIN_S = 0.3


async def events(site: OperatorContext, options: argparse.Namespace) -> int:
    """Print the newest events, and follow them with --follow until SIGINT."""
    wanted = EventFilter(
        user=options.user,
        connection=options.connection or "",
        channel=options.channel or "",
        protocol=options.protocol or "",
        event=options.event or "",
    )
    reader = JournalReader(site.client, site.keys)
    try:
        _show(await reader.newest(wanted, options.limit), as_json=options.json)
        while options.follow:
            await asyncio.sleep(_AGAIN_S)
            try:
                found = await reader.read(wanted)
            except RedisUnavailable as exc:
                say(f"{exc}; trying again")
                continue
            _show(found, as_json=options.json)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def explain(site: OperatorContext, options: argparse.Namespace) -> int:
    """Print whether and when the user's clients received an event, or why not."""
    channel, user = channel_of(options.channel), user_of(options.user)
    async with asking(site.config.redis, site.clients, site.keys) as questions:
        explainer = Explainer(
            clients=site.clients,
            keys=site.keys,
            questions=questions,
            max_entry_bytes=site.config.stream.max_entry_bytes,
        )
        found = await explainer.explain(user, channel, options.id)
    if options.json:
        emit(found.values())
        return 0
    print(safe(found.sentence))
    for client in found.clients:
        print(f"  {safe(client.sentence)}")
    if found.others:
        counts = (f"{count} {name.replace('_', ' ')}" for name, count in found.others.items())
        print(f"  Other clients: {', '.join(counts)}.")
    for line in found.unknown:
        print(f"  Not known: {safe(line)}")
    return 0


def _show(found: Sequence[Event], *, as_json: bool) -> None:
    for event in found:
        if as_json:
            emit(event)
        else:
            when = datetime.fromtimestamp(event["ms"] / 1000, UTC).isoformat(
                sep=" ", timespec="milliseconds"
            )
            print(f"{when.removesuffix('+00:00')}  {safe(describe(event))}")
    sys.stdout.flush()
