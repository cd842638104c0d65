"""Channel names of Centrifugo v1, and the checks of a subscription in v1's order.

The rules compare substrings and do not nest (libcentrifugo/node/node.go of v1.8.0). With the
default separators:

- `dialog#1,2` is for users 1 and 2;
- `mine&<client>` is for one connection;
- `$secret` requires the application's signature;
- `ns:news` has the rules of namespace `ns`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.model import RESERVED_NAMESPACES, Channel, namespace_of
from relay.protocols.centrifugo import codec, tokens

if TYPE_CHECKING:
    from collections.abc import Collection

    from relay.protocols.centrifugo.settings import CentrifugoNamespace, CentrifugoSettings


class ChannelNames:
    """Interprets channel names according to the settings."""

    def __init__(self, settings: CentrifugoSettings) -> None:
        self._settings = settings

    def namespace(self, channel: str) -> str:
        """Return the name of the channel's namespace, or '' if it has none."""
        settings = self._settings
        if settings.private_channel_prefix:
            channel = channel.removeprefix(settings.private_channel_prefix)
        if not settings.namespace_channel_boundary:
            return ""
        head, boundary, _ = channel.partition(settings.namespace_channel_boundary)
        return head if boundary else ""

    def rules(self, channel: str) -> CentrifugoNamespace | None:
        """Return the channel's rules, or None if its namespace is unknown or another protocol's."""
        return None if is_foreign(channel) else self._settings.namespace(self.namespace(channel))

    def is_private(self, channel: str) -> bool:
        """Return True if a subscription requires a signature."""
        prefix = self._settings.private_channel_prefix
        return bool(prefix) and channel.startswith(prefix)

    def allows(self, channel: str, user: str, client: str) -> bool:
        """Return True if the channel's name allows this user and this client."""
        settings = self._settings
        users, clients = settings.user_channel_boundary, settings.client_channel_boundary
        if users and users in channel:
            named = channel.rpartition(users)[2]
            separator = settings.user_channel_separator
            # Go's strings.Split with an empty separator returns characters. No user list looks like
            # that.
            if user not in (named.split(separator) if separator else [named]):
                return False
        return not (clients and clients in channel) or channel.rpartition(clients)[2] == client


def is_foreign(channel: str) -> bool:
    """Return True if the channel belongs to another protocol. Centrifugo rules do not open it."""
    return namespace_of(Channel(channel)) in RESERVED_NAMESPACES


def rejection(
    settings: CentrifugoSettings,
    params: codec.SubscribeParams,
    *,
    user: str,
    client: str,
    active: Collection[str],
) -> str | None:
    """Return v1's error text for a subscription, or None if it is allowed.

    `active` are the channels that the client is subscribed to. Channels of other protocols pass:
    their own sources of rights are checked when the stream is read.
    """
    names, channel = ChannelNames(settings), params.channel
    if len(channel.encode()) > settings.max_channel_length:
        return codec.LIMIT_EXCEEDED
    if len(active) >= settings.client_channel_limit:
        return codec.LIMIT_EXCEEDED
    if channel in active:
        return codec.ALREADY_SUBSCRIBED
    if is_foreign(channel):
        return None
    if not names.allows(channel, user, client):
        return codec.PERMISSION_DENIED
    rules = names.rules(channel)
    if rules is None:
        return codec.NAMESPACE_NOT_FOUND
    if not user and not rules.anonymous and not settings.insecure:
        return codec.PERMISSION_DENIED
    # Signatures are required in insecure mode too.
    if names.is_private(channel) and not _is_signed(settings, params, client):
        return codec.PERMISSION_DENIED
    return None


def _is_signed(settings: CentrifugoSettings, params: codec.SubscribeParams, client: str) -> bool:
    secret = settings.secret.get_secret_value().encode()
    parts = params.client, params.channel, params.info
    return params.client == client and tokens.is_signed(secret, params.sign, *parts)
