"""Settings of the Centrifugo protocol: [protocol:centrifugo] and [protocol:centrifugo:NAME].

Names, units (seconds, bytes) and defaults are those of Centrifugo v1.8.0. Names of additional
settings end in their unit. `configuration/options.py` maps Centrifugo's options to settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator
from typing_extensions import override

from relay.config.settings import ListenerSection, Section
from relay.core.model import RESERVED_NAMESPACES

# v1.8.0 rejects other names (libcentrifugo/node/config.go).
_NAMESPACE_NAME = re.compile(r"[-a-zA-Z0-9_]{2,}")


class CentrifugoNamespace(Section):
    """[protocol:centrifugo:NAME]: Rules for Centrifugo channels NAME:... Settings of [protocol:centrifugo] do not apply to them."""

    watch: bool = Field(False, description="Send publications to admin connections as well.")
    publish: bool = Field(False, description="Allow clients to publish to channels to which they are subscribed.")
    anonymous: bool = Field(False, description="Allow clients without a user ID to subscribe.")
    presence: bool = Field(False, description="Allow clients to request the list of subscribers.")
    join_leave: bool = Field(False, description="Notify subscribers when a client subscribes or unsubscribes.")
    recover: bool = Field(False, description="Send missed publications to clients that reconnect, as far back as the history reaches.")
    history_size: int = Field(0, ge=0, le=1000000, description="Maximum publications per channel for history and recovery, limited by the retention of [namespace]. 0 disables history.")
    history_lifetime: int = Field(0, ge=0, le=3153600000, description="Seconds for which history is kept after the last publication. 0 disables history.")
    history_drop_inactive: bool = Field(False, description="Keep no history for channels without subscribers, except for history_lifetime after the last one has left.")

    @property
    def has_history(self) -> bool:
        """Whether the channels of this namespace have a history."""
        return self.history_size > 0 and self.history_lifetime > 0


class _ListenerSettings(ListenerSection):
    enabled: bool = Field(True, description="Enable this protocol. When disabled, its URLs return 404.")
    secret: SecretStr = Field(SecretStr(""), description="Secret that signs clients' tokens, private subscriptions and requests to /api/. Leave empty to disable this protocol.")
    http_prefix: str = Field("", pattern=r"^(/[^\s/?#{}]+)*$", description="Prefix of all paths of this protocol, for example /centrifugo.")


class CentrifugoSettings(CentrifugoNamespace, _ListenerSettings):
    """[protocol:centrifugo]: WebSocket, SockJS, HTTP API and admin socket of Centrifugo v1."""

    sections_by_name: ClassVar[tuple[str, type[Section]] | None] = ("namespaces", CentrifugoNamespace)
    fixed: ClassVar[frozenset[str]] = Section.fixed | {
        "http_prefix", "api_port", "admin_port", "admin", "web", "debug",
    }  # fmt: skip

    namespaces: Mapping[str, CentrifugoNamespace] = Field(default_factory=dict)

    # ---- authentication and limits
    insecure: bool = Field(False, description="Accept clients without a token, and ignore the rules for subscribing and publishing. For development only.")
    connection_lifetime: int = Field(0, ge=0, le=3153600000, description="Seconds for which a token is valid. Afterwards the client must send a new one. 0 means no expiry.")
    expired_connection_close_delay: float = Field(25.0, ge=0, le=86400, description="Seconds that a client with an expired token has to send a new one before its connection is closed.")
    stale_connection_close_delay: float = Field(25.0, ge=0, le=86400, description="Seconds within which a new connection must authenticate. 0 means no limit.")
    user_connection_limit: int = Field(0, ge=0, le=1000000, description="Maximum connections per user across all workers and hosts. 0 means unlimited.")
    # ---- channel names
    max_channel_length: int = Field(255, ge=1, le=255, description="Maximum length of a channel name in bytes.")
    private_channel_prefix: str = Field("$", max_length=20, description="Prefix of private channels, which need a signature of the application. Empty: no private channels.")
    namespace_channel_boundary: str = Field(":", max_length=20, description="Separator between the namespace and the rest of a channel name. Empty: channels have no namespace.")
    user_channel_boundary: str = Field("#", max_length=20, description="Separator before the list of users who may subscribe to a channel. Empty: no restriction by channel name.")
    user_channel_separator: str = Field(",", max_length=20, description="Separator between two users in a channel name.")
    client_channel_boundary: str = Field("&", max_length=20, description="Separator before the ID of the only client that may subscribe to a channel. Empty: no restriction by channel name.")
    # ---- one client
    client_channel_limit: int = Field(128, ge=1, le=100000, description="Maximum channels per client.")
    client_request_max_size: int = Field(65536, ge=1, le=67108864, description="Maximum size of one frame from a client in bytes.")
    client_queue_max_size: int = Field(10485760, ge=1024, le=1073741824, description="Maximum data queued for one client in bytes. A client that exceeds it is paused and catches up from the stream.")
    client_stalled_s: float = Field(60.0, ge=1, le=86400, description="Close a paused client as slow if it reads nothing for this time.")
    client_message_write_timeout: float = Field(0.0, ge=0, le=86400, description="Seconds that one write to a client may take before its connection is closed. 0: only client_stalled_s applies.")
    ping_interval: float = Field(25.0, ge=0.1, le=86400, description="Seconds between two pings on a WebSocket connection. The connection is closed if no answer arrives within 10/9 of the interval.")
    websocket_compression: bool = Field(False, description="Compress messages for clients that request it. Uses more processor time.")
    websocket_compression_min_size: int = Field(0, ge=0, le=1073741824, description="Do not compress messages below this number of bytes.")
    websocket_compression_level: int = Field(1, ge=-2, le=9, description="Compression level: 1 is fast, 9 is small, 0 does not compress, -1 is the default of zlib, -2 uses Huffman coding only.")
    sockjs_url: str = Field("//cdn.jsdelivr.net/sockjs/1.1/sockjs.min.js", description="URL of the script that the SockJS iframe page loads. Use the same version as your page.")
    sockjs_heartbeat_delay: float = Field(25.0, ge=0, le=86400, description="Seconds between two SockJS heartbeats. 0 disables them.")
    # ---- API and administrators
    insecure_api: bool = Field(False, description="Accept requests to /api/ without a signature. Use it only on a port that only the application can reach.")
    api_port: int = Field(0, ge=0, le=65535, description="Port of a separate listener for /api/. 0: use the listener of this protocol.")
    api_max_bytes: int = Field(10485760, ge=1024, le=1073741824, description="Maximum size of one request to /api/. Larger requests are rejected with status 413.")
    admin: bool = Field(False, description="Enable the admin socket at /socket.")
    admin_password: SecretStr = Field(SecretStr(""), description="Password for /auth/, and for the console at the admin paths, where the password of [console] is valid too unless [console] port is set. Leave empty to reject all logins at /auth/.")
    admin_secret: SecretStr = Field(SecretStr(""), description="Secret that signs the tokens issued by /auth/. Leave empty to reject all logins.")
    insecure_admin: bool = Field(False, description="Accept admin connections without a password. Use it only on a port that only administrators can reach.")
    admin_port: int = Field(0, ge=0, le=65535, description="Port of a separate listener for the admin paths. 0: use the listener of this protocol.")
    web: bool = Field(False, description="Enable /auth/, the admin socket, and relay's operator console at the address of Centrifugo's web interface. If the native protocol uses the same listener, its live page is then at /live/.")
    debug: bool = Field(False, description="Enable /debug/ beside the admin paths: tasks, memory and connections as text. Works without admin and web.")
    node_ping_interval: float = Field(3.0, ge=0.1, le=3600, description="Seconds between two reports of a node for stats. A node without a report for twice this time plus one second is omitted.")
    node_metrics_interval: float = Field(60.0, ge=0.1, le=86400, description="Seconds between two snapshots of the counters in stats.")

    @field_validator("namespaces")
    @classmethod
    def _have_good_names(cls, namespaces: Mapping[str, CentrifugoNamespace]) -> Mapping[str, CentrifugoNamespace]:
        for name in namespaces:
            if not _NAMESPACE_NAME.fullmatch(name):
                raise ValueError(f"{name!r}: must be two or more letters, digits, _ or -")
            if name in RESERVED_NAMESPACES:
                raise ValueError(f"{name!r}: this name is reserved for another protocol")
        return namespaces

    @property
    @override
    def missing(self) -> str:
        # An HMAC with an empty key can be forged. With `insecure` or `insecure_api` the secret is
        # optional; requests that still need a signature are then rejected.
        signs = bool(self.secret.get_secret_value())
        return "" if signs or self.insecure or self.insecure_api else "secret"

    def namespace(self, name: str) -> CentrifugoNamespace | None:
        """Return the rules of a namespace, or None if it does not exist.

        '' stands for channels without a namespace.
        """
        return self.namespaces.get(name) if name else self


SETTINGS = CentrifugoSettings
