"""Presence, join and leave pushes of v1.

Presence is maintained for channels with `presence` or `join_leave`. Joins and leaves are ephemeral
events: they reach the Centrifugo clients of all workers and are not stored in the stream. If a
worker dies, another worker sends the leave pushes of its clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, cast

from relay.core.go_json import text
from relay.core.model import Channel, Event
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.protocols.centrifugo import codec, commands

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.protocols.centrifugo.channels import ChannelNames
    from relay.protocols.centrifugo.settings import CentrifugoNamespace
    from relay.protocols.centrifugo.stats import Stats

_DOOR = "centrifugo"


class PresenceMember(Protocol):
    """A connection whose subscriptions can have presence."""

    client: str

    def disconnect(self, reason: Reason) -> None:
        """Close the connection."""

    async def add_presence(self, wanted: Callable[[Channel], bool]) -> None:
        """Add the client to the presence of those of its channels for which `wanted` is True."""


class ChannelPresence:
    """Presence of this worker's clients, and queries about all clients."""

    def __init__(
        self,
        context: DoorContext,
        rules: Callable[[str], CentrifugoNamespace | None],
        stats: Stats,
    ) -> None:
        """`rules` returns a channel's rules.

        It returns None if the namespace is unknown or belongs to another protocol.
        """
        self._context = context
        self._rules = rules
        self._stats = stats
        # Concurrent queries receive the same mapping object, which is encoded once.
        self._last: tuple[Mapping[str, bytes], bytes] = ({}, b"{}")
        # Clients of this worker whose leave pushes are sent by the worker that removes them from
        # presence, so that each is sent once.
        self._left: set[str] = set()
        context.presence.on_clients_lost(self._on_worker_died)
        context.presence.on_own_removed(self._on_own_removed)

    def join(self, channel: Channel, client: str, info: bytes) -> None:
        """Add a client that has subscribed. `info` is encoded as in pushes."""
        self.update(channel, client, info)
        rules = self._rules(channel)
        if rules is not None and rules.join_leave:
            self._push(channel, "join", info)

    def update(self, channel: Channel, client: str, info: bytes) -> None:
        """Add the client or replace its info, without a join push."""
        if not _has_presence(self._rules(channel)):
            return
        # Encode as in replies now, because a channel may have thousands of clients.
        kept = codec.client_info(info) or codec.info_json("", client, "", "")
        self._context.presence.add(channel, client, kept)
        self._stats.count("node_num_add_presence")

    async def add_existing(self, before: ChannelNames, members: Iterable[PresenceMember]) -> None:
        """Add connected clients to channels that have presence now but did not have it `before`."""
        for each in members:
            await each.add_presence(lambda channel: not _has_presence(before.rules(channel)))

    def leave(self, channel: Channel, client: str, info: bytes) -> None:
        """Remove a client that has unsubscribed."""
        self._context.presence.remove(channel, client)
        rules = self._rules(channel)
        if _has_presence(rules):
            self._stats.count("node_num_remove_presence")
        if rules is not None and rules.join_leave and client not in self._left:
            self._push(channel, "leave", info)

    async def read(self, channel: Channel) -> bytes:
        """Return the channel's clients as a JSON object. Raise Unavailable without Redis."""
        self._stats.count("node_num_presence")
        found = await self._context.presence.read(channel)
        clients, written = self._last
        if found is not clients:
            # Go sorts the keys of a map. A channel may have thousands of clients.
            members = [text(each) + b":" + found[each] async for each in in_slices(sorted(found))]
            written = b"{" + b",".join(members) + b"}"
            self._last = found, written
        return written

    def _on_worker_died(self, channel: Channel, clients: Mapping[str, bytes]) -> None:
        rules = self._rules(channel)
        if rules is None or not rules.join_leave:
            return
        for client, info in clients.items():
            self._push(channel, "leave", _push_info(client, info))

    def _on_own_removed(self, clients: set[str]) -> None:
        self._left = clients
        for session in self._context.hub.sessions():
            if session.principal.door == _DOOR and not session.closed:
                member = cast("PresenceMember", session.client)
                if member.client in clients:
                    member.disconnect(Reason.STOPPING)

    def _push(self, channel: Channel, kind: str, info: bytes) -> None:
        self._context.publish_ephemeral(
            Event(channel, None, info, is_json=True, type=kind, door=_DOOR)
        )
        self._stats.count(f"node_num_{kind}_msg_published")


def _has_presence(rules: CentrifugoNamespace | None) -> bool:
    return rules is not None and (rules.presence or rules.join_leave)


def _push_info(client: str, info: bytes) -> bytes:
    """Convert a client's info to the key order of pushes."""
    try:
        members = commands.fields(
            info.decode(), strings=("user",), raws=("default_info", "channel_info")
        )
    except ValueError:
        members = {}
    user, default, channel = (
        members.get(name, "") for name in ("user", "default_info", "channel_info")
    )
    return codec.info_json(user, client, default, channel)
