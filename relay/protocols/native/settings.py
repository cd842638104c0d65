"""[protocol:native]: the door of server-sent events, the plain websocket and the live page."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from relay.config.settings import Section

# Not a setting: pages of other applications set this cookie, and a second name would be a second
# way in.
COOKIE_NAME = "relay_token"


class NativeSettings(Section):
    """[protocol:native]: `/sse`, `/ws` and the live page."""

    enabled: bool = Field(True, description="off: none of its paths exist")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own; 0: the shared listener of [server]")
    tls_cert: str = Field("", description="path of a PEM certificate chain for a listener of its own; empty: that of [server]")
    tls_key: str = Field("", description="path of its PEM private key")
    page: bool = Field(True, description="the live page at /; it reads nothing without a token that opens it")
    allowed_origins: str = Field("", description="origins besides the relay's own, as https://app.example.org, separated by commas, whose pages may read with the cookie and across origins")
    heartbeat_s: float = Field(25.0, ge=1, le=3600, description="seconds of silence after which a comment line or a ping is sent; proxies close what is silent for 30 or 60")
    pong_timeout_s: float = Field(10.0, ge=1, le=3600, description="seconds a websocket may leave a ping without an answer before it is closed with 4408")
    retry_ms: int = Field(2000, ge=100, le=600000, description="milliseconds a browser waits before it reconnects; each client is told up to half more or less, so that they do not all return at once")
    channels_per_connection: int = Field(128, ge=1, le=1024, description="channels of one connection; each makes the cursor, which is in every event of such an SSE stream, about 35 bytes longer")
    ws_max_frame_bytes: int = Field(65536, ge=1024, le=16777216, description="bytes of one frame from a client; a larger one closes with 1009")
    commands_per_s: float = Field(50.0, gt=0, le=100000, description="commands per second of one websocket, on average over a few seconds; faster closes with 4429")
    commands_burst: int = Field(200, ge=1, le=100000, description="commands a websocket may send at once, as at a start with many channels")

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        for origin in _split(text):
            parts = urlsplit(origin)
            try:
                whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
            except ValueError:
                whole = False
            # No '*': with a cookie it would let any page read as the user.
            if not whole or "*" in origin or origin != f"{parts.scheme}://{parts.netloc}" or "@" in origin:
                raise ValueError(f"{origin!r} is not an origin such as https://app.example.org")
        return text

    def origins(self) -> frozenset[str]:
        """The allowed origins besides the relay's own, as browsers write them."""
        return frozenset(_as_sent(origin.lower()) for origin in _split(self.allowed_origins))


SETTINGS = NativeSettings


def _as_sent(origin: str) -> str:
    # Browsers leave out the scheme's own port.
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
