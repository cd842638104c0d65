"""The interfaces between a protocol's folder and the rest of relay.

`relay.protocols` describes which modules a folder has and how they are found. A `FrontDoor`
receives a `DoorContext` and returns a `Mounted` with the protocol's routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from aiohttp import web

if TYPE_CHECKING:
    import asyncio

    import aiohttp

    from relay.core.metrics import Metrics
    from relay.core.model import Channel, EntryID, Event, Position, Principal
    from relay.core.stream_interface import Snapshot
    from relay.hub.hub import Hub
    from relay.hub.session import Client, Encoder, Session


class OpenSession(Protocol):
    """Makes a client's session."""

    async def __call__(
        self, principal: Principal, encoder: Encoder, client: Client, *, limit: int | None = None
    ) -> Session:
        """As `hub.open`, after the user's connections on all workers have been counted: at most
        `limit` of those that came in by this principal's door, where None stands for
        `[hub] connections_per_user` of all doors. LimitExceeded, or Unavailable."""


class Publish(Protocol):
    """Appends an event to its workspace's stream."""

    def __call__(
        self,
        channel: Channel,
        data: bytes,
        *,
        client: str | None = None,
        uid: str | None = None,
        type: str | None = None,
        to: Iterable[str] | None = None,
        info: bytes | None = None,
        extra: Mapping[bytes, bytes] | None = None,
        unless_latest: bytes | None = None,
    ) -> asyncio.Future[EntryID]:
        """The entry's ID, or the error why there is none. What is wrong with the entry itself is
        raised at once: ValueError, LimitExceeded, Unavailable. `unless_latest` is the name of one
        of `extra`: an event that equals the newest one of its type in that is not appended again,
        and that one's ID is the answer."""


