"""[protocol:centrifugo]: the door of Centrifugo v1."""

from __future__ import annotations

from pydantic import Field, SecretStr

from relay.settings import Section


class CentrifugoSettings(Section):
    """[protocol:centrifugo]: Centrifugo v1's HTTP API, `/api/`."""

    enabled: bool = Field(True, description="off: none of its paths exist")
    secret: SecretStr = Field(SecretStr(""), description="signs requests to /api/; empty: none of its paths exist, since anyone can sign with an empty secret")
    host: str = Field("", description="address of a listener of its own; empty: the one of [server]; counts only with a port")
    port: int = Field(0, ge=0, le=65535, description="port of a listener of its own; 0: the shared listener of [server]")
    api_max_bytes: int = Field(10485760, ge=1024, le=1073741824, description="bytes of one request to /api/; a larger one is answered with 413")
