"""Check the data in Redis: versions of workers, misnamed keys, retention, orphaned groups, queues.

Keys are scanned in batches, as `relay streams` does, so that Redis can serve others meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from producers.settings import QueueSettings
from relay.core.errors import RelayError
from relay.process.doctor.finding import Finding, error, note, quoted, warning
from relay.stream.cluster.workers import find_conflict, live_workers
from relay.stream.connection import connect
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import dead_letter_list, overview, retention

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

# Keys of one pipeline. redis-py needs 20 us per command.
_SCAN = 200
_EXAMPLES = 3
# A consumer takes less than a second for so many.
_LONG_QUEUE = 10_000


@dataclass(slots=True)
class _Found:
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        return ", ".join(self.examples) + (f" and {more} more" if more else "")


async def check(
    config: Config, clients: ShardClients, keys: Keys, errors: ServerErrors
) -> list[Finding]:
    """Return what is wrong with the data of all servers except those in `errors`."""
    found: list[Finding] = []
    problems = errors.lines()
    for look in (_workers, _keys, _streams, _queues):
        # A server that lacks a right for one check is still used for the next one.
        own = errors.copy()
        try:
            found += await look(config, clients, keys, own)
            problems += own.lines()
        except RelayError as exc:
            problems.append(str(exc))
    if problems:
        found.append(
            note(
                "data.unreadable",
                f"Not all data could be checked: {'; '.join(dict.fromkeys(problems))}",
                "Faults in it are not shown here.",
                "Start these servers, or run relay doctor with the user relay of docs/redis.md",
            )
        )
    return found


async def _workers(
    _config: Config, clients: ShardClients, keys: Keys, errors: ServerErrors
) -> list[Finding]:
    """Find a worker beside which this version must not run."""
    home, problem = clients.shards.home, ""
    if home not in errors:
        with errors.collect(home):
            problem = await find_conflict(clients.home, keys)
    if not problem:
        return []
    return [
        error(
            "data.incompatible_worker",
            f"Incompatible versions: {problem}",
            "One of the versions cannot read what the other one writes to Redis, so events may be"
            " lost. relay does not start beside such a worker.",
            "List the versions: relay workers --json; see 'Two versions on one Redis' in"
            " docs/workers.md",
        )
    ]


async def _keys(
    _config: Config, clients: ShardClients, keys: Keys, errors: ServerErrors
) -> list[Finding]:
    """Find keys below `<prefix>stream:` that are not a stream of a channel."""
    misnamed, foreign, renames = _Found(), _Found(), _Found()
    for shard, client in await clients.each():
        if shard in errors:
            continue
        with errors.collect(shard):
            async for batch in connect.scan(client, keys.any_stream_pattern, _SCAN):
                streams = set(await retention.streams_among(client, batch))
                for key in batch:
                    name = key.decode(errors="backslashreplace")
                    if key not in streams:
                        if keys.channel_of_stream(key) is not None:
                            foreign.add(name)
                    elif keys.channel_of_stream(key) is None:
                        misnamed.add(name)
                        if (meant := keys.meant_by(key)) is not None:
                            wanted = keys.stream(meant).decode()
                            renames.add(f"redis-cli RENAMENX {quoted(name)} {quoted(wanted)}")
    found = []
    if misnamed.count:
        found.append(
            error(
                "data.misnamed",
                f"Keys that look like streams belong to no channel: {misnamed}",
                "Their events are never delivered. The name of a channel must be in braces:"
                f" {keys.prefix.decode()}stream:{{news}}.",
                "Correct the producer, then move the events: "
                + ("; ".join(renames.examples) or "see docs/redis.md, section 'Channel names'"),
            )
        )
    if foreign.count:
        found.append(
            error(
                "data.foreign",
                f"Keys with the name of a stream hold something else: {foreign}",
                "These channels cannot be read or published to (WRONGTYPE).",
                f"redis-cli TYPE {quoted(foreign.examples[0])}; then rename or delete the key, or"
                " set another [redis] prefix",
            )
        )
    return found


async def _streams(
    config: Config, clients: ShardClients, keys: Keys, errors: ServerErrors
) -> list[Finding]:
    alive: set[str] | None = None
    home = clients.shards.home
    if home not in errors:
        with errors.collect(home):
            alive = {worker.instance for worker in await live_workers(clients.home, keys)}
    endless: dict[str, _Found] = {}
    orphans, destroys, strangers = _Found(), _Found(), _Found()
    async for batch in overview.walk(clients, keys, "*", lambda _: None, errors):
        for stream in batch:
            rules = config.namespace(stream.channel)
            key = keys.stream(stream.channel).decode()
            if not rules.retention_count and not rules.retention_age_s:
                section = _section_of(config, stream.channel)
                endless.setdefault(section, _Found()).add(stream.channel)
            for follower in stream.followers:
                if follower.worker is None:
                    strangers.add(f"{follower.name} of {stream.channel}")
                elif alive is not None and follower.worker not in alive:
                    orphans.add(f"{follower.name} of {stream.channel}")
                    group = quoted(follower.name)
                    destroys.add(f"redis-cli XGROUP DESTROY {quoted(key)} {group}")
    found = [
        warning(
            "data.retention",
            f"Streams are never trimmed ([{section}] has no retention): {channels}",
            "They grow until the memory of Redis is full, and then all events are rejected.",
            f"[{section}]\nretention_count = 10000",
        )
        for section, channels in endless.items()
    ]
    if orphans.count:
        found.append(
            warning(
                "data.orphaned_groups",
                f"Consumer groups belong to no running worker: {orphans}",
                "Each costs Redis time for every event. A running relay removes the groups of dead"
                " workers within a minute; if these stay, its job for dead workers does not work.",
                "Look at the log of relay for 'Removed the consumer groups'; to remove one by"
                f" hand: {'; '.join(destroys.examples)}",
            )
        )
    if strangers.count:
        found.append(
            note(
                "data.foreign_groups",
                f"Consumer groups of other programs: {strangers}",
                "relay neither uses nor removes them. An unused group costs Redis memory for"
                " its pending entries.",
                "redis-cli XINFO GROUPS KEY; remove an unused one with XGROUP DESTROY KEY GROUP",
            )
        )
    return found


def _section_of(config: Config, channel: str) -> str:
    name, colon, _ = channel.partition(":")
    return f"namespace:{name}" if colon and name in config.namespaces else "namespace"


async def _queues(
    config: Config, clients: ShardClients, keys: Keys, errors: ServerErrors
) -> list[Finding]:
    found = []
    letters = 0
    home = clients.shards.home
    if home not in errors:
        with errors.collect(home):
            letters = await dead_letter_list.count(clients.home, keys)
    if letters:
        found.append(
            warning(
                "data.dead_letters",
                f"There are {letters} dead letters",
                "These entries could not be delivered to anyone.",
                "relay dead-letters list; then relay dead-letters requeue ID or drop ID",
            )
        )
    queue = config.producers["producer:queue"]
    if isinstance(queue, QueueSettings):
        if not queue.enabled and await _longer_than(clients, queue.names(), 0, errors):
            found.append(
                warning(
                    "data.queue",
                    f"Commands wait in the queue {queue.name}, which relay does not read",
                    "Unless a Centrifugo server reads them, these publications are not delivered,"
                    " and the list grows.",
                    "[producer:queue]\nenabled = yes",
                )
            )
        elif await _longer_than(clients, queue.names(), _LONG_QUEUE, errors):
            found.append(
                error(
                    "data.queue",
                    f"More than {_LONG_QUEUE} commands wait in the queue {queue.name}",
                    "Publications are late.",
                    "relay status; the workers that read queues:"
                    f" redis-cli ZRANGE {keys.takers.decode()} 0 -1",
                )
            )
    return found


async def _longer_than(
    clients: ShardClients, names: Sequence[str], count: int, errors: ServerErrors
) -> bool:
    """Return True if one of these lists has more than `count` items."""
    for name in names:
        for shard, client in await clients.of_queue(name):
            if shard in errors:
                continue
            with errors.collect(shard):
                try:
                    # The user relay has no right to LLEN.
                    if await connect.command(client, "LINDEX", name, count) is not None:
                        return True
                except connect.CommandRefused:
                    # If queues are not used, the user needs no right to them.
                    continue
    return False
