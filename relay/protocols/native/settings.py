"""[protocol:native]: settings of server-sent events, WebSocket and the live page."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from relay.config.lists import check_origins, origins
from relay.config.settings import ListenerSection

# Not a setting, because applications whose pages set this cookie must be able to rely on its name.
COOKIE_NAME = "relay_token"


class NativeSettings(ListenerSection):
    """[protocol:native]: Server-sent events at /sse, WebSocket at /ws, and the live page."""

    removed: ClassVar[Mapping[str, str]] = {
        "commands_burst": "is no longer read; a client may send the commands_per_s of 4 seconds at once"
    }

    enabled: bool = Field(True, description="Enable this protocol. When disabled, its URLs return 404.")
    page: bool = Field(True, description="Serve the live page at /. The page reads only channels that the visitor's token grants.")
    allowed_origins: str = Field("", description="Additional origins whose pages may connect across origins and with the cookie, separated by commas, for example https://app.example.org or, for an app in a web view, capacitor://localhost. Relay's own origin is always allowed.")
    heartbeat_s: float = Field(25.0, ge=1, le=3600, description="Interval between heartbeats on idle connections. Keep it below your proxy's idle timeout.")
    pong_timeout_s: float = Field(10.0, ge=1, le=3600, description="Close a WebSocket connection with code 4408 if it does not answer a ping within this time.")
    retry_ms: int = Field(2000, ge=100, le=600000, description="Reconnect delay sent to browsers. It varies by up to half per client to avoid a reconnect storm.")
    channels_per_connection: int = Field(128, ge=1, le=1024, description="Maximum channels per connection. Each channel adds about 35 bytes to the cursor in every event of an SSE connection.")
    ws_max_frame_bytes: int = Field(65536, ge=1024, le=16777216, description="Maximum size of one frame from a client. A larger frame closes the connection with code 1009.")
    commands_per_s: float = Field(50.0, gt=0, le=100000, description="Maximum commands per second on a WebSocket connection. A client may send those of 4 seconds at once. A higher rate closes the connection with code 4429.")

    _check_origins = field_validator("allowed_origins")(check_origins)

    def next_retry_ms(self) -> int:
        """Return the reconnect delay for one client."""
        return int(self.retry_ms * random.uniform(0.5, 1.5))  # noqa: S311  # not a key

    @property
    def burst(self) -> float:
        """Return how many commands a WebSocket client may send at once."""
        return max(1.0, 4 * self.commands_per_s)

    def origins(self) -> frozenset[str]:
        """Return the allowed origins besides relay's own, as browsers send them."""
        return origins(self.allowed_origins)


SETTINGS = NativeSettings
