"""The services that the console uses, and the requests of its API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from relay.core.errors import BadRequest
from relay.core.model import Channel, EntryID, parse_channel

if TYPE_CHECKING:
    from aiohttp import web

    from relay.config.loading import Config
    from relay.doorkit.contract import Presence, Publish, Store
    from relay.inspect.questions import Questions
    from relay.stream.cluster.login_attempts import LoginAttempts
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_B = TypeVar("_B", bound="JsonBody")


class Described(Protocol):
    """An object that can be shown as JSON."""

    def values(self) -> dict[str, str]:
        """Return its members."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleServices:
    """Services of the relay. `clients` have the rights of an operator."""

    config: Callable[[], Config]
    clients: ShardClients
    keys: Keys
    publish: Publish
    presence: Presence
    store: Store
    attempts: LoginAttempts
    questions: Questions
    # The findings of `relay doctor`.
    examine: Callable[[], Awaitable[Sequence[Described]]]

    @property
    def client(self) -> RedisClient:
        """The client for keys that belong to no channel."""
        return self.clients.home

    def client_of(self, channel: Channel) -> RedisClient:
        """Return the client for keys of a channel."""
        return self.clients.for_key(self.keys.stream(channel))


class JsonBody(BaseModel):
    """Base class of request bodies. Unknown members are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """An authenticated request to the admin API."""

    http: web.Request
    services: ConsoleServices
    raw: bytes = b""

    def body(self, kind: type[_B]) -> _B:
        """Return the parsed body. Raise BadRequest."""
        try:
            return kind.model_validate_json(self.raw)
        except ValidationError as exc:
            error = exc.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, error["loc"])) or "body"
        raise BadRequest(f"{name}: {error['msg']}")

    def text(self, name: str, default: str | None = None) -> str:
        """Return a parameter of the query. Raise BadRequest if it is missing."""
        value = self.http.query.get(name, default)
        if value is None:
            raise BadRequest(f"{name} is missing")
        return value

    def count(self, name: str, default: int, most: int) -> int:
        """Return a number from 1 to `most`."""
        text = self.http.query.get(name, str(default))
        # Not longer, because `int` takes long for many digits.
        is_number = text.isascii() and text.isdigit() and len(text) <= 9
        if not (is_number and 0 < int(text) <= most):
            raise BadRequest(f"{name} must be a number from 1 to {most}")
        return int(text)

    def channel(self) -> Channel:
        """Return the parameter `channel`."""
        return channel_of(self.text("channel"))

    def entry_id(self, name: str) -> EntryID | None:
        """Return an entry ID, or None if the parameter is missing."""
        text = self.http.query.get(name)
        return None if text is None else entry_id_of(text, name)


ApiHandler = Callable[[ApiRequest], Awaitable[object]]


def channel_of(text: str) -> Channel:
    """Return a channel. Raise BadRequest if it is not a valid name."""
    try:
        return parse_channel(text)
    except ValueError as exc:
        raise BadRequest(str(exc)) from None


def entry_id_of(text: str, name: str) -> EntryID:
    """Return an entry ID. Raise BadRequest if it is invalid."""
    try:
        return EntryID.parse(text)
    except ValueError as exc:
        raise BadRequest(f"{name}: {exc}") from None
