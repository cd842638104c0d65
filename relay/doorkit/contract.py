"""The interfaces between a protocol's folder and the rest of relay.

`relay.protocols` describes which modules a folder has and how they are found. A `FrontDoor`
receives a `DoorContext` and returns a `Mounted` with the protocol's routes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Unpack, runtime_checkable

from aiohttp import web

if TYPE_CHECKING:
    import asyncio

    import aiohttp
    from pydantic import SecretStr

    from relay.core.clock import RedisClock
    from relay.core.connection import ConnectionInfo
    from relay.core.durability import Durability
    from relay.core.metrics import Metrics
    from relay.core.model import Channel, EntryID, Event, EventFields, Position, Principal
    from relay.core.reasons import Reason
    from relay.core.stream_interface import Snapshot
    from relay.hub.hub import Hub
    from relay.hub.session import Client, Encoder, Session, Subscription
    from relay.transports.between_workers.forwarder import Forward
    from relay.transports.between_workers.session_ids import SessionIds


class OpenSession(Protocol):
    """Opens a client's session."""

    async def __call__(
        self,
        principal: Principal,
        encoder: Encoder,
        client: Client,
        *,
        info: ConnectionInfo | None = None,
        limit: int | None = None,
    ) -> Session:
        """Open a session if the user's number of connections on all workers allows it.

        `info` describes the client's connection, and is otherwise that of its socket. `limit` is
        the maximum in this principal's protocol. None applies `[hub] connections_per_user` to the
        connections in all protocols. LimitExceeded if there are too many, Unavailable if they
        cannot be counted.
        """


