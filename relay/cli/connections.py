"""`relay connections`, `relay connection` and `relay disconnect`: the clients of all workers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from relay.cli.operator_context import OperatorContext, user_of
from relay.cli.output import duration, emit, safe, say, table
from relay.cli.workers import plural
from relay.core.errors import RelayError
from relay.inspect.connections import MOST, ConnectionFilter, find_connections
from relay.inspect.disconnects import closed_by
from relay.inspect.questions import asking
from relay.stream.cluster.workers import live_workers
from relay.stream.write import control

_HEAD = ("ID", "USER", "PROTOCOL", "TRANSPORT", "SOFTWARE", "ADDRESS", "UP", "CHANNELS", "WAITING")
_RIGHT = (6, 7, 8)


async def connections(site: OperatorContext, options: argparse.Namespace) -> int:
    """List connections of all workers, in pages."""
    after, left = options.after, options.limit
    rows: list[dict[str, Any]] = []
    silent: set[str] = set()
    failed: dict[str, str] = {}
    async with asking(site.config.redis, site.clients, site.keys) as questions:
        while True:
            wanted = ConnectionFilter(
                user=options.user,
                channel=options.channel or "",
                protocol=options.protocol or "",
                address=options.address or "",
                after=after,
                limit=max(1, min(left, MOST)),
            )
            page = await find_connections(questions, wanted)
            rows += page.connections[:left]
            silent.update(page.silent)
            failed |= page.failed
            left -= len(page.connections)
            after = page.after
            if not after or left <= 0:
                break
    if options.json:
        for row in rows:
            emit(row)
    else:
        table(_HEAD, [_row(each) for each in rows], right=_RIGHT)
        shown = f", {len(rows)} listed; continue with --after {after}" if after else ""
        print(f"{plural(page.total, 'connection')}{shown}")
    return _complete(silent, failed)


def _row(row: dict[str, Any]) -> list[str]:
    address = row["forwarded_for"] or row["address"]
    behind = f"{row['subscription_count']}"
    if row["behind"]:
        behind += f" ({row['behind']} behind)"
    return [
        row["id"],
        row["user"] or "-",
        row["protocol"],
        row["transport"],
        row["software"] or "-",
        address or "-",
        duration(row["connected_s"] * 1000),
        behind,
        f"{row['waiting_bytes']:,} B",
    ]


async def connection(site: OperatorContext, options: argparse.Namespace) -> int:
    """Show one connection."""
    async with asking(site.config.redis, site.clients, site.keys) as questions:
        page = await find_connections(questions, ConnectionFilter(id=options.id))
    if not page.connections:
        _complete(page.silent, page.failed)
        raise RelayError(f"no connection {safe(options.id)} is open")
    (found,) = page.connections
    if options.json:
        emit(found)
        return 0
    for name, text in _facts(found):
        print(f"{name:<15}{safe(text)}")
    print()
    table(
        ("CHANNEL", "MODE", "POSITION", "BEHIND"),
        [
            [each["channel"], each["mode"], each["position"], _behind(each)]
            for each in found["subscriptions"]
        ],
        right=(3,),
    )
    more = found["subscription_count"] - len(found["subscriptions"])
    if more > 0:
        print(f"and {plural(more, 'more subscription')}")
    return 0


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    forwarded = found["forwarded_for"]
    facts = [
        ("connection", found["id"]),
        ("user", found["user"] or "-"),
        ("groups", ", ".join(found["groups"]) or "-"),
        ("protocol", f"{found['protocol']}, {found['transport']}"),
        ("software", f"{found['software'] or '-'} ({found['agent'] or 'no User-Agent'})"),
        ("address", found["address"] + (f", forwarded for {forwarded}" if forwarded else "")),
        ("connected", f"for {duration(found['connected_s'] * 1000)}"),
        ("worker", f"{found['worker']} on {found['host']}"),
        ("waiting", f"{found['waiting_bytes']:,} bytes" + (", paused" if found["paused"] else "")),
    ]
    facts += [
        ("rejected", f"{each.get('channel') or '-'}: {each.get('reason')}")
        for each in found["rejections"]
    ]
    return facts


def _behind(subscription: dict[str, Any]) -> str:
    behind = subscription["behind"]
    return "unknown" if behind is None else str(behind)


def _complete(silent: Iterable[str], failed: Mapping[str, str]) -> int:
    """Name the workers whose connections are missing. Return the exit code."""
    lines = [f"{each} did not answer: its connections are missing" for each in sorted(silent)]
    lines += [f"{each} could not answer: {reason}" for each, reason in failed.items()]
    for line in lines:
        say(line)
    return 1 if lines else 0


async def disconnect(site: OperatorContext, options: argparse.Namespace) -> int:
    """Close the user's connections through the control stream, and report how many there were."""
    user = user_of(options.user)
    entry_id = await control.publish(site.clients, site.keys, control.DisconnectUser(user=user))
    workers = len(await live_workers(site.client, site.keys))
    closed = 0
    problems: list[str] = []
    if workers:
        closed, problems = await _closed_by(site, str(entry_id))
    if options.json:
        values = {"id": str(entry_id), "workers": workers, "user": user, "closed": closed}
        emit(values if not problems else {**values, "unknown": problems})
    elif not workers:
        print(f"No worker is running: nothing to do (control entry {entry_id})")
    else:
        print(
            f"Closed {plural(closed, 'connection')} of {safe(user)} on"
            f" {plural(workers, 'worker')} (control entry {entry_id})"
        )
    for line in problems:
        say(line)
    return 0


async def _closed_by(site: OperatorContext, entry_id: str) -> tuple[int, list[str]]:
    """Return the number of closed connections, and why it may be too small."""
    try:
        async with asking(site.config.redis, site.clients, site.keys) as questions:
            return await closed_by(questions, entry_id)
    except RelayError as exc:
        return 0, [f"the command was sent, but the number of connections is unknown: {exc}"]
