"""Sections of producers that are too long for their own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, SecretStr

from relay.config.settings import Section


class EmitterSettings(Section):
    """[producer:socketio_emitter]: emits of socket.io-emitter, @socket.io/redis-emitter and the streams emitter."""

    redis_host: str = Field(
        "",
        description="host of the Redis that the emitters publish to; with neither this nor redis_url nothing is taken from there",
    )
    redis_port: int = Field(6379, ge=1, le=65535, description="its port")
    redis_url: str = Field(
        "",
        description="the same Redis as redis://[user:pw@]host:port/db, rediss:// or sentinel://, in place of redis_host; the relay's own may be given too",
    )
    redis_password: SecretStr = Field(SecretStr(""), description="password where the URL has none")
    same_as: ClassVar[Mapping[str, tuple[str, str]]] = {
        "namespace": ("protocol:socketio", "namespace")
    }

    namespace: str = Field(
        "",
        max_length=100,
        pattern=r"^(/[^\s,?#]*)?$",
        description="the emitters' namespace; emits to other namespaces are ignored; empty: [protocol:socketio] namespace, which it must equal",
    )
    key: str = Field(
        "socket.io",
        min_length=1,
        max_length=100,
        pattern=r"^[^\s#]+$",
        description="the emitters' option key, the start of their channels",
    )
    streams: str = Field(
        "socket.io",
        max_length=1000,
        description="streams of the streams emitter, separated by commas; empty: none",
    )

    def source(self) -> str:
        """The URL to listen to; empty: none."""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return self.redis_url or (host and f"redis://{host}:{self.redis_port}/0")

    def stream_names(self) -> list[str]:
        """Each of them."""
        return [name.strip() for name in self.streams.split(",") if name.strip()]
