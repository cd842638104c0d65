"""[protocol:pydio]: the door of Pydio 6.4 to 8."""

from __future__ import annotations

from ipaddress import ip_network
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from relay.config.settings import Section

_PATH = r"^/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-]$"


class PydioSettings(Section):
    """[protocol:pydio]: Pydio's message queues, from PHP to its browsers."""

    fixed: ClassVar[frozenset[str]] = Section.fixed | {
        "private_host", "private_port", "public_path", "private_path", "npm_namespace",
    }  # fmt: skip

    enabled: bool = Field(True, description="off: none of its paths exist")
    key: SecretStr = Field(SecretStr(""), description="Pydio's private key (6.4.2: WS_SERVER_ADMIN; 6.5 to 8: the Booster's key pair as TOKEN:SECRET): PHP shows it, and so does the relay to Pydio; empty: none of its paths exist")
    auth_url: str = Field("", description="where Pydio says who a browser is, as http://127.0.0.1/pydio/?get_action=ws_authenticate or, 6.5 to 8, http://127.0.0.1/pydio/api/pydio/ws_authenticate/; empty: no browser is let in")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own (Pydio's default is 8090); 0: the shared listener of [server]")
    tls_cert: str = Field("", description="path of a PEM certificate chain for a listener of its own, for a public connection through SSL; empty: that of [server]")
    tls_key: str = Field("", description="path of its PEM private key")
    private_host: str = Field("", description="address of a listener for PHP alone; empty: the one of [server]; counts only with a port")
    private_port: int = Field(0, ge=0, le=65535, description="port of a listener for PHP alone, without TLS, which 6.4.2 does not speak there; 0: the private path is beside the public one")
    public_path: str = Field("/public", pattern=_PATH, description="where browsers connect")
    private_path: str = Field("/private", pattern=_PATH, description="where PHP connects; the same as public_path for 6.4.2, which has one path for both")
    authorised_hosts: str = Field("localhost, 127.0.0.1, ::1", description="hosts that PHP may connect from: addresses, networks as 10.0.0.0/8, or names, separated by commas; not a proxy that others can reach")
    private_max_bytes: int = Field(1048576, ge=1024, le=67108864, description="bytes of one message of PHP; a longer one closes its connection with 1009")
    allowed_origins: str = Field("", description="origins besides the relay's own, as https://files.example.org, separated by commas, whose pages may connect with a cookie: Pydio's, where it has another host or port")
    cookies: str = Field("AjaXplorer", description="beginnings of the names of the cookies that are shown to Pydio, separated by commas; no other cookie leaves the relay")
    auth_timeout_s: float = Field(5.0, gt=0, le=60, description="seconds Pydio may take to say who a browser is")
    auth_cache_s: float = Field(10.0, ge=0, le=3600, description="seconds in which the same cookies are not asked about again")
    recheck_s: float = Field(60.0, ge=1, le=86400, description="seconds after which Pydio is asked again about who is connected; a right that is lost ends with it")
    hold_s: float = Field(600.0, ge=1, le=86400, description="seconds since Pydio's last answer that a browser stays while Pydio gives none")
    npm_namespace: str = Field("/", min_length=1, max_length=100, pattern=r"^/[^\s,?#]*$", description="the Socket.IO namespace of the npm kind, whose path is public_path")
    npm_recovery_s: float = Field(120.0, ge=0, le=86400, description="seconds within which a Socket.IO 4 client that lost its connection gets what it missed, whichever worker it comes back to; 0: never")
    heartbeat_s: float = Field(25.0, ge=1, le=3600, description="seconds between pings to a browser; proxies close what is silent for 30 or 60")
    pong_timeout_s: float = Field(10.0, ge=1, le=3600, description="seconds a browser may leave a ping without an answer before it is closed")
    drain_s: float = Field(30.0, ge=0, le=300, description="seconds that a stop leaves Pydio's browsers connected, for they do not come back until their page is loaded again")

    @property
    def missing(self) -> str:
        """See `Section`. Without a key PHP could not be told from any other client."""
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
            raise ValueError("allowed is http://HOST/... or https://HOST/...")
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

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        for origin in split(text):
            parts = urlsplit(origin)
            # No '*': with a cookie it would let any page read as the user.
            if parts.scheme not in {"http", "https"} or not parts.hostname or "*" in origin or "@" in origin or origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"{origin!r} is not an origin such as https://files.example.org")
        return text

    @model_validator(mode="after")
    def _holds_longer_than_it_asks(self) -> PydioSettings:
        if self.hold_s < self.recheck_s:
            raise ValueError("hold_s is at least recheck_s")
        return self

    def origins(self) -> frozenset[str]:
        """The allowed origins besides the relay's own, as browsers write them: without the scheme's own port."""
        origins = (origin.lower() for origin in split(self.allowed_origins))
        return frozenset(origin.removesuffix(":443" if origin.startswith("https:") else ":80") for origin in origins)


SETTINGS = PydioSettings


def split(text: str) -> list[str]:
    """The parts of a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