class Command(Protocol):
    """Tells all workers, through the control stream."""

    async def __call__(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """Unavailable where they could not be told."""


class Bus(Protocol):
    """Bytes from this worker to another of the site, whichever host it is on."""

    instance: str
    # Names this worker in the IDs that clients see. It is random, and does not contain the host.
    address: str

    def send(self, address: str, topic: str, payload: bytes) -> asyncio.Future[bool]:
        """Send bytes to the worker with this address, at most once and in order.

        The result is False if there is no such worker, and Unavailable if that is unknown. It may
        be ignored.
        """

    def listen(self, topic: str, on_payload: Callable[[str, bytes], None]) -> None:
        """Call `on_payload` with the sender's address and the payload of each message for `topic`,
        which has one listener."""


class Store(Protocol):
    """Small values with a time limit, for all workers. Names are `<door>:<what>:<id>`.

    Each raises Unavailable where Redis is away.
    """

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """None where it is ours now, else what was there."""

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Write it, whatever was there."""

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """All of them in one pipeline."""

    async def get(self, name: str) -> bytes | None:
        """What is there."""

    async def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """What is there, in the order of the names, in one pipeline."""

    async def delete(self, name: str) -> None:
        """Before its time is over."""

    async def time_ms(self) -> int:
        """Return the clock of Redis, which entry IDs are made of, in milliseconds."""


class Presence(Protocol):
    """Who is in which channel, on all workers. Nothing need be refreshed; `info` is the door's
    own."""

    def add(self, channel: Channel, client: str, info: bytes) -> None:
        """This worker's client is there from now on, or has another `info`. The ID is unique on
        all workers."""

    def remove(self, channel: Channel, client: str) -> None:
        """It is not; nothing where it was not."""

    def read(self, channel: Channel) -> Awaitable[Mapping[str, bytes]]:
        """Everyone there, with the info; within seconds without those of a worker that died.
        Unavailable where Redis is away."""

    def on_gone(self, gone: Callable[[Channel, Mapping[str, bytes]], None]) -> None:
        """`gone` is called with clients of a worker that died, on one of the others."""


class Active(Protocol):
    """What there is on all workers. Each raises Unavailable where Redis is away."""

    async def channels(self) -> list[Channel]:
        """Those that a client of any door follows."""

    async def is_followed(self, channel: Channel) -> bool:
        """Whether it is one of them."""

    async def workers(self) -> list[str]:
        """Instances, those included that died a moment ago."""


class Spawn(Protocol):
    """Starts a task of the relay."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """`name` is what an operator sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorContext:
    """What every door works with.

    `subscribe` asks the rights sources that take time, then the hub; the session's client is told
    in a later turn. `publish_ephemeral` publishes an ephemeral event, and nobody learns whether
    it arrived; ValueError where it cannot be one. `disconnect` and `unsubscribe` concern a user's
    connections on all workers. `on_command` (a door's name, its function) hears the control
    stream's commands for that door; `on_drop` (a function) that answers about a channel's or a
    user's rights (None: all) are to be asked for again. `history` has the newest events of a
    channel, at least so many if there are (Unavailable where Redis is away). `members` reads a
    group that the application keeps, the Redis set `<prefix>group:<name>` of users (Unavailable
    likewise). `read_token` turns a native JWT, or a token of a door that `ReadsTokens`, into a
    principal (Unauthorized otherwise). `pass_on` gives a request without a body, with its
    connection, to another worker (an instance) of this host: what the handler returns then; None
    where that cannot be. `gather` gives it to the one worker of this host that gets all such
    requests, so that one worker sees them in their order; None if that is this worker, or the
    connection cannot be handed over. `is_connected` returns whether there is a connection to Redis
    over which streams are read, and `wait_connected` waits for one. `spawn` runs a task that ends
    with the relay; an exception that it lets out ends the relay. `http` is for requests to
    applications. `insecure` concerns the native door only.
    """

    hub: Hub
    open: OpenSession
    subscribe: Callable[[Session, Channel, Position | None], None]
    publish: Publish
    publish_ephemeral: Callable[[Event], None]
    disconnect: Command
    unsubscribe: Command
    history: Callable[[Channel, int], Awaitable[Snapshot]]
    members: Callable[[str], Awaitable[frozenset[str]]]
    on_command: Callable[[str, Callable[[str], None]], None]
    on_drop: Callable[[Callable[[Channel | None, str | None], None]], None]
    bus: Bus
    store: Store
    presence: Presence
    active: Active
    spawn: Spawn
    http: aiohttp.ClientSession
    read_token: Callable[[str], Principal]
    pass_on: Callable[[web.Request, str], web.StreamResponse | None]
    gather: Callable[[web.Request], web.StreamResponse | None]
    is_connected: Callable[[], bool]
    wait_connected: Callable[[], Awaitable[None]]
    metrics: Metrics
    client_buffer_bytes: int
    insecure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """An address of a door's own. An empty `host` is that of [server], and so is TLS without a
    certificate here; `plain`: never TLS, for clients that have none. `producers`: see
    `Mounted`."""

    port: int
    routes: Sequence[web.AbstractRouteDef]
    host: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    plain: bool = False
    producers: Sequence[web.AbstractRouteDef] = ()


class Mounted(Protocol):
    """A door at work. `routes` are for the shared listener or, where its section has a `port`, for
    that one; `listeners` come on top. `drain_s`: seconds that its clients may stay at stop, where
    they do not come back by themselves; None: they are asked to reconnect over `[node] drain_s`.

    `producers` are routes for programs that publish and do not retry. They are served until the
    clients have gone, while new clients are rejected. They have the paths of `routes`, and take the
    place of those on the same listener."""

    routes: Sequence[web.AbstractRouteDef]
    producers: Sequence[web.AbstractRouteDef]
    listeners: Sequence[Listener]
    drain_s: float | None

    def reload(self, settings: Any) -> None:  # its own section's class
        """New settings for connections made from now on."""

    async def closed(self) -> None:
        """Returns once no client's socket is open any more."""


class FrontDoor(Protocol):
    """The `DOOR` of a protocol's `routes` module."""

    def mount(self, context: DoorContext, settings: Any) -> Mounted:  # its own section's class
        """Return the protocol at work. Called only if `settings.is_open`; its paths are 404
        otherwise."""


@runtime_checkable
class ReadsTokens(Mounted, Protocol):
    """A door at work whose own tokens open its workspaces in the native door too."""

    def read_token(self, token: str) -> Principal | None:
        """Whom it names and what it opens there; None where it is no valid token of this door."""
