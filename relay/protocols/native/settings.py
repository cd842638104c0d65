"""[protocol:native]: the door of server-sent events, the plain websocket and the live page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from relay.config.settings import ListenerSection

# Not a setting: pages of other applications set this cookie, and a second name would be a second
# way in.
COOKIE_NAME = "relay_token"


class NativeSettings(ListenerSection):
    """[protocol:native]: Server-sent events at /sse, WebSocket at /ws, and the live page."""

    removed: ClassVar[Mapping[str, str]] = {
        "commands_burst": "is no longer read; a client may send the commands_per_s of 4 seconds at once"
    }

    enabled: bool = Field(True, description="Enable this protocol. When disabled, its URLs return 404.")
    page: bool = Field(True, description="Serve the live page at /. The page reads only channels that the visitor's token grants.")
    allowed_origins: str = Field("", description="Additional origins whose pages may connect across origins and with the cookie, separated by commas, for example https://app.example.org. Relay's own origin is always allowed.")
    heartbeat_s: float = Field(25.0, ge=1, le=3600, description="Interval between heartbeats on idle connections. Keep it below your proxy's idle timeout.")
    pong_timeout_s: float = Field(10.0, ge=1, le=3600, description="Close a WebSocket connection with code 4408 if it does not answer a ping within this time.")
    retry_ms: int = Field(2000, ge=100, le=600000, description="Reconnect delay sent to browsers. It varies by up to half per client to avoid a reconnect storm.")
    channels_per_connection: int = Field(128, ge=1, le=1024, description="Maximum channels per connection. Each channel adds about 35 bytes to the cursor in every event of an SSE connection.")
    ws_max_frame_bytes: int = Field(65536, ge=1024, le=16777216, description="Maximum size of one frame from a client. A larger frame closes the connection with code 1009.")
    commands_per_s: float = Field(50.0, gt=0, le=100000, description="Maximum commands per second on a WebSocket connection. A client may send those of 4 seconds at once. A higher rate closes the connection with code 4429.")

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

    @property
    def burst(self) -> float:
        """Return how many commands a WebSocket client may send at once."""
        return max(1.0, 4 * self.commands_per_s)

    def origins(self) -> frozenset[str]:
        """The allowed origins besides the relay's own, as browsers write them."""
        return frozenset(_as_sent(origin.lower()) for origin in _split(self.allowed_origins))


SETTINGS = NativeSettings


def _as_sent(origin: str) -> str:
    # Browsers leave out the scheme's own port.
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
