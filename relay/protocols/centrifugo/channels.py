"""Channel names of Centrifugo v1, and in which order a subscription is checked.

The rules are plain substring rules and do not nest (libcentrifugo/node/node.go of v1.8.0): with the
usual characters, `dialog#1,2` is for the users 1 and 2, `mine&<client>` for one connection,
`$secret` needs the application's signature, `ns:news` has the rules of the namespace `ns`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.model import RESERVED_NAMESPACES, Channel, namespace_of
from relay.protocols.centrifugo import codec, tokens

if TYPE_CHECKING:
    from collections.abc import Collection

    from relay.protocols.centrifugo.settings import CentrifugoNamespace, CentrifugoSettings


class ChannelNames:
    """How the settings read a channel's name."""

    def __init__(self, settings: CentrifugoSettings) -> None:
        self._settings = settings

    def namespace(self, channel: str) -> str:
        """The namespace's name, '' where there is none."""
        settings = self._settings
        if settings.private_channel_prefix:
            channel = channel.removeprefix(settings.private_channel_prefix)
        if not settings.namespace_channel_boundary:
            return ""
        head, boundary, _ = channel.partition(settings.namespace_channel_boundary)
        return head if boundary else ""

    def rules(self, channel: str) -> CentrifugoNamespace | None:
        """The channel's rules; None where its namespace is unknown, or another door's."""
        return None if is_foreign(channel) else self._settings.namespace(self.namespace(channel))

    def is_private(self, channel: str) -> bool:
        """Whether subscribing needs a signature."""
        prefix = self._settings.private_channel_prefix
        return bool(prefix) and channel.startswith(prefix)

    def admit(self, channel: str, user: str, client: str) -> bool:
        """Whether the name itself lets this user and this client in."""
        settings = self._settings
        users, clients = settings.user_channel_boundary, settings.client_channel_boundary
        if users and users in channel:
            named = channel.rpartition(users)[2]
            separator = settings.user_channel_separator
            # Go's Split by nothing gives the single characters; there is no such user list.
            if user not in (named.split(separator) if separator else [named]):
                return False
        return not (clients and clients in channel) or channel.rpartition(clients)[2] == client


def is_foreign(channel: str) -> bool:
    """Whether the channel is another door's workspace: there this door's rules open nothing."""
    return namespace_of(Channel(channel)) in RESERVED_NAMESPACES


def refusal(
    settings: CentrifugoSettings,
    wanted: codec.SubscribeParams,
    *,
    user: str,
    client: str,
    own: Collection[str],
) -> str | None:
    """Why `wanted` is refused, in v1's words and its order of checks; None where it is not.

    `own` are the channels that the client has already. A foreign channel passes: whether its own
    sources of rights open it to this user is found out where it is read.
    """
    names, channel = ChannelNames(settings), wanted.channel
    if len(channel.encode()) > settings.max_channel_length:
        return codec.LIMIT_EXCEEDED
    if len(own) >= settings.client_channel_limit:
        return codec.LIMIT_EXCEEDED
    if channel in own:
        return codec.ALREADY_SUBSCRIBED
    if is_foreign(channel):
        return None
    if not names.admit(channel, user, client):
        return codec.PERMISSION_DENIED
    rules = names.rules(channel)
    if rules is None:
        return codec.NAMESPACE_NOT_FOUND
    if not user and not rules.anonymous and not settings.insecure:
        return codec.PERMISSION_DENIED
    # Insecure or not.
    if names.is_private(channel) and not _is_signed(settings, wanted, client):
        return codec.PERMISSION_DENIED
    return None


def _is_signed(settings: CentrifugoSettings, wanted: codec.SubscribeParams, client: str) -> bool:
    secret = settings.secret.get_secret_value().encode()
    parts = wanted.client, wanted.channel, wanted.info
    return wanted.client == client and tokens.is_signed(secret, wanted.sign, *parts)
