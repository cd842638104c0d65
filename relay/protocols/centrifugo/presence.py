"""Who is in a channel, and who came and left: v1's presence, join and leave.

Kept for the channels whose rules have one of the two options. Joins and leaves are of the ephemeral
kind: they reach this door's clients on all workers, and are no events of the workspace. Whoever is
on a worker that dies leaves too: one of the other workers says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from relay.core.go_json import text
from relay.core.model import Channel, Event
from relay.protocols.centrifugo import codec, commands

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.protocols.centrifugo.channels import ChannelNames
    from relay.protocols.centrifugo.clients.subscriptions import Subscriptions
    from relay.protocols.centrifugo.settings import CentrifugoNamespace
    from relay.protocols.centrifugo.stats import Stats

_DOOR = "centrifugo"


class ChannelPresence:
    """`rules` are a channel's, None where its namespace is unknown or another door's."""

    def __init__(
        self,
        context: DoorContext,
        rules: Callable[[str], CentrifugoNamespace | None],
        stats: Stats,
    ) -> None:
        self._context = context
        self._rules = rules
        self._stats = stats
        # Those who ask in the same moment are given the same mapping.
        self._last: tuple[Mapping[str, bytes], bytes] = ({}, b"{}")
        context.presence.on_gone(self._gone)

    def joined(self, channel: Channel, client: str, info: bytes) -> None:
        """The client's subscription stands; `info` is who it is, as pushes say it."""
        self.changed(channel, client, info)
        rules = self._rules(channel)
        if rules is not None and rules.join_leave:
            self._tell(channel, "join", info)

    def changed(self, channel: Channel, client: str, info: bytes) -> None:
        """The client is there with this info from now on; nobody is told."""
        if not _is_kept(self._rules(channel)):
            return
        # As answers have it, made once: a channel may have thousands of clients.
        kept = codec.client_info(info) or codec.info_json("", client, "", "")
        self._context.presence.add(channel, client, kept)
        self._stats.count("node_num_add_presence")

    async def reloaded(self, before: ChannelNames, subscriptions: Iterable[Subscriptions]) -> None:
        """Add the clients that are subscribed already to channels that have presence only now."""
        for each in subscriptions:
            await each.introduce_in(lambda channel: not _is_kept(before.rules(channel)))

    def left(self, channel: Channel, client: str, info: bytes) -> None:
        """It is over."""
        self._context.presence.remove(channel, client)
        rules = self._rules(channel)
        if _is_kept(rules):
            self._stats.count("node_num_remove_presence")
        if rules is not None and rules.join_leave:
            self._tell(channel, "leave", info)

    async def read(self, channel: Channel) -> bytes:
        """A JSON object, by client. Unavailable where Redis is away."""
        self._stats.count("node_num_presence")
        found = await self._context.presence.read(channel)
        clients, written = self._last
        if found is not clients:
            # Go writes the keys of a map in their order.
            members = (text(client) + b":" + info for client, info in sorted(found.items()))
            written = b"{" + b",".join(members) + b"}"
            self._last = found, written
        return written

    def _gone(self, channel: Channel, clients: Mapping[str, bytes]) -> None:
        rules = self._rules(channel)
        if rules is None or not rules.join_leave:
            return
        for client, info in clients.items():
            self._tell(channel, "leave", _as_pushed(client, info))

    def _tell(self, channel: Channel, what: str, info: bytes) -> None:
        self._context.whisper(Event(channel, None, info, is_json=True, type=what, door=_DOOR))
        self._stats.count(f"node_num_{what}_msg_published")


def _is_kept(rules: CentrifugoNamespace | None) -> bool:
    return rules is not None and (rules.presence or rules.join_leave)


def _as_pushed(client: str, info: bytes) -> bytes:
    """Keys in the order of pushes."""
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
