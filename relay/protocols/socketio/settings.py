"""[protocol:socketio]: AcceleratXR's push notifications over Socket.IO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator

from relay.config.lists import check_origins, origins, split
from relay.config.settings import JwtSettings, ListenerSection

if TYPE_CHECKING:
    from relay.transports.engineio.endpoint import Timing


class SocketIoSettings(ListenerSection):
    """[protocol:socketio]: Push notifications of AcceleratXR for Socket.IO 2, 3 and 4 clients."""

    fixed: ClassVar[frozenset[str]] = ListenerSection.fixed | {"namespace", "paths"}
    removed: ClassVar[Mapping[str, str]] = {
        "upgrade_timeout_s": "is no longer read; an upgrade to WebSocket may take 10 s, as in Socket.IO's server",
        "connect_timeout_s": "is no longer read; a client has 45 s to join the namespace, as in Socket.IO's server",
    }

    secret: SecretStr = Field(SecretStr(""), description="JWT signing secret, or PEM public key for RS*/ES*/EdDSA. Separate several keys with a line \"---\" to rotate them. Leave empty to disable this protocol.")
    algorithm: Literal["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"] = Field("HS256", description="Signature algorithm. Tokens that use any other are rejected.")
    audience: str = Field("", description="Required audience (aud) of a token. Empty: not checked.")
    issuer: str = Field("", description="Required issuer (iss) of a token. Empty: not checked.")
    namespace: str = Field("/axr", min_length=1, max_length=100, pattern=r"^/[^\s,?#]*$", description="Socket.IO namespace of all clients and emitters.")
    paths: str = Field("/notifications/, /socket.io/", description="Paths to serve, separated by commas. Clients set one as their option path.")
    allowed_origins: str = Field("", description="Additional origins whose pages may connect with the cookie jwt, separated by commas, for example https://app.example.org. Pages of any origin may connect with a token in the query, a header or auth.")
    ping_interval_s: float = Field(25.0, ge=0.1, le=3600, description="Interval between heartbeats. Clients receive this value when they connect.")
    ping_timeout_s: float = Field(20.0, ge=0.1, le=3600, description="Timeout for the answer to a heartbeat. Clients receive this value when they connect.")
    max_payload_bytes: int = Field(1000000, ge=1024, le=67108864, description="Maximum size of one message or request from a client.")
    recovery_s: float = Field(120.0, ge=0, le=86400, description="Send missed events to Socket.IO 4 clients that reconnect within this time, on any worker. 0 disables recovery.")

    @property
    def missing(self) -> str:
        """See `Section`. Tokens signed with an empty secret could be forged."""
        return "" if self.secret.get_secret_value() else "secret"

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        # Earlier versions accepted a slash at the end.
        return check_origins(",".join(origin.rstrip("/") for origin in split(text)))

    @field_validator("paths")
    @classmethod
    def _are_paths(cls, text: str) -> str:
        for path in split(text):
            if not path.startswith("/") or path == "/" or any(char in path for char in "{}?#"):
                raise ValueError(f"{path!r} is not a path such as /notifications/")
        return text

    def path_list(self) -> list[str]:
        """Each path, with and without its last slash."""
        bare = [path.rstrip("/") for path in split(self.paths)]
        return list(dict.fromkeys(form for path in bare for form in (path, f"{path}/")))

    def origins(self) -> frozenset[str]:
        """Return the additional origins as browsers send them."""
        return origins(self.allowed_origins)

    def jwt(self) -> JwtSettings:
        """How tokens are read."""
        return JwtSettings(algorithm=self.algorithm, key=self.secret, audience=self.audience, issuer=self.issuer)

    def timing(self) -> Timing:
        """Return the heartbeat and size limits that clients receive at the start."""
        # Not above: aiohttp is slow to import, and every command reads the settings.
        from relay.transports.engineio.endpoint import Timing

        return Timing(
            ping_interval_s=self.ping_interval_s,
            ping_timeout_s=self.ping_timeout_s,
            max_payload_bytes=self.max_payload_bytes,
        )


SETTINGS = SocketIoSettings
