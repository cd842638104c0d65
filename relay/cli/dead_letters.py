"""`relay dead-letters`: list, show, requeue, drop."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from relay.cli.operator_context import OperatorContext
from relay.cli.output import Progress, duration, emit, safe, say, table
from relay.core.errors import NotDurable, RedisUnavailable, RelayError
from relay.core.model import Broken
from relay.stream.connection import connect
from relay.stream.format import entry
from relay.stream.shards.clients import Connections
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import dead_letter_list, reports
from relay.stream.upkeep.dead_letter_list import DeadLetter

_HEAD = ("ID", "FROM", "ENTRY", "AGE", "REASON")


async def dead_letters(site: OperatorContext, options: argparse.Namespace) -> int:
    """Run the action: list, show, requeue or drop."""
    match options.action:
        case "list":
            return await _list(site, options)
        case "show":
            return await _show(site, options)
        case "requeue":
            return await _requeue(site, options)
        case _:
            return await _drop(site, options)


async def _list(site: OperatorContext, options: argparse.Namespace) -> int:
    now_ms = await connect.time_ms(site.client)
    progress = Progress("dead letters")
    rows: list[list[str]] = []
    try:
        async for page in dead_letter_list.pages(site.client, site.keys):
            if options.json:
                for letter in page:
                    emit(reports.dead_letter(letter))
                continue
            # Keep only the columns: there may be thousands of dead letters of 64 KiB.
            rows += [
                [
                    str(letter.id),
                    _from(letter),
                    str(letter.entry_id or "-"),
                    duration(max(0, now_ms - letter.id.ms)),
                    letter.reason,
                ]
                for letter in page
            ]
            progress(len(rows))
    finally:
        progress.end()
    if rows:
        table(_HEAD, rows, right=(3,))
    elif not options.json:
        say("no dead letters")
    return 0


def _from(letter: DeadLetter) -> str:
    values = letter.values
    return letter.channel or values.get("stream") or values.get("queue") or "-"


async def _show(site: OperatorContext, options: argparse.Namespace) -> int:
    letter = await dead_letter_list.find(site.client, site.keys, options.id)
    if options.json:
        emit({"id": str(letter.id), **letter.values})
        return 0
    print(f"{'letter':<12}{letter.id}")
    for name, value in letter.values.items():
        if name != "fields":
            print(f"{safe(name):<12}{safe(value)}")
    try:
        fields = dead_letter_list.fields_of(letter)
    except RelayError:
        # Written by another version: print it unparsed.
        if "fields" in letter.values:
            print(f"{'fields':<12}{safe(letter.values['fields'])}")
        return 0
    texts = [safe(field.decode(errors="backslashreplace")) for field in fields]
    for pair in zip(texts[::2], texts[1::2], strict=True):
        print(f"{'field':<12}{' = '.join(pair)}")
    return 0


async def _chosen(site: OperatorContext, options: argparse.Namespace) -> AsyncIterator[DeadLetter]:
    if options.all:
        async for page in dead_letter_list.pages(site.client, site.keys):
            for letter in page:
                yield letter
        return
    for letter_id in options.ids:
        yield await dead_letter_list.find(site.client, site.keys, letter_id)


async def _requeue(site: OperatorContext, options: argparse.Namespace) -> int:
    """Requeue each dead letter separately. Those that cannot be requeued are kept and reported."""
    progress = Progress("requeued")
    done = failed = undeliverable = 0
    errors = ServerErrors()
    # The slots of a Cluster are not known before.
    await site.clients.shards.refresh()
    try:
        async with Connections(site.clients) as connections:
            async for letter in _chosen(site, options):
                if letter.channel is None:
                    say(f"dead letter {letter.id} is not an entry of a stream; skipped")
                    failed += 1
                    continue
                namespace = site.config.namespace(letter.channel)
                stream = site.keys.stream(letter.channel)
                shard = site.clients.shards.shard_of(stream)
                if shard in errors:
                    failed += 1
                    continue
                with errors.collect(shard):
                    connection = await connections.to(stream)
                if shard in errors:
                    progress.end()
                    say(f"{errors.lines()[-1]}; its dead letters are kept")
                    failed += 1
                    continue
                try:
                    entry_id = await dead_letter_list.requeue(
                        site.clients, connection, site.keys, letter, namespace
                    )
                except (RedisUnavailable, NotDurable, connect.CommandRefused):
                    raise
                except RelayError as exc:
                    progress.end()
                    say(f"{exc}; skipped")
                    failed += 1
                    continue
                done += 1
                undeliverable += _is_undeliverable(site, letter)
                if options.json:
                    emit({"letter": str(letter.id), "channel": letter.channel, "id": str(entry_id)})
                elif not options.all:
                    print(f"{letter.id} is {letter.channel} {entry_id}")
                progress(done)
    finally:
        progress.end()
    if options.all and not options.json:
        print(f"{done} requeued")
    if undeliverable:
        say(
            f"{undeliverable} of them cannot be delivered by this version and will be dead letters"
            " again"
        )
    return 1 if failed else 0


def _is_undeliverable(site: OperatorContext, letter: DeadLetter) -> bool:
    if letter.truncated or letter.channel is None:
        return False
    fields, limit = dead_letter_list.fields_of(letter), site.config.stream.max_entry_bytes
    record = entry.decode(letter.channel, letter.id, fields, limit)
    return isinstance(record.body, Broken)


async def _drop(site: OperatorContext, options: argparse.Namespace) -> int:
    removed = 0
    if options.all:
        progress = Progress("dropped")
        try:
            async for page in dead_letter_list.pages(site.client, site.keys):
                ids = [letter.id for letter in page]
                removed += await dead_letter_list.drop(site.client, site.keys, ids)
                progress(removed)
        finally:
            progress.end()
    else:
        # Look up all of them first, so that a mistyped ID changes nothing.
        chosen = [letter.id async for letter in _chosen(site, options)]
        removed = await dead_letter_list.drop(site.client, site.keys, chosen)
    if options.json:
        emit({"dropped": removed})
    else:
        print(f"{removed} dropped")
    return 0
