"""[protocol:centrifugo] and [protocol:centrifugo:NAME]: the door of Centrifugo v1.

Names, units (seconds, bytes) and defaults are Centrifugo v1.8.0's; what it has no word for ends in
its unit. `options.py` says which of its options stand here, which elsewhere and which nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from relay.config.settings import Section
from relay.core.model import RESERVED_NAMESPACES

# v1.8.0 refuses any other (libcentrifugo/node/config.go).
_NAMESPACE_NAME = re.compile(r"[-a-zA-Z0-9_]{2,}")


class CentrifugoNamespace(Section):
    """[protocol:centrifugo:NAME]: the rules of Centrifugo channels NAME:...; nothing is taken from [protocol:centrifugo]."""

    watch: bool = Field(False, description="what is published goes to admin connections too")
    publish: bool = Field(False, description="clients may publish to a channel they are subscribed to")
    anonymous: bool = Field(False, description="clients without a user may subscribe")
    presence: bool = Field(False, description="clients may ask who is subscribed")
    join_leave: bool = Field(False, description="clients are told who subscribes and who leaves")
    recover: bool = Field(False, description="a client that comes back is given what it missed, as far as the history reaches")
    history_size: int = Field(0, ge=0, le=1000000, description="publications of a channel that history and recovery can give, no more than the retention of [namespace] keeps; 0: none")
    history_lifetime: int = Field(0, ge=0, le=3153600000, description="seconds after the last publication for which they are given; 0: none")
    history_drop_inactive: bool = Field(False, description="what is published to a channel without subscribers is no history, but for history_lifetime after the last one left")

    @property
    def has_history(self) -> bool:
        """Whether its channels have a history."""
        return self.history_size > 0 and self.history_lifetime > 0


class _ListenerSettings(Section):
    enabled: bool = Field(True, description="off: none of its paths exist")
    secret: SecretStr = Field(SecretStr(""), description="signs clients' tokens, private subscriptions and requests to /api/; empty: none of its paths exist, since anyone can sign with an empty secret")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own; 0: the shared listener of [server]")
    tls_cert: str = Field("", description="path of a PEM certificate chain for a listener of its own; empty: that of [server]")
    tls_key: str = Field("", description="path of its PEM private key")
    http_prefix: str = Field("", pattern=r"^(/[^\s/?#{}]+)*$", description="stands before every path of this door, as /centrifugo")


class CentrifugoSettings(CentrifugoNamespace, _ListenerSettings):
    """[protocol:centrifugo]: Centrifugo v1's websocket, SockJS, HTTP API and admin socket."""

    sections_by_name: ClassVar[tuple[str, type[Section]] | None] = ("namespaces", CentrifugoNamespace)
    fixed: ClassVar[frozenset[str]] = Section.fixed | {
        "http_prefix", "api_port", "admin_port", "admin", "web", "debug",
    }  # fmt: skip

    namespaces: Mapping[str, CentrifugoNamespace] = Field(default_factory=dict)

    # ---- who may
    insecure: bool = Field(False, description="clients need no token, and may subscribe and publish where rules refuse it; for trying things out")
    connection_lifetime: int = Field(0, ge=0, le=3153600000, description="seconds a token holds, after which the client must bring another; 0: for ever")
    expired_connection_close_delay: float = Field(25.0, ge=0, le=86400, description="seconds more in which it may bring it before it is closed")
    stale_connection_close_delay: float = Field(25.0, ge=0, le=86400, description="seconds in which a new connection must say who it is; 0: for ever")
    user_connection_limit: int = Field(0, ge=0, le=1000000, description="connections of one user on all workers of all hosts; 0: no limit")
    # ---- channel names
    max_channel_length: int = Field(255, ge=1, le=255, description="bytes of a channel's name")
    private_channel_prefix: str = Field("$", max_length=20, description="a channel that begins with this needs the application's signature; empty: none does")
    namespace_channel_boundary: str = Field(":", max_length=20, description="ends the namespace's name in a channel's; empty: channels have no namespace")
    user_channel_boundary: str = Field("#", max_length=20, description="what stands behind it are the users who may subscribe; empty: anyone may")
    user_channel_separator: str = Field(",", max_length=20, description="stands between two users")
    client_channel_boundary: str = Field("&", max_length=20, description="what stands behind it is the one client that may subscribe; empty: anyone may")
    # ---- one client
    client_channel_limit: int = Field(128, ge=1, le=100000, description="channels of one client")
    client_request_max_size: int = Field(65536, ge=1, le=67108864, description="bytes of one frame from a client")
    client_queue_max_size: int = Field(10485760, ge=1024, le=1073741824, description="bytes waiting for one client before it is served from the stream instead")
    client_stalled_s: float = Field(60.0, ge=1, le=86400, description="seconds a client served from the stream may take nothing before it is closed as slow")
    client_message_write_timeout: float = Field(0.0, ge=0, le=86400, description="seconds one write to a client may take before it is closed; 0: only client_stalled_s counts")
    ping_interval: float = Field(25.0, ge=0.1, le=86400, description="seconds between two pings of a raw websocket; without an answer within 10/9 of it the connection is cut")
    websocket_compression: bool = Field(False, description="compress for clients that ask for it; costs processor time")
    websocket_compression_min_size: int = Field(0, ge=0, le=1073741824, description="bytes below which a message is not compressed")
    websocket_compression_level: int = Field(1, ge=-2, le=9, description="1 is fast, 9 is small, 0 does not compress, -1 is zlib's choice, -2 Huffman coding alone")
    sockjs_url: str = Field("//cdn.jsdelivr.net/sockjs/1.1/sockjs.min.js", description="script that SockJS's iframe page loads; the same version as in the page itself")
    sockjs_heartbeat_delay: float = Field(25.0, ge=0, le=86400, description="seconds between two SockJS heartbeats; 0: none")
    # ---- servers and people
    insecure_api: bool = Field(False, description="requests to /api/ need no signature; for a port that only the application reaches")
    api_port: int = Field(0, ge=0, le=65535, description="port of a listener for /api/ alone; 0: it is with the others")
    api_max_bytes: int = Field(10485760, ge=1024, le=1073741824, description="bytes of one request to /api/; a larger one is answered with 413")
    admin: bool = Field(False, description="the admin socket, /socket")
    admin_password: SecretStr = Field(SecretStr(""), description="for /auth/; empty: nobody gets in")
    admin_secret: SecretStr = Field(SecretStr(""), description="signs what /auth/ gives; empty: nobody gets in")
    insecure_admin: bool = Field(False, description="the admin socket asks for no password; for a port that only administrators reach")
    admin_port: int = Field(0, ge=0, le=65535, description="port of a listener for the admin paths alone; 0: they are with the others")
    web: bool = Field(False, description="/auth/ and the admin socket; Centrifugo's own page is not included, the live page of [server] is there instead")
    debug: bool = Field(False, description="/debug/ beside the admin paths: tasks, memory and connections as text; with neither admin nor web too")
    node_ping_interval: float = Field(3.0, ge=0.1, le=3600, description="seconds between two signs of life of a node in stats; after twice as long, and a second, it is left out")
    node_metrics_interval: float = Field(60.0, ge=0.1, le=86400, description="seconds between two snapshots of the counters in stats")

    @field_validator("namespaces")
    @classmethod
    def _have_good_names(cls, namespaces: Mapping[str, CentrifugoNamespace]) -> Mapping[str, CentrifugoNamespace]:
        for name in namespaces:
            if not _NAMESPACE_NAME.fullmatch(name):
                raise ValueError(f"{name!r}: a namespace's name has two or more letters, digits, _ or -")
            if name in RESERVED_NAMESPACES:
                raise ValueError(f"{name!r}: the channels of this name belong to another door")
        return namespaces

    @property
    def missing(self) -> str:
        """See `Section`. An HMAC with an empty key can be forged. With `insecure` or `insecure_api`
        what still needs a signature is refused.
        """
        signs = bool(self.secret.get_secret_value())
        return "" if signs or self.insecure or self.insecure_api else "secret"

    def namespace(self, name: str) -> CentrifugoNamespace | None:
        """The rules of a namespace, of channels without one for ''; None where there is none."""
        return self.namespaces.get(name) if name else self


SETTINGS = CentrifugoSettings
