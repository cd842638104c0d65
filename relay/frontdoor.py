"""What a protocol folder offers, what it is given, and how folders are found.

A door is a package in `relay/protocols/` whose `routes` module has a `DOOR`. Nothing outside the
folder names it: the configuration learns its section, the server its routes, from here.

A door that takes another server's place may read that server's configuration too. It then has a
`foreign` (`Replacing`; the words are in `relay.foreign`), and the command line learns from it which
files, option and command are its: `relay serve -c config.json`, `relay serve --seafile-conf-dir
DIR`, `relay centrifugo --port=8001`. The door's part is one pure function from file, environment
and flags to settings of ours (`Foreign.read`); reload, `checkconfig`, `convert-config` and the
operators' commands follow from it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from aiohttp import web

import relay.protocols

if TYPE_CHECKING:
    import asyncio

    from relay.foreign import Foreign
    from relay.hub.encoding import Encoder
    from relay.hub.hub import Hub
    from relay.hub.session import Client, Session
    from relay.metrics import Metrics
    from relay.model import Channel, EntryID, Position, Principal
    from relay.settings import Section


class Publish(Protocol):
    """Appends an event; the future is its entry's ID, or an error."""

    def __call__(
        self,
        channel: Channel,
        data: bytes,
        *,
        client: str | None = None,
        uid: str | None = None,
        type: str | None = None,
        to: Iterable[str] | None = None,
    ) -> asyncio.Future[EntryID]:
        """Raises at once what is wrong with the entry itself: ValueError, LimitExceeded; and
        Unavailable where no more appends can wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorContext:
    """What every door works with.

    `open` makes a client's session as `hub.open` does, after its user's connections on all workers
    have been counted: LimitExceeded, or Unavailable. `subscribe` asks the rights sources that take
    time, then the hub; the session's client is told in a later turn. `read_token` turns a native
    JWT into a principal (Unauthorized otherwise). `ready` says whether streams are being read.
    `insecure` concerns the native door only.
    """

    hub: Hub
    open: Callable[[Principal, Encoder, Client], Awaitable[Session]]
    subscribe: Callable[[Session, Channel, Position | None], None]
    publish: Publish
    read_token: Callable[[str], Principal]
    ready: Callable[[], bool]
    metrics: Metrics
    client_buffer_bytes: int
    insecure: bool


class Mounted(Protocol):
    """A door at work."""

    routes: Sequence[web.AbstractRouteDef]

    def reload(self, settings: Any) -> None:  # its own section's class
        """New settings for connections made from now on."""

    async def closed(self) -> None:
        """Returns once no client's socket is open any more."""


class FrontDoor(Protocol):
    """A folder in `relay/protocols/`."""

    name: str
    settings: type[Section]

    def mount(self, context: DoorContext, settings: Any) -> Mounted | None:
        """None where its settings leave it shut; its paths are 404 then."""


@runtime_checkable
class Replacing(FrontDoor, Protocol):
    """A door that reads the configuration of the server whose place it takes."""

    foreign: Foreign


def find_doors() -> dict[str, FrontDoor]:
    """Every door by name."""
    doors: dict[str, FrontDoor] = {}
    for module in pkgutil.iter_modules(relay.protocols.__path__):
        door = importlib.import_module(f"relay.protocols.{module.name}.routes").DOOR
        doors[door.name] = door
    return doors


def door_settings() -> dict[str, type[Section]]:
    """Every door's section of the configuration: `protocol:<name>`."""
    return {f"protocol:{name}": door.settings for name, door in find_doors().items()}


def find_foreign() -> list[Foreign]:
    """How doors read other servers' configurations, in the order of the doors' names."""
    doors = sorted(find_doors().items())
    return [door.foreign for _, door in doors if isinstance(door, Replacing)]
