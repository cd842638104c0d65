"""Settings of the Pydio protocol, for Pydio 6.4 to 8."""

from __future__ import annotations

from ipaddress import ip_network
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from typing_extensions import override

from relay.config.lists import check_origins, origins, split
from relay.config.settings import ListenerSection, Section

_PATH = r"^/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-]$"


class PydioSettings(ListenerSection):
    """[protocol:pydio]: Pydio's message queues, from PHP to browsers."""

    fixed: ClassVar[frozenset[str]] = Section.fixed | {
        "private_host", "private_port", "public_path", "private_path", "npm_namespace",
    }  # fmt: skip

    enabled: bool = Field(True, description="Enable this protocol. When disabled, its URLs return 404.")
    key: SecretStr = Field(SecretStr(""), description="Key shared with Pydio, which authenticates PHP to relay and relay to Pydio (6.4.2: WS_SERVER_ADMIN; 6.5 to 8: the Booster's key pair as TOKEN:SECRET). Leave empty to disable this protocol.")
    auth_url: str = Field("", description="URL at which Pydio authenticates a browser, for example http://127.0.0.1/pydio/?get_action=ws_authenticate, or for 6.5 to 8 http://127.0.0.1/pydio/api/pydio/ws_authenticate/. Leave empty to reject all browsers.")
    private_host: str = Field("", description="Address of a separate listener for PHP. Used only if private_port is set. Empty: the address of [server].")
    private_port: int = Field(0, ge=0, le=65535, description="Port of a separate listener for PHP, without TLS because Pydio 6.4.2 cannot use it there. 0: serve private_path on the listener of this protocol.")
    public_path: str = Field("/public", pattern=_PATH, description="Path to which browsers connect.")
    private_path: str = Field("/private", pattern=_PATH, description="Path to which PHP connects. For Pydio 6.4.2, which has a single path, use the value of public_path.")
    authorised_hosts: str = Field("localhost, 127.0.0.1, ::1", description="Hosts from which PHP may connect, separated by commas: addresses, networks such as 10.0.0.0/8, or names. Do not list a proxy that other programs can use.")
    private_max_bytes: int = Field(1048576, ge=1024, le=67108864, description="Maximum size of one message from PHP. A larger message is dropped.")
    allowed_origins: str = Field("", description="Additional origins whose pages may connect with the cookie, separated by commas, for example https://files.example.org. Set it to Pydio's origin if Pydio has another host or port.")
    cookies: str = Field("AjaXplorer", description="Prefixes of the names of the cookies that relay forwards to Pydio, separated by commas. Other cookies are never forwarded.")
    auth_timeout_s: float = Field(5.0, gt=0, le=60, description="Timeout for Pydio's answer to an authentication request.")
    auth_cache_s: float = Field(10.0, ge=0, le=3600, description="Time for which Pydio's answer for the same cookies is cached.")
    recheck_s: float = Field(60.0, ge=1, le=86400, description="Interval at which Pydio is asked again about connected browsers. A browser that has lost a right stops receiving events then.")
    hold_s: float = Field(600.0, ge=1, le=86400, description="Keep browsers connected for this time after Pydio's last answer while Pydio is unavailable. Must be at least recheck_s.")
    npm_namespace: str = Field("/", min_length=1, max_length=100, pattern=r"^/[^\s,?#]*$", description="Socket.IO namespace for clients of Pydio's npm kind, which connect to public_path.")
    npm_recovery_s: float = Field(120.0, ge=0, le=86400, description="Send missed events to Socket.IO 4 clients that reconnect within this time, on any worker. 0 disables recovery.")
    heartbeat_s: float = Field(25.0, ge=1, le=3600, description="Interval between pings to a browser. Keep it below your proxy's idle timeout.")
    pong_timeout_s: float = Field(10.0, ge=1, le=3600, description="Close a browser's connection if it does not answer a ping within this time.")
    drain_s: float = Field(30.0, ge=0, le=300, description="On shutdown, keep browsers connected for this time, because they do not reconnect until their page is reloaded.")

    @property
    @override
    def missing(self) -> str:
        # Without a key, PHP cannot be distinguished from other clients.
        return "" if self.key.get_secret_value() else "key"

    @field_validator("auth_url")
    @classmethod
    def _is_url(cls, text: str) -> str:
        try:
            url = urlsplit(text)
            good = not text or (url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0 and not url.fragment)
        except ValueError:
            good = False
        if not good:
            raise ValueError("must be http://HOST/... or https://HOST/...")
        return text

    @field_validator("authorised_hosts")
    @classmethod
    def _are_hosts(cls, text: str) -> str:
        for host in split(text):
            if "/" in host:
                ip_network(host)
            elif "*" in host:
                raise ValueError(f"{host!r} is not a host; a network is written as 127.0.0.0/24")
            elif any(character.isspace() for character in host):
                raise ValueError(f"{host!r} is not a host")
        return text

    _check_origins = field_validator("allowed_origins")(check_origins)

    @model_validator(mode="after")
    def _hold_is_not_shorter_than_recheck(self) -> PydioSettings:
        if self.hold_s < self.recheck_s:
            raise ValueError("hold_s must be at least recheck_s")
        return self

    def origins(self) -> frozenset[str]:
        """Return the additional origins as browsers send them."""
        return origins(self.allowed_origins)


SETTINGS = PydioSettings
