"""Heartbeats of workers, the list of live workers, and the detection of dead ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from relay.core.errors import RelayError, StartError
from relay.stream.cluster.schema import COMPATIBLE_SINCE, SCHEMA, conflict
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.connection.refusals import Refusals
from relay.stream.format.keys import Keys

HEARTBEAT_S = 5
# Period while this worker is not ready, so that `relay status` soon shows that it is.
NOT_READY_S = 0.5
EXPIRY_S = 15
# A worker is dead if its heartbeat has been missing for this long.
DEAD_AFTER_S = 2 * HEARTBEAT_S

# Names of areas in `Refusals`.
REGISTRY = "the list of workers"
HEARTBEATS = "heartbeats"
_UNSEEN = "'relay status' and other workers do not see this worker"

log = logging.getLogger(__name__)


def new_instance(name: str) -> str:
    """Return a unique name for this process. A restarted worker has another one."""
    return f"{name}:{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One worker as its heartbeat describes it."""

    instance: str
    name: str
    host: str
    pid: int
    started: str
    version: str
    # None for a worker of an older version.
    ready: bool | None = None
    connections: int | None = None
    streams: int | None = None
    lag_ms: int | None = None
    # Connections by protocol.
    protocols: Mapping[str, int] | None = None
    # Since the start: processor time, events read and deliveries.
    cpu_s: float | None = None
    events: int | None = None
    deliveries: int | None = None
    memory_bytes: int | None = None
    # The commands that Redis refuses, as in `/readyz`.
    refused: str = ""
    # Host and port for other workers' requests, empty if this worker accepts none.
    internal: str = ""
    # Time of Redis before this was written. None for a worker of an older version.
    written_ms: int | None = None
    # See `relay.stream.cluster.schema`. 0 for a worker of an older version.
    schema: int = 0
    compatible_since: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """The load of a worker at the time of a heartbeat.

    `lag_ms` is the largest age at which an entry was delivered since the previous heartbeat.
    """

    ready: bool
    connections: int
    streams: int
    lag_ms: int
    refused: str = ""
    protocols: Mapping[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0
    events: int = 0
    deliveries: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSchema:
    """The fields of a heartbeat that decide whether two versions may share one Redis."""

    instance: str
    version: str
    schema: int = 0
    compatible_since: int | None = None


# Heartbeats of a newer version may have more fields, which are ignored.
_HEARTBEAT = TypeAdapter(WorkerInfo)
_SCHEMA = TypeAdapter(WorkerSchema)


def describe_this_worker(name: str, instance: str, version: str) -> WorkerInfo:
    """Return the description of this process."""
    return WorkerInfo(
        instance=instance,
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        schema=SCHEMA,
        compatible_since=COMPATIBLE_SINCE,
    )


def resident_bytes() -> int | None:
    """Return the memory that this process uses, or None if the system has no /proc."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class WorkerHeartbeat:
    """Registers this worker, and stores its load for other workers and operators."""

    def __init__(
        self,
        *,
        client: RedisClient,
        keys: Keys,
        worker: WorkerInfo,
        load: Callable[[], WorkerLoad] | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self._refusals = refusals or Refusals()
        self._client = client
        self._keys = keys
        self._worker = worker
        self._load = load
        self._good = True
        self._beating = asyncio.Lock()
        # The refusals that the last heartbeat lists.
        self._listed = ""

    async def publish_internal(self, address: str) -> None:
        """Set the internal address of this worker, as host:port, and write the heartbeat.

        Without Redis, `beat_unless_ready` writes it soon.
        """
        self._worker = replace(self._worker, internal=address)
        try:
            await self.beat()
        except RelayError:
            self._good = False

    async def beat_unless_ready(self) -> None:
        """Write the heartbeat if the last one said that this worker is not ready, or if the
        refusals have changed since."""
        if not self._good or (self._load is not None and str(self._refusals) != self._listed):
            await self.beat()

    async def beat(self) -> None:
        """Write the heartbeat and the entry in the list of workers, in case Redis lost its data.

        A Redis whose memory is full rejects SET and SADD. EXPIRE then extends the existing
        heartbeat, whose `written_ms` shows its age.
        """
        # Otherwise an older heartbeat could replace a newer one.
        async with self._beating:
            await self._beat()

    async def _beat(self) -> None:
        instance = self._worker.instance
        worker = replace(self._worker, **asdict(self._load())) if self._load else self._worker
        self._good = worker.ready is not False
        self._listed = worker.refused
        with contextlib.suppress(connect.CommandRefused):
            worker = replace(worker, written_ms=await connect.time_ms(self._client))
        text = orjson.dumps(worker)
        commands: tuple[tuple[bytes | str | int, ...], ...] = (
            ("SADD", self._keys.nodes, instance),
            ("SET", self._keys.node(instance), text, "EX", EXPIRY_S),
            ("EXPIRE", self._keys.node(instance), EXPIRY_S),
        )
        async with connect.pipelined(self._client) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        registered, beaten, _ = replies
        for area, reply in ((REGISTRY, registered), (HEARTBEATS, beaten)):
            if (error := connect.error_reply(reply)) is not None:
                self._refusals.refused(area, error, _UNSEEN)
            elif not isinstance(reply, Exception):
                self._refusals.accepted(area)

    async def leave(self) -> None:
        """Remove this worker from the list at shutdown, after it has destroyed its groups."""
        instance = self._worker.instance
        async with connect.pipelined(self._client) as pipeline:
            pipeline.execute_command("DEL", self._keys.node(instance))
            pipeline.execute_command("SREM", self._keys.nodes, instance)
            await pipeline.execute()


async def _registry(client: RedisClient, keys: Keys) -> dict[str, bytes | None]:
    """Return the heartbeat of each registered instance, None if it has expired."""
    members = await connect.command(client, "SMEMBERS", keys.nodes)
    instances = sorted(member.decode() for member in members)
    async with connect.pipelined(client) as pipeline:
        for instance in instances:
            # Not MGET: on Redis Cluster these keys are in different slots.
            pipeline.execute_command("GET", keys.node(instance))
        beats: list[Any] = await pipeline.execute()
    return dict(zip(instances, beats, strict=True))


async def live_workers(client: RedisClient, keys: Keys) -> list[WorkerInfo]:
    """Return the workers that have a heartbeat, sorted by instance. Skip unreadable heartbeats."""
    return (await list_workers(client, keys))[0]


async def list_workers(client: RedisClient, keys: Keys) -> tuple[list[WorkerInfo], list[str]]:
    """Return the live workers, and the registered instances without a readable heartbeat."""
    living, silent = [], []
    for instance, beat in (await _registry(client, keys)).items():
        info = None if beat is None else parse_heartbeat(instance, beat)
        if info is None:
            silent.append(instance)
        else:
            living.append(info)
    return living, silent


async def check_schema(client: RedisClient, keys: Keys) -> None:
    """Raise StartError if this version must not run beside the present workers.

    Ignore other errors: the check is repeated with each heartbeat.
    """
    try:
        problem = await find_conflict(client, keys)
    except RelayError:
        return
    if problem:
        raise StartError(problem)


async def find_conflict(client: RedisClient, keys: Keys) -> str:
    """Return why this version must not run beside the present workers, or ''."""
    return conflict(read_schemas(await _registry(client, keys)))


def read_schemas(registry: Mapping[str, bytes | None]) -> list[WorkerSchema]:
    """Return the schemas of these heartbeats, also if other fields of a heartbeat are unreadable.

    An incompatible version may write these differently.
    """
    found = []
    for beat in registry.values():
        with contextlib.suppress(ValidationError):
            if beat is not None:
                found.append(_SCHEMA.validate_json(beat, strict=True))
    return found


def parse_heartbeat(instance: str, beat: bytes) -> WorkerInfo | None:
    """Parse a worker's heartbeat. Return None if this version cannot read it."""
    try:
        return _HEARTBEAT.validate_json(beat, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "text"
        log.warning(
            "Ignored the heartbeat of worker %s, which this version cannot read (%s: %s). Check"
            " which version of relay that worker is",
            instance,
            where,
            first["msg"],
        )
        return None


def unwritten_s(worker: WorkerInfo, now_ms: int) -> float:
    """Return for how long a live worker has not written its heartbeat, 0 while it is on time."""
    age_s = 0.0 if worker.written_ms is None else (now_ms - worker.written_ms) / 1000
    return age_s if age_s > DEAD_AFTER_S else 0.0


class DeadWorkerDetector:
    """Detects registered workers that are dead.

    A worker is dead if every call of `check` within `patience_s` found no heartbeat. One call is
    not enough, because after an outage of Redis all heartbeats have expired. `dead` returns True
    for a worker that is known to have died; it is reported at once.
    """

    def __init__(
        self,
        *,
        client: RedisClient,
        keys: Keys,
        dead: Callable[[str], bool] = lambda _: False,
        patience_s: float = DEAD_AFTER_S,
    ) -> None:
        self._client = client
        self._keys = keys
        self._is_dead = dead
        self._patience_s = patience_s
        self._silent_since: dict[str, float] = {}

    async def check(self) -> list[str]:
        """Return the instances that are dead now."""
        return self.dead(await self.read())

    async def read(self) -> dict[str, bytes | None]:
        """Return the heartbeat of each registered instance, None if it has expired."""
        return await _registry(self._client, self._keys)

    def dead(self, registry: dict[str, bytes | None]) -> list[str]:
        """Return the instances that are dead now, according to what `read` has returned."""
        now = asyncio.get_running_loop().time()
        self._silent_since = {
            instance: self._silent_since.get(instance, now)
            for instance, beat in registry.items()
            if beat is None
        }
        silent = (
            instance
            for instance, since in self._silent_since.items()
            if since < now and now - since >= self._patience_s
        )
        return sorted({*silent, *filter(self._is_dead, registry)})
