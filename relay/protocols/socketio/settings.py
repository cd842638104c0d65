"""[protocol:socketio]: AcceleratXR's push notifications over Socket.IO."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator

from relay.config.settings import JwtSettings, Section

if TYPE_CHECKING:
    from relay.transports.engineio.endpoint import Timing


class SocketIoSettings(Section):
    """[protocol:socketio]: AcceleratXR's push notifications for Socket.IO 2, 3 and 4 clients."""

    fixed: ClassVar[frozenset[str]] = Section.fixed | {"namespace", "paths"}

    secret: SecretStr = Field(SecretStr(""), description="what signs the clients' JWTs (or the PEM public key); several for rotation, separated by a line with ---; empty: none of its paths exist")
    algorithm: Literal["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "EdDSA"] = Field("HS256", description="the only algorithm accepted, whatever a token says")
    audience: str = Field("", description="required aud; empty: not checked")
    issuer: str = Field("", description="required iss; empty: not checked")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own; 0: the shared listener of [server]")
    tls_cert: str = Field("", description="path of a PEM certificate chain for a listener of its own; empty: that of [server]")
    tls_key: str = Field("", description="path of its PEM private key")
    namespace: str = Field("/axr", min_length=1, max_length=100, pattern=r"^/[^\s,?#]*$", description="the Socket.IO namespace of all clients, and of emitters too")
    paths: str = Field("/notifications/, /socket.io/", description="paths that are served, separated by commas; clients give one as their option path")
    allowed_origins: str = Field("", description="origins besides the relay's own, as https://app.example.org, separated by commas, whose pages may come with the cookie jwt; with a token in query, header or auth any page may come")
    ping_interval_s: float = Field(25.0, ge=0.1, le=3600, description="seconds between two heartbeats; clients are told")
    ping_timeout_s: float = Field(20.0, ge=0.1, le=3600, description="seconds a heartbeat may stay without an answer; clients are told")
    upgrade_timeout_s: float = Field(10.0, ge=0.1, le=300, description="seconds for the change from polling to websocket")
    connect_timeout_s: float = Field(45.0, ge=0.1, le=3600, description="seconds within which a client must have joined the namespace")
    max_payload_bytes: int = Field(1000000, ge=1024, le=67108864, description="bytes of one message or request from a client")
    recovery_s: float = Field(120.0, ge=0, le=86400, description="seconds within which a 4.x client that lost its connection gets what it missed, whichever worker it comes back to; 0: never")

    @property
    def missing(self) -> str:
        """See `Section`. Tokens signed with an empty secret could be forged."""
        return "" if self.secret.get_secret_value() else "secret"

    @field_validator("paths")
    @classmethod
    def _are_paths(cls, text: str) -> str:
        for path in _split(text):
            if not path.startswith("/") or path == "/" or any(char in path for char in "{}?#"):
                raise ValueError(f"{path!r} is not a path such as /notifications/")
        return text

    def path_list(self) -> list[str]:
        """Each path, with and without its last slash."""
        bare = [path.rstrip("/") for path in _split(self.paths)]
        return list(dict.fromkeys(form for path in bare for form in (path, f"{path}/")))

    def origins(self) -> frozenset[str]:
        """Whose pages may come with the cookie."""
        return frozenset(origin.lower().rstrip("/") for origin in _split(self.allowed_origins))

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
            upgrade_timeout_s=self.upgrade_timeout_s,
        )


SETTINGS = SocketIoSettings


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