class Publish(Protocol):
    """Appends an event to its channel's stream."""

    def __call__(
        self,
        channel: Channel,
        data: bytes,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> asyncio.Future[EntryID]:
        """Return a future with the entry's ID, or with the error.

        An event that cannot be appended raises at once: ValueError, LimitExceeded or Unavailable.
        `unless_latest` names one of the `extra` fields. If the newest event of this type has the
        same value in it, nothing is appended, and the result is the ID of that event.
        `durability` overrides that of the namespace.
        """


class TurnedAway(Protocol):
    """Records in the journal that a client without a session was rejected."""

    def __call__(
        self, info: ConnectionInfo | None, protocol: str, reason: Reason | str, detail: str = ""
    ) -> None:
        """Record it. HTTP error answers, and rejected subscriptions of a session, are recorded
        without this."""


class Command(Protocol):
    """Sends a command to all workers through the control stream."""

    async def __call__(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """Send it. Unavailable if Redis did not accept it."""


class Bus(Protocol):
    """Sends bytes to another worker of the cluster, on any host."""

    instance: str
    # Names this worker to the others. It is random, and clients do not see it.
    address: str

    def send(self, address: str, topic: str, payload: bytes) -> None:
        """Send a few kilobytes to the worker with this address, at most once and in order.

        They are lost if it is not running, or if Redis is unreachable.
        """

    def listen(self, topic: str, on_payload: Callable[[str, bytes], None]) -> None:
        """Call `on_payload` with the sender's address and the payload of each message for `topic`,
        which has one listener."""


class LoginLimit(Protocol):
    """Limits how often passwords can be guessed, on all workers together.

    All methods raise RelayError if Redis is unreachable.
    """

    async def begin(self, address: str) -> float:
        """Count an attempt from this address and return 0, or return the seconds to wait."""

    async def succeeded(self, address: str) -> None:
        """Forget the attempts from this address."""


class Store(Protocol):
    """Small values with a time limit, shared by all workers. Names are `<protocol>:<kind>:<id>`.

    All methods raise Unavailable if Redis is unreachable.
    """

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """Write the value if there is none, and return None. Otherwise return the present value."""

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Write the value, and replace a present one."""

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """Write all values in one pipeline."""

    async def get(self, name: str) -> bytes | None:
        """Return the value, or None."""

    async def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the values in the order of the names. They are read in one pipeline."""

    async def delete(self, name: str) -> None:
        """Delete the value before it expires."""


class Presence(Protocol):
    """Clients that are present in a channel, on all workers.

    It refreshes itself. `info` has the protocol's own format.
    """

    def add(self, channel: Channel, client: str, info: bytes) -> None:
        """Add a client of this worker, or change its `info`. `client` is unique on all workers."""

    def remove(self, channel: Channel, client: str) -> None:
        """Remove the client from the channel's presence. Do nothing if it is not present."""

    def read(self, channel: Channel) -> Awaitable[Mapping[str, bytes]]:
        """Return the info of all present clients by client.

        Clients of a worker that died are removed within seconds. Unavailable if Redis is
        unreachable.
        """

    def on_clients_lost(self, notify: Callable[[Channel, Mapping[str, bytes]], None]) -> None:
        """Call `notify` on one worker with the clients of a worker that died or was frozen.

        They are no longer present. Each client is reported once.
        """

    def on_own_removed(self, lost: Callable[[set[str]], None]) -> None:
        """Call `lost` with clients that are no longer present after a freeze of this worker.

        They must connect again. Their departure is reported by `on_clients_lost`, here or on
        another worker.
        """


class CommandHandler(Protocol):
    """Applies a protocol's own commands from the control stream, one after another."""

    def concerned(self, payload: str) -> Collection[Subscription]:
        """Return the subscriptions that the command may end.

        Before the command is applied, they receive the events that were appended before it, and no
        later ones.
        """

    async def apply(self, payload: str) -> None:
        """Apply the command. Ignore it if it is malformed."""


class Active(Protocol):
    """Channels and workers of the cluster. Unavailable if Redis is unreachable."""

    async def channels(self) -> list[Channel]:
        """Return the channels that clients follow, in any protocol."""

    async def is_followed(self, channel: Channel) -> bool:
        """Return True if a client follows the channel, in any protocol."""

    async def workers(self) -> list[str]:
        """Return the workers' instances. A worker that has just died is included."""


class Spawn(Protocol):
    """Starts a task that ends with the relay."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start it. `name` is shown to operators. An exception that it raises ends the relay.

        While the relay is ending because of one, the task is not run.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorContext:
    """The services that a protocol receives from the relay."""

    hub: Hub
    # Open a session, and subscribe it. `subscribe` first requests answers about rights that take
    # time. It calls the session's client in a later turn of the loop.
    open: OpenSession
    subscribe: Callable[[Session, Channel, Position | None], None]
    publish: Publish
    # Publish an ephemeral event, without confirmation. ValueError if it cannot be ephemeral.
    publish_ephemeral: Callable[[Event], None]
    # End a user's connections or subscriptions on all workers.
    disconnect: Command
    unsubscribe: Command
    # Read the newest events of a channel, at least as many as requested if they exist. Unavailable
    # if Redis is unreachable.
    history: Callable[[Channel, int], Awaitable[Snapshot]]
    # Read the users of a group that the application stores in the Redis set `<prefix>group:<name>`.
    # Unavailable if Redis is unreachable.
    members: Callable[[str], Awaitable[frozenset[str]]]
    # Set the handler for a protocol's own commands on the control stream.
    on_command: Callable[[str, CommandHandler], None]
    # Set a handler that drops cached answers about a channel's or user's rights. None means all.
    on_drop: Callable[[Callable[[Channel | None, str | None], None]], None]
    turned_away: TurnedAway
    bus: Bus
    store: Store
    presence: Presence
    active: Active
    spawn: Spawn
    # For requests to applications. It stores no cookies.
    http: aiohttp.ClientSession
    # Read a native JWT, or a token of a protocol that `ReadsTokens`. Unauthorized if it is neither.
    read_token: Callable[[str], Principal]
    forward: Forward
    # IDs of polling sessions, from which every worker finds the owner.
    session_ids: SessionIds
    # Pass a request to the one worker of this host that receives all such requests, so that they
    # keep their order. None if this is that worker, or if the connection cannot be passed.
    gather: Callable[[web.Request], Awaitable[web.StreamResponse | None]]
    # Why these channels cannot be read now, naming the server if only that one is away, or ''.
    not_reading: Callable[[Sequence[Channel]], str]
    # Wait until these channels are being read.
    wait_connected: Callable[[Sequence[Channel]], Awaitable[None]]
    metrics: Metrics
    # The time of Redis, with which entry IDs must be compared.
    clock: RedisClock
    # For all passwords of operators.
    login_attempts: LoginLimit
    # Return the routes of the operator console below a prefix, with a password of its own.
    console: Callable[[str, Callable[[], SecretStr]], list[web.AbstractRouteDef]]
    client_buffer_bytes: int
    # For the native protocol: anyone may read every channel.
    insecure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """An additional address of a protocol. `producers`: see `Mounted`.

    An empty `host` means that of [server]. Without a certificate, the TLS settings of [server]
    apply. `plain` disables TLS, for clients that do not support it.
    """

    port: int
    routes: Sequence[web.AbstractRouteDef]
    host: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    plain: bool = False
    producers: Sequence[web.AbstractRouteDef] = ()


class Mounted(Protocol):
    """A protocol that is being served.

    `routes` are served on the shared listener, or on the protocol's own if its section has a
    `port`. `listeners` are additional ones. `drain_s` is the time in seconds that clients may stay
    connected during a stop, for clients that do not reconnect by themselves. If it is None, clients
    are asked to reconnect at `[node] drain_per_s`.

    `producers` are routes for programs that publish and do not retry. During a stop they are served
    until the clients have disconnected, while new clients are rejected. They have the paths of
    `routes`, and replace those on the same listener.
    """

    routes: Sequence[web.AbstractRouteDef]
    producers: Sequence[web.AbstractRouteDef]
    listeners: Sequence[Listener]
    drain_s: float | None

    def reload(self, settings: Any) -> None:  # its own section's class
        """Use new settings for new connections."""

    async def closed(self) -> None:
        """Wait until the sockets of all clients are closed."""


class FrontDoor(Protocol):
    """The `DOOR` of a protocol's `routes` module."""

    def mount(self, context: DoorContext, settings: Any) -> Mounted:  # its own section's class
        """Build the protocol. Called only if `settings.is_open`; otherwise its paths return 404."""


@runtime_checkable
class ReadsTokens(Mounted, Protocol):
    """A protocol whose tokens also give access to its channels in the native protocol."""

    def read_token(self, token: str) -> Principal | None:
        """Return the token's principal, or None if it is not a valid token of this protocol."""
